"""Bytes that mean harm, over HTTP, on the lane and on a device's queue: refused at once, and the next job succeeds."""

from __future__ import annotations

import base64
import contextlib
import json
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from lepton_ai import bundle, results, topology, wire
from lepton_ai.direct_protocol import writer
from lepton_ai.errors import LeptonError
from lepton_ai.identity import new_id, run_of
from lepton_ai.job import Options
from lepton_ai.parcel import Blobs
from lepton_ai.settings import Settings
from lepton_ai.terms import Terms
from pipeline import intake
from pipeline.supervisor import Fleet, run_fleet
from queues.connection import Connection
from tasks import batching
from tasks.catalogue import load

DEVICE = "cpu.hostile"
KERNEL = "linalg.matmul"
DEEP = 200_000
LIMIT_S = 0.25
GOOD: dict[str, Any] = {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[5.0, 6.0], [7.0, 8.0]]}
PRODUCT = {"c": [[19.0, 22.0], [43.0, 50.0]]}


@pytest.fixture(scope="module")
def fleet(settings: Settings) -> Iterator[Fleet]:
    """One of this file's own, which nobody else has to look at afterwards."""
    with run_fleet(settings, {DEVICE: 1}, print) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.http_url, timeout=30) as http:
        yield http


@pytest.fixture(scope="module", autouse=True)
def _somebody_follows_celerys_events(fleet: Fleet) -> Iterator[None]:
    """So that the router and the worker tell of every job what stands in its headers."""
    with contextlib.closing(Connection(fleet.broker_url, "listener")) as connection:
        connection.send([("PSUBSCRIBE", "*celeryev*")])
        yield


@pytest.fixture
def connection(fleet: Fleet) -> Iterator[Connection]:
    with contextlib.closing(Connection(fleet.broker_url, "hostile")) as connection:
        yield connection


@pytest.fixture(autouse=True)
def _nobody_fails(fleet: Fleet, http: httpx.Client) -> Iterator[None]:
    """Afterwards a good job goes all the way, nobody has exited, and no log tells of a defect."""
    yield
    answer = http.post("/v1/jobs", json={"kernel": KERNEL, "arguments": GOOD}, params={"wait_s": 20})
    assert (answer.status_code, answer.json().get("result")) == (200, PRODUCT), answer.text
    fleet.check()
    for log in fleet.logs.iterdir():
        assert "Traceback" not in log.read_text("utf-8", "replace"), log.name


# -- HTTP -------------------------------------------------------------------------------------------------------------


def a_job(**changed: Any) -> bytes:
    return json.dumps({"kernel": KERNEL, "arguments": GOOD} | changed).encode()


def with_a(text: bytes) -> bytes:
    """A job in JSON whose argument `a` is written so."""
    return b'{"kernel":"linalg.matmul","arguments":{"b":[[1.0]],"a":' + text + b"}}"


def tensor(dtype: str = "<f4", shape: str = "[1,1]", data: str = "AACAPw==") -> bytes:
    return with_a(f'{{"dtype":"{dtype}","shape":{shape},"data":"{data}"}}'.encode())


def packed_a(value: bytes) -> bytes:
    """A job in msgpack whose argument `a` is written so."""
    return (
        b"\x82"
        + msgspec.msgpack.encode("kernel")
        + msgspec.msgpack.encode(KERNEL)
        + msgspec.msgpack.encode("arguments")
        + b"\x82"
        + msgspec.msgpack.encode("b")
        + msgspec.msgpack.encode([[1.0]])
        + msgspec.msgpack.encode("a")
        + value
    )


