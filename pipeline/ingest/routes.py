"""The HTTP interface, `/v1`: one function a route, JSON or msgpack in and out, OpenAPI generated from the types."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Annotated, Any

import msgspec
from litestar import Litestar, Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.params import FromPath, HeaderParameter, QueryParameter

from lepton_ai import wire
from lepton_ai.errors import LeptonError, UnknownJob
from lepton_ai.event import TYPES, Cursor
from lepton_ai.job import ENDED
from lepton_ai.remote import JobView
from lepton_ai.remote_protocol import DEAD_AT_ONCE, TENANT
from lepton_ai.settings import Settings
from pipeline.ingest import body, openapi
from pipeline.ingest.body import NDJSON
from pipeline.ingest.door import Door
from pipeline.ingest.feed import Wanted
from pipeline.ingest.metrics import CONTENT_TYPE
from pipeline.ingest.openapi import SSE, JobLine
from pipeline.ingest.problem import HANDLERS
from pipeline.ingest.stream import Streamed

__all__ = ["make_asgi"]

_LONGEST_WAIT_S = 60.0
_ENCODER = msgspec.json.Encoder()
TheDoor = NamedDependency[Door]
TheSettings = NamedDependency[Settings]
WaitSeconds = Annotated[
    float,
    QueryParameter(ge=0, le=_LONGEST_WAIT_S, description="Answer with the result if it comes in so many seconds."),
]
LastEventId = Annotated[
    str | None,
    HeaderParameter(name="last-event-id", description="The id of the last event seen: go on exactly after it."),
]
Since = Annotated[
    str | None,
    QueryParameter(
        description="Go on after this event, or this stream entry; 0 for the oldest kept. Default: from now on."
    ),
]
Tenant = Annotated[
    str | None,
    HeaderParameter(
        name=TENANT,
        description="For whom the jobs are: they wait in a lane of that tenant's own, and its keys are its own. Nobody "
        "checks it yet.",
    ),
]
IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="idempotency-key",
        description="The key of a job that is sent by itself: the same as its field `key`.",
    ),
]
Types = Annotated[str | None, QueryParameter(description=f"Only these, separated by commas: {', '.join(TYPES)}.")]
OnlyJob = Annotated[str | None, QueryParameter(description="Only the events of this job.")]


@get("/healthz", sync_to_thread=False, tags=["service"], operation_class=openapi.STATUS)
def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@get("/readyz", tags=["service"], operation_class=openapi.STATUS)
async def readyz(door: TheDoor) -> dict[str, str]:
    """The broker answers, so jobs can be accepted; 503 where it does not."""
    await door.ping()
    return {"status": "ready"}


@get("/metrics", media_type=CONTENT_TYPE, tags=["service"])
async def metrics(door: TheDoor) -> Response[bytes]:
    """For Prometheus: the jobs by outcome, what waits and is in flight, the difference, dead letters, lanes."""
    return Response(await door.metrics(), media_type=CONTENT_TYPE)


@post("/v1/jobs", status_code=202, tags=["jobs"], operation_class=openapi.SUBMITTED)
async def submit(
    request: Request[Any, Any, Any],
    door: TheDoor,
    settings: TheSettings,
    wait_s: WaitSeconds = 0.0,
    tenant: Tenant = None,
    key: IdempotencyKey = None,
) -> Response[Any]:
    """Accepts one job or many (a list, or one a line), whole or not at all. 202 with the jobs' ids.

    With `wait_s` it answers with results: 200 where all ended in time. As NDJSON (asked for, or because the jobs came
    so) each job is a line of its own as soon as it ends, and what has not ended in time follows as it stands.

    A job with a `key` is accepted once: the same job with the same key is answered as that one stands, 200 where it has
    ended, else 202 with its id; another job with it is refused (422, `key_conflict`). Where too much waits already it
    is 429 (of this tenant) or 503 (altogether), and Retry-After says when to come again.
    """
    data = await body.read(request, settings.body_limit_bytes)
    sent = body.with_key(body.decode(data, request.headers.get("content-type", "application/json")), key)
    lines = sent.lines or NDJSON in request.headers.get("accept", "").lower()
    try:
        if lines and wait_s > 0:
            told = _lines_of(door.accept_each(sent.requests, wait_s, tenant))
            await anext(told)
            return Streamed(told, NDJSON)
        views = await door.accept(sent.requests, wait_s, tenant)
    except LeptonError as error:
        if sent.single:
            error.index = None  # type: ignore[attr-defined]
        raise
    if lines:
        return Response(_lines(enumerate(views)), status_code=202, media_type=NDJSON)
    ended = bool(views) and all(view.state in ENDED for view in views)
    return _respond(request, views[0] if sent.single else views, 200 if ended else 202)


@get("/v1/jobs/{job_id:str}", tags=["jobs"], operation_class=openapi.ONE_JOB)
async def job(
    request: Request[Any, Any, Any], job_id: FromPath[str], door: TheDoor, wait_s: WaitSeconds = 0.0
) -> Response[bytes]:
    """One job: its state, where it went and why, and its result once it has ended; waits up to `wait_s` for that."""
    return _respond(request, await door.look(job_id, wait_s), 200)


@delete("/v1/jobs/{job_id:str}", status_code=202, tags=["jobs"], operation_class=openapi.ONE_JOB_CANCELLED)
async def cancel(
    request: Request[Any, Any, Any], job_id: FromPath[str], door: TheDoor, wait_s: WaitSeconds = 0.0
) -> Response[bytes]:
    """Asks for a job to be cancelled: 202 while it has not ended, 200 once it has, however that was.

    A job that waits is ended at once; a kernel that runs is told, and may run to its end all the same.
    """
    view = await door.cancel(job_id, wait_s)
    return _respond(request, view, 200 if view.state in ENDED else 202)


@get("/v1/events", media_type=SSE, tags=["events"], operation_class=openapi.EVENTS)
async def events(
    door: TheDoor,
    since: Since = None,
    types: Types = None,
    job: OnlyJob = None,
    last_event_id: LastEventId = None,
) -> Response[Any]:
    """What happens, as CloudEvents in server-sent events; an `io.lepton.events.missed.v1` where some are gone already.

    A comment comes at once, and every 15 seconds in which nothing else does.
    """
    place = last_event_id or since
    told = door.feed.follow(None if place is None else Cursor.parse(place), Wanted.parse(types, job))
    await anext(told)
    return Streamed(told, SSE)


@get("/v1/jobs/{job_id:str}/events", media_type=SSE, tags=["events"], operation_class=openapi.JOB_EVENTS)
async def job_events(door: TheDoor, job_id: FromPath[str], last_event_id: LastEventId = None) -> Response[Any]:
    """What happened to one job and happens to it, from its beginning; ends behind its last event."""
    told = await door.job_events(job_id, Cursor.parse(last_event_id) if last_event_id else None)
    if told is None:
        return Response(None, status_code=204)
    return Streamed(told, SSE)


@get("/v1/dead", tags=["dead letters"], operation_class=openapi.DEAD)
async def dead(
    request: Request[Any, Any, Any],
    door: TheDoor,
    limit: Annotated[int, QueryParameter(ge=1, le=DEAD_AT_ONCE)] = DEAD_AT_ONCE,
    after: Annotated[str | None, QueryParameter(description="Go on behind this entry, with older ones.")] = None,
    job: Annotated[str | None, QueryParameter(description="Only this one, by its job's id or its entry.")] = None,
) -> Response[bytes]:
    """Jobs that were given up, newest first: they killed their workers, or their retries are used up."""
    return _respond(request, await door.dead(limit, after, job), 200)


@get("/v1/dead/{entry:str}", tags=["dead letters"], operation_class=openapi.DEAD_LETTER)
async def dead_letter(request: Request[Any, Any, Any], door: TheDoor, entry: FromPath[str]) -> Response[bytes]:
    """One dead letter, by its entry or its job's id."""
    return _respond(request, await door.dead_letter(entry), 200)


