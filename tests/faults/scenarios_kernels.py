"""What kernels may do to their workers: kill them, and never return."""

from __future__ import annotations

from tests.faults.fault_kernels import EXIT, HANG, MEMORY, SEGFAULT
from tests.faults.play import Play
from tests.faults.scenario import Size
from tests.faults.scenarios_workers import finish

__all__ = ["hang", "poison"]

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
