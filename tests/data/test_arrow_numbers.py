"""Numbers of Arrow arrays are what pyarrow gives, read only, and bring no pandas along."""

import subprocess
import sys

import pyarrow as pa
import pytest

from stacking_ds.data.shards import numbers


@pytest.mark.parametrize("kind", [pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()])
def test_they_are_what_pyarrow_gives(kind: pa.DataType) -> None:
    whole = pa.array(range(10), kind)
    lists = pa.array([[1, 2], [], [3]], pa.list_(kind))
    for array in (whole, whole[3:], whole[3:3], pa.array([], kind), lists.values, lists[1:].values):
        found = numbers(array)
        assert (found.tolist(), found.dtype) == (array.to_pylist(), array.to_numpy().dtype)
        assert not found.flags.writeable


def test_a_missing_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 2 numbers are missing"):
        numbers(pa.array([1, None], pa.int64()))


def test_pandas_stays_out() -> None:
    program = (
        "import sys, pyarrow as pa; from stacking_ds.data.shards import numbers; "
        "numbers(pa.Array.from_buffers(pa.int64(), 1, [None, pa.py_buffer(bytes(8))])); "
        "sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
