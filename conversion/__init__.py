"""Conversion of dense and homogeneous checkpoints into expert groups."""

from mohge.lazy import lazy_names


__all__ = ["Plan", "Recipe", "convert", "load_recipe", "make_plan"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {"Plan": "plan", "Recipe": "recipe", "convert": "pipeline", "load_recipe": "recipe", "make_plan": "plan"},
)
