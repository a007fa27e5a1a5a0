"""The states that the jobs of a batch carry by key: read before they run, handed on, and committed with them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from numpy.typing import NDArray

from lepton_ai import carried, topology, wire
from queues.broker import Broker
from queues.steps import Carry
from tasks.batching import TakenJob

__all__ = ["Carried"]

_Arrays = dict[str, NDArray[Any]]


class _State(msgspec.Struct):
    version: str
    """As it was read."""
    value: bytes | None
    arrays: _Arrays | None = None
    """What it stands for, once it has been asked for."""
    jobs: list[str] = []
    """Those of this batch that it has come from."""


class Carried:
    """The states of one batch. Their jobs run one after the other."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}
        self._new_version = secrets.token_hex(8)

    def load(self, broker: Broker, jobs: Sequence[TakenJob]) -> set[str]:
        """Reads the states of these jobs. Returns those that have ended already, which must not count twice."""
        keys = list(dict.fromkeys(map(_key, jobs)))
        states, ended = broker.carried(keys, [job.id for job in jobs])
        self._states = {key: _State(version, value) for key, (version, value) in zip(keys, states, strict=True)}
        return ended

    def of(self, job: TakenJob) -> _Arrays:
        """What a job goes on with; InvalidArguments where that is not what its kernel carries."""
        state = self._states[_key(job)]
        if state.arrays is None:
            state.arrays = carried.decode(state.value, job.kernel.signature)
        return state.arrays

    def leave(self, job: TakenJob, outputs: _Arrays, limit_bytes: int) -> tuple[_Arrays, bytes]:
        """A job's outputs without what it carries on, and that, encoded; TooLarge above the limit."""
        names = job.kernel.signature.initial
        left = {name: value for name, value in outputs.items() if name in names}
        return {name: value for name, value in outputs.items() if name not in names}, carried.encode(left, limit_bytes)

    def keep(self, job: TakenJob, value: bytes) -> None:
        """A job has succeeded, and left this."""
        state = self._states[_key(job)]
        state.value, state.arrays = value, None
        state.jobs.append(job.id)

    def commits(self) -> list[Carry]:
        """What is to be committed with the batch."""
        return [
            Carry(key, state.version, self._new_version, state.value, tuple(state.jobs))
            for key, state in self._states.items()
            if state.jobs and state.value is not None
        ]


def _key(job: TakenJob) -> str:
    return topology.carried(wire.lane_of(job.message), job.kernel.name, job.options.state_key or "")
