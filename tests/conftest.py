"""What tests share: a real embedded broker, and for the system tests one whole Lepton for the session."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from lepton_ai import Client
from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet
from queues.broker import Broker
from queues.connection import Connection
from queues.embedded import EmbeddedBroker

# A shell's background job is started deaf to Ctrl-C, and so would be every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine is slow now and then, which is no failure; and explaining one takes longer than finding it.
hypothesis.settings.register_profile(
    "lepton", deadline=None, phases=[phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]
)
hypothesis.settings.load_profile("lepton")


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings()


@pytest.fixture(scope="session")
def _embedded(settings: Settings) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(settings) as broker:
        yield broker


@pytest.fixture
def broker_url(_embedded: EmbeddedBroker) -> str:
    """A real broker, empty at the start of each test. Not the one that the system tests' fleet uses."""
    connection = Connection(_embedded.url, "flush")
    connection.call("FLUSHALL")
    connection.close()
    return _embedded.url


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    connection = Connection(broker_url, "test")
    yield connection
    connection.close()


@pytest.fixture
def broker(broker_url: str, settings: Settings) -> Iterator[Broker]:
    """The message path for an incarnation of the test's own, which holds a lease."""
    connection = Connection(broker_url, "test-broker")
    broker = Broker(connection, f"test-{secrets.token_hex(4)}", settings)
    broker.announce(b"")
    yield broker
    connection.close()


@pytest.fixture(scope="session")
def fleet(settings: Settings) -> Iterator[Fleet]:
    """A whole Lepton: ingest, router, telemetry and two real Celery workers, each with all kernels."""
    with run_fleet(settings, {"cpu.big": 2, "cpu.little": 1}, print) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    with Client(fleet.broker_url) as client:
        yield client


@pytest.fixture
def http_client(fleet: Fleet) -> Iterator[Client]:
    with Client(fleet.http_url) as client:
        yield client
