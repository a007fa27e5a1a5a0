"""A peer in a process of its own: `python -m bench.contender NAME PLACE`, orders by lines of JSON, answers too.

It ends when its input does, and takes its workers along.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import msgspec
import numpy as np

from bench import synthetic
from bench.load import Load
from bench.peer import URL, Peer, Place


class Contender:
    """Does what it is told."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def start(self) -> dict[str, Any]:
        self._peer.start()
        return {"settings": self._peer.settings}

    def roles(self) -> dict[str, list[int]]:
        return {"client": [os.getpid()], **self._peer.roles()}

    def wake(self) -> None:
        self._peer.wake()

    def run(self, load: list[Any], count: int) -> float:
        """Seconds from the first submit to the last result; all results are checked."""
        jobs = Load(*load)
        rows = jobs.rows(count)
        start = time.perf_counter()
        totals = self._peer.run(jobs, rows)
        seconds = time.perf_counter() - start
        if len(totals) != count:
            raise ValueError(f"{count} jobs gave {len(totals)} results")
        jobs.check(totals)
        return seconds

    def each(self, load: list[Any], count: int) -> list[float]:
        """Milliseconds of each of so many jobs, one in flight."""
        jobs = Load(*load)
        found, totals = [], []
        for row in jobs.rows(count):
            start = time.perf_counter()
            totals.append(self._peer.one(jobs, row))
            found.append((time.perf_counter() - start) * 1e3)
        jobs.check(totals)
        return found

    def carry(self, bytes: int, batches: int, at_once: int) -> list[float]:
        """Seconds of each batch of jobs with an array of so many bytes each, whose numbers are others each time."""
        arrays = [np.zeros(bytes // 4, np.float32) for _ in range(at_once)]
        found = []
        for batch in range(batches):
            for number, array in enumerate(arrays):
                array[0] = array[-synthetic.PAGE] = batch * at_once + number
            start = time.perf_counter()
            totals = self._peer.carry(arrays)
            found.append(time.perf_counter() - start)
            if totals != [2.0 * (batch * at_once + number) for number in range(at_once)]:
                raise ValueError(f"arrays of {bytes} bytes gave {totals}")
        return found

    def rest(self) -> None:
        self._peer.rest()

    def facts(self) -> dict[str, Any]:
        return self._peer.facts()


def main() -> None:
    name, place = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    where = msgspec.json.decode(place, type=Place)
    os.environ[URL] = where.peers_url
    try:
        peer: Peer = importlib.import_module(f"bench.peers.{name}").Peer(where)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}), file=answers, flush=True)
        return
    contender = Contender(peer)
    try:
        for line in sys.stdin:
            order, arguments = json.loads(line)
            try:
                answer = {"said": getattr(contender, order)(**arguments)}
            except Exception:  # noqa: BLE001 - the one who asked is told
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        peer.stop()


if __name__ == "__main__":
    main()
