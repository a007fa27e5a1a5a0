"""What is to follow the jobs that a router ends itself: Celery's errbacks, and the chords that wait for them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import structlog

from lepton_ai import wire
from lepton_ai.errors import LeptonError, Unavailable
from lepton_ai.job import Meta
from lepton_ai.settings import Settings
from lepton_ai.succession import Canvas, FollowUps, sequel_of

__all__ = ["Sequels"]

log = structlog.get_logger()


class Sequels:
    """Reads from a job's message what was to follow it. Celery is asked from the first job on that has something."""

    def __init__(self, settings: Settings, kernels: Callable[[], Collection[str]]) -> None:
        self._settings = settings
        self._kernels = kernels
        self._known: frozenset[str] = frozenset()
        self._canvas: Canvas | None = None

    def after(self, message: bytes, ended: Meta) -> FollowUps:
        """What a job sets off that ended with this record; nothing where that cannot be told. Raises BrokerUnavailable.

        Nothing else, whatever Celery makes of it: the router that asks could end nothing any more.
        """
        try:
            envelope = wire.read_envelope(message)
            embed = wire.read_embed(envelope, limit_bytes=self._settings.body_limit_bytes)
            sequel = sequel_of(envelope.headers, embed)
            return FollowUps() if sequel is None else self._made().after_failure(sequel, ended)
        except Unavailable:
            raise
        except LeptonError as error:  # nobody can tell what should have followed it
            log.info("sequel_unreadable", job=ended.task_id, reason=error.message)
            return FollowUps()
        except Exception:
            log.exception("sequel_left_out", job=ended.task_id)
            return FollowUps()

    def _made(self) -> Canvas:
        kernels = frozenset(self._kernels())
        if self._canvas is None or kernels != self._known:
            from queues.canvas import Canvas as CeleryCanvas

            self._canvas, self._known = CeleryCanvas(self._settings, kernels), kernels
        return self._canvas
