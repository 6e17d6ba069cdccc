"""DeepSpeed JSONs: read, checked to the last key, and completed with what the recipe says."""

from stacking_ds.ds_json.json_file import load_ds_config
from stacking_ds.ds_json.resolving import Precision, resolve_ds_config
from stacking_ds.ds_json.settings import asks_for_log

__all__ = ["Precision", "asks_for_log", "load_ds_config", "resolve_ds_config"]
