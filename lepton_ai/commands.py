"""The commands of `lepton`. Each is a function; its docstring is its help."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated, Literal, NoReturn

from cyclopts import App, Parameter, validators

from lepton_ai import services

__all__ = ["app"]

app = App(
    name="lepton",
    help="Every compute job on the device that finishes it soonest, on Celery and Redis.",
    version=lambda: version("lepton-ai"),
    result_action="return_value",
)


@app.command
def demo(
    *,
    jobs: Annotated[
        int, Parameter(validator=validators.Number(gte=1), help="How many jobs to feed through the three doors.")
    ] = 600,
    seed: Annotated[int, Parameter(help="Which jobs: the same seed gives the same stream.")] = 7,
    json: Annotated[bool, Parameter(help="Print one JSON object as the last line.", negative="")] = False,
) -> None:
    """Start a whole Lepton on this machine, feed it real data, say where each job went and why, and clean up.

    Broker, ingest, router, telemetry and two workers run in a private directory on free ports; jobs come through HTTP,
    the Python client and a plain Celery producer. Ctrl-C ends it at any moment.
    """
    _service("demo", "--jobs", str(jobs), "--seed", str(seed), *(["--json"] if json else []))


@app.command
def serve(service: Annotated[Literal["ingest", "router", "telemetry"], Parameter(help="Which service.")]) -> None:
    """Run one service in the foreground until Ctrl-C or SIGTERM. Needs LEPTON_REDIS_URL."""
    _service(service)


def _service(*arguments: str) -> NoReturn:
    """Becomes `python -m pipeline` where the services are: no parent is left that signals would have to pass."""
    command = [sys.executable, "-m", "pipeline", *arguments]
    # Until it can handle them, which its first lines do; else a Ctrl-C while Python starts would end in a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    os.execve(sys.executable, command, services.environ())  # noqa: S606 - no shell is meant
