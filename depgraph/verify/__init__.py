"""A smaller model against the original with the removed entries zeroed."""
