"""Small files: what is damaged is said so, nothing is waited for, nothing is without bound."""

import os
from pathlib import Path

import pytest

from stacking_ds.files import DamagedFileError, PassedOver, read_json, read_json_lines, read_text


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
        (b"[" * 100 + b"]" * 100, "nested too deeply"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested too deeply"),
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
    passed = PassedOver(path)
    assert passed.sentence is None
    assert list(read_json_lines(path, passed)) == [{"step": 1}, {"step": 2}]
    assert (
        passed.sentence == f"{path}: passed over 4 lines, which are no record (the first is line 2)"
    )
    passed = PassedOver(path)
    found = read_json_lines(path, passed, lambda record: record["step"] != 2)
    assert list(found) == [{"step": 1}]
    assert passed.lines == 5


def test_a_line_without_an_end_is_read_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stacking_ds.files._LONGEST_LINE_BYTES", 16)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n"' + b"x" * 100 + b'"\n{"b": 2}\n')
    passed = PassedOver(path)
    assert list(read_json_lines(path, passed)) == [{"a": 1}, {"b": 2}]
    assert passed.sentence == f"{path}: passed over 1 line, which is no record (line 2)"


def test_what_people_nest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[" * 64 + "]" * 64)
    assert str(read_json(path)) == "[" * 64 + "]" * 64
