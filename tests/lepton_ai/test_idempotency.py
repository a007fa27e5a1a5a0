"""Keys and fingerprints, and one job a key through the client straight on a broker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import lepton_ai
from lepton_ai import AsyncClient, Client, results, tensor, topology, wire
from lepton_ai.errors import InvalidArguments, KeyConflict
from lepton_ai.idempotency import KEPT_S, fingerprint, job_id
from queues.connection import Connection

A = np.arange(6.0, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def client(broker_url: str) -> Iterator[Client]:
    with Client(broker_url) as client:
        yield client


def waiting(connection: Connection, lane: str = topology.LANE) -> list[str]:
    """The ids on a lane, oldest first."""
    return [wire.read_envelope(each).headers.id for each in connection.call("LRANGE", lane, 0, -1)[::-1]]


# -- ids --------------------------------------------------------------------------------------------------------------


def test_the_same_key_of_the_same_tenant_is_the_same_id_in_every_release() -> None:
    assert lepton_ai.job_id("order-17") == "9eb8507f-af43-55b0-8a09-daa720028560"
    assert job_id("order-17", "team-a") == job_id("order-17", "team-a") != job_id("order-17")


def test_a_tenant_and_a_key_do_not_run_together() -> None:
    assert job_id("b", "a") != job_id("ab") != job_id("a", "b")


@pytest.mark.parametrize("key", ["", "x" * 256, "\ud800"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidArguments) as raised:
        job_id(key)
    assert raised.value.field == "key"


@pytest.mark.parametrize("key", ["x", "x" * 255, "ключ 🔑", "a\x00b"])
def test_any_text_of_1_to_255_characters_is_a_key(key: str) -> None:
    assert len(job_id(key)) == 36


# -- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "same",
    [
        A.tolist(),
        [[0, 1, 2], [3, 4, 5]],
        A.astype(np.float64),
        A.astype(np.int8),
        A.astype(">f4"),
        np.asfortranarray(A),
        A[:, ::-1][:, ::-1],
        tensor.to_wire(A),
        msgspec.json.decode(msgspec.json.encode(tensor.to_wire(A)), type=tensor.TensorMap),
    ],
    ids=["lists", "integers", "float64", "int8", "big-endian", "fortran", "view", "tensor", "json-tensor"],
)
def test_the_same_values_are_the_same_job_in_whatever_form_they_come(same: Any) -> None:
    assert fingerprint("a.b", {"x": same}) == fingerprint("a.b", {"x": A})


@given(npst.arrays(npst.floating_dtypes(endianness="<", sizes=(16, 32, 64)), npst.array_shapes(min_dims=1)))
def test_an_array_is_the_same_job_as_its_nested_lists_and_its_tensor_map(array: Any) -> None:
    wanted = fingerprint("a.b", {"x": array})
    assert fingerprint("a.b", {"x": array.tolist()}) == wanted
    assert fingerprint("a.b", {"x": tensor.to_wire(array)}) == wanted


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_integers_are_the_same_as_lists_and_as_arrays(values: list[int]) -> None:
    assert fingerprint("a.b", {"x": values}) == fingerprint("a.b", {"x": np.array(values, np.int64)})


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (0.0, -0.0), (float("nan"), np.float32("nan")), (3, np.int8(3)), (2.5, np.array(2.5)), (True, np.True_)],
)
def test_numbers_are_the_same_however_they_are_written(one: Any, other: Any) -> None:
    assert fingerprint("a.b", {"x": one}) == fingerprint("a.b", {"x": other})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, [1]),
        ([1], [[1]]),
        ([1, 2], [2, 1]),
        ([1, 2, 3, 4], [[1, 2], [3, 4]]),
        (2**53 + 1, 2**53 + 2),
        (2**63 - 1, 2**63),
        (0.1, np.float32(0.1)),
        (np.zeros((0, 2)), np.zeros((2, 0))),
    ],
    ids=str,
)
def test_what_differs_in_values_kind_or_shape_is_another_job(one: Any, other: Any) -> None:
    assert fingerprint("a.b", {"x": one}) != fingerprint("a.b", {"x": other})


def test_the_kernel_the_names_and_the_device_are_part_of_it() -> None:
    found = {
        fingerprint("a.b", {"x": 1, "y": 2}),
        fingerprint("a.c", {"x": 1, "y": 2}),
        fingerprint("a.b", {"x": 2, "y": 1}),
        fingerprint("a.b", {"x": 1}),
        fingerprint("a.b", {"x": 1, "y": 2}, "cpu"),
        fingerprint("a.b", {"x": 1, "y": 2}, "gpu"),
    }
    assert len(found) == 6
    assert fingerprint("a.b", {"y": 2, "x": 1}) in found


@pytest.mark.parametrize("value", [[[1], [1, 2]], "text", [None], object(), 1j])
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidArguments) as raised:
        fingerprint("a.b", {"x": value})
    assert raised.value.field == "x"


# -- through the client -----------------------------------------------------------------------------------------------


def test_a_key_is_one_job_however_often_it_is_submitted(client: Client, connection: Connection) -> None:
    jobs = [client.submit("a.b", {"x": A}, key="k") for _ in range(3)]
    again = client.submit("a.b", {"x": A.tolist()}, key="k", priority=9, limit_s=3)
    assert {each.id for each in (*jobs, again)} == {job_id("k")}
    assert waiting(connection) == [job_id("k")]
    assert connection.call("GET", topology.key(job_id("k"))) == fingerprint("a.b", {"x": A})
    assert KEPT_S - 60 < connection.call("TTL", topology.key(job_id("k"))) <= KEPT_S


@pytest.mark.parametrize("other", [{"kernel": "a.c"}, {"arguments": {"x": 2}}, {"device": "gpu"}])
def test_a_key_of_another_job_is_refused_and_nothing_sent(
    client: Client, connection: Connection, other: dict[str, Any]
) -> None:
    given_ = {"kernel": "a.b", "arguments": {"x": 1}, "key": "k"}
    client.submit(**given_)
    with pytest.raises(KeyConflict, match="'k'"):
        client.submit(**given_ | other)
    assert len(waiting(connection)) == 1


def test_fifty_at_once_are_one_job(broker_url: str, connection: Connection) -> None:
    start = threading.Barrier(50)

    def submit(number: int) -> str:
        with Client(broker_url) as own:
            own.devices()  # the connection is there
            start.wait(60)
            return own.submit("a.b", {"x": 1}, key="k").id

    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(submit, range(50))) == {job_id("k")}
    assert waiting(connection) == [job_id("k")]


def test_fifty_at_once_with_two_meanings_are_one_job_and_conflicts(broker_url: str, connection: Connection) -> None:
    start = threading.Barrier(20)

    def submit(number: int) -> int | None:
        with Client(broker_url) as own:
            own.devices()
            start.wait(60)
            try:
                own.submit("a.b", {"x": number % 2}, key="k")
            except KeyConflict:
                return None
            return number % 2

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(submit, range(20)))
    assert len(waiting(connection)) == 1
    assert found.count(None) == 10
    assert len(set(found)) == 2


def test_many_keys_are_few_round_trips_and_what_is_there_already_is_not_sent(
    client: Client, connection: Connection
) -> None:
    rows = [{"x": at} for at in range(1000)]
    keys = [f"k{at}" for at in range(1000)]
    client.submit_many("a.b", rows[::2], keys=keys[::2])
    before = connection.call("INFO", "commandstats")
    jobs = client.submit_many("a.b", iter(rows), keys=keys)
    assert [job.id for job in jobs] == [job_id(key) for key in keys]
    assert sorted(waiting(connection)) == sorted(job.id for job in jobs)
    execs = count_of(connection.call("INFO", "commandstats"), "exec") - count_of(before, "exec")
    assert execs == 2


def count_of(stats: bytes, command: str) -> int:
    for line in stats.decode().splitlines():
        if line.startswith(f"cmdstat_{command}:"):
            return int(line.partition("calls=")[2].partition(",")[0])
    return 0


def test_rows_with_the_same_key_are_one_job(client: Client, connection: Connection) -> None:
    jobs = client.submit_many("a.b", [{"x": 1}, {"x": 2}, {"x": 1}], keys=["k", "l", "k"])
    assert [job.id for job in jobs] == [job_id("k"), job_id("l"), job_id("k")]
    assert waiting(connection) == [job_id("k"), job_id("l")]


def test_rows_that_differ_under_one_key_are_refused_and_nothing_sent(client: Client, connection: Connection) -> None:
    with pytest.raises(KeyConflict):
        client.submit_many("a.b", [{"x": 1}, {"x": 2}], keys=["k", "k"])
    assert connection.call("DBSIZE") == 0


@pytest.mark.parametrize("keys", [[], ["k"], ["k", "l", "m"], "kl"])
def test_keys_are_one_for_each_row(client: Client, connection: Connection, keys: Any) -> None:
    with pytest.raises(InvalidArguments) as raised:
        client.submit_many("a.b", [{"x": 1}, {"x": 2}], keys=keys)
    assert raised.value.field == "keys"
    assert connection.call("DBSIZE") == 0


def test_a_second_handle_of_a_key_has_the_result_too(client: Client, broker_url: str, connection: Connection) -> None:
    first = client.submit("a.b", {"x": 1}, key="k")
    second = client.submit("a.b", {"x": 1}, key="k")
    with Client(broker_url) as other:
        third = other.submit("a.b", {"x": 1}, key="k")
        envelope = wire.read_envelope(connection.call("RPOP", topology.LANE))
        record = results.encode(results.success(first.id, {"y": 2}, None), "msgpack")
        connection.call("SET", topology.result(first.id), record)
        connection.call("RPUSH", wire.read_options(envelope.headers).reply_to or "", record)
        assert [each.result(5) for each in (first, second, third)] == [{"y": 2}] * 3


def test_a_tenants_keys_are_its_own(broker_url: str, connection: Connection) -> None:
    with Client(broker_url, tenant="team-a") as ours, Client(broker_url, tenant="team-b") as theirs:
        assert ours.submit("a.b", {"x": 1}, key="k").id == job_id("k", "team-a")
        assert theirs.submit("a.b", {"x": 2}, key="k").id == job_id("k", "team-b")
    assert waiting(connection, topology.lane("team-a")) == [job_id("k", "team-a")]


def test_the_asynchronous_client_means_the_same_job(broker_url: str, client: Client, connection: Connection) -> None:
    async def submit() -> list[str]:
        async with AsyncClient(broker_url) as own:
            many = [own.submit("a.b", {"x": A}, key="k") for _ in range(20)]
            found = [job.id for job in await asyncio.gather(*many)]
            with pytest.raises(KeyConflict):
                await own.submit("a.c", {"x": A}, key="k")
            await own.submit_many("a.b", [{"x": 1}, {"x": 2}], keys=["l", "m"])
            return found

    assert {*asyncio.run(submit()), client.submit("a.b", {"x": A}, key="k").id} == {job_id("k")}
    assert waiting(connection) == [job_id("k"), job_id("l"), job_id("m")]


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_broken_connection_is_no_second_job(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The answer to the transaction is lost, before or after it was done."""
    import redis.client

    real: Callable[..., Any] = redis.client.Pipeline._execute_transaction
    broken = []

    def breaks(self: Any, conn: Any, commands: Any, raise_on_error: bool) -> Any:
        if not broken:
            broken.append(True)
            if lost == "after":
                real(self, conn, commands, raise_on_error)
                self.watching = True  # as it is until an answer has been read
            raise redis.ConnectionError("cut")
        return real(self, conn, commands, raise_on_error)

    monkeypatch.setattr(redis.client.Pipeline, "_execute_transaction", breaks)
    assert client.submit("a.b", {"x": 1}, key="k").id == job_id("k")
    assert waiting(connection) == [job_id("k")]
