"""Smaller or sparser models by other ways than fewer units: fused norms, zeros, factors."""
