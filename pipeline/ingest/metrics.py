"""What Prometheus reads at `/metrics`: the accounts, what waits in each lane, and what placements cost in hindsight."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lepton_ai import topology, wire
from lepton_ai.accounts import ENDS, Accounts
from lepton_ai.errors import LeptonError
from lepton_ai.identity import made_at
from pipeline.ingest.redispy import broker_errors
from pipeline.regret import RATIOS

__all__ = ["CONTENT_TYPE", "Lanes", "lanes", "regret", "text"]

#: Litestar adds the charset.
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")
#: Lanes with a series of their own, the fullest; the others are one together.
_LANES_SHOWN: Final = 20
#: Names that no tenant can have.
_DEFAULT, _OTHERS = "_default", "_others"


class Lanes(msgspec.Struct, frozen=True):
    """What waits for a router."""

    jobs: dict[str, int]
    """By tenant, `_default` for those without one; the fullest lanes, and `_others` for the rest."""
    oldest_s: float = 0.0
    """Age of the oldest job that waits in those; of a job with a key, or of another's id, it is not known."""


async def lanes(client: Any) -> Lanes:
    """Asks the broker; BrokerUnavailable where it does not answer."""
    async with broker_errors():
        found = await client.smembers(topology.LANES)
        names = [topology.LANE, *sorted(name.decode(errors="replace") for name in found)]
        async with client.pipeline(transaction=False) as pipeline:
            for name in names:
                for each in topology.lane_lists(name):
                    pipeline.llen(each)
            pipeline.hmget(topology.BUNDLED, names)
            *lengths, bundled = await pipeline.execute()
        each_s = len(topology.lane_lists())
        jobs = {name: sum(lengths[at * each_s : (at + 1) * each_s]) for at, name in enumerate(names)}
        for name, extra in zip(names, bundled, strict=True):  # what is counted there may have left the lane already
            jobs[name] += min(max(0, int(extra or 0)), jobs[name] * (topology.MOST_BUNDLED - 1))
        shown = sorted(names, key=lambda name: (name != topology.LANE, -jobs[name]))[:_LANES_SHOWN]
        async with client.pipeline(transaction=False) as pipeline:
            for name in shown:
                for each in topology.lane_lists(name) if jobs[name] else ():
                    pipeline.lindex(each, -1)
            oldest = await pipeline.execute()
    ages = [age for message in oldest if message and (age := _age_s(message)) is not None]
    told = {_DEFAULT if name == topology.LANE else name.removeprefix(f"{topology.LANE}."): jobs[name] for name in shown}
    if rest := sum(jobs[name] for name in names if name not in shown):
        told[_OTHERS] = rest
    return Lanes(told, max(ages, default=0.0))


async def regret(client: Any) -> dict[str, float]:
    """What the routers have told of jobs that have ended (pipeline/regret.py); BrokerUnavailable as above."""
    async with broker_errors():
        found = await client.hgetall(topology.REGRET)
    return {name.decode(errors="replace"): float(value) for name, value in found.items()}


def text(accounts: Accounts, waiting: Lanes, regret: Mapping[str, float]) -> bytes:
    """All of it in Prometheus's own format."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(accounts, waiting))
    registry.register(_Regret(regret))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, accounts: Accounts, waiting: Lanes) -> None:
        self._accounts, self._lanes = accounts, waiting

    def collect(self) -> Iterator[Metric]:
        accounts, terms = self._accounts, self._accounts.terms
        yield CounterMetricFamily("lepton_jobs_accepted", "Jobs accepted, retries included.", accounts.accepted)
        ended = CounterMetricFamily("lepton_jobs", "Jobs by what became of them.", labels=["outcome"])
        for outcome in ENDS:
            ended.add_metric([outcome], terms.get(outcome, 0))
        yield ended
        yield GaugeMetricFamily("lepton_jobs_waiting", "Jobs that no device has been given yet.", accounts.waiting)
        yield GaugeMetricFamily(
            "lepton_jobs_in_flight", "Jobs queued for a device or with a worker.", accounts.in_flight
        )
        yield GaugeMetricFamily(
            "lepton_conservation_difference", "Jobs unaccounted for; alert unless it is 0.", accounts.difference
        )
        yield CounterMetricFamily(
            "lepton_fenced_commits", "Results refused because their worker had lost the job.", terms.get("fenced", 0)
        )
        yield CounterMetricFamily("lepton_jobs_replayed", "Dead letters run once more.", terms.get("replayed", 0))
        yield GaugeMetricFamily("lepton_dead_letters", "Jobs given up and kept.", terms.get("dead_letters", 0))
        yield GaugeMetricFamily(
            "lepton_oldest_job_age_seconds", "Age of the oldest job that waits in a lane.", self._lanes.oldest_s
        )
        waiting = GaugeMetricFamily("lepton_lane_jobs", "Jobs that wait in a tenant's lane.", labels=["lane"])
        for name, count in self._lanes.jobs.items():
            waiting.add_metric([name], count)
        yield waiting


class _Regret(Collector):
    def __init__(self, sums: Mapping[str, float]) -> None:
        self._sums = sums

    def collect(self) -> Iterator[Metric]:
        told = self._sums.get
        yield CounterMetricFamily(
            "lepton_regret_jobs", "Jobs whose end was held against another device.", told("jobs", 0.0)
        )
        yield CounterMetricFamily(
            "lepton_regret_real_seconds", "What these took, from their dispatch to their end.", told("real_s", 0.0)
        )
        yield CounterMetricFamily(
            "lepton_regret_seconds",
            "By how much they ended later than they were predicted to on the best other device.",
            told("regret_s", 0.0),
        )
        yield CounterMetricFamily(
            "lepton_hindsight_regret_seconds",
            "What their launches took beyond what the best other device would have, by what is known now.",
            told("hindsight_s", 0.0),
        )
        counts = [told(f"ratio_{most:g}", 0.0) for most in RATIOS]
        buckets = [
            (f"{most:g}" if most < math.inf else "+Inf", sum(counts[: at + 1])) for at, most in enumerate(RATIOS)
        ]
        yield HistogramMetricFamily(
            "lepton_hindsight_ratio",
            "Seconds of a launch over those of the best other device, by what is known now; above 1 is regret.",
            buckets=buckets,
            sum_value=told("ratios", 0.0),
        )


def _age_s(message: bytes) -> float | None:
    try:
        made = made_at(wire.read_envelope(message).headers.id)
    except LeptonError:
        return None
    return None if made is None else max(0.0, time.time() - made)
