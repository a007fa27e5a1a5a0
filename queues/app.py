"""The Celery application that workers run under and Flower looks at: json and msgpack only, never pickle."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from celery import Celery

from lepton_ai import topology
from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings

__all__ = ["celery_addresses", "make_app"]

#: Every client that consumes a list queue restores messages older than its own visibility timeout, so it must be the
#: same, and long, everywhere. Recovery is by leases (queues/broker.py) and does not wait for it.
_VISIBILITY_S = 86_400


def make_app(settings: Settings) -> Celery:
    """The Celery application over the settings' broker; NoBroker where none is named."""
    if not settings.redis_url:
        raise NoBroker("set LEPTON_REDIS_URL to the broker, such as redis://127.0.0.1:6379/0")
    broker, backend = celery_addresses(settings.redis_url)
    app = Celery("lepton", broker=broker, backend=backend, set_as_current=False)
    transport = {
        "visibility_timeout": _VISIBILITY_S,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
    }
    if broker.startswith("redis+socket"):
        del transport["socket_keepalive"]  # TCP only
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
        broker_transport_options=transport,
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


def celery_addresses(url: str) -> tuple[str, str]:
    """Our broker URL as Celery's broker and result-backend URLs."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url, url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    rest = f"{parts.netloc}{parts.path}?virtual_host={database}"
    return f"redis+socket://{rest}", f"redis+socket://{rest}"
