"""Recipes: reading, extending, overriding and checking them. Neither torch nor numpy is imported here."""

from fastcifar.config.load import find_recipe, load_recipe, recipes_folder, shipped_recipes, to_toml
from fastcifar.config.schema import CombineRecipe, Recipe

__all__ = ["CombineRecipe", "Recipe", "find_recipe", "load_recipe", "recipes_folder", "shipped_recipes", "to_toml"]
