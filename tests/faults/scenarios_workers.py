"""What may happen to workers: killed in a storm, killed between any two commands, while state
is handed on, frozen, ended one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from lepton_ai import topology
from lepton_ai.carried import decode
from tests.faults.actors import Actor
from tests.faults.fault_kernels import carry
from tests.faults.fleet import Fleet, Member
from tests.faults.load import Load
from tests.faults.play import Play
from tests.faults.proxy import Trap
from tests.faults.scenario import Size

__all__ = [
    "COSTS_MS",
    "POINTS",
    "carried_state",
    "finish",
    "freeze",
    "kill_in_turn",
    "relay",
    "rolling_end",
    "storm",
    "sync_points",
]

#: Milliseconds that jobs take: most none, so that batches are large, some a while, so that kills hit kernels.
COSTS_MS = (0, 0, 0, 25)
#: A dead process' jobs can be claimed again after its lease, a sweep, and this for a machine that is busy otherwise.
_SLACK_S = 1.0
#: And a worker that is being started again takes jobs after that.
_START_S = 8.0
#: A job that is found running, on a busy machine too.
_LONG_MS = 2000
#: Where a worker is killed: from the first message taken, after so many commands; and just before the commit.
POINTS = (*(("BLMOVE", after) for after in range(14)), ("FCALL lepton_commit", 0))


def storm(play: Play, size: Size) -> None:
    """Workers are killed again and again while they work through a deep queue, each soon after it came up."""
    fleet = play.fleet(("cpu.a", "cpu.b"), **size.settings)
    play.load().stream(size.jobs, COSTS_MS, play.seed, at_once=100)
    members = {member.actor: member for member in fleet.workers.values()}
    kill_in_turn(
        play,
        list(members),
        size.rounds,
        is_online=lambda actor: fleet.is_online(members[actor]),
        kill=lambda actor: fleet.kill(members[actor]),
    )
    finish(play, fleet)


def kill_in_turn(
    play: Play, actors: list[Actor], kills: int, is_online: Callable[[Actor], bool], kill: Callable[[Actor], object]
) -> None:
    """Kills each a random moment after it came up, and starts it again: so often, all together."""
    play.notes["kills"] = kills
    due = {actor: time.monotonic() + play.chance.uniform(0.05, 0.8) for actor in actors}
    while kills:
        play.rest(0.01)
        for actor in actors:
            if actor not in due:
                if is_online(actor):
                    due[actor] = time.monotonic() + play.chance.uniform(0.05, 0.8)
            elif kills and time.monotonic() >= due[actor]:
                del due[actor]
                kill(actor)
                actor.start()
                kills -= 1


def carried_state(play: Play, size: Size) -> None:
    """Workers are killed while jobs hand on state by key: each job is in it once."""
    fleet = play.fleet(("cpu.a", "cpu.b"), **size.settings)
    load = play.load()
    handed: dict[str, list[int]] = {f"key-{number}": [] for number in range(3)}
    keys, every = list(handed), size.jobs // size.rounds
    for number in range(size.rounds):
        for at in range(0, every, 10):
            key = keys[(number + at) % len(keys)]
            jobs = load.submit(play.chance.choices((0, 0, 3), k=10), kernel="fault.carry", state_key=key)
            handed[key] += [play.auditor.acknowledged[job] for job in jobs]
        member = list(fleet.workers.values())[number % 2]
        play.rest(play.chance.uniform(0.05, 0.4))
        fleet.kill(member)
        fleet.restart(member)
    finish(play, fleet)
    for key, numbers in handed.items():
        value = play.ask("HGET", topology.carried(topology.LANE, "fault.carry", key), "value")
        seen = decode(value, carry.signature)["seen"].tolist()
        play.expect(sorted(seen) == sorted(numbers), f"{key} has {len(seen)} numbers, {len(numbers)} jobs were its own")
    play.notes["stale_commits"] = sum(actor.said.count("commit_stale") for actor in play.stage.actors.values())


def relay(play: Play, size: Size) -> None:
    """Two workers die in turn, each once the other is back: what came back is work for whoever is there."""
    fleet = play.fleet(("cpu.a", "cpu.b"), **size.settings)
    play.load().submit([25] * size.jobs)
    play.until("all devices are busy", lambda: all(play.held(each) for _, each in _incarnations(fleet)))
    for number in range(size.rounds):
        victim = list(fleet.workers.values())[number % 2]
        fleet.kill(victim)
        play.rest(fleet.lease_s + 2)  # so that its jobs have come back, and wait in a router
        fleet.restart(victim)
    finish(play, fleet)


def sync_points(play: Play, size: Size) -> None:
    """A worker is killed at each point between two commands of take, run and commit; then the next.

    Four at once, each with jobs of its own: what one of them held can only come back to itself.
    """
    points = play.chance.sample(POINTS, size.rounds) if size.rounds < len(POINTS) else list(POINTS)
    fleet = play.fleet(tuple(f"cpu.{name}" for name in "abcd"), slots=1, **size.settings)
    load = play.load()
    found: list[str] = []
    for at in range(0, len(points), 4):
        chosen = dict(zip(fleet.workers.values(), points[at : at + 4], strict=False))
        for member in chosen:  # so that it knows how long a job takes, and takes the next ones as a batch
            load.submit([0], device=member.device)
        play.drain()
        traps = {member: _set(play, fleet, member, *point) for member, point in chosen.items()}
        for member in traps:
            load.submit([0] * size.jobs, device=member.device)
        for member, (trap, incarnation) in traps.items():
            play.until(f"{member.actor.name} is killed at {chosen[member]}", trap.sprung.is_set)
            fleet.bury(incarnation)
            member.actor.wait()
            found.append(trap.at)
            member.proxy.trap = None
            member.actor.start()
        play.drain()
        for member in traps:
            fleet.await_online(member)
    play.notes["killed_after"] = found
    finish(play, fleet)


def _freeze_in_kernel(play: Play, fleet: Fleet, load: Load) -> tuple[Member, str]:
    """A worker that is frozen now in mid kernel, by the runs file: its commit is still to come."""
    while True:
        play.drain()
        ran = len(play.auditor.runs())
        load.submit([_LONG_MS])
        play.until("it runs", lambda ran=ran: len(play.auditor.runs()) > ran)
        _, began = play.auditor.runs()[-1]
        for member, incarnation in _incarnations(fleet):
            if not play.held(incarnation):
                continue
            member.actor.freeze()
            if time.time() - began < _LONG_MS / 2000 and play.held(incarnation):
                return member, incarnation
            member.actor.thaw()  # the machine was busy elsewhere, and the kernel may have come to its end


def freeze(play: Play, size: Size) -> None:
    """A worker is frozen in mid kernel until its lease has lapsed and others run its jobs; its commit is refused."""
    fleet = play.fleet(("cpu.a", "cpu.b"), slots=1, **size.settings)
    load = play.load()
    for _ in range(size.rounds):
        before = play.fenced()
        member, incarnation = _freeze_in_kernel(play, fleet, load)
        play.recovery.died(incarnation)
        load.submit(play.chance.choices(COSTS_MS, k=size.jobs))
        play.until("what it held is taken from it", lambda: not play.recovery.watching, fleet.lease_s + 30)
        play.rest(size.seconds)
        member.actor.thaw()
        play.until("its late commit is refused", lambda before=before: play.fenced() > before, 15)
        play.drain()
    play.notes["fenced"] = play.fenced()
    finish(play, fleet)


def rolling_end(play: Play, size: Size) -> None:
    """Workers and routers get SIGTERM one after another under load, and are started again: nothing runs twice."""
    fleet = play.fleet(("cpu.a", "cpu.b"), routers=2, **size.settings)
    load = play.load()
    load.stream(size.jobs, COSTS_MS, play.seed, at_once=20, every_s=0.05)
    for number in range(size.rounds):
        member = [*fleet.workers.values(), *fleet.routers][number % 4]
        member.actor.end()
        code = member.actor.wait(30)
        play.expect(code == 0, f"{member.actor.name} ended with {code} at SIGTERM")
        fleet.restart(member)
    finish(play, fleet)
    with_ones = [count for count in play.auditor.executed().values() if count > 1]
    play.expect(not with_ones, f"{len(with_ones)} jobs ran more than once, and nobody was killed")


def finish(play: Play, fleet: Fleet) -> None:
    """Lets the load end, drains, and looks whether the dead were recovered from in time and nothing stood still."""
    for load in play.loads:
        play.until("everything has been submitted", lambda load=load: not load.streaming, 120)
    still_s = play.drain()
    limit_s = fleet.lease_s + 1.0 + _START_S
    play.expect(still_s <= limit_s, f"nothing ended for {still_s:.1f} s, although jobs waited and nobody was harmed")
    limit_s = fleet.lease_s + 1.0 + _SLACK_S
    late = [round(span, 2) for span in play.recovery.spans_s if span > limit_s]
    play.expect(not late, f"claimable again after more than {limit_s:g} s: {late}")


def _incarnations(fleet: Fleet) -> Iterator[tuple[Member, str]]:
    return ((member, fleet.incarnation(member)) for member in fleet.workers.values())


def _set(play: Play, fleet: Fleet, member: Member, begins: str, after: int) -> tuple[Trap, str]:
    """Sets a trap for a worker's only slot, which has to connect anew for it."""
    asked = begins != "BLMOVE"
    trap = Trap(
        member.actor.die,
        begins,
        connections=r"worker-[0-9a-f]{16}-0\r\n",
        after=after,
        asked=asked,
        fruitful=not asked,
    )
    incarnation = fleet.incarnation(member)
    member.proxy.trap = trap
    member.proxy.reset()
    play.until(f"{member.actor.name} is back", lambda: play.waits(f"{incarnation}-0"))
    return trap, incarnation
