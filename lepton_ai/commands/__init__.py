"""The commands of `lepton`. Each is a function; its docstring is its help."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Literal, NoReturn

from cyclopts import App, Group, Parameter, validators

from lepton_ai import services
from lepton_ai.commands import dead, fleet, jobs

__all__ = ["app"]


def _version() -> str:
    from importlib import metadata  # 30 ms that no other command needs

    try:
        return metadata.version("lepton-ai")
    except metadata.PackageNotFoundError:
        return "a checkout that is not installed"


app = App(
    name="lepton",
    help="Every compute job on the device that finishes it soonest, on Celery and Redis.",
    version=_version,
    # As it is written: examples keep their lines, and `float32[m,k]` is no markup.
    help_format="plaintext",
    result_action="return_value",
)
_COMMANDS: dict[Group, tuple[Callable[..., int], ...]] = {
    Group.create_ordered("Jobs"): (
        jobs.submit,
        jobs.status,
        jobs.result,
        jobs.why,
        jobs.cancel,
        jobs.state,
    ),
    Group.create_ordered("Fleet"): (
        fleet.devices,
        fleet.kernels,
        fleet.events,
        fleet.quarantine,
        fleet.doctor,
    ),
}
for _group, _commands in _COMMANDS.items():
    for _command in _commands:
        app.command(_command, group=_group)
_dead = App(
    name="dead",
    help="Look at the jobs that were given up, run them once more, or throw them away.",
    help_format="plaintext",
    group=Group.create_ordered("Dead letters"),
)
_dead.command(dead.listed, name="list")
for _command in (dead.show, dead.replay, dead.purge):
    _dead.command(_command)
app.command(_dead)
app.register_install_completion_command(
    help="Write the completion script for bash, zsh, fish or PowerShell, and say how it is loaded.",
    add_to_startup=False,  # a shell's start file is its owner's
    group=Group.create_ordered("Shell"),
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

    Broker, ingest, router, telemetry and two workers run in a private
    directory on free ports; jobs come through HTTP, the Python client and a
    plain Celery producer. Ctrl-C ends it at any moment.
    """
    _service("demo", "--jobs", str(jobs), "--seed", str(seed), *(["--json"] if json else []))


@app.command
def up(
    *,
    broker: Annotated[
        str | None, Parameter(help="A broker of your own. Default: LEPTON_REDIS_URL, else one that comes along.")
    ] = None,
    workers: Annotated[
        str | None, Parameter(help="Devices and their slots: cpu:2,fpga:1. Default: every device that is found.")
    ] = None,
    fleet: Annotated[
        str | None, Parameter(help="Or a file that names the workers, their limits and kernels (examples/fleet.toml).")
    ] = None,
    flower: Annotated[bool, Parameter(help="Start Flower too, on the loopback address.", negative="")] = False,
    flower_port: Annotated[int, Parameter(help="Where Flower listens; 0: any free port.")] = 5555,
    data: Annotated[
        str | None, Parameter(help="Where the broker that comes along keeps its data. Default: ~/.local/state/lepton.")
    ] = None,
    http_port: Annotated[
        int | None, Parameter(help="Where HTTP listens; 0: any free port. Default: LEPTON_HTTP_PORT, else 8780.")
    ] = None,
    log: Annotated[
        Literal["console", "json"] | None, Parameter(help="For people or for machines. Default: LEPTON_LOG.")
    ] = None,
) -> None:
    """Run a whole Lepton on this machine until Ctrl-C, with a worker for each device.

    Broker, ingest, router, telemetry, workers and Flower are watched: what dies
    is started again. Ctrl-C drains: what runs is finished, what waits is kept
    for the next start. A second Ctrl-C quits at once.
    """
    given = {"broker": broker, "workers": workers, "fleet": fleet, "data": data, "http-port": http_port, "log": log}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    _service("up", *options, f"--flower-port={flower_port}", *(["--flower"] if flower else []))


@app.command
def serve(service: Annotated[Literal["ingest", "router", "telemetry"], Parameter(help="Which service.")], /) -> None:
    """Run one service in the foreground until Ctrl-C or SIGTERM.

    Needs LEPTON_REDIS_URL.
    """
    _service(service)


def _service(*arguments: str) -> NoReturn:
    """Becomes `python -m pipeline` where the services are: no parent is left that signals would have to pass."""
    command = [sys.executable, "-P", "-m", "pipeline", *arguments]  # not a `pipeline.py` of the folder we are in
    # Until it can handle them, which its first lines do; else a Ctrl-C while Python starts would end in a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    os.execve(sys.executable, command, services.environ())  # noqa: S606 - no shell is meant
