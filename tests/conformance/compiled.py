"""Compiles what the simulator launched for real cards: `python -m tests.conformance.compiled LAUNCHES`, without a card.

Prints JSON: for each launch what the compiler said against it, empty where nothing. It types and lowers every function
as numba-cuda does before its first launch; where NVVM and NVRTC are installed too (`pip install 'numba-cuda[cu13]'`), it makes PTX.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from numba import cuda
from numba.cuda import compiler, dispatcher
from numba.cuda.cudadrv import nvrtc, nvvm
from numba.cuda.np import numpy_support

from tasks.devices.gpu import bound
from tests.conformance.launches import Launch

#: The oldest that CUDA 13 compiles for.
CAPABILITY = (7, 5)


def main(launches: Path) -> None:
    # It is asked what to compile device functions for.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITY)
    try:
        nvvm.NVVM()
        nvrtc.get_supported_ccs()
        make = cuda.compile
    except Exception:  # noqa: BLE001 - they are not installed
        make = compiler._compile_pyfunc_with_fixup
    told = [compiled(each, make) for each in msgspec.json.decode(launches.read_bytes(), type=list[Launch])]
    sys.stdout.buffer.write(msgspec.json.encode(told))


def compiled(launch: Launch, make: Any) -> str:
    function, *helpers = (
        getattr(importlib.import_module(module), name) for module, name in (launch.function, *launch.helpers)
    )
    try:
        make(
            bound(cuda, function, helpers),
            tuple(typed(*each) for each in launch.types),
            cc=CAPABILITY,
            device=False,
            abi="numba",
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is asked for
        return f"{type(error).__name__}: {error}"
    return ""


def typed(dtype: str, dims: int) -> Any:
    kind = numpy_support.from_dtype(numpy_support.np.dtype(dtype))
    return cuda.types.Array(kind, dims, "C") if dims else kind


if __name__ == "__main__":
    main(Path(sys.argv[1]))
