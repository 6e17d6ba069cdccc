"""On the PYTHONPATH of a run, holds its ranks where HOLD says, until HOLD_FOLDER or a signal
releases them: HOLD="step:5,boundary:7,save:3".

A rank that has come there writes PLACE-STEP.rankN into the folder, and goes on when it is asked to
stop or when PLACE-STEP.released is there, which the first to be asked to stop writes. So each place
holds once, also in attempts to come.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_LONGEST_SECONDS = 150.0
_asked_to_stop = False


def _hold(place: str, step: int) -> None:
    name = f"{place}-{step}"
    if f"{place}:{step}" not in os.environ["HOLD"].split(","):
        return
    folder = Path(os.environ["HOLD_FOLDER"])
    released = folder / f"{name}.released"
    if released.exists():
        return
    (folder / f"{name}.rank{os.environ['RANK']}").write_text(str(os.getpid()))
    deadline = time.monotonic() + _LONGEST_SECONDS
    while not released.exists() and time.monotonic() < deadline:
        if _asked_to_stop:
            released.touch()
        time.sleep(0.02)


def _before(owner: Any, name: str, hold: Any) -> None:
    original = getattr(owner, name)

    def held(self: Any, *arguments: Any, **options: Any) -> Any:
        hold(self, *arguments, **options)
        return original(self, *arguments, **options)

    setattr(owner, name, held)


def _patch_trainer(module: ModuleType) -> None:
    def hold(*_: Any, world: Any, **__: Any) -> None:
        _hold("step", world.pulse.step + 1)

    _before(module, "training_step", hold)


def _patch_stages(module: ModuleType) -> None:
    _before(module.StageEngine, "grow", lambda _, old, new: _hold("boundary", new.start_step))


def _patch_saves(module: ModuleType) -> None:
    def hold(save: Any, *_: Any) -> None:
        _hold("save", int(save.folder.name.removeprefix("step_")))

    _before(module.BackgroundSave, "_write", hold)


def _patch_signals(module: ModuleType) -> None:
    original = module.StopRequest._remember

    def remember(self: Any, number: int, frame: Any) -> None:
        global _asked_to_stop  # noqa: PLW0603 - a signal is the process's
        _asked_to_stop = True
        original(self, number, frame)

    module.StopRequest._remember = remember


_PATCHES = {
    "stacking_ds.train.loop": _patch_trainer,
    "stacking_ds.train.stage_engine": _patch_stages,
    "stacking_ds.checkpoint.save": _patch_saves,
    "stacking_ds.process.stop_signals": _patch_signals,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _PATCHES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "HOLD" in os.environ:
    sys.meta_path.insert(0, _Finder())
