"""Who submits: numbered jobs through Lepton's own client, each outcome told to the auditor."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from lepton_ai import Client
from lepton_ai.errors import InvalidRequest, LeptonError, Overloaded, QuotaExceeded, Unavailable
from tests.faults.auditor import Auditor

__all__ = ["Load"]

#: What a broker says that has not taken the one command it was sent.
_REFUSALS = ("OOM", "used memory > 'maxmemory'", "MISCONF", "READONLY", "no broker at", "Connection refused")


class Load:
    """One client. Nobody waits for a result, so every reply stays in the reply list for the auditor."""

    def __init__(self, auditor: Auditor, url: str) -> None:
        self._auditor = auditor
        self._client = Client(url)
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self.last_error = ""

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._client.close()

    def submit(
        self,
        costs_ms: Sequence[int],
        how: int = 0,
        at: int | None = None,
        kernel: str = "fault.run",
        **options: Any,
    ) -> list[str]:
        """Submits one job for each cost, all in one call; returns their ids, none where that failed.

        All misbehave as `how` says, or the one `at` this place only. `options` are those of `Client.submit_many`.
        """
        numbers = self._auditor.numbers(len(costs_ms))
        rows = [
            {"n": number, "ms": ms, "how": how if at in (None, place) else 0}
            for place, (number, ms) in enumerate(zip(numbers, costs_ms, strict=True))
        ]
        try:
            handles = self._client.submit_many(kernel, rows, **options)
        except (Overloaded, QuotaExceeded, InvalidRequest) as error:
            self.last_error = f"{type(error).__name__}: {error}"
            self._auditor.refuse(numbers)
            return []
        except LeptonError as error:
            self.last_error = f"{type(error).__name__}: {error}"
            plain = isinstance(error, Unavailable) and any(said in error.message for said in _REFUSALS)
            (self._auditor.refuse if plain and len(numbers) == 1 else self._auditor.wonder)(numbers)
            return []
        ids = [handle.id for handle in handles]
        self._auditor.acknowledge(zip(ids, numbers, strict=True))
        return ids

    def stream(self, jobs: int, costs_ms: Sequence[int], seed: int, *, at_once: int = 50, every_s: float = 0.0) -> None:
        """Submits so many jobs from a thread of its own, `at_once` a call, each cost drawn from `costs_ms`.

        Every other call has the cheapest ones only, which travel in bundles to their end.
        A call that fails is followed by a pause and the next, until so many jobs were acknowledged or `stop`.
        """
        thread = threading.Thread(
            target=self._stream, args=(jobs, costs_ms, random.Random(seed), at_once, every_s), daemon=True
        )
        self._threads.append(thread)
        thread.start()

    @property
    def streaming(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Ends every stream."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _stream(self, jobs: int, costs_ms: Sequence[int], chance: random.Random, at_once: int, every_s: float) -> None:
        given, other = list(costs_ms), [min(costs_ms)]
        while jobs > 0 and not self._stopping.is_set():
            if self.submit(chance.choices(given, k=min(at_once, jobs))):
                jobs -= at_once
                given, other = other, given
            else:
                self._stopping.wait(0.2)
            if every_s:
                self._stopping.wait(every_s)
