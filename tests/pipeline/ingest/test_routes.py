"""The HTTP interface as a process of its own, over a real broker; the test plays router and worker."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from lepton_ai import Client, event, results, topology, wire
from lepton_ai.device import Announcement, Peaks
from lepton_ai.errors import DeadlineUnattainable, InvalidArguments
from lepton_ai.event import CloudEvent, Event, Observation
from lepton_ai.identity import minute_of, new_id
from lepton_ai.job import Placement, Record
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from tests.pipeline.ingest.served import problem, serving

DOUBLE = KernelSpec("test.double", {"x": "float32[n]"}, {"y": "float32[n]"}, "n", "8*n")
JOB = {"kernel": "test.double", "arguments": {"x": [1.0, 2.0]}}
NDJSON = {"content-type": "application/x-ndjson"}


def announce(connection: Connection) -> None:
    """A worker's lease, without a worker."""
    value = Announcement("w", "w", "cpu", "cpu", 1, False, Peaks(1e9, 1e9, 1e9, 0.0, 0.0), (DOUBLE,), 0.0)
    connection.many([("SET", topology.lease("w"), msgspec.msgpack.encode(value)), ("SADD", topology.HOLDERS, "w")])


@pytest.fixture(scope="module")
def _url(_embedded: EmbeddedBroker) -> Iterator[str]:
    with serving(_embedded.url) as (_, url):
        yield url


@pytest.fixture
def http(_url: str, connection: Connection) -> Iterator[httpx.Client]:
    announce(connection)
    with httpx.Client(base_url=_url, timeout=15) as http:
        yield http
    assert nobody_reads(connection)  # or what it holds of this test's stream would be told in the next


def nobody_reads(connection: Connection) -> bool:
    for _ in range(60):
        if b"name=lepton-ingest-events" not in connection.call("CLIENT", "LIST"):
            return True
        time.sleep(0.05)
    return False


def emit(connection: Connection, *events: Event) -> str:
    added: bytes = connection.call("XADD", topology.EVENTS, "*", event.FIELD, event.encode(*events))
    return added.decode()


def placed(*jobs: str) -> Event:
    return Event("job.placed", "router-1", jobs=jobs)


def flood(connection: Connection) -> None:
    """More than all the buffers between us and a client hold."""
    jobs = [f"{at:036}" for at in range(256)]
    connection.many([("XADD", topology.EVENTS, "*", event.FIELD, event.encode(placed(*jobs)))] * 100)


class Listener:
    """One event stream, read by a client of the standard library's sockets: nothing is buffered unseen."""

    def __init__(self, http: httpx.Client, path: str, **headers: str) -> None:
        url = urlsplit(str(http.base_url))
        self._socket = socket.create_connection((url.hostname, url.port), timeout=10)
        lines = [f"GET {path} HTTP/1.1", f"host: {url.netloc}", *(f"{name}: {text}" for name, text in headers.items())]
        self._socket.sendall("\r\n".join([*lines, "", ""]).replace("_", "-").encode())
        self._file = self._socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        head = (line.decode().strip().partition(": ") for line in iter(self._file.readline, b"\r\n"))
        self.headers = httpx.Headers({name: value for name, _, value in head})

    def text(self, enough: Callable[[str], object]) -> str:
        """What comes until it is enough, or the end."""
        found = b""
        while not enough(found.decode()):
            if not (size := int(self._file.readline() or b"0", 16)):
                break
            found += self._file.read(size)
            self._file.readline()
        return found.decode()

    def events(self, count: int) -> list[CloudEvent]:
        text = self.text(lambda text: text.count("\ndata: ") >= count)
        return [
            msgspec.json.decode(line[6:], type=CloudEvent) for line in text.split("\n") if line.startswith("data: ")
        ]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def listen(http: httpx.Client) -> Iterator[Callable[..., Listener]]:
    with ExitStack() as stack:

        def opened(path: str, **headers: str) -> Listener:
            listener = Listener(http, path, **headers)
            stack.callback(listener.close)
            return listener

        yield opened


