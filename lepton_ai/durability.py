"""What an acceptance waits for under `LEPTON_DURABILITY=fsync`: for the write's answer, or for the disk besides.

A broker with `appendfsync always` answers a write once it is on its disk. Of any other one with an append-only file
`WAITAOF` (Valkey, Redis >= 7.2) asks it, on the connection that wrote: within a transaction it would not wait, so it
goes behind the EXEC. Which of the two it is, is found out once for a broker (docs/decisions/0008-durability.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from lepton_ai.errors import BrokerUnavailable, InvalidSettings

__all__ = ["ASK", "Barrier", "barrier", "barrier_of"]

Command = tuple[str, ...]
#: What tells how durable a broker is; an error counts as an answer.
ASK: Final[tuple[Command, ...]] = (
    ("CONFIG", "GET", "appendonly"),
    ("CONFIG", "GET", "appendfsync"),
    ("WAITAOF", "1", "0", "1"),
)
#: A disk that is written to once a second is waited for a few of them.
_WAIT_S: Final = 5.0
_FIX: Final = "give the broker `appendonly yes` and `appendfsync always`, or leave LEPTON_DURABILITY at everysec"


class Barrier(msgspec.Struct, frozen=True):
    """What is to be sent behind a write, and whether the answers let it be acknowledged."""

    wait_s: float = 0.0
    """0: the answer to the write itself is enough."""

    def commands(self) -> tuple[Command, ...]:
        """To be sent on the connection that wrote, behind the EXEC of a transaction."""
        return (("WAITAOF", "1", "0", str(round(self.wait_s * 1000))),) if self.wait_s else ()

    def check(self, answers: Sequence[Any]) -> None:
        """Takes the answers to `commands`; BrokerUnavailable where the write is not known to be on the disk.

        It may reach it all the same, as after every answer that was lost.
        """
        for answer in answers:
            if isinstance(answer, Exception):
                raise BrokerUnavailable(f"the broker does not say whether it is on the disk: {answer}")
            if answer[0] < 1:
                raise BrokerUnavailable(f"the broker has not written it to its disk within {self.wait_s:g} s")


async def barrier(client: Any, durability: Literal["everysec", "fsync"]) -> Barrier:
    """What a broker needs, asked through a `redis.asyncio.Redis`; raises InvalidSettings and what redis-py raises."""
    if durability == "everysec":
        return Barrier()
    async with client.pipeline(transaction=False) as pipeline:
        for command in ASK:
            pipeline.execute_command(*command)
        return barrier_of(await pipeline.execute(raise_on_error=False))


def barrier_of(answers: Sequence[Any], wait_s: float = _WAIT_S) -> Barrier:
    """What the answers to `ASK` mean; InvalidSettings, with the way out, where that broker cannot promise it."""
    appendonly, appendfsync, waited = answers
    only, policy = _value(appendonly, "appendonly"), _value(appendfsync, "appendfsync")
    if only == "yes" and policy == "always":
        return Barrier()
    if only == "no" or "appendonly is disabled" in str(waited):
        raise _refused("the broker has no append-only file")
    if policy == "no":
        raise _refused("the broker leaves it to its system when to write to the disk (appendfsync no)")
    if not isinstance(waited, Exception):
        return Barrier(wait_s)
    found = f"appendfsync {policy}" if policy else f"it does not tell its configuration: {appendfsync}"
    raise _refused(f"the broker cannot be asked whether a write is on its disk ({waited}; {found})")


def _refused(why: str) -> InvalidSettings:
    return InvalidSettings(f"LEPTON_DURABILITY is fsync, and {why}: {_FIX}", "durability")


def _value(answer: Any, name: str) -> str:
    """The value in an answer of CONFIG GET, a map or a flat list; empty where there is none, or an error."""
    if isinstance(answer, Exception):
        return ""
    pairs = answer if isinstance(answer, Mapping) else dict(zip(answer[::2], answer[1::2], strict=True))
    found = pairs.get(name, pairs.get(name.encode(), ""))
    return found.decode() if isinstance(found, bytes) else str(found)
