"""Jobs whose arrays are outside their messages, on a worker: what its kernel gets, and what becomes of the blobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_ai import blob, results, store, topology, wire
from lepton_ai.blob import WORTH_BYTES, Reference
from lepton_ai.bundle import Row
from lepton_ai.device import Announcement, Peaks
from lepton_ai.direct_protocol import push, writer
from lepton_ai.errors import InvalidArguments
from lepton_ai.identity import new_id, new_ids
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec, Retry
from lepton_ai.parcel import Blobs, Parcel, pack
from lepton_ai.ring import FOLDER, RingReader
from lepton_ai.terms import Terms
from tests.tasks.workshop import DEVICE, SETTINGS, MakeWorker, Worker, until

in_memory = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")
WAYS = ["redis", pytest.param("ring", marks=in_memory)]


@pytest.fixture
def blobs() -> Iterator[Blobs]:
    """A client's, who knows of one worker with the test's kernels, on this host."""
    found = Blobs(1 << 24)
    names = ("test.double", "test.gated", "test.joined", "test.tries")
    specs = tuple(KernelSpec(name, {"x": "float64[n]"}, {"y": "float64[n]"}, "n", "n") for name in names)
    peaks = Peaks(1.0, 1.0, 1.0, 0.0, 0.0)
    found.learn([Announcement("w", "w", DEVICE, "cpu", 1, False, peaks, specs, 0.0, RingReader().memory)])
    yield found
    for job in found._opened().jobs:  # or its memory would stay for them
        found.free(job)
    found.close()


def numbers(count: int = WORTH_BYTES // 8 + 1, start: float = 1.0) -> np.ndarray[Any, Any]:
    return np.arange(count) + (start + 0.5)  # whole numbers would mean something to the kernels


def parcel(blobs: Blobs, way: str, array: np.ndarray[Any, Any], kernel: str = "test.double", **options: Any) -> Any:
    """A job's id, and its parcel."""
    job = new_id()
    template = wire.Template(kernel, Options(**options), topology.LANE, WORTH_BYTES)
    found = pack(template, job, {"x": array}, {}, blobs, (kernel, None) if way == "ring" else None)
    assert bool(found.names) == (way == "redis")
    return job, found


def publish(worker: Worker, *parcels: Parcel) -> None:
    """All to the device, in one push."""
    for each in parcels:
        worker.connection.many([(*write[:2], bytes(write[2]), *write[3:]) for write in each.writes])
    names = [name for each in parcels for name in each.names]
    if names:
        blob.require_published(worker.connection.many(blob.publish_commands(names)))
    worker.push(*(each.message for each in parcels))


def lasts_s(worker: Worker, each: Parcel) -> set[int]:
    """The seconds that a parcel's blobs have left; -1 for ever, -2 where they are gone."""
    return {worker.connection.call("TTL", name) for name in each.names}


@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_gets_the_array_and_the_broker_keeps_nothing(worker: Worker, blobs: Blobs, way: str) -> None:
    job, sent = parcel(blobs, way, numbers())
    publish(worker, sent)
    assert np.array_equal(worker.double(job), 2 * numbers())
    assert lasts_s(worker, sent) <= {-2}
    assert len(sent.message) < 2000


def stored(reference: Reference, kernel: str = "test.double") -> tuple[str, Row]:
    """A job whose array is on a store, as a client writes it."""
    job = new_id()
    message = writer(kernel, Terms(), None, Blobs(0))(job, {"x": reference})
    assert isinstance(message, Row)
    return job, message


def send(worker: Worker, *rows: Row) -> None:
    for each in rows:
        _, _, message = push([each], Terms(), None).commands[-1]
        worker.push(message)


