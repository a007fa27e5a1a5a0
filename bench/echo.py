"""What HTTP itself costs: an ASGI application that answers with what it was sent. `python -m bench.echo PORT`."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import Any

from granian.constants import Interfaces
from granian.server.embed import Server


async def echo(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def serve(port: int) -> None:
    server = Server(
        echo, address="127.0.0.1", port=port, interface=Interfaces.ASGI, backpressure=800, log_enabled=False
    )
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    serving = asyncio.create_task(server.serve())
    await stopped.wait()
    server.stop()
    await serving


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
    time.sleep(0.1)  # until granian's threads have ended: see pipeline/ingest/server.py
