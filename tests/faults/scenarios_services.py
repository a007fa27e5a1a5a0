"""What may happen to routers and the ingest: killed between any two commands, frozen, two at once."""

from __future__ import annotations

import httpx

from tests.faults.fleet import Member
from tests.faults.play import Play
from tests.faults.proxy import Trap
from tests.faults.scenario import Size
from tests.faults.scenarios_workers import COSTS_MS, finish, kill_in_turn

__all__ = [
    "INGEST_POINTS",
    "ROUTER_POINTS",
    "bundle_storm",
    "ingest_kill",
    "router_freeze",
    "router_kill",
    "two_routers",
]

_MAIN = r"router-[0-9a-f]{16}\r\n"
_WAKE = r"router-[0-9a-f]{16}-wake"
#: Where a router is killed: when the wake-up has landed in its claim and it does not know; from the first message
#: claimed, after so many commands; when the dispatch has begun, and when it is done and it does not know, which a lone
#: job's is in one command, or, once its device is known, in one write on the connection that woke it.
ROUTER_POINTS = (
    (_WAKE, "BLMOVE", 0),
    *((_MAIN, "LMOVE", after) for after in range(14)),
    *((_MAIN, "MULTI", after) for after in (0, 1, 3, 5)),
    (_MAIN, "EXEC", 0),
    (_MAIN, "FCALL lepton_transact", 0),
    (_MAIN, "FCALL lepton_transact", -1),
    *((_WAKE, "MULTI", after) for after in (0, 1, 5)),
    (_WAKE, "EXEC", 0),
    (_WAKE, "EXEC", -1),
)
#: Where the ingest is killed: `accept` is about to be called, has been called; the disk is to be waited for, has it.
INGEST_POINTS = ((0, True), (0, False), (1, True), (1, False))


def router_kill(play: Play, size: Size) -> None:
    """The router is killed at each point between two commands of claim and dispatch, then started again."""
    points = play.chance.sample(ROUTER_POINTS, size.rounds) if size.rounds < len(ROUTER_POINTS) else ROUTER_POINTS
    fleet = play.fleet(("cpu",), **size.settings)
    (router,) = fleet.routers
    load = play.load()
    found: list[str] = []
    for connections, begins, after in points:
        router.actor.kill()
        trap = router.proxy.trap = _trap(router, connections, begins, after)
        fleet.restart(router)
        incarnation = fleet.incarnation(router)
        play.until("it waits for jobs", lambda incarnation=incarnation: play.waits(f"{incarnation}-wake"))
        is_lone = begins.startswith("FCALL") or (connections == _WAKE and begins != "BLMOVE")
        if is_lone and connections == _WAKE:
            load.submit([0])
            play.drain()
        load.submit([0] * (1 if is_lone else size.jobs))
        play.until(f"the router is killed at {begins} + {after}", trap.sprung.is_set)
        router.actor.wait()
        fleet.bury(incarnation)
        found.append(trap.at)
        router.proxy.trap = None
        fleet.restart(router)
        play.drain()
    play.notes["killed_after"] = found
    finish(play, fleet)


def router_freeze(play: Play, size: Size) -> None:
    """A router is frozen with messages in its claim until another has adopted them; thawed, it finds itself fenced."""
    fleet = play.fleet(("cpu",), **size.settings)
    load = play.load()
    for number in range(size.rounds):
        victim = fleet.routers[0]
        victim.actor.kill()
        # Frozen with the answer to its first WATCH on the way: thawed, it goes on to dispatch what it believes to hold.
        trap = victim.proxy.trap = Trap(
            victim.actor.freeze, "WATCH", connections=_MAIN, asked=number % 2 == 1, withhold=False
        )
        fleet.restart(victim)
        incarnation = fleet.incarnation(victim)
        load.submit([0] * size.jobs)
        play.until("it is frozen", trap.sprung.is_set)
        play.recovery.died(incarnation)
        other = fleet.routers[1] if len(fleet.routers) > 1 else fleet.add_router("router-1")
        fleet.restart(other)
        play.until("what it held is taken from it", lambda: not play.recovery.watching, fleet.lease_s + 30)
        play.rest(size.seconds)
        load.submit(play.chance.choices(COSTS_MS, k=size.jobs))
        victim.actor.thaw()
        play.until("it is fenced", lambda victim=victim: "router_fenced" in victim.actor.said_now, 40)
        play.drain()
        other.actor.end()
        other.actor.wait()
    finish(play, fleet)
    play.expect(_ran_once(play), "a job ran twice, and no worker was harmed")


