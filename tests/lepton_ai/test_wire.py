"""The envelope, pinned to kombu 5.7 and Celery 5.7 in both directions, and closed to everything else."""

from __future__ import annotations

import base64
import binascii
import json
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import msgspec
import numpy as np
import pytest
from celery import Celery
from celery.worker.request import Request
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kombu import serialization

from lepton_ai import topology, wire
from lepton_ai.errors import (
    InvalidArguments,
    LeptonError,
    Malformed,
    OptionNotSupported,
    TooLarge,
)
from lepton_ai.job import Options, Setback
from lepton_ai.tensor import DTYPES, TensorMap, from_wire
from queues.app import celery_addresses
from queues.connection import Connection

LIMIT = 1 << 20
DEEP = 200_000
ID = "01990000-0000-7000-8000-000000000000"
ACCEPT = ["json", "msgpack"]


def a_message(
    body: bytes = b"[[], {}, {}]",
    *,
    content_type: str = wire.JSON,
    headers: dict[str, Any] | None = None,
    properties: dict[str, Any] | None = None,
) -> bytes:
    """A message as a stranger would write it."""
    found = {
        "body": base64.b64encode(body).decode(),
        "content-type": content_type,
        "content-encoding": "utf-8",
        "headers": {"id": ID, "task": "a.b"} | (headers or {}),
        "properties": {"body_encoding": "base64"} | (properties or {}),
    }
    return json.dumps(found).encode()


def with_options(raw: bytes) -> bytes:
    """A message whose header `lepton` is these very bytes."""
    return a_message(headers={"lepton": "HERE"}).replace(b'"HERE"', raw)


def read_all(raw: bytes, limit_bytes: int = LIMIT) -> wire.Body:
    """Everything that a message goes through between a lane and a kernel's signature."""
    found = wire.read_envelope(raw)
    wire.read_options(found.headers)
    return wire.read_body(found, limit_bytes=limit_bytes)


def arguments_of(raw: bytes) -> dict[str, Any]:
    return read_all(raw).kwargs


# -- what we write, read by kombu and Celery --------------------------------------------------------------------------


