"""Stand-ins for accelerators: a driver of declared speed, which waits instead of computing.

No emulator helps where what counts is an accelerator's speed: it computes on the cores that the other devices need. So
this one takes as long as it says, and leaves the cores alone meanwhile. What takes time is declared (`Speed`):
a launch, each array's way over the link, and the arithmetic or the memory traffic of the kernel's own formulas. Results
are right: jobs of the benches' streams are recognised and answered with what the CPU's variant made of them before the
worker came online, others are computed by the reference, however long that takes.

No user is offered it: `bench.declared_worker` alone puts it in the place of a driver, in its own process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.stream import DECK, LADDER, expected
from lepton_ai.device import DeviceState, Peaks, kind_of
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run
from tasks.driver import Found

__all__ = ["SPEEDS", "Answers", "DeclaredDriver", "Speed", "open_device", "probe", "variant"]

#: Of the first array of a job, so many numbers tell which it is.
_MARK = 16


class Speed(msgspec.Struct, frozen=True):
    """What the device takes for what."""

    launch_s: float
    flops_per_s: float
    bytes_per_s: float
    link_latency_s: float
    """Of each array, in either direction."""
    link_bytes_per_s: float
    share: Mapping[str, float]
    """Of its arithmetic, what a kernel reaches."""

    def run_s(self, kernel: str, flops: float, size_bytes: float) -> float:
        """One launch: the roofline over what the kernel reaches."""
        return self.launch_s + max(flops / (self.flops_per_s * self.share[kernel]), size_bytes / self.bytes_per_s)

    def transfer_s(self, size_bytes: int) -> float:
        return self.link_latency_s + size_bytes / self.link_bytes_per_s


#: What two accelerators of different character might be. `gpu`: a small card in a narrow slot, with ten times the
#: arithmetic of one core of the machine that this was written on (100 Gflop/s), the memory of a card of that size, and
#: four lanes of PCIe 3.0 as they are measured; kernels reach the share of its peak that they reach on the CPU. `tpu`: a
#: unit for products, twice as strong at those and feeble at all else, behind half as fast a link.
SPEEDS = {
    "gpu": Speed(
        launch_s=500e-6,
        flops_per_s=1e12,
        bytes_per_s=80e9,
        link_latency_s=20e-6,
        link_bytes_per_s=3e9,
        share={"retrieval.top_k": 0.6, "medical.median_filter": 0.04, "finance.black_scholes": 0.2},
    ),
    "tpu": Speed(
        launch_s=1e-3,
        flops_per_s=2e12,
        bytes_per_s=80e9,
        link_latency_s=20e-6,
        link_bytes_per_s=1.5e9,
        share={"retrieval.top_k": 0.6, "medical.median_filter": 0.005, "finance.black_scholes": 0.02},
    ),
}


class DeclaredDriver:
    """The opened stand-in. It has one set of units: whatever several slots launch is run one after the other."""

    emulated = True
    stream = None

    def __init__(self, kind: str, slots: int, speed: Speed) -> None:
        self.kind = kind
        self.slots = slots
        self.speed = speed
        self.model = f"a stand-in of {speed}"
        self._unit = threading.Lock()
        self._link = threading.Lock()

    def peaks(self) -> Peaks:
        """What a data sheet says: nothing of a runtime's launches, and the link's theory. The rest is to be learned."""
        return Peaks(self.speed.flops_per_s, self.speed.bytes_per_s, 1.3 * self.speed.link_bytes_per_s, 5e-6, 10e-6)

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array itself, after the time that the link takes for it."""
        self._carry(array.nbytes)
        return array

    def download(self, value: Any) -> NDArray[Any]:
        array = np.asarray(value)
        self._carry(array.nbytes)
        return array

    def synchronize(self) -> None:
        """Returns at once: `answer` has waited."""

    def close(self) -> None:
        """Nothing to give back."""

    def launch(self, run: Run, inputs: Inputs, context: Context) -> Outputs:
        return run(inputs, context)

    def state(self) -> DeviceState:
        return DeviceState()

    def answer(self, kernel: Kernel, answers: Answers, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs, when the device would have them."""
        with self._unit:
            start = time.perf_counter()
            outputs = answers.of(inputs)
            work = kernel.spec.work(kernel.signature.dims(_shapes(kernel, inputs)))
            jobs = _jobs(kernel, inputs)
            _wait(start + self.speed.run_s(kernel.name, work.flops * jobs, work.bytes * jobs))
        return outputs

    def _carry(self, size_bytes: int) -> None:
        with self._link:
            _wait(time.perf_counter() + self.speed.transfer_s(size_bytes))


class Answers:
    """What the stream's jobs of one kernel come to, alone or many in a launch."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._first = next(name for name, each in kernel.signature.inputs.items() if each.dims is not None)
        self._known: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
        for card in {*DECK, *LADDER}:
            if card.kernel == kernel.name:
                inputs = kernel.signature.bind(card.arguments())[0]
                self._known[self._key(inputs, inputs[self._first])] = len(inputs[self._first]), expected(card)

    def of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of one job, or of a batch of them: remembered, or by the reference."""
        array, batch = inputs[self._first], self._kernel.spec.batch
        if batch == "stack" and _is_stack(self._kernel, inputs):
            each = [self.of({name: _at(value, at) for name, value in inputs.items()}) for at in range(len(array))]
            return {name: np.stack([one[name] for one in each]) for name in each[0]}
        parts, done = [], 0
        while done < len(array):
            length, found = self._known.get(self._key(inputs, array[done:]), (0, {}))
            if not length or (batch != "concat" and length != len(array)):
                return dict(self._kernel.refer(inputs))
            parts.append(found)
            done += length
        if done != len(array) or not parts:
            return dict(self._kernel.refer(inputs))
        return (
            parts[0] if len(parts) == 1 else {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}
        )

    @staticmethod
    def _key(inputs: Mapping[str, Any], array: NDArray[Any]) -> tuple[Any, ...]:
        scalars = [(name, value) for name, value in inputs.items() if not isinstance(value, np.ndarray)]
        return (array.shape[1:], array.reshape(-1)[:_MARK].tobytes(), *scalars)


def variant(kernel: Kernel, driver: DeclaredDriver) -> Run:
    """The variant of a kernel of the stream for this device."""
    answers = Answers(kernel)
    return lambda inputs, _: driver.answer(kernel, answers, inputs)


def open_device(device: str, slots: int) -> DeclaredDriver:
    """The driver of `gpu.declared` or `tpu.declared`."""
    kind = kind_of(device)
    return DeclaredDriver(kind, slots, SPEEDS[kind])


def probe() -> Found:
    """It is nowhere."""
    return Found("none", False, "a stand-in that waits, for benches", None, emulated=True)


def _wait(until: float) -> None:
    """Sleeps until then, by `time.perf_counter`."""
    while (left := until - time.perf_counter()) > 0:
        time.sleep(left)


def _is_stack(kernel: Kernel, inputs: Mapping[str, Any]) -> bool:
    name, each = next((name, each) for name, each in kernel.signature.inputs.items() if each.dims is not None)
    return inputs[name].ndim > len(each.dims or ())


def _jobs(kernel: Kernel, inputs: Mapping[str, Any]) -> int:
    """How many jobs of equal shapes are stacked; of a concatenation the shapes tell all."""
    if not _is_stack(kernel, inputs):
        return 1
    return len(next(value for value in inputs.values() if isinstance(value, np.ndarray)))


def _shapes(kernel: Kernel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of one job's arrays, and its scalars."""
    skip = int(_is_stack(kernel, inputs))
    return {name: value.shape[skip:] if isinstance(value, np.ndarray) else value for name, value in inputs.items()}


def _at(value: Any, at: int) -> Any:
    return value[at] if isinstance(value, np.ndarray) else value
