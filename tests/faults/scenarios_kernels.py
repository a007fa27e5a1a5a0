"""What kernels may do to their workers: kill them, lose their devices, want more memory than there is, never return."""

from __future__ import annotations

import contextlib

from tasks.loss import EXIT_CODE
from tests.faults.auditor import events_of
from tests.faults.fault_kernels import BREAK, CRAMPED, EXIT, HANG, LOSE, MEMORY, SEGFAULT
from tests.faults.play import Play
from tests.faults.scenario import Size
from tests.faults.scenarios_workers import finish

__all__ = ["device_lost", "hang", "out_of_device_memory", "poison"]

_ATTEMPTS = 3
_POISONS = (SEGFAULT, EXIT, MEMORY)


def poison(play: Play, size: Size) -> None:
    """Jobs that kill their process stand in full batches and in bundles: they are dead letters, the others succeed."""
    fleet = play.fleet(("cpu.a",), slots=1, **size.settings)
    load = play.load()
    load.submit([0])  # so that the worker knows how long a job takes, and takes the next ones as a batch
    play.drain()
    load.submit([30])  # and is busy while the batch gathers
    for number in range(size.rounds):
        load.submit([0] * (size.jobs // (2 * size.rounds)))
        beside = 20 * ((number + 1) % 2)
        jobs = load.submit([0] * (beside + 1), how=_POISONS[number % len(_POISONS)], at=beside // 2)
        play.doomed.add(jobs[beside // 2])
        load.submit([0] * (size.jobs // (2 * size.rounds)))
    play.drain(240, still_s=60)
    finish(play, fleet)
    _look_at_the_dead(play, play.doomed)
    executed = play.auditor.executed()
    play.notes["poison_runs"] = [executed[number] for number in map(play.auditor.acknowledged.__getitem__, play.doomed)]
    play.notes["worker_deaths"] = len(play.stage.exits)


def hang(play: Play, size: Size) -> None:
    """A kernel never returns, of one job of a bundle: its process is ended, its job told so, the others go on."""
    settings = {"least_limit_s": 1.0, "limit_s": 2.0, "attempts": _ATTEMPTS, **size.settings}
    fleet = play.fleet(("cpu.a", "cpu.b"), slots=2, **settings)
    load = play.load()
    for _ in range(size.rounds):
        load.submit([0] * (size.jobs // size.rounds))
        play.doomed.add(load.submit([0] * 20, how=HANG, at=7)[7])
    play.drain(240, still_s=60)
    finish(play, fleet)
    play.expect(bool(play.stage.exits), "no process was ended")
    play.notes["process_ends"] = play.stage.exits


def device_lost(play: Play, size: Size) -> None:
    """Devices are lost in the middle of batches and of bundles, and one job loses every device that it meets."""
    fleet = play.fleet(("cpu.a", "cpu.b"), slots=2, **{"attempts": _ATTEMPTS, **size.settings})
    load = play.load()
    load.submit([0] * 4)  # so that the workers know how long a job takes, and take the next ones as batches
    play.drain()
    load.submit([30] * 4)  # and are busy while the batches gather
    for number in range(size.rounds):
        load.submit([0] * (size.jobs // (2 * size.rounds)))
        load.submit([0] * 21, how=LOSE, at=10)  # a bundle
        load.submit([0], how=LOSE)
        load.submit([0, 5] * (size.jobs // (4 * size.rounds)))
        if number == size.rounds // 2:
            play.doomed.update(load.submit([0], how=BREAK))
    play.drain(240, still_s=60)
    finish(play, fleet)
    _look_at_the_dead(play, play.doomed)
    codes = {code for _, code in play.stage.exits}
    play.expect(codes == {EXIT_CODE}, f"processes ended with {codes}, not with {EXIT_CODE} alone")
    lost = _told(play, "device.lost")
    play.expect(lost == len(play.stage.exits), f"{lost} devices were said to be lost, {len(play.stage.exits)} were")
    play.notes["process_ends"] = len(play.stage.exits)


def out_of_device_memory(play: Play, size: Size) -> None:
    """A device has no memory for some jobs: they end on the other, those pinned to it fail, no attempt is counted."""
    fleet = play.fleet((), **size.settings)
    fleet.add_worker("cpu.a", 2, FAULT_CRAMPED="1")
    fleet.add_worker("cpu.b", 2)
    fleet.up()
    load = play.load()
    for _ in range(size.rounds):
        load.submit([0, 2] * (size.jobs // (4 * size.rounds)))
        load.submit([0] * (size.jobs // (4 * size.rounds)), how=CRAMPED)
        load.submit([1, 2, 5] * (size.jobs // (12 * size.rounds)), how=CRAMPED)
        play.doomed.update(load.submit([0, 1], how=CRAMPED, device="cpu.a"))
    finish(play, fleet)
    play.nobody_exits()
    released = _told(play, "job.released")
    play.expect(released >= len(play.doomed), f"only {released} jobs went elsewhere")
    play.expect(play.ask("HLEN", "lepton:attempts") == 0, "an attempt was counted")
    play.notes["released"] = released


def _told(play: Play, kind: str) -> int:
    with contextlib.closing(play.connect()) as connection:
        return events_of(connection, kind)


def _look_at_the_dead(play: Play, poisons: set[str]) -> None:
    entries = play.ask("XRANGE", "lepton:dead", "-", "+")
    dead = {fields.get(b"job", b"?").decode(): fields for fields in (_paired(found) for _, found in entries)}
    missing = [job for job in poisons if job not in dead]
    play.expect(not missing, f"{len(missing)} of {len(poisons)} poisonous jobs are no dead letters")
    play.expect(dead.keys() <= poisons, f"among the dead are {sorted(dead.keys() - poisons)[:3]}")
    attempts = {int(fields.get(b"attempts", 0)) for fields in dead.values()}
    play.expect(attempts <= {_ATTEMPTS}, f"the dead have had {attempts} attempts, not {_ATTEMPTS}")
    wanted = {b"job", b"kernel", b"reason", b"code", b"attempts", b"message"}
    play.expect(all(wanted <= fields.keys() for fields in dead.values()), f"a dead letter lacks one of {wanted}")


def _paired(fields: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(fields[::2], fields[1::2], strict=True))