@pytest.fixture
def celery_app(broker_url: str) -> Iterator[Celery]:
    broker, backend = celery_addresses(broker_url)
    app = Celery("producer", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(task_serializer="json", accept_content=ACCEPT, result_accept_content=ACCEPT)
    yield app
    app.close()


@pytest.fixture
def received(celery_app: Celery, connection: Connection) -> Iterator[Callable[[bytes], kombu.Message]]:
    """What kombu's own Redis transport makes of a message on the lane."""
    with celery_app.connection_for_read() as link, link.channel() as channel:

        def receive(raw: bytes) -> kombu.Message:
            connection.call("LPUSH", topology.LANE, raw)
            found: list[kombu.Message] = []
            with kombu.Consumer(channel, [kombu.Queue(topology.LANE)], on_message=found.append, accept=ACCEPT):
                link.drain_events(timeout=5)
            found[0].ack()
            return found[0]

        yield receive


def ours(**arguments: Any) -> bytes:
    return wire.envelope(ID, "linalg.matmul", arguments, Options(priority=5))


def test_kombu_decodes_the_body_that_we_write(received: Callable[[bytes], kombu.Message]) -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    args, kwargs, embed = received(ours(a=a, k=3)).decode()
    assert args == []
    assert kwargs == {"a": {"dtype": "<f4", "shape": [2, 3], "data": a.tobytes()}, "k": 3}
    assert embed == {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def test_kombu_sees_the_properties_that_we_write(received: Callable[[bytes], kombu.Message]) -> None:
    message = received(ours(x=1))
    assert message.properties["correlation_id"] == ID
    assert message.delivery_info == {"exchange": "", "routing_key": topology.LANE}
    assert message.headers["lepton"] == {"priority": 5, "shapes": {"x": 1}}


def test_a_celery_worker_makes_the_same_request_of_it(
    celery_app: Celery, received: Callable[[bytes], kombu.Message]
) -> None:
    @celery_app.task(name="linalg.matmul")
    def matmul(**kwargs: Any) -> None: ...

    request = Request(received(ours(x=1.5)), app=celery_app, task=matmul)
    assert (request.id, request.name, request.args, request.kwargs) == (ID, "linalg.matmul", [], {"x": 1.5})
    assert (request.eta, request.expires, request.root_id) == (None, None, ID)
    assert request.ignore_result is matmul.ignore_result  # ours is null: an explicit value would override the task


def test_flower_shows_shapes_and_never_the_data(received: Callable[[bytes], kombu.Message]) -> None:
    message = received(ours(a=np.full((2, 3), 12345.0), k=3))
    assert message.headers["kwargsrepr"] == "{a=[2,3], k=3}"


# -- what Celery writes, beside what we write -------------------------------------------------------------------------


@pytest.fixture
def publish(celery_app: Celery, connection: Connection) -> Callable[..., bytes]:
    """The message that a Celery program's send_task leaves on the lane."""

    def send(**options: Any) -> bytes:
        kwargs = options.pop("kwargs", {"x": 1.5})
        celery_app.send_task("a.b", kwargs=kwargs, queue=topology.LANE, task_id=ID, **options)
        step = options.get("priority", 0) // 3 * 3
        suffix = f"{topology.PRIORITY_SEPARATOR}{step}" if step else ""
        raw: bytes = connection.call("RPOP", topology.LANE + suffix)
        return raw

    return send


@pytest.mark.parametrize("part", ["headers", "properties"])
def test_names_and_types_are_those_that_celery_writes(publish: Callable[..., bytes], part: str) -> None:
    celerys = json.loads(publish(serializer="msgpack"))[part]
    mine = json.loads(wire.envelope(ID, "a.b", {"x": 1.5}, Options()))[part]
    if part == "headers":
        assert mine.pop("lepton") == {"shapes": {"x": 1.5}}  # the one header of our own
    assert {name: type(value) for name, value in mine.items()} == {name: type(value) for name, value in celerys.items()}


def test_values_are_those_that_celery_writes_but_for_what_names_the_writer(publish: Callable[..., bytes]) -> None:
    celerys = json.loads(publish(serializer="msgpack"))
    mine = json.loads(wire.envelope(ID, "a.b", {"x": 1.5}, Options()))
    for name in ("origin", "kwargsrepr", "lepton"):
        celerys["headers"].pop(name, None)
        mine["headers"].pop(name)
    for name in ("delivery_tag", "reply_to"):
        celerys["properties"].pop(name)
        mine["properties"].pop(name)
    assert mine == celerys


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_what_send_task_publishes_is_read(
    publish: Callable[..., bytes], serializer: str, compression: str | None
) -> None:
    raw = publish(serializer=serializer, compression=compression, kwargs={"x": 1.5, "a": [[1, 2], [3, 4]]})
    found = read_all(raw)
    assert (found.args, found.kwargs) == ([], {"x": 1.5, "a": [[1, 2], [3, 4]]})


def test_what_send_task_says_of_a_task_is_read(publish: Callable[..., bytes]) -> None:
    raw = publish(priority=3, expires=60, headers={"lepton": {"priority": 8, "device": "gpu"}}, ignore_result=True)
    found = wire.read_envelope(raw)
    assert (found.headers.id, found.headers.task, found.headers.ignore_result) == (ID, "a.b", True)
    assert isinstance(found.headers.expires, str)
    assert found.properties.priority == 3
    assert wire.read_options(found.headers) == Options(priority=8, device="gpu")


def test_a_countdown_is_read(publish: Callable[..., bytes]) -> None:
    assert wire.read_envelope(publish(countdown=60)).headers.eta is not None


def test_a_task_without_our_header_has_no_options(publish: Callable[..., bytes]) -> None:
    assert wire.read_options(wire.read_envelope(publish()).headers) == Options()


def test_a_value_that_is_no_argument_is_named(publish: Callable[..., bytes]) -> None:
    found = wire.read_envelope(publish(kwargs={"a": [1.0], "b": np.ones(2).tolist(), "name": "junk"}))
    with pytest.raises(InvalidArguments, match="'name'") as caught:
        wire.read_body(found, limit_bytes=LIMIT)
    assert caught.value.field == "name"


def test_a_link_is_read_whatever_the_arguments_are(publish: Callable[..., bytes], celery_app: Celery) -> None:
    link = celery_app.signature("c.d", kwargs={"k": 1})
    for kwargs in ({"x": 1.5}, {"x": None}):
        embed = wire.read_embed(wire.read_envelope(publish(link=link, kwargs=kwargs)), limit_bytes=LIMIT)
        assert [each["task"] for each in embed["callbacks"]] == ["c.d"]


def test_celerys_nan_and_infinity_in_json_are_read(publish: Callable[..., bytes]) -> None:
    found = arguments_of(publish(serializer="json", kwargs={"x": float("nan"), "a": [float("inf"), 1.0]}))
    assert found["x"] != found["x"]
    assert found["a"] == [float("inf"), 1.0]


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_a_tensor_map_of_a_celery_program_is_an_array(publish: Callable[..., bytes], serializer: str) -> None:
    data: Any = np.arange(6, dtype="<f4").tobytes()
    sent = {"dtype": "<f4", "shape": [2, 3], "data": base64.b64encode(data).decode() if serializer == "json" else data}
    found = arguments_of(publish(serializer=serializer, kwargs={"a": sent}))["a"]
    np.testing.assert_array_equal(from_wire(found), np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_pickle_and_yaml_are_refused(serializer: str) -> None:
    with pytest.raises(Malformed, match=serializer):
        read_all(a_message(b"cos\nsystem\n", content_type=f"application/x-{serializer}"))


# -- there and back ---------------------------------------------------------------------------------------------------

arrays = hnp.arrays(
    dtype=st.sampled_from([np.dtype(name) for name in DTYPES]),
    shape=hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
)
numbers = st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
values = arrays | numbers | st.recursive(st.lists(numbers, max_size=3), lambda inner: st.lists(inner, max_size=3))


def depth(value: Any) -> int:
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(st.dictionaries(st.text(max_size=5), values.filter(lambda value: depth(value) <= 6), max_size=3))
def test_arguments_come_back_as_they_went(sent: dict[str, Any]) -> None:
    found = {name: wire.decode_value(value) for name, value in arguments_of(ours(**sent)).items()}
    assert found.keys() == sent.keys()
    for name, value in sent.items():
        if isinstance(value, np.ndarray):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].tobytes() == value.tobytes()
        else:
            assert found[name] == value


@given(arrays)
def test_kombus_msgpack_reads_the_same_bytes(array: np.ndarray) -> None:
    found = json.loads(ours(a=array))
    _, kwargs, _ = serialization.loads(
        binascii.a2b_base64(found["body"]), found["content-type"], found["content-encoding"], accept={wire.MSGPACK}
    )
    assert kwargs["a"] == {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


@given(
    st.builds(
        Options,
        priority=st.none() | st.integers(1, 9),
        device=st.none() | st.text(),
        reply_to=st.none() | st.text(max_size=100).map("lepton:reply:".__add__),
        result=st.sampled_from([None, "json", "msgpack"]),
    )
)
def test_options_come_back_as_they_went(options: Options) -> None:
    found = wire.read_options(wire.read_envelope(wire.envelope(ID, "a.b", {}, options)).headers)
    assert found == msgspec.structs.replace(options, shapes={})


def test_shapes_and_numbers_stand_in_the_header() -> None:
    raw = ours(a=np.zeros((2, 3)), rows=[[1, 2, 3]], k=7, point=np.float32(0.5))
    shapes = wire.read_options(wire.read_envelope(raw).headers).shapes
    assert shapes == {"a": [2, 3], "rows": [1, 3], "k": 7, "point": 0.5}


def test_an_arrays_bytes_are_not_copied_into_its_value() -> None:
    array = np.arange(1000.0)
    assert np.shares_memory(array, np.frombuffer(wire.to_value(array).data, np.float64))


def test_an_array_that_was_read_is_a_view_of_the_decoded_body() -> None:
    found = arguments_of(ours(a=np.arange(1000.0), b=np.arange(1000.0)))
    body = np.frombuffer(found["a"].data.obj, np.uint8)
    assert body.size > 16_000  # both arrays, and what stands around them
    assert np.shares_memory(from_wire(found["a"]), body)
    assert np.shares_memory(from_wire(found["b"]), body)


def plainly(job_id: str, kernel: str, arguments: dict[str, Any], options: Options, lane: str) -> dict[str, Any]:
    """What a message says, put together without a template."""
    sent, sizes = dict(arguments), dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            sent[name] = {"dtype": value.dtype.str, "shape": list(value.shape), "data": value.tobytes()}
            sizes[name] = list(value.shape)
    shown = [f"{name}={value!r}".replace(", ", ",") for name, value in sizes.items()]
    nothing = ("shadow", "expires", "group", "group_index", "parent_id", "ignore_result", "stamped_headers")
    headers = {"id": job_id, "root_id": job_id, "task": kernel, "lang": "py", "origin": ORIGIN, "eta": "then"}
    headers |= {"retries": 0, "replaced_task_nesting": 0, "timelimit": [None, None], "stamps": {}}
    headers |= {"argsrepr": "()", "kwargsrepr": f"{{{', '.join(shown)}}}"} | dict.fromkeys(nothing)
    properties = {"correlation_id": job_id, "delivery_tag": job_id, "reply_to": "", "body_encoding": "base64"}
    properties |= {"delivery_mode": 2, "priority": 0, "delivery_info": {"exchange": "", "routing_key": lane}}
    said = msgspec.json.decode(msgspec.json.encode({"shapes": sizes} | msgspec.to_builtins(options)))  # inf as null
    return {
        "body": [[], sent, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}],
        "content-encoding": "binary",
        "content-type": wire.MSGPACK,
        "headers": headers | {"lepton": said},
        "properties": properties,
    }


ORIGIN = json.loads(wire.envelope(ID, "a.b", {}, Options()))["headers"]["origin"]
texts = st.text(max_size=8) | st.sampled_from(["%", "%b", "%(id)s", '"', "\\", "{}"])
rows = st.dictionaries(texts, arrays | numbers, max_size=3)


@given(
    texts,
    st.builds(Options, device=st.none() | texts, shapes=st.none() | st.just({"x": [2]})),
    texts,
    st.lists(st.tuples(texts, rows), max_size=3),
)
def test_a_template_says_of_each_job_what_a_message_of_its_own_would(
    kernel: str, options: Options, lane: str, jobs: list[tuple[str, dict[str, Any]]]
) -> None:
    template = wire.Template(kernel, options, lane)
    for job_id, row in jobs:
        found = json.loads(template.envelope(job_id, row, eta="then"))
        found["body"] = msgspec.msgpack.decode(binascii.a2b_base64(found["body"]))
        assert found == plainly(job_id, kernel, row, options, lane)


def test_a_message_that_is_sent_again_has_another_delivery_tag() -> None:
    message = wire.envelope(ID, "a.b", {}, Options())
    tags = [json.loads(each)["properties"]["delivery_tag"] for each in (message, *map(wire.retried, [message] * 2))]
    assert len(set(tags)) == 3


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "value", [LOOP, 1j, 10**30, "\ud800", np.array(["text"]), object()], ids=lambda value: type(value).__name__
)
def test_a_value_that_cannot_be_sent_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArguments, match="cannot be sent"):
        ours(x=value)


