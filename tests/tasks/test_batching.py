from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai import wire
from lepton_ai.errors import InvalidArguments, OptionNotSupported, TooLarge, UnknownKernel
from lepton_ai.job import Options
from lepton_ai.kernel import Kernel
from lepton_ai.tensor import TensorMap
from tasks.batching import SERIES_S, Group, Refused, TakenJob, Unreadable, answer, groups, read, split

LIMIT_BYTES = 1 << 20


def kernel(name: str, batch: Any, inputs: dict[str, str] | None = None) -> Kernel:
    inputs = inputs or {"x": "float32[n,k]", "scale": "float64 = 1.0"}
    return Kernel(name, inputs=inputs, outputs={"y": "float32[n,k]"}, flops="n", bytes="n", batch=batch)


STACKS, JOINS, ALONE = kernel("test.stacks", "stack"), kernel("test.joins", "concat"), kernel("test.alone", None)
KERNELS = {each.name: each for each in (STACKS, JOINS, ALONE)}


def message(arguments: Any, *, kernel: str = "test.joins", options: Options | None = None, **headers: Any) -> bytes:
    found = json.loads(wire.envelope("job-1", kernel, arguments, options or Options()))
    found["headers"] |= headers
    return json.dumps(found).encode()


def taken(rows: int, columns: int = 2, *, kernel: Kernel = JOINS, scale: float = 1.0, name: str = "") -> TakenJob:
    found = read(
        message({"x": np.full((rows, columns), rows, "<f4"), "scale": scale}, kernel=kernel.name), KERNELS, LIMIT_BYTES
    )
    assert isinstance(found, TakenJob)
    return msgspec.structs.replace(found, id=name or f"{rows}x{columns}")


def ids(found: list[Group]) -> list[list[str]]:
    return [[job.id for job in group.jobs] for group in found]


# -- read -------------------------------------------------------------------------------------------------------


def test_a_message_becomes_a_job_with_checked_inputs_and_its_work() -> None:
    job = read(message({"x": [[1, 2], [3, 4], [5, 6]]}), KERNELS, LIMIT_BYTES)
    assert isinstance(job, TakenJob)
    assert (job.id, job.kernel, job.keep, job.work.flops) == ("job-1", JOINS, True, 3)
    assert job.inputs["x"].dtype == np.float32
    assert job.inputs["scale"] == 1.0


def test_a_result_that_the_caller_ignores_is_not_kept() -> None:
    job = read(message({"x": [[1.0]]}, ignore_result=True), KERNELS, LIMIT_BYTES)
    assert isinstance(job, TakenJob)
    assert not job.keep


def refusal(found: Any) -> Refused:
    assert isinstance(found, Refused), found
    assert (found.id, found.keep) == ("job-1", True)
    return found


def test_a_kernel_that_this_worker_lacks_is_refused_and_what_it_has_is_named() -> None:
    found = refusal(read(message({"x": [[1.0]]}, kernel="test.absent"), KERNELS, LIMIT_BYTES))
    assert isinstance(found.error, UnknownKernel)
    assert "test.absent" in found.error.message
    assert "test.joins" in found.error.message


def test_an_argument_that_does_not_fit_is_refused_by_name() -> None:
    found = refusal(read(message({"x": [1.0]}), KERNELS, LIMIT_BYTES))
    assert isinstance(found.error, InvalidArguments)
    assert found.error.field == "x"


def test_an_unknown_option_is_refused_by_name() -> None:
    found = refusal(read(message({"x": [[1.0]]}, lepton={"colour": "red"}), KERNELS, LIMIT_BYTES))
    assert isinstance(found.error, OptionNotSupported)
    assert "colour" in found.error.message


def test_a_refused_job_keeps_the_options_that_its_waiter_needs() -> None:
    options = Options(reply_to="lepton:reply:me", result="msgpack")
    assert (
        refusal(read(message({"x": 1.0}, options=options), KERNELS, LIMIT_BYTES)).options.reply_to == options.reply_to
    )


def test_a_body_above_the_limit_is_refused() -> None:
    found = refusal(read(message({"x": np.zeros((1000, 2), "<f4")}), KERNELS, 1000))
    assert isinstance(found.error, TooLarge)


@pytest.mark.parametrize(
    ("expires", "deadline_at"),
    [
        ("2020-01-01T00:00:00+00:00", 1577836800.0),
        ("2020-01-01T00:00:00", 1577836800.0),
        ("2020-01-01T00:00:00Z", 1577836800.0),
        (1.0, 1.0),
        (0, 0.0),
        (-5.5, -5.5),
        ("0001-01-01T00:00:00+14:00", -62135647200.0),
        ("9999-12-31T23:59:59-14:00", 253402351199.0),
        (4e9, 4e9),
        (None, None),
    ],
)
def test_a_job_says_after_when_it_must_not_begin(expires: Any, deadline_at: float | None) -> None:
    job = read(message({"x": [[1.0]]}, expires=expires), KERNELS, LIMIT_BYTES)
    assert isinstance(job, TakenJob)
    assert job.deadline_at == deadline_at


