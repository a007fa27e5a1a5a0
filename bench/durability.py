"""What it costs that an accepted job is on the broker's disk before it is acknowledged.

`python -m bench.durability [--json] [--folder DIR]`, from the repository's root. Three brokers in turn, round after
round: `everysec` (promises nothing of the last two seconds), `appendfsync always`, and `everysec` with a `WAITAOF`
behind each acceptance. An acceptance is what the ingest sends: a transaction with one LPUSH of a small job and its
notes. The disk is that of DIR (default: where temporary files are): a memory disk would measure nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import redis.asyncio as redis

from lepton_ai.durability import Barrier
from lepton_ai.settings import Settings
from queues.embedded import EmbeddedBroker

#: Name, the broker's setting, what is sent behind each acceptance.
WAYS: tuple[tuple[str, Literal["everysec", "fsync"], Barrier], ...] = (
    ("everysec", "everysec", Barrier()),
    ("always", "fsync", Barrier()),
    ("everysec + WAITAOF", "everysec", Barrier(5.0)),
)
MESSAGE = os.urandom(600).hex()


async def accept(client: Any, barrier: Barrier) -> float:
    """Milliseconds until one acceptance may be acknowledged."""
    start = time.perf_counter()
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.execute_command("MULTI")
        pipeline.lpush("lepton.ingest", MESSAGE)
        pipeline.hset("lepton:jobs:0", "job", "waits in its lane for a router")
        pipeline.xadd("lepton:events", {"e": "accepted"}, maxlen=20_000)
        pipeline.execute_command("EXEC")
        for command in barrier.commands():
            pipeline.execute_command(*command)
        barrier.check((await pipeline.execute())[5:])
    return (time.perf_counter() - start) * 1e3


async def load(url: str, barrier: Barrier, seconds: float, clients: int) -> tuple[list[float], float]:
    """Milliseconds of each acceptance, and acceptances a second, of clients that each have one in flight."""
    found: list[float] = []
    connections = [redis.Redis.from_url(url, single_connection_client=True) for _ in range(clients)]
    for connection in connections:
        await connection.ping()
    began = time.perf_counter()

    async def one(connection: Any) -> None:
        while time.perf_counter() < began + seconds:
            found.append(await accept(connection, barrier))

    await asyncio.gather(*map(one, connections))
    rate_hz = len(found) / (time.perf_counter() - began)
    for connection in connections:
        await connection.aclose()
    return found, rate_hz


def measure(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Every way in turn, `rounds` times, with one client and with 32."""
    latencies: dict[tuple[str, int], list[float]] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    for at in range(rounds):
        for name, durability, barrier in WAYS:
            with EmbeddedBroker(
                Settings(durability=durability), folder / f"{at}-{name.split()[0]}{len(name)}"
            ) as broker:
                for clients in (1, 32):
                    found, rate_hz = asyncio.run(load(broker.url, barrier, seconds, clients))
                    latencies.setdefault((name, clients), []).extend(found)
                    rates.setdefault((name, clients), []).append(rate_hz)
    return {
        f"{name}, {clients} at once": {
            "p50_ms": round(float(np.percentile(found, 50)), 2),
            "p99_ms": round(float(np.percentile(found, 99)), 2),
            "accepted_per_s": round(float(np.median(rates[name, clients]))),
        }
        for (name, clients), found in latencies.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lepton-bench-", dir=options.folder) as folder:
        found = measure(Path(folder), options.rounds, options.seconds)
    if options.json:
        print(json.dumps(found))
        return
    for name, each in found.items():
        print(f"{name:<32} p50 {each['p50_ms']:>7} ms  p99 {each['p99_ms']:>7} ms  {each['accepted_per_s']:>6}/s")


if __name__ == "__main__":
    main()
