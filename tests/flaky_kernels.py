"""Users' kernels for tests (LEPTON_KERNELS=flaky_kernels) that fail and are run again.

`test.flaky` of `n` fails until the folder TEST_FLAKY has a file called `n`; `test.hopeless` always does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Retry, Run

INPUTS, OUTPUTS = {"n": "int64"}, {"y": "int64[k]"}

flaky = Kernel(
    "test.flaky",
    inputs=INPUTS,
    outputs=OUTPUTS,
    flops="n",
    bytes="n",
    retry=Retry(times=100, delay_s=0.3, factor=1, jitter=0),
)
hopeless = Kernel(
    "test.hopeless", inputs=INPUTS, outputs=OUTPUTS, flops="n", bytes="n", retry=Retry(times=1, delay_s=0.1, jitter=0)
)

for _kernel in (flaky, hopeless):
    _kernel.reference(lambda n: {"y": np.array([n])})
    _kernel.samples(lambda: [{"n": 0}])


@flaky.on("cpu")
def _flaky(device: Any) -> Run:
    place = Path(os.environ["TEST_FLAKY"])

    def run(inputs: Inputs, context: Context) -> Outputs:
        if inputs["n"] and not (place / str(inputs["n"])).exists():
            raise OSError(f"{inputs['n']} is not there yet")
        return {"y": np.array([inputs["n"]])}

    return run


@hopeless.on("cpu")
def _hopeless(device: Any) -> Run:
    def run(inputs: Inputs, context: Context) -> Outputs:
        if inputs["n"]:  # 0 is the warm-up's
            raise OSError(f"{inputs['n']} will never be there")
        return {"y": np.array([0])}

    return run
