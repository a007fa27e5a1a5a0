"""The application of a real worker that serves a stand-in, on the queue `lepton.gpu.declared` or `lepton.tpu.declared`.

In this process, and nowhere else, `tasks.devices.gpu` and `.tpu` are the driver of declared speed, and the kernels of
the stream have a variant for it.
"""

from __future__ import annotations

import sys
from functools import partial

from bench import declared
from bench.stream import KERNELS
from tasks.worker import app

__all__ = ["app"]

for _kind in declared.SPEEDS:
    sys.modules[f"tasks.devices.{_kind}"] = declared
    for _kernel in KERNELS.values():
        _kernel.on(_kind)(partial(declared.variant, _kernel))
