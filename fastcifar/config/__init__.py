"""Recipes: reading, extending, overriding and checking them. Neither torch nor numpy is imported here."""

from fastcifar.config.load import find_recipe, load_recipe, shipped_by_name, shipped_recipes, to_toml
from fastcifar.config.schema import CombineRecipe, Recipe
from fastcifar.locations import recipes_folder

__all__ = [
    "CombineRecipe",
    "Recipe",
    "find_recipe",
    "load_recipe",
    "recipes_folder",
    "shipped_by_name",
    "shipped_recipes",
    "to_toml",
]
