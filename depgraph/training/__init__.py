"""Training before, between and after prunings."""
