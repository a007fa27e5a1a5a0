"""Celery's canvas through the lane: a Celery application that imports nothing of Lepton, with a worker of its own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery, Signature, chain, chord, group
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet
from queues.addresses import celery_addresses

#: Where `flaky_kernels` and `gated_kernels` are.
KERNELS = Path(__file__).parents[1]
WAIT_S = 30
LANE = "lepton.ingest"
A, B, PRODUCT = [[1.0, 2.0], [3.0, 4.0]], [[5.0], [6.0]], [[17.0], [39.0]]
EYE = [[1.0, 0.0], [0.0, 1.0]]
#: The application's own tasks, in a worker of its own on Celery's default queue.
PROGRAM = """
import os
from celery import Celery

app = Celery("other", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(accept_content=["json", "msgpack"])


@app.task(name="plain.total")
def total(value):
    if isinstance(value, dict):
        return total(list(value.values()))
    return sum(map(total, value)) if isinstance(value, list) else value


@app.task(name="plain.same")
def same(value):
    return value


@app.task(name="plain.broken")
def broken(*args):
    raise ValueError("broken on purpose")
"""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file lets a kernel of the tests end."""
    return tmp_path_factory.mktemp("canvas")


@pytest.fixture(scope="module")
def fleet(settings: Settings, gates: Path) -> Iterator[Fleet]:
    """A fleet whose kernels can fail, be run again, and wait."""
    own = {
        "LEPTON_KERNELS": "flaky_kernels,gated_kernels",
        "TEST_FLAKY": str(gates),
        "TEST_GATE": str(gates),
        "PYTHONPATH": os.pathsep.join([str(KERNELS), os.environ.get("PYTHONPATH", "")]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        with run_fleet(settings, {"cpu.canvas": 2}, print) as fleet:
            yield fleet


@pytest.fixture(scope="module")
def plain(fleet: Fleet, gates: Path) -> Iterator[None]:
    """The application's own worker."""
    broker, _ = celery_addresses(fleet.broker_url)
    (gates / "other.py").write_text(PROGRAM)
    arguments = "-m celery -A other worker -P solo -Q celery -n other@h -l WARNING --without-gossip --without-mingle"
    with (gates / "log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, *arguments.split()],
            env=os.environ | {"BROKER": broker, "PYTHONPATH": str(gates)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield
    worker.terminate()
    try:
        worker.wait(timeout=20)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


@pytest.fixture
def app(fleet: Fleet, plain: None) -> Iterator[Celery]:
    broker, backend = celery_addresses(fleet.broker_url)
    app = Celery("producer", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(accept_content=["json", "msgpack"])
    yield app
    gc.collect()  # a result that is forgotten later would unsubscribe, broker or no broker
    app.close()


Task = Callable[..., Signature]


@pytest.fixture
def kernel(app: Celery) -> Task:
    """A kernel as a signature of the application, such as `kernel("linalg.matmul", a=..., b=...)`."""

    def signature(name: str, immutable: bool = False, **kwargs: Any) -> Signature:
        return app.signature(name, kwargs=kwargs, queue=LANE, immutable=immutable)

    return signature


@pytest.fixture
def task(app: Celery) -> Task:
    """A task of the application's own, by the last part of its name."""

    def signature(name: str, *args: Any, **options: Any) -> Signature:
        return app.signature(f"plain.{name}", args=args, options=options)

    return signature


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S} s"
        time.sleep(0.02)
    return value


def send(app: Celery, name: str = "linalg.matmul", kwargs: Any = None, **options: Any) -> AsyncResult:
    return app.send_task(name, kwargs={"a": A, "b": B} if kwargs is None else kwargs, queue=LANE, **options)


# -- link and link_error ----------------------------------------------------------------------------------------------


def test_a_task_that_is_linked_gets_the_kernels_outputs(app: Celery, task: Task) -> None:
    result = send(app, link=task("same", task_id="linked-same"))
    assert result.get(timeout=WAIT_S) == {"c": PRODUCT}
    assert app.AsyncResult("linked-same").get(timeout=WAIT_S) == {"c": PRODUCT}
    assert [child.id for child in result.children] == ["linked-same"]


def test_a_kernel_that_is_linked_gets_the_output_for_the_input_that_is_missing(app: Celery, kernel: Task) -> None:
    send(app, link=kernel("linalg.matmul", a=EYE).set(task_id="linked-kernel"))
    assert app.AsyncResult("linked-kernel").get(timeout=WAIT_S) == {"c": PRODUCT}


def test_a_kernel_that_follows_without_a_queue_goes_through_the_lane_all_the_same(app: Celery) -> None:
    send(app, link=app.signature("linalg.matmul", kwargs={"a": EYE}, task_id="linked-unrouted"))
    assert app.AsyncResult("linked-unrouted").get(timeout=WAIT_S) == {"c": PRODUCT}


def test_several_links_all_follow(app: Celery, task: Task, kernel: Task) -> None:
    links = [task("total", task_id="link-1"), kernel("linalg.matmul", a=EYE).set(task_id="link-2")]
    send(app, link=links)
    assert app.AsyncResult("link-1").get(timeout=WAIT_S) == 56.0
    assert app.AsyncResult("link-2").get(timeout=WAIT_S) == {"c": PRODUCT}


def test_a_linked_error_gets_the_id_of_the_job_that_failed(app: Celery, task: Task) -> None:
    result = send(
        app,
        kwargs={"a": A, "b": [[1.0]]},
        link=task("same", task_id="never"),
        link_error=task("same", task_id="on-error"),
    )
    assert app.AsyncResult("on-error").get(timeout=WAIT_S) == result.id
    assert result.state == "FAILURE"
    assert app.AsyncResult("never").state == "PENDING"


def test_an_argument_that_a_kernel_is_not_given_by_the_job_before_is_named(app: Celery, kernel: Task) -> None:
    result = chain(kernel("linalg.matmul", a=A, b=B), kernel("vision.ndvi")).apply_async()
    with pytest.raises(Exception, match="missing is red"):
        result.get(timeout=WAIT_S)


# -- chain ------------------------------------------------------------------------------------------------------------


def test_kernels_and_tasks_follow_each_other_in_a_chain(kernel: Task, task: Task) -> None:
    steps = [kernel("linalg.matmul", a=A, b=B), kernel("linalg.matmul", a=EYE), task("total")]
    result = chain(*steps).apply_async()
    assert result.get(timeout=WAIT_S) == 56.0
    assert result.parent.get(timeout=WAIT_S) == {"c": PRODUCT}
    assert result.parent.parent.get(timeout=WAIT_S) == {"c": PRODUCT}
    assert [child.id for child in result.parent.parent.children] == [result.parent.id]


def test_a_kernel_gets_what_a_task_of_the_application_returned(kernel: Task, task: Task) -> None:
    assert chain(task("same", B), kernel("linalg.matmul", a=A)).apply_async().get(timeout=WAIT_S) == {"c": PRODUCT}
    named = chain(task("same", {"b": B, "a": A}), kernel("linalg.matmul")).apply_async()
    assert named.get(timeout=WAIT_S) == {"c": PRODUCT}


def test_an_immutable_step_gets_nothing_of_the_one_before(kernel: Task) -> None:
    steps = [kernel("linalg.matmul", a=A, b=B), kernel("linalg.matmul", immutable=True, a=EYE, b=B)]
    assert chain(*steps).apply_async().get(timeout=WAIT_S) == {"c": B}


def test_arrays_stay_arrays_down_a_chain(app: Celery) -> None:
    a = np.arange(4, dtype="<f4").reshape(2, 2)
    sent = {"dtype": "<f4", "shape": [2, 2], "data": a.tobytes()}
    options = {"queue": LANE, "serializer": "msgpack", "headers": {"lepton": {"result": "msgpack"}}}
    app.conf.update(result_serializer="msgpack")
    steps = [
        app.signature("linalg.matmul", kwargs=each, options=options) for each in ({"a": sent, "b": sent}, {"a": sent})
    ]
    c = chain(*steps).apply_async().get(timeout=WAIT_S)["c"]
    np.testing.assert_allclose(np.frombuffer(c["data"], "<f4").reshape(2, 2), a @ a @ a)


def test_a_chain_that_breaks_fails_to_its_end(kernel: Task, task: Task) -> None:
    steps = [kernel("linalg.matmul", a=A, b=[[1.0]]), kernel("linalg.matmul", a=EYE), task("total")]
    result = chain(*steps).on_error(task("same", task_id="chain-error")).apply_async()
    with pytest.raises(Exception, match="argument 'b'"):
        result.get(timeout=WAIT_S)
    until(lambda: result.state == "FAILURE", "the last of the chain has failed")
    assert result.app.AsyncResult("chain-error").get(timeout=WAIT_S) == result.parent.parent.id


def test_a_chain_through_a_group_ends_in_one_task(kernel: Task, task: Task) -> None:
    both = group(kernel("linalg.matmul", a=EYE), task("total"))
    result = chain(kernel("linalg.matmul", a=A, b=B), both, task("same")).apply_async()
    assert result.get(timeout=WAIT_S) == [{"c": PRODUCT}, 56.0]


# -- group and chord --------------------------------------------------------------------------------------------------


def test_a_group_of_kernels_gives_its_results_in_order(kernel: Task) -> None:
    scaled = [[[float(at), 0.0], [0.0, float(at)]] for at in range(8)]
    found = group(kernel("linalg.matmul", a=each, b=B) for each in scaled).apply_async().get(timeout=WAIT_S)
    assert found == [{"c": [[5.0 * at], [6.0 * at]]} for at in range(8)]


def test_a_group_that_follows_a_kernel_runs_whole(kernel: Task, task: Task) -> None:
    both = group(kernel("linalg.matmul", a=EYE), task("total"))
    result = chain(kernel("linalg.matmul", a=A, b=B), both).apply_async()
    assert result.get(timeout=WAIT_S) == [{"c": PRODUCT}, 56.0]


def test_a_chord_of_kernels_gives_all_results_to_its_task(kernel: Task, task: Task) -> None:
    header = [kernel("linalg.matmul", a=EYE, b=[[float(at)], [1.0]]) for at in range(10)]
    assert chord(header, task("total")).apply_async().get(timeout=WAIT_S) == 55.0


def test_a_chord_of_kernels_gives_all_results_stacked_to_its_kernel(kernel: Task) -> None:
    header = [kernel("monitor.anomaly", series=[1.0, 2.0, 9.0, 1.0], window=2) for _ in range(3)]
    one = header[0].apply_async().get(timeout=WAIT_S)["score"]
    image = chord(header, kernel("medical.median_filter", radius=0)).apply_async().get(timeout=WAIT_S)["filtered"]
    np.testing.assert_allclose(image, [one, one, one], rtol=1e-6)


def test_kernels_and_tasks_stand_in_the_header_of_one_chord(kernel: Task, task: Task) -> None:
    header = [
        kernel("linalg.matmul", a=A, b=B),
        task("same", 7),
        chain(kernel("linalg.matmul", a=A, b=B), task("total")),
    ]
    assert chord(header, task("same")).apply_async().get(timeout=WAIT_S) == [{"c": PRODUCT}, 7, 56.0]


def test_chords_within_a_chord_end(kernel: Task, task: Task) -> None:
    inner = chord([kernel("linalg.matmul", a=A, b=B), task("same", 7)], task("total"))
    assert chord([inner, kernel("linalg.matmul", a=A, b=B)], task("total")).apply_async().get(timeout=WAIT_S) == 119.0


def test_a_chord_with_a_kernel_that_fails_fails_and_tells(kernel: Task, task: Task) -> None:
    header = [kernel("linalg.matmul", a=A, b=B), kernel("linalg.matmul", a=A, b=[[1.0]])]
    result = chord(header, task("total").on_error(task("same", task_id="chord-error"))).apply_async()
    until(lambda: result.state == "FAILURE", "the chord has failed")
    assert type(result.result).__name__ == "ChordError"
    assert "argument 'b'" in str(result.result)
    assert result.app.AsyncResult("chord-error").get(timeout=WAIT_S) == result.id


def test_a_chord_ends_although_its_kernels_ignore_their_results(kernel: Task, task: Task) -> None:
    header = [kernel("linalg.matmul", a=A, b=B).set(ignore_result=True) for _ in range(3)]
    assert chord(header, task("total")).apply_async().get(timeout=WAIT_S) == 168.0


# -- retry ------------------------------------------------------------------------------------------------------------


def test_a_kernel_that_is_run_again_shows_it_and_then_succeeds(app: Celery, task: Task, gates: Path) -> None:
    result = send(app, "test.flaky", {"n": 11}, link=task("same", task_id="after-retry"))
    until(lambda: result.state == "RETRY", "it waits for its retry")
    (gates / "11").touch()
    assert result.get(timeout=WAIT_S) == {"y": [11]}
    assert app.AsyncResult("after-retry").get(timeout=WAIT_S) == {"y": [11]}


def test_a_kernel_that_fails_for_good_calls_its_errback_once(app: Celery, task: Task) -> None:
    result = send(app, "test.hopeless", {"n": 1}, link_error=task("same", task_id="no-hope"))
    assert app.AsyncResult("no-hope").get(timeout=WAIT_S) == result.id
    with pytest.raises(Exception, match="never be there"):
        result.get(timeout=WAIT_S)


# -- countdown, eta, expires ------------------------------------------------------------------------------------------


def test_a_job_with_a_countdown_is_pending_until_it_is_due(app: Celery) -> None:
    start = time.monotonic()
    result = send(app, countdown=2)
    time.sleep(1)
    assert result.state == "PENDING"
    assert result.get(timeout=WAIT_S) == {"c": PRODUCT}
    assert time.monotonic() - start >= 2


def test_an_eta_in_the_past_is_due_now(app: Celery) -> None:
    assert send(app, eta=datetime.now(UTC) - timedelta(hours=1)).get(timeout=WAIT_S) == {"c": PRODUCT}


def test_a_step_of_a_chain_may_have_a_countdown(kernel: Task) -> None:
    start = time.monotonic()
    later = kernel("linalg.matmul", a=EYE).set(countdown=2)
    assert chain(kernel("linalg.matmul", a=A, b=B), later).apply_async().get(timeout=WAIT_S) == {"c": PRODUCT}
    assert time.monotonic() - start >= 2


def test_a_job_that_expires_before_it_is_due_is_revoked_and_never_run(app: Celery, task: Task) -> None:
    result = send(app, countdown=60, expires=1, link=task("same", task_id="expired-link"))
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WAIT_S)
    assert result.state == "REVOKED"
    assert app.AsyncResult("expired-link").state == "PENDING"


def test_a_job_that_does_not_expire_in_time_runs(app: Celery) -> None:
    assert send(app, expires=60).get(timeout=WAIT_S) == {"c": PRODUCT}


def test_a_chord_with_a_kernel_that_expired_fails(kernel: Task, task: Task) -> None:
    header = [kernel("linalg.matmul", a=A, b=B), kernel("linalg.matmul", a=A, b=B).set(expires=-1)]
    result = chord(header, task("total")).apply_async()
    until(lambda: result.state == "FAILURE", "the chord has failed")


# -- revoke -----------------------------------------------------------------------------------------------------------


def test_a_job_that_is_not_due_is_revoked(app: Celery) -> None:
    result = send(app, countdown=60)
    time.sleep(0.5)
    result.revoke()
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WAIT_S)


def test_a_chain_whose_running_kernel_is_revoked_is_revoked_to_its_end(app: Celery, kernel: Task, task: Task) -> None:
    result = chain(kernel("test.gated", n=21), kernel("linalg.matmul", a=A), task("total")).apply_async()
    running = result.parent.parent
    until(lambda: _is_active(app, running.id), "the first kernel runs")
    running.revoke(terminate=True)
    until(lambda: result.state == "REVOKED", "the last of the chain is revoked")
    assert [each.state for each in (running, result.parent)] == ["REVOKED", "REVOKED"]


def _is_active(app: Celery, job: str) -> bool:
    found = app.control.inspect(timeout=1).active() or {}
    return any(each["id"] == job for requests in found.values() for each in requests)


# -- priorities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [0, 9])
def test_a_follow_up_keeps_the_priority_of_its_signature(app: Celery, kernel: Task, priority: int) -> None:
    last = kernel("linalg.matmul", a=EYE).set(priority=priority)
    assert chain(kernel("linalg.matmul", a=A, b=B), last).apply_async().get(timeout=WAIT_S) == {"c": PRODUCT}
