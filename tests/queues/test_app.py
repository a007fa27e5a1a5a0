from __future__ import annotations

import pickle
from collections.abc import Iterator

import kombu
import pytest
from celery import Celery
from kombu.exceptions import ContentDisallowed

from lepton_ai import topology
from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings
from queues.app import celery_addresses, make_app
from queues.connection import Connection

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


@pytest.fixture
def app(broker_url: str) -> Iterator[Celery]:
    app = make_app(Settings(redis_url=broker_url))
    yield app
    app.close()


class Surprise:
    """What pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was opened",)


def received(app: Celery) -> kombu.Message:
    """The message on the lane as the app's own workers would get it."""
    found: list[kombu.Message] = []
    with app.connection_for_read() as link, link.channel() as channel:
        with app.amqp.TaskConsumer(channel, [kombu.Queue(topology.LANE)], on_message=found.append):
            link.drain_events(timeout=5)
        found[0].ack()
    return found[0]


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_json_and_msgpack_are_read(app: Celery, serializer: str) -> None:
    app.send_task("a.b", kwargs={"x": [1]}, serializer=serializer)
    assert received(app).decode()[1] == {"x": [1]}


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_pickle_and_yaml_are_refused_unopened(app: Celery, serializer: str) -> None:
    foreign = kombu.Queue(topology.LANE)
    content_type = {"pickle": "application/x-python-serialize", "yaml": "application/x-yaml"}[serializer]
    with app.connection_for_write() as link, link.Producer() as producer:
        producer.publish(
            pickle.dumps(Surprise()),
            routing_key=foreign.name,
            declare=[foreign],
            content_type=content_type,
            content_encoding="binary",
        )
    with pytest.raises(ContentDisallowed):
        received(app).decode()


def test_a_pickled_result_is_refused_unopened(app: Celery, connection: Connection) -> None:
    app.conf.result_serializer = "pickle"
    connection.call("SET", topology.result("one"), pickle.dumps(Surprise()))
    with pytest.raises(ContentDisallowed):
        app.AsyncResult("one").get(timeout=5)


def test_a_task_that_names_no_queue_goes_to_the_lane(app: Celery, connection: Connection) -> None:
    app.send_task("a.b")
    assert connection.call("LLEN", topology.LANE) == 1


def test_a_result_is_stored_in_the_settings_encoding_and_expires(broker_url: str, connection: Connection) -> None:
    app = make_app(Settings(redis_url=broker_url, result_serializer="msgpack", result_ttl_s=77))
    app.backend.store_result("one", {"x": 1}, "SUCCESS")
    assert connection.call("GET", topology.result("one"))[:1] == b"\x86"
    assert 70 < connection.call("TTL", topology.result("one")) <= 77
    app.close()


def test_without_a_broker_the_setting_is_named() -> None:
    with pytest.raises(NoBroker, match="LEPTON_REDIS_URL"):
        make_app(Settings())


def test_no_two_apps_share_their_settings(broker_url: str) -> None:
    one, other = (make_app(Settings(redis_url=broker_url, result_serializer=name)) for name in ("json", "msgpack"))
    assert (one.conf.result_serializer, other.conf.result_serializer) == ("json", "msgpack")
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("ours", "celerys"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("rediss://:p@h:1/2", "rediss://:p@h:1/2"),
        ("unix:///run/s.sock", "redis+socket:///run/s.sock?virtual_host=0"),
        ("unix://:p@/run/s.sock", "redis+socket://:p@/run/s.sock?virtual_host=0"),
        ("unix://u:p@/run/s.sock?db=3", "redis+socket://u:p@/run/s.sock?virtual_host=3"),
    ],
)
def test_an_address_of_ours_is_written_as_celery_writes_it(ours: str, celerys: str) -> None:
    assert celery_addresses(ours) == (celerys, celerys)


@pytest.mark.parametrize("database", [0, 3])
def test_celery_reaches_the_database_that_we_name(broker_url: str, connection: Connection, database: int) -> None:
    broker, backend = celery_addresses(f"{broker_url}?db={database}")
    app = Celery("program", broker=broker, backend=backend, set_as_current=False)
    app.send_task("a.b", queue=topology.LANE)
    app.backend.set("key", "value")
    app.close()
    connection.call("SELECT", database)
    assert connection.many([("LLEN", topology.LANE), ("GET", "key")]) == [1, b"value"]
