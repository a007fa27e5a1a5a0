"""A user's kernel for tests (LEPTON_KERNELS=gated_kernels): it runs until the test lets it end, or it is cancelled.

`test.gated` of `n` ends once the folder TEST_GATE has a file called `n`; of 0 at once. It is predicted to take very
long, so that a router gives a slot two of them and keeps the rest in its window.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

gated = Kernel("test.gated", inputs={"n": "int64"}, outputs={"y": "int64[k]"}, flops="1000000000000000", bytes="n")
gated.reference(lambda n: {"y": np.array([n])})
gated.samples(lambda: [{"n": 0}])


@gated.on("cpu")
def _cpu(device: Any) -> Run:
    place = Path(os.environ["TEST_GATE"])

    def run(inputs: Inputs, context: Context) -> Outputs:
        while inputs["n"] and not (place / str(inputs["n"])).exists() and not context.cancelled:
            time.sleep(0.005)
        return {"y": np.array([inputs["n"]])}

    return run
