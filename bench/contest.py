"""A contest: every contender in turn, round after round, on one broker, with the CPU that each of its processes takes.

Only the one whose turn it is has anything to do. What the others take meanwhile, because they poll or renew leases, is
measured too (`idle_cpu_share`, of one core).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import redis

from bench import cpu
from bench.load import Load
from bench.peer import Place
from lepton_ai.settings import Settings
from pipeline.processes import environment
from pipeline.supervisor import Fleet, run_fleet

__all__ = ["KERNELS", "Arena", "Contender", "Missing", "Turn", "arena", "median_and_range", "rotated", "say", "turns"]

KERNELS = "bench.synthetic"
#: After a turn: until what was put off (acknowledgements, telemetry) is done, and counted.
_SETTLE_S = 0.3
#: The log of the broker is rewritten between turns where it has grown by so much, so that it never is in one.
_REWRITE_BYTES = 64 * 2**20
_WARM_S = 0.4
_LEPTON = ("lepton", "lepton_flower")


class Missing(Exception):
    """A contender's library is not installed."""


class Contender:
    """A contender in a process of its own (bench/contender.py). Use it in a `with`."""

    def __init__(self, name: str, place: Place, fleet: Mapping[str, int]) -> None:
        self.name = name
        self._fleet = fleet if name in _LEPTON else {}
        arguments = [sys.executable, "-P", "-m", "bench.contender", name, msgspec.json.encode(place).decode()]
        with (Path(place.folder) / f"{name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to handle
                env=environment({"PYTHONPATH": str(Path(__file__).parents[1])}),
            )
        self._log = Path(log.name)
        self._own: set[int] = set()
        self.settings = ""
        self.roles: dict[str, list[int]] = {}

    def start(self) -> None:
        """Raises Missing where it cannot take part."""
        self.settings = self.ask("start")["settings"]

    def ask(self, order: str, **arguments: Any) -> Any:
        """What it answers to an order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps((order, arguments)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and said why
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text()[-2000:]}")
        answer = json.loads(line)
        if "missing" in answer:
            raise Missing(f"{answer['missing']} is not installed")
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["said"]

    def run(self, load: Load, count: int) -> float:
        """Seconds for so many jobs, whose results are checked."""
        return float(self.ask("run", load=load, count=count))

    def look(self) -> None:
        """Takes note of which processes it has now."""
        self.roles = {role: list(pids) for role, pids in self.ask("roles").items()}
        self.roles |= {role: [pid] for role, pid in self._fleet.items()}

    def leave(self) -> None:
        """Tells it to end."""
        self._own |= cpu.families({"all": [self._process.pid]})["all"] - {self._process.pid}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and did not hear the last order
            self._process.stdin.close()

    def close(self) -> None:
        """Sees it end, and ends what it leaves."""
        self.leave()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        cpu.kill(self._own)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Arena:
    """One broker with a Lepton on it, and the contenders."""

    def __init__(self, fleet: Fleet, contenders: Sequence[Contender], missing: Mapping[str, str]) -> None:
        self.fleet = fleet
        self.contenders = {each.name: each for each in contenders}
        self.missing = missing
        self._redis: Any = redis.Redis.from_url(fleet.broker_url)
        self._broker = int(self._redis.info("server")["process_id"])

    def used_s(self) -> dict[str, dict[str, float]]:
        """CPU seconds so far of each contender by process, and of the broker."""
        found = {name: cpu.used_s(each.roles) for name, each in self.contenders.items()}
        return {**found, "broker": cpu.used_s({"broker": [self._broker]})}

    def facts(self) -> dict[str, dict[str, Any]]:
        """What Lepton's contenders say of their jobs; ValueError where one is unaccounted for or unexplained."""
        found = {name: each.ask("facts") for name, each in self.contenders.items() if name in _LEPTON}
        for name, each in found.items():
            if each["conservation_difference"] != 0 or each["placements_recorded"] != each["placements_looked_at"]:
                raise ValueError(f"{name} broke a promise: {each}")
        return found

    def settings(self) -> dict[str, str]:
        """How each contender is run."""
        return {name: each.settings for name, each in self.contenders.items()}

    def settle(self) -> None:
        """Rewrites the broker's log where it has grown, and waits for it."""
        found = self._redis.info("persistence")
        if found["aof_current_size"] - found["aof_base_size"] > _REWRITE_BYTES:
            with contextlib.suppress(redis.ResponseError):  # it has begun by itself
                self._redis.bgrewriteaof()
        while True:
            found = self._redis.info("persistence")
            if not (found["aof_rewrite_in_progress"] or found["aof_rewrite_scheduled"]):
                return
            time.sleep(0.05)


