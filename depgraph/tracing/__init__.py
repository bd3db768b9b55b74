"""Model and example inputs -> the recorded run."""
