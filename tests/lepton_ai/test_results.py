"""Result records, pinned to Celery 5.7's Redis backend in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lepton_ai import results, topology, wire
from lepton_ai.errors import InvalidArguments, JobCancelled, KernelFailed, LeptonError
from lepton_ai.job import Cost, Meta, Record
from lepton_ai.tensor import DTYPES
from queues.app import celery_addresses
from queues.connection import Connection

DEEP = 200_000
ID = "01990000-0000-7000-8000-000000000000"
HUGE = b"\xff\xff\xff\xff"
COST = Cost("worker", "cpu", 0.1, 0.2, 0.3, 4)


@pytest.fixture
def celery_app(broker_url: str) -> Iterator[Celery]:
    broker, backend = celery_addresses(broker_url)
    app = Celery("producer", broker=broker, backend=backend, set_as_current=False)
    app.conf.result_accept_content = ["json", "msgpack"]
    yield app
    app.close()


arrays = hnp.arrays(
    dtype=st.sampled_from([np.dtype(name) for name in DTYPES]),
    shape=hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
)
outputs = st.dictionaries(st.text(max_size=5), arrays | st.floats() | st.lists(st.floats(), max_size=3), max_size=3)


def same(found: Any, sent: Any) -> bool:
    """Equality for which NaN is NaN."""
    if isinstance(sent, np.ndarray):
        return (found.dtype, found.shape, found.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())
    if isinstance(sent, list):
        return len(found) == len(sent) and all(map(same, found, sent))
    return bool(found == sent or (found != found and sent != sent))


@given(outputs, st.sampled_from(["json", "msgpack"]))
def test_a_result_comes_back_as_it_went(sent: dict[str, Any], encoding: str) -> None:
    meta = results.success(ID, {name: wire.to_value(value) for name, value in sent.items()}, Record(cost=COST))
    found = results.read(results.encode(meta, encoding))
    assert found.result.keys() == sent.keys()
    assert all(same(found.result[name], value) for name, value in sent.items())
    assert (found.status, found.task_id, found.lepton) == ("SUCCESS", ID, Record(cost=COST))


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("error", [KernelFailed("ZeroDivisionError: by nought"), JobCancelled("revoked")])
def test_a_failure_comes_back_with_its_error(error: LeptonError, encoding: str) -> None:
    found = results.read(results.encode(results.failure(ID, error, "line 1"), encoding))
    assert found.status == ("REVOKED" if isinstance(error, JobCancelled) else "FAILURE")
    assert found.traceback == "line 1"
    assert found.lepton is not None
    assert found.lepton.error == error.to_wire()


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_a_failure_whose_text_is_no_text_can_be_stored(encoding: str) -> None:
    error = KernelFailed("no such file: \udcff")
    found = results.read(results.encode(results.failure(ID, error, "File '\udcff'"), encoding))
    assert found.result["exc_message"] == ["no such file: \\udcff"]


def store(connection: Connection, meta: Meta, encoding: str) -> None:
    connection.call("SET", topology.result(ID), results.encode(meta, encoding))


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_celerys_backend_reads_a_success(celery_app: Celery, connection: Connection, encoding: str) -> None:
    celery_app.conf.result_serializer = encoding
    store(connection, results.success(ID, {"c": [[1.0]]}, Record(cost=COST)), encoding)
    result = celery_app.AsyncResult(ID)
    assert (result.get(timeout=5), result.state) == ({"c": [[1.0]]}, "SUCCESS")


def test_celerys_backend_reads_non_finite_numbers_in_json(celery_app: Celery, connection: Connection) -> None:
    store(connection, results.success(ID, {"c": [float("nan"), float("-inf")]}, None), "json")
    nan, infinity = celery_app.AsyncResult(ID).get(timeout=5)["c"]
    assert nan != nan
    assert infinity == float("-inf")


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("error", [KernelFailed("it broke"), InvalidArguments("argument 'b' is missing", "b")])
def test_celerys_get_raises_our_own_class(
    celery_app: Celery, connection: Connection, error: LeptonError, encoding: str
) -> None:
    celery_app.conf.result_serializer = encoding
    store(connection, results.failure(ID, error, "line 1"), encoding)
    result = celery_app.AsyncResult(ID)
    with pytest.raises(type(error), match=str(error)):
        result.get(timeout=5)
    assert (result.state, result.traceback) == ("FAILURE", "line 1")


def test_celerys_get_raises_its_own_class_for_a_cancelled_job(celery_app: Celery, connection: Connection) -> None:
    store(connection, results.failure(ID, JobCancelled("revoked")), "json")
    with pytest.raises(TaskRevokedError):
        celery_app.AsyncResult(ID).get(timeout=5)


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize(("state", "value"), [("STARTED", {"pid": 1}), ("FAILURE", ValueError("no"))])
def test_a_record_that_celery_wrote_is_read(
    celery_app: Celery, connection: Connection, state: str, value: Any, encoding: str
) -> None:
    celery_app.conf.result_serializer = encoding
    celery_app.backend.store_result(ID, value, state)
    found = results.read(connection.call("GET", topology.result(ID)))
    assert (found.status, found.task_id) == (state, ID)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"\xc1",
        b'{"status": 1}',
        b'{"status":"SUCCESS","result":{"c":{"dtype":1,"shape":[],"data":""}}}',
        b'{"status":"SUCCESS","result":{"c":{"dtype":"<f4","shape":[],"data":"!"}}}',
        b'{"status":"SUCCESS","result":{"c":{"dtype":"<f4","shape":[9],"data":""}}}',
        b'{"status":"SUCCESS","result":' + b"[" * DEEP,
        b"\x81\xa6result" + b"\x91" * DEEP,
        b"\x81\xa6result\xdd" + HUGE,
    ],
    ids=["empty", "cut", "list", "no msgpack", "status", "dtype", "base64", "size", "deep json", "deep", "huge"],
)
def test_a_record_that_is_none_raises_our_error(raw: bytes) -> None:
    with pytest.raises(LeptonError):
        results.read(raw)


RECORDS = [None, Record(), Record(cost=COST), Record(error={"code": "internal"})]


@given(outputs, st.sampled_from(RECORDS), st.sampled_from(["json", "msgpack"]))
def test_a_reply_says_the_same_as_the_record_that_is_stored(
    sent: dict[str, Any], record: Record | None, encoding: str
) -> None:
    values = {name: wire.to_value(value) for name, value in sent.items()}
    raw = results.encode(results.success(ID, values, record), encoding)
    stored, reply = results.read(raw), results.reply(raw)
    assert all(same(reply.result[name], value) for name, value in sent.items())
    assert (reply.status, reply.task_id, reply.record) == (stored.status, stored.task_id, record)


@pytest.mark.parametrize("raw", [b'{"status":"SUCCESS"}', b"\x81\xa6status\xa7SUCCESS"], ids=["json", "msgpack"])
def test_a_reply_of_a_program_that_has_never_heard_of_us_has_no_record(raw: bytes) -> None:
    assert results.reply(raw).record is None


def test_a_reply_whose_own_part_cannot_be_read_has_its_result_all_the_same() -> None:
    reply = results.reply(msgspec.msgpack.encode({"status": "SUCCESS", "result": {"c": 1}, "lepton": {"cost": []}}))
    assert reply.result == {"c": 1}
    with pytest.raises(InvalidArguments):
        _ = reply.record


@given(st.binary(max_size=200))
def test_bytes_that_are_no_record_raise_nothing_but_our_errors(raw: bytes) -> None:
    try:
        found = results.read(raw)
    except LeptonError:
        return
    assert isinstance(found, Meta)
