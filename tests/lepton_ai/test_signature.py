from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lepton_ai import tensor
from lepton_ai.errors import InvalidArguments, InvalidKernel, TooLarge
from lepton_ai.signature import Argument, Signature, describe, parse, shapes_of

MATMUL = Signature({"a": "float32[m,k]", "b": "float32[k,n]"}, {"c": "float32[m,n]"}, {})
TOP = Signature({"items": "float32[n,d]", "k": "int64 = 2"}, {"scores": "float32[k]"}, {"k": "1 <= k <= n"})


def refused(signature: Signature, arguments: dict[str, Any]) -> InvalidArguments:
    with pytest.raises(InvalidArguments) as info:
        signature.bind(arguments)
    return info.value


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("float32[m,k]", Argument("x", "float32", ("m", "k"))),
        (" uint8 [ h , w , 3 ] ", Argument("x", "uint8", ("h", "w", 3))),
        ("int64", Argument("x", "int64")),
        ("int64 = 20", Argument("x", "int64", None, 20)),
        ("int64 = -1", Argument("x", "int64", None, -1)),
        ("float64 = 1e-3", Argument("x", "float64", None, 0.001)),
        ("bool = true", Argument("x", "bool", None, True)),
    ],
)
def test_a_signature_string_is_read_and_written_alike(text: str, argument: Argument) -> None:
    assert parse("x", text) == argument
    if argument.default is not True:
        assert parse("x", str(argument)) == argument


@pytest.mark.parametrize(
    "text",
    [
        "",
        "float99",
        "float32[]",
        "float32[m,,k]",
        "float32[M]",
        "float32[m][k]",
        "float32[-1]",
        "float32[m+1]",
        "float32[" + "9" * 5000 + "]",
        "float32[m] = 1",
        "int64 = 1.5",
        "int64 = 1e",
        "int64 = 1.2.3",
        "int64 = --1",
        "int8 = 300",
        "float64 = 1e999",
        "bool = 1",
        "object",
        "float32\n[m]; drop",
    ],
)
def test_a_string_that_is_no_signature_is_an_invalid_kernel(text: str) -> None:
    with pytest.raises(InvalidKernel) as info:
        parse("x", text)
    assert info.value.field == "x"


@given(st.text(alphabet="intfloabu123468[]mn,= .-+eE", max_size=24))
def test_any_text_is_a_signature_or_an_invalid_kernel(text: str) -> None:
    try:
        argument = parse("x", text)
    except InvalidKernel:
        return
    assert argument.dtype in tensor.DTYPES


def test_a_limit_on_no_input_or_on_unknown_names_is_an_invalid_kernel() -> None:
    with pytest.raises(InvalidKernel, match="'z'"):
        Signature({"x": "float32[n]"}, {}, {"z": "n > 0"})
    with pytest.raises(InvalidKernel, match="'z'"):
        Signature({"x": "float32[n]"}, {}, {"x": "z > 0"})


def test_arguments_become_arrays_of_the_declared_dtype_and_fix_the_dims() -> None:
    inputs, dims = MATMUL.bind({"a": [[1, 2], [3, 4], [5, 6]], "b": np.ones((2, 4), np.float32)})
    assert dims == {"m": 3, "k": 2, "n": 4}
    assert inputs["a"].dtype == np.float32
    assert inputs["a"].shape == (3, 2)


def test_a_default_stands_in_for_what_is_left_out() -> None:
    inputs, dims = TOP.bind({"items": np.ones((5, 3), np.float32)})
    assert inputs["k"] == dims["k"] == 2


