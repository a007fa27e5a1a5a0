"""Which arrays leave their message, where they go, and when a client's shared memory is free again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import redis

from lepton_ai import AsyncClient, Client, blob, bundle, results, topology, wire
from lepton_ai.blob import WORTH_BYTES
from lepton_ai.device import Announcement, Peaks
from lepton_ai.direct_protocol import push, writer
from lepton_ai.errors import InvalidArguments, KeyConflict, OptionNotSupported
from lepton_ai.identity import ids, new_id
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.parcel import Blobs, has_blobs, shared
from lepton_ai.ring import FOLDER, RingReader, memory
from lepton_ai.terms import Terms
from queues.broker import Broker
from queues.connection import Connection

MIB = 1 << 20
SPEC = KernelSpec("a.b", {"x": "float32[n]"}, {"y": "float32[n]"}, "n", "n")
HERE = memory()

in_memory = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")


def announced(device: str = "cpu", where: str | None = HERE, kernel: str = "a.b") -> Announcement:
    spec = msgspec.structs.replace(SPEC, name=kernel)
    peaks = Peaks(1.0, 1.0, 1.0, 0.0, 0.0)
    return Announcement(device, device, device, device.partition(".")[0], 1, False, peaks, (spec,), 0.0, where)


def numbers(count: int = WORTH_BYTES // 4 + 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).random(count, np.float32)


@pytest.fixture
def blobs() -> Iterator[Blobs]:
    found = Blobs(32 * MIB)
    found.learn([announced()])
    yield found
    emptied(found)


def emptied(blobs: Blobs) -> None:
    """Closes them, and leaves no memory for open jobs."""
    for job in blobs._opened().jobs:
        blobs.free(job)
    blobs.close()


def places(message: bytes) -> list[str]:
    """The kinds of place that a message names, in its header and in its body alike."""
    envelope = wire.read_envelope(message)
    told = wire.read_options(envelope.headers).blobs or ()
    values = wire.read_body(envelope, limit_bytes=MIB).kwargs.values()
    assert list(told) == [each.blob for each in values if getattr(each, "blob", None) is not None]
    return [each.partition(":")[0] for each in told]


def written(blobs: Blobs, row: dict[str, Any], terms: Terms | None = None, **more: Any) -> Any:
    return writer("a.b", terms or Terms(), None, blobs, **more)(new_id(), row)


def message_of(found: Any) -> bytes:
    """What is put on the lane for one job."""
    *_, (_, _, message) = push([found], Terms(), None).commands
    return bytes(message)


def test_small_arrays_stay_in_their_message(blobs: Blobs) -> None:
    row = written(blobs, {"x": numbers(WORTH_BYTES // 4), "n": 3})
    ((_, *messages),) = push([row], Terms(), None).commands
    assert places(messages[-1]) == []


@in_memory
def test_large_ones_leave_it_for_memory_that_every_worker_shares(blobs: Blobs) -> None:
    found = written(blobs, {"x": numbers(), "y": numbers(10), "z": numbers()})
    message = message_of(found)
    assert places(message) == ["ring", "ring"]
    assert wire.read_options(wire.read_envelope(message).headers).shapes == {"x": [8193], "y": [10], "z": [8193]}


@pytest.mark.parametrize(
    ("announcements", "terms"),
    [
        ([], Terms()),
        ([announced(where=None)], Terms()),
        ([announced(), announced("cpu.far", "0" * 32)], Terms()),
        ([announced(kernel="c.d")], Terms()),
        ([announced()], Terms(delay_s=5)),
        ([announced("gpu")], Terms(Options(device="cpu"))),
    ],
    ids=["nobody", "without", "elsewhere", "another kernel", "delayed", "another device"],
)
def test_else_they_go_to_the_broker(announcements: list[Announcement], terms: Terms) -> None:
    blobs = Blobs(32 * MIB)
    blobs.learn(announcements)
    assert places(written(blobs, {"x": numbers()}, terms).message) == ["redis"]
    emptied(blobs)


@in_memory
def test_jobs_whose_arrays_are_in_memory_share_a_message_that_names_all_of_them(blobs: Blobs) -> None:
    write = writer("a.b", Terms(), None, blobs)
    rows = [write(job, {"x": numbers(), "n": at}) for at, job in zip(range(6), ids(), strict=False)]
    (_, _, message), *more = push(rows, Terms(), None).commands
    envelope = wire.read_envelope(message)
    options = wire.read_options(envelope.headers)
    bodies = bundle.read_rows(envelope, 6, limit_bytes=MIB)
    assert (options.bundle, options.shapes) == (6, {"x": [8193], "n": 5})
    assert list(options.blobs or ()) == [each.kwargs["x"].blob for each in bodies]  # type: ignore[union-attr]
    assert [each[0] for each in more] == ["HINCRBY"]
    for each in bundle.singles(message):
        assert places(each) == ["ring"]
    assert [
        len(wire.read_options(wire.read_envelope(each).headers).blobs or ()) for each in bundle.split(message, 4)
    ] == [4, 2]


@in_memory
def test_a_bundle_has_no_more_blobs_than_a_message_may_have(blobs: Blobs) -> None:
    write, array = writer("a.b", Terms(), None, blobs), numbers()
    rows = [write(job, {"x": array, "y": array}) for _, job in zip(range(40), ids(), strict=False)]
    messages = push(rows, Terms(), None).commands[0][2:]
    assert [wire.read_options(wire.read_envelope(each).headers).bundle for each in messages] == [32, 8]


@in_memory
def test_where_the_ring_is_full_the_others_go_to_the_broker_one_by_one() -> None:
    blobs = Blobs(16 * MIB)
    blobs.learn([announced()])
    write, large = writer("a.b", Terms(), None, blobs), numbers(MIB // 2)
    rows = [write(job, {"x": large}) for _, job in zip(range(9), ids(), strict=False)]
    *_, (_, _, *messages), _ = push(rows, Terms(), None).commands
    assert [wire.read_options(wire.read_envelope(each).headers).bundle for each in messages] == [7, None, None]
    assert [places(each) for each in messages[1:]] == [["redis"]] * 2
    emptied(blobs)


@in_memory
def test_it_is_asked_who_shares_our_memory_when_that_is_not_known() -> None:
    blobs = Blobs(32 * MIB)
    asked: list[bool] = []

    def prepare() -> None:
        asked.append(blobs.is_stale())
        blobs.learn([announced()])

    write = writer("a.b", Terms(), None, blobs, prepare)
    assert not has_blobs(write(new_id(), {"x": numbers(10)}))
    assert asked == []
    found = write(new_id(), {"x": numbers()})
    assert has_blobs(found)
    assert (places(message_of(found)), asked) == (["ring"], [True])
    emptied(blobs)


def test_a_client_without_a_ring_asks_nobody() -> None:
    blobs = Blobs(0)
    assert not blobs.is_stale()
    assert places(written(blobs, {"x": numbers()}).message) == ["redis"]
    assert not blobs.full


def test_what_its_caller_writes_to_an_array_afterwards_is_not_sent() -> None:
    array = numbers()
    blobs = Blobs(0)
    found = written(blobs, {"x": array})
    expected = array.tobytes()
    array[:] = 0
    assert b"".join(bytes(each[2]) for each in found.writes) == expected


@in_memory
def test_a_row_that_cannot_be_sent_leaves_nothing_in_the_ring(blobs: Blobs) -> None:
    for wrong, error in (({"y": object()}, InvalidArguments), ({"y": np.zeros(9000, complex)}, InvalidArguments)):
        with pytest.raises(error):
            written(blobs, {"x": numbers(), **wrong})
    assert blobs._opened().jobs == []


def test_a_job_has_so_many_blobs_and_no_more() -> None:
    blobs = Blobs(0)
    array = numbers()
    with pytest.raises(OptionNotSupported, match="64 blobs"):
        written(blobs, {f"x{n}": array for n in range(65)})


@pytest.mark.parametrize("wrong", ["odd", "redis:0:1", "ring:a:b:0:1", f"redis:{'0' * 16}:65537"])
def test_a_header_that_names_no_place_is_refused(wrong: str) -> None:
    with pytest.raises(OptionNotSupported):
        Options(blobs=(wrong,)).checked()


@in_memory
def test_it_is_full_while_there_is_no_room_for_one_more() -> None:
    blobs = Blobs(16 * MIB)
    blobs.learn([announced()])
    large = numbers(3 * MIB // 2)
    write = writer("a.b", Terms(), None, blobs)
    jobs = [new_id() for _ in range(3)]
    found = [places(message_of(write(job, {"x": large}))) for job in jobs[:2]]
    assert (found, blobs.full) == ([["ring"], ["ring"]], True)
    assert places(write(jobs[2], {"x": large}).message) == ["redis"]  # type: ignore[union-attr]
    blobs.free(jobs[0])
    assert not blobs.full
    emptied(blobs)


@in_memory
def test_whose_jobs_ended_unseen_make_room(connection: Connection) -> None:
    blobs = Blobs(16 * MIB)
    blobs.learn([announced()])
    write = writer("a.b", Terms(), None, blobs)
    large = numbers(3 * MIB // 2)
    ended, retried = new_id(), new_id()
    for job in (ended, retried):
        write(job, {"x": large})
    assert blobs.full
    success = results.success(ended, {}, None)
    connection.call("SET", topology.result(ended), results.encode(success, "msgpack"))
    retrying = results.retrying(retried, InvalidArguments("SUCCESS"), None)
    connection.call("SET", topology.result(retried), results.encode(retrying, "msgpack"))
    commands = blobs.doubtful()
    blobs.answered(commands, connection.many(commands))
    assert blobs._opened().jobs == [retried]
    assert blobs.doubtful() == []
    emptied(blobs)


def test_all_that_may_run_a_job_must_share_the_memory() -> None:
    one, other = announced("cpu.a", "1"), announced("gpu.b", "2")
    assert shared([one], "a.b", None, "1")
    assert not shared([one, other], "a.b", None, "1")
    assert shared([one, other], "a.b", "cpu", "1")
    assert shared([one, other], "a.b", "cpu.a", "1")
    assert not shared([one], "a.b", None, None)


def test_a_parcels_writes_go_before_and_its_keys_are_kept_with_the_push() -> None:
    blobs = Blobs(0)
    found = written(blobs, {"x": numbers(2 * MIB)})
    writes, commands, kept = push([b"small", found], Terms(), None)
    assert [len(each) for each in writes] == [8] * 4
    assert [each[0] for each in commands] == ["PERSIST"] * 32 + ["EXISTS", "LPUSH"]
    assert (kept, commands[-1][2:]) == (33, (b"small", found.message))
    assert len(found) > 8 * MIB


# -- clients ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(broker_url: str) -> Iterator[Client]:
    with Client(broker_url) as client:
        yield client
        emptied(client._connection._blobs)  # type: ignore[attr-defined]


def lane(connection: Connection) -> list[bytes]:
    found: list[bytes] = connection.call("LRANGE", topology.LANE, 0, -1)
    return [each for message in found[::-1] for each in bundle.singles(message)]


def test_what_is_submitted_is_in_the_broker_for_as_long_as_the_job_is_open(
    client: Client, connection: Connection
) -> None:
    client.submit("a.b", {"x": numbers(MIB)})
    keys = connection.call("KEYS", "lepton-blob:*")
    assert len(keys) == 16
    assert {connection.call("TTL", key) for key in keys} == {-1}
    assert [places(each) for each in lane(connection)] == [["redis"]]


def test_a_key_writes_its_blob_once_and_still_tells_other_arguments_apart(
    client: Client, connection: Connection
) -> None:
    array = numbers(MIB // 8)
    jobs = {client.submit("a.b", {"x": array}, key="one").id for _ in range(3)}
    assert (len(jobs), len(lane(connection)), len(connection.call("KEYS", "lepton-blob:*"))) == (1, 1, 2)
    with pytest.raises(KeyConflict):
        client.submit("a.b", {"x": array + 1}, key="one")


def test_a_job_whose_blobs_were_gone_before_it_was_published_was_not_accepted(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob, "WRITTEN_S", 1)
    written: Any = blob.write_commands
    monkeypatch.setattr(blob, "write_commands", lambda array, job: written(array, job, 1))
    line: Any = client._connection._line  # type: ignore[attr-defined]
    transact = line.transact

    def slow(commands: Any) -> Any:
        until = time.monotonic() + 5
        while connection.call("KEYS", "lepton-blob:*") and time.monotonic() < until:
            time.sleep(0.05)
        return transact(commands)

    monkeypatch.setattr(line, "transact", slow)
    with pytest.raises(blob.BlobLost):
        client.submit("a.b", {"x": numbers()})


@in_memory
def test_the_result_makes_room_in_the_ring(client: Client, broker: Broker, connection: Connection) -> None:
    broker.announce(msgspec.msgpack.encode(announced()))
    jobs = client.submit_many("a.b", [{"x": numbers()}, {"x": numbers()}])
    ring = client._connection._blobs._opened()  # type: ignore[attr-defined]
    assert ([places(each) for each in lane(connection)], ring.jobs) == ([["ring"]] * 2, [each.id for each in jobs])
    reply = wire.read_options(wire.read_envelope(lane(connection)[0]).headers).reply_to
    for job in jobs:
        record = results.encode(results.success(job.id, {"y": 1.0}, None), "msgpack")
        connection.many([("SET", topology.result(job.id), record), ("RPUSH", reply or "", record)])
        assert job.result(timeout=5) == {"y": 1.0}
    assert ring.jobs == []


@in_memory
def test_a_client_leaves_no_memory_behind_but_for_open_jobs(
    broker_url: str, broker: Broker, connection: Connection
) -> None:
    broker.announce(msgspec.msgpack.encode(announced()))

    def segments() -> set[str]:
        return {path.name for path in FOLDER.glob("lepton-*") if "memory" not in path.name}

    before = segments()
    with Client(broker_url) as client:
        job = client.submit("a.b", {"x": numbers()})
        (made,) = segments() - before
        connection.call("SET", topology.result(job.id), results.encode(results.success(job.id, {}, None), "msgpack"))
        client.job(job.id).result(timeout=5)
    assert segments() <= before
    with Client(broker_url) as client:
        client.submit("a.b", {"x": numbers()})
    (left,) = segments() - before
    assert left != made
    (body,) = (wire.read_body(wire.read_envelope(lane(connection)[-1]), limit_bytes=MIB).kwargs.values(),)
    (value,) = body
    assert isinstance(value, wire.tensor.TensorMap)
    reference = blob.Reference(value.dtype, tuple(value.shape), str(value.blob))
    assert np.array_equal(RingReader().get(reference, MIB), numbers())
    (FOLDER / left).unlink()


def spoilt() -> Iterator[dict[str, Any]]:
    """Rows of which the third cannot be had."""
    yield {"x": numbers()}
    yield {"x": numbers()}
    raise ZeroDivisionError


@in_memory
@pytest.mark.parametrize("verb", ["submit_many", "map"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_rows_that_were_never_sent_take_no_memory(
    broker_url: str, broker: Broker, connection: Connection, verb: str, is_async: bool
) -> None:
    broker.announce(msgspec.msgpack.encode(announced()))

    async def drive(client: AsyncClient) -> None:
        await client.submit("a.b", {"x": numbers()})  # who shares our memory is known from here on
        if verb == "submit_many":
            await client.submit_many("a.b", spoilt())
        else:
            async for _ in client.map("a.b", spoilt()):
                pass

    async def main() -> list[str]:
        async with AsyncClient(broker_url) as client:
            with pytest.raises(ZeroDivisionError):
                await drive(client)
            found: Any = client._connection
            open_jobs: list[str] = found._blobs._opened().jobs
            emptied(found._blobs)
            return open_jobs

    if is_async:
        left = asyncio.run(main())
    else:
        with Client(broker_url) as client:
            with pytest.raises(ZeroDivisionError):
                list(getattr(client, verb)("a.b", spoilt()))
            left = client._connection._blobs._opened().jobs  # type: ignore[attr-defined]
            emptied(client._connection._blobs)  # type: ignore[attr-defined]
    sent = [wire.read_envelope(each) for each in lane(connection)]
    in_ring = {each.headers.id for each in sent if b"ring:" in bytes(each.headers.lepton)}
    assert set(left) <= in_ring


def test_over_a_full_broker_nothing_is_published(client: Client, connection: Connection, broker_url: str) -> None:
    connection.call("CONFIG", "SET", "maxmemory", "1mb")
    try:
        with pytest.raises(Exception, match="refuses"):
            client.submit("a.b", {"x": numbers(MIB)})
        assert lane(connection) == []
    finally:
        connection.call("CONFIG", "SET", "maxmemory", "0")
    with redis.Redis.from_url(broker_url) as plain:
        assert all(plain.ttl(key) > 0 for key in plain.scan_iter("lepton-blob:*"))
