"""The user's batches, and what a model's weights are given to consume on them."""
