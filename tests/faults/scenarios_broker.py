"""What may happen to the broker: killed, out of memory, its disk full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.load import Load
from tests.faults.play import Play
from tests.faults.scenario import Size, Skipped
from tests.faults.scenarios_workers import COSTS_MS, finish

__all__ = ["broker_kill", "broker_kill_waitaof", "disk_full", "out_of_memory"]

_MIB = 1024 * 1024
_LITTLE_DISK_MIB = 8


def broker_kill(play: Play, size: Size) -> None:
    """The broker gets SIGKILL in mid load and is started on the same data; it syncs every write before it answers."""
    play.serve(appendfsync="always")
    fleet = play.fleet(("cpu.a", "cpu.b"), durability="fsync", **size.settings)
    load = play.load()
    load.stream(size.jobs, COSTS_MS, play.seed, at_once=10, every_s=0.01)
    ready_s: list[float] = []
    for _ in range(size.rounds):
        play.rest(play.chance.uniform(0.3, 1.0))
        play.server.actor.kill()
        play.rest(size.seconds)
        ready_s.append(round(play.server.start(), 2))
    play.notes["ready_s"] = ready_s
    finish(play, fleet)
    play.nobody_exits()


def broker_kill_waitaof(play: Play, size: Size) -> None:
    """As `broker_kill`, but it syncs once a second, and each 202 waits for the disk instead."""
    fleet = play.fleet(("cpu.a", "cpu.b"), ingest=True, durability="fsync", **size.settings)
    play.load(fleet.http_url).stream(size.jobs, COSTS_MS, play.seed, at_once=20, every_s=0.01)
    for _ in range(size.rounds):
        play.rest(play.chance.uniform(0.5, 2.0))
        play.server.actor.kill()
        play.rest(size.seconds)
        play.server.start()
    finish(play, fleet)
    play.nobody_exits()


def out_of_memory(play: Play, size: Size) -> None:
    """The broker is full: submissions are refused, nobody exits; once there is room again, everything goes on."""
    fleet = play.fleet(("cpu.a", "cpu.b"), **size.settings)
    load = play.load()
    for _ in range(size.rounds):
        play.server.set("maxmemory", str(play.server_bytes() + 2 * _MIB))
        _fill(play, load)
        play.rest(size.seconds)  # with everybody running against the limit
        play.server.set("maxmemory", "0")
        play.until("a submission is accepted", lambda: load.submit([0]), 30)
        play.drain()
    play.notes["last_refusal"] = load.last_error
    finish(play, fleet)
    play.nobody_exits()


def disk_full(play: Play, size: Size) -> None:
    """The broker's disk is full: what cannot be kept is not acknowledged; once there is room again, all goes on."""
    with _little_disk(play.folder / "disk") as disk:
        play.serve(disk, appendfsync="always", auto_aof_rewrite_percentage="0")
        fleet = play.fleet(("cpu.a",), durability="fsync", **size.settings)
        load = play.load()
        load.submit(play.chance.choices(COSTS_MS, k=100))
        _fill(play, load)
        play.notes["broker_exit"] = play.server.actor.ended
        play.notes["last_refusal"] = load.last_error
        play.rest(size.seconds)
        _mount(disk, 512, "remount,")
        if play.server.actor.ended is not None:
            play.server.start()
        play.until("a submission is accepted", lambda: load.submit([0]), 60)
        finish(play, fleet)
        play.nobody_exits()
        play.server.actor.kill()
        play.server.start()  # and what the disk has of it
        finish(play, fleet)


def _fill(play: Play, load: Load) -> None:
    """Submits until nothing is taken any more: many at a time until a call fails, then one by one."""
    while load.submit([0] * 50):
        play.rest(0.0)
    play.until("single jobs are refused", lambda: not load.submit([0]), 30)
    for _ in range(20):
        load.submit([0])


@contextmanager
def _little_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few MiB in memory; who may not mount one cannot play with it."""
    folder.mkdir()
    _mount(folder, _LITTLE_DISK_MIB)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


def _mount(folder: Path, size_mib: int, again: str = "") -> None:
    options = ["-o", f"{again}size={size_mib}m"]
    try:
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Skipped(f"no file system of its own can be mounted here (uid {os.getuid()}): {error}") from error
