"""A YAML recipe and dotted overrides become a `RunConfig`; every mistake becomes a sentence."""

from stacking_ds.recipe.loading import load_run_config
from stacking_ds.recipe.sentences import sentences

__all__ = ["load_run_config", "sentences"]
