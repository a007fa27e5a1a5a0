"""What may happen to arrays outside their messages: producers and workers are killed while there are open jobs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path

from lepton_ai import ring
from tests.faults.actors import Actor
from tests.faults.fleet import clean_environment
from tests.faults.play import Play
from tests.faults.scenario import Size
from tests.faults.scenarios_workers import finish

__all__ = ["storm"]

_SEGMENT = re.compile(r"(/dev/shm/lepton-[0-9a-f]{32})")
_SAID = re.compile(r"^acknowledged (\S+) (\d+)$", re.MULTILINE)


def storm(play: Play, size: Size) -> None:
    """Producers and workers are killed in turn, with arrays in shared memory and in the broker; what is left goes."""
    fleet = play.fleet(("cpu.a", "cpu.b"), **size.settings)
    segments: set[Path] = set()
    for number in range(size.rounds):
        ring_bytes = 0 if number % 2 else 1 << 25
        producer = _producer(play, number, size.jobs, ring_bytes)
        producer.start()
        play.until("jobs are open", lambda producer=producer: producer.said.count("acknowledged") > 4, 30)
        segments |= _mapped(producer)
        member = list(fleet.workers.values())[number % 2]
        play.rest(play.chance.uniform(0.0, 0.3))
        if number % 3 < 2:
            producer.kill()
        if number % 3 > 0:
            fleet.kill(member)
            fleet.restart(member)
        if number % 3 == 2:  # who lives on sees all of its jobs end
            play.until("the producer is done", lambda producer=producer: "done" in producer.said, 60)
            producer.wanted = False
            producer.wait()
        play.auditor.acknowledge((job, int(told)) for job, told in _SAID.findall(producer.said))
    finish(play, fleet)
    _expect_nothing_left(play, segments)


def _producer(play: Play, number: int, jobs: int, ring_bytes: int) -> Actor:
    first = play.auditor.numbers(jobs).start
    command = [sys.executable, "-P", str(Path(__file__).with_name("producer.py")), play.server.url]
    environ = clean_environment({"LEPTON_RING_BYTES": str(ring_bytes)})
    return play.stage.cast(f"producer-{number}", [*command, str(first), str(jobs)], environ)


def _mapped(producer: Actor) -> set[Path]:
    """The segments that a producer has made."""
    with contextlib.suppress(OSError):
        return set(map(Path, _SEGMENT.findall(Path(f"/proc/{producer.pid}/maps").read_text())))
    return set()


def _expect_nothing_left(play: Play, segments: set[Path]) -> None:
    with contextlib.closing(play.connect()) as connection:
        keys = connection.call("KEYS", "lepton-blob:*")
        endless = [key for key in keys if connection.call("TTL", key) == -1]
    play.expect(not endless, f"blobs of no open job that never go: {endless[:3]}")
    play.notes["blobs_going"], play.notes["segments"] = len(keys), len(segments)
    hours_ago = time.time() - ring.ORPHANED_S - 1
    for path in segments:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (hours_ago, hours_ago))
    ring.sweep()
    left = [path.name for path in segments if path.exists()]
    play.expect(not left, f"memory of producers that are gone: {left}")
