"""A pipeline as plain data, and what the names in it stand for."""

from .recipe import Recipe, RecipeResult

__all__ = ["Recipe", "RecipeResult"]