def two_routers(play: Play, size: Size) -> None:
    """Two routers side by side do what one does; then one of them is killed, and the other does it alone."""
    fleet = play.fleet(("cpu.a", "cpu.b"), routers=2, **size.settings)
    load = play.load()
    load.stream(size.jobs // 2, COSTS_MS, play.seed, at_once=20, every_s=0.02)
    play.until("half is submitted", lambda: not load.streaming, 120)
    play.drain()
    counted = play.counters()
    play.expect(
        counted.get("succeeded") == size.jobs // 2, f"one submits {size.jobs // 2}, two routers count {counted}"
    )
    placed = [actor.said.count("router_online") for actor in play.stage.actors.values() if "router" in actor.name]
    play.expect(placed == [1, 1], f"routers began {placed} times")
    load.stream(size.jobs - size.jobs // 2, COSTS_MS, play.seed, at_once=20, every_s=0.02)
    for _ in range(size.rounds):
        play.rest(play.chance.uniform(0.1, 0.5))
        fleet.kill(fleet.routers[0])
        fleet.restart(fleet.routers[0])
    finish(play, fleet)
    play.expect(_ran_once(play), "a job ran twice, and no worker was harmed")


def bundle_storm(play: Play, size: Size) -> None:
    """A router and workers are killed in turn while quick jobs come hundreds at a time, in bundles whole and split.

    One router of two is spared: while all are dead nobody recovers anything, and in what time is promised for the rest.
    """
    fleet = play.fleet(("cpu.a", "cpu.b"), routers=2, **size.settings)
    load = play.load()
    for _ in range(3):  # so that routers know how quick the kernel is
        load.submit([0] * 20)
        play.drain()
    load.stream(size.jobs, (0, 1), play.seed, at_once=400, every_s=0.02)
    members = {member.actor: member for member in (*fleet.workers.values(), fleet.routers[0])}
    kill_in_turn(
        play,
        list(members),
        size.rounds,
        is_online=lambda actor: fleet.is_online(members[actor]),
        kill=lambda actor: fleet.kill(members[actor]),
    )
    finish(play, fleet)


def ingest_kill(play: Play, size: Size) -> None:
    """The ingest is killed at each point around its 202; whoever has a 202 has a job, and exactly one."""
    fleet = play.fleet(("cpu",), ingest=True, durability="fsync", **size.settings)
    assert fleet.ingest is not None
    found: list[str] = []
    for number in range(size.rounds):
        after, asked = INGEST_POINTS[number % len(INGEST_POINTS)]
        fleet.ingest.actor.kill()
        trap = fleet.ingest.proxy.trap = Trap(fleet.ingest.actor.die, "FCALL lepton_accept", after=after, asked=asked)
        fleet.restart(fleet.ingest)
        _post(play, fleet.http_port, size.jobs)
        play.until(f"the ingest is killed at {after}", trap.sprung.is_set)
        found.append(f"{trap.at} {'asked' if asked else 'answered'}")
        fleet.ingest.actor.wait()
        fleet.ingest.proxy.trap = None
        fleet.restart(fleet.ingest)
        for _ in range(3):  # and right after a 202
            _post(play, fleet.http_port, size.jobs)
        fleet.ingest.actor.kill()
    play.notes["killed_after"] = found
    play.expect(len(play.auditor.acknowledged) >= 3 * size.jobs * size.rounds, "too few were accepted in between")
    finish(play, fleet)
    play.expect(_ran_once(play), "a job ran twice, and no worker was harmed")


def _trap(router: Member, connections: str, begins: str, after: int) -> Trap:
    fruitful = begins in ("BLMOVE", "LMOVE")
    return Trap(
        router.actor.die, begins, connections=connections, after=max(0, after), asked=after < 0, fruitful=fruitful
    )


def _post(play: Play, port: int, jobs: int) -> None:
    """Posts jobs over HTTP: a 202 acknowledges, another answer refuses, none leaves it open."""
    numbers = play.auditor.numbers(jobs)
    body = [{"kernel": "fault.run", "arguments": {"n": number, "ms": 0, "how": 0}} for number in numbers]
    try:
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/jobs", json=body, timeout=10)
    except httpx.HTTPError:
        play.auditor.wonder(numbers)
        return
    if answer.status_code == httpx.codes.ACCEPTED:
        ids = [each["id"] for each in answer.json()]
        play.auditor.acknowledge(zip(ids, numbers, strict=True))
    else:
        play.auditor.wonder(numbers) if answer.is_server_error else play.auditor.refuse(numbers)


def _ran_once(play: Play) -> bool:
    return all(count == 1 for count in play.auditor.executed().values())
