"""`stacking-ds data` run by a test, and prepared folders that hold what a test wants them to."""

import json

import numpy as np

from stacking_ds.cli import main
from stacking_ds.data.shard_files import MANIFEST_NAME, ShardWriter, file_sha256, read_manifest
from stacking_ds.data.tokenizer import vocabulary_sha256
from tests.runs import small_recipe
from tests.token_shards import make_shards

__all__ = [
    "bins",
    "counted_text",
    "inspected",
    "recipe",
    "refused",
    "rename_tokens",
    "rewrite_manifest",
    "rewrite_split",
    "run",
]

TEXT = [[20], [8], [3], [11, 5]] * 3

RECIPE = (
    "data.examples=documents", "data.sequence_length=10", "batch.global_batch_size=7",
    "phases=[{from_step: 3, sequence_length: 22, global_batch_size: 3},"
    " {from_step: 8, sequence_length: 10, global_batch_size: 14}]",
)  # fmt: skip


def run(capsys, *arguments, code=0):
    """What `stacking-ds data` prints, and its error, when it ends with the exit code `code`."""
    assert main(["data", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    assert bool(printed.err) == bool(code)
    return printed.out, printed.err


def refused(capsys, *arguments):
    out, error = run(capsys, *arguments, code=2)
    assert out == ""
    assert error.startswith("stacking-ds: error: ")
    assert error.count("\n") == 1
    return error


def inspected(capsys, *arguments, code=0):
    return json.loads(run(capsys, "inspect", *arguments, "--json", code=code)[0])


def rewrite_split(folder, split, documents, hashes=None, lengths=None):
    """Puts one file of these documents, each a list of tokens, into the place of the split's."""
    writer = ShardWriter(100)
    for number, tokens in enumerate(documents):
        sentences = [len(tokens)] if lengths is None else lengths[number]
        digest = number + 1 if hashes is None else hashes[number]
        writer.add(
            np.array(tokens),
            np.array(sentences, dtype=np.int32),
            np.array([len(sentences)], dtype=np.int32),
            np.array([digest], dtype=np.uint64),
        )
    manifest = read_manifest(folder)
    record = manifest.split(split)
    shard = writer.write(folder, record.shards[0].name, folder)
    gone = record.duplicates
    counts = {
        name: getattr(shard, name) - getattr(gone, name)
        for name in ("documents", "sentences", "tokens")
    }
    record = record.model_copy(update={"shards": (shard,), **counts})
    rewrite_manifest(folder, **{split: record})


def rewrite_manifest(folder, **changes):
    manifest = read_manifest(folder).model_copy(update=changes)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


def rename_tokens(folder, names):
    """Gives the tokens with these ids other names."""
    vocabulary = (folder / "vocab.txt").read_text().split()
    for number, name in names.items():
        vocabulary[number] = name
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    digest = vocabulary_sha256(vocabulary)
    (file,) = read_manifest(folder).vocabulary_files
    size_bytes = (folder / "vocab.txt").stat().st_size
    file = file.model_copy(update={"sha256": digest, "size_bytes": size_bytes})
    assert digest == file_sha256(folder / "vocab.txt")
    rewrite_manifest(folder, vocabulary_files=(file,), vocabulary_sha256=digest)


def bins(facts):
    return [(each["first"], each["last"], each["count"]) for each in facts]


def counted_text(folder):
    """Pieces of [8, 8, 4], [8], [3] and [8, 8] tokens for rows of 10, three times."""
    return make_shards(folder, TEXT, heldout=[[8], [8]]).folder


def recipe(tmp_path, *overrides):
    """A recipe file, whose data lie elsewhere, and the overrides as options."""
    small_recipe(tmp_path, tmp_path / "elsewhere")
    sets = [part for override in (*RECIPE, *overrides) for part in ("--set", override)]
    return ("--recipe", tmp_path / "small.yaml", *sets)