def test_arrays_on_a_store_are_read_where_the_worker_may(make_worker: MakeWorker, tmp_path: Path) -> None:
    worker = make_worker(settings=type(SETTINGS)(lease_s=60, heartbeat_s=30, stores=f"s3://other,file://{tmp_path}/a"))
    for folder in ("a", "ab"):
        (tmp_path / folder).mkdir()
    there = [stored(store.put(numbers(5, start=n), f"file://{tmp_path}/a/{n}.npy")) for n in range(3)]
    gone = stored(Reference("<f8", (5,), f"file://{tmp_path}/a/none.npy"))
    other = stored(store.put(numbers(5), f"file://{tmp_path}/ab/0.npy"))
    send(worker, *(message for _, message in (*there, gone, other)))
    for n, (job, _) in enumerate(there):
        assert np.array_equal(worker.double(job), 2 * numbers(5, start=n))
    assert worker.failure(gone[0])[:2] == ("FAILURE", "BlobLost")
    assert worker.failure(other[0])[:2] == ("FAILURE", "InvalidArguments")
    assert (tmp_path / "a" / "0.npy").exists()


def test_a_worker_that_was_told_of_no_store_reads_from_none(worker: Worker, tmp_path: Path) -> None:
    job, message = stored(store.put(numbers(5), f"file://{tmp_path}/a.npy"))
    send(worker, message)
    assert worker.failure(job)[:2] == ("FAILURE", "InvalidArguments")


