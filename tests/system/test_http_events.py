"""Event streams of a whole Lepton, followed by curl where there is one: cut off, gone on with, and exact."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from lepton_ai import event, topology
from lepton_ai.event import CloudEvent, Cursor, cloud_events
from pipeline.supervisor import Fleet
from queues.connection import Connection

GOOD = {"kernel": "linalg.matmul", "arguments": {"a": [[1.0, 2.0]], "b": [[3.0], [4.0]]}}
JOBS = 500
CURL = shutil.which("curl")


@pytest.fixture
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.http_url, timeout=30) as http:
        yield http


@contextlib.contextmanager
def following(url: str, last_id: str | None) -> Iterator[Iterator[str]]:
    """The lines of an event stream as they come."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    if CURL is None:
        with httpx.stream("GET", url, headers=headers, timeout=30) as response:
            yield response.iter_lines()
        return
    options = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    with subprocess.Popen([CURL, "-sN", *options, url], stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        yield (line.rstrip("\n") for line in curl.stdout)
        curl.kill()


def read(lines: Iterator[str]) -> Iterator[CloudEvent]:
    """Whole messages only: what a stream breaks off in is asked for again."""
    data = ""
    for line in lines:
        if line.startswith("data: "):
            data = line[6:]
        elif not line and data:
            yield msgspec.json.decode(data, type=CloudEvent)
            data = ""


def kept(fleet: Fleet, first: str, last: str) -> list[str]:
    """The ids that the stream itself holds from one CloudEvent to another."""
    connection = Connection(fleet.broker_url, "test")
    bounds = Cursor.parse(first), Cursor.parse(last)
    entries = connection.call("XRANGE", topology.EVENTS, bounds[0].entry, bounds[1].entry)
    connection.close()
    told = (each.id for entry, fields in entries for each in cloud_events(entry.decode(), event.decode(fields[1])))
    return [each for each in told if bounds[0] <= Cursor.parse(each) <= bounds[1]]


def test_a_stream_that_is_cut_again_and_again_misses_nothing_and_repeats_nothing(
    fleet: Fleet, http: httpx.Client
) -> None:
    def submit() -> None:
        for _ in range(JOBS // 25):
            assert http.post("/v1/jobs?wait_s=0.1", json=[GOOD] * 25).status_code in (200, 202)

    cuts = random.Random(7)
    seen: list[CloudEvent] = []
    ended: set[str] = set()
    last_id: str | None = None
    submitting = threading.Thread(target=submit)
    while len(ended) < JOBS:
        with following(f"{fleet.http_url}/v1/events", last_id) as lines:
            if not seen and not submitting.is_alive():
                assert next(lines) == ": connected"
                submitting.start()
            for each in itertools.islice(read(lines), cuts.randint(1, 200)):
                seen.append(each)
                last_id = each.id
                if each.type == "io.lepton.job.succeeded.v1":
                    ended.add(each.subject)
                    if len(ended) == JOBS:
                        break
    submitting.join()
    assert last_id is not None
    assert [each.id for each in seen] == kept(fleet, seen[0].id, last_id)
    for kind in ("accepted", "placed", "succeeded"):
        subjects = [each.subject for each in seen if each.type == f"io.lepton.job.{kind}.v1"]
        assert len(subjects) == len(set(subjects))
        assert ended <= set(subjects)


def test_a_jobs_stream_tells_its_life_and_ends_with_it(fleet: Fleet, http: httpx.Client) -> None:
    job = http.post("/v1/jobs", json=GOOD).json()["id"]
    for _ in range(2):  # while it runs, and once it has ended
        with following(f"{fleet.http_url}/v1/jobs/{job}/events", None) as lines:
            told = list(read(lines))
        assert [each.type.split(".")[3] for each in told] == ["accepted", "placed", "succeeded"]
        assert {each.subject for each in told} == {job}
        assert told[1].data["predicted_s"] > 0
        assert told[2].data["device"].startswith("cpu.")


def test_jobs_go_in_and_come_out_a_line_at_a_time(http: httpx.Client) -> None:
    body = b"\n".join([msgspec.json.encode(GOOD)] * 100)
    headers = {"content-type": "application/x-ndjson"}
    with http.stream("POST", "/v1/jobs?wait_s=20", content=body, headers=headers) as response:
        views = [msgspec.json.decode(line) for line in response.iter_lines()]
    assert sorted(view["index"] for view in views) == list(range(100))
    assert all(view["result"] == {"c": [[11.0]]} for view in views)
