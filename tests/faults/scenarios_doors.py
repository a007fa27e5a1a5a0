"""What producers may do: submit one job many times, far too much, for later, and what is no job at all."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from lepton_ai import Client, topology, wire
from lepton_ai.job import Options
from tests.faults.malformed import envelopes, posts
from tests.faults.play import Play
from tests.faults.scenario import Size
from tests.faults.scenarios_workers import COSTS_MS, finish

__all__ = ["duplicates", "eta_storm", "malformed", "overflow"]

_MIB = 1024 * 1024
#: How much sooner than it was asked for a job may seem to run: the broker's clock and ours are read apart.
_CLOCKS_APART_S = 0.02
#: What a job of the flood takes, in milliseconds.
_COST_MS = 10


def duplicates(play: Play, size: Size) -> None:
    """One key, submitted many times at once over HTTP, by clients and on the lane: one job, one result."""
    fleet = play.fleet(("cpu",), ingest=True, **size.settings)
    with Client(play.server.url) as direct, Client(fleet.http_url) as http:
        for turn in range(size.rounds):
            (number,) = play.auditor.numbers(1)
            arguments = {"n": number, "ms": 0, "how": 0}
            ids = _at_once(size.jobs, _ways(play, direct, http, arguments, f"order-{play.seed}-{turn}"))
            play.expect(len(ids) == 1, f"one key became {len(ids)} jobs")
            play.auditor.acknowledge((job, number) for job in ids)
    finish(play, fleet)


def _ways(play: Play, direct: Client, http: Client, arguments: dict[str, int], key: str) -> list[Callable[[], str]]:
    from lepton_ai.idempotency import job_id

    own = job_id(key)
    message = wire.envelope(own, "fault.run", arguments, Options())

    def lane() -> str:
        play.ask("LPUSH", topology.LANE, message)
        return own

    return [
        lambda: direct.submit("fault.run", arguments, key=key).id,
        lambda: http.submit("fault.run", arguments, key=key).id,
        lane,
    ]


def _at_once(times: int, ways: list[Callable[[], str]]) -> set[str]:
    barrier = threading.Barrier(times)

    def one(number: int) -> str:
        barrier.wait()
        return ways[number % len(ways)]()

    with ThreadPoolExecutor(times) as pool:
        return set(pool.map(one, range(times)))


def eta_storm(play: Play, size: Size) -> None:
    """Thousands of jobs for later, and a router dies in the middle: none runs early, none is lost."""
    fleet = play.fleet(("cpu",), **size.settings)
    load = play.load()
    due: dict[int, float] = {}
    for _ in range(size.rounds):
        delay_s = play.chance.uniform(0.5, size.seconds)
        at = time.time() + delay_s
        ids = load.submit([0] * (size.jobs // size.rounds), delay_s=delay_s)
        due |= {play.auditor.acknowledged[job]: at for job in ids}
    play.rest(size.seconds / 2)
    fleet.kill(fleet.routers[0])
    fleet.restart(fleet.routers[0])
    play.drain(60 + size.seconds)
    runs = play.auditor.runs()
    early = [number for number, at in runs if at < due[number] - _CLOCKS_APART_S]
    play.expect(not early, f"{len(early)} jobs ran early")
    late_s = sorted(at - due[number] for number, at in runs)
    if late_s:
        play.notes["late_p50_s"], play.notes["late_max_s"] = round(late_s[len(late_s) // 2], 3), round(late_s[-1], 3)
    finish(play, fleet)


def overflow(play: Play, size: Size) -> None:
    """Ten times more than there is room for comes over HTTP: the rest is refused with a time to come again.

    First one tenant floods, and another, who asks for little, is served; then three flood, and all lanes are full.
    """
    room = size.jobs // 20
    limits = {"tenant_jobs": room, "waiting_jobs": 2 * room, "window": room}
    fleet = play.fleet(("cpu",), ingest=True, **{**limits, **size.settings})
    posts = size.jobs // 20
    order = ["greedy", "greedy", "greedy", "modest"] * (posts // 8) + ["greedy", "grasping", "grabbing"] * (posts // 6)
    answers: dict[str, Counter[int]] = defaultdict(Counter)
    impolite, peak_bytes, peak_waiting = 0, 0, 0
    with httpx.Client(base_url=fleet.http_url, timeout=30) as http:
        for tenant in order:
            answer = _post(play, http, tenant, 1 if tenant == "modest" else 20)
            answers[tenant][answer.status_code] += 1
            impolite += answer.is_error and "retry-after" not in answer.headers
            peak_bytes = max(peak_bytes, play.server_bytes())
            peak_waiting = max(peak_waiting, sum(play.ask("LLEN", topology.lane(each)) for each in set(order)))
    play.notes |= {"answers": {tenant: dict(found) for tenant, found in answers.items()}}
    play.notes |= {"peak_mib": round(peak_bytes / _MIB, 1), "peak_waiting": peak_waiting}
    statuses = set().union(*answers.values())
    play.expect(statuses == {202, 429, 503}, f"the ingest answered {sorted(statuses)}")
    play.expect(answers["modest"].keys() == {202}, f"who asks for little is told {dict(answers['modest'])}")
    play.expect(not impolite, f"{impolite} refusals named no time to come again")
    play.expect(peak_waiting <= 2 * room, f"{peak_waiting} jobs waited, {2 * room} may")
    finish(play, fleet)
    play.nobody_exits()


def _post(play: Play, http: httpx.Client, tenant: str, jobs: int) -> httpx.Response:
    numbers = play.auditor.numbers(jobs)
    body = [{"kernel": "fault.run", "arguments": {"n": number, "ms": _COST_MS, "how": 0}} for number in numbers]
    answer = http.post("/v1/jobs", json=body, headers={"lepton-tenant": tenant})
    if answer.status_code == httpx.codes.ACCEPTED:
        play.auditor.acknowledge(zip([each["id"] for each in answer.json()], numbers, strict=True))
    else:
        play.auditor.refuse(numbers)
    return answer


def malformed(play: Play, size: Size) -> None:
    """What is no job comes over HTTP and on the lane, among jobs: it is refused, and the jobs do not notice."""
    fleet = play.fleet(("cpu",), ingest=True, **size.settings)
    play.load().stream(size.jobs, COSTS_MS, play.seed, at_once=10, every_s=0.02)
    play.expect(play.tolerate(lambda: play.load(fleet.http_url).submit([0])), "the ingest takes no job")
    answers: Counter[str] = Counter()
    for _ in range(size.rounds):
        for name, message in envelopes(play.chance):
            play.ask("LPUSH", topology.LANE, message)
            answers[f"lane: {name}"] += 1
        for name, answer_of in posts(play.chance, fleet.http_port):
            status = answer_of()
            answers[f"http: {status}"] += 1
            play.expect(400 <= status < 500, f"{name} over HTTP was answered with {status}")
    play.notes["answers"] = {name: count for name, count in answers.items() if name.startswith("http")}
    play.notes["messages"] = sum(count for name, count in answers.items() if name.startswith("lane"))
    play.expect(bool(play.load(fleet.http_url).submit([0])), "the ingest takes no job any more")
    finish(play, fleet)
    play.nobody_exits()
    for word in ("router_failed", "slot_failed", "Traceback"):
        said = [actor.name for actor in play.stage.actors.values() if word in actor.said]
        play.expect(not said, f"{said} said {word}")
