"""What it costs to hand an array to a worker: through the ring, through the broker, and copied once by NumPy.

`python -m bench.blobs [--json] [--rounds N]`, from the repository's root. Round after round, for float32 arrays of
1 and 16 MiB: `np.copyto` between two warm arrays; the ring, written here and read by another process, which looks at
the header (`ring`) or adds all of it up (`ring, summed`; beside it the sum of an array of one's own); a blob in Redis,
in chunks of several sizes, while a third process pings the broker: what one write keeps everybody else waiting.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import Any

import numpy as np
import redis

from lepton_ai import blob
from lepton_ai.ring import Ring, RingReader
from lepton_ai.settings import Settings
from queues.embedded import EmbeddedBroker

MIB = 1 << 20
SIZES = (MIB, 16 * MIB)
CHUNKS = (MIB // 8, MIB // 4, MIB // 2, MIB, 4 * MIB, 16 * MIB)


def reading(pipe: Pipe) -> None:
    """The worker's side: answers each reference once the array is there and, where asked, added up."""
    reader = RingReader()
    while (asked := pipe.recv()) is not None:
        reference, summed = asked
        array = reader.get(reference, 1 << 30)
        total = float(array.sum()) if summed else 0.0
        reader.check(reference)
        pipe.send(total)


def pinging(url: str, pipe: Pipe) -> None:
    """Milliseconds that the slowest hundredth and the slowest ping took, between two messages of the pipe."""
    client = redis.Redis.from_url(url)
    while pipe.recv():
        waits = []
        while not pipe.poll():
            start = time.perf_counter()
            client.ping()
            waits.append((time.perf_counter() - start) * 1e3)
            time.sleep(0.0005)
        pipe.recv()
        waits.sort()
        pipe.send((waits[int(len(waits) * 0.99)], waits[-1]))


def seconds(work: Callable[[], Any], times: int) -> float:
    """What it took, the median of a few."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def through_redis(client: redis.Redis, array: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Seconds to write an array and to read it again."""
    start = time.perf_counter()
    reference, commands = blob.write_commands(array, "bench")
    for at in range(0, len(commands), 8):
        _all(client, commands[at : at + 8])
    wrote = time.perf_counter()
    blob.read(reference, _all(client, blob.read_commands(reference, "bench", 1 << 30)))
    read = time.perf_counter()
    client.unlink(*blob.keys("bench", [reference.blob]))
    return wrote - start, read - wrote


def _all(client: redis.Redis, commands: list[Any]) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        return pipeline.execute()


def measure(rounds: int, url: str) -> list[dict[str, Any]]:
    client = redis.Redis.from_url(url, socket_timeout=60)
    here, there = multiprocessing.Pipe()
    multiprocessing.Process(target=reading, args=(there,), daemon=True).start()
    to_pings, pings = multiprocessing.Pipe()
    multiprocessing.Process(target=pinging, args=(url, pings), daemon=True).start()
    ring = Ring(256 * MIB)
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}

    def hand_over(array: np.ndarray[Any, Any], *, summed: bool) -> None:
        here.send((ring.put(array, "bench"), summed))
        here.recv()
        ring.free("bench")

    for _ in range(rounds):
        for size in SIZES:
            array = np.random.default_rng(1).random(size // 4, np.float32)
            other = array.copy()
            times = 200 * MIB // size // 4
            ways: dict[str, Callable[[], Any]] = {
                "np.copyto": partial(np.copyto, other, array),
                "ring": partial(hand_over, array, summed=False),
                "own array, summed": array.sum,
                "ring, summed": partial(hand_over, array, summed=True),
            }
            for name, work in ways.items():
                work()
                found.setdefault((name, size), []).append((seconds(work, times),))
            for chunk in CHUNKS:
                if chunk > size:
                    continue
                blob.CHUNK_BYTES = chunk  # type: ignore[misc]
                to_pings.send(True)
                each = [through_redis(client, array) for _ in range(max(4, times // 4))]
                to_pings.send(True)
                write_s, read_s = (statistics.median(column) for column in zip(*each, strict=True))
                name = f"redis, chunks of {chunk // 1024} KiB"
                found.setdefault((name, size), []).append((write_s + read_s, write_s, read_s, *to_pings.recv()))
    to_pings.send(False)
    here.send(None)
    ring.close()
    rows = []
    for (name, size), each in found.items():
        total, *rest = (statistics.median(column) for column in zip(*each, strict=True))
        row = {"way": name, "bytes": size, "mb_per_s": size / total / 1e6, "ms": total * 1e3}
        if rest:
            row |= {"write_mb_per_s": size / rest[0] / 1e6, "read_mb_per_s": size / rest[1] / 1e6}
            row |= {"ping_p99_ms": rest[2], "ping_max_ms": rest[3]}
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="What it costs to hand an array to a worker.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with EmbeddedBroker(Settings()) as broker:
        rows = measure(asked.rounds, broker.url)
    if asked.json:
        print(json.dumps({"rows": rows}))
        return 0
    for row in rows:
        told = f"{row['way']:26} {row['bytes'] // MIB:3} MiB {row['ms']:9.3f} ms {row['mb_per_s']:9.0f} MB/s"
        if "ping_p99_ms" in row:
            told += f"   write {row['write_mb_per_s']:6.0f} read {row['read_mb_per_s']:6.0f}"
            told += f"   ping p99 {row['ping_p99_ms']:6.1f} max {row['ping_max_ms']:6.1f} ms"
        print(told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
