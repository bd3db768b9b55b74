"""Where a config is repaired: what the numbers in a model were computed from, and what follows for them."""
