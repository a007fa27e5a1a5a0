"""The application of a real worker that serves the stand-in, on the queue `lepton.gpu.declared`.

In this process, and nowhere else, `tasks.devices.gpu` is the driver of declared speed, and the kernels of the stream
have a variant for it.
"""

from __future__ import annotations

import sys
from functools import partial

from bench import declared
from bench.stream import KERNELS
from tasks.worker import app

__all__ = ["app"]

sys.modules["tasks.devices.gpu"] = declared
for _kernel in KERNELS.values():
    _kernel.on("gpu")(partial(declared.variant, _kernel))
