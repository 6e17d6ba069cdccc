"""What `stacking-ds bench data` measures: preparing text, masking, and loading batches.

Preparing runs in processes of its own, so that their time and memory are the operating system's
account, start of the interpreter included.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from stacking_ds.bench.machine import one_thread
from stacking_ds.bench.memory import TreePeak
from stacking_ds.config.sections import DataSection, MaskingName
from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.loader import PretrainingData, PretrainingSteps, load_steps
from stacking_ds.data.masking import MaskingVocabulary, mask_tokens
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.sources.documents import Document, Reading
from stacking_ds.data.sources.kinds import open_source
from stacking_ds.errors import DataError
from stacking_ds.schedule.phases import PhaseSchedule

_FILES = 8
_PIECE_BYTES = 2**28
_SLOTS_PER_STEP = 2**15
_MASKED_TOKENS = 2**17
_SEQUENCE_LENGTHS = (128, 512)
_MASKINGS: tuple[MaskingName, ...] = ("tokens", "whole_words", "spans")


@dataclass(frozen=True)
class Corpus:
    """The documents of the sources as JSON Lines, and four times as many: the same four times, each
    time with other first words, so that none is a duplicate."""

    folder: Path
    text_bytes: int
    fourfold_bytes: int
    documents: int

    @classmethod
    def write(cls, sources: Sequence[str], folder: Path) -> "Corpus":
        """Raises DataError where the sources hold too few documents to be divided."""
        texts = [text for name in sources for text in _texts(name)]
        if len(texts) < 4 * _FILES:
            raise DataError(f"the sources hold {len(texts)} documents; give at least {4 * _FILES}")
        sizes = {"whole": 0, "fourfold": 0}
        for number in range(_FILES):
            mine = texts[number::_FILES]
            four = [f"copy {copy} of it: {text}" for copy in range(4) for text in mine]
            for name, part in (("whole", mine), ("fourfold", four)):
                lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part]
                path = folder / name / f"{number}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(lines), encoding="utf-8")
                sizes[name] += sum(len(text.encode()) for text in part)
        return cls(folder, sizes["whole"], sizes["fourfold"], len(texts))

    def files(self, name: str) -> list[str]:
        return [str(path) for path in sorted((self.folder / name).iterdir())]


@dataclass(frozen=True)
class Spent:
    """Of a command and all processes it started."""

    wall_seconds: float
    cpu_seconds: float
    peak_gib: float
    """Resident memory of the process that had most."""


def measure_prepare(
    corpus: Corpus, vocabulary: Path, workers: int, rounds: int, out: Path
) -> dict[str, Any]:
    """Time of `stacking-ds prepare` and of the usual path, taking turns; the shards stay in
    `out`/shards."""
    shards, rival = out / "shards", out / "rival"
    commands = {
        "ours": [
            *_prepare(corpus.files("whole"), vocabulary, workers),
            f"--out={shards}",
        ],
        "hf": [
            *("-m", "stacking_ds.bench.hf_path", *corpus.files("whole")),
            *(f"--tokenizer={shards / 'tokenizer.json'}", f"--workers={workers}"),
            f"--out={rival}",
        ],
    }
    spent: dict[str, list[Spent]] = {name: [] for name in commands}
    for _ in range(rounds):
        for folder in (shards, rival):
            shutil.rmtree(folder, ignore_errors=True)
        for name, command in commands.items():
            spent[name].append(_run(command))
    shutil.rmtree(rival, ignore_errors=True)
    return {
        "workers": workers,
        "rounds": rounds,
        "documents": corpus.documents,
        "text_bytes": corpus.text_bytes,
        **{name: [asdict(one) for one in runs] for name, runs in spent.items()},
    }


def measure_memory(corpus: Corpus, vocabulary: Path, workers: int, out: Path) -> dict[str, Any]:
    """Peak memory of preparing the corpus, and four times as much."""
    found = {}
    for name in ("whole", "fourfold"):
        shutil.rmtree(out / "memory", ignore_errors=True)
        command = [*_prepare(corpus.files(name), vocabulary, workers), f"--out={out / 'memory'}"]
        found[name] = asdict(_run(command))
    sizes = {"whole_bytes": corpus.text_bytes, "fourfold_bytes": corpus.fourfold_bytes}
    return {"workers": workers, **sizes, **found}


def measure_masking(shards: TokenShards, rounds: int) -> dict[str, Any]:
    """Tokens a second that one thread looks at while it masks, by process CPU time."""
    split = shards.split("train")
    vocabulary = MaskingVocabulary.of(shards.vocabulary)
    size = min(_MASKED_TOKENS, split.num_tokens)
    tokens = np.concatenate([split.tokens_of(d) for d in range(split.num_documents)])
    tokens = tokens[:size].astype(np.int64)
    found: dict[str, dict[str, float]] = {}
    for length in _SEQUENCE_LENGTHS:
        offsets = np.append(np.arange(0, size, length), size)
        keys = derive_key(1, offsets[:-1])
        for masking in _MASKINGS:
            mask = partial(
                mask_tokens,
                maskable_T=tokens != shards.special_ids.unk,
                example_offsets=offsets,
                key_E=keys,
                masking=masking,
                mlm_probability=0.15,
                vocabulary=vocabulary,
            )
            seconds = min(_cpu_seconds(mask, tokens.copy()) for _ in range(5 * rounds))
            found.setdefault(masking, {})[str(length)] = size / seconds
    return {"tokens": size, "tokens_per_second": found}


def measure_loader(shards: TokenShards, workers: int, seconds: float) -> dict[str, Any]:
    """Real tokens a second that the loader hands on, packed and masked, by wall clock, and
    what one process builds in its own CPU time."""
    cases = []
    for length in _SEQUENCE_LENGTHS:
        for masking in _MASKINGS:
            options = DataSection(
                path=str(shards.folder), sequence_length=length, packing=True, masking=masking
            )
            data = PretrainingData(shards, "train", options, seed=1)
            rows = min(_SLOTS_PER_STEP // length, data.num_rows)
            phase = PhaseSchedule.from_shapes([(0, length, rows, rows)]).phases[0]
            steps = PretrainingSteps(data, phase)
            cases.append(
                {
                    "sequence_length": length,
                    "masking": masking,
                    "rows": rows,
                    "fill": data.layout(0).fill,
                    "wall_tokens_per_second": _loaded(steps, workers, seconds),
                    "cpu_tokens_per_second": _built(steps, seconds / 2),
                }
            )
    return {"workers": workers, "cases": cases}


def _texts(name: str) -> Iterator[str]:
    source = open_source(name)
    for piece in source.pieces(_PIECE_BYTES, Reading()):
        for item in source.open(piece, Reading()).items():
            if isinstance(item, Document) and item.text.strip():
                yield item.text


def _prepare(files: Sequence[str], vocabulary: Path, workers: int) -> list[str]:
    options = (f"--vocab={vocabulary}", f"--workers={workers}")
    return ["-m", "stacking_ds", "prepare", *files, *options]


def _run(arguments: Sequence[str]) -> Spent:
    """Runs Python with these arguments. Raises DataError, with what it said, where it fails."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with TreePeak(process.pid) as peak, process.stderr:
        said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise DataError(f"{' '.join(arguments[:3])} failed: {said.strip()[-500:]}")
    return Spent(wall_seconds, usage.ru_utime + usage.ru_stime, peak.bytes / 2**30)


def _cpu_seconds(work: Callable[..., object], *arguments: object) -> float:
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def _loaded(steps: PretrainingSteps, workers: int, seconds: float) -> float:
    loaded = load_steps(steps, count(), workers=workers, pin_memory=False)
    with closing(loaded) as batches:
        for _ in range(2 * max(workers, 1) + 2):  # what was built ahead while nothing was measured
            next(batches)
        tokens, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            tokens += next(batches).real_tokens
        return tokens / (time.perf_counter() - started)


def _built(steps: PretrainingSteps, seconds: float) -> float:
    with one_thread():
        steps[0]
        tokens, step, started = 0, 1, time.process_time()
        while time.process_time() - started < seconds:
            tokens += steps[step].real_tokens
            step += 1
        return tokens / (time.process_time() - started)