@contextmanager
def worker(broker_url: str, jobs: int, end: Callable[[str, Any], Any] | None = None) -> Iterator[None]:
    """Takes so many jobs off the lane, and ends each when its `x` says so: the smallest first."""

    def work() -> None:
        connection = Connection(broker_url, "worker")
        taken = []
        for _ in range(jobs):
            _, message = connection.call("BRPOP", *topology.lane_lists(), 10)
            envelope = wire.read_envelope(message)
            x = wire.read_body(envelope, limit_bytes=10_000).kwargs["x"]
            taken.append((x[0], envelope.headers.id, wire.read_options(envelope.headers).reply_to or ""))
        for first, job, reply_to in sorted(taken):
            if first < 0:
                continue
            meta = end(job, first) if end else results.success(job, {"y": [2 * first]}, Record())
            record = results.encode(meta, "msgpack")
            note = msgspec.msgpack.encode(Placement(job, "test.double", "placed", "because", 1.0, "router-1", "cpu"))
            told = event.encode(Event("job.succeeded", "worker-1", "test.double", "cpu", (job,)))
            connection.many(
                [
                    ("HSET", topology.jobs(minute_of(job) or 0), job, note),
                    ("SET", topology.result(job), record),
                    ("RPUSH", reply_to, record),
                    ("XADD", topology.EVENTS, "*", event.FIELD, told),
                ]
            )
            time.sleep(0.01)
        connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def lines_of(*firsts: float) -> bytes:
    return b"\n".join(msgspec.json.encode(JOB | {"arguments": {"x": [first]}}) for first in firsts)


def read_lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [msgspec.json.decode(line) for line in response.text.splitlines()]


# -- /v1/events -------------------------------------------------------------------------------------------------


def test_events_come_as_server_sent_events_that_nobody_may_keep(
    listen: Callable[..., Listener], connection: Connection
) -> None:
    stream = listen("/v1/events")
    assert stream.status == 200
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert (stream.headers["cache-control"], stream.headers["x-accel-buffering"]) == ("no-store", "no")
    assert stream.text(lambda text: text.endswith("\n\n")).startswith(": connected\n")
    entry = emit(connection, placed("a", "b"))
    text = stream.text(lambda text: text.count("\n\n") == 2)
    first, second = text.strip().split("\n\n")
    assert first.startswith(f'id: {entry}.0\nevent: io.lepton.job.placed.v1\ndata: {{"id":"{entry}.0",')
    assert second.startswith(f"id: {entry}.1\n")
    assert all(block.count("\n") == 2 for block in (first, second))


def test_the_header_goes_before_the_query_and_both_are_exact(
    listen: Callable[..., Listener], connection: Connection
) -> None:
    first, second = emit(connection, placed("a", "b")), emit(connection, placed("c"))
    ids = [f"{first}.0", f"{first}.1", f"{second}.0"]
    assert [each.id for each in listen("/v1/events?since=0").events(3)] == ids
    assert [each.id for each in listen(f"/v1/events?since={ids[0]}").events(2)] == ids[1:]
    assert [each.id for each in listen(f"/v1/events?since={first}").events(1)] == ids[2:]
    assert [each.id for each in listen("/v1/events?since=0", last_event_id=ids[1]).events(1)] == ids[2:]
    assert [each.id for each in listen("/v1/events?since=0&types=job.placed&job=c").events(1)] == ids[2:]


@pytest.mark.parametrize(
    ("query", "headers", "field"),
    [
        ("since=yesterday", {}, "since"),
        ("since=", {}, "since"),
        ("since=0", {"last-event-id": "1-2-3"}, "since"),
        ("since=99999999999999999999-0", {}, "since"),
        ("types=job.placed,job.lost", {}, "types"),
    ],
)
def test_what_cannot_be_followed_is_a_problem_before_the_stream_begins(
    http: httpx.Client, query: str, headers: dict[str, str], field: str
) -> None:
    body = problem(http.get(f"/v1/events?{query}", headers=headers), 422)
    assert (body["code"], body["field"]) == ("invalid_arguments", field)


def test_a_gap_is_told(listen: Callable[..., Listener], connection: Connection) -> None:
    first = emit(connection, placed("a"))
    second = emit(connection, placed("b"))
    connection.call("XTRIM", topology.EVENTS, "MAXLEN", 1)
    gap, rest = listen("/v1/events", last_event_id=f"{first}.0").events(2)
    assert (gap.type, gap.id, gap.data["first"]) == ("io.lepton.events.missed.v1", first, second)
    assert rest.subject == "b"


