"""The ingest service: the HTTP interface on granian, in one process, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import signal

import structlog
from granian.constants import Interfaces
from granian.server.embed import Server

from lepton_ai.errors import InvalidSettings
from lepton_ai.settings import Settings
from pipeline.ingest.door import Door
from pipeline.ingest.routes import make_asgi

__all__ = ["serve"]

_STOP_S = 10.0
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


async def _serve(settings: Settings, url: str) -> None:
    door = Door(settings, url)
    server = Server(
        make_asgi(settings, door),
        address=settings.http_host,
        port=settings.http_port,
        interface=Interfaces.ASGI,
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
    door.stop_waiting()
    server.stop()  # type: ignore[no-untyped-call]
    stopping.cancel()
    try:
        async with asyncio.timeout(_STOP_S):
            await serving
    except TimeoutError:
        log.warning("ingest_cut_off", reason=f"a request was still open after {_STOP_S} s")
    log.info("ingest_offline")
