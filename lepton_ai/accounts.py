"""The accounts of a Lepton: where every accepted job is, or how it ended; read at one moment by a server function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from lepton_ai.errors import BrokerUnavailable

__all__ = ["ASK", "ENDS", "Accounts", "accounts_of", "sizes_command"]

#: What tells which functions a broker has, for those who have none of their own.
ASK: Final = ("FUNCTION", "LIST", "LIBRARYNAME", "lepton_*")
#: How an acceptance is settled: the job ended, or it was accepted once more (retried) or once too often (duplicate).
ENDS: Final = ("succeeded", "failed", "cancelled", "expired", "dead", "retried", "duplicate")
_SIZES: Final = "lepton_sizes_"


class Accounts(msgspec.Struct, frozen=True):
    """accepted = the sum of ENDS + waiting + in flight + difference."""

    accepted: int
    """Jobs accepted since the broker's data began: those that wait in a lane included."""
    waiting: int
    """In a lane, in a router, parked, suspect, or held until they are due."""
    in_flight: int
    """On a device's queue, or with a worker."""
    difference: int
    """Jobs of which nobody knows, or, below 0, that are counted twice: not 0 means that something is wrong."""
    terms: dict[str, int]
    """Every counter and every size behind these, by name: succeeded, failed, ..., lanes, parked_now, held, ..."""

    def equation(self) -> str:
        """The accounts in one line, without the ends that never came."""
        ends = [f"{self.terms[name]:,} {name}" for name in ENDS if self.terms.get(name)]
        rest = [f"{self.waiting:,} waiting", f"{self.in_flight:,} in flight"]
        lost = [f"{self.difference:,} unaccounted for"] if self.difference else []
        return f"{self.accepted:,} accepted = {' + '.join([*ends, *rest, *lost])}"


def accounts_of(flat: Sequence[Any]) -> Accounts:
    """What the function `sizes` answers: name, value, name, value, ..."""
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in flat[::2]]
    terms = dict(zip(names, map(int, flat[1::2]), strict=True))
    return Accounts(
        accepted=terms.get("accepted", 0),
        waiting=terms.get("waiting", 0),
        in_flight=terms.get("in_flight", 0),
        difference=terms.get("difference", 0),
        terms=terms,
    )


def sizes_command(listed: Any) -> tuple[str | int, ...]:
    """What asks for the accounts, by the answer to ASK; BrokerUnavailable where the broker has no such function.

    Several releases may have left theirs; each knows where all jobs can be, or its routers would lose some.
    """
    found = sorted(name for library in listed for name in _functions(library) if name.startswith(_SIZES))
    if not found:
        raise BrokerUnavailable("the broker has no functions of Lepton's yet: start a router, a worker or an ingest")
    return ("FCALL_RO", found[-1], 0)


def _functions(library: Any) -> Iterator[str]:
    for each in _mapping(library).get("functions", ()):
        name = _mapping(each).get("name", b"")
        yield name.decode() if isinstance(name, bytes) else str(name)


def _mapping(pairs: Any) -> dict[str, Any]:
    """An answer that is a map in RESP3 and a flat list in RESP2."""
    found = pairs if isinstance(pairs, Mapping) else dict(zip(pairs[::2], pairs[1::2], strict=False))
    return {name.decode() if isinstance(name, bytes) else str(name): value for name, value in found.items()}
