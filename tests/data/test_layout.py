"""Layouts: every token that counts in one row, the same rows whoever makes them, mapped once."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.data.rows import LayoutSpec, open_layout
from stacking_ds.errors import DataError
from tests.token_shards import make_shards

DOCUMENTS = [[7, 9, 3], [30, 4], [5], [6, 6, 6, 6], [50], [2, 2], [11, 3, 9], [4, 8]] * 4


def spec(length=24, examples="pairs", packed=True, variant=0):
    return LayoutSpec(examples=examples, sequence_length=length, packed=packed, variant=variant)


def tokens_by_row(found):
    rows = []
    for row in range(found.num_rows):
        _, examples = found.examples_of(np.array([row]))
        tokens = []
        for first, length, second, more in zip(
            examples.first_start_E,
            examples.first_length_E,
            examples.second_start_E,
            examples.second_length_E,
            strict=True,
        ):
            tokens += [*range(first, first + length), *range(second, second + more)]
        rows.append(tokens)
    return rows


def counting_tokens(documents, duplicates):
    bases = np.cumsum([0, *map(sum, documents)])
    return [
        token
        for number in range(len(documents))
        if number not in duplicates
        for token in range(bases[number], bases[number + 1])
    ]


@settings(max_examples=30)
@given(
    documents=st.lists(
        st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=3, max_size=10
    ),
    kind=st.sampled_from(["pairs", "documents"]),
    packed=st.booleans(),
    variant=st.integers(0, 2),
    shard=st.integers(1, 4),
    duplicate=st.integers(0, 2),
)
def test_rows_hold_every_token_that_counts_once(
    tmp_path_factory, documents, kind, packed, variant, shard, duplicate
):
    folder = tmp_path_factory.mktemp("l")
    shards = make_shards(
        folder, documents, documents_per_shard=shard, duplicates=[duplicate] if duplicate else []
    )
    found = open_layout(shards.split("train"), spec(24, kind, packed, variant))
    rows = tokens_by_row(found)
    expected = counting_tokens(documents, [duplicate] if duplicate else [])
    assert sorted(token for row in rows for token in row) == expected
    assert found.total("tokens") == shards.manifest.train.tokens
    counts, examples = found.examples_of(np.arange(found.num_rows))
    assert examples.slots.sum() == found.used_slots
    assert found.total("examples") == len(examples)
    assert found.total("random_pairs") == examples.is_random_E.sum()
    assert (counts == 1).all() or packed
    starts = np.concatenate([[0], np.cumsum(counts)])
    slots = [examples.slots[a:b].sum() for a, b in itertools.pairwise(starts)]
    assert max(slots) <= 24
    assert found.fill == pytest.approx(sum(slots) / (24 * len(slots)))


def test_packed_rows_hold_the_examples_of_single_rows(tmp_path):
    split = make_shards(tmp_path, DOCUMENTS).split("train")
    every = []
    for packed in (False, True):
        found = open_layout(split, spec(packed=packed))
        _, examples = found.examples_of(np.arange(found.num_rows))
        fields = [getattr(examples, name) for name in examples.__dataclass_fields__]
        every.append(sorted(zip(*(field.tolist() for field in fields), strict=True)))
    assert every[0] == every[1]
    assert open_layout(split, spec()).num_rows < open_layout(split, spec(packed=False)).num_rows


def test_parts_are_independent_and_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("stacking_ds.data.rows._TOKENS_PER_PART", 100)
    folders = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        split = make_shards(folder, DOCUMENTS, documents_per_shard=3).split("train")
        found = open_layout(split, spec(), workers=workers)
        assert len(found.record.parts) > 2
        folders.append(found.folder)
        # rows in any order, across parts, come as they were asked for
        rows = np.array([found.num_rows - 1, 0, 5, found.num_rows // 2, 5])
        counts, examples = found.examples_of(rows)
        alone = [found.examples_of(np.array([row])) for row in rows]
        assert counts.tolist() == [int(count[0]) for count, _ in alone]
        assert examples.first_start_E.tolist() == [
            start for _, one in alone for start in one.first_start_E.tolist()
        ]
        # the documents of a part stay among themselves
        stops = np.cumsum([part.tokens for part in found.record.parts])
        for row, tokens in enumerate(tokens_by_row(found)):
            part = np.searchsorted(found._row_bases, row, side="right") - 1
            assert stops[part] - found.record.parts[part].tokens <= min(tokens)
            assert max(tokens) < stops[part]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two


def test_variants_and_lengths_are_layouts_of_their_own(tmp_path):
    split = make_shards(tmp_path, DOCUMENTS).split("train")
    rows = {
        (kind, variant): tokens_by_row(open_layout(split, spec(16, kind, False, variant)))
        for kind in ("pairs", "documents")
        for variant in (0, 1)
    }
    assert rows["pairs", 0] != rows["pairs", 1]
    assert rows["documents", 0] != rows["documents", 1]
    folders = [path for path in (tmp_path / "layouts").iterdir() if path.is_dir()]
    assert sorted(folder.name.rpartition("-")[0] for folder in folders) == [
        "documents-16-single-0-train",
        "documents-16-single-1-train",
        "pairs-16-single-0-train",
        "pairs-16-single-1-train",
    ]


def test_a_layout_is_made_once_and_made_again_when_it_fits_no_more(tmp_path):
    split = make_shards(tmp_path, DOCUMENTS).split("train")
    found = open_layout(split, spec())
    part = found.folder / found.record.parts[0].name
    before = part.stat().st_mtime_ns
    assert open_layout(split, spec()).record == found.record
    assert part.stat().st_mtime_ns == before
    part.write_bytes(part.read_bytes()[:-8])  # another size: not whole
    again = open_layout(split, spec())
    assert again.record == found.record
    assert tokens_by_row(again) == tokens_by_row(found)
    other = make_shards(tmp_path, [[9, 9], *DOCUMENTS]).split("train")
    assert sorted(t for row in tokens_by_row(open_layout(other, spec())) for t in row) == list(
        range(other.num_tokens)
    )
    assert open_layout(other, spec()).folder != found.folder, "whoever reads the old one may go on"


def test_an_altered_layout_is_found_when_it_is_verified(tmp_path):
    found = open_layout(make_shards(tmp_path, DOCUMENTS).split("train"), spec())
    list(found.verifying())
    path = found.folder / found.record.parts[0].name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError,
        match=r"part-00000\.arrow is damaged: .*; delete .*-train-[0-9a-f]+, it will",
    ):
        list(found.verifying())


def test_shards_that_cannot_be_written_have_their_layouts_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    split = make_shards(tmp_path / "shards", DOCUMENTS).split("train")
    (tmp_path / "shards" / "layouts").write_text("in the way")
    found = open_layout(split, spec())
    assert found.folder.is_relative_to(tmp_path / "cache")
    assert open_layout(split, spec()).folder == found.folder
    (tmp_path / "none").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"cannot be laid out.*shards/layouts.*run `stacking-ds"):
        open_layout(split, spec())


def test_a_layout_is_pickled_by_its_place(tmp_path):
    found = open_layout(make_shards(tmp_path, DOCUMENTS).split("train"), spec())
    content = pickle.dumps(found)
    assert len(content) < 2000
    assert tokens_by_row(pickle.loads(content)) == tokens_by_row(found)


def test_pairs_of_one_document_are_refused(tmp_path):
    shards = make_shards(tmp_path, DOCUMENTS, heldout=[[5, 5]])
    with pytest.raises(DataError, match=r"the heldout split of .* has 1 document\(s\)"):
        open_layout(shards.split("heldout"), spec())
    assert open_layout(shards.split("heldout"), spec(examples="documents")).num_rows == 1
    with pytest.raises(DataError, match="sequence_length is 7"):
        open_layout(shards.split("train"), spec(7))
    assert not list((tmp_path / "layouts").glob("*tmp*")), "nothing half-made is left"
