"""What somebody else's load on a worker's host does to predictions, with and without what corrects for it.

A real worker filters images with windows of mixed sizes; in the middle third of the run as many processes as the host
has processors do nothing but compute beside it. What the worker told (heartbeats and observations) is then replayed,
each launch predicted before it is learned, by three models that differ in the speed that they believe in: none (others'
load is no business of theirs), `1 - foreign` (what others do not use is ours), and `told`: what heartbeats say, which
is how long threads waited for a processor (`tasks.host.Contention`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_ai.client import Client
from lepton_ai.device import Announcement, ResourceState
from lepton_ai.event import Event
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.size import Size
from lepton_ai.settings import Settings
from pipeline.supervisor import run_fleet
from queues.connection import Connection
from queues.event_stream import EventStream
from tasks.driver import cores

_RADII = (2, 4, 6, 8, 12, 16)
_SIDE = 384
#: What a long launch takes.
_LONG_S = 0.03
_WINDOW = 4
#: How long after others came or went a launch counts as one of the change.
_CHANGE_S = 3.0
_CORRECTIONS: dict[str, Callable[[ResourceState], float]] = {
    "none": lambda _: 1.0,
    "1 - foreign": lambda state: max(0.05, 1 - max(0.0, state.host_cpu - state.own_cpu)),
    "told": lambda state: state.speed,
}

Seen = list[tuple[float, Event]]


def main() -> int:
    arguments = argparse.ArgumentParser(prog="lepton bench foreign", description=__doc__)
    arguments.add_argument("--phase-s", type=float, default=8.0, help="each of the three")
    arguments.add_argument("--json", action="store_true")
    asked = arguments.parse_args()
    with (
        run_fleet(Settings(celery_events_hz=0), {"cpu": cores()}, lambda _: None) as fleet,
        Client(fleet.broker_url) as client,
    ):
        (worker,) = client.devices()
        # What is compiled and what nothing is known of is past before it begins.
        _drive(client, 2.0)
        stream = EventStream(Connection(fleet.broker_url, "bench"), "0")
        marks = [time.time()]
        for count in (0, cores(), 0):
            with _busy(count):
                _drive(client, asked.phase_s)
            marks.append(time.time())
        seen = _read_all(stream)
    speeds = _speeds(seen, marks)
    found = {name: _replayed(seen, worker, marks, speed) for name, speed in _CORRECTIONS.items()}
    if asked.json:
        print(json.dumps({"speeds": speeds, "corrections": found}))
        return 0
    print(f"{'phase':18} {'speed told':>10} {'really':>6}")
    for phase, each in speeds.items():
        print(f"{phase:18} {each['told']:10.2f} {each['really']:6.2f} ({each['launches']:.0f} long launches)")
    print(f"\n{'correction':12} {'phase':18} {'launches':>8} {'median error':>12} {'bias':>6}")
    for name, phases in found.items():
        for phase, each in phases.items():
            print(f"{name:12} {phase:18} {each['launches']:8} {each['error']:12.1%} {each['bias']:+6.1%}")
    return 0


def _drive(client: Client, seconds: float) -> None:
    """Images to filter, a few at a time, for so long."""
    chosen, until = random.Random(7), time.monotonic() + seconds
    image = np.random.default_rng(7).random((_SIDE, _SIDE), np.float32)

    def rows() -> Iterator[dict[str, Any]]:
        while time.monotonic() < until:
            yield {"image": image, "radius": chosen.choice(_RADII)}

    for _ in client.map("medical.median_filter", rows(), window=_WINDOW):
        pass


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """So many processes of somebody else's that compute."""
    others = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(count)]
    for each in others:
        each.start()
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.join()


def _spin() -> None:
    while True:
        sum(range(100_000))


def _read_all(stream: EventStream) -> Seen:
    found: Seen = []
    while some := stream.read(200):
        fresh = [(int(entry.partition("-")[0]) / 1000, each) for entry, each in some if each.type in _TAUGHT]
        found += fresh
        if not stream.is_behind:
            break
    return found


_TAUGHT = ("device.heartbeat", "job.succeeded")


def _replayed(
    seen: Seen, worker: Announcement, marks: Sequence[float], speed_of: Callable[[ResourceState], float]
) -> dict[str, dict[str, float]]:
    """Of each phase how far predictions were off (median of |log|) and to which side (median of the log)."""
    model, speed = CostModel(), 1.0
    logs: dict[str, list[float]] = {}
    for at, each in seen:
        if each.type == "device.heartbeat":
            speed = speed_of(msgspec.convert(each.data["state"], ResourceState))
        elif (launch := each.observation) is not None:
            predicted_s = model.predict(launch.kernel, launch.device, Size.of(launch), worker.peaks).run_s / speed
            if (phase := _phase(at, marks)) is not None:
                logs.setdefault(phase, []).append(math.log(launch.run_s / predicted_s))
            model.learn(msgspec.structs.replace(launch, run_s=launch.run_s * speed), worker.peaks)
    return {
        phase: {
            "launches": len(found),
            "error": math.expm1(statistics.median(map(abs, found))),
            "bias": math.expm1(statistics.median(found)),
        }
        for phase, found in logs.items()
    }


def _speeds(seen: Seen, marks: Sequence[float]) -> dict[str, dict[str, float]]:
    """Of each phase the speed that heartbeats told, and that of long launches beside equal ones of the first phase.

    Only the long ones show it: those of a few milliseconds are over before the scheduler gives the processor away.
    """
    told: dict[str, list[float]] = {}
    took: dict[str, dict[tuple[float, int], list[float]]] = {}
    for at, each in seen:
        if (phase := _phase(at, marks)) is None:
            continue
        if each.type == "device.heartbeat":
            told.setdefault(phase, []).append(msgspec.convert(each.data["state"], ResourceState).speed)
        elif (launch := each.observation) is not None:
            took.setdefault(phase, {}).setdefault((launch.flops, launch.jobs), []).append(launch.run_s)
    alone = {key: statistics.median(times) for key, times in took["alone before"].items()}
    found: dict[str, dict[str, float]] = {}
    for phase, launches in took.items():
        long = [(alone[key], each) for key, times in launches.items() if alone.get(key, 0) >= _LONG_S for each in times]
        really = sum(each for each, _ in long) / sum(each for _, each in long) if long else math.nan
        found[phase] = {"told": statistics.mean(told.get(phase, [math.nan])), "really": really, "launches": len(long)}
    return found


def _phase(at: float, marks: Sequence[float]) -> str | None:
    begun = [mark for mark in marks[:-1] if mark <= at]
    if not begun or at > marks[-1]:
        return None
    name = ("alone before", "beside others", "alone after")[len(begun) - 1]
    return f"{name}, new" if at < begun[-1] + _CHANGE_S and len(begun) > 1 else name


if __name__ == "__main__":
    raise SystemExit(main())