@pytest.mark.parametrize("reads", [True, False], ids=["reading", "not reading"])
def test_a_client_that_goes_away_leaves_nothing_behind(
    listen: Callable[..., Listener], connection: Connection, reads: bool
) -> None:
    streams = [listen("/v1/events") for _ in range(3)]
    streams.append(listen(f"/v1/jobs/{a_placed_job(connection)}/events"))
    if reads:
        emit(connection, placed("a"))
        for stream in streams[:3]:
            stream.events(1)
    else:
        flood(connection)
        time.sleep(0.3)
    assert b"name=lepton-ingest-events" in connection.call("CLIENT", "LIST")
    for stream in streams:
        stream.close()
    assert nobody_reads(connection)


def test_hundreds_may_listen_and_others_are_served_all_the_same(
    http: httpx.Client, listen: Callable[..., Listener], connection: Connection
) -> None:
    streams = [listen("/v1/events") for _ in range(200)]
    entry = emit(connection, placed("a"))
    refused = httpx.get(f"{http.base_url}/v1/events", timeout=5)
    assert problem(refused, 503)["code"] == "unavailable"
    assert refused.headers["retry-after"] == "1"
    assert httpx.get(f"{http.base_url}/readyz", timeout=5).status_code == 200
    assert all([each.id for each in stream.events(1)] == [f"{entry}.0"] for stream in streams)


# -- /v1/jobs/{id}/events ---------------------------------------------------------------------------------------


def a_placed_job(connection: Connection) -> str:
    job = new_id()
    note = Placement(job, "test.double", "placed", "because", 1.0, "router-1", "cpu")
    connection.call("HSET", topology.jobs(minute_of(job) or 0), job, msgspec.msgpack.encode(note))
    return job


def test_a_jobs_events_are_told_from_its_beginning_to_its_end(
    http: httpx.Client, listen: Callable[..., Listener], broker_url: str, connection: Connection
) -> None:
    job = http.post("/v1/jobs", json=JOB).json()["id"]
    emit(connection, placed("other", job))
    running, again = listen(f"/v1/jobs/{job}/events"), listen(f"/v1/jobs/{job}/events")
    first, second = running.events(2)
    assert [each.type.split(".")[3] for each in (first, second)] == ["accepted", "placed"]
    assert (first.subject, first.data) == (job, {"kernel": "test.double"})
    with worker(broker_url, 1):
        (third,) = running.events(1)
        assert third.type == "io.lepton.job.succeeded.v1"
        assert running.text(lambda _: False) == ""
    assert again.events(9) == [first, second, third]
    assert listen(f"/v1/jobs/{job}/events").events(9) == [first, second, third]
    assert listen(f"/v1/jobs/{job}/events", last_event_id=first.id).events(9) == [second, third]
    assert listen(f"/v1/jobs/{job}/events", last_event_id=third.id).status == 204


def test_of_a_job_whose_end_is_no_longer_kept_that_is_told_and_no_more_waited_for(
    http: httpx.Client, listen: Callable[..., Listener], broker_url: str, connection: Connection
) -> None:
    with worker(broker_url, 1):
        job = http.post("/v1/jobs?wait_s=5", json=JOB).json()["id"]
    first = emit(connection, placed("other"))
    connection.call("XTRIM", topology.EVENTS, "MAXLEN", 1)
    (gap,) = listen(f"/v1/jobs/{job}/events").events(9)
    assert (gap.type, gap.data["first"]) == ("io.lepton.events.missed.v1", first)


def test_a_foreign_jobs_events_are_looked_for_in_all_that_is_kept(
    listen: Callable[..., Listener], connection: Connection
) -> None:
    emit(connection, placed("foreign"))
    emit(connection, placed("other"))
    meta = results.encode(results.success("foreign", {"y": 1}, Record()), "json")
    connection.call("SET", topology.result("foreign"), meta)
    (only,) = listen("/v1/jobs/foreign/events").events(9)
    assert only.subject == "foreign"


def test_the_events_of_an_unknown_job_are_404(http: httpx.Client) -> None:
    assert problem(http.get(f"/v1/jobs/{new_id()}/events"), 404)["code"] == "unknown_job"


# -- DELETE -----------------------------------------------------------------------------------------------------


