"""What of Lepton is there: a scenario that needs more says `not yet`, and is played as soon as it is merged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lepton_ai import Client

__all__ = ["admission", "dead_letters", "limits", "submit_option"]

_ROOT = Path(__file__).parents[2]


def submit_option(name: str) -> Callable[[], str]:
    """An option of `Client.submit`."""
    known = inspect.signature(Client.submit).parameters
    return lambda: "" if name in known else f"Client.submit has no {name}"


def dead_letters() -> str:
    """Who kills its workers becomes a dead letter after `LEPTON_ATTEMPTS`."""
    return _used("ATTEMPTS", "queues", "a job that kills its workers is run again for ever")


def admission() -> str:
    """The ingest refuses what is too much (503, 429)."""
    return _used("waiting_jobs", "pipeline/ingest", "the ingest refuses nothing for being too much")


def limits() -> str:
    """A worker whose kernel does not end is ended."""
    return _used("least_limit_s", "tasks", "no worker is ended for a kernel that does not end")


@cache
def _used(word: str, where: str, otherwise: str) -> str:
    place = _ROOT / where
    files = [file for file in place.rglob("*") if file.suffix in (".py", ".lua")]
    return "" if any(word in file.read_text("utf-8") for file in files) else otherwise
