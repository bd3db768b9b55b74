"""A plan and a model -> a smaller model."""
