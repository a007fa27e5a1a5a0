"""`/metrics` and `/v1/accounts`, as Prometheus and programs read them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from lepton_ai import Client, topology
from lepton_ai.job import Options
from lepton_ai.wire import envelope
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from tests.pipeline.ingest.served import serving


@pytest.fixture(scope="module")
def ingest_url(_embedded: EmbeddedBroker) -> Iterator[str]:
    with serving(_embedded.url) as (_, url):
        yield url


def scrape(url: str) -> dict[tuple[str, str], float]:
    """Every sample by its name and its only label."""
    answered = httpx.get(f"{url}/metrics", timeout=15)
    assert answered.status_code == 200
    assert answered.headers["content-type"] == CONTENT_TYPE_LATEST
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(answered.text)
        for sample in family.samples
    }


def test_the_accounts_are_metrics(ingest_url: str, connection: Connection) -> None:
    connection.call("HSET", topology.COUNTERS, "accepted", 10, "succeeded", 7, "dead", 1, "fenced", 4, "replayed", 2)
    connection.call("XADD", topology.DEAD, "*", "reason", "r")
    connection.call("SADD", topology.DEVICES, "cpu")
    connection.call("LPUSH", topology.device_queue("cpu"), "x")
    found = scrape(ingest_url)
    for name, label, value in (
        ("lepton_jobs_accepted_total", "", 10),
        ("lepton_jobs_total", "succeeded", 7),
        ("lepton_jobs_total", "dead", 1),
        ("lepton_jobs_total", "expired", 0),
        ("lepton_jobs_waiting", "", 0),
        ("lepton_jobs_in_flight", "", 1),
        ("lepton_conservation_difference", "", 1),
        ("lepton_fenced_commits_total", "", 4),
        ("lepton_jobs_replayed_total", "", 2),
        ("lepton_dead_letters", "", 1),
        ("lepton_oldest_job_age_seconds", "", 0),
        ("lepton_lane_jobs", "_default", 0),
    ):
        assert found[name, label] == value


def test_lanes_are_told_up_to_a_number(ingest_url: str, broker_url: str, connection: Connection) -> None:
    for at in range(30):
        with Client(broker_url, tenant=f"t{at}") as client:
            client.submit_many("a.b", [{"x": 1}] * (at + 1))
    found = {label: value for (name, label), value in scrape(ingest_url).items() if name == "lepton_lane_jobs"}
    assert len(found) == 21
    assert (found["_default"], found["t29"], found["t11"]) == (0, 30, 12)
    assert found["_others"] == sum(range(1, 12))


def test_the_jobs_of_bundles_are_told_lane_by_lane(ingest_url: str, broker_url: str) -> None:
    with Client(broker_url) as client, Client(broker_url, tenant="ann") as ann:
        client.submit_many("a.b", [{"x": 1}] * 9)
        ann.submit_many("a.b", [{"x": 1}] * 300)
    told = httpx.get(f"{ingest_url}/metrics").text
    assert 'lepton_lane_jobs{lane="_default"} 9.0' in told
    assert 'lepton_lane_jobs{lane="ann"} 300.0' in told
    assert "lepton_jobs_accepted_total 309.0" in told


def test_the_oldest_job_that_waits_has_an_age(ingest_url: str, connection: Connection) -> None:
    for job in ("0190163d-8694-739b-aea5-966c26f8ad91", "no uuid"):  # made in 2024
        connection.call("LPUSH", topology.lane_list(1), envelope(job, "a.b", {}, Options()))
    assert scrape(ingest_url)["lepton_oldest_job_age_seconds", ""] > 3e7
    connection.call("RPOP", topology.lane_list(1))
    connection.call("RPUSH", topology.lane_list(1), "odd")
    assert scrape(ingest_url)["lepton_oldest_job_age_seconds", ""] == 0


def test_the_accounts_over_http(ingest_url: str, connection: Connection) -> None:
    connection.call("LPUSH", topology.LANE, "x")
    found = httpx.get(f"{ingest_url}/v1/accounts").json()
    assert (found["accepted"], found["waiting"], found["in_flight"], found["difference"]) == (1, 1, 0, 0)
    assert found["terms"]["lanes"] == 1


def test_the_regret_of_placements_is_a_metric(ingest_url: str, connection: Connection) -> None:
    told = {"jobs": 4, "real_s": 2.5, "regret_s": 0.5, "hindsight_s": 0.25, "ratios": 6.5, "ratio_1.1": 3, "ratio_4": 1}
    connection.call("HSET", topology.REGRET, *(part for each in told.items() for part in each))
    found = scrape(ingest_url)
    assert found["lepton_regret_jobs_total", ""] == 4
    assert found["lepton_regret_real_seconds_total", ""] == 2.5
    assert found["lepton_regret_seconds_total", ""] == 0.5
    assert found["lepton_hindsight_regret_seconds_total", ""] == 0.25
    assert found["lepton_hindsight_ratio_bucket", "1.1"] == 3
    assert found["lepton_hindsight_ratio_bucket", "+Inf"] == found["lepton_hindsight_ratio_count", ""] == 4
    assert found["lepton_hindsight_ratio_sum", ""] == 6.5
