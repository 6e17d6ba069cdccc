"""Read a recipe: a YAML file and dotted overrides become a `RunConfig`.

The order is: defaults of the sections, then the recipe, then `--set section.key=value`. What
results is written into the run directory, so that a run says by itself what it was.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import stacking_ds
from stacking_ds.config.mistakes import is_of_file, sentences
from stacking_ds.config.overrides import Override, OverrideError
from stacking_ds.config.run import RunConfig
from stacking_ds.config.yaml_text import Tree, YamlTextError, plain, read_yaml
from stacking_ds.console import shortened
from stacking_ds.errors import ConfigError
from stacking_ds.files import DamagedFileError, read_text

_MOST_BYTES = 2**18
_MOST_PROBLEMS = 20
_OF_SLURM = {".sbatch", ".sh", ".md"}


def ds_config_path(name: str) -> Path:
    """The DeepSpeed JSON `name`: a path, or the name of a bundled one such as `zero1`; a
    `ConfigError` that lists the bundled ones where there is neither."""
    return _find(name, _folder("ds_configs"), ".json", "DeepSpeed JSON")


def recipe_path(name: str) -> Path:
    """The recipe `name`: a path, or the name of a bundled one; a `ConfigError` that lists the
    bundled ones where there is neither."""
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


def load_run_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of a bundled one) and apply `key=value` overrides, the
    later of two for the same key last. Raises `ConfigError`: no such recipe, not YAML, unknown keys
    (with the nearest right one), values of the wrong type or range; all of them in one message."""
    path = recipe_path(recipe)
    tree = _read(path)
    applied: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        try:
            applied.append(Override.into(tree, text))
        except OverrideError as error:
            problems.append(f"--set {shortened(text)}: {error}")
    found: list[Any] = []
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(plain(tree))
    except ValidationError as error:
        # what is missing may be what a wrong override was to give
        left_out = ("missing",) if problems else ()
        found = [one for one in error.errors() if one["type"] not in left_out]
    problems = [*sentences(found[:_MOST_PROBLEMS], tree, applied), *problems]
    if config is None or problems:
        told = problems[:_MOST_PROBLEMS]
        if more := max(0, len(found) - _MOST_PROBLEMS) + len(problems) - len(told):
            told.append(f"and {more:,} more")
        where = f"recipe {path}: " if any(map(is_of_file, problems)) else ""
        raise ConfigError(where + "; ".join(told))
    return config


def _read(path: Path) -> dict[str, Tree]:
    try:
        tree = read_yaml(read_text(path, _MOST_BYTES))
    except (OSError, DamagedFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise ConfigError(f"cannot read recipe {path}: {reason}") from None
    except YamlTextError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        what = "a list" if isinstance(tree, list) else shortened(tree.text) or "nothing"
        raise ConfigError(f"recipe {path} must be a mapping of sections, not {what}")
    return tree
