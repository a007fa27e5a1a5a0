"""The ingest service: the HTTP interface on granian, in one process, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

import structlog
from granian.constants import Interfaces
from granian.server.embed import Server
from litestar import Litestar
from litestar.enums import ScopeType
from litestar.types import Receive, Scope, Send

from lepton_ai.errors import InvalidSettings
from lepton_ai.settings import Settings
from pipeline.ingest.door import Door
from pipeline.ingest.routes import make_asgi

__all__ = ["serve"]

#: How long requests have to be answered once the service ends, and streams to be taken by their readers.
_STOP_S, _STREAMS_STOP_S = 10.0, 0.5
_LOOK_S = 0.05
#: Clients at once; the next one waits until one leaves. granian's own limit is 128, and a client that keeps its
#: connection for later, or follows events, counts: the 129th waited for 30 s. Above it, open files are the limit.
_CONNECTIONS = 800
#: granian's threads end some milliseconds after it says that they have. One that Python's own end overtakes aborts the
#: process: exit code -6 at one stop in twenty, without this.
_THREADS_END_S = 0.1
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

log = structlog.get_logger()


def serve(settings: Settings, url: str) -> None:
    """Serves until told to stop. InvalidSettings where it would listen beyond this machine: there are no keys yet."""
    if settings.http_host not in _LOOPBACK and not settings.http_unauthenticated:
        raise InvalidSettings(
            f"LEPTON_HTTP_HOST is {settings.http_host}, and there is no authentication yet: keep to 127.0.0.1, or set "
            "LEPTON_HTTP_UNAUTHENTICATED=true where only friends can reach that address",
            "http_host",
        )
    asyncio.run(_serve(settings, url))
    time.sleep(_THREADS_END_S)


async def _serve(settings: Settings, url: str) -> None:
    door = Door(settings, url)
    counted = _Counted(make_asgi(settings, door))
    server = Server(
        counted,
        address=settings.http_host,
        port=settings.http_port,
        interface=Interfaces.ASGI,
        backpressure=_CONNECTIONS,
        log_enabled=False,
    )
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    serving = asyncio.create_task(server.serve())
    log.info("ingest_online", address=f"http://{settings.http_host}:{settings.http_port}")
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    streaming = door.feed.readers > 0
    door.stop_waiting()
    server.stop()  # type: ignore[no-untyped-call]
    stopping.cancel()
    asked_at = loop.time()
    while not serving.done() and loop.time() < asked_at + _STOP_S:
        await asyncio.wait([serving], timeout=_LOOK_S)
        if streaming and loop.time() > asked_at + _STREAMS_STOP_S and counted.open <= door.feed.readers:
            break  # all are answered but streams whose clients do not read: those go on later, by Last-Event-ID
    if not serving.done():
        log.warning("ingest_cut_off", reason=f"after {loop.time() - asked_at:.1f} s a client had not read all")
        serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    log.info("ingest_offline")


class _Counted:
    """An application that knows how many of its requests are open."""

    def __init__(self, application: Litestar) -> None:
        self._application = application
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._application(scope, receive, send)
            return
        self.open += 1
        try:
            await self._application(scope, receive, send)
        finally:
            self.open -= 1
