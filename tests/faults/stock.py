"""Plain Celery 5.7 in the same plays, on the same schedule: what it does where Lepton says that nothing is lost."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from lepton_ai.identity import new_ids
from tests.faults.actors import Actor
from tests.faults.fault_kernels import HANG, SEGFAULT
from tests.faults.fleet import clean_environment
from tests.faults.play import Play
from tests.faults.scenario import Scenario, Size
from tests.faults.scenarios_workers import COSTS_MS, kill_in_turn
from tests.faults.stock_tasks import make_app

__all__ = ["STOCK"]

_ROOT = Path(__file__).parents[2]
_MIB = 1024 * 1024


class Stock:
    """Plain workers, and a producer. Use it in a `with`."""

    def __init__(self, play: Play, workers: int = 2, pool: str = "prefork", limit_s: int | None = None) -> None:
        if not hasattr(play, "server"):
            play.serve()
        self._play = play
        self._app: Celery = make_app(play.server.url)
        environ = {"STOCK_URL": play.server.url, "FAULT_RUNS": str(play.folder / "runs")}
        slots = "1" if pool == "solo" else "2"
        arguments = ["-m", "celery", "-A", "tests.faults.stock_tasks", "worker", "-P", pool, "-c", slots, "-l", "INFO"]
        arguments += [] if limit_s is None else ["--time-limit", str(limit_s)]
        path = os.pathsep.join([str(_ROOT), clean_environment({})["PYTHONPATH"]])
        self.workers = [
            play.stage.cast(
                f"stock-{number}",
                [sys.executable, *arguments, "-n", f"stock-{number}@%h"],
                clean_environment({**environ, "PYTHONPATH": path}),
            )
            for number in range(workers)
        ]
        self._listener = threading.Thread(target=self._listen, name="listener", daemon=True)
        play.told = Counter()

    def __enter__(self) -> Stock:
        self._listener.start()
        for worker in self.workers:
            worker.start()
        self._play.until("the workers are online", lambda: all(map(self.is_online, self.workers)), 60)
        return self

    def __exit__(self, *_: object) -> None:
        self._app.close()

    @staticmethod
    def is_online(worker: Actor) -> bool:
        return " ready." in worker.said_now

    def submit(self, costs_ms: list[int], how: int = 0) -> list[str]:
        """Publishes one task for each cost, one by one, as `send_task` does."""
        numbers = self._play.auditor.numbers(len(costs_ms))
        sent: list[str] = []
        for number, ms, job in zip(numbers, costs_ms, new_ids(len(costs_ms)), strict=True):
            try:
                self._app.send_task("fault.run", kwargs={"n": number, "ms": ms, "how": how}, task_id=job, retry=False)
            except Exception as error:  # noqa: BLE001 - whatever it raises, it has not said yes
                full = "maxmemory" in str(error) or "MISCONF" in str(error)
                (self._play.auditor.refuse if full else self._play.auditor.wonder)([number])
            else:
                sent.append(job)
                self._play.auditor.acknowledge([(job, number)])
        return sent

    def finish(self, limit_s: float = 240.0) -> None:
        """Drains, and notes what is left in Celery's own lists."""
        self._play.drain(limit_s, still_s=15)
        left = {"celery": self._play.ask("LLEN", "celery"), "unacked": self._play.ask("HLEN", "unacked")}
        unacked = b" ".join(self._play.ask("HVALS", "unacked"))
        self._play.endless.update(job for job in self._play.doomed if job.encode() in unacked)
        self._play.notes |= {"left_in_celery": left, "exits": self._play.stage.exits}

    def _listen(self) -> None:
        """Counts the final results that are published for each task: what a waiter would be told."""
        while True:
            with contextlib.suppress(redis.RedisError):
                channel: Any = redis.Redis.from_url(self._play.server.url).pubsub()
                channel.psubscribe("celery-task-meta-*")
                for message in channel.listen():
                    if message["type"] == "pmessage":
                        self._play.told[message["channel"].decode().removeprefix("celery-task-meta-")] += 1
            time.sleep(0.2)


