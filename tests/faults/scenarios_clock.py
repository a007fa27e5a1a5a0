"""A worker whose clock is wrong by an hour."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from tests.faults.play import Play
from tests.faults.scenario import Size, Skipped
from tests.faults.scenarios_workers import COSTS_MS, finish

__all__ = ["clock_skew"]

_PACKAGE = "libfaketime"
_KEPT = Path("/var/tmp/lepton-faketime")
_PLACES = (Path("/usr/lib"), Path("/usr/local/lib"), _KEPT)


def clock_skew(play: Play, size: Size) -> None:
    """One worker lives an hour ahead and one an hour behind; one is killed: nothing is early, late or lost by that."""
    library = str(_library())
    play.serve()
    fleet = play.fleet((), **size.settings)
    for device, skew in (("cpu.ahead", "+3600s"), ("cpu.behind", "-3600s")):
        fleet.add_worker(device, 2, LD_PRELOAD=library, FAKETIME=skew, FAKETIME_DONT_FAKE_MONOTONIC="1")
    fleet.up()
    play.load().stream(size.jobs, COSTS_MS, play.seed, at_once=20, every_s=0.02)
    for _ in range(size.rounds):
        play.rest(play.chance.uniform(0.3, 0.8))
        victim = play.chance.choice(list(fleet.workers.values()))
        fleet.kill(victim)
        fleet.restart(victim)
    finish(play, fleet)
    play.nobody_exits()
    ran_by = {"ahead" if at > play.began_at + 1800 else "behind" for _, at in play.auditor.runs()}
    play.expect(ran_by == {"ahead", "behind"}, f"jobs ran only on the clock that is {ran_by}")


@cache
def _library() -> Path:
    """libfaketime: what is installed, or what apt fetches into a folder of its own; Skipped where there is none."""
    if (found := _found()) is None:
        _KEPT.mkdir(exist_ok=True)
        try:
            _run("apt-get", "download", _PACKAGE)
            (package,) = _KEPT.glob(f"{_PACKAGE}_*.deb")
            _run("dpkg-deb", "--extract", str(package), str(_KEPT))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise Skipped(f"no {_PACKAGE} here, and apt fetches none: {error}") from error
        found = _found()
    if found is None:
        raise Skipped(f"{_PACKAGE} has no library for threads")
    return found


def _found() -> Path | None:
    return next((path for place in _PLACES for path in place.rglob("libfaketimeMT.so.1")), None)


def _run(*command: str) -> None:
    subprocess.run(command, cwd=_KEPT, check=True, capture_output=True, timeout=60)
