"""Numbers of an Arrow array as numpy, without the pandas that pyarrow's own way imports."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["numbers"]


def numbers(array: pa.Array) -> NDArray[Any]:
    """A view, which cannot be written, of an array of numbers without nulls; shape [len(array)].

    pyarrow's `to_numpy` gives the same, and imports pandas for it where that is installed: 0.4 s,
    in which a KeyboardInterrupt is lost.

    Raises:
        ValueError: it has nulls, or claims more than it holds.
    """
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} numbers are missing")
    dtype = np.dtype(array.type.to_pandas_dtype())
    _, values = array.buffers()
    if values is None:  # Arrow keeps nothing of an empty array
        return np.empty(0, dtype)
    view: NDArray[Any] = np.frombuffer(values, dtype, len(array), array.offset * dtype.itemsize)
    view.flags.writeable = False
    return view
