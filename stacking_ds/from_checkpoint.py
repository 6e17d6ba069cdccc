"""What a run's checkpoint is good for without an engine: a model, its held-out loss, an export."""

from pathlib import Path

import torch

from stacking_ds import checkpoint
from stacking_ds.checkpoint.choice import choose
from stacking_ds.distributed import World
from stacking_ds.divergence import judge
from stacking_ds.evaluate.heldout import HeldOut, evaluate_heldout
from stacking_ds.export import export_to_hugging_face
from stacking_ds.job import Job
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.monitor import read_metrics

__all__ = ["export_if_missing", "export_run", "load_model", "run_heldout", "warning_of"]


def load_model(job: Job, found: Path) -> BertForPreTraining:
    """The fp32 model of a checkpoint, on the CPU."""
    manifest = checkpoint.read_manifest(found)
    job.require_vocabulary(manifest.vocabulary_sha256, found)
    model = BertForPreTraining(job.model_config(manifest.num_hidden_layers), seed=0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in checkpoint.read_parameters(found):
            parameters.pop(name).copy_(tensor)
    assert not parameters, f"{found} lacks {sorted(parameters)}"
    return model


def run_heldout(job: Job, found: Path, world: World) -> HeldOut:
    """Held-out losses of a checkpoint in fp32, over the same pass as during training."""
    model = load_model(job, found).to(world.device)
    last_step = checkpoint.read_manifest(found).step - 1
    phase = job.phases.at(max(last_step, 0))
    return evaluate_heldout(model, job.heldout_steps(world.rank, world.size, phase), world)


def export_run(job: Job, run_dir: Path, name: str | None = None, out: Path | None = None) -> Path:
    """Write a checkpoint of the run as a Hugging Face folder (`RUN_DIR/export`); its path.

    One parameter after the other, so that no model is in memory.
    """
    found = choose(run_dir, name)
    manifest = checkpoint.read_manifest(found)
    job.require_vocabulary(manifest.vocabulary_sha256, found)
    target = out or run_dir / "export"
    export_to_hugging_face(
        checkpoint.read_parameters(found),
        job.model_config(manifest.num_hidden_layers),
        job.shards.folder,
        target,
        longest_tokens=job.phases.longest(manifest.step),
    )
    return target


def warning_of(run_dir: Path, found: Path) -> str | None:
    """What the run's losses up to the checkpoint `found` warn of, for people, if of anything."""
    step = checkpoint.read_manifest(found).step
    return judge(line for line in read_metrics(run_dir) if line["step"] <= step).warning


def export_if_missing(job: Job, run_dir: Path) -> str | None:
    """Export the finished run, as its recipe asks for; what was done, for people, if anything."""
    if (run_dir / "export").exists() or not job.config.checkpoint.export_at_end:
        return None
    return f"exported for Hugging Face: {export_run(job, run_dir)}"
