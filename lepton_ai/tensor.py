"""Arrays on the wire: `{"dtype": "<f4", "shape": [..], "data": bytes}`, so that every language reads them.

In msgpack `data` is bytes and both directions are zero-copy; in JSON it is base64. An array that is kept outside its
message has `blob` instead of `data`, which says where (`lepton_ai/blob.py`).
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai.errors import InvalidArguments

__all__ = ["DTYPES", "SENDABLE", "TensorMap", "from_wire", "shape_of", "to_wire"]

#: The dtypes that a signature may name, and their little-endian wire form.
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    )
}
#: NumPy's numbers of these dtypes: an array's `dtype.num` is among them where it can be sent.
SENDABLE = frozenset(np.dtype(code).num for code in np.typecodes["All"] if np.dtype(code).name in DTYPES)
_BY_WIRE = {dtype.str: dtype for dtype in DTYPES.values()} | DTYPES
#: The wire's name of a dtype that crosses it as it is.
_WIRE_NAMES = {dtype: dtype.str for dtype in DTYPES.values()}
_MAX_DIMS = 32
#: The largest size of a dimension, as of any array.
MOST = 2**63 - 1


class TensorMap(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """An array as it crosses the wire: its data, or where they are."""

    dtype: str
    shape: list[int]
    data: memoryview | None = None
    blob: str | None = None


def to_wire(array: NDArray[Any]) -> TensorMap:
    """The tensor map of an array: a view of its memory, a copy only where it is not C-contiguous and little-endian."""
    array = np.asarray(array)
    name = _WIRE_NAMES.get(array.dtype)
    if name is None or not array.flags.c_contiguous:
        wire_dtype = DTYPES.get(array.dtype.name)
        if wire_dtype is None:
            raise InvalidArguments(f"dtype {array.dtype} cannot be sent; use one of {', '.join(DTYPES)}")
        name, array = wire_dtype.str, np.asarray(array, dtype=wire_dtype, order="C")
    return TensorMap(name, list(array.shape), array.data if array.size else memoryview(b""))


def from_wire(value: TensorMap, field: str | None = None) -> NDArray[Any]:
    """The array of a tensor map, read-only and sharing its bytes.

    Raises InvalidArguments, naming `field`, where dtype, shape and data do not agree, or the data are not in it.
    """
    data = value.data
    if data is None or value.blob is not None:
        raise InvalidArguments("a tensor map here has its data in it, and no blob", field)
    dtype = _BY_WIRE.get(value.dtype)
    if dtype is None:
        raise InvalidArguments(f"unknown dtype {value.dtype!r}; use one of {', '.join(DTYPES)}", field)
    shape = value.shape
    if shape and min(shape) < 0:  # NumPy takes some of these
        raise _unfit(shape, dtype, data.nbytes, field)
    try:
        array: NDArray[Any] = np.ndarray(shape, dtype, data)
    except (ValueError, OverflowError, TypeError) as error:
        raise _unfit(shape, dtype, data.nbytes, field, str(error)) from None
    if array.nbytes != data.nbytes or array.ndim > _MAX_DIMS:
        raise _unfit(shape, dtype, data.nbytes, field)
    if not data.readonly:  # what was decoded from bytes is so already
        array.flags.writeable = False
    return array


def _unfit(
    shape: list[int], dtype: np.dtype[Any], size_bytes: int, field: str | None, told: str = ""
) -> InvalidArguments:
    """Why so many bytes are no array of this shape."""
    _check_shape(shape, field)
    expected = math.prod(shape) * dtype.itemsize
    if size_bytes != expected:
        return InvalidArguments(f"shape {shape} of {dtype.name} takes {expected} bytes, data has {size_bytes}", field)
    return InvalidArguments(f"shape {shape} is too large: {told}", field)  # a size of 0 hides others beyond any memory


def shape_of(value: Any, field: str | None = None) -> tuple[int, ...]:
    """The shape of a tensor map, an array or nested lists, without making an array of it."""
    if isinstance(value, np.ndarray):
        return tuple(value.shape)
    if isinstance(value, TensorMap):
        _check_shape(value.shape, field)
        return tuple(value.shape)
    shape: list[int] = []
    while isinstance(value, list | tuple):
        shape.append(len(value))
        if not value or len(shape) > _MAX_DIMS:
            break
        value = value[0]
    return tuple(shape)


def _check_shape(shape: list[int], field: str | None) -> None:
    if len(shape) > _MAX_DIMS or (shape and not (min(shape) >= 0 and max(shape) <= MOST)):
        raise InvalidArguments(f"shape must be at most {_MAX_DIMS} sizes, each 0 to 2**63 - 1", field)
