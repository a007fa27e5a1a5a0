"""What is no job: bytes for the lane and for HTTP that a decoder may stumble over, each with a name."""

from __future__ import annotations

import base64
import json
import random
import socket
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from lepton_ai import wire
from lepton_ai.identity import new_id
from lepton_ai.job import Options

__all__ = ["envelopes", "posts"]

_DEEP = 200_000
_JSON, _MSGPACK = "application/json", "application/x-msgpack"
#: Headers of msgpack that promise 4 G elements, and bring none.
_HEADERS = {
    "array": b"\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff",
    "bin": b"\xc6\xff\xff\xff\xff",
    "str": b"\xdb\xff\xff\xff\xff",
    "ext": b"\xc9\xff\xff\xff\xff\x01",
}
_BOMB_BYTES = 64 * 1024 * 1024
_TIMEOUT_S = 20.0


def _bytes() -> Iterator[tuple[str, bytes]]:
    """What is neither a message nor a body."""
    yield "nothing", b""
    yield "zeros", bytes(1000)
    yield "no JSON", b"hello"
    yield "foreign JSON", b'{"hello": ["world", 1, null]}'
    yield "no UTF-8", b'{"body": "\xff\xfe"}'
    yield "deep array", b"[" * _DEEP
    yield "deep array, closed", b"[" * _DEEP + b"]" * _DEEP
    yield "deep map", b'{"a":' * _DEEP + b"1" + b"}" * _DEEP
    yield "deep msgpack", b"\x91" * _DEEP + b"\xc0"
    yield "many empty maps", b"[" + b"{}," * 300_000 + b"{}]"
    yield "a number too large", b"[1e400, " + b"9" * 5000 + b"]"
    for name, header in _HEADERS.items():
        yield f"4 G elements of {name}", header


def envelopes(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Messages for the lane."""
    yield from _bytes()
    whole = wire.envelope(new_id(), "fault.run", {"n": -1, "ms": 0, "how": 0}, Options())
    for _ in range(8):
        yield "truncated", whole[: chance.randrange(1, len(whole))]
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        yield "one bit turned", bytes(damaged)
    yield "protocol 1", json.dumps(_protocol_1()).encode()
    for name, header in _HEADERS.items():
        yield f"a body of 4 G elements of {name}", _with(body=header)
        yield f"arguments of 4 G elements of {name}", _with(body=b"\x93\x90" + header)
    yield "a deep body", _with(body=b"\x91" * _DEEP)
    yield "a deep body in JSON", _with(body=b"[" * _DEEP, content_type=_JSON)
    yield (
        "a body that unpacks to 64 MiB",
        _with(body=zlib.compress(bytes(_BOMB_BYTES)), compression="application/x-gzip"),
    )
    yield "a pickle", _with(body=b"\x80\x04N.", content_type="application/x-python-serialize")
    yield "not base64", _edited(whole, body="!" * 100)
    yield "an id that is a list", _edited(whole, headers={"id": [1]})
    yield "an id of a megabyte", _edited(whole, headers={"id": "x" * 1_000_000})
    yield "options that are deep", whole.replace(b'"lepton":{', b'"lepton":' + b"[" * _DEEP + b',"x":{', 1)
    yield "options of another release", _edited(whole, headers={"lepton": {"teleport": True}})
    yield "a shape of 2^62", _edited(whole, headers={"lepton": {"shapes": {"n": [2**62, 2**62]}}})


def posts(chance: random.Random, port: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """Requests to an ingest on that port; each returns the status that it was answered with (0: by none)."""
    for kind in (_JSON, _MSGPACK, "application/x-ndjson"):
        for name, body in _bytes():
            if body or "ndjson" not in kind:  # where no line is no job
                yield f"{name} as {kind}", _post(port, body, kind)
    job = {"kernel": "fault.run", "arguments": {"n": -1, "ms": 0, "how": 0}}
    whole = json.dumps(job).encode()
    for _ in range(8):
        yield "truncated", _post(port, whole[: chance.randrange(1, len(whole) - 1)], _JSON)
    yield "an unknown kernel", _post(port, json.dumps({**job, "kernel": "no.such"}).encode(), _JSON)
    yield "arguments that are a list", _post(port, json.dumps({**job, "arguments": [1]}).encode(), _JSON)
    yield "a field too many", _post(port, json.dumps({**job, "teleport": 1}).encode(), _JSON)
    yield "more than the limit", _post(port, b" " * (9 * 1024 * 1024), _JSON)
    yield "a length that is no number", _raw(port, b"Content-Length: many\r\n", b"")
    yield "chunks that are none", _raw(port, b"Transfer-Encoding: chunked\r\n", b"zz\r\n")


def _post(port: int, body: bytes, kind: str) -> Callable[[], int]:
    def post() -> int:
        headers = {"content-type": kind}
        return httpx.post(
            f"http://127.0.0.1:{port}/v1/jobs", content=body, headers=headers, timeout=_TIMEOUT_S
        ).status_code

    return post


def _raw(port: int, header: bytes, body: bytes) -> Callable[[], int]:
    def post() -> int:
        with socket.create_connection(("127.0.0.1", port), _TIMEOUT_S) as plain:
            plain.sendall(
                b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + header + b"\r\n" + body
            )
            plain.shutdown(socket.SHUT_WR)
            answer = plain.recv(4096)
        return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 400  # hung up on, which is an answer too

    return post


def _with(*, body: bytes, content_type: str = _MSGPACK, compression: str | None = None) -> bytes:
    whole = wire.envelope(new_id(), "fault.run", {"n": -1, "ms": 0, "how": 0}, Options())
    message = json.loads(whole)
    message["body"] = base64.b64encode(body).decode()
    message["content-type"] = content_type
    message["headers"]["compression"] = compression
    return json.dumps(message).encode()


def _edited(whole: bytes, *, headers: dict[str, Any] | None = None, **fields: Any) -> bytes:
    message = json.loads(whole)
    message |= fields
    message["headers"] |= {"id": new_id(), **(headers or {})}
    return json.dumps(message).encode()


def _protocol_1() -> dict[str, Any]:
    body = {"task": "fault.run", "id": new_id(), "args": [], "kwargs": {"n": -1, "ms": 0, "how": 0}, "retries": 0}
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": _JSON,
        "headers": {},
        "properties": {"body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "lepton.ingest"}},
    }
