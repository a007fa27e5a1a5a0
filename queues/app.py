"""The Celery application that workers run under and Flower looks at: json and msgpack only, never pickle."""

from __future__ import annotations

from celery import Celery

from lepton_ai import topology
from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings
from queues.addresses import celery_addresses, transport_options

__all__ = ["celery_addresses", "make_app"]


def make_app(settings: Settings) -> Celery:
    """The Celery application over the settings' broker; NoBroker where none is named."""
    if not settings.redis_url:
        raise NoBroker("set LEPTON_REDIS_URL to the broker, such as redis://127.0.0.1:6379/0")
    broker, backend = celery_addresses(settings.redis_url)
    app = Celery("lepton", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(
        accept_content=["json", "msgpack"],
        result_accept_content=["json", "msgpack"],
        # Remote control and events are spoken in JSON, which every Celery program on the same Redis accepts unless told
        # otherwise: a plain worker that mingles with ours would end on a reply in msgpack.
        task_serializer="json",
        event_serializer="json",
        result_serializer=settings.result_serializer,
        task_default_queue=topology.LANE,
        task_send_sent_event=True,
        worker_send_task_events=True,
        broker_transport_options=transport_options(settings.redis_url),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        result_expires=round(settings.result_ttl_s),
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # Jobs are run by our own slots: Celery's pool stays idle and its prefetch must not pop anything.
        worker_prefetch_multiplier=1,
        worker_disable_rate_limits=True,
        worker_enable_remote_control=True,
    )
    return app
