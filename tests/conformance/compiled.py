"""Compiles what the simulator launched for real cards: `python -m tests.conformance.compiled LAUNCHES`, without a card.

Prints JSON: for each launch what the compiler said against it, empty where nothing. It types and lowers every function
as numba-cuda does before its first launch; where NVVM and NVRTC are installed too, by
`pip install 'numba-cuda[cu13]'`, it makes PTX.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from numba import cuda
from numba.cuda import compiler, dispatcher
from numba.cuda.cudadrv import nvrtc, nvvm
from numba.cuda.np import numpy_support

from lepton_ai.kernel import Kernel
from lepton_ai.settings import Settings
from tasks.catalogue import load
from tasks.devices.gpu import bound
from tests.conformance.launches import Launch

#: The oldest that CUDA 13 compiles for.
CAPABILITY = (7, 5)


class Card:
    """As much of a card's driver as variants are built with: it notes what they compile."""

    simulated = False
    processors = 132

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, tuple[Any, ...], dict[str, int]]] = []

    def compile(
        self,
        function: Any,
        threads: Sequence[int] | None = None,
        helpers: Sequence[Any] = (),
        constants: Mapping[str, int] | None = None,
    ) -> None:
        self.compiled.append((function, tuple(helpers), dict(constants or {})))

    def upload(self, array: Any) -> None:
        """A table that a builder brings; nothing is launched."""


def main(launches: Path) -> None:
    # It is asked what to compile device functions for.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITY)
    try:
        nvvm.NVVM()
        nvrtc.get_supported_ccs()
        make = cuda.compile
    except Exception:  # noqa: BLE001 - they are not installed
        make = compiler._compile_pyfunc_with_fixup
    kernels = load(Settings.read().kernel_modules).kernels
    told = [
        compiled(each, kernels[each.kernel], make)
        for each in msgspec.json.decode(launches.read_bytes(), type=list[Launch])
    ]
    sys.stdout.buffer.write(msgspec.json.encode(told))


def compiled(launch: Launch, kernel: Kernel, make: Any) -> str:
    """The function, with the constants that it has on a card and not those of the simulator."""
    card = Card()
    kernel.build("gpu", card)
    try:
        for function, helpers, constants in card.compiled:
            if (function.__module__, function.__name__) == launch.function:
                own = bound(cuda, function, helpers, constants)
                make(own, tuple(typed(*each) for each in launch.types), cc=CAPABILITY, device=False, abi="numba")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is asked for
        return f"{type(error).__name__}: {error}"
    return ""


def typed(dtype: str, dims: int) -> Any:
    kind = numpy_support.from_dtype(numpy_support.np.dtype(dtype))
    return cuda.types.Array(kind, dims, "C") if dims else kind


if __name__ == "__main__":
    main(Path(sys.argv[1]))
