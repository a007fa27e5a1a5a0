"""A Celery application that imports nothing of Lepton sends tasks to the lane and gets results."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError

from pipeline.supervisor import Fleet
from queues.app import celery_addresses

A, B = [[1.0, 2.0], [3.0, 4.0]], [[5.0], [6.0]]
PRODUCT = [[17.0], [39.0]]


def make_app(fleet: Fleet, **conf: object) -> Celery:
    broker, backend = celery_addresses(fleet.broker_url)
    app = Celery("producer", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(conf)
    return app


@pytest.fixture
def app(fleet: Fleet) -> Iterator[Celery]:
    app = make_app(fleet)
    yield app
    app.close()


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_send_task_returns_the_product_as_lists(fleet: Fleet, serializer: str) -> None:
    app = make_app(fleet, task_serializer=serializer, accept_content=["json", "msgpack"])
    result = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest")
    assert result.get(timeout=10) == {"c": PRODUCT}
    assert result.state == "SUCCESS"


def test_a_job_may_name_the_encoding_that_its_client_decodes(fleet: Fleet) -> None:
    app = make_app(fleet, task_serializer="msgpack", result_serializer="msgpack", accept_content=["msgpack"])
    header = {"lepton": {"result": "msgpack"}}
    result = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest", headers=header)
    assert result.get(timeout=10) == {"c": PRODUCT}


def test_a_tensor_map_is_answered_with_a_tensor_map(fleet: Fleet) -> None:
    app = make_app(fleet, task_serializer="msgpack", result_serializer="msgpack", accept_content=["msgpack"])
    a = np.arange(6, dtype="<f4").reshape(2, 3)
    sent = {"dtype": "<f4", "shape": [2, 3], "data": a.tobytes()}
    result = app.send_task(
        "linalg.matmul",
        kwargs={"a": sent, "b": sent | {"shape": [3, 2]}},
        queue="lepton.ingest",
        headers={"lepton": {"result": "msgpack"}},
    )
    c = result.get(timeout=10)["c"]
    assert (c["dtype"], c["shape"]) == ("<f4", [2, 2])
    np.testing.assert_allclose(np.frombuffer(c["data"], "<f4").reshape(2, 2), a @ a.reshape(3, 2))


def test_zlib_compression_is_understood(app: Celery) -> None:
    result = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest", compression="zlib")
    assert result.get(timeout=10) == {"c": PRODUCT}


@pytest.mark.parametrize("priority", [0, 3, 6, 9])
def test_every_celery_priority_is_served(app: Celery, priority: int) -> None:
    result = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest", priority=priority)
    assert result.get(timeout=10) == {"c": PRODUCT}


def test_a_wrong_argument_raises_and_names_itself(app: Celery) -> None:
    result = app.send_task("linalg.matmul", kwargs={"a": A, "b": [[1.0, 2.0, 3.0]]}, queue="lepton.ingest")
    with pytest.raises(Exception, match="argument 'b'") as raised:
        result.get(timeout=10)
    assert type(raised.value).__name__ == "InvalidArguments"
    assert result.state == "FAILURE"


def test_positional_arguments_are_refused_and_not_guessed(app: Celery) -> None:
    result = app.send_task("linalg.matmul", args=[A, B], queue="lepton.ingest")
    with pytest.raises(Exception, match="by name"):
        result.get(timeout=10)


def test_an_unknown_option_in_our_header_is_refused(app: Celery) -> None:
    header = {"lepton": {"colour": "red"}}
    result = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest", headers=header)
    with pytest.raises(Exception, match="colour"):
        result.get(timeout=10)


def test_a_task_that_has_expired_is_revoked_and_never_run(app: Celery) -> None:
    result = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest", expires=-1)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=10)
    assert result.state == "REVOKED"


def test_an_ignored_result_is_not_stored(app: Celery) -> None:
    ignored = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest", ignore_result=True)
    after = app.send_task("linalg.matmul", kwargs={"a": A, "b": B}, queue="lepton.ingest")
    assert after.get(timeout=10) == {"c": PRODUCT}
    assert app.backend.get(f"celery-task-meta-{ignored.id}") is None
    app.backend.remove_pending_result(ignored)  # or Celery would unsubscribe when it is collected, broker or no broker


def test_a_non_finite_result_comes_back_as_celery_writes_it(app: Celery) -> None:
    kwargs = {"a": [[float("nan"), 1.0]], "b": [[1.0], [float("inf")]]}
    (value,) = app.send_task("linalg.matmul", kwargs=kwargs, queue="lepton.ingest").get(timeout=10)["c"][0]
    assert value != value


def test_a_plain_celery_worker_shares_the_broker_with_ours(fleet: Fleet, tmp_path: Path) -> None:
    broker, _ = celery_addresses(fleet.broker_url)
    program = (
        "import os; from celery import Celery\n"
        "app = Celery('other', broker=os.environ['BROKER'], backend=os.environ['BROKER'])\n"
        "@app.task(name='add')\n"
        "def add(a, b): return a + b\n"
    )
    (tmp_path / "other.py").write_text(program)
    arguments = ["-m", "celery", "-A", "other", "worker", "-P", "solo", "-Q", "other", "-n", "other@h"]
    environ = os.environ | {"BROKER": broker, "PYTHONPATH": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen([sys.executable, *arguments], env=environ, stdout=log, stderr=log)
    try:
        assert make_app(fleet).send_task("add", args=[2, 3], queue="other").get(timeout=30) == 5
    finally:
        worker.terminate()
        worker.wait(timeout=20)


def test_a_plain_celery_program_may_inspect_our_workers(app: Celery) -> None:
    queues = app.control.inspect(timeout=5).active_queues() or {}
    served = {queue["name"] for name, found in queues.items() if name.startswith("cpu.") for queue in found}
    assert served == {"lepton.cpu.big", "lepton.cpu.little"}
