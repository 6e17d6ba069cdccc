"""Recognises what is in a folder already: the finished work, or the unfinished."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from stacking_ds.console import shortened
from stacking_ds.data.prepare.folder import Settings, Started, UnfinishedFolder
from stacking_ds.data.prepare.unit import EMPTY, BadDocuments
from stacking_ds.data.prepare.work_plan import Corpus
from stacking_ds.data.shard_manifest import (
    MANIFEST_NAME,
    DataManifest,
    PrepareRequest,
    file_sha256,
    read_manifest,
)
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.tokenizer import Normalization
from stacking_ds.errors import DataError


def reusable(
    folder: UnfinishedFolder, corpus: Corpus, request: PrepareRequest, bad_documents: BadDocuments
) -> DataManifest | None:
    """The manifest of a finished folder that holds what `request` asks for; None while the folder
    is not finished.

    As with `make`, a source file of the same name and size that is older than the manifest is
    taken to be the one that was read; a newer one is read and compared. Raises DataError when the
    folder holds something else, or is damaged.
    """
    if not folder.is_finished:
        return None
    manifest = read_manifest(folder.path)
    check_request(folder.path, manifest.request, request)
    for rejected in manifest.rejected:
        if rejected.reason != EMPTY and bad_documents == "refuse":
            raise DataError(
                f"{folder.path} was prepared with --bad-documents count and lacks "
                f"{rejected.documents} documents ({rejected.reason}: {rejected.first[0]}); say so "
                "again, or choose another folder"
            )
    finished_ns = (folder.path / MANIFEST_NAME).stat().st_mtime_ns
    paths = [path for source in corpus.sources for path in source.paths]
    files = [file for file in manifest.sources if file.sha256 is not None]
    for path, file in zip(paths, files, strict=True):
        if path.stat().st_mtime_ns > finished_ns and file_sha256(path) != file.sha256:
            raise _other(folder.path, f"{path} has changed since")
    TokenShards.open(folder.path)
    folder.remove_notes()
    return manifest


def check_request(out_dir: Path, there: PrepareRequest, here: PrepareRequest) -> None:
    """Raises DataError unless the two are the same."""
    different = _differences(there, here)
    if different:
        raise _other(out_dir, different)


def adopt(
    folder: UnfinishedFolder, started: Started, settings: Settings, corpus: Corpus
) -> Started:
    """Makes sure that an unfinished prepare can be gone on with.

    Raises DataError if other settings would give other bytes, or if a file of the sources changed:
    one that was touched since is read and compared.
    """
    different = _differences(started.settings, settings)
    if different:
        raise _other(folder.path, different)
    files = corpus.files()
    if files == started.plan.files:
        return started
    known = {
        (one.source, one.file): one.sha256
        for record in folder.records(len(started.plan.units)).values()
        for one in record.hashes
    }
    for index, source in enumerate(corpus.sources):
        for number, path in enumerate(source.paths):
            same = files[index][number] == started.plan.files[index][number]
            if not same and known.get((index, number)) != file_sha256(path):
                raise _other(folder.path, f"{path} has changed, or was touched, before it was read")
    return folder.note_files(started, files)


def _differences(there: PrepareRequest | Settings, here: PrepareRequest | Settings) -> str:
    return "; ".join(
        _difference(field, getattr(there, field), getattr(here, field))
        for field in type(there).model_fields
        if getattr(there, field) != getattr(here, field)
    )


def _difference(field: str, there: Any, here: Any) -> str:
    if not isinstance(there, tuple):
        return f"{field} is {_shown(there)} there and {_shown(here)} here"
    if len(there) == len(here) == 1:
        return f"{field} is {_shown(there[0])} there and {_shown(here[0])} here"
    for one, other in zip_longest(there, here):
        if one != other:
            break
    first = " and ".join(
        f"{_shown(value)} {where}"
        for value, where in ((one, "there"), (other, "here"))
        if value is not None
    )
    return (
        f"{field} are {len(there):,} there and {len(here):,} here, the first that differs {first}"
    )


def _shown(value: Any) -> str:
    return shortened(str(value) if isinstance(value, Normalization) else repr(value), 160)


def _other(out_dir: Path, difference: str) -> DataError:
    return DataError(
        f"{out_dir} holds data prepared otherwise ({difference}); choose another folder, or "
        "delete this one"
    )
