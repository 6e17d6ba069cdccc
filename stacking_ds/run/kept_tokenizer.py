"""The tokenizer that a run keeps, so that it can be exported without its token shards.

RUN_DIR/tokenizer/tokenizer.json, vocab.txt     as they lie beside the shards
                  SHA256SUMS                    for `sha256sum -c`
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stacking_ds.checkpoint.folders import sync
from stacking_ds.config.run import RunConfig
from stacking_ds.data.shard_files import MANIFEST_NAME, file_sha256, not_opened, read_manifest
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import CheckpointError, DataError
from stacking_ds.files import DamagedFileError, read_text

_FOLDER, _SUMS, _VOCABULARY = "tokenizer", "SHA256SUMS", "vocab.txt"


def keep(run_dir: Path, shards: TokenShards) -> None:
    """Copy the tokenizer of the shards into the run, whole or not at all, unless it is there.

    What a start with another vocabulary left, which saved nothing, is replaced.

    Raises:
        DataError: what is there cannot be read.
        OSError: the run's directory cannot be written.
    """
    folder = run_dir / _FOLDER
    sums = {file.name: file.sha256 for file in shards.manifest.vocabulary_files}
    if dict(_kept_sums(folder)) == sums:
        return
    partial = folder.with_name(f".{_FOLDER}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    try:
        partial.mkdir()
        for name in sums:
            shutil.copyfile(shards.folder / name, partial / name)
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())
        (partial / _SUMS).write_text(lines, encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        if os.path.lexists(folder):
            shutil.rmtree(folder)
        os.replace(partial, folder)
        sync(run_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room


def choose(run_dir: Path, config: RunConfig, vocabulary_sha256: str, data: Path | None) -> Path:
    """The folder with the verified tokenizer of a model that was trained on this vocabulary.

    It is that of the prepared folder `data` if one is given, else the run's own. A run of a version
    that kept none has it beside its shards.

    Raises:
        DataError: it is missing, damaged or cannot be read.
        CheckpointError: it is another vocabulary's.
    """
    if data is None and (run_dir / _FOLDER).is_dir():
        folder, sums = run_dir / _FOLDER, dict(_kept_sums(run_dir / _FOLDER))
        remedy = f"delete {folder}, so that the one beside the shards is taken, or give --data"
    else:
        folder = data or Path(config.data.path)
        remedy = "give the prepared folder with --data"
        if data is None and not os.path.lexists(folder / MANIFEST_NAME):
            raise DataError(
                f"{run_dir} keeps no tokenizer of its own, and its token shards are not in "
                f"{folder}; {remedy}"
            )
        sums = {file.name: file.sha256 for file in read_manifest(folder).vocabulary_files}
    for name, sha256 in sums.items():
        path = folder / name
        try:
            found = file_sha256(path)
        except (FileNotFoundError, DamagedFileError):
            found = "missing"
        except OSError as error:
            raise not_opened(path, error) from None
        if found != sha256:
            raise DataError(f"{path} is missing or damaged; {remedy}")
    if sums.get(_VOCABULARY) != vocabulary_sha256:
        raise CheckpointError(
            f"{run_dir} was trained with another vocabulary than that of {folder}; {remedy}"
        )
    return folder


def _kept_sums(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / _SUMS
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError, DamagedFileError):
        return  # as if they were those of nothing
    except OSError as error:
        raise not_opened(path, error) from None
    for line in text.splitlines():
        sha256, _, name = line.partition("  ")
        if name == Path(name).name:
            yield name, sha256