def test_shapes_alone_fix_the_same_dims_as_the_arguments() -> None:
    arguments = {"items": np.ones((5, 3), np.float32), "k": 4}
    assert TOP.dims(shapes_of(arguments)) == TOP.bind(arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"a": np.ones((2, 2), np.float32)}, "b"),
        ({"a": np.ones((2, 2), np.float32), "b": np.ones((2, 2), np.float32), "z": 1}, "z"),
        ({"a": np.ones((2, 2), np.float32), "b": np.ones((3, 2), np.float32)}, "b"),
        ({"a": np.ones(2, np.float32), "b": np.ones((2, 2), np.float32)}, "a"),
        ({"a": np.ones((2, 2)), "b": np.ones((2, 2), np.float32)}, "a"),
        ({"a": [[1, 2], [3]], "b": np.ones((2, 2), np.float32)}, "a"),
        ({"a": [["x"]], "b": np.ones((1, 2), np.float32)}, "a"),
        ({"a": [[None]], "b": np.ones((1, 2), np.float32)}, "a"),
        ({"a": [[10**400]], "b": np.ones((1, 2), np.float32)}, "a"),
        ({"a": [[True]], "b": np.ones((1, 2), np.float32)}, "a"),
        ({"a": "text", "b": np.ones((1, 2), np.float32)}, "a"),
        ({"a": None, "b": np.ones((1, 2), np.float32)}, "a"),
        ({"a": 1.0, "b": np.ones((1, 2), np.float32)}, "a"),
        ({"a": tensor.TensorMap("<f4", [0, 10**30], memoryview(b"")), "b": [[1]]}, "a"),
        ({"a": tensor.TensorMap("<f8", [1, 1], memoryview(b"12345678")), "b": [[1]]}, "a"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_by_name(arguments: dict[str, Any], field: str) -> None:
    assert refused(MATMUL, arguments).field == field


@pytest.mark.parametrize("k", [0, 6, -1, 2**63, 2.0, 1.5, True, "2", None, [2], math.nan])
def test_a_scalar_outside_its_type_or_limit_is_refused_by_name(k: Any) -> None:
    assert refused(TOP, {"items": np.ones((5, 3), np.float32), "k": k}).field == "k"


def test_a_broken_limit_says_what_was_wanted_and_what_came() -> None:
    error = refused(TOP, {"items": np.ones((5, 3), np.float32), "k": 6})
    assert "1 <= k <= n" in error.message
    assert "k = 6" in error.message
    assert "n = 5" in error.message


def test_a_limit_that_is_not_defined_is_not_met() -> None:
    signature = Signature({"x": "float32[n]", "k": "int64"}, {}, {"k": "sqrt(n / k)"})
    assert refused(signature, {"x": [1.0], "k": 0}).field == "k"
    signature.bind({"x": [1.0], "k": 1})


@pytest.mark.parametrize(
    ("text", "values"),
    [("uint8[n]", [256]), ("uint8[n]", [-1]), ("int8[n]", [1.0]), ("int64[n]", [2**63]), ("bool[n]", [1])],
)
def test_a_list_whose_values_would_change_is_refused(text: str, values: list[Any]) -> None:
    assert refused(Signature({"x": text}, {}, {}), {"x": values}).field == "x"


def test_a_size_in_the_signature_must_be_met() -> None:
    signature = Signature({"pixels": "uint8[n,3]"}, {}, {})
    assert signature.bind({"pixels": [[1, 2, 3]]})[1] == {"n": 1}
    assert refused(signature, {"pixels": [[1, 2]]}).field == "pixels"


def test_numpy_scalars_and_tensor_maps_of_no_dims_are_numbers() -> None:
    items = np.ones((5, 3), np.float32)
    assert TOP.bind({"items": items, "k": np.int32(3)})[0]["k"] == 3
    assert TOP.bind({"items": items, "k": tensor.to_wire(np.array(3))})[0]["k"] == 3


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6)),
    st.sampled_from(["array", "map", "transposed"]),
)
def test_every_way_of_sending_an_array_binds_the_same_values(array: np.ndarray, form: str) -> None:
    signature = Signature({"x": "float32[m,n]"}, {}, {})
    value = {"array": array, "map": tensor.to_wire(array), "transposed": np.asfortranarray(array)}[form]
    inputs, dims = signature.bind({"x": value})
    assert inputs["x"].flags.c_contiguous
    assert inputs["x"].tobytes() == array.tobytes()
    assert (dims["m"], dims["n"]) == array.shape


@given(st.lists(st.integers(-2, 2**70) | st.none() | st.text(max_size=3) | st.booleans(), max_size=4))
def test_hostile_shapes_are_refused_and_nothing_else_is_raised(shape: list[Any]) -> None:
    try:
        dims = TOP.dims({"items": shape, "k": 1})
    except InvalidArguments:
        return
    assert shape == [dims["n"], dims["d"]]


def test_a_description_shows_shapes_and_never_data() -> None:
    text = describe(shapes_of({"a": np.full((2, 3), 12345.0, np.float32), "k": 7}))
    assert text == "{a=[2,3], k=7}"


CARRYING = {
    "inputs": {"x": "float64[n]", "rows": "float32[s,6]", "at": "float64[1]", "count": "int64[2]"},
    "outputs": {"y": "float64[n]", "rows": "float32[o,6]", "at": "float64[1]", "count": "int64[2]"},
    "limits": {},
}