def _storm(pool: str) -> Any:
    def storm(play: Play, size: Size) -> None:
        """As `worker_kill_storm`."""
        with Stock(play, pool=pool) as stock:
            producer = threading.Thread(target=stock.submit, args=(play.chance.choices(COSTS_MS, k=size.jobs),))
            producer.start()
            kill_in_turn(play, stock.workers, size.rounds, stock.is_online, Actor.kill)
            producer.join()
            stock.finish()

    return storm


def _frozen(play: Play, size: Size) -> None:
    """As `worker_frozen`, past the visibility timeout."""
    with Stock(play) as stock:
        for _ in range(size.rounds):
            victim = play.chance.choice(stock.workers)
            stock.submit([400] * 4 + play.chance.choices(COSTS_MS, k=size.jobs))
            play.until("something runs", play.auditor.executed)
            victim.freeze()
            play.rest(5 + size.seconds)
            victim.thaw()
            stock.finish()


def _broker_kill(play: Play, size: Size) -> None:
    """As `broker_kill`, every write synced."""
    play.serve(appendfsync="always")
    with Stock(play) as stock:
        producer = threading.Thread(target=stock.submit, args=(play.chance.choices(COSTS_MS, k=size.jobs),))
        producer.start()
        for _ in range(size.rounds):
            play.rest(play.chance.uniform(0.3, 1.0))
            play.server.actor.kill()
            play.rest(size.seconds)
            play.server.start()
        producer.join()
        stock.finish()


def _out_of_memory(play: Play, size: Size) -> None:
    """As `broker_out_of_memory`; whoever exits is started again, as systemd would."""
    with Stock(play) as stock:
        for _ in range(size.rounds):
            play.server.set("maxmemory", str(play.server_bytes() + 2 * _MIB))
            while stock.submit([5] * 50):
                play.rest(0.0)
            play.rest(size.seconds)
            play.server.set("maxmemory", "0")
            stock.finish()


def _poison(play: Play, size: Size) -> None:
    """As `poison`: a task that kills its child process stands among others."""
    with Stock(play) as stock:
        for _ in range(size.rounds):
            stock.submit([0] * (size.jobs // (2 * size.rounds)))
            play.doomed.update(stock.submit([0], how=SEGFAULT))
            stock.submit([0] * (size.jobs // (2 * size.rounds)))
        stock.finish(60)
        executed = play.auditor.executed()
        play.notes["poison_runs"] = [executed[play.auditor.acknowledged[job]] for job in play.doomed]


def _hang(play: Play, size: Size) -> None:
    """As `hang`, with the same hard limit, which Celery has where its pool is prefork."""
    with Stock(play, limit_s=2) as stock:
        for _ in range(size.rounds):
            stock.submit([0] * (size.jobs // size.rounds))
            play.doomed.update(stock.submit([0], how=HANG))
        stock.finish(60)
        executed = play.auditor.executed()
        play.notes["hanging_runs"] = [executed[play.auditor.acknowledged[job]] for job in play.doomed]


STOCK = (
    Scenario("worker_kill_storm (solo)", _storm("solo"), Size(12_000, 40), Size(2_000, 10)),
    Scenario("worker_kill_storm (prefork)", _storm("prefork"), Size(12_000, 40), Size(2_000, 10)),
    Scenario("worker_frozen", _frozen, Size(200, 6, 2), Size(100, 1, 1)),
    Scenario("broker_kill", _broker_kill, Size(6_000, 12, 0.5), Size(1_000, 3, 0.2)),
    Scenario("broker_out_of_memory", _out_of_memory, Size(0, 5, 8), Size(0, 1, 3)),
    Scenario("poison", _poison, Size(500, 6), Size(100, 1)),
    Scenario("hang", _hang, Size(400, 4), Size(100, 1)),
)
