"""`python -m pipeline ingest|router|telemetry`: one service of the decision side, until SIGTERM or Ctrl-C.

`up` is all of them, and what they need, under one supervisor; `demo` is that for a minute. What takes time to import is
imported inside: a Ctrl-C while it loads is one like any other.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lepton_ai.settings import Settings

_USAGE = "usage: python -m pipeline ingest|router|telemetry|demo|up"
_OURS = ("examples", "lepton_ai", "pipeline", "queues", "tasks")


def main(arguments: list[str]) -> int:
    """Runs one service; the exit code is 2 where it cannot be started as asked, 130 after an early Ctrl-C."""
    # Until each has its own handlers there is nothing to clean up, and an exception while a module loads may get lost.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # `lepton` starts us with them held
    if sys.stdout is None:  # `>&-`
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        if arguments[:1] not in (["demo"], ["up"]):
            return _run(arguments)
        code = _run_all(arguments[0], arguments[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        print(f"lepton: {arguments[0]} needs {error.name}: pip install 'lepton-ai[all]'", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever leans on Ctrl-C cannot change what has been
    return code


def _run_all(command: str, arguments: list[str]) -> int:
    if command == "demo":
        from pipeline.demo import main as demo

        return demo(arguments)
    from pipeline.up import main as up

    return up(arguments)


def _run(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in ("ingest", "router", "telemetry"):
        print(_USAGE, file=sys.stderr)
        return 2
    from lepton_ai.errors import LeptonError, NoBroker
    from lepton_ai.settings import Settings
    from queues import logs

    try:
        settings = Settings.read()
        if not settings.redis_url:
            raise NoBroker("set LEPTON_REDIS_URL to the broker, such as redis://127.0.0.1:6379/0")
        logs.configure(settings, arguments[0])
        _serve(arguments[0], settings, settings.redis_url)
    except LeptonError as error:
        print(f"lepton: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(service: str, settings: Settings, url: str) -> None:
    if service == "ingest":
        from pipeline.ingest.server import serve

        serve(settings, url)
        return
    import threading

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if service == "router":
        from pipeline.router import Router

        Router(settings, url).run(stop)
        return
    from pipeline.telemetry import Telemetry

    Telemetry(settings, url).run(stop)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