def test_an_unknown_job_cannot_be_cancelled(http: httpx.Client, connection: Connection) -> None:
    assert problem(http.delete(f"/v1/jobs/{new_id()}"), 404)["code"] == "unknown_job"
    assert connection.call("EXISTS", topology.CANCELLED, topology.EVENTS) == 0


def test_a_job_that_has_ended_keeps_its_result(http: httpx.Client, broker_url: str, connection: Connection) -> None:
    with worker(broker_url, 1):
        done = http.post("/v1/jobs?wait_s=5", json=JOB).json()
    answer = http.delete(f"/v1/jobs/{done['id']}")
    assert (answer.status_code, answer.json()["result"]) == (200, done["result"])
    assert connection.call("EXISTS", topology.CANCELLED) == 0


def test_cancelling_leaves_a_mark_and_an_event_and_says_how_the_job_stands(
    http: httpx.Client, listen: Callable[..., Listener], connection: Connection
) -> None:
    job = http.post("/v1/jobs", json=JOB).json()["id"]
    answer = http.delete(f"/v1/jobs/{job}")
    assert answer.status_code == 202
    assert answer.json() == {"id": job, "kernel": "test.double", "state": "waiting"}
    assert connection.call("ZRANGE", topology.CANCELLED, 0, -1) == [job.encode()]
    accepted, asked = listen(f"/v1/jobs/{job}/events").events(2)
    assert asked.type == "io.lepton.job.cancel_asked.v1"
    assert asked.source == accepted.source
    assert asked.source.startswith("/lepton/ingest-")


def test_cancelling_may_wait_for_the_end(http: httpx.Client, broker_url: str) -> None:
    job = http.post("/v1/jobs", json=JOB).json()["id"]
    assert http.delete(f"/v1/jobs/{job}?wait_s=0.05").status_code == 202
    with worker(broker_url, 1):
        answer = http.delete(f"/v1/jobs/{job}?wait_s=5")
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert problem(http.delete(f"/v1/jobs/{job}?wait_s=soon"), 422)["field"] == "wait_s"


# -- one job a line ---------------------------------------------------------------------------------------------


def test_jobs_one_a_line_are_answered_one_a_line_in_order(http: httpx.Client, connection: Connection) -> None:
    response = http.post("/v1/jobs", content=b"\n" + lines_of(1, 2) + b"\r\n \n" + lines_of(3) + b"\n", headers=NDJSON)
    assert response.status_code == 202
    views = read_lines(response)
    assert [(view["index"], view["state"]) for view in views] == [(0, "waiting"), (1, "waiting"), (2, "waiting")]
    queued = connection.call("LRANGE", topology.LANE, 0, -1)[::-1]
    assert [wire.read_envelope(message).headers.id for message in queued] == [view["id"] for view in views]


def test_no_lines_are_no_jobs(http: httpx.Client) -> None:
    response = http.post("/v1/jobs?wait_s=5", content=b"\n\n", headers=NDJSON)
    assert read_lines(response) == []


def test_each_line_comes_when_its_job_ends_and_the_rest_when_time_is_over(
    http: httpx.Client, broker_url: str, connection: Connection
) -> None:
    body = lines_of(3, -1, 1, 2)  # a negative one does not end
    with (
        worker(broker_url, 4),
        http.stream("POST", "/v1/jobs?wait_s=1", content=body, headers=NDJSON) as response,
    ):
        assert response.status_code == 200
        assert response.headers["transfer-encoding"] == "chunked"
        came = [(msgspec.json.decode(line), time.monotonic()) for line in response.iter_lines()]
    assert [(view["index"], view["state"]) for view, _ in came] == [
        *((2, "succeeded"), (3, "succeeded"), (0, "succeeded")),
        (1, "waiting"),
    ]
    assert [view["result"]["y"] for view, _ in came[:3]] == [[2.0], [4.0], [6.0]]
    assert {view["record"]["placement"]["reason"] for view, _ in came[:3]} == {"because"}
    assert came[3][1] - came[2][1] > 0.5


