from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai import bundle, topology, wire
from lepton_ai.bundle import Row, bundled
from lepton_ai.direct_protocol import push, writer
from lepton_ai.errors import LeptonError, Malformed, OptionNotSupported
from lepton_ai.identity import ids, new_id
from lepton_ai.job import Options
from lepton_ai.parcel import Blobs
from lepton_ai.terms import Terms

LIMIT = 1 << 24


def rows_of(arguments: Sequence[dict[str, Any]], terms: Terms | None = None) -> list[Any]:
    write = writer("a.b", terms or Terms(Options(priority=7, result="msgpack")), None, Blobs(0))
    return [write(job, row) for job, row in zip(ids(), arguments, strict=False)]


def told(message: bytes) -> tuple[tuple[str, ...], Options]:
    headers = wire.read_envelope(message).headers
    options = wire.read_options(headers)
    return bundle.ids_of(message, headers, options), options


def arguments_of(message: bytes) -> list[dict[str, Any]]:
    """What the kernel is called with, of each job of a message."""
    found = [wire.read_body(wire.read_envelope(each), limit_bytes=LIMIT).kwargs for each in bundle.singles(message)]
    return [{name: wire.decode_value(value) for name, value in each.items()} for each in found]


def equal(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other)) and np.asarray(one).dtype == np.asarray(other).dtype


numbers = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
arrays = st.integers(0, 3).map(lambda size: np.arange(size, dtype=np.float32))
arguments = st.fixed_dictionaries({"x": numbers, "a": arrays}, optional={"n": numbers})


@given(st.lists(arguments, max_size=40))
def test_jobs_come_out_of_their_messages_in_their_order_with_their_ids_and_arguments(found: list[Any]) -> None:
    rows = rows_of(found)
    messages = bundled(rows)
    assert [job for message, _ in messages for job in told(message)[0]] == [row.id for row in rows]
    assert [count for _, count in messages] == [len(told(message)[0]) for message, _ in messages]
    after = [each for message, _ in messages for each in arguments_of(message)]
    for one, other in zip(found, after, strict=True):
        assert one.keys() == other.keys()
        assert all(equal(one[name], other[name]) for name in one)


@given(st.lists(arguments, min_size=4, max_size=40), st.integers(1, 50))
def test_the_parts_of_a_bundle_are_together_what_it_was(found: list[Any], most: int) -> None:
    for message, count in bundled(rows_of(found)):
        if count == 1:
            continue
        parts = bundle.split(message, most)
        assert [len(told(part)[0]) for part in parts[:-1]] == [most] * (len(parts) - 1)
        assert tuple(job for part in parts for job in told(part)[0]) == told(message)[0]
        assert msgspec.json.encode(list(map(repr, (each for part in parts for each in arguments_of(part))))) == (
            msgspec.json.encode(list(map(repr, arguments_of(message))))
        )


def test_neighbours_that_are_alike_share_a_message() -> None:
    (message, count), *others = bundled(rows_of([{"x": float(at), "a": np.zeros(3)} for at in range(100)]))
    assert (count, others) == (100, [])
    options = told(message)[1]
    assert (options.bundle, options.priority, options.shapes) == (100, 7, {"x": 99.0, "a": [3]})


@pytest.mark.parametrize(
    "other",
    [{"x": 1.0, "a": np.zeros(4)}, {"x": 1.0}, {"x": [1.0], "a": np.zeros(3)}, {"x": 1.0, "b": np.zeros(3)}],
    ids=["another shape", "one argument less", "a list for a number", "another name"],
)
def test_what_is_not_alike_does_not_share_one(other: dict[str, Any]) -> None:
    like = {"x": 1.0, "a": np.zeros(3)}
    assert [count for _, count in bundled(rows_of([like] * 5 + [other] + [like] * 6))] == [5, 1, 6]


def test_a_bundle_is_no_larger_than_a_run_of_ids_or_its_bytes() -> None:
    assert [count for _, count in bundled(rows_of([{"x": 1}] * 300))] == [128, 128, 44]
    large = bundled(rows_of([{"a": np.zeros(8000, np.float32)}] * 10))
    assert [count for _, count in large] == [4, 4, 1, 1]


def test_a_few_jobs_are_sent_one_by_one() -> None:
    assert [count for _, count in bundled(rows_of([{"x": 1}] * 3))] == [1, 1, 1]


