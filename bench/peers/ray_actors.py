"""ray's actors: one a core, each called in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from bench import cpu, synthetic
from bench.load import Load
from bench.peers import ray_tasks


@ray.remote
class _Actor:
    def call(self, kernel: str, row: Mapping[str, Any]) -> float:
        return synthetic.FUNCTIONS[kernel](**row)

    def touch(self, array: Any) -> float:
        return synthetic.touch(array)


class Peer(ray_tasks.Peer):
    """A call is a message to a process that is there already."""

    settings = "a ray of its own; an actor a core, called in turn, then one get()"

    def prepare(self) -> None:
        self._actors = [_Actor.remote() for _ in range(cpu.CORES)]

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        actors = self._actors
        return list(ray.get([actors[at % len(actors)].call.remote(load.kernel, row) for at, row in enumerate(rows)]))

    def carry(self, arrays: Sequence[Any]) -> list[float]:
        actors = self._actors
        return list(ray.get([actors[at % len(actors)].touch.remote(array) for at, array in enumerate(arrays)]))