@pytest.mark.parametrize("expires", ["soon", "", 1e300, "99999-01-01"])
def test_an_expiry_that_is_no_time_is_refused_and_not_guessed(expires: Any) -> None:
    found = refusal(read(message({"x": [[1.0]]}, expires=expires), KERNELS, LIMIT_BYTES))
    assert isinstance(found.error, InvalidArguments)
    assert found.error.field == "expires"


@pytest.mark.parametrize(
    ("limits", "own", "limit_s"),
    [
        (None, None, None),
        ([None, None], None, None),
        ([5, None], None, 5),
        ([None, 2.5], None, 2.5),
        ([5, 2.5], None, 2.5),
        ([5, 2.5], 7.0, 7.0),
    ],
)
def test_a_jobs_own_limit_is_ours_or_the_shorter_of_celerys(
    limits: Any, own: float | None, limit_s: float | None
) -> None:
    job = read(message({"x": [[1.0]]}, options=Options(limit_s=own), timelimit=limits), KERNELS, LIMIT_BYTES)
    assert isinstance(job, TakenJob)
    assert job.limit_s == limit_s


@pytest.mark.parametrize("limits", [[0, None], [-1, None], [None, 0.0]])
def test_a_time_limit_that_leaves_no_time_is_refused(limits: Any) -> None:
    found = refusal(read(message({"x": [[1.0]]}, timelimit=limits), KERNELS, LIMIT_BYTES))
    assert isinstance(found.error, OptionNotSupported)
    assert found.error.field == "timelimit"


@pytest.mark.parametrize(("retries", "found"), [(None, 0), (0, 0), (2, 2), (-1, 0)])
def test_a_job_says_how_often_it_has_been_tried(retries: int | None, found: int) -> None:
    job = read(message({"x": [[1.0]]}, retries=retries), KERNELS, LIMIT_BYTES)
    assert isinstance(job, TakenJob)
    assert job.retries == found


def with_embed(embed: Any, kwargs: Any = {"x": [[1.0]]}, *args: Any) -> bytes:  # noqa: B006 - nobody writes to it
    found = json.loads(message({"x": [[1.0]]}))
    found["body"] = base64.b64encode(msgspec.msgpack.encode((args, kwargs, embed))).decode()
    return json.dumps(found).encode()


@pytest.mark.parametrize("embed", [None, {}, {"callbacks": []}, {"chord": None, "chain": None}, {"more": None}])
def test_most_jobs_have_nothing_that_follows_them(embed: Any) -> None:
    found = read(with_embed(embed), KERNELS, LIMIT_BYTES)
    assert isinstance(found, TakenJob)
    assert found.sequel is None


def test_what_is_to_follow_a_job_is_read_with_it() -> None:
    found = read(with_embed({"callbacks": [{"task": "a.b"}], "chord": {"task": "c.d"}}), KERNELS, LIMIT_BYTES)
    assert isinstance(found, TakenJob)
    assert found.sequel is not None
    assert (found.sequel.id, found.sequel.root_id) == ("job-1", "job-1")
    assert (found.sequel.callbacks, found.sequel.chord) == ([{"task": "a.b"}], {"task": "c.d"})


@pytest.mark.parametrize("embed", [{"more": 1}, [1], "x", {"callbacks": [1]}, {"chain": "abc"}, {"chord": [1]}])
def test_what_is_to_follow_is_refused_where_it_is_not_understood_and_never_dropped(embed: Any) -> None:
    found = refusal(read(with_embed(embed), KERNELS, LIMIT_BYTES))
    assert found.error.field == "callbacks"


def test_what_is_to_follow_a_refused_job_is_known() -> None:
    found = refusal(read(with_embed({"errbacks": [{"task": "a.b"}]}, {"x": None}), KERNELS, LIMIT_BYTES))
    assert isinstance(found.error, InvalidArguments)
    assert found.sequel is not None
    assert found.sequel.errbacks == [{"task": "a.b"}]


def test_a_result_that_goes_before_the_arguments_is_bound_by_name() -> None:
    found = read(with_embed({}, {"scale": 2.0}, {"x": [[1.0, 2.0]], "y": [3.0]}), KERNELS, LIMIT_BYTES)
    assert isinstance(found, TakenJob)
    assert found.inputs["x"].tolist() == [[1.0, 2.0]]
    assert not found.tensors


