"""What a peer is: one way to run jobs on the broker, with a client and workers. Each has a file in `bench/peers/`.

A file there has a class `Peer` that derives from this one. It runs in a process of its own (bench/contender.py), whose
CPU is the client's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.load import Load
from pipeline.processes import Processes, Program, environment

__all__ = ["URL", "Peer", "Place", "broker_url"]

#: Where a peer's worker and client find the broker.
URL = "BENCH_BROKER_URL"


class Place(msgspec.Struct, frozen=True):
    """Where the contest is held."""

    broker_url: str
    folder: str
    """For logs and the like."""
    parallel: int
    """Jobs that may compute at once."""
    one_by_one: bool = False
    """Jobs come singly and not in bulk."""

    @property
    def peers_url(self) -> str:
        """A database beside Lepton's, so that neither hears the other's messages."""
        return f"{self.broker_url}?db=1"


class Peer:
    """A contender's client, and its workers' keeper."""

    #: How it is run: what was found to be its fastest.
    settings = ""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.processes = Processes(self._log, lambda *_, **__: None, restart=False)

    def start(self) -> None:
        """Starts the workers and connects; the first job waits until they are up."""

    def wake(self) -> None:
        """Comes before each turn, and is not measured."""

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Submits all and waits for all; the totals in the order of the rows."""
        raise NotImplementedError

    def one(self, load: Load, row: Mapping[str, Any]) -> float:
        """Submits one and waits for it."""
        return self.run(load, [row])[0]

    def carry(self, arrays: Sequence[Any]) -> list[float]:
        """Submits one job of `bench.touch` an array and waits for all."""
        raise NotImplementedError

    def rest(self) -> None:
        """Comes after each turn."""

    def facts(self) -> dict[str, Any]:
        """What is to be said of it in the end."""
        return {}

    def roles(self) -> dict[str, list[int]]:
        """Its processes by what they are for, those that it has started."""
        return {name: [process.pid] for name, process in self.processes.running.items()}

    def stop(self) -> None:
        self.processes.stop(list(self.processes.running), 10)

    def work(self, name: str, *arguments: str) -> None:
        """Starts a worker: what comes after the interpreter."""
        self.processes.start(Program(name, ("-m", *arguments), environment({URL: self.place.peers_url})))

    def _log(self, name: str) -> Any:
        return (Path(self.place.folder) / f"{type(self).__module__}-{name}.log").open("ab")


def broker_url() -> str:
    """The broker's address, in a worker or a client."""
    try:
        return os.environ[URL]
    except KeyError:
        sys.exit(f"{URL} is not set: a bench starts this")
