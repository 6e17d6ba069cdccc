"""Small files: what is damaged is said so, nothing is waited for, nothing is without bound."""

import os
from pathlib import Path

import pytest

from stacking_ds.small_files import DamagedFileError, read_json, read_json_lines, read_text


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_text(path) == '{"a": [1, "é"]}'
    assert read_json(path) == {"a": [1, "é"]}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "circle", "name too long"])
def test_only_regular_files_are_read_and_nothing_is_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * 300 if kind == "name too long" else "file")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path)
    for read in (read_text, read_json, lambda path: list(read_json_lines(path))):
        with pytest.raises(DamagedFileError, match="is damaged: "):
            read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1', "Expecting"),
        (b"1" * 5_000, "integer string conversion"),
        (b"", "Expecting value"),
        (b"[1]" + b" " * 2_000_000, "more than 1,000,000 bytes"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as raised:
        read_json(path, most_bytes=1_000_000)
    assert str(path) in str(raised.value)
    assert reason in str(raised.value)


def test_lines_that_are_no_records_are_told_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [b'{"step": 1}', b"\xff\x00", b"[1]", b"{" * 100_000, b"", b'{"step": 2}', b'{"ste']
    path.write_bytes(b"\n".join(lines))
    told: list[str] = []
    assert list(read_json_lines(path, told.append)) == [{"step": 1}, {"step": 2}]
    assert [f"line {number} of" in text for number, text in zip((2, 3, 4, 7), told, strict=True)]


def test_a_line_without_an_end_is_read_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stacking_ds.small_files._LONGEST_LINE_BYTES", 16)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n"' + b"x" * 100 + b'"\n{"b": 2}\n')
    told: list[str] = []
    assert list(read_json_lines(path, told.append)) == [{"a": 1}, {"b": 2}]
    assert told == [f"line 2 of {path} is not a JSON object"]