# -- hostile bytes ----------------------------------------------------------------------------------------------------

GOOD = [
    wire.envelope(
        ID, "a.b", {"a": np.arange(4.0), "x": 1.5}, Options(priority=7, device="cpu", reply_to="lepton:reply:me")
    ),
    a_message(b'[[], {"x": 1.5, "a": [[1, 2]]}, {"callbacks": null}]', headers={"lepton": {"priority": 3}}),
    a_message(b'[[], {"x": NaN}, {}]'),
    a_message(zlib.compress(b'[[], {"x": 1.5}, {}]'), headers={"compression": "application/x-gzip"}),
]


def survives(raw: bytes) -> bool:
    """Whether a message is read; anything but an answer or a LeptonError is an error of the test."""
    try:
        read_all(raw)
    except LeptonError:
        return False
    return True


@pytest.mark.parametrize("good", GOOD, ids=["ours", "json", "nan", "zlib"])
def test_a_message_cut_short_anywhere_is_malformed(good: bytes) -> None:
    assert survives(good)
    for length in range(len(good)):
        with pytest.raises(Malformed):
            wire.read_envelope(good[:length])


@pytest.mark.parametrize("good", GOOD, ids=["ours", "json", "nan", "zlib"])
def test_a_body_cut_short_anywhere_is_refused(good: bytes) -> None:
    found = json.loads(good)
    body = base64.b64decode(found["body"])
    for length in range(len(body)):
        cut = json.dumps(found | {"body": base64.b64encode(body[:length]).decode()}).encode()
        assert not survives(cut)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_raise_nothing_but_our_errors(raw: bytes) -> None:
    survives(raw)