class Turn(msgspec.Struct, frozen=True):
    """One turn of one contender."""

    jobs: int
    seconds: float
    cpu_s: dict[str, float]
    """By process."""
    idle_s: dict[str, float]
    """What the others took meanwhile."""
    elapsed_s: float
    """In which they took it."""


@contextmanager
def arena(
    names: Sequence[str], slots: int, folder: Path, *, single: Collection[str] = (), one_by_one: bool = False
) -> Iterator[Arena]:
    """Starts a broker with Lepton and the contenders that are installed; ends them all however it ends.

    Each may run as many jobs at once as there are slots, those in `single` one.
    """
    os.environ["LEPTON_KERNELS"] = KERNELS
    with ExitStack() as stack:
        fleet = stack.enter_context(run_fleet(Settings.read(), {"cpu": slots}, say))
        processes = {name.removesuffix("-cpu"): process.pid for name, process in fleet.processes.items()}
        say(f"starting {', '.join(names)}")
        entered, missing = [], {}
        for name in names:
            place = Place(fleet.broker_url, str(folder), 1 if name in single else slots, one_by_one)
            entered.append(stack.enter_context(Contender(name, place, processes)))
        stack.callback(lambda: [each.leave() for each in entered])  # all at once, and then they are waited for
        contenders = []
        for contender in entered:
            try:
                contender.start()
            except Missing as error:
                say(f"{contender.name} does not take part: {error}")
                missing[contender.name] = str(error)
            else:
                contenders.append(contender)
        yield Arena(fleet, contenders, missing)


def turns(
    held: Arena, load: Load, rounds: int, seconds: float, before: Callable[[], object] = lambda: None
) -> dict[str, list[Turn]]:
    """Everybody's turns, as many jobs as take each about so long; `before` is called before each round."""
    counts = {name: _warmed(each, load, seconds) for name, each in held.contenders.items()}
    found: dict[str, list[Turn]] = {name: [] for name in counts}
    begun = 0
    for number, name in rotated(list(counts), rounds):
        if number == begun:
            before()
            begun += 1
        turn = _turn(held, held.contenders[name], load, counts[name])
        say(f"{load.label}, round {number + 1}/{rounds}: {name} {turn.jobs / turn.seconds:,.0f} jobs/s")
        found[name].append(turn)
    return found


def rotated(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Whose turn it is: every one once in each round, and another begins each."""
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            yield number, name


def median_and_range(values: Sequence[float], digits: int = 2) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), digits),
        "range": [round(min(values), digits), round(max(values), digits)],
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _warmed(contender: Contender, load: Load, seconds: float) -> int:
    """How many jobs take about so long; the first have waited until its workers were there.

    Whoever takes many at once goes faster the more there are, so a turn's own number is tried once.
    """
    count = 10
    contender.run(load, count)
    while (took := contender.run(load, count)) < min(_WARM_S, seconds / 2):
        count *= 4 if took < _WARM_S / 8 else 2
    count = max(10, round(count / took * seconds))
    took = contender.run(load, count)
    contender.look()
    return max(10, round(count / took * seconds))


def _turn(held: Arena, contender: Contender, load: Load, count: int) -> Turn:
    held.settle()
    contender.ask("wake")
    contender.look()
    contender.run(load, max(10, count // 100))
    began, before = time.perf_counter(), held.used_s()
    took = contender.run(load, count)
    time.sleep(_SETTLE_S)
    elapsed, after = time.perf_counter() - began, held.used_s()
    contender.ask("rest")
    used = {name: {role: after[name][role] - roles[role] for role in roles} for name, roles in before.items()}
    own = used[contender.name]
    busy = {contender.name, "broker", *(_LEPTON if contender.name in _LEPTON else ())}  # these share one fleet
    others = {name: sum(roles.values()) for name, roles in used.items() if name not in busy}
    return Turn(count, took, {**own, **used["broker"]}, others, elapsed)