def test_a_job_that_got_an_array_from_the_job_before_answers_with_arrays() -> None:
    array = wire.to_value(np.zeros((1, 2), "<f4"))
    for result in ({"x": array}, array):
        found = read(with_embed({}, {}, result), KERNELS, LIMIT_BYTES)
        assert isinstance(found, TakenJob)
        assert found.tensors


def test_bytes_without_a_job_in_them_are_unreadable() -> None:
    assert isinstance(read(b"no message", KERNELS, LIMIT_BYTES), Unreadable)


@given(st.binary(max_size=300))
def test_no_bytes_make_read_raise(data: bytes) -> None:
    assert isinstance(read(data, KERNELS, LIMIT_BYTES), Unreadable)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PATHS = st.sampled_from(
    [("body",), ("content-type",), ("properties",), ("headers",), ("properties", "body_encoding")]
    + [("headers", name) for name in ("id", "task", "lepton", "expires", "eta", "retries", "timelimit", "compression")]
    + [("headers", name) for name in ("root_id", "group", "group_index")]
    + [("headers", "lepton", name) for name in ("shapes", "device", "reply_to", "priority", "result")]
)


@settings(max_examples=300)
@given(PATHS, PLAIN)
def test_no_envelope_makes_read_raise(path: tuple[str, ...], value: Any) -> None:
    found = json.loads(with_embed({"chain": [{"task": "a.b"}]}))
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert isinstance(read(json.dumps(found).encode(), KERNELS, LIMIT_BYTES), TakenJob | Refused | Unreadable)


