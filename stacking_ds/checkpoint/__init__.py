"""The sharded training state on disk: whole or not there, and readable by any number of ranks.

    RUN_DIR/checkpoints/latest                      the name of the newest folder, changed last
    RUN_DIR/checkpoints/step_00001000/
        manifest.json                               what the run was, and how parameters are cut
        rank_00000.safetensors …                    each rank's fragments: "master/NAME" and so on

A folder appears under its name only when every rank's file in it is on disk. A reader takes from
the files the intervals it needs, so another world size or ZeRO stage is an ordinary load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stacking_ds.checkpoint.background import BackgroundSave, save
    from stacking_ds.checkpoint.folders import fall_back, folder_name, latest, prune, saved_steps
    from stacking_ds.checkpoint.manifest import Contents, Manifest, read_manifest
    from stacking_ds.checkpoint.state import load, problems, read_parameters, require_shapes

# where a name is; imported when it is first asked for, since all but `folders` bring torch along
_HOMES = {
    "background": ("BackgroundSave", "save"),
    "folders": ("fall_back", "folder_name", "latest", "prune", "saved_steps"),
    "manifest": ("Contents", "Manifest", "read_manifest"),
    "state": ("load", "problems", "read_parameters", "require_shapes"),
}

__all__ = [
    "BackgroundSave",
    "Contents",
    "Manifest",
    "fall_back",
    "folder_name",
    "latest",
    "load",
    "problems",
    "prune",
    "read_manifest",
    "read_parameters",
    "require_shapes",
    "save",
    "saved_steps",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