def test_what_remains_is_told_as_it_stands(http: httpx.Client, connection: Connection) -> None:
    def place() -> None:
        _, message = connection.call("BRPOP", *topology.lane_lists(), 10)
        job = wire.read_envelope(message).headers.id
        note = Placement(job, "test.double", "placed", "because", 1.0, "router-1", "cpu")
        connection.call("HSET", topology.jobs(minute_of(job) or 0), job, msgspec.msgpack.encode(note))

    thread = threading.Thread(target=place)
    thread.start()
    response = http.post("/v1/jobs?wait_s=0.3", content=lines_of(1, 2), headers=NDJSON)
    thread.join()
    views = read_lines(response)
    assert sorted(view["state"] for view in views) == ["placed", "waiting"]
    (record,) = [view["record"] for view in views if view["state"] == "placed"]
    assert record["placement"]["device"] == "cpu"


@pytest.mark.parametrize("form", ["json", "msgpack", "one"])
def test_whoever_accepts_lines_gets_lines(http: httpx.Client, broker_url: str, form: str) -> None:
    jobs: Any = [JOB | {"arguments": {"x": [first]}} for first in (2.0, 1.0)]
    jobs = jobs[:1] if form == "one" else jobs
    encode = msgspec.msgpack.encode if form == "msgpack" else msgspec.json.encode
    kind = "application/x-msgpack" if form == "msgpack" else "application/json"
    headers = {"content-type": kind, "accept": "application/x-ndjson"}
    with worker(broker_url, len(jobs)):
        body = encode(jobs[0] if form == "one" else jobs)
        views = read_lines(http.post("/v1/jobs?wait_s=5", content=body, headers=headers))
    assert [(view["index"], view["state"]) for view in views] == [(1, "succeeded"), (0, "succeeded")][-len(jobs) :]


def test_a_failure_is_a_line_like_any_other_and_no_number_is_null(http: httpx.Client, broker_url: str) -> None:
    def end(job: str, first: float) -> Any:
        if first > 1:
            return results.failure(job, InvalidArguments("x is odd", "x"))
        return results.success(job, {"y": [float("nan"), float("inf")]}, Record())

    with worker(broker_url, 2, end):
        good, bad = read_lines(http.post("/v1/jobs?wait_s=5", content=lines_of(1, 2), headers=NDJSON))
    assert good["result"]["y"] == [None, None]
    assert (bad["state"], bad["error"]["field"], bad["index"]) == ("failed", "x", 1)


@pytest.mark.parametrize(
    ("line", "status", "code", "field"),
    [
        (b"{", 400, "malformed", None),
        (b"\xff", 400, "malformed", None),
        (b"[" * 100_000, 422, "invalid_arguments", None),
        (b"[]", 422, "invalid_arguments", None),
        (b'{"kernel": "test.double"}', 422, "invalid_arguments", "arguments"),
        (b'{"kernel": "test.double", "arguments": {"x": "a"}}', 422, "invalid_arguments", "x"),
        (b'{"kernel": "test.double", "arguments": {}}', 422, "invalid_arguments", "x"),
        (
            b'{"kernel": "test.double", "arguments": {"x": {"dtype": "<f8", "shape": [1], "blob": "redis:%b:1"}}}'
            % (b"0" * 16),
            422,
            "invalid_arguments",
            "x",
        ),
        (b'{"kernel": "no.such", "arguments": {}}', 404, "unknown_kernel", "kernel"),
        (
            b'{"kernel": "test.double", "arguments": {"x": [1]}, "priority": 99}',
            422,
            "option_not_supported",
            "priority",
        ),
    ],
    ids=["cut", "no text", "deep", "a list", "no arguments", "strings", "missing", "a blob", "kernel", "priority"],
)
@pytest.mark.parametrize("wait", ["", "?wait_s=5"])
def test_one_bad_line_refuses_them_all_and_is_named(
    http: httpx.Client, connection: Connection, line: bytes, status: int, code: str, field: str | None, wait: str
) -> None:
    body = lines_of(1, 2) + b"\n\n" + line + b"\n" + lines_of(3)
    found = problem(http.post(f"/v1/jobs{wait}", content=body, headers=NDJSON), status)
    assert (found["code"], found.get("field"), found["index"]) == (code, field, 2)
    assert connection.call("EXISTS", *topology.lane_lists(), topology.EVENTS) == 0


def test_the_limit_holds_for_lines(http: httpx.Client) -> None:
    assert problem(http.post("/v1/jobs", content=b"\n" * (9 << 20), headers=NDJSON), 413)["code"] == "too_large"