@given(st.binary(max_size=200), st.sampled_from([wire.JSON, wire.MSGPACK]), st.booleans())
def test_bytes_that_are_no_body_raise_nothing_but_our_errors(body: bytes, content_type: str, packed: bool) -> None:
    compression = {"compression": "application/x-gzip"} if packed else {}
    survives(a_message(zlib.compress(body) if packed else body, content_type=content_type, headers=compression))


@given(st.binary(max_size=50))
def test_bytes_that_are_no_options_raise_nothing_but_our_errors(raw: bytes) -> None:
    survives(with_options(raw))


@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4),
)
def test_a_good_message_with_some_bytes_changed_raises_nothing_but_our_errors(
    good: bytes, changes: list[tuple[int, bytes, int]]
) -> None:
    for place, put, cut in changes:
        at = place % (len(good) + 1)
        good = good[:at] + put + good[at + cut :]
    survives(good)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLACES = st.sampled_from(
    ["body", "content-type", "content-encoding", "headers", "properties"]
    + [f"headers.{name}" for name in ("id", "task", "lepton", "eta", "expires", "retries", "timelimit", "compression")]
    + ["properties.body_encoding", "properties.priority", "headers.lepton.shapes", "headers.lepton.priority"]
)


@given(st.sampled_from(GOOD), PLACES, json_values)
def test_a_good_message_with_another_value_anywhere_raises_nothing_but_our_errors(
    good: bytes, place: str, value: Any
) -> None:
    found = json.loads(good)
    *parents, name = place.split(".")
    inner = found
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[name] = value
    survives(json.dumps(found).encode())


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b"null",
        b'"text"',
        b"[]",
        b'{"task": "a.b", "id": "1", "args": [], "kwargs": {}}',
        b'{"body": "e30=", "headers": {}, "properties": {}, "content-type": "application/json"}',
        json.dumps({"body": "x", "headers": {"id": 1, "task": "a"}, "properties": {}}).encode(),
    ],
    ids=["empty", "null", "text", "list", "foreign", "protocol 1", "id"],
)
def test_json_that_is_no_message_of_protocol_2_is_malformed(raw: bytes) -> None:
    with pytest.raises(Malformed):
        wire.read_envelope(raw)


