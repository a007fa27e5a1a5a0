"""The HTTP interface, `/v1`: one function a route, JSON or msgpack in and out, OpenAPI generated from the types."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from litestar import Litestar, Request, Response, get, post
from litestar.exceptions import InternalServerException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.params import Parameter

from lepton_ai import wire
from lepton_ai.errors import InvalidArguments, Malformed, TooLarge, UnsupportedMediaType
from lepton_ai.remote import JobRequest
from lepton_ai.settings import Settings
from pipeline.ingest.door import Door
from pipeline.ingest.problem import HANDLERS

__all__ = ["make_asgi"]

_LONGEST_WAIT_S = 60.0
WaitSeconds = Annotated[
    float, Parameter(ge=0, le=_LONGEST_WAIT_S, description="Answer with the result if it comes in so many seconds.")
]
_BODY: Any = JobRequest | list[JobRequest]
#: Where msgspec says that a value did not fit (`$[3].kernel`), and which field it misses or does not know.
_PATH = re.compile(r"`\$(?:\[(?:\d+|\.\.\.)\])?\.?(?P<field>[^`]*)`")
_FIELD = re.compile(r"(?:required|unknown) field `(\w+)`")


class _Incoming(msgspec.Struct, forbid_unknown_fields=True):
    """A JobRequest whose arguments are still bytes, so that one which does not fit is named."""

    kernel: str
    arguments: dict[str, msgspec.Raw]
    priority: int | None = None
    device: str | None = None


class _Format:
    """Decoders of one media type."""

    def __init__(self, decoder: Any) -> None:
        self.body: Any = decoder(_Incoming | list[_Incoming])
        self.value: Any = decoder(wire.Value)


_JSON, _MSGPACK = _Format(msgspec.json.Decoder), _Format(msgspec.msgpack.Decoder)
_FORMATS = {
    "application/json": _JSON,
    wire.MSGPACK: _MSGPACK,
    "application/msgpack": _MSGPACK,
    "application/vnd.msgpack": _MSGPACK,
}


@get("/healthz", sync_to_thread=False, tags=["service"])
def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@get("/readyz", tags=["service"])
async def readyz(door: Door) -> dict[str, str]:
    """The broker answers, so jobs can be accepted; 503 where it does not."""
    await door.ping()
    return {"status": "ready"}


@dataclass
class _JobsOperation(Operation):
    """The body of POST /v1/jobs is decoded by hand (its type depends on the content type), so it is described here."""

    def __post_init__(self) -> None:
        schemas, components = msgspec.json.schema_components([_BODY], ref_template="#/components/schemas/{name}")
        schema = _inlined(schemas[0], components)
        content = {kind: OpenAPIMediaType(Schema()) for kind in ("application/json", wire.MSGPACK)}
        for media in content.values():
            media.schema = _RawSchema(schema)
        self.request_body = RequestBody(content, description="One job or a list of jobs.", required=True)


class _RawSchema(Schema):
    """A schema that msgspec has already written."""

    def __init__(self, written: dict[str, Any]) -> None:
        super().__init__()
        self._written = written

    def to_schema(self) -> dict[str, Any]:
        return self._written


@post("/v1/jobs", status_code=202, tags=["jobs"], operation_class=_JobsOperation, raises=[])
async def submit(
    request: Request[Any, Any, Any], door: Door, settings: Settings, wait_s: WaitSeconds = 0.0
) -> Response[bytes]:
    """Accepts one job or a list, whole or not at all. 202 with the jobs' ids; 200 where all ended within `wait_s`."""
    body = await _body(request, settings.body_limit_bytes)
    decoded = _decode(body, request.headers.get("content-type", "application/json"))
    requests = decoded if isinstance(decoded, list) else [decoded]
    views = await door.accept(requests, wait_s)
    ended = bool(views) and all(view.result is not None or view.error is not None for view in views)
    answer = views if isinstance(decoded, list) else views[0]
    return _respond(request, answer, 200 if ended else 202)