JSON = {
    "nothing": b"",
    "a NUL": b"\0",
    "not UTF-8": b'{"kernel": "\xff\xfe"}',
    "a BOM": b"\xef\xbb\xbf" + a_job(),
    "cut": a_job()[:-20],
    "doubled": a_job() * 2,
    "a number": b"1",
    "deep lists": b"[" * DEEP,
    "deep lists, closed": b"[" * DEEP + b"]" * DEEP,
    "deep maps": b'{"a":' * DEEP,
    "a deep kernel": b'{"kernel":' * DEEP,
    "a deep argument": with_a(b"[" * DEEP + b"]" * DEEP),
    "a deep argument of maps": with_a(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "deep where nothing is known": b'{"x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "six MB of empty maps": b"[" + b"{}," * 2_000_000 + b"{}]",
    "six MB of empty lists": with_a(b"[" + b"[]," * 2_000_000 + b"[]]"),
    "six MB of empty lists for a kernel": b'{"kernel":[' + b"[]," * 2_000_000 + b"[]]}",
    "six MB of a number": with_a(b"1" * 6_000_000),
    "six MB of digits after the point": with_a(b"0." + b"1" * 6_000_000),
    "six MB of kernel": a_job(kernel="x" * 6_000_000),
    "six MB of backslashes": b'{"kernel":"' + b"\\\\" * 3_000_000 + b'"}',
    "six MB of one unknown name": b'{"' + b"x" * 6_000_000 + b'":1}',
    "a hundred thousand arguments": a_job(arguments={f"x{at}": 1 for at in range(100_000)}),
    "beyond a float": with_a(b"[[1e400]]"),
    "below a float": with_a(b"[[-1e400]]"),
    "an exponent beyond an int": with_a(b"[[1e99999999999999999999]]"),
    "a huge int": with_a(b"[[" + b"9" * 5_000 + b"]]"),
    "an int beyond 64 bits": with_a(b"[[18446744073709551616]]"),
    "NaN": with_a(b"[[NaN]]"),
    "Infinity": with_a(b"[[-Infinity]]"),
    "a lone surrogate": a_job(kernel="\ud800"),
    "a lone surrogate as a name": with_a(b'1,"\\udfff":1'),
    "ragged": with_a(b"[[1.0],[1.0,2.0]]"),
    "a list among numbers": with_a(b"[[1.0],2.0]"),
    "an argument too few": with_a(b"null"),
    "a huge priority": a_job(priority=10**30),
    "a priority that is none": a_job(priority=1.5),
    "a device of a wrong type": a_job(device=[1]),
    "an unknown option": a_job(pickle="x"),
    "a shape of 2**62 x 2**62": tensor(shape=f"[{2**62},{2**62}]"),
    "a shape of 2**64": tensor(shape=f"[{2**64},1]"),
    "a shape that hides a huge one": tensor(shape=f"[0,{2**62}]", data=""),
    "a negative shape": tensor(shape="[-1,-1]"),
    "a shape of fractions": tensor(shape="[1.5,1]"),
    "ten thousand dimensions": tensor(shape=str([1] * 10_000).replace(" ", "")),
    "two million dimensions": tensor(shape="[" + "1," * 2_000_000 + "1]"),
    "a shape that is none": tensor(shape='"1,1"'),
    "data that are too short": tensor(data="AAAA"),
    "data that are no base64": tensor(data="!!!!"),
    "data of cut base64": tensor(data="AACAPw"),
    "a dtype of objects": tensor(dtype="|O"),
    "a dtype with fields": tensor(dtype="f4,f4,f4"),
    "a dtype of a million": tensor(dtype="(1000000,)f4"),
    "a big-endian dtype": tensor(dtype=">f4"),
    "a dtype of time": tensor(dtype="<M8[s]"),
    "an unknown member of a tensor": with_a(b'{"dtype":"<f4","shape":[1,1],"data":"AACAPw==","x":1}'),
    "gzip": zlib.compress(a_job()),
}
MSGPACK = {
    "nothing": b"",
    "never used": b"\xc1",
    "4 G of list": b"\xdd\xff\xff\xff\xff",
    "4 G of map": b"\xdf\xff\xff\xff\xff",
    "4 G of text": b"\xdb\xff\xff\xff\xff",
    "4 G of bytes": b"\xc6\xff\xff\xff\xff",
    "4 G of extension": b"\xc9\xff\xff\xff\xff\x01",
    "4 G of arguments": b"\x82\xa6kernel\xa1x\xa9arguments\xdf\xff\xff\xff\xff",
    "4 G of list in an argument": packed_a(b"\xdd\xff\xff\xff\xff"),
    "4 G of bytes in a tensor": packed_a(b"\x83\xa5dtype\xa3<f4\xa5shape\x91\x01\xa4data\xc6\xff\xff\xff\xff"),
    "4 G of shape in a tensor": packed_a(b"\x83\xa5dtype\xa3<f4\xa4data\xc4\x00\xa5shape\xdd\xff\xff\xff\xff"),
    "deep lists": b"\x91" * DEEP,
    "deep lists, closed": b"\x91" * DEEP + b"\x01",
    "deep maps": b"\x81\xa1a" * DEEP,
    "deep maps as keys": b"\x81" * DEEP,
    "a deep argument": packed_a(b"\x91" * DEEP + b"\x01"),
    "a deep argument of maps": packed_a(b"\x81\xa1a" * DEEP + b"\x01"),
    "deep where nothing is known": b"\x81\xa1x" + b"\x91" * DEEP + b"\x01",
    "four million empty lists": packed_a(b"\xdd" + (4_000_000).to_bytes(4, "big") + b"\x90" * 4_000_000),
    "four million empty maps": b"\xdd" + (4_000_000).to_bytes(4, "big") + b"\x80" * 4_000_000,
    "an extension": packed_a(b"\xd4\x01\x00"),
    "a time": packed_a(b"\xd6\xff\x00\x00\x00\x00"),
    "a name that is a number": b"\x82\x01\x02\x03\x04",
    "text that is not UTF-8": b"\x82\xa6kernel\xa2\xff\xfe\xa9arguments\x80",
    "NaN and infinity": packed_a(b"\x91\x92\xcb\x7f\xf8" + bytes(6) + b"\xcb\x7f\xf0" + bytes(6)),
    "a list among numbers": packed_a(b"\x92\x91\x01\x01"),
    "trailing bytes": msgspec.msgpack.encode({"kernel": KERNEL, "arguments": GOOD}) + b"\x00",
    "cut": msgspec.msgpack.encode({"kernel": KERNEL, "arguments": GOOD})[:-3],
    "JSON": a_job(),
}
NDJSON = {
    "deep lists": b"[" * DEEP + b"\n",
    "a good line, then deep ones": a_job() + b"\n" + b'{"a":' * DEEP,
    "a good line, then a cut one": a_job() + b"\n" + a_job()[:30],
    "half a million lines of one bracket": b"[\n" * 500_000,
    "three million empty lines, then nothing": b"\n" * 3_000_000 + b"[",
    "one line of zeros": bytes(1_000_000),
    "a lone surrogate": b'{"kernel":"\\ud800","arguments":{}}\n',
}
BODIES = [
    *((wire.JSON, name, body) for name, body in JSON.items()),
    *((wire.MSGPACK, name, body) for name, body in MSGPACK.items()),
    *(("application/x-ndjson", name, body) for name, body in NDJSON.items()),
]


def post(http: httpx.Client, body: bytes, media: str) -> tuple[httpx.Response, float]:
    began = time.perf_counter()
    answer = http.post("/v1/jobs", content=body, headers={"content-type": media})
    return answer, time.perf_counter() - began


def is_refusal(answer: httpx.Response) -> bool:
    """The caller's fault, told in the form of all problems and in few words."""
    return (
        400 <= answer.status_code < 500
        and answer.headers["content-type"] == "application/problem+json"
        and len(answer.content) < 10_000
    )


def test_every_hostile_body_is_refused_at_once(http: httpx.Client) -> None:
    slow, odd = {}, {}
    for media, name, body in BODIES:
        answer, took_s = post(http, body, media)
        if not is_refusal(answer):
            odd[media, name] = answer.status_code, answer.text[:200]
        if took_s >= LIMIT_S:  # the machine may have been busy
            took_s = min(post(http, body, media)[1] for _ in range(3))
            slow[media, name] = round(took_s, 3)
    assert not odd
    assert not {name: took_s for name, took_s in slow.items() if took_s >= LIMIT_S}


@pytest.mark.parametrize("media", [wire.JSON, wire.MSGPACK, "application/x-ndjson"])
def test_a_request_of_too_many_jobs_is_refused(http: httpx.Client, media: str) -> None:
    encode = msgspec.msgpack.encode if media == wire.MSGPACK else msgspec.json.encode
    jobs = [{"kernel": KERNEL, "arguments": {"a": [[1]], "b": [[1]]}}] * 10_001
    body = b"\n".join(map(encode, jobs)) if media == "application/x-ndjson" else encode(jobs)
    answer, _ = post(http, body, media)
    assert (answer.status_code, answer.json()["detail"]) == (413, "one request takes at most 10000 jobs")


def test_of_two_arguments_of_one_name_the_last_counts(http: httpx.Client) -> None:
    body = b'{"kernel":"x","kernel":"linalg.matmul","arguments":{"a":[[2.0]],"a":[[3.0]],"b":[[1.0]]}}'
    answer = http.post("/v1/jobs?wait_s=10", content=body, headers={"content-type": wire.JSON})
    assert answer.json()["result"] == {"c": [[3.0]]}


# -- the lane and the device's queue ----------------------------------------------------------------------------------


def message(*path: str, to: Any = None, body: bytes | None = None, job: str = "", **headers: Any) -> bytes:
    """A good message of a job in which one place, some headers or the body say something else."""
    found = json.loads(wire.envelope(job or new_id(), KERNEL, GOOD, Options()))
    found["headers"] |= headers
    if body is not None:
        found["body"] = base64.b64encode(body).decode()
    place = found
    for step in path[:-1]:
        place = place[step]
    if path:
        place[path[-1]] = to
    return json.dumps(found).encode()


def protocol_1() -> bytes:
    """As Celery 3 wrote: the task is in the body."""
    body = {"task": KERNEL, "id": new_id(), "args": [], "kwargs": GOOD, "retries": 0, "eta": None, "expires": None}
    found = json.loads(message())
    headers = {"headers": {}, "content-type": wire.JSON, "body": base64.b64encode(json.dumps(body).encode()).decode()}
    return json.dumps(found | headers).encode()


def with_body(kwargs: bytes) -> bytes:
    """A body in msgpack whose arguments are written so."""
    return b"\x93\x90" + kwargs + b"\x80"


#: What is no message of a task at all.
NO_MESSAGES = {
    "nothing but a NUL": b"\0",
    "text": b"hello",
    "a number": b"1",
    "foreign JSON": b'{"jsonrpc":"2.0","method":"x","id":1}',
    "a list": b"[]",
    "null": b"null",
    "cut": message()[:-40],
    "cut in the body": message()[:60],
    "doubled": message() * 2,
    "not UTF-8": message().replace(b"linalg", b"\xff\xfe\xff"),
    "a lone surrogate": message(task="\ud800"),
    "a lone surrogate beside NaN": message(task="\ud800", retries=float("nan")),
    "a lone surrogate as id": message("headers", "id", to="\udc80"),
    "protocol 1": protocol_1(),
    "deep lists": b"[" * DEEP,
    "deep maps": b'{"headers":' * DEEP,
    "a deep header": message().replace(b'"eta": null', b'"eta":' + b"[" * DEEP + b"]" * DEEP),
    "a deep body": message().replace(b'"body": "', b'"body":' + b"[" * DEEP + b"]" * DEEP + b',"b":"', 1),
    "msgpack": msgspec.msgpack.encode({"kernel": KERNEL}),
    "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "no headers": message("headers", to=None),
    "headers of a wrong type": message("headers", to=[1]),
    "no id": message("headers", "id", to=None),
    "an id that is a number": message("headers", "id", to=10**30),
    "a task that is a list": message("headers", "task", to=[]),
    "retries beyond any float": message().replace(b'"retries": 0', b'"retries": 1e400'),
    "an id of a megabyte": message("headers", "id", to="x" * 1_000_000),
    "an empty id": message("headers", "id", to=""),
    "a task of a megabyte": message("headers", "task", to="x" * 1_000_000),
    "a priority of five thousand digits": message().replace(b'"priority": 0', b'"priority": ' + b"9" * 5000),
    "a body that is a map": message("body", to={}),
    "compression that is a number": message(compression=7),
    "expires that is a map": message(expires={}),
}
#: Messages of tasks that cannot be run as they are: whoever waits for one is told why.
REFUSED: dict[str, dict[str, Any]] = {
    "a body of garbage": {"body": b"\xc1\xc1\xc1"},
    "a body that is no base64": {"path": ("body",), "to": "!!!"},
    "a body of cut base64": {"path": ("body",), "to": "k5CC"},
    "an empty body": {"body": b""},
    "a body that is not in its encoding": {"path": ("properties", "body_encoding"), "to": None},
    "a gzip bomb": {"body": zlib.compress(bytes(200_000_000), 9), "compression": "application/x-gzip"},
    "gzip that is cut": {"body": zlib.compress(bytes(1000))[:-4], "compression": "application/x-gzip"},
    "gzip that is none": {"compression": "application/x-gzip"},
    "bzip2": {"compression": "application/x-bz2"},
    "a body of pickle": {"path": ("content-type",), "to": "application/x-python-serialize"},
    "a body of yaml": {"path": ("content-type",), "to": "application/x-yaml"},
    "JSON that is msgpack": {"path": ("content-type",), "to": wire.JSON},
    "a body that is a map": {"body": b"\x80"},
    "positional arguments": {"body": b"\x93\x91\x01\x80\x80"},
    "4 G of arguments": {"body": with_body(b"\xdf\xff\xff\xff\xff")},
    "4 G of list": {"body": with_body(b"\x81\xa1a\xdd\xff\xff\xff\xff")},
    "4 G of bytes": {"body": with_body(b"\x81\xa1a\xc6\xff\xff\xff\xff")},
    "deep lists": {"body": with_body(b"\x81\xa1a" + b"\x91" * DEEP + b"\x01")},
    "deep maps": {"body": with_body(b"\x81\xa1a" * DEEP + b"\x01")},
    "deep callbacks": {"body": b"\x93\x90\x80" + b"\x91" * DEEP + b"\x01"},
    "an argument that is an extension": {"body": with_body(b"\x81\xa1a\xd4\x01\x00")},
    "arguments that do not fit": {"body": with_body(b"\x81\xa1z\x01")},
    "an unknown option": {"lepton": {"pickle": "x"}},
    "options that are a list": {"lepton": [1]},
    "a priority beyond all": {"lepton": {"priority": 10**30}},
    "a limit of no time": {"lepton": {"limit_s": -1}},
    "a reply to somebody else's key": {"lepton": {"reply_to": "lepton:lease:x"}},
    "a result in pickle": {"lepton": {"result": "pickle"}},
    "an end that is no time": {"expires": "tomorrow"},
    "an end beyond all time": {"expires": 1e308},
    "an end before all time": {"expires": -1e308},
}
#: Declared sizes that are no sizes, beside a job that is a good one.
SHAPES: dict[str, Any] = {
    "none": None,
    "huge": {"a": [2**62, 2**62], "b": [2**62, 2**62]},
    "beyond any number": {"a": [10**300, 10**300], "b": [10**300, 10**300]},
    "negative": {"a": [-1, 2], "b": [2, -(10**18)]},
    "fractions": {"a": [1.5, 2], "b": [2, 1e308]},
    "ten thousand": {"a": [1] * 10_000, "b": [1] * 10_000},
    "text": {"a": "2,2", "b": {"x": []}},
    "others": {f"x{at}": [1] for at in range(1000)},
    "empty": {},
    "deep": {"a": [[[[[[[[]]]]]]]]},
}


#: What only those who watch are told.
ODD_HEADERS: dict[str, Any] = {"retries": 10**1000, "argsrepr": [1], "kwargsrepr": "\0\x1b[2J", "origin": {}}


def refused(job: str, given: dict[str, Any]) -> bytes:
    given = dict(given)
    return message(*given.pop("path", ()), job=job, **given)


def good() -> tuple[str, bytes]:
    job = new_id()
    return job, wire.envelope(job, KERNEL, GOOD, Options(device=DEVICE))


def result(connection: Connection, job: str, timeout_s: float = 20.0) -> Any:
    """The record of a job, once it has ended."""
    deadline = time.monotonic() + timeout_s
    while (found := connection.call("GET", topology.result(job))) is None:
        assert time.monotonic() < deadline, f"{job} has not ended"
        time.sleep(0.01)
    return results.read(found)


def dead(connection: Connection) -> dict[bytes, bytes]:
    """What is kept of what was no message, with the reason."""
    found = {}
    for _, fields in connection.call("XRANGE", topology.DEAD, "-", "+"):
        pairs = dict(zip(fields[::2], fields[1::2], strict=True))
        found[pairs[b"message"]] = pairs[b"reason"]
    return found


def test_what_comes_by_the_lane_and_is_no_message_is_kept_with_the_reason(connection: Connection) -> None:
    job, last = good()
    connection.call("DEL", topology.DEAD)
    connection.many([("LPUSH", topology.LANE, each) for each in [*NO_MESSAGES.values(), last]])
    assert result(connection, job).status == "SUCCESS"
    found = dead(connection)
    named = {name: told for name, each in NO_MESSAGES.items() if (told := wire.read_names(each)) is not None}
    assert {name for name, each in NO_MESSAGES.items() if each not in found} == named.keys()
    assert len(found) == len(NO_MESSAGES) - len(named)
    assert {name for name, told in named.items() if result(connection, told.id).status != "FAILURE"} == set()
    assert all(0 < len(reason) < 3000 for reason in found.values())


@pytest.mark.parametrize("queue", [topology.LANE, topology.device_queue(DEVICE)])
def test_whoever_waits_for_a_job_that_cannot_be_run_is_told_why(connection: Connection, queue: str) -> None:
    jobs = {name: new_id() for name in REFUSED}
    sent = [refused(jobs[name], given) for name, given in REFUSED.items()]
    job, last = good()
    connection.many([("LPUSH", queue, each) for each in [*sent, last]])
    found = {name: result(connection, jobs[name]) for name in REFUSED}
    assert {name: meta.status for name, meta in found.items() if meta.status != "FAILURE"} == {}
    assert all(meta.lepton.error["message"] for meta in found.values())
    assert result(connection, job).status == "SUCCESS"


@pytest.mark.parametrize("queue", [topology.LANE, topology.device_queue(DEVICE)])
def test_a_job_runs_whatever_its_sender_says_of_its_sizes(connection: Connection, queue: str) -> None:
    jobs = {name: new_id() for name in SHAPES}
    sent = [message(job=jobs[name], lepton={"shapes": each}, **ODD_HEADERS) for name, each in SHAPES.items()]
    connection.many([("LPUSH", queue, each) for each in sent])
    found = {name: result(connection, jobs[name]) for name in SHAPES}
    assert {name: meta.status for name, meta in found.items() if meta.status != "SUCCESS"} == {}


def test_no_bytes_on_a_device_queue_hold_its_worker_up(connection: Connection) -> None:
    job, last = good()
    queue = topology.device_queue(DEVICE)
    connection.many([("LPUSH", queue, each) for each in [*NO_MESSAGES.values(), last]])
    assert result(connection, job).result == PRODUCT
    assert connection.call("LLEN", queue) == 0


# -- mutations of a good message --------------------------------------------------------------------------------------


@st.composite
def mutations(draw: st.DrawFn, of: bytes) -> bytes:
    """The bytes with some of them changed, cut out, doubled, or put in."""
    found = bytearray(of)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        end = at + draw(st.integers(1, 40))
        how = draw(st.sampled_from(["flip", "cut", "double", "insert", "end"]))
        if how == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del found[at:end]
        elif how == "double":
            found[at:at] = found[at:end]
        elif how == "insert":
            found[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            del found[at:]
    return bytes(found)


KERNELS = load(()).kernels
BUSY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
FIXED = message(job="01a209f7-43bd-7419-beb0-277708b1d2ea")


def bundle_of(first: str, count: int = 5) -> bytes:
    write = writer(KERNEL, Terms(Options(device=DEVICE)), None, Blobs(0))
    ((found, _),) = bundle.bundled([write(job, GOOD) for job in run_of(first, count)])  # type: ignore[misc]
    return found


BUNDLE = bundle_of("01a209f7-43bd-7419-beb0-277708b1d000")


@tries(max_examples=400, suppress_health_check=BUSY)
@given(mutations(FIXED), st.booleans())
def test_no_mutation_makes_a_reader_raise(changed: bytes, in_body: bool) -> None:
    if in_body:
        changed = message(body=changed)
    assert isinstance(intake.read(changed, 0.0), intake.Incoming | intake.Refused | intake.Dead)
    found = batching.read(changed, KERNELS, 1 << 20)
    assert isinstance(found, batching.TakenJob | batching.Refused | batching.Unreadable)


def ids_in(read: intake.Incoming | intake.Refused | intake.Dead) -> tuple[str, ...]:
    """Of how many jobs a router knows by a message, and of which."""
    if isinstance(read, intake.Incoming):
        return read.ids
    return (read.headers.id,) if isinstance(read, intake.Refused) else ("",)


@tries(max_examples=1500, suppress_health_check=BUSY)
@given(mutations(BUNDLE), st.integers(1, 5))
def test_of_every_mutation_of_a_bundle_router_and_worker_count_the_same_jobs(changed: bytes, most: int) -> None:
    expected = ids_in(intake.read(changed, 0.0))
    found = batching.read_all(changed, KERNELS, 1 << 20)
    assert len(found) == len(expected)
    if len(found) > 1:
        assert tuple(each.id for each in found if not isinstance(each, batching.Unreadable)) == expected
    try:
        parts = bundle.split(changed, most) if len(expected) > 1 else [changed]
    except LeptonError:
        assert all(isinstance(each, batching.Refused) for each in found)
        return
    assert tuple(job for part in parts for job in ids_in(intake.read(part, 0.0))) == expected


@tries(max_examples=12, suppress_health_check=BUSY)
@given(st.lists(mutations(BUNDLE), min_size=20, max_size=60))
def test_no_mutation_of_a_bundle_holds_up_the_job_behind_it(connection: Connection, changed: list[bytes]) -> None:
    for queue in (topology.LANE, topology.AGAIN, topology.ALONE, topology.device_queue(DEVICE)):
        job, last = good()
        connection.many([("LPUSH", queue, each) for each in [*filter(None, changed), last]])
        assert result(connection, job).result == PRODUCT


@tries(max_examples=12, suppress_health_check=BUSY)
@given(st.lists(mutations(FIXED), min_size=20, max_size=60))
def test_no_mutation_holds_up_the_job_behind_it(connection: Connection, changed: list[bytes]) -> None:
    for queue in (topology.LANE, topology.device_queue(DEVICE)):
        job, last = good()
        connection.many([("LPUSH", queue, each) for each in [*filter(None, changed), last]])
        assert result(connection, job).result == PRODUCT


BODY_BYTES = {
    wire.JSON: a_job(),
    wire.MSGPACK: msgspec.msgpack.encode({"kernel": KERNEL, "arguments": GOOD}),
    "application/x-ndjson": a_job() + b"\n" + a_job() + b"\n",
}


@pytest.mark.parametrize("media", BODY_BYTES)
@tries(max_examples=60, suppress_health_check=BUSY)
@given(data=st.data())
def test_every_mutation_of_a_request_is_a_job_or_a_refusal(http: httpx.Client, media: str, data: st.DataObject) -> None:
    answer, _ = post(http, data.draw(mutations(BODY_BYTES[media])), media)
    assert answer.status_code == 202 or is_refusal(answer), answer.text
