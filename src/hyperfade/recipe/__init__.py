"""What to do, as a value: a `Recipe` is read from YAML, checked completely before anything happens, and never changed.

    recipe = Recipe.load("quarter")            # a recipe that ships with hyperfade ...
    recipe = Recipe.load("my-recipe.yaml")     # ... or a file

Every field has its help text beside it; `hyperfade recipe --keys` prints them.
"""

from hyperfade.recipe.reading import SHIPPED_RECIPES, read_yaml
from hyperfade.recipe.recipe import Data, Recipe, Rival
from hyperfade.recipe.replace import Kind, Layer, Region, Replace, Rule
from hyperfade.recipe.steps import Fit, Quantize, Train

__all__ = [
    "SHIPPED_RECIPES",
    "Data",
    "Fit",
    "Kind",
    "Layer",
    "Quantize",
    "Recipe",
    "Region",
    "Replace",
    "Rival",
    "Rule",
    "Train",
    "read_yaml",
]