HUGE = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' * DEEP,
        b"[" * DEEP,
        b'{"x":NaN,"a":' + b"[" * DEEP,
        with_options(b"[" * DEEP + b"]" * DEEP),
        with_options(b'{"shapes":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}"),
        a_message(b"[[], {}, " + b"[" * DEEP),
        a_message(b"[[NaN], {}, " + b"[" * DEEP),
        a_message(b"\x91" * DEEP, content_type=wire.MSGPACK),
        a_message(b"\x93\x90\x80" + b"\x91" * DEEP, content_type=wire.MSGPACK),
        a_message(b"\x93\x90\x81\xa1a" + b"\x91" * DEEP, content_type=wire.MSGPACK),
        a_message(b"\x93\x90\x80" + b"\x81\xa1a" * DEEP, content_type=wire.MSGPACK),
        a_message(b"\xdd" + HUGE, content_type=wire.MSGPACK),
        a_message(b"\x93\xdd" + HUGE, content_type=wire.MSGPACK),
        a_message(b"\x93" + (b"\xdd" + HUGE) * 100, content_type=wire.MSGPACK),
        a_message(b"\x93\x90\xdf" + HUGE, content_type=wire.MSGPACK),
        a_message(b"\x93\x90\x81\xa1a\xdd" + HUGE, content_type=wire.MSGPACK),
        a_message(b"\x93\x90\x80\xdb" + HUGE, content_type=wire.MSGPACK),
        a_message(b"\x93\x90\x80\xc9" + HUGE, content_type=wire.MSGPACK),
        a_message(b'[[], {"x": ' + b"1" * 100_000 + b"}, {}]"),
        a_message(b'[[NaN], {"x": ' + b"1" * 100_000 + b"}, {}]"),
        with_options(b'{"shapes": {"x": ' + b"1" * 100_000 + b"}}"),
        with_options(b'{"shapes": {"x": 1e999}}'),
        with_options(b'{"device": "\xff"}'),
        a_message().replace(b'"a.b"', b'"\\ud800"'),
        a_message(headers={"x": float("nan"), "task": "\ud800"}),
        a_message(headers={"x": float("nan")}, properties={"body_encoding": None}).replace(b'"W1', b'"\\ud800'),
        a_message(headers={"compression": "application/x-lzma"}),
        a_message(b"no zlib", headers={"compression": "application/x-gzip"}),
    ],
    ids=lambda raw: raw[-24:].hex(),
)  # fmt: skip
def test_hostile_bytes_are_refused_in_milliseconds(raw: bytes) -> None:
    start = time.process_time()
    assert not survives(raw)
    assert time.process_time() - start < 0.1


