"""A YAML recipe and dotted overrides become a `RunConfig`; every mistake becomes a sentence."""

from stacking_ds.recipe.mistakes import sentences
from stacking_ds.recipe.recipe_file import load_run_config

__all__ = ["load_run_config", "sentences"]
