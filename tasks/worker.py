"""The worker's application: `celery -A tasks.worker worker -Q lepton.cpu -P threads -c 2 --without-gossip`.

The queue names the device (`lepton.gpu.h100` is served by the gpu driver), `-c` is the number of slots.
"""

from __future__ import annotations

from celery.signals import setup_logging

from lepton_ai.settings import Settings
from queues import logs
from queues.app import make_app
from tasks.consumer import DeviceQueueStep, DeviceStep, PatientConsumer

__all__ = ["app"]

_settings = Settings.read()

app = make_app(_settings)
app.lepton_settings = _settings  # not in its conf, which remote control shows to anybody
app.conf.worker_consumer = f"{PatientConsumer.__module__}:{PatientConsumer.__name__}"
app.steps["worker"].add(DeviceStep)
app.steps["consumer"].add(DeviceQueueStep)


@setup_logging.connect(weak=False)
def _configure_logs(**_: object) -> None:
    logs.configure(_settings, "worker")