def test_whatever_reading_a_store_raises_its_jobs_fail_and_the_slot_goes_on(
    make_worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(settings=type(SETTINGS)(lease_s=60, heartbeat_s=30, stores=f"file://{tmp_path}"))
    job, message = stored(store.put(numbers(5), f"file://{tmp_path}/a.npy"))
    with monkeypatch.context() as patched:
        patched.setattr(store, "read", lambda *_: {}["a store's library"])
        send(worker, message)
        assert worker.failure(job)[:2] == ("FAILURE", "BlobLost")
    again, message = stored(store.find(f"file://{tmp_path}/a.npy"))
    send(worker, message)
    assert np.array_equal(worker.double(again), 2 * numbers(5))


def test_a_reference_to_another_jobs_blob_is_not_sent() -> None:
    with pytest.raises(InvalidArguments, match="not on a store"):
        stored(Reference("<f8", (5,), "redis:0123456789abcdef:1"))


@pytest.mark.parametrize("way", WAYS)
def test_jobs_of_one_launch_may_have_their_arrays_anywhere(worker: Worker, blobs: Blobs, way: str) -> None:
    worker.warm_up()
    gate = worker.send(0.0, kernel="test.gated")
    worker.enters()
    jobs = [parcel(blobs, way, numbers(start=n)) for n in range(3)]
    (plain,) = worker.send(7.0)
    publish(worker, *(each for _, each in jobs))
    worker.shop.gate.set()
    worker.meta(gate[0])
    for n, (job, _) in enumerate(jobs):
        assert np.array_equal(worker.double(job), 2 * numbers(start=n))
    assert worker.double(plain) == [14.0]
    assert WORTH_BYTES // 8 * 3 + 4 in worker.shop.launches


def test_a_launch_has_no_more_outside_its_messages_than_a_batch_may(make_worker: MakeWorker, blobs: Blobs) -> None:
    worker = make_worker(settings=type(SETTINGS)(lease_s=60, heartbeat_s=30, batch_s=1e6, batch_bytes=100_000))
    worker.warm_up()
    gate = worker.send(0.0, kernel="test.gated")
    worker.enters()
    jobs = [parcel(blobs, "redis", numbers(5000)) for _ in range(5)]
    publish(worker, *(each for _, each in jobs))
    worker.shop.gate.set()
    worker.meta(gate[0])
    for job, _ in jobs:
        worker.double(job)
    assert max(worker.shop.launches) == 10_000  # two of 40,000 bytes each


@pytest.mark.parametrize("way", WAYS)
def test_a_job_whose_array_is_gone_fails_alone(worker: Worker, blobs: Blobs, way: str) -> None:
    worker.warm_up()
    gate = worker.send(0.0, kernel="test.gated")
    worker.enters()
    (gone, lost), (kept, sent) = (parcel(blobs, way, numbers()) for _ in range(2))
    publish(worker, lost, sent)
    blobs.free(gone)
    if lost.names:
        worker.connection.call("DEL", *lost.names)
    worker.shop.gate.set()
    worker.meta(gate[0])
    assert np.array_equal(worker.double(kept), 2 * numbers())
    assert worker.failure(gone)[:2] == ("FAILURE", "BlobLost")
    assert lasts_s(worker, lost) <= {-2}


def bundled(worker: Worker, blobs: Blobs, count: int, kernel: str = "test.double") -> list[str]:
    """Jobs in one message, sent to the device, and their arrays in the ring."""
    write = writer(kernel, Terms(), None, blobs)
    jobs = new_ids(count)
    (_, _, message), _ = push(
        [write(job, {"x": numbers(start=n)}) for n, job in enumerate(jobs)], Terms(), None
    ).commands
    worker.push(message)
    return jobs


@in_memory
def test_the_jobs_of_a_bundle_have_their_arrays_and_one_whose_is_gone_fails_alone(worker: Worker, blobs: Blobs) -> None:
    worker.warm_up()
    gate = worker.send(0.0, kernel="test.gated")
    worker.enters()
    jobs = bundled(worker, blobs, 5)
    blobs.free(jobs[3])
    worker.shop.gate.set()
    worker.meta(gate[0])
    assert worker.failure(jobs[3])[:2] == ("FAILURE", "BlobLost")
    for n in (0, 1, 2, 4):
        assert np.array_equal(worker.double(jobs[n]), 2 * numbers(start=n))


@in_memory
def test_a_job_of_a_bundle_that_is_tried_again_has_its_own_array(worker: Worker, blobs: Blobs) -> None:
    worker.shop.policy(Retry(times=2, delay_s=60.0))
    worker.shop.raising = [ValueError("once")]
    jobs = bundled(worker, blobs, 4, "test.tries")
    until(lambda: worker.counters().get("succeeded") == 3, "the others do not end")
    (message,) = worker.connection.call("HVALS", topology.ETA_MESSAGES)
    assert len(wire.read_options(wire.read_envelope(message).headers).blobs or ()) == 1
    worker.push(message)
    until(lambda: worker.counters().get("succeeded") == 4, "it does not end")
    found = [results.read(worker.connection.call("GET", topology.result(job))).result["y"] for job in jobs]
    assert all(np.array_equal(each, 2 * numbers(start=n)) for n, each in enumerate(found))


@in_memory
def test_what_was_made_of_memory_that_became_anothers_meanwhile_is_void(worker: Worker, blobs: Blobs) -> None:
    job, sent = parcel(blobs, "ring", numbers(), "test.gated")
    publish(worker, sent)
    worker.enters()
    blobs.free(job)
    worker.shop.gate.set()
    assert worker.failure(job)[:2] == ("FAILURE", "BlobLost")


def test_a_key_that_holds_something_else_is_a_blob_that_is_gone(worker: Worker, blobs: Blobs) -> None:
    job, sent = parcel(blobs, "redis", numbers())
    worker.connection.call("RPUSH", sent.names[0], "something else")
    worker.push(sent.message)
    assert worker.failure(job)[:2] == ("FAILURE", "BlobLost")


def test_a_blob_that_the_header_does_not_name_is_refused(worker: Worker, blobs: Blobs) -> None:
    _, sent = parcel(blobs, "redis", numbers())
    envelope = wire.read_envelope(sent.message)
    other = new_id()
    arguments = wire.read_body(envelope, limit_bytes=10_000).kwargs
    worker.push(wire.envelope(other, "test.double", arguments, Options()))
    assert worker.failure(other)[:2] == ("FAILURE", "InvalidArguments")


@pytest.mark.parametrize("way", WAYS)
def test_an_array_of_another_dtype_is_refused_before_it_is_read(worker: Worker, blobs: Blobs, way: str) -> None:
    job, sent = parcel(blobs, way, numbers().astype(np.int64))
    publish(worker, sent)
    status, name, told = worker.failure(job)
    assert (status, name, "float64[n]" in told) == ("FAILURE", "InvalidArguments", True)
    assert lasts_s(worker, sent) <= {-2}


def test_a_job_that_is_tried_again_keeps_its_blobs(worker: Worker, blobs: Blobs) -> None:
    worker.shop.policy(Retry(times=2, delay_s=60.0))
    worker.shop.raising = [ValueError("once")]
    job, sent = parcel(blobs, "redis", numbers(), "test.tries")
    publish(worker, sent)
    until(lambda: worker.counters().get("retried"), "it is not tried again")
    assert lasts_s(worker, sent) == {-1}
    (message,) = worker.connection.call("HVALS", topology.ETA_MESSAGES)
    worker.push(message)
    until(lambda: worker.counters().get("succeeded"), "it does not end")
    assert np.array_equal(results.read(worker.connection.call("GET", topology.result(job))).result["y"], 2 * numbers())
    assert lasts_s(worker, sent) == {-2}


def test_a_dead_letters_blobs_last_as_long_as_it_can_be_replayed(worker: Worker, blobs: Blobs) -> None:
    worker.shop.policy(Retry(times=0))
    worker.shop.raising = [ValueError("always")]
    job, sent = parcel(blobs, "redis", numbers(), "test.tries")
    publish(worker, sent)
    assert worker.failure(job)[0] == "FAILURE"
    (left_s,) = lasts_s(worker, sent)
    assert blob.LETTER_S - 60 < left_s <= blob.LETTER_S
    publish(worker, sent)  # its message once more: then it is a duplicate's, whose blobs may be the letter's
    until(lambda: worker.counters().get("duplicate"), "it does not end")
    assert 0 < max(lasts_s(worker, sent)) <= blob.LETTER_S


def test_what_a_second_message_brought_back_goes_with_it(worker: Worker, blobs: Blobs) -> None:
    job, sent = parcel(blobs, "redis", numbers())
    publish(worker, sent)
    worker.double(job)
    publish(worker, sent)
    until(lambda: worker.counters().get("duplicate"), "it does not end")
    (left_s,) = lasts_s(worker, sent)
    assert 0 < left_s <= blob.DROPPED_S


def test_a_second_message_that_would_be_tried_again_leaves_nothing(worker: Worker, blobs: Blobs) -> None:
    worker.shop.policy(Retry(times=2, delay_s=60.0))
    job, sent = parcel(blobs, "redis", numbers(), "test.tries")
    publish(worker, sent)
    worker.double(job)
    worker.shop.raising = [ValueError("once")]
    publish(worker, sent)
    until(lambda: worker.counters().get("duplicate"), "it does not end")
    assert 0 < max(lasts_s(worker, sent)) <= blob.DROPPED_S


def test_a_cancelled_jobs_blobs_are_gone(worker: Worker, blobs: Blobs) -> None:
    job, sent = parcel(blobs, "redis", numbers())
    worker.books.revoked.add(job)
    publish(worker, sent)
    assert worker.failure(job)[0] == "REVOKED"
    assert lasts_s(worker, sent) == {-2}


def test_a_job_that_is_refused_for_its_options_leaves_no_blobs(worker: Worker, blobs: Blobs) -> None:
    job, sent = parcel(blobs, "redis", numbers())
    sent = Parcel(sent.message.replace(b'"lepton":{', b'"lepton":{"odd":1,'), sent.writes, sent.names, sent.size)
    publish(worker, sent)
    assert worker.failure(job)[1] == "OptionNotSupported"
    assert lasts_s(worker, sent) == {-2}


def test_many_jobs_with_blobs_leave_nothing_behind(make_worker: MakeWorker, blobs: Blobs) -> None:
    worker = make_worker(3)
    sent = [parcel(blobs, "redis", numbers(start=n)) for n in range(60)]
    publish(worker, *(each for _, each in sent))
    for n, (job, _) in enumerate(sent):
        assert np.array_equal(worker.double(job), 2 * numbers(start=n))
    assert worker.connection.call("KEYS", "lepton-blob:*") == []
