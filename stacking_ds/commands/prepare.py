"""`stacking-ds prepare`."""

import argparse
import os
import re
import sys
import time
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from stacking_ds.errors import ConfigError

if TYPE_CHECKING:
    from stacking_ds.data.prepare.preparation import PrepareProgress
    from stacking_ds.data.shard_files import DataManifest


_SECONDS_BETWEEN_LINES = 30


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of `prepare`; sets `command`, which returns the exit code."""
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="files, folders or globs: .txt (see --documents), .jsonl, .ndjson, .json, .csv, .tsv, "
        "each also .gz, .bz2, .xz or .zst; .parquet, .arrow (in a folder .json, .csv and .tsv are "
        "left alone); hf:NAME[:CONFIG][@SPLIT] for a Hugging Face dataset; `embedded` for the "
        "English prose that a Python installation carries",
    )
    add("--out", type=Path, required=True, dest="out_dir", metavar="OUT", help="folder to write")
    given = "vocab.txt, tokenizer.json or folder of a tokenizer to use"
    add("--vocab", type=Path, dest="vocabulary", metavar="VOCAB", help=given)
    trained = "size of the vocabulary to train (%(default)s)"
    add("--vocab-size", type=int, default=8192, help=trained)
    add("--cased", action="store_true", help="keep capital letters and accents")
    add("--keep-accents", action="store_true", help="strip no accents")
    add(
        "--heldout",
        nargs="+",
        default=(),
        dest="heldout_sources",
        metavar="SOURCE",
        help="what to hold out; else a share",
    )
    add("--heldout-fraction", type=float, default=0.02, help="share of documents (%(default)s)")
    add("--licence", help="the text's licence, for the manifest")
    add("--text-key", default="text", help="key or column of the text (%(default)s)")
    add(
        "--documents",
        choices=("blank-line", "line", "file"),
        default="blank-line",
        help="what a document of a .txt file is: what stands between blank lines, a line, or the "
        "file (%(default)s)",
    )
    add(
        "--bad-documents",
        choices=("refuse", "count"),
        default="refuse",
        help="what cannot be read: stop at the first, or leave such documents out and list them in "
        "the manifest (%(default)s)",
    )
    whole = "fetch hf: datasets whole instead of streaming them"
    add("--download", action="store_true", help=whole)
    add("--workers", type=int, help="processes to work in (all cores this process may use)")
    add(
        "--part",
        default="1/1",
        metavar="I/N",
        help="do the I-th of N parts, the last of which finishes; `auto` takes both from the SLURM "
        "array job",
    )
    parser.set_defaults(command=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from stacking_ds.data.prepare.folder import PrepareOptions
    from stacking_ds.data.prepare.preparation import prepare
    from stacking_ds.data.prepare.work_plan import odd_documents

    started = time.monotonic()
    part = _part(options.part)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    # the options are called as the fields are
    names = [field.name for field in fields(PrepareOptions)]
    words = {**vars(options), "part": part, "workers": workers}
    with closing(_Display()) as display:
        prepared = prepare(
            PrepareOptions(**{name: words[name] for name in names if name in words}),
            progress=display,
            say=display.say,
        )
    seconds = time.monotonic() - started
    if prepared.manifest is None:
        print(
            f"part {part[0]} of {part[1]} done in {seconds:.0f} s; {options.out_dir} is "
            f"unfinished: {prepared.missing_units} units are missing, which other parts do; run a "
            "part again if it failed"
        )
        return 0
    speed = f" ({prepared.manifest.text_bytes / 1e6 / seconds:.1f} MB/s of text)"
    # a resumed run was spared a part of the work
    done = f"prepared in {seconds:.0f} s{'' if prepared.resumed else speed}:"
    verb = "re-using" if prepared.reused else done
    manifest, train, heldout = prepared.manifest, prepared.manifest.train, prepared.manifest.heldout
    print(
        f"{verb} {options.out_dir}: vocabulary {manifest.vocab_size:,}, "
        f"{manifest.request.normalization}; train {train.documents:,} documents, "
        f"{train.tokens:,} tokens; held out {heldout.documents:,} documents, "
        f"{heldout.tokens:,} tokens; {manifest.duplicate_documents:,} duplicates do not count"
    )
    _say_what_is_unknown(manifest)
    for rejected in manifest.rejected:
        print(rejected.sentence)
    if odd := odd_documents(manifest):
        print(f"warning: {odd}", file=sys.stderr)
    return 0


def _say_what_is_unknown(manifest: "DataManifest") -> None:
    from stacking_ds.data.shard_files import MANY_UNKNOWN

    train, heldout = manifest.train.unknown_share, manifest.heldout.unknown_share
    if train is None or heldout is None:
        return
    print(f"[UNK]: {train:.3%} of the tokens of train, {heldout:.3%} of those held out")
    if max(train, heldout) > MANY_UNKNOWN:
        reason = (
            "take a vocabulary of its language and spelling (--cased?), or train one with "
            "--vocab-size"
        )
        if manifest.request.vocabulary.startswith("trained:"):
            reason = (
                "it has words of more than 100 characters, more than 1,000 different characters, "
                "or so little text that most characters occur once: look at what it holds "
                "(stacking-ds data inspect)"
            )
        print(
            f"warning: {max(train, heldout):.1%} of the tokens, more than {MANY_UNKNOWN:.0%}, are "
            "[UNK], of which nothing is learned: the vocabulary does not spell this text; "
            f"{reason}",
            file=sys.stderr,
        )


def _part(text: str) -> tuple[int, int]:
    """`I/N`, or what the environment of a SLURM array job says."""
    if text == "auto":
        try:
            first, task, last, step = (
                int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("MIN", "ID", "MAX", "STEP")
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "--part auto needs the environment of a SLURM array job (sbatch --array=1-16); "
                "without one write --part 3/16, say"
            ) from error
        parts = (last - first) // step + 1
        tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", parts))
        if tasks != parts:
            raise ConfigError(
                f"the array job has {tasks} tasks from {first} to {last}, so --part auto cannot "
                f"tell of how many parts they are; give it tasks without a gap (sbatch "
                f"--array=1-{parts}; what is done is not done again)"
            )
        return (task - first) // step + 1, parts
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ConfigError(f"--part is {text!r}; write 3/16, say, or auto in a SLURM array job")
    return int(match[1]), int(match[2])


class _Display:
    """A bar on a terminal, else a line now and then; of each reading of the sources, which are two
    for a vocabulary that is trained, and one for the shards."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(unit="B", unit_scale=True, disable=not self._terminal)
        self._task, self._reading, self._read = "", 0, 0
        self._started = self._last = time.monotonic()

    def __call__(self, now: "PrepareProgress") -> None:
        begins_again = now.task == "vocabulary" and now.source_bytes < self._read
        if now.task != self._task or begins_again:
            self._reading = self._reading + 1 if now.task == self._task else 1
            self._task = now.task
            self._bar.reset(now.total_bytes)
            self._bar.initial = self._bar.n = now.kept_bytes
            self._started = self._last = time.monotonic()
        self._read = now.source_bytes
        what = "tokenizing"
        if now.task == "vocabulary":
            what = f"vocabulary, pass {self._reading} of 2"
        what += f": {now.documents:,} documents"
        self._bar.set_description(what, refresh=False)
        self._bar.update(max(0, now.source_bytes - self._bar.n))
        if not self._terminal and time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            line = f"{what}, {_amount(now, self._last - self._started)}"
            print(line, file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        """A line that the bar goes on below."""
        self._bar.write(sentence, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()


def _amount(now: "PrepareProgress", seconds: float) -> str:
    """What has been read, of what, how fast, and for how long still."""
    speed = max(0, now.source_bytes - now.kept_bytes) / seconds
    total = f" of {now.total_bytes / 1e6:,.1f}" if now.total_bytes else ""
    text = f"{now.source_bytes / 1e6:,.1f}{total} MB at {speed / 1e6:.1f} MB/s"
    if now.total_bytes and speed:
        left = max(0, now.total_bytes - now.source_bytes) / speed
        text += f", {min(1, now.source_bytes / now.total_bytes):.0%}, {left:,.0f} s left"
    return text
