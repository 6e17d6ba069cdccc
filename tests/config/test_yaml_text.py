"""YAML that keeps what was typed: whatever the text, it is read or refused, and soon."""

import contextlib
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.config.yaml_text import Scalar, YamlTextError, plain, read_yaml, write_yaml

# what YAML gives a meaning to, so that more than plain words comes of it
ODD_YAML = (
    *("a", "1", "0b_", "1:00", "0123", "~", "yes", "<<", ".inf", "!!bool ", "!!int ", "!x "),
    *("&a ", "*a", "- ", ": ", "? ", "[", "]", "{", "}", ",", "\n", "  ", "#", "|", ">", "%"),
    *("'", '"', "\\", "\\UFFFFFFFF", "\\x", "---\n", "...\n", "%YAML 1.9\n", "%TAG ! x\n", "\0"),
    *("\t", "\r", "\x85", "\u2028", "\ufeff", "\ud800", "²", "9" * 5000, "[" * 50, "!!set "),
)
_TEXTS = st.lists(st.sampled_from(ODD_YAML) | st.text(max_size=5), max_size=30).map("".join)


@settings(max_examples=150, deadline=2000)
@given(_TEXTS)
def test_any_text_is_read_or_refused(text: str) -> None:
    refusal = ""
    try:
        plain(read_yaml(text))
    except YamlTextError as error:
        refusal = str(error)
    assert len(refusal) < 300
    assert "\n" not in refusal


@pytest.mark.parametrize(
    "piece", ["[", "{a: ", "- ", "? ", "[\n", "&a [", "!!map ", "'", "[a, ", "a: "]
)
def test_a_long_text_takes_no_time(piece: str) -> None:
    started = time.process_time()
    with contextlib.suppress(YamlTextError):
        plain(read_yaml(piece * (2**18 // len(piece))))
    assert time.process_time() - started < 5


_VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["1e5", "0o17", "1:00", "on", "~", "0123", "<<", "=", "2024-01-01", "9" * 70]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=100, deadline=2000)
@given(_VALUES)
def test_what_is_written_reads_back_equal(value: Any) -> None:
    assert plain(read_yaml(write_yaml({"value": value}))) == {"value": value}


def test_a_value_keeps_its_text_and_its_line() -> None:
    assert read_yaml("a: 1e-3\nb:\n  - 0x1F\n  - '7'\n") == {
        "a": Scalar(1e-3, "1e-3", 1),
        "b": [Scalar(31, "0x1F", 3), Scalar("7", "7", 4)],
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", 1000),
        ("-0b101", -5),
        ("1.", 1.0),
        ("+.5e3", 500.0),
        ("2e-4", 2e-4),
        ("Off", False),
        ("2024-01-01", "2024-01-01"),
        ("08", "08"),
        ("0b2", "0b2"),
        ("!!str 2024", "2024"),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
        ("{<<: [{a: 1}, {a: 2, c: 3}]}", {"a": 1, "c": 3}),
        ("[&x [1], *x, *x]", [[1], [1], [1]]),
        ("", None),
        ("# nothing", None),
    ],
)
def test_what_yaml_means(text: str, value: Any) -> None:
    assert plain(read_yaml(text)) == value
