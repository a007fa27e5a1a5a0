"""Learning from events: what happened updates the Cluster and the CostModel; the telemetry service keeps the model.

Each router learns for itself, at once, from the event stream. The telemetry service follows the same stream, keeps a
snapshot of what was learned on the broker, from which a restarted router starts, and logs what the fleet does.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress

import msgspec
import structlog

from lepton_ai import topology
from lepton_ai.device import ResourceState
from lepton_ai.errors import BrokerUnavailable, LeptonError
from lepton_ai.event import Event, Observation
from lepton_ai.placement.costs import CostModel
from lepton_ai.settings import Settings
from pipeline.cluster import Cluster
from queues.broker import announcements
from queues.connection import Connection
from queues.event_stream import EventStream

__all__ = ["ENDED", "Telemetry", "learn"]

#: After one of these a job is no work of its device any more.
ENDED = tuple(f"job.{end}" for end in ("succeeded", "failed", "cancelled", "expired", "dead", "retried", "released"))
_REPORT_S = 10.0
_RETRY_S = 0.5
#: It is in no hurry: a busy fleet's events are read so far apart, many together.
_REST_S = 0.25

#: Before every entry of the stream.
_OLDEST = "0-0"

log = structlog.get_logger()


def learn(seen: Event, cluster: Cluster, model: CostModel) -> None:
    """Folds one event into the picture of the fleet and into the cost model."""
    if seen.type in ENDED:
        for job in seen.jobs:
            cluster.finished(job, seen.device)
    _teach(seen, cluster, model)


def _teach(seen: Event, cluster: Cluster, model: CostModel) -> bool:
    """True where a launch shows that its device has changed."""
    if seen.type == "device.heartbeat":
        with suppress(msgspec.ValidationError):  # of another release
            cluster.heard(seen.source, msgspec.convert(seen.data.get("state"), ResourceState))
    if seen.observation is not None and (device := cluster.device(seen.observation.device)) is not None:
        return model.learn(_alone(seen.observation, cluster.speed_of(seen.source)), device.peaks)
    return False


def _alone(seen: Observation, speed: float) -> Observation:
    """What the launch would have taken without the load of others, which passes: the model learns the device."""
    return msgspec.structs.replace(seen, transfer_s=seen.transfer_s * speed, run_s=seen.run_s * speed)


class Telemetry:
    """Follows the event stream until `stop` is set."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._settings = settings
        self._url = url
        self._model = CostModel()
        self._cluster = Cluster()
        self._seen: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop` is set, connecting again whenever the broker was lost."""
        position: str | None = None
        while not stop.is_set():
            try:
                connection = Connection(self._url, "telemetry")
                if position is None and not connection.call("EXISTS", topology.MODEL):
                    position = _OLDEST  # what was learned is lost, but not yet what it was learned from
                stream = EventStream(Connection(self._url, "telemetry-events"), position)
            except BrokerUnavailable as error:
                log.warning("broker_unavailable", reason=error.message)
                stop.wait(_RETRY_S)
                continue
            log.info("telemetry_online", position=stream.position)
            try:
                self._follow(connection, stream, stop)
            except LeptonError as error:  # CommandError too: a broker that is full refuses to keep the model
                log.warning("broker_unavailable", reason=error.message)
                stop.wait(_RETRY_S)
            except Exception:  # a defect of ours must not end the service
                log.exception("telemetry_failed")
                stop.wait(_RETRY_S)
            finally:
                position = stream.position
                stream.connection.close()
                connection.close()
        log.info("telemetry_offline")

    def _follow(self, connection: Connection, stream: EventStream, stop: threading.Event) -> None:
        self._model.restore(connection.call("GET", topology.MODEL))
        self._cluster.refresh(announcements(connection))
        report_at = time.monotonic() + _REPORT_S
        while not stop.is_set():
            seen = stream.read(block_ms=500)
            for _, each in seen:
                self._fold(each, connection)
            if seen and not stream.is_behind:
                stop.wait(_REST_S)
            if time.monotonic() >= report_at:
                self._report(connection)
                report_at = time.monotonic() + _REPORT_S
        self._report(connection)

    def _fold(self, each: Event, connection: Connection) -> None:
        if each.type in ("device.online", "device.offline"):
            log.info(each.type.replace(".", "_"), device=each.device, worker=each.source)
            self._cluster.refresh(announcements(connection))
        self._seen[each.type] += max(1, len(each.jobs))
        if _teach(each, self._cluster, self._model):  # it dispatches nothing, so it has no jobs to see end
            log.warning("device_drifted", device=each.device, kernel=each.kernel)

    def _report(self, connection: Connection) -> None:
        connection.call("SET", topology.MODEL, self._model.snapshot())
        ended = {name.removeprefix("job."): count for name, count in self._seen.items() if name.startswith("job.")}
        if ended:
            log.info("jobs_seen", **ended)
        self._seen.clear()
