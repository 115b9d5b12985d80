"""Conversion of dense and homogeneous checkpoints into expert groups."""

from .pipeline import convert
from .plan import Plan, make_plan
from .recipe import Recipe, load_recipe


__all__ = ["Plan", "Recipe", "convert", "load_recipe", "make_plan"]
