"""What may happen between processes and the broker: cut, half-open, slow, and a blackout of everything."""

from __future__ import annotations

from tests.faults.fleet import Fleet
from tests.faults.play import Play
from tests.faults.scenario import Size
from tests.faults.scenarios_workers import COSTS_MS, finish

__all__ = ["blackout", "cut", "half_open", "slow"]


def cut(play: Play, size: Size) -> None:
    """Connections are cut at random, of any process and the client too, for moments shorter than a lease."""
    fleet = play.fleet(("cpu.a", "cpu.b"), routers=2, **size.settings)
    client = play.network.proxy(play.server.port)
    play.load(client.url).stream(size.jobs, COSTS_MS, play.seed, at_once=10, every_s=0.02)
    proxies = [client, *(member.proxy for member in fleet.members)]
    for _ in range(size.rounds):
        play.rest(play.chance.uniform(0.05, 0.5))
        victim = play.chance.choice(proxies)
        if play.chance.random() < 0.5:
            victim.reset()
            continue
        victim.cut()
        play.rest(play.chance.uniform(0.0, size.seconds))
        victim.mend()
    _finish(play, fleet)


def half_open(play: Play, size: Size) -> None:
    """A worker's and a router's connections swallow everything, and no side is told: what they hold goes to others."""
    fleet = play.fleet(("cpu.a", "cpu.b"), routers=2, **size.settings)
    play.load().stream(size.jobs, COSTS_MS, play.seed, at_once=10, every_s=0.05)
    for number in range(size.rounds):
        play.rest(play.chance.uniform(0.3, 0.6))
        members = [*fleet.workers.values()] if number % 2 == 0 else fleet.routers
        victim = play.chance.choice(members)
        play.recovery.died(fleet.incarnation(victim))
        victim.proxy.swallow()
    _finish(play, fleet)


def slow(play: Play, size: Size) -> None:
    """Every process has a slow and thin line to the broker."""
    fleet = play.fleet(("cpu.a", "cpu.b"), **size.settings)
    for member in fleet.members:
        member.proxy.latency_s, member.proxy.bytes_per_s = 0.03, 2e6
    play.load().stream(size.jobs, COSTS_MS, play.seed, at_once=50)
    _finish(play, fleet)


def blackout(play: Play, size: Size) -> None:
    """Everything is cut from the broker for longer than a lease; then all goes on, and nobody has left."""
    fleet = play.fleet(("cpu.a", "cpu.b"), ingest=True, **size.settings)
    load = play.load()
    load.submit(play.chance.choices((0, 50), k=size.jobs))
    for _ in range(size.rounds):
        play.rest(0.3)
        for member in fleet.members:
            member.proxy.cut()
        play.rest(size.seconds)
        for member in fleet.members:
            member.proxy.mend()
        load.submit(play.chance.choices(COSTS_MS, k=size.jobs))
        play.drain()
    _finish(play, fleet)


def _finish(play: Play, fleet: Fleet) -> None:
    finish(play, fleet)
    play.nobody_exits()