TENSORS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["<f4", "float32", "<f8", "|O", "V0", ""]) | st.text(max_size=4),
     "shape": st.lists(st.integers(-2, 2**63 - 1), max_size=40), "data": st.binary(max_size=24)}
)  # fmt: skip
NAMES = st.sampled_from(["x", "scale", "z"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | TENSORS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=10,
)
EMBEDS = st.dictionaries(st.sampled_from(["callbacks", "errbacks", "chain", "chord", "more"]), VALUES, max_size=3)
BODIES = st.tuples(
    st.lists(VALUES, max_size=2), st.dictionaries(NAMES, VALUES), EMBEDS | VALUES
) | VALUES  # fmt: skip


@settings(max_examples=300)
@given(BODIES)
def test_no_body_makes_read_raise(body: Any) -> None:
    found = json.loads(message({"x": [[1.0]]}))
    found["body"] = base64.b64encode(msgspec.msgpack.encode(body)).decode()
    assert isinstance(read(json.dumps(found).encode(), KERNELS, LIMIT_BYTES), TakenJob | Refused)


# -- groups and split -------------------------------------------------------------------------------------------


def test_equal_shapes_stack_and_others_do_not() -> None:
    jobs = [taken(rows, kernel=STACKS, name=name) for name, rows in (("a", 2), ("b", 3), ("c", 2))]
    assert ids(groups(jobs, 10)) == [["a", "c"], ["b"]]


def test_any_lengths_are_joined_but_not_other_widths() -> None:
    jobs = [taken(2, 2, name="a"), taken(2, 3, name="b"), taken(5, 2, name="c")]
    assert ids(groups(jobs, 10)) == [["a", "c"], ["b"]]


@pytest.mark.parametrize("batching", [STACKS, JOINS], ids=["stack", "concat"])
def test_jobs_with_other_scalars_run_apart(batching: Kernel) -> None:
    jobs = [taken(2, kernel=batching, scale=scale, name=str(scale)) for scale in (1.0, 2.0, 1.0)]
    assert ids(groups(jobs, 10)) == [["1.0", "1.0"], ["2.0"]]


def test_jobs_whose_scalar_is_no_number_run_apart() -> None:
    jobs = [taken(2, scale=float("nan"), name=name) for name in "ab"]
    assert ids(groups(jobs, 10)) == [["a"], ["b"]]


def test_a_kernel_without_batching_runs_one_at_a_time() -> None:
    jobs = [taken(2, kernel=ALONE, name=name) for name in "abc"]
    assert ids(groups(jobs, 10)) == [["a"], ["b"], ["c"]]


def test_quick_jobs_of_a_kernel_without_batching_are_a_series_with_others_of_about_their_size() -> None:
    jobs = [taken(rows, kernel=ALONE, name=name) for name, rows in (("a", 4), ("b", 400), ("c", 5))]
    found = groups(jobs, 10, predicted_s=lambda _: 1e-4)
    assert ids(found) == [["a", "c"], ["b"]]
    assert [each.is_series for each in found] == [True, True]


def test_a_series_takes_no_longer_than_its_limit() -> None:
    jobs = [taken(2, kernel=ALONE, name=name) for name in "abcde"]
    assert ids(groups(jobs, 10, predicted_s=lambda _: 0.4 * SERIES_S)) == [["a", "b"], ["c", "d"], ["e"]]
    assert ids(groups(jobs[:2], 10, predicted_s=lambda _: 1.1 * SERIES_S)) == [["a"], ["b"]]


def test_jobs_of_different_kernels_never_share_a_launch() -> None:
    jobs = [taken(2, kernel=each, name=name) for name, each in (("a", STACKS), ("b", JOINS), ("c", STACKS))]
    assert ids(groups(jobs, 10)) == [["a", "c"], ["b"]]


def test_a_group_takes_no_more_than_the_limit() -> None:
    jobs = [taken(2, name=name) for name in "abcde"]
    assert ids(groups(jobs, 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_stack_has_a_leading_axis_and_a_join_a_longer_one() -> None:
    (stacked,) = groups([taken(2, kernel=STACKS, name=name) for name in "abc"], 10)
    (joined,) = groups([taken(2, name="a"), taken(5, name="b")], 10)
    assert stacked.inputs["x"].shape == (3, 2, 2)
    assert joined.inputs["x"].shape == (7, 2)
    assert stacked.inputs["scale"] == 1.0


def test_a_job_alone_keeps_its_own_shape_in_either_batching() -> None:
    for each in (STACKS, JOINS):
        (group,) = groups([taken(4, kernel=each)], 10)
        assert group.inputs["x"].shape == (4, 2)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_what_was_joined_is_split_into_each_jobs_own(rows: list[int]) -> None:
    jobs = [taken(count, name=str(at)) for at, count in enumerate(rows)]
    (group,) = groups(jobs, 100)
    parts = split(group, {"y": group.inputs["x"]})
    for job, part in zip(jobs, parts, strict=True):
        np.testing.assert_array_equal(part["y"], job.inputs["x"])


@given(st.integers(1, 12), st.integers(0, 3))
def test_what_was_stacked_is_split_into_each_jobs_own(count: int, rows: int) -> None:
    jobs = [taken(rows, kernel=STACKS, name=str(at)) for at in range(count)]
    for at, job in enumerate(jobs):
        job.inputs["x"] = job.inputs["x"] + at
    (group,) = groups(jobs, 100)
    for job, part in zip(jobs, split(group, {"y": group.inputs["x"]}), strict=True):
        np.testing.assert_array_equal(part["y"], job.inputs["x"])


@pytest.mark.parametrize("output", [np.zeros((3, 2)), np.zeros((0, 2)), np.array(1.0)], ids=["rows", "empty", "scalar"])
@pytest.mark.parametrize("batching", [STACKS, JOINS], ids=["stack", "concat"])
def test_outputs_of_another_length_are_never_handed_out(batching: Kernel, output: np.ndarray) -> None:
    (group,) = groups([taken(2, kernel=batching, name=name) for name in "ab"], 10)
    with pytest.raises(InvalidArguments, match="'y'"):
        split(group, {"y": output})


# -- answer -----------------------------------------------------------------------------------------------------


def read_job(arguments: Any, **options: Any) -> TakenJob:
    found = read(message(arguments, options=Options(**options)), KERNELS, LIMIT_BYTES)
    assert isinstance(found, TakenJob)
    return found


def test_lists_are_answered_with_lists() -> None:
    found = answer(read_job({"x": [[1.0, 2.0]]}), {"y": np.array([[3.0, 4.0]], "<f4")})
    assert found == {"y": [[3.0, 4.0]]}


def test_tensor_maps_are_answered_with_tensor_maps() -> None:
    found = answer(read_job({"x": np.zeros((1, 2), "<f4")}), {"y": np.array([[3.0, 4.0]], "<f4")})["y"]
    assert isinstance(found, TensorMap)
    assert (found.dtype, found.shape, bytes(found.data)) == ("<f4", [1, 2], np.array([3, 4], "<f4").tobytes())


@pytest.mark.parametrize(("encoding", "form"), [("msgpack", TensorMap), ("json", list), (None, list)])
def test_a_job_of_numbers_alone_is_answered_in_the_form_of_its_encoding(encoding: str | None, form: type) -> None:
    numbers = kernel("test.numbers", None, {"n": "int64", "k": "int64"})
    sent = message({"n": 1, "k": 2}, kernel="test.numbers", options=Options(result=encoding))
    job = read(sent, {"test.numbers": numbers}, LIMIT_BYTES)
    assert isinstance(job, TakenJob)
    assert isinstance(answer(job, {"y": np.zeros((1, 2), "<f4")})["y"], form)


def test_an_output_that_is_one_number_is_a_number_in_either_form() -> None:
    for arguments in ({"x": [[1.0]]}, {"x": np.zeros((1, 1), "<f4")}):
        assert answer(read_job(arguments), {"y": np.float32(2.5)}) == {"y": 2.5}
