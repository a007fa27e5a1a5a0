from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lepton_ai import tensor, wire
from lepton_ai.errors import InvalidArguments, LeptonError
from lepton_ai.signature import Signature
from lepton_ai.succession import Sequel, inherit, sequel_of

MATMUL = Signature({"a": "float32[m,k]", "b": "float32[k,n]"}, {"c": "float32[m,n]"}, {})
TOP = Signature({"items": "float32[n,d]", "k": "int64 = 2"}, {"scores": "float32[k]"}, {})
ONE, TWO = [[1.0, 2.0]], [[3.0], [4.0]]


def got(result: Any, signature: Signature = MATMUL, **given: Any) -> dict[str, Any]:
    return inherit(signature, wire.Body([result], given))


def refused(*results: Any, signature: Signature = MATMUL, **given: Any) -> InvalidArguments:
    with pytest.raises(InvalidArguments) as info:
        inherit(signature, wire.Body(list(results), given))
    return info.value


def sent(array: np.ndarray) -> dict[str, Any]:
    """A tensor map as a body holds it before it is typed."""
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


# -- inherit ----------------------------------------------------------------------------------------------------------


def test_without_a_result_the_arguments_are_those_that_were_given() -> None:
    assert inherit(MATMUL, wire.Body([], {"a": ONE, "b": TWO})) == {"a": ONE, "b": TWO}


def test_outputs_go_to_the_inputs_of_their_names() -> None:
    assert got({"b": TWO, "a": ONE}) == {"a": ONE, "b": TWO}


def test_an_output_that_is_no_input_is_left_out_beside_one_that_is() -> None:
    assert got({"b": TWO, "rank": 1}, a=ONE) == {"a": ONE, "b": TWO}


def test_a_single_output_goes_to_the_single_input_that_is_missing() -> None:
    assert got({"c": TWO}, a=ONE) == {"a": ONE, "b": TWO}


def test_an_input_with_a_default_is_not_missing_but_takes_an_output_of_its_name() -> None:
    assert got({"c": ONE}, TOP) == {"items": ONE}
    assert got({"items": ONE, "k": 7}, TOP) == {"items": ONE, "k": 7}


def test_what_was_given_by_name_wins() -> None:
    assert got({"a": TWO, "b": TWO}, a=ONE) == {"a": ONE, "b": TWO}
    assert got({"a": TWO}, a=ONE, b=TWO) == {"a": ONE, "b": TWO}


@pytest.mark.parametrize("result", [3, 2.5, True, [1.0, 2.0], TWO], ids=str)
def test_a_result_without_names_goes_to_the_single_input_that_is_missing(result: Any) -> None:
    assert got(result, a=ONE) == {"a": ONE, "b": result}


@pytest.mark.parametrize("result", [{"c": TWO, "d": TWO}, {"a": ONE}, {"c": ONE}, 3, {}], ids=str)
def test_where_nothing_tells_which_input_is_meant_what_is_missing_is_named(result: Any) -> None:
    error = refused(result)
    assert error.field in ("a", "b")
    assert f"{error.field} (float32[" in error.message


@pytest.mark.parametrize("result", [{"c": TWO}, 3], ids=str)
def test_a_result_that_no_input_takes_is_refused_and_not_dropped(result: Any) -> None:
    error = refused(result, a=ONE, b=TWO)
    assert error.field == "args"
    assert ".si" in error.message


def test_more_than_a_result_before_the_named_arguments_is_refused() -> None:
    error = refused(ONE, TWO)
    assert error.field == "args"
    assert "by name" in error.message


@pytest.mark.parametrize(
    "result", [None, "text", b"bytes", {"a": None}, [None], [{"a": ONE}, 3], [[{"a": ONE}]], {1: 2}], ids=str
)
def test_a_result_that_no_kernel_can_take_is_refused(result: Any) -> None:
    assert refused(result, a=ONE).field == "args"


