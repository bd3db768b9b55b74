"""What is chosen -> a plan, and a plan and a model -> a smaller model."""
