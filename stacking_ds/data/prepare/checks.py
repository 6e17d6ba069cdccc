"""What `prepare` was asked for, checked before anything is read."""

from pathlib import Path

from stacking_ds.console import is_utf8, readable_name, shortened
from stacking_ds.data.prepare.first_look import text_paths
from stacking_ds.data.prepare.work_plan import Corpus, say_what_is_left_out
from stacking_ds.data.shard_manifest import DocumentRule
from stacking_ds.errors import DataError

# several times the largest that anybody trains; the library aborts when it makes room for more
_LARGEST_VOCABULARY = 2**20


def check_corpus(corpus: Corpus, heldout_fraction: float, documents: DocumentRule) -> None:
    """Says what of the sources is not read. Raises DataError where nothing could be held out, or
    `documents` is about nothing."""
    say_what_is_left_out(corpus)
    if not (corpus.num_heldout or heldout_fraction or any(s.holds_out for s in corpus.train)):
        raise DataError(
            "heldout_fraction is 0 and no held-out source is named, but training needs held-out "
            "documents: raise --heldout-fraction, or name what to hold out by --heldout SOURCE"
        )
    if documents != "blank-line" and not text_paths(corpus):
        raise DataError(
            f"--documents {documents} says what a document of a .txt file is, and no source is "
            "one; in other files a row, or a JSON object, is a document"
        )


def check_folder_name(out_dir: Path) -> None:
    """Raises DataError for a name that a manifest cannot hold, or a folder cannot have."""
    if not is_utf8(place := out_dir.absolute()):
        raise DataError(f"the name of {readable_name(place)} is not UTF-8; choose another")
    try:
        out_dir.exists()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{shortened(str(out_dir), 160)} cannot be written: {reason}; choose another folder"
        ) from error


def check_numbers(
    heldout_fraction: float, workers: int, part: tuple[int, int], vocab_size: int
) -> None:
    """Raises DataError for a number that is out of range."""
    # how small it may be, the alphabet of the text says
    if vocab_size > _LARGEST_VOCABULARY:
        raise DataError(f"vocab_size is {vocab_size:,}; it can be {_LARGEST_VOCABULARY:,} at most")
    if not 0 <= heldout_fraction <= 0.5:
        raise DataError(f"heldout_fraction is {heldout_fraction}; it must lie between 0 and 0.5")
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    if not 1 <= part[0] <= part[1]:
        raise DataError(f"part {part[0]} of {part[1]} does not exist; write 1/4 to 4/4, say")
