"""`stacking-ds train`: ranks check, train, and end together when one of them is lost."""

import argparse
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig
from stacking_ds.config.sections import ClusterSection
from stacking_ds.console import say, say_on_stderr
from stacking_ds.errors import AgreedError, ConfigError, UserError
from stacking_ds.process.exit import exit_process
from stacking_ds.process.launchers import (
    is_first_of_node,
    rank_from_environment,
    world_size_from_environment,
)
from stacking_ds.process.runtime import keep_caches_on_node, keep_freed_memory
from stacking_ds.process.stop_signals import StopRequest
from stacking_ds.run import attempts
from stacking_ds.run.directory import check, default_run_dir, read_config, require_shards

if TYPE_CHECKING:
    from stacking_ds.distributed.heartbeat import FailureDetector
    from stacking_ds.distributed.world import World
    from stacking_ds.train.plan import TrainingPlan


def add_train(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of `train`; sets `command`, which returns the exit code."""
    parser.add_argument(
        "--recipe",
        help="a bundled recipe's name, or a .yaml file; a run that is resumed has its own",
    )
    parser.add_argument("--run-dir", type=Path, help="where the run lives (runs/<recipe's name>)")
    add_set(parser, "optimizer.learning_rate=1e-3")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        default=False,
        metavar="RUN_DIR",
        help="go on with the run RUN_DIR; without a value, with that in --run-dir if there is one",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe and data, lay out its rows, show the schedule, and stop",
    )
    parser.add_argument(
        "--without-data",
        action="store_true",
        help="with --dry-run: check what can be checked before the token shards are there",
    )
    add_local_rank(parser)
    parser.set_defaults(command=_train)


def add_set(parser: argparse.ArgumentParser, example: str | None = None) -> None:
    """Give `parser` the option that overrides a recipe's keys."""
    such_as = f", e.g. {example}" if example else ""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a key of the recipe{such_as}; repeatable, the last one for a key wins",
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Have `parser` accept what launchers pass; the environment says the same."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _train(options: argparse.Namespace) -> int:
    if options.without_data and not options.dry_run:
        raise ConfigError("--without-data is for --dry-run: training needs the token shards")
    with StopRequest() as request:  # torch takes seconds to import, and SLURM may signal meanwhile
        if not options.dry_run:
            return _train_on_ranks(options, request)
        plan = _opened(options, _config_of(options), world_size_from_environment())
        check(run_dir_of(options, plan.config), plan.config, resume=bool(options.resume))
        if rank_from_environment() == 0:
            say(f"{plan.config.to_yaml()}\n{plan.schedule.draw()}")
    return 0


def _train_on_ranks(options: argparse.Namespace, request: StopRequest) -> int:
    config = None
    try:
        config = _config_of(options)
    except UserError:
        # a recipe that one node lacks must not keep the others waiting for its ranks
        if world_size_from_environment() == 1:
            raise
    cluster = ClusterSection() if config is None else config.cluster
    keep_caches_on_node(_say_on_first_of_node)
    # a lost connection is one sentence of ours, not a page of c10d's from every rank
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if config is not None:
        # DeepSpeed, imported while there is a process group, would keep it and its threads for ever
        import stacking_ds.train.loop  # noqa: F401
    request.raise_if_interrupted()
    from stacking_ds.distributed import heartbeat, process_group

    world = process_group.start(timedelta(seconds=cluster.timeout_seconds))
    if world.device.type == "cpu":
        keep_freed_memory()
    try:
        with heartbeat.FailureDetector(
            world,
            timeout_seconds=cluster.timeout_seconds,
            silence_seconds=min(cluster.silence_seconds, cluster.timeout_seconds),
        ) as detector:
            _train_in_world(options, config, world, request, detector)
    except Exception as error:
        if world.size > 1 and not isinstance(error, AgreedError):
            exit_process(error)
        raise
    finally:
        process_group.stop()
    return 0


def _train_in_world(
    options: argparse.Namespace,
    config: RunConfig | None,
    world: "World",
    request: StopRequest,
    detector: "FailureDetector",
) -> None:
    plan: TrainingPlan = world.on_all(
        lambda: _opened(options, config or _config_of(options), world.size)
    )
    request.raise_if_interrupted()
    from stacking_ds.doctor.examination import require_alike
    from stacking_ds.train.loop import train

    run_dir = run_dir_of(options, plan.config)
    require_alike(world, plan, run_dir)
    if world.is_first:
        detector.record = lambda verdict: attempts.ended(run_dir, "lost", world.pulse.step, verdict)
    train(plan, world, run_dir, resume=bool(options.resume), request=request)
    if world.is_first:
        with suppress(OSError):  # the terminal is gone, and the run is none the worse for it
            say(f"see `stacking-ds report {run_dir}`")


def _opened(options: argparse.Namespace, config: RunConfig, world_size: int) -> "TrainingPlan":
    with_data = not options.without_data
    if with_data and options.recipe is None:
        require_shards(run_dir_of(options, config), config, "--set data.path=FOLDER")
    from stacking_ds.train.plan import open_plan  # seconds of imports, for a recipe that is right

    plan = open_plan(config, world_size, with_data=with_data)
    if with_data:
        plan.data.lay_out_rows(_say_on_first_of_node, len(os.sched_getaffinity(0)))
    return plan


def _say_on_first_of_node(message: str) -> None:
    if is_first_of_node():
        say_on_stderr(message)


def run_dir_of(options: argparse.Namespace, config: RunConfig | None = None) -> Path:
    """The directory of the run whose recipe is `config`, which is read if it is not given. Raises
    `ConfigError`: two directories are given, or none can be told."""
    return _named(options) or default_run_dir(config or _config_of(options))


def _config_of(options: argparse.Namespace) -> RunConfig:
    """The recipe, of the run itself if it is resumed and no other is given, after overrides. Raises
    `ConfigError`: there is none, or a value that cannot be used; `CheckpointError`: the run is not
    there, or its recipe is damaged."""
    if options.recipe is not None:
        return load_run_config(options.recipe, options.set)
    run_dir = _named(options)
    if run_dir is None or not options.resume:
        raise ConfigError(
            "train needs --recipe, a bundled recipe's name or a .yaml file, or the directory of a "
            "run to go on with: --resume RUN_DIR"
        )
    return read_config(run_dir, options.set)


def _named(options: argparse.Namespace) -> Path | None:
    named = [path for path in (options.run_dir, options.resume) if isinstance(path, Path)]
    if len({os.path.realpath(path) for path in named}) > 1:
        raise ConfigError(
            f"--run-dir {options.run_dir} and --resume {options.resume} are two runs; give one"
        )
    return next(iter(named), None)
