"""Find the JSONs, recipes and batch scripts of the package, in a checkout or a wheel."""

import os
from pathlib import Path

import stacking_ds
from stacking_ds.console import shortened
from stacking_ds.errors import ConfigError

__all__ = ["batch_scripts", "ds_config_path", "recipe_path"]

_OF_SLURM = {".sbatch", ".sh", ".md"}


def ds_config_path(name: str) -> Path:
    """The DeepSpeed JSON `name`: a path, or the name of a bundled one such as `zero1`.

    Raises:
        ConfigError: there is neither; the message lists the bundled names.
    """
    return _find(name, _folder("ds_configs"), ".json", "DeepSpeed JSON")


def recipe_path(name: str) -> Path:
    """The recipe `name`: a path, or the name of a bundled one.

    Raises:
        ConfigError: there is neither; the message lists the bundled names.
    """
    return _find(name, _folder("ds_configs") / "recipes", ".yaml", "recipe")


def batch_scripts() -> list[Path]:
    """The files of slurm/: scripts, the site's settings and their README."""
    return sorted(path for path in _folder("slurm").iterdir() if path.suffix in _OF_SLURM)


def _folder(name: str) -> Path:
    package = Path(stacking_ds.__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def _find(name: str, folder: Path, suffix: str, what: str) -> Path:
    # what is there and cannot be read is told by whoever reads it
    given = os.path.expanduser(name)
    if given.endswith(suffix) and os.path.lexists(given):
        return Path(given)
    bundled = {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
    stem = name.removesuffix(suffix)
    if stem in bundled:
        return bundled[stem]
    known = ", ".join(bundled) or f"none found in {folder}"
    raise ConfigError(
        f"no {what} '{shortened(name, 200)}': give a path to a {suffix} file, or one of {known}"
    )
