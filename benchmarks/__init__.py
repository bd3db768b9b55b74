"""Benchmarks: depgraph and its peers side by side on real architectures with random weights."""