@post("/v1/dead/replay", status_code=200, tags=["dead letters"], operation_class=openapi.REPLAYED)
async def replay(request: Request[Any, Any, Any], door: TheDoor, settings: TheSettings) -> Response[bytes]:
    """Runs dead letters once more: these `entries` (or jobs), or `all`. Each once, however many ask for it."""
    data = await body.read(request, settings.body_limit_bytes)
    chosen = body.decode_chosen(data, request.headers.get("content-type", "application/json"))
    return _respond(request, await door.replay(chosen), 200)


@delete("/v1/dead/{entry:str}", status_code=200, tags=["dead letters"], operation_class=openapi.PURGED)
async def purge(request: Request[Any, Any, Any], door: TheDoor, entry: FromPath[str]) -> Response[bytes]:
    """Throws one dead letter away, by its entry or its job's id."""
    settled = await door.purge([entry])
    if settled.left:
        raise UnknownJob(settled.left[entry], "entry")
    return _respond(request, settled, 200)


@delete("/v1/dead", status_code=200, tags=["dead letters"], operation_class=openapi.PURGED)
async def purge_all(request: Request[Any, Any, Any], door: TheDoor) -> Response[bytes]:
    """Throws all dead letters away."""
    return _respond(request, await door.purge(None), 200)


@get("/v1/accounts", tags=["service"], operation_class=openapi.ACCOUNTS)
async def accounts(request: Request[Any, Any, Any], door: TheDoor) -> Response[bytes]:
    """Where every accepted job is, or how it ended. A `difference` other than 0 is a defect."""
    return _respond(request, await door.accounts(), 200)


@get("/v1/devices", tags=["fleet"], operation_class=openapi.DEVICES)
async def devices(request: Request[Any, Any, Any], door: TheDoor) -> Response[bytes]:
    """Every worker that is alive: its device, slots, measured peaks, kernels and state."""
    return _respond(request, await door.announcements(), 200)


@get("/v1/kernels", tags=["fleet"], operation_class=openapi.KERNELS)
async def kernels(request: Request[Any, Any, Any], door: TheDoor) -> Response[bytes]:
    """Every kernel that has been announced: its signature, formulas and limits."""
    return _respond(request, await door.kernels(), 200)


def make_asgi(settings: Settings, door: Door) -> Litestar:
    """The ASGI application over one broker."""
    return Litestar(
        [
            *(healthz, readyz, submit, job, cancel, events, job_events, devices, kernels),
            *(dead, dead_letter, replay, purge, purge_all, accounts, metrics),
        ],
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


def _respond(request: Request[Any, Any, Any], value: Any, status: int) -> Response[bytes]:
    """The value in msgpack where the client accepts that, else in JSON (NaN and infinity are null there)."""
    accepts = request.headers.get("accept", "")
    if "msgpack" in accepts:
        return Response(msgspec.msgpack.encode(value), status_code=status, media_type=wire.MSGPACK)
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


async def _lines_of(told: AsyncGenerator[list[tuple[int, JobView]], None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(told):
        async for views in told:
            yield _lines(views)


def _lines(views: Iterable[tuple[int, JobView]]) -> bytes:
    lines = [JobLine(**msgspec.structs.asdict(view), index=index) for index, view in views]
    return _ENCODER.encode_lines(lines)
