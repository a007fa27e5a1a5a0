from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lepton_ai import tensor
from lepton_ai.errors import InvalidArguments
from lepton_ai.tensor import DTYPES, SENDABLE, TensorMap

arrays = hnp.arrays(
    dtype=st.sampled_from([np.dtype(name) for name in DTYPES]),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)


def a_map(dtype: str, shape: list[Any], data: bytes) -> TensorMap:
    return TensorMap(dtype, shape, memoryview(data))


@given(arrays)
def test_an_array_comes_back_as_it_went(array: np.ndarray) -> None:
    back = tensor.from_wire(tensor.to_wire(array))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@given(arrays)
def test_an_array_comes_back_through_msgpack_and_json(array: np.ndarray) -> None:
    sent = tensor.to_wire(array)
    for encode, decode in (
        (msgspec.msgpack.encode, msgspec.msgpack.decode),
        (msgspec.json.encode, msgspec.json.decode),
    ):
        back = tensor.from_wire(decode(encode(sent), type=TensorMap))
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(arrays)
def test_an_array_that_is_not_contiguous_comes_back_by_value(array: np.ndarray) -> None:
    back = tensor.from_wire(tensor.to_wire(array.T))
    assert (back.shape, back.tobytes()) == (array.T.shape, array.T.tobytes())


def test_big_endian_arrays_are_sent_as_little_endian() -> None:
    sent = tensor.to_wire(np.array([1.5], ">f4"))
    assert (sent.dtype, bytes(sent.data)) == ("<f4", b"\x00\x00\xc0\x3f")


def test_an_array_of_another_class_is_sent_as_a_plain_one() -> None:
    sent = tensor.to_wire(np.ma.masked_array([1.0, 2.0], mask=[True, False]))
    np.testing.assert_array_equal(tensor.from_wire(sent), [1.0, 2.0])


def test_neither_direction_copies() -> None:
    array = np.arange(4, dtype=np.float32)
    back = tensor.from_wire(tensor.to_wire(array))
    assert np.shares_memory(array, back)
    assert not back.flags.writeable


def test_the_dtype_may_be_named_in_words() -> None:
    np.testing.assert_array_equal(tensor.from_wire(a_map("int16", [2], b"\x01\x00\x02\x00")), [1, 2])


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([object()]), np.array([1j]), np.array(["2026"], "M8")])
def test_an_array_of_no_plain_numbers_is_refused(array: np.ndarray) -> None:
    with pytest.raises(InvalidArguments, match="cannot be sent"):
        tensor.to_wire(array)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("<f4", [2], b"1234"),
        ("<f4", [1], b"12345"),
        ("<f4", [], b""),
        ("<f4", [-1], b""),
        ("<f4", [-1, -1], b"1234"),
        ("<f4", [10**30], b"1234"),
        ("<f4", [0, 10**30], b""),
        ("<f4", [0, 2**62, 2**62], b""),
        ("<f4", [1] * 33, b"1234"),
        (">f4", [1], b"1234"),
        ("O", [1], b"12345678"),
        ("float128", [1], b"1" * 16),
        ("", [], b""),
    ],
)
def test_a_map_that_contradicts_itself_is_refused_by_name(dtype: str, shape: list[int], data: bytes) -> None:
    with pytest.raises(InvalidArguments) as refused:
        tensor.from_wire(a_map(dtype, shape, data), "x")
    assert refused.value.field == "x"


@given(
    st.sampled_from([*DTYPES, "<f4", "|u1", "x"]), st.lists(st.integers(-2, 2**65), max_size=40), st.binary(max_size=64)
)
def test_no_map_raises_anything_but_invalid_arguments(dtype: str, shape: list[int], data: bytes) -> None:
    try:
        array = tensor.from_wire(a_map(dtype, shape, data))
    except InvalidArguments:
        return
    assert array.nbytes == len(data)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (np.zeros((2, 3)), (2, 3)),
        (a_map("<f4", [2, 0], b""), (2, 0)),
        ([[1, 2, 3], [4, 5, 6]], (2, 3)),
        ([], (0,)),
        ([[], []], (2, 0)),
        (7, ()),
    ],
)
def test_a_shape_is_known_without_making_an_array(value: Any, shape: tuple[int, ...]) -> None:
    assert tensor.shape_of(value) == shape


def test_a_list_that_holds_itself_has_a_shape_too() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert len(tensor.shape_of(loop)) <= 33


@pytest.mark.parametrize("code", np.typecodes["All"])
def test_an_array_of_any_type_is_known_to_be_sendable_or_not_by_its_number(code: str) -> None:
    dtype = np.dtype(code)
    assert (dtype.num in SENDABLE) == (dtype.newbyteorder().num in SENDABLE) == (dtype.name in DTYPES)
