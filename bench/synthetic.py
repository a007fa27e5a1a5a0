"""What the benches compute: the same functions for Lepton (LEPTON_KERNELS=bench.synthetic) and for every peer.

`bench.noop` adds; `bench.spin` computes for as long as its loops last, on a Numba function that holds no GIL.
`bench.touch` reads one number of each page of a large array.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from lepton_ai.kernel import Inputs, Kernel, Outputs, Run

#: One number of each page of memory: an argument is read where it lies, and reading it costs next to nothing.
PAGE = 1024
_SCALARS = {"x": "float64", "y": "float64", "n": "int64", "data": "uint8[m]"}

noop_kernel = Kernel("bench.noop", inputs=_SCALARS, outputs={"total": "float64"}, flops="3", bytes="m")
spin_kernel = Kernel("bench.spin", inputs=_SCALARS, outputs={"total": "float64"}, flops="n", bytes="m")
touch_kernel = Kernel(
    "bench.touch", inputs={"a": "float32[k]"}, outputs={"total": "float64"}, flops="k/1024", bytes="k/256"
)


def noop(x: float, y: float, n: int, data: Any) -> float:
    return x + y + n + float(data[0])


def spin(x: float, y: float, n: int, data: Any) -> float:
    return x + y + loop(n)


def touch(a: Any) -> float:
    return float(a[::PAGE].sum(dtype=np.float64))


FUNCTIONS = {"bench.noop": noop, "bench.spin": spin}


def loop(n: int) -> int:
    """The low bits of n steps of a generator (Marsaglia 2003, "Xorshift RNGs"), which no compiler can shorten."""
    global _compiled  # noqa: PLW0603 - compiled when it is first needed, and not when this file is imported
    if _compiled is None:
        _compiled = _compile()
    return int(_compiled(n))


_compiled: Any = None


def _compile() -> Any:
    import numba

    @numba.njit("int64(int64)", nogil=True, cache=True)
    def steps(n):  # type: ignore[no-untyped-def]
        state = np.uint64(88172645463325252)
        for _ in range(n):
            state ^= state << np.uint64(13)
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
        return np.int64(state & np.uint64(0xFFFF))

    return steps


def loops_of(seconds: float) -> int:
    """How many steps last that long on this machine, by the CPU time of the fastest of a few runs."""
    loop(1)
    probe = 200_000
    return max(1, round(seconds / min(cpu_s(probe) for _ in range(20)) * probe))


def cpu_s(n: int) -> float:
    """CPU seconds that this thread takes for n steps."""
    start = time.thread_time()
    loop(n)
    return time.thread_time() - start


def _samples() -> Iterator[dict[str, Any]]:
    yield {"x": 1.0, "y": 2.0, "n": 3, "data": np.arange(256, dtype=np.uint8)}


for _kernel, _function in ((noop_kernel, noop), (spin_kernel, spin)):
    _kernel.reference(lambda x, y, n, data, _function=_function: {"total": _function(x, y, n, data)})
    _kernel.samples(_samples)

touch_kernel.reference(lambda a: {"total": touch(a)})
touch_kernel.samples(lambda: [{"a": np.ones(PAGE * 4, np.float32)}])


@noop_kernel.on("cpu")
def _noop(device: Any) -> Run:
    return lambda inputs, _: {"total": noop(inputs["x"], inputs["y"], inputs["n"], inputs["data"])}


@spin_kernel.on("cpu")
def _spin(device: Any) -> Run:
    loop(1)

    def run(inputs: Inputs, _: Any) -> Outputs:
        return {"total": inputs["x"] + inputs["y"] + loop(inputs["n"])}

    return run


@touch_kernel.on("cpu")
def _touch(device: Any) -> Run:
    return lambda inputs, _: {"total": touch(inputs["a"])}
