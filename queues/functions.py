"""The server functions of this release (`functions.lua`), by name and version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Final

from lepton_ai.errors import BrokerUnavailable
from queues.connection import Command, CommandError, Connection

__all__ = ["NOT_NOW", "call", "is_full", "library", "load", "name"]

#: What a broker answers that will be able to work again, or that somebody must mend: no reason for a traceback.
NOT_NOW: Final = ("MISCONF", "READONLY", "OOM", "LOADING", "MASTERDOWN", "NOREPLICAS", "BUSY")


@cache
def library() -> tuple[str, str]:
    """The version, which is a hash of the source, and the source for `FUNCTION LOAD`."""
    source = resources.files("queues").joinpath("functions.lua").read_text("utf-8")
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    return version, source.replace("VERSION", version)


def name(function: str) -> str:
    """A function's name on the broker: two releases side by side each call their own."""
    return f"lepton_{function}_{library()[0]}"


def call(function: str, keys: Sequence[str], arguments: Iterable[str | bytes | int | float] = ()) -> Command:
    """The command that calls a function."""
    return ("FCALL", name(function), len(keys), *keys, *arguments)


def load(connection: Connection) -> None:
    """Puts the functions on the broker, which keeps them over a restart."""
    try:
        connection.call("FUNCTION", "LOAD", library()[1])
    except CommandError as error:
        if "already exists" in error.message:
            return
        # One that is full still has the functions of an earlier start, where there was one.
        if is_full(error) and connection.call("FUNCTION", "LIST", "LIBRARYNAME", f"lepton_{library()[0]}"):
            return
        if error.message.startswith(NOT_NOW):
            raise BrokerUnavailable(f"the broker refuses to work: {error.message}") from error
        raise


def is_full(reply: object) -> bool:
    """Whether a command was refused because the broker's memory is full."""
    return isinstance(reply, CommandError) and reply.message.startswith("OOM")
