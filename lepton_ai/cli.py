"""The command `lepton`. Each verb is a function; its docstring is its help."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

from lepton_ai import services

if TYPE_CHECKING:
    from cyclopts import App

__all__ = ["main"]


def _app() -> App:
    from cyclopts import App, Parameter

    app = App(
        name="lepton",
        help="Every compute job on the device that finishes it soonest, on Celery and Redis.",
        version=version("lepton-ai"),
    )

    @app.command
    def demo(
        *,
        jobs: Annotated[int, Parameter(help="How many jobs to feed through the three doors.")] = 600,
        seed: Annotated[int, Parameter(help="Which jobs: the same seed gives the same stream.")] = 7,
        json: Annotated[bool, Parameter(help="Print one JSON object as the last line.", negative="")] = False,
    ) -> int:
        """Start a whole Lepton on this machine, feed it real data, say where each job went and why, and clean up.

        Broker, ingest, router, telemetry and two workers run in a private directory on free ports; jobs come
        through HTTP, the Python client and a plain Celery producer. Ctrl-C ends it at any moment.
        """
        return _service("demo", "--jobs", str(jobs), "--seed", str(seed), *(["--json"] if json else []))

    @app.command
    def serve(service: str) -> int:
        """Run one service in the foreground: ingest, router or telemetry. Needs LEPTON_REDIS_URL."""
        return _service(service)

    return app


def _service(*arguments: str) -> int:
    """Runs `python -m pipeline` where the services are; Ctrl-C is the child's to handle."""
    child = subprocess.Popen([sys.executable, "-m", "pipeline", *arguments], env=services.environ())
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the terminal has sent it to the child as well, which cleans up and ends


def main() -> int:
    """The console script."""
    try:
        app = _app()
    except ModuleNotFoundError as error:
        print(f"lepton: the command line needs {error.name}: pip install 'lepton-ai[cli]'", file=sys.stderr)
        return 2
    code = app()
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    raise SystemExit(main())
