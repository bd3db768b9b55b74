"""The algebra that rules speak: axes, polynomials in their sizes, nodes, and one call of an op."""