def test_a_tensor_map_is_one_whether_it_has_a_name_or_not() -> None:
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    for result in (sent(array), {"b": sent(array)}):
        np.testing.assert_array_equal(tensor.from_wire(got(result, a=ONE)["b"]), array)


# -- a chord's results ------------------------------------------------------------------------------------------------


def test_a_chords_results_are_stacked_for_each_input() -> None:
    assert got([{"a": [1.0], "b": [2.0]}, {"a": [3.0], "b": [4.0]}]) == {"a": [[1.0], [3.0]], "b": [[2.0], [4.0]]}
    assert got([{"c": [1.0]}, {"c": [2.0]}], TOP) == {"items": [[1.0], [2.0]]}
    assert got([[1.0, 2.0], [3.0, 4.0]], TOP) == {"items": [[1.0, 2.0], [3.0, 4.0]]}


def test_an_output_that_not_every_result_has_is_left_out() -> None:
    assert got([{"c": [1.0]}, {"c": [2.0], "more": 1}], TOP) == {"items": [[1.0], [2.0]]}


@pytest.mark.parametrize("named", [True, False])
def test_arrays_are_stacked_to_one_array(named: bool) -> None:
    arrays = [np.full(2, at, np.float32) for at in range(3)]
    items = got([{"c": sent(each)} if named else sent(each) for each in arrays], TOP)["items"]
    assert items.dtype == np.float32
    np.testing.assert_array_equal(items, np.stack(arrays))


def test_an_array_beside_lists_becomes_lists() -> None:
    assert got([sent(np.float32([1, 2])), [3.0, 4.0]], TOP) == {"items": [[1.0, 2.0], [3.0, 4.0]]}


@pytest.mark.parametrize("other", [np.zeros(3, np.float32), np.zeros(2, np.float64)], ids=["shape", "dtype"])
def test_arrays_that_differ_are_refused_with_what_they_are(other: np.ndarray) -> None:
    error = refused([{"c": sent(np.zeros(2, np.float32))}, {"c": sent(other)}], signature=TOP)
    assert f"{other.dtype}{list(other.shape)}" in error.message


# -- sequel_of --------------------------------------------------------------------------------------------------------

HEADERS = wire.Headers("job-1", "a.b")


def test_a_job_stands_at_the_root_where_nobody_says_otherwise() -> None:
    found = sequel_of(HEADERS, {"chain": [{"task": "c.d"}], "callbacks": None})
    assert found == Sequel("job-1", "job-1", chain=[{"task": "c.d"}])


def test_where_a_job_stands_in_the_canvas_is_read_from_its_headers() -> None:
    headers = wire.Headers("job-1", "a.b", root_id="root", group="g", group_index=3, ignore_result=True)
    assert sequel_of(headers, {"chord": {"task": "c.d"}}) == Sequel(
        "job-1", "root", "g", 3, keep=False, chord={"task": "c.d"}
    )


@pytest.mark.parametrize("embed", [None, {}, [], {"callbacks": None, "errbacks": [], "chain": (), "chord": None}])
def test_nothing_follows_most_jobs(embed: Any) -> None:
    assert sequel_of(HEADERS, embed) is None


@pytest.mark.parametrize(
    "embed",
    [
        [1],
        "x",
        7,
        {"more": 1},
        {"callbacks": "x"},
        {"callbacks": {"task": "a"}},
        {"chain": [1]},
        {"chain": [{1: 2}]},
        {"chord": 5},
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_and_never_dropped(embed: Any) -> None:
    with pytest.raises(LeptonError) as info:
        sequel_of(HEADERS, embed)
    assert info.value.field == "callbacks"


@pytest.mark.parametrize("place", [{"root_id": 7}, {"group": [1]}, {"group_index": "x"}], ids=str)
def test_a_place_in_the_canvas_that_is_none_is_refused_where_something_follows(place: dict[str, Any]) -> None:
    headers = wire.Headers("job-1", "a.b", **place)
    assert sequel_of(headers, {}) is None
    with pytest.raises(InvalidArguments, match="follow"):
        sequel_of(headers, {"chord": {"task": "c.d"}})