def test_a_job_that_was_split_off_is_a_message_as_if_it_had_been_alone() -> None:
    (message, _), *_ = bundled(rows_of([{"x": at, "a": np.full(2, at)} for at in range(5)]))
    part = wire.read_envelope(bundle.single(message, 3))
    options = wire.read_options(part.headers)
    assert (options.bundle, options.split, options.shapes) == (None, False, {"x": 3, "a": [2]})
    assert part.headers.kwargsrepr == "{x=3, a=[2]}"
    found = msgspec.json.decode(bundle.single(message, 3))
    assert found["properties"]["correlation_id"] == found["headers"]["root_id"] == part.headers.id
    assert found["properties"]["delivery_info"] == {"exchange": "", "routing_key": topology.LANE}


@pytest.mark.parametrize(
    "terms",
    [Terms(delay_s=1), Terms(deadline_s=9), Terms(Options(limit_s=1)), Terms(Options(shapes={"x": 1}))],
    ids=["delay", "deadline", "limit", "shapes"],
)
def test_jobs_with_a_time_of_their_own_travel_alone(terms: Terms) -> None:
    assert not any(isinstance(row, Row) for row in rows_of([{"x": 1}] * 9, terms))


def test_what_a_lane_holds_beyond_its_messages_is_counted_in_the_same_step() -> None:
    commands = push(rows_of([{"x": 1}] * 130), Terms(), "ann").commands
    assert [(name, *words[:2]) for name, *words in commands] == [
        ("SADD", "lepton:lanes", "lepton.ingest.ann"),
        ("LPUSH", "lepton.ingest.ann", commands[1][2]),
        ("HINCRBY", "lepton:bundled", "lepton.ingest.ann"),
    ]
    assert commands[2][3] == 127
    assert [name for name, *_ in push(rows_of([{"x": 1}]), Terms(), None).commands] == ["LPUSH"]


def changed(message: bytes, **options: Any) -> bytes:
    found = msgspec.json.decode(message)
    headers = {name: options.pop(name) for name in ("id", "eta", "expires", "retries") if name in options}
    found["headers"] |= headers
    found["headers"]["lepton"] |= options
    return msgspec.json.encode(found)


@pytest.mark.parametrize(
    "options",
    [
        {"bundle": 1},
        {"bundle": 257},
        {"bundle": 0},
        {"id": "job-1"},
        {"id": new_id()[:-3] + "fff"},
        {"eta": "2030-01-01T00:00:00"},
        {"expires": "2030-01-01T00:00:00"},
        {"retries": 1},
        {"limit_s": 1.0},
        {"blobs": ["ring:x"]},
        {"blobs": ["redis:0123456789abcdef:1"]},
    ],
    ids=str,
)
def test_what_cannot_be_a_bundle_is_refused(options: dict[str, Any]) -> None:
    (message, _), *_ = bundled(rows_of([{"x": 1}] * 4))
    with pytest.raises(OptionNotSupported):
        told(changed(message, **options))
    with pytest.raises(OptionNotSupported):
        bundle.split(changed(message, **options))


def test_a_bundle_with_the_arguments_of_another_number_of_jobs_is_malformed() -> None:
    (message, _), *_ = bundled(rows_of([{"x": 1}] * 4))
    forged = changed(message, bundle=5)
    envelope = wire.read_envelope(forged)
    with pytest.raises(Malformed, match="5 jobs has the arguments of 4"):
        bundle.read_rows(envelope, 5, limit_bytes=LIMIT)
    with pytest.raises(Malformed, match="5 jobs has the arguments of 4"):
        bundle.split(forged)


@given(st.binary(max_size=60), st.integers(-3, 300))
def test_no_body_raises_anything_but_our_errors(body: bytes, count: int) -> None:
    (message, _), *_ = bundled(rows_of([{"x": 1}] * 4))
    found = msgspec.json.decode(changed(message, bundle=count))
    found["body"] = body.decode("latin-1")
    try:
        bundle.singles(msgspec.json.encode(found))
    except LeptonError:
        return
    raise AssertionError("such bytes hold no jobs")


def test_a_single_message_is_its_own_only_one() -> None:
    ((message, _),) = bundled(rows_of([{"bundle": 3}]))
    assert bundle.may_be(message)  # it has an argument of that name
    assert bundle.singles(message) == [message]
