"""`python -m pipeline ingest|router|telemetry`: one service of the decision side, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading

from lepton_ai.errors import LeptonError, NoBroker
from lepton_ai.settings import Settings
from queues import logs

_USAGE = "usage: python -m pipeline ingest|router|telemetry|demo"


def main(arguments: list[str]) -> int:
    """Runs one service; the exit code is 2 where it cannot be started as asked."""
    if arguments[:1] == ["demo"]:
        from pipeline.demo import main as demo

        return demo(arguments[1:])
    if len(arguments) != 1 or arguments[0] not in ("ingest", "router", "telemetry"):
        print(_USAGE, file=sys.stderr)
        return 2
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
