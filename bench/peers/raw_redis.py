"""The floor: what a job costs on redis-py with nothing of what a job queue is for.

The client pushes pipelines of 100 messages and reads replies in bulk. A worker pops up to 100, or as many as take 20 ms
lest another has none, computes, stores each result under a key that expires and pushes the replies, in one pipeline.
Nothing survives a worker that dies.
`python -m bench.peers.raw_redis` is the worker.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import redis

from bench import peer, synthetic
from bench.load import Load

_QUEUE = "bench.raw"
_AT_ONCE = 100
_BATCH_S = 0.02
_EXPIRE_S = 3600
_WAIT_S = 300

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Peer(peer.Peer):
    """A worker process for each job that may compute at once."""

    settings = "redis-py and msgpack in batches of 100, of 20 ms where that is less; a worker process a job at once"

    def start(self) -> None:
        for number in range(self.place.parallel):
            self.work("worker" if self.place.parallel == 1 else f"worker-{number}", __name__)
        self._redis: Any = redis.Redis.from_url(self.place.peers_url, socket_timeout=None)
        self._reply_to = f"bench.raw.reply.{uuid.uuid4().hex}"

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return self._all(load.kernel, rows)

    def carry(self, arrays: Sequence[Any]) -> list[float]:
        return self._all("bench.touch", [{"a": array.data.cast("B")} for array in arrays])

    def one(self, load: Load, row: Mapping[str, Any]) -> float:
        self._redis.rpush(_QUEUE, _encode((load.kernel, uuid.uuid4().hex, self._reply_to, row)))
        return float(_decode(self._redis.blpop(self._reply_to, _WAIT_S)[1])[1])

    def _all(self, kernel: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        jobs = [uuid.uuid4().hex for _ in rows]
        for first in range(0, len(rows), _AT_ONCE):
            with self._redis.pipeline(transaction=False) as pipeline:
                for job, row in zip(jobs[first : first + _AT_ONCE], rows[first : first + _AT_ONCE], strict=True):
                    pipeline.rpush(_QUEUE, _encode((kernel, job, self._reply_to, row)))
                pipeline.execute()
        found: dict[str, float] = {}
        while len(found) < len(jobs):
            popped = self._redis.blmpop(_WAIT_S, 1, self._reply_to, direction="LEFT", count=_AT_ONCE)
            found.update(map(_decode, popped[1]))
        return [found[job] for job in jobs]


def main() -> None:
    connection: Any = redis.Redis.from_url(peer.broker_url(), socket_timeout=None)
    functions = {**synthetic.FUNCTIONS, "bench.touch": lambda a: synthetic.touch(np.frombuffer(a, np.float32))}
    count = _AT_ONCE
    while True:
        _, messages = connection.blmpop(0, 1, _QUEUE, direction="LEFT", count=count)
        began = time.perf_counter()
        with connection.pipeline(transaction=False) as pipeline:
            replies: dict[str, list[bytes]] = {}
            for kernel, job, reply_to, row in map(_decode, messages):
                result = _encode((job, functions[kernel](**row)))
                pipeline.set(f"bench.raw.result.{job}", result, ex=_EXPIRE_S)
                replies.setdefault(reply_to, []).append(result)
            for reply_to, results in replies.items():
                pipeline.rpush(reply_to, *results)
            pipeline.execute()
        job_s = (time.perf_counter() - began) / len(messages)
        count = max(1, min(_AT_ONCE, int(_BATCH_S / job_s)))


if __name__ == "__main__":
    main()