@get("/v1/jobs/{job_id:str}", tags=["jobs"])
async def job(request: Request[Any, Any, Any], job_id: str, door: Door, wait_s: WaitSeconds = 0.0) -> Response[bytes]:
    """One job: its state, where it went and why, and its result once it has ended; waits up to `wait_s` for that."""
    return _respond(request, await door.look(job_id, wait_s), 200)


@get("/v1/devices", tags=["fleet"])
async def devices(request: Request[Any, Any, Any], door: Door) -> Response[bytes]:
    """Every worker that is alive: its device, slots, measured peaks and kernels."""
    return _respond(request, await door.announcements(), 200)


@get("/v1/kernels", tags=["fleet"])
async def kernels(request: Request[Any, Any, Any], door: Door) -> Response[bytes]:
    """Every kernel that has been announced: its signature, formulas and limits."""
    return _respond(request, await door.kernels(), 200)


def make_asgi(settings: Settings, door: Door) -> Litestar:
    """The ASGI application over one broker."""
    return Litestar(
        [healthz, readyz, submit, job, devices, kernels],
        lifespan=[door.open],
        dependencies={"door": _provide(door), "settings": _provide(settings)},
        exception_handlers=HANDLERS,
        logging_config=None,
        request_max_body_size=settings.body_limit_bytes,
        openapi_config=OpenAPIConfig(
            title="Lepton",
            version="1",
            description="Every compute job on the device that finishes it soonest.",
            use_handler_docstrings=True,
            path="/openapi",
            # No pages: those load their scripts from somebody else's server.
            render_plugins=[JsonRenderPlugin(), YamlRenderPlugin()],
        ),
        debug=False,
    )


def _provide(value: Any) -> Any:
    from litestar.di import Provide

    async def provide() -> Any:
        return value

    return Provide(provide)


async def _body(request: Request[Any, Any, Any], limit_bytes: int) -> bytes:
    """The body, refused before it is buffered where its length is announced, and as soon as it is over otherwise."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit_bytes:
        raise TooLarge(f"the body has {announced} bytes, the limit is {limit_bytes}")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit_bytes:
                raise TooLarge(f"the body is over the limit of {limit_bytes} bytes")
            parts.append(part)
    except InternalServerException as error:  # so litestar tells of a body that ends early or has a broken chunk
        raise Malformed("the body breaks off, or its chunks are not well formed") from error
    return b"".join(parts)


def _decode(body: bytes, content_type: str) -> JobRequest | list[JobRequest]:
    media = content_type.split(";", maxsplit=1)[0].strip().lower()
    known = _FORMATS.get(media)
    if known is None:
        raise UnsupportedMediaType(f"content type {media!r} is not understood; use application/json or {wire.MSGPACK}")
    try:
        found = known.body.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"the body is not valid {media}: {str(error) or type(error).__name__}") from None
    if isinstance(found, list):
        return [_request(each, known) for each in found]
    return _request(found, known)


def _request(incoming: _Incoming, known: _Format) -> JobRequest:
    arguments = {}
    for name, raw in incoming.arguments.items():
        try:
            arguments[name] = known.value.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidArguments(
                f"argument {name!r} is no number, list of numbers or tensor: {error}", name
            ) from None
    return JobRequest(incoming.kernel, arguments, incoming.priority, incoming.device)


def _invalid(error: msgspec.ValidationError) -> InvalidArguments:
    """What did not fit the shape of a request, with the field that msgspec names."""
    text = str(error)
    named = _FIELD.search(text)
    path = _PATH.search(text)
    field = named[1] if named else path["field"] if path else None
    return InvalidArguments(f"not a valid job: {text}", field or None)


def _respond(request: Request[Any, Any, Any], value: Any, status: int) -> Response[bytes]:
    """The value in msgpack where the client accepts that, else in JSON (NaN and infinity are null there)."""
    accepts = request.headers.get("accept", "")
    if "msgpack" in accepts:
        return Response(msgspec.msgpack.encode(value), status_code=status, media_type=wire.MSGPACK)
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _inlined(schema: Any, components: dict[str, Any]) -> Any:
    """A JSON schema with its references replaced by what they name."""
    if isinstance(schema, list):
        return [_inlined(each, components) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(components[schema["$ref"].rpartition("/")[2]], components)
    return {key: _inlined(value, components) for key, value in schema.items()}
