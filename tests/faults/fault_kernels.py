"""The kernel of the plays (LEPTON_KERNELS=fault_kernels): it tells a file that it really ran, then behaves or not.

`fault.run` of job number `n` appends `n` and the time to the file FAULT_RUNS, takes `ms` milliseconds, and then does
`how`; `fault.large` behaves, but fails where its array is not full of its number. In one call of write() on a
descriptor opened for appending: whatever happens next, and however many run, the line is there.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from typing import Any

import numpy as np

from lepton_ai.errors import DeviceLost, DeviceOutOfMemory
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

#: What `how` may be.
BEHAVE, SEGFAULT, EXIT, MEMORY, HANG, LOSE, BREAK, CRAMPED = range(8)
_MOUTHFUL_BYTES = 64 * 1024 * 1024

run = Kernel(
    "fault.run",
    inputs={"n": "int64", "ms": "int64", "how": "int64"},
    outputs={"n": "int64[k]"},
    flops="1000 + ms * 1000000",
    bytes="8",
)
run.reference(lambda n, ms, how: {"n": np.array([n])})
run.samples(lambda: [{"n": -1, "ms": 0, "how": BEHAVE}])


@run.on("cpu")
def _cpu(device: Any) -> Run:
    descriptor = os.open(os.environ["FAULT_RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def run(inputs: Inputs, context: Context) -> Outputs:
        number = int(inputs["n"])
        if number >= 0:  # not the sample
            os.write(descriptor, b"%d %.4f\n" % (number, time.time()))
        if inputs["ms"]:
            select.select([], [], [], inputs["ms"] / 1000)  # libfaketime breaks time.sleep
        misbehave(int(inputs["how"]), number)
        return {"n": np.array([number])}

    return run


large = Kernel(
    "fault.large",
    inputs={"n": "int64", "ms": "int64", "data": "float32[m]"},
    outputs={"n": "int64[k]"},
    flops="1000 + ms * 1000000",
    bytes="4*m",
)
large.reference(lambda n, ms, data: {"n": np.array([n])})
large.samples(lambda: [{"n": -1, "ms": 0, "data": np.full(16, -1, np.float32)}])


@large.on("cpu")
def _large(device: Any) -> Run:
    run = _cpu(device)

    def checked(inputs: Inputs, context: Context) -> Outputs:
        found = run({"n": inputs["n"], "ms": inputs["ms"], "how": BEHAVE}, context)
        if not (inputs["data"] == np.float32(inputs["n"])).all():
            raise ValueError("its array is another job's")
        return found

    return checked


carry = Kernel(
    "fault.carry",
    inputs={"n": "int64", "ms": "int64", "how": "int64", "seen": "int64[s]"},
    outputs={"n": "int64[k]", "seen": "int64[t]"},
    flops="1000 + ms * 1000000",
    bytes="8",
    carries=("seen",),
)
carry.reference(lambda n, ms, how, seen: {"n": np.array([n]), "seen": np.append(seen, n)})
carry.samples(lambda: [{"n": -1, "ms": 0, "how": BEHAVE}])


@carry.on("cpu")
def _carry(device: Any) -> Run:
    """Leaves the numbers of all jobs of its state key."""
    run = _cpu(device)
    return lambda inputs, context: {**run(inputs, context), "seen": np.append(inputs["seen"], inputs["n"])}


def is_first(number: int) -> bool:
    """Whether a job has not been here before, in any process."""
    try:
        os.close(os.open(f"{os.environ['FAULT_RUNS']}.{number}", os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def misbehave(how: int, number: int) -> None:
    """Returns only where it was told to behave, or has misbehaved before as it should but once."""
    if how == LOSE and is_first(number):
        raise DeviceLost("as the play has it, once")
    if how == BREAK:
        raise DeviceLost("as the play has it, whenever this job runs")
    if how == CRAMPED and os.environ.get("FAULT_CRAMPED"):
        raise DeviceOutOfMemory("as the play has it, on this device")
    if how == SEGFAULT:
        ctypes.string_at(0)
    elif how == EXIT:
        os._exit(7)
    elif how == MEMORY:  # until the machine's patience ends, which here is four mouthfuls: then as the kernel does it
        eaten = [bytearray(_MOUTHFUL_BYTES) for _ in range(4)]
        os.kill(os.getpid(), 9 if eaten else 0)
    while how == HANG:
        time.sleep(1)