def test_a_body_that_inflates_past_the_limit_is_refused_before_it_does() -> None:
    raw = a_message(zlib.compress(b" " * (64 * LIMIT), 1), headers={"compression": "application/x-gzip"})
    start = time.process_time()
    with pytest.raises(TooLarge, match="inflates"):
        read_all(raw)
    assert time.process_time() - start < 0.1


def test_a_body_of_the_limit_is_read_and_a_byte_more_is_not() -> None:
    body = b'[[], {"x": 1}, {}]'
    assert read_all(a_message(body), len(body)).kwargs == {"x": 1}
    with pytest.raises(TooLarge):
        read_all(a_message(body + b" "), len(body))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"colour": "red"}, "colour"),
        ({"priority": 0}, "priority"),
        ({"priority": 10}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"result": "pickle"}, "pickle"),
        ([1], "lepton"),
    ],
)
def test_an_option_that_is_not_honoured_is_refused_by_name(options: Any, named: str) -> None:
    with pytest.raises(OptionNotSupported, match=named):
        wire.read_options(wire.read_envelope(a_message(headers={"lepton": options})).headers)


# -- values -----------------------------------------------------------------------------------------------------------


def test_a_tensor_map_decodes_to_an_array_and_the_rest_stays() -> None:
    map_ = TensorMap("<f4", [1], memoryview(b"\x00\x00\x80\x3f"))
    assert wire.decode_value(map_) == np.float32([1.0])
    assert wire.decode_value([[1]]) == [[1]]


# -- batches ----------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=60), st.integers(1, 100))
def test_batches_keep_every_part_in_order_and_stay_within_their_size(parts: list[bytes], most_bytes: int) -> None:
    found = list(wire.batches(parts, most_bytes))
    assert [part for batch in found for part in batch] == parts
    assert all(batch and (len(batch) == 1 or sum(map(len, batch)) <= most_bytes) for batch in found)


def test_a_batch_of_small_parts_is_bounded_too() -> None:
    assert max(len(batch) for batch in wire.batches([b"x"] * 5000, 10**9)) <= 512


# -- back from a device -----------------------------------------------------------------------------------------


def setbacks(message: bytes) -> tuple[Setback, ...]:
    return wire.read_options(wire.read_envelope(message).headers).setbacks or ()


def test_a_message_that_was_set_back_keeps_everything_else() -> None:
    before = wire.envelope("id", "a.b", {"x": 1}, Options(priority=7), expires="2030-01-01T00:00:00+00:00")
    after = wire.set_back(before, Setback("gpu.h100", "device_out_of_memory", "full"))
    first, second = wire.read_envelope(before), wire.read_envelope(after)
    assert setbacks(after) == (Setback("gpu.h100", "device_out_of_memory", "full"),)
    assert (second.body, second.headers.retries, second.headers.expires) == (first.body, 0, first.headers.expires)
    assert wire.read_options(second.headers).priority == 7


def test_setbacks_stand_in_their_order_one_a_device() -> None:
    message = wire.envelope("id", "a.b", {"x": 1}, Options())
    for device, code in (("gpu", "first"), ("tpu", "second"), ("gpu", "third")):
        message = wire.set_back(message, Setback(device, code))
    assert [(each.device, each.code) for each in setbacks(message)] == [("tpu", "second"), ("gpu", "third")]


def test_a_message_of_a_foreign_producer_may_be_set_back() -> None:
    message = wire.set_back(a_message(headers={"lepton": None}), Setback("gpu", "kernel_failed"))
    assert [each.device for each in setbacks(message)] == ["gpu"]


def test_a_job_that_begins_anew_may_go_everywhere_again() -> None:
    message = wire.set_back(wire.envelope("id", "a.b", {"x": 1}, Options(priority=7)), Setback("gpu", "kernel_failed"))
    again = wire.replayed(message)
    assert setbacks(again) == ()
    assert wire.read_options(wire.read_envelope(again).headers).priority == 7
