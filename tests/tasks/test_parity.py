"""Which jobs are computed twice, and which variant is found to be wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai.blob import Reference
from lepton_ai.device import Peaks
from lepton_ai.errors import InvalidKernel
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from lepton_ai.kernel import Inputs, Kernel, Outputs, Work
from lepton_ai.quarantine import Quarantined
from lepton_ai.settings import Settings
from tasks.batching import TakenJob
from tasks.devices.cpu import CpuDriver
from tasks.kernels.city_traffic_step import traffic_step
from tasks.kernels.driving_kalman import kalman
from tasks.kernels.linalg_matmul import matmul
from tasks.kernels.recommend_als_step import als_step
from tasks.parity import Check, Parity
from tasks.warmup import IdleContext, build, launch
from tests.tasks.workshop import MakeWorker

ALWAYS = Settings(parity_share=1.0)
PEAKS = Peaks(1e9, 1e9, 1e9, 0.0, 0.0)
Multiply = Callable[[np.ndarray], np.ndarray]


def doubling(reference: Multiply = lambda x: 2 * x, cpu: Multiply | None = None, **more: Any) -> Kernel:
    found = Kernel(
        "test.twice", inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="n", bytes="8*n", **more
    )
    found.reference(lambda x: {"y": reference(x)})
    found.samples(lambda: [{"x": np.zeros(1)}])  # on which they all agree
    if cpu is not None:
        found.on("cpu")(lambda device: lambda inputs, context: {"y": cpu(inputs["x"])})
    return found


def job_of(kernel: Kernel, x: np.ndarray, work: Work | None = None) -> TakenJob:
    work = work or Work(float(x.size), 8.0 * x.size)
    return TakenJob(new_id(), kernel, {"x": x}, work, Options(), True, True, b"")


class Guard:
    """A guard and what it has found."""

    def __init__(self, device: str, kind: str, settings: Settings = ALWAYS) -> None:
        self.found: list[Quarantined] = []
        self.parity = Parity(settings, device, kind, PEAKS, self.found.append)
        self.parity.start()
        with self.parity._changed:  # an accelerator's has to measure the cpu first
            self.parity._changed.wait_for(lambda: self.parity._peaks is not None, 0)

    def compare(
        self, kernel: Kernel, outputs: Multiply, x: np.ndarray | None = None, work: Work | None = None
    ) -> list[str]:
        """The devices that are found to be wrong, of a job whose device made this of it."""
        x = np.arange(1.0, 4.0) if x is None else x
        return self.thrice(kernel, {"x": x}, {"y": outputs(x)}, work)

    def thrice(self, kernel: Kernel, inputs: Inputs, outputs: Outputs, work: Work | None = None) -> list[str]:
        """The same, of three such jobs."""
        for _ in range(3):
            self.once(kernel, inputs, outputs, work)
        return [each.device for each in self.found]

    def once(
        self, kernel: Kernel, inputs: Inputs, outputs: Outputs, work: Work | None = None, name: str = ""
    ) -> list[str]:
        """The kernels that are suspected after a job."""
        bound, dims = kernel.signature.bind(inputs)
        job = TakenJob(name or new_id(), kernel, bound, work or kernel.spec.work(dims), Options(), True, True, b"")
        check = self.parity.copied(job, outputs)
        assert check is not None
        before = self.parity.compared
        assert self.parity.offer(check)
        with self.parity._changed:
            assert self.parity._changed.wait_for(lambda: self.parity.compared > before, 30)
        return sorted(self.parity._suspected)


def test_what_rounding_explains_is_nobodys_fault(guard: Callable[..., Guard]) -> None:
    """A sum that cancels: in another order it comes to something else."""
    kernel = Kernel("test.sum", inputs={"x": "float64[n]"}, outputs={"y": "float64[1]"}, flops="n", bytes="8*n")
    kernel.reference(lambda x: {"y": x.sum(keepdims=True)})
    x = np.array([1e16, 1.0, -1e16, 1.0])
    for wrong, found in ((np.array([2.0]), []), (np.array([1e9]), ["cpu.test"])):
        made = guard("cpu.test", "cpu")
        assert made.thrice(kernel, {"x": x}, {"y": wrong}) == found


def test_where_a_rounding_decides_which_comes_first_either_may(guard: Callable[..., Guard]) -> None:
    kernel = Kernel("test.best", inputs={"x": "float64[n]"}, outputs={"y": "int64[1]"}, flops="n", bytes="8*n")
    kernel.reference(lambda x: {"y": np.array([x.argmax()])})
    for x, found in ((np.array([1.0, 1.0]), []), (np.array([1.0, 2.0]), ["cpu.test"])):
        made = guard("cpu.test", "cpu")
        assert made.thrice(kernel, {"x": x}, {"y": np.array([1 - x.argmax()])}) == found


def traffic_of(steps: int) -> dict[str, Any]:
    random = np.random.default_rng(steps)
    roads = {name: random.uniform(0, 1800, 8).astype(np.float32) for name in ("demand", "supply")}
    return {"density": random.uniform(0, 60, (8, 200)).astype(np.float32), "steps": steps, **roads}


def ratings(users: int, items: int, entries: int, scale: float, regularization: float) -> dict[str, Any]:
    """Of 64 factors, with confidences up to 10,000: systems that float32 solves to 0.001 at best."""
    random = np.random.default_rng(0)
    return {
        "starts": np.arange(0, users * entries + 1, entries),
        "items": random.integers(0, items, users * entries).astype(np.int32),
        "confidence": random.uniform(1, 1e4, users * entries).astype(np.float32),
        "factors": random.normal(0, scale, (items, 64)).astype(np.float32),
        "regularization": regularization,
    }


def computed(kernel: Kernel, inputs: Inputs) -> dict[str, Any]:
    """As a cpu does it."""
    cpu = CpuDriver(1)
    return dict(launch(build(kernel, cpu), dict(kernel.signature.bind(inputs)[0]), cpu, IdleContext()))


@pytest.mark.parametrize(
    ("kernel", "inputs"),
    [
        (traffic_step, traffic_of(1000)),
        (traffic_step, traffic_of(5000)),
        (als_step, ratings(50, 300, 20, 0.1, 0.1)),
        (als_step, ratings(50, 200, 10, 0.05, 0.01)),
    ],
)
def test_rounding_that_adds_up_inside_is_nobodys_fault(guard: Any, kernel: Kernel, inputs: Inputs) -> None:
    made, outputs = guard("cpu.test", "cpu"), computed(kernel, inputs)
    assert made.once(kernel, inputs, outputs) == []


@pytest.mark.parametrize(
    ("kernel", "inputs"), [(traffic_step, traffic_of(10)), (als_step, ratings(50, 300, 20, 0.1, 0.1))]
)
def test_what_is_wrong_by_one_percent_is_found(guard: Any, kernel: Kernel, inputs: Inputs) -> None:
    made = guard("cpu.test", "cpu")
    outputs = {name: value * np.float32(1.01) for name, value in computed(kernel, inputs).items()}
    assert made.thrice(kernel, inputs, outputs) == ["cpu.test"]


def test_where_inputs_that_move_change_nothing_the_last_bit_counts_once_an_operation(guard: Any) -> None:
    """A million operations an output number: rounding moves it by a thousand last bits, and 16 times that is clear."""
    last = float(np.finfo(np.float64).eps)
    for bits, found in ((15e3, []), (17e3, ["cpu.test"])):
        kernel = doubling(lambda x: np.ones(x.size), tolerance=last)
        made = guard("cpu.test", "cpu")
        assert made.compare(kernel, lambda x, bits=bits: np.ones(x.size) + bits * last, work=Work(3e6, 0.0)) == found


@pytest.mark.parametrize(
    ("kernel", "inputs"),
    [
        (matmul, {"a": np.full((2, 2), 3e38, np.float32), "b": np.ones((2, 2), np.float32)}),
        (matmul, {"a": np.full((2, 2), 1e-30, np.float32), "b": np.ones((2, 2), np.float32)}),
        (kalman, {"detected": np.full((2, 2, 2), 1e38, np.float32)}),
        (doubling(), {"x": np.array([1.0, 1e151])}),
        (doubling(), {"x": np.array([1.0, -1e-151])}),
    ],
)
def test_jobs_of_numbers_whose_products_overflow_or_vanish_are_not_compared(
    guard: Any, kernel: Kernel, inputs: Inputs
) -> None:
    made = guard("cpu.test", "cpu")
    outputs = {name: value + 1 for name, value in kernel.refer(kernel.signature.bind(inputs)[0]).items()}
    assert made.once(kernel, inputs, outputs) == []


def test_nought_and_what_is_not_finite_are_of_ordinary_size(guard: Any) -> None:
    made, x = guard("cpu.test", "cpu"), np.array([0.0, np.inf, np.nan, 1e149])
    assert made.once(doubling(), {"x": x}, {"y": 2 * x}) == []
    assert made.once(doubling(), {"x": x}, {"y": 3 * x}) == ["test.twice"]


def test_one_difference_is_a_suspicion_that_a_job_which_agrees_ends(guard: Any) -> None:
    made, kernel, inputs = guard("cpu.test", "cpu"), doubling(), {"x": np.ones(2)}
    good, bad = {"y": np.full(2, 2.0)}, {"y": np.full(2, 3.0)}
    for outputs in (bad, bad, good, bad, bad):
        assert made.once(kernel, inputs, outputs) == ([] if outputs is good else ["test.twice"])
    assert made.found == []
    assert made.once(kernel, inputs, bad) == []
    assert [each.device for each in made.found] == ["cpu.test"]


def test_a_job_that_is_run_again_differs_once(guard: Any) -> None:
    made = guard("cpu.test", "cpu")
    for _ in range(4):
        assert made.once(doubling(), {"x": np.ones(2)}, {"y": np.ones(2)}, name="job-1") == ["test.twice"]
    assert made.found == []


def test_a_suspicion_outlasts_a_job_of_which_nothing_can_be_said(guard: Any) -> None:
    made = guard("cpu.test", "cpu")
    made.once(doubling(), {"x": np.ones(2)}, {"y": np.ones(2)})
    assert made.once(doubling(), {"x": np.full(2, 1e200)}, {"y": np.ones(2)}) == ["test.twice"]


def test_a_suspicion_of_the_cpu_ends_where_an_accelerator_agrees_with_it(guard: Any) -> None:
    made, inputs = guard(), {"x": np.ones(2)}
    assert made.once(doubling(cpu=wrong), inputs, {"y": right(inputs["x"])}) == ["test.twice"]
    made.parity._runs.clear()
    assert made.once(doubling(cpu=right), inputs, {"y": right(inputs["x"])}) == []


def test_only_the_outputs_that_must_agree_are_compared(guard: Callable[..., Guard]) -> None:
    ranked = Kernel(
        "test.ranked",
        inputs={"x": "float64[n]"},
        outputs={"score": "float64[n]", "place": "int64[n]"},
        flops="n",
        bytes="8*n",
        parity=("score",),
    )
    ranked.reference(lambda x: {"score": x, "place": np.arange(x.size)})
    for wrong, found in (("place", []), ("score", ["cpu.test"])):
        made = guard("cpu.test", "cpu")
        outputs = {"score": np.ones(3), "place": np.arange(3)}
        outputs[wrong] = outputs[wrong][::-1] + 1
        assert made.thrice(ranked, {"x": np.ones(3)}, outputs) == found


def test_parity_names_outputs_only() -> None:
    with pytest.raises(InvalidKernel, match=r"parity names \['z'\]"):
        doubling(parity=("z",))


@pytest.fixture
def guard() -> Iterator[Callable[..., Guard]]:
    guards: list[Guard] = []

    def make(device: str = "gpu.test", kind: str = "gpu", settings: Settings = ALWAYS) -> Guard:
        guards.append(Guard(device, kind, settings))
        return guards[-1]

    yield make
    for each in guards:
        each.parity.stop()
        each.parity._thread.join(5)
        assert not each.parity._thread.is_alive()


def right(x: np.ndarray) -> np.ndarray:
    return 2 * x


def wrong(x: np.ndarray) -> np.ndarray:
    return 3 * x


def test_equal_results_quarantine_nothing(guard: Any) -> None:
    assert guard().compare(doubling(cpu=right), right) == []
    assert guard("cpu.test", "cpu").compare(doubling(cpu=right), right) == []


def test_a_difference_within_the_tolerance_is_none(guard: Any) -> None:
    assert guard().compare(doubling(cpu=right, tolerance=1e-3), lambda x: 2 * x * (1 + 1e-4)) == []


def test_an_accelerator_that_differs_from_the_cpu_and_the_reference_is_wrong(guard: Any) -> None:
    made = guard()
    assert made.compare(doubling(cpu=right), wrong) == ["gpu.test"]
    (entry,) = made.found
    assert (entry.kernel, entry.difference, entry.shapes) == ("test.twice", pytest.approx(0.5), {"x": [3]})
    assert "from the reference" in entry.reason


def test_where_the_accelerator_is_as_the_reference_the_cpu_is_wrong(guard: Any) -> None:
    assert guard().compare(doubling(cpu=wrong), right) == ["cpu"]


def test_where_both_differ_from_the_reference_both_are_wrong(guard: Any) -> None:
    assert guard().compare(doubling(cpu=wrong), lambda x: 4 * x) == ["gpu.test", "cpu"]


def test_where_the_reference_takes_too_long_the_accelerator_is_quarantined_as_a_precaution(guard: Any) -> None:
    made, asked = guard(), []
    kernel = doubling(lambda x: asked.append(x) or 2 * x, cpu=right)
    kernel.samples(lambda: [{"x": np.zeros(0)}])
    assert made.compare(kernel, wrong, work=Work(1e13, 0.0)) == ["gpu.test"]
    assert "precaution" in made.found[0].reason
    assert [x.size for x in asked] == [0]  # of the sample alone


def test_without_a_cpu_variant_the_reference_is_asked(guard: Any) -> None:
    assert guard().compare(doubling(), wrong) == ["gpu.test"]


def test_a_cpu_that_differs_from_the_reference_is_wrong(guard: Any) -> None:
    assert guard("cpu.test", "cpu").compare(doubling(cpu=right), wrong) == ["cpu.test"]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_a_second_opinion_that_raises_says_nothing_and_the_guard_goes_on(guard: Any, error: BaseException) -> None:
    def raising(x: np.ndarray) -> np.ndarray:
        if x.size > 1:
            raise error
        return 2 * x

    made = guard("cpu.test", "cpu")
    assert made.compare(doubling(raising), wrong) == []
    assert made.compare(doubling(), wrong) == ["cpu.test"]


def test_what_was_copied_does_not_change_with_its_memory(guard: Any) -> None:
    made, x = guard(), np.ones(3)
    check = made.parity.copied(job_of(doubling(), x), {"y": x})
    x[:] = 7
    assert check.inputs["x"].tolist() == check.outputs["y"].tolist() == [1, 1, 1]


def test_arrays_above_the_limit_are_not_copied(guard: Any) -> None:
    made = guard(settings=msgspec.structs.replace(ALWAYS, parity_bytes=100))
    assert made.parity.copied(job_of(doubling(), np.ones(6)), {"y": np.ones(6)}) is not None
    assert made.parity.copied(job_of(doubling(), np.ones(7)), {"y": np.ones(6)}) is None


def test_one_job_is_in_hand_and_the_others_are_passed_over(guard: Any) -> None:
    entered, gate = threading.Event(), threading.Event()

    def slow(x: np.ndarray) -> np.ndarray:
        entered.set()
        assert gate.wait(10)
        return 2 * x

    made = guard("cpu.test", "cpu")
    job = job_of(doubling(slow), np.ones(2))
    check = Check(job.id, job.kernel, job.inputs, {"y": np.ones(2)}, job.work)
    try:
        assert made.parity.draws(job)
        assert made.parity.offer(check)
        assert entered.wait(10)
        assert not made.parity.draws(job)
        assert not made.parity.offer(check)
    finally:
        gate.set()


@pytest.mark.parametrize(
    ("share", "chance", "drawn"), [(0.001, 0.0009, True), (0.001, 0.001, False), (0.0, 0.0, False)]
)
def test_a_share_of_the_jobs_is_drawn(share: float, chance: float, drawn: bool) -> None:
    parity = Parity(Settings(parity_share=share), "cpu", "cpu", PEAKS, print, lambda: chance)
    assert parity.draws(job_of(doubling(), np.ones(2))) is drawn


@pytest.mark.parametrize("share", [0.001, 0.0])
def test_every_job_of_a_suspected_kernel_is_drawn(guard: Any, share: float) -> None:
    made = guard("cpu.test", "cpu", Settings(parity_share=share))
    made.parity._chance = lambda: 0.5
    job, kernel = job_of(doubling(), np.ones(2)), doubling()
    assert not made.parity.draws(job)
    made.once(kernel, {"x": np.ones(2)}, {"y": np.ones(2)})
    assert made.parity.draws(job)
    made.once(kernel, {"x": np.ones(2)}, {"y": np.full(2, 2.0)})
    assert not made.parity.draws(job)


def test_a_kernel_may_refuse_and_long_jobs_are_not_drawn() -> None:
    parity = Parity(ALWAYS, "cpu", "cpu", PEAKS, print, lambda: 0.0)
    assert not parity.draws(job_of(doubling(parity=False), np.ones(2)))
    assert parity.draws(job_of(doubling(), np.ones(2), Work(0.09e9, 0.0)))
    assert not parity.draws(job_of(doubling(), np.ones(2), Work(0.11e9, 0.0)))


# -- in a worker ------------------------------------------------------------------------------------------------


def test_a_job_of_a_worker_is_compared_as_it_was_answered(make_worker: MakeWorker, guard: Any) -> None:
    made = guard("cpu.test", "cpu")
    worker = make_worker(start=False)
    for slot in worker.slots._slots:
        slot.runner._parity = made.parity
    worker.shop.repertoire.kernels["test.double"].reference(lambda x: {"y": 2 * x + (x > 2.5)})
    worker.slots.start()
    worker.double(worker.send(2.0)[0])
    with made.parity._changed:
        assert made.parity._changed.wait_for(lambda: made.parity.compared == 1, 5)
    assert made.found == []
    for count in (2, 3, 4):
        assert made.found == []
        (job,) = worker.send(3.0)
        worker.double(job)
        with made.parity._changed:
            assert made.parity._changed.wait_for(lambda count=count: made.parity.compared == count, 5)
    assert [(each.kernel, each.job) for each in made.found] == [("test.double", job)]


def test_a_job_whose_memory_has_become_anothers_while_it_was_copied_is_not_compared(
    make_worker: MakeWorker, guard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guard("cpu.test", "cpu")
    runner = make_worker().slots._slots[0].runner
    job = job_of(doubling(), np.ones(2))
    job.seen = [Reference("<f8", (2,), "lepton-ring:1")]
    offered: list[Check] = []
    monkeypatch.setattr(made.parity, "offer", offered.append)
    monkeypatch.setattr(runner, "_lost", lambda job: ValueError("another job's"))
    runner._look_again(made.parity, job, {"y": np.ones(2)})
    assert offered == []
    monkeypatch.setattr(runner, "_lost", lambda job: None)
    runner._look_again(made.parity, job, {"y": np.ones(2)})
    assert len(offered) == 1
