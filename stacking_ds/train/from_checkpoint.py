"""Open a run's checkpoint without an engine: its model, its held-out loss, an export."""

from pathlib import Path

import torch

from stacking_ds.checkpoint import folders, load
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.checkpoint.folders import choose
from stacking_ds.checkpoint.hugging_face import export_to_hugging_face
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError
from stacking_ds.model.bert import BertForPreTraining, parameter_shapes
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.parameters import WORD_EMBEDDINGS
from stacking_ds.run import directory
from stacking_ds.run.metrics_file import Course, read_metrics
from stacking_ds.train.heldout import HeldOut, evaluate_heldout
from stacking_ds.train.plan import TrainingPlan


def load_model(plan: TrainingPlan, found: Path) -> BertForPreTraining:
    """The fp32 model of a checkpoint, on the CPU."""
    manifest = checkpoint_manifest.read_manifest(found)
    plan.data.require_vocabulary(manifest.vocabulary_sha256, found)
    config = _model_config(found, manifest, plan.config, plan.data.vocab_size)
    model = BertForPreTraining(config, seed=0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load.read_parameters(found):
            parameters[name].copy_(tensor)
    return model


def _model_config(
    found: Path, manifest: checkpoint_manifest.Manifest, run: RunConfig, vocab_size: int
) -> BertConfig:
    """The model of a checkpoint, of whose parameters it has each and no others.

    Raises:
        CheckpointError: it is not a model of the run's, or of another vocabulary's size.
    """
    depth = manifest.num_hidden_layers
    if depth > len(manifest.parameters):  # before a model of so many layers is made
        raise CheckpointError(
            f"{found} is damaged: it says that it has {depth:,} layers, and has "
            f"{len(manifest.parameters):,} parameters; {folders.fall_back(found)}"
        )
    config = BertConfig.of(run.model, depth, vocab_size)
    load.require_shapes(found, manifest, parameter_shapes(config))
    return config


def run_heldout(plan: TrainingPlan, found: Path, world: World) -> HeldOut:
    """Held-out losses of a checkpoint in fp32, over the same pass as during training."""
    model = load_model(plan, found).to(world.device)
    last_step = checkpoint_manifest.read_manifest(found).step - 1
    phase = plan.schedule.phases.at(max(last_step, 0))
    return evaluate_heldout(model, plan.data.heldout_steps(world.rank, world.size, phase), world)


def export_run(
    config: RunConfig,
    run_dir: Path,
    found: Path,
    out: Path | None = None,
    data: Path | None = None,
) -> Path:
    """Write the run's checkpoint `found` as a Hugging Face folder (`RUN_DIR/export`); its path.

    One parameter after the other, so that no model is in memory. The tokenizer is the run's own, or
    that of the prepared folder `data`; token shards are not needed.
    """
    manifest = checkpoint_manifest.read_manifest(found)
    tokenizer = directory.choose_tokenizer(run_dir, config, manifest.vocabulary_sha256, data)
    table = manifest.parameters.get(WORD_EMBEDDINGS)
    vocab_size = table.shape[0] if table is not None and table.shape else 1
    model = _model_config(found, manifest, config, vocab_size)
    target = out or run_dir / "export"
    export_to_hugging_face(
        load.read_parameters(found),
        model,
        tokenizer,
        target,
        longest_tokens=config.phase_schedule().longest(manifest.step),
    )
    return target


def warning_of(run_dir: Path, found: Path) -> str | None:
    """The warning of the run's losses up to the checkpoint `found`, or that nobody knows, for
    people; None if of nothing."""
    try:
        step = checkpoint_manifest.read_manifest(found).step
        lines = (line for line in read_metrics(run_dir) if line["step"] <= step)
        return Course(lines).judgement.warning
    except CheckpointError as error:
        return f"whether the model has learned is not known: {error}"


def is_export_due(config: RunConfig, run_dir: Path) -> bool:
    """True if a run that has come to its end is still to be exported, as its recipe asks for."""
    return config.checkpoint.export_at_end and not (run_dir / "export").exists()


def export_if_missing(config: RunConfig, run_dir: Path) -> str | None:
    """Export the finished run, as its recipe asks for; what was done, for people, if anything."""
    if not is_export_due(config, run_dir):
        return None
    return f"exported for Hugging Face: {export_run(config, run_dir, choose(run_dir))}"
