"""ray's tasks: no broker and no stored results, which makes it quicker than it would be with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from bench import cpu, peer, synthetic
from bench.load import Load


class Peer(peer.Peer):
    """A ray of its own on this machine."""

    settings = "a ray of its own; remote() of all, then one get()"

    def start(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(
            num_cpus=cpu.CORES,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            object_store_memory=1 << 30,
        )
        self.prepare()

    def prepare(self) -> None:
        self._functions = {name: ray.remote(function) for name, function in synthetic.FUNCTIONS.items()}
        self._touch = ray.remote(synthetic.touch)

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        function = self._functions[load.kernel]
        return list(ray.get([function.remote(**row) for row in rows]))

    def carry(self, arrays: Sequence[Any]) -> list[float]:
        return list(ray.get([self._touch.remote(array) for array in arrays]))

    def roles(self) -> dict[str, list[int]]:
        threads = Path("/proc/self/task").iterdir()
        return {"ray": [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]}

    def stop(self) -> None:
        ray.shutdown()