def test_a_job_by_itself_has_no_index(http: httpx.Client) -> None:
    wrong = JOB | {"kernel": "no.such"}
    assert "index" not in problem(http.post("/v1/jobs", json=wrong), 404)
    assert problem(http.post("/v1/jobs", json=[wrong]), 404)["index"] == 0


# -- the end of the service -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stuck", [False, True], ids=["all read", "some do not read"])
def test_the_service_ends_at_once_whoever_listens(broker_url: str, connection: Connection, stuck: bool) -> None:
    announce(connection)
    with ExitStack() as stack:
        process, url = stack.enter_context(serving(broker_url))
        http = stack.enter_context(httpx.Client(base_url=url, timeout=15))
        job = http.post("/v1/jobs", json=JOB).json()["id"]
        streams = [Listener(http, path) for path in ("/v1/events", "/v1/events", f"/v1/jobs/{job}/events")]
        for stream in streams:
            stack.callback(stream.close)
        if stuck:
            flood(connection)
        asking: list[dict[str, Any]] = [{"json": JOB}, {"content": lines_of(1, 2), "headers": NDJSON}]
        threads = [threading.Thread(target=http.post, args=("/v1/jobs?wait_s=30",), kwargs=each) for each in asking]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        started_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - started_s < 2
        for thread in threads:
            thread.join()
        if not stuck:
            assert all(": connected" in stream.text(lambda _: False) for stream in streams)  # to its proper end


# -- OpenAPI ----------------------------------------------------------------------------------------------------


def test_openapi_has_every_way_in_and_out(http: httpx.Client) -> None:
    paths = http.get("/openapi/openapi.json").json()["paths"]
    ndjson, post = "application/x-ndjson", paths["/v1/jobs"]["post"]
    assert set(post["requestBody"]["content"]) == {"application/json", "application/x-msgpack", ndjson}
    assert set(post["responses"]) == {"200", "202", "default"}
    line = post["responses"]["200"]["content"][ndjson]["schema"]
    assert {"id", "state", "result", "index"} <= set(line["properties"])
    events, of_job = paths["/v1/events"]["get"], paths["/v1/jobs/{job_id}/events"]["get"]
    assert {(each["name"], each["in"]) for each in events["parameters"]} == {
        *(("since", "query"), ("types", "query"), ("job", "query"), ("last-event-id", "header"))
    }
    assert {each["name"] for each in of_job["parameters"]} == {"job_id", "last-event-id"}
    for each in (events, of_job):
        told = each["responses"]["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"]
        assert "specversion" in told["contentSchema"]["properties"]
    cancel = paths["/v1/jobs/{job_id}"]["delete"]
    assert set(cancel["responses"]) == {"200", "202", "default"}
    assert {each["name"] for each in cancel["parameters"]} == {"job_id", "wait_s"}
    problems = cancel["responses"]["default"]["content"]["application/problem+json"]["schema"]
    assert "index" in problems["properties"]


# -- deadlines that must be met -------------------------------------------------------------------------------------


def test_a_job_that_cannot_meet_its_deadline_is_refused_with_the_estimate(
    http: httpx.Client, connection: Connection
) -> None:
    model, peaks = CostModel(), Peaks(1e9, 1e9, 1e9, 0.0, 0.0)
    for _ in range(400):
        model.learn(Observation("test.double", "cpu", 1, 2.0, 16.0, 1e-6, 0.01, 8.0), peaks)
    connection.call("SET", topology.MODEL, model.snapshot())
    time.sleep(0.6)  # what the ingest has read for another test is no older
    found = problem(http.post("/v1/jobs", json={**JOB, "deadline_s": 0.002, "must_meet": True}), 409)
    assert (found["code"], found["field"]) == ("deadline_unattainable", "deadline_s")
    assert found["estimate_s"] == pytest.approx(0.01, rel=0.3)
    with Client(str(http.base_url)) as client, pytest.raises(DeadlineUnattainable) as raised:
        client.submit("test.double", {"x": [1.0, 2.0]}, deadline_s=0.002, must_meet=True)
    assert raised.value.estimate_s == pytest.approx(0.01, rel=0.3)
    assert http.post("/v1/jobs", json={**JOB, "deadline_s": 60, "must_meet": True}).status_code == 202
