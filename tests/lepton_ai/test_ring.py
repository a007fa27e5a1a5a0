from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lepton_ai import blob, ring
from lepton_ai.blob import InRing, Reference
from lepton_ai.errors import BlobLost, InvalidArguments, LeptonError, TooLarge
from lepton_ai.ring import FOLDER, Ring, RingReader, memory, sweep

KIB, MIB = 1 << 10, 1 << 20
LIMIT = 1 << 30

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")


@pytest.fixture
def folder() -> Iterator[Path]:
    found = Path(tempfile.mkdtemp(dir=FOLDER))
    yield found
    shutil.rmtree(found)


def numbers(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(count, np.float32)


def segments(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith("lepton-memory")]


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def put(producer: Ring, array: np.ndarray[Any, Any], job: str = "job") -> Reference:
    reference = producer.put(array, job)
    assert reference is not None
    return reference


# -- one producer, one reader -----------------------------------------------------------------------------------------


def test_a_reader_sees_what_was_put_without_a_copy(folder: Path) -> None:
    producer, reader = Ring(4 * MIB, folder), RingReader(folder)
    array = numbers(MIB // 4).reshape(512, 512)
    found = reader.get(put(producer, array), LIMIT)
    assert np.array_equal(found, array)
    assert not found.flags.owndata
    assert not found.flags.writeable
    assert found.ctypes.data % 64 == 0


def test_so_with_another_byte_or_memory_order_and_with_no_dimension(folder: Path) -> None:
    producer, reader = Ring(4 * MIB, folder), RingReader(folder)
    strange = np.arange(60_000, dtype=">i4").reshape(200, 300).T[::2]
    assert np.array_equal(reader.get(put(producer, strange), LIMIT), strange)
    assert reader.get(put(producer, np.array(2.5)), LIMIT) == 2.5


def test_nothing_is_made_before_it_is_needed(folder: Path) -> None:
    Ring(4 * MIB, folder)
    assert segments(folder) == []


def test_files_are_for_their_user_alone(folder: Path) -> None:
    put(producer := Ring(4 * MIB, folder), numbers(9000))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    producer.close()


def test_a_full_ring_says_so_and_takes_more_once_a_job_has_ended(folder: Path) -> None:
    producer = Ring(2 * MIB, folder)
    array = numbers(MIB // 4)
    assert producer.put(array, "a") is not None
    assert producer.put(array, "b") is None  # with its header it does not fit a second time
    producer.free("a")
    assert producer.put(array, "b") is not None
    assert producer.put(numbers(MIB), "c") is None


def test_it_grows_by_segments_up_to_its_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_LEAST_SEGMENT", 64 * KIB)
    monkeypatch.setattr(ring, "_HUGE_PAGE", 4 * KIB)
    producer, reader = Ring(MIB, folder), RingReader(folder)
    found = []
    while (reference := producer.put(numbers(9000, len(found)), f"{len(found)}")) is not None:
        found.append(reference)
    assert len(segments(folder)) > 1
    assert sum(path.stat().st_size for path in segments(folder)) <= MIB
    for seed, each in enumerate(found):
        assert np.array_equal(reader.get(each, LIMIT), numbers(9000, seed))


def test_a_job_frees_all_that_is_its_own_and_nothing_else(folder: Path) -> None:
    producer, reader = Ring(4 * MIB, folder), RingReader(folder)
    first, second = put(producer, numbers(9000), "a"), put(producer, numbers(9000, 1), "a")
    other = put(producer, numbers(9000, 2), "b")
    assert producer.jobs == ["a", "b"]
    producer.free("a")
    producer.free("never heard of")
    assert producer.jobs == ["b"]
    for each in (first, second):
        with pytest.raises(BlobLost, match="given up"):
            reader.get(each, LIMIT)
    assert np.array_equal(reader.get(other, LIMIT), numbers(9000, 2))


def test_a_reader_that_was_lapped_is_told(folder: Path) -> None:
    producer, reader = Ring(4 * MIB, folder), RingReader(folder)
    reference = put(producer, numbers(9000), "a")
    reader.get(reference, LIMIT)
    reader.check(reference)
    producer.free("a")
    with pytest.raises(BlobLost):
        reader.check(reference)
    put(producer, numbers(9000, 1), "b")
    with pytest.raises(BlobLost):
        reader.check(reference)


def test_bytes_of_an_open_job_are_given_up_only_for_want_of_room_and_after_a_day(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, reader = Ring(2 * MIB, folder), RingReader(folder)
    array = numbers(MIB // 4)
    reference = put(producer, array, "a")
    assert producer.put(array, "b") is None
    monkeypatch.setattr(ring, "GIVEN_UP_S", -1.0)
    assert producer.put(array, "b") is not None
    with pytest.raises(BlobLost):
        reader.get(reference, LIMIT)


def test_a_ring_of_no_size_takes_nothing(folder: Path) -> None:
    assert Ring(0, folder).put(numbers(9000), "a") is None
    assert list(folder.iterdir()) == []


def test_a_dtype_that_cannot_be_sent_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArguments, match="complex64"):
        Ring(4 * MIB, folder).put(np.zeros(9000, np.complex64), "a")


def test_several_threads_share_one_ring(folder: Path) -> None:
    producer, reader = Ring(2 * MIB, folder), RingReader(folder)

    def work(thread: int) -> int:
        done = 0
        for turn in range(200):
            job, array = f"{thread}-{turn}", numbers(9000 + 100 * turn, thread)
            if (reference := producer.put(array, job)) is not None:
                assert np.array_equal(reader.get(reference, LIMIT), array)
                reader.check(reference)
                producer.free(job)
                done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert producer.jobs == []
    assert all(segment.free == [(0, segment.size)] for segment in producer._segments)


class Slots(RuleBasedStateMachine):
    """Arrays come and go; whatever is open reads as it was written, and whatever is freed never again."""

    references = Bundle("references")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ring, "_LEAST_SEGMENT", 128 * KIB)
        self.patch.setattr(ring, "_HUGE_PAGE", 4 * KIB)
        self.producer = Ring(512 * KIB, self.folder)
        self.reader = RingReader(self.folder)
        self.open: dict[str, list[tuple[Reference, np.ndarray[Any, Any]]]] = {}
        self.freed: list[Reference] = []
        self.views: list[tuple[Reference, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self.made = 0

    def teardown(self) -> None:
        self.patch.undo()
        self.producer.close()
        shutil.rmtree(self.folder)

    @rule(target=references, kib=st.integers(1, 200), anew=st.booleans())
    def put(self, kib: int, anew: bool) -> str:
        self.made += 1
        job = f"job-{self.made}" if anew or not self.open else next(iter(self.open))
        array = np.full(kib * KIB, self.made % 251, np.uint8)
        reference = self.producer.put(array, job)
        if reference is None:
            size = -(-(64 + array.nbytes) // 4096) * 4096
            largest = max((room for each in self.producer._segments for _, room in each.free), default=0)
            assert largest < size
            assert (
                sum(each.size for each in self.producer._segments) + max(128 * KIB, size) > 512 * KIB or size > largest
            )
        else:
            self.open.setdefault(job, []).append((reference, array))
        return job

    @rule(job=consumes(references))
    def free(self, job: str) -> None:
        self.producer.free(job)
        self.freed += [reference for reference, _ in self.open.pop(job, [])]

    @rule(job=references)
    def begin_to_read(self, job: str) -> None:
        for reference, array in self.open.get(job, []):
            self.views.append((reference, self.reader.get(reference, LIMIT), array))

    @rule()
    def end_reading(self) -> None:
        for reference, view, array in self.views:
            same = np.array_equal(view, array)
            if reference in self.freed:
                with pytest.raises(BlobLost):
                    self.reader.check(reference)
            else:
                assert same
                self.reader.check(reference)
        self.views.clear()

    @invariant()
    def what_is_open_reads_as_it_was_written(self) -> None:
        for each in self.open.values():
            for reference, array in each:
                assert np.array_equal(self.reader.get(reference, LIMIT), array)

    @invariant()
    def what_is_freed_never_reads_again(self) -> None:
        for reference in self.freed:
            with pytest.raises(LeptonError):
                self.reader.get(reference, LIMIT)

    @invariant()
    def every_byte_is_free_or_one_slots(self) -> None:
        slots = [slot for each in self.producer._open.values() for slot in each]
        for segment in self.producer._segments:
            parts = sorted(segment.free + [(slot.offset, slot.size) for slot in slots if slot.segment is segment])
            assert [offset for offset, _ in parts] == [0, *(sum(part) for part in parts[:-1])]
            assert sum(parts[-1]) == segment.size
            gaps = [offset for offset, _ in segment.free]
            assert not set(gaps) & {sum(part) for part in segment.free}, "two free parts touch"
        assert sum(segment.size for segment in self.producer._segments) <= 512 * KIB


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40)


# -- references that lie ----------------------------------------------------------------------------------------------


@pytest.fixture
def real(folder: Path) -> Iterator[tuple[RingReader, Reference]]:
    producer = Ring(4 * MIB, folder)
    yield RingReader(folder), put(producer, numbers(MIB // 8))
    producer.close()


def forged(reference: Reference, **changes: Any) -> Reference:
    place = blob.place_of(reference)
    assert isinstance(place, InRing)
    changed = place._replace(**{name: changes.pop(name) for name in place._fields if name in changes})
    fields = {"dtype": reference.dtype, "shape": reference.shape} | changes
    return Reference(**fields, blob="ring:" + ":".join(map(str, changed)))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"memory": "0" * 32}, BlobLost, "another host"),
        ({"segment": "0" * 32}, BlobLost, "is gone"),
        ({"generation": 2}, BlobLost, "given up"),
        ({"offset": 4096}, BlobLost, "given up"),
        ({"offset": 64}, InvalidArguments, "no slot"),
        ({"offset": 1}, InvalidArguments, "no slot"),
        ({"offset": 10**15 - 1}, InvalidArguments, "no slot"),
        ({"offset": 4 * MIB}, InvalidArguments, "no slot"),
        ({"offset": 4 * MIB - 4096}, InvalidArguments, "no slot"),
        ({"shape": (MIB // 8 + 1,)}, InvalidArguments, "has 524288 bytes"),
        ({"shape": (1,)}, InvalidArguments, "has 524288 bytes"),
        ({"dtype": "<f8"}, InvalidArguments, "has 524288 bytes"),
        ({"shape": (16 * MIB,)}, InvalidArguments, "no slot"),
        ({"shape": (LIMIT,)}, TooLarge, "the limit is"),
        ({"shape": (-1,)}, InvalidArguments, "the shape of a blob"),
        ({"segment": "../../../etc/passwd"}, InvalidArguments, "no place"),
    ],
)
def test_a_forged_reference_is_refused(
    real: tuple[RingReader, Reference], changes: dict[str, Any], error: type[LeptonError], said: str
) -> None:
    reader, reference = real
    for _ in range(2):  # a first and a second time: what was mapped once is remembered
        with pytest.raises(error, match=said):
            reader.get(forged(reference, **changes), LIMIT, "a")
        reader.get(reference, LIMIT)
    if error is not TooLarge:
        with pytest.raises(error, match=said):
            reader.check(forged(reference, **changes))


@given(
    offset=st.integers(0, 10**15 - 1) | st.integers(0, 2**10).map(lambda page: page * 4096),
    generation=st.integers(1, 10**18 - 1) | st.integers(1, 3),
    shape=st.lists(st.integers(-5, 2**63), max_size=4).map(tuple),
)
def test_whatever_it_says_a_reference_meets_errors_of_ours_only(
    offset: int, generation: int, shape: tuple[int, ...]
) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        producer, reader = Ring(4 * MIB, Path(name)), RingReader(Path(name))
        reference = forged(put(producer, numbers(9000)), offset=offset, generation=generation, shape=shape)
        for ask in (lambda: reader.get(reference, LIMIT), lambda: reader.check(reference)):
            try:
                ask()
            except LeptonError:
                continue
        producer.close()


def test_a_slot_of_redis_is_none_of_the_rings(folder: Path) -> None:
    with pytest.raises(InvalidArguments, match="not in shared memory"):
        RingReader(folder).get(Reference("<f4", (9000,), "redis:0123456789abcdef:1"), LIMIT)


def test_a_link_or_a_file_that_others_may_write_is_no_segment(folder: Path, real: tuple[RingReader, Reference]) -> None:
    reader, reference = real
    (found,) = segments(folder)
    (folder / f"lepton-{'1' * 32}").symlink_to(found)
    copied = folder / f"lepton-{'2' * 32}"
    shutil.copyfile(found, copied)
    copied.chmod(0o666)
    empty = folder / f"lepton-{'3' * 32}"
    empty.touch(0o600)
    (folder / f"lepton-{'4' * 32}").mkdir(0o700)
    for digit in "1234":
        with pytest.raises(BlobLost, match="is gone"):
            reader.get(forged(reference, segment=digit * 32), LIMIT)


# -- which memory it is -----------------------------------------------------------------------------------------------


def test_who_shares_a_folder_finds_the_same_memory(folder: Path) -> None:
    code = f"from lepton_ai.ring import memory; from pathlib import Path; print(memory(Path({str(folder)!r})))"
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()}
    assert found == {memory(folder)}


def test_another_folder_is_another_memory(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    assert memory(other) != memory(folder)


def test_without_a_folder_or_with_a_mark_that_is_not_ours_nothing_is_shared(folder: Path) -> None:
    assert memory(folder / "missing") is None
    (folder / f"lepton-memory-{os.geteuid()}").symlink_to("/etc/passwd")
    assert memory(folder) is None
    assert Ring(4 * MIB, folder).put(numbers(9000), "a") is None
    assert RingReader(folder).memory is None


def test_a_mark_that_others_may_write_is_not_trusted(folder: Path) -> None:
    path = folder / f"lepton-memory-{os.geteuid()}"
    path.touch()
    path.chmod(0o666)
    assert memory(folder) is None


# -- room -------------------------------------------------------------------------------------------------------------


def test_no_more_than_half_of_the_memory_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = SimpleNamespace(f_bavail=520, f_blocks=1000, f_frsize=64 * KIB)
    monkeypatch.setattr(os, "statvfs", lambda path: space)
    producer = Ring(256 * MIB, folder)
    assert producer.put(numbers(9000), "a") is None
    space.f_bavail = 900
    assert producer.put(numbers(9000), "a") is not None


def test_a_memory_that_is_full_all_the_same_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    producer = Ring(4 * MIB, folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert producer.put(numbers(9000), "a") is None
    assert segments(folder) == []
    assert producer.put(numbers(9000), "a") is not None


def test_a_segment_that_was_removed_under_its_producer_takes_no_more(folder: Path) -> None:
    producer, reader = Ring(4 * MIB, folder), RingReader(folder)
    lost = put(producer, numbers(9000), "a")
    (gone,) = segments(folder)
    gone.unlink()  # as systemd does where its user logs out
    with pytest.raises(BlobLost, match="is gone"):
        reader.get(lost, LIMIT)
    assert np.array_equal(reader.get(put(producer, numbers(9000, 1), "b"), LIMIT), numbers(9000, 1))
    producer.free("a")


# -- ends -------------------------------------------------------------------------------------------------------------


def test_closing_leaves_nothing_where_no_job_is_open(folder: Path) -> None:
    producer = Ring(4 * MIB, folder)
    put(producer, numbers(9000), "a")
    producer.free("a")
    producer.close()
    assert segments(folder) == []
    assert producer.put(numbers(9000), "b") is None
    producer.close()


def test_what_open_jobs_need_outlives_its_producer_for_an_hour(folder: Path) -> None:
    producer, reader = Ring(4 * MIB, folder), RingReader(folder)
    reference = put(producer, numbers(9000), "a")
    producer.close()
    assert sweep(folder) == 0
    assert np.array_equal(reader.get(reference, LIMIT), numbers(9000))
    (left,) = segments(folder)
    aged(left, ring.ORPHANED_S + 1)
    assert sweep(folder) == 1
    assert segments(folder) == []


def test_the_next_producer_removes_what_is_left_of_one_that_is_long_gone(folder: Path) -> None:
    gone = Ring(4 * MIB, folder)
    put(gone, numbers(9000), "a")
    gone.close()
    (left,) = segments(folder)
    aged(left, ring.ORPHANED_S + 1)
    put(producer := Ring(4 * MIB, folder), numbers(9000), "b")
    assert left not in segments(folder)
    producer.free("b")


def test_a_forgotten_ring_closes_itself(folder: Path) -> None:
    producer = Ring(4 * MIB, folder)
    put(producer, numbers(9000), "a")
    producer.free("a")
    del producer
    gc.collect()
    assert segments(folder) == []


PRODUCER = """
import sys, time, numpy as np
from pathlib import Path
from lepton_ai.ring import Ring
ring = Ring(4 << 20, Path(sys.argv[1]))
reference = ring.put(np.arange(90000, dtype=np.float32), "job")
print(reference.blob, flush=True)
if sys.argv[2] == "ended":
    ring.free("job")
if sys.argv[2] == "stays":
    time.sleep(60)
"""


@contextmanager
def running(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that is killed at the end, where it has not ended before; and the first line that it printed."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def of_process(place: str) -> Reference:
    return Reference("<f4", (90_000,), place)


def test_an_exit_leaves_what_open_jobs_need_and_nothing_else(folder: Path) -> None:
    with running(PRODUCER, str(folder), "ended") as (process, _):
        assert process.wait(30) == 0
    assert segments(folder) == []
    with running(PRODUCER, str(folder), "left open") as (process, place):
        assert process.wait(30) == 0
    assert np.array_equal(RingReader(folder).get(of_process(place), LIMIT), np.arange(90_000, dtype=np.float32))


def test_a_killed_producer_leaves_its_jobs_their_bytes_and_nothing_for_good(folder: Path) -> None:
    with running(PRODUCER, str(folder), "stays") as (_, place):
        (segment,) = segments(folder)
        aged(segment, ring.ORPHANED_S + 1)
        assert sweep(folder) == 0  # it is alive, however long it has put nothing
    reader = RingReader(folder)
    found = reader.get(of_process(place), LIMIT)
    assert sweep(folder) == 1
    assert segments(folder) == []
    assert np.array_equal(found, np.arange(90_000, dtype=np.float32))  # what is mapped stays until it is let go
    reader.sweep()
    assert reader._mapped == {}
    with pytest.raises(BlobLost, match="is gone"):
        reader.check(of_process(place))


def test_one_killed_while_it_makes_its_segment_leaves_nothing_for_good(folder: Path) -> None:
    code = """
import os, signal, sys, numpy as np
from pathlib import Path
from lepton_ai.ring import Ring
os.posix_fallocate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Ring(4 << 20, Path(sys.argv[1])).put(np.zeros(90000), "job")
"""
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -signal.SIGKILL
    (segment,) = segments(folder)
    aged(segment, ring.ORPHANED_S + 1)
    assert sweep(folder) == 1


READER = """
import sys, time
from pathlib import Path
from lepton_ai.blob import Reference
from lepton_ai.ring import RingReader
reader = RingReader(Path(sys.argv[1]))
print(reader.get(Reference("<f4", (9000,), sys.argv[2]), 1 << 30).sum(), flush=True)
time.sleep(60)
"""


def test_a_killed_reader_leaves_nothing(folder: Path) -> None:
    producer = Ring(4 * MIB, folder)
    reference = put(producer, np.ones(9000, np.float32))
    before = set(folder.iterdir())
    with running(READER, str(folder), reference.blob) as (_, total):
        assert float(total) == 9000
    assert set(folder.iterdir()) == before
    producer.free("job")
    producer.close()
    assert segments(folder) == []


def test_a_forked_child_has_no_part_in_its_parents_ring(folder: Path) -> None:
    producer = Ring(4 * MIB, folder)
    reference = put(producer, numbers(9000))
    here, there = multiprocessing.Pipe()

    def child() -> None:
        told = (producer.put(numbers(9000), "b") is None, producer.jobs)
        producer.free("job")
        producer.close()
        there.send(told)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert here.recv() == (True, [])
    process.join(30)
    assert np.array_equal(RingReader(folder).get(reference, LIMIT), numbers(9000))
    assert producer.jobs == ["job"]


def test_a_reader_maps_no_more_than_some_segments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_MOST_MAPPED", 3)
    monkeypatch.setattr(ring, "_LEAST_SEGMENT", 64 * KIB)
    producers = [Ring(64 * KIB, folder) for _ in range(6)]
    reader = RingReader(folder)
    references = [put(each, numbers(9000, seed)) for seed, each in enumerate(producers)]
    for _ in range(2):
        for seed, each in enumerate(references):
            assert np.array_equal(reader.get(each, LIMIT), numbers(9000, seed))
            assert len(reader._mapped) <= 3


def test_whoever_sweeps_leaves_what_is_not_ours(folder: Path) -> None:
    for name in ("lepton-notes", "other", f"lepton-{'a' * 31}"):
        (folder / name).touch(0o600)
        aged(folder / name, 10 * ring.ORPHANED_S)
    assert sweep(folder) == 0
    assert sweep(folder / "missing") == 0


def test_sweeping_beside_producers_that_come_and_go_takes_nothing_from_them(folder: Path) -> None:
    stop = threading.Event()

    def sweeper() -> None:
        while not stop.is_set():
            sweep(folder)

    thread = threading.Thread(target=sweeper)
    thread.start()
    try:
        reader = RingReader(folder)
        for seed in range(50):
            producer = Ring(MIB, folder)
            assert np.array_equal(reader.get(put(producer, numbers(9000, seed)), LIMIT), numbers(9000, seed))
            producer.free("job")
            producer.close()
    finally:
        stop.set()
        thread.join()
    assert segments(folder) == []