def test_what_is_carried_may_be_left_out_and_begins_with_nothing() -> None:
    signature = Signature(**CARRYING, carries=("rows", "at", "count"))
    inputs, dims = signature.bind({"x": np.ones(3)})
    assert inputs["rows"].shape == (0, 6)
    assert inputs["rows"].dtype == np.float32
    np.testing.assert_array_equal(inputs["at"], [np.nan])
    np.testing.assert_array_equal(inputs["count"], [0, 0])
    assert dims == signature.dims({"x": [3]}) == {"n": 3, "s": 0}
    assert signature.bind({"x": np.ones(3), "rows": np.ones((2, 6), np.float32)})[1]["s"] == 2
    with pytest.raises(InvalidArguments, match="'x' is missing"):
        signature.bind({})


@pytest.mark.parametrize(
    ("carries", "more", "says"),
    [
        (("x",), {}, "must be as float64"),
        (("z",), {}, "'z' is not"),
        (("y",), {}, "'y' is not"),
        (("k",), {"k": "float64"}, "'k' is not"),
        (("rows",), {"other": "float32[s]"}, "no other input may have its"),
    ],
)
def test_what_cannot_be_carried_is_refused(carries: tuple[str, ...], more: dict[str, str], says: str) -> None:
    outputs = CARRYING["outputs"] | {"x": "float32[n]"}
    with pytest.raises(InvalidKernel, match=says):
        Signature(CARRYING["inputs"] | more, outputs, {}, carries)


# -- outputs ----------------------------------------------------------------------------------------------------------

RETURNS = Signature(
    {"x": "float32[n]", "k": "int64"},
    {"y": "float32[n]", "at": "int64[found]", "top": "float32[k,2]", "also": "bool[found]"},
    {},
)


def returned(**changed: Any) -> dict[str, Any]:
    good = {
        "y": np.zeros(3, np.float32),
        "at": np.zeros(5, np.int64),
        "top": np.zeros((4, 2), np.float32),
        "also": np.zeros(5, bool),
    }
    return good | changed


def test_outputs_as_declared_are_taken() -> None:
    RETURNS.check_outputs(returned(), {"n": 3, "k": 4})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"z": np.zeros(1)}, "and declares ['also', 'at', 'top', 'y']"),
        ({"y": np.zeros(3)}, "returned 'y' of float64, and declares float32[n]"),
        ({"y": np.zeros(4, np.float32)}, "'y' of shape [4], and declares float32[n] with n = 3"),
        ({"y": np.zeros((3, 1), np.float32)}, "'y' of shape [3, 1]"),
        ({"top": np.zeros((3, 2), np.float32)}, "'top' of shape [3, 2], and declares float32[k,2] with k = 4"),
        ({"top": np.zeros((4, 3), np.float32)}, "'top' of shape [4, 3]"),
        ({"also": np.zeros(6, bool)}, "'also' of shape [6], and declares bool[found] with found = 5"),
    ],
)
def test_outputs_that_are_not_as_declared_are_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidKernel) as refused:
        RETURNS.check_outputs(returned(**changed), {"n": 3, "k": 4})
    assert told in refused.value.message


GROWING = Signature(
    {"a": "float32[m]", "b": "float32[n]", "k": "int64"},
    {"outer": "float64[m,n]", "counts": "int64[k,2]", "same": "float32[m]", "found": "int64[v]"},
    {},
)


def test_outputs_that_would_fill_a_worker_s_memory_are_refused() -> None:
    assert GROWING.bind({"a": np.ones(1000, np.float32), "b": np.ones(1000, np.float32), "k": 1000})[1]["k"] == 1000
    few = {"a": np.ones(20_000, np.float32), "b": np.ones(20_000, np.float32)}
    with pytest.raises(TooLarge, match=r"would take 3.2e\+09 bytes.*k = 1, m = 20000, n = 20000"):
        GROWING.bind({**few, "k": 1})
    with pytest.raises(TooLarge):
        GROWING.bind({"a": np.ones(1, np.float32), "b": np.ones(1, np.float32), "k": 2**62})


def test_an_array_of_no_elements_makes_no_large_output() -> None:
    rows = Signature({"a": "float32[m,n]"}, {"b": "float32[m]"}, {})
    assert rows.bind({"a": np.empty((1000, 0), np.float32)})[1] == {"m": 1000, "n": 0}
    with pytest.raises(TooLarge, match="m = 1e"):
        rows.bind({"a": np.empty((10**8, 0), np.float32)})
