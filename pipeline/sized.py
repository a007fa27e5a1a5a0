"""Sized: what the cost of a job depends on, read from its shapes, and one for all jobs that cost the same."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any, Final

import msgspec

from lepton_ai import wire
from lepton_ai.formula import Formula
from lepton_ai.job import Options, Pin
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.size import Key, Size, packed
from lepton_ai.signature import Signature, shapes_of
from lepton_ai.succession import inherit
from lepton_ai.tensor import DTYPES

__all__ = ["Offer", "Sized", "sized"]

#: A body larger than this is not opened for its shapes; its job is priced as if it had no work.
_OPEN_LIMIT_BYTES = 1 << 20
#: The size of a job of which nothing is known.
_UNKNOWN: Final = Size(0.0, 0.0)
#: So many are kept for jobs to come.
_MOST: Final = 1 << 14


class Offer(msgspec.Struct, frozen=True):
    """A kernel that live workers announce."""

    spec: KernelSpec
    signature: Signature
    sized_by: tuple[str, ...]
    """The inputs by whose shapes (of arrays) and values (of scalars) the size of its jobs is known."""

    @classmethod
    def of(cls, spec: KernelSpec) -> Offer:
        """What a worker announces; InvalidKernel where it cannot be read."""
        signature = spec.signature()
        used = frozenset().union(*(Formula(text).names for text in (spec.flops, spec.bytes, *spec.limits.values())))
        arrays = (name for name, argument in signature.inputs.items() if argument.dims is not None)
        return cls(spec, signature, (*arrays, *sorted(used & signature.inputs.keys())))


class Sized(msgspec.Struct, frozen=True, eq=False):
    """What jobs share that cost the same. Told apart as objects: most jobs of a size have the very same one."""

    kernel: str
    pin: Pin
    offer: Offer | None
    """By which announcement of its kernel; None where there is none."""
    size: Size
    alike: Hashable
    """The same for all that are predicted together."""
    key: Key
    row: bytes
    """`Size.key` and `packed` of it."""


def sized(
    kernel: str, options: Options, message: bytes, offer: Offer | None, known: MutableMapping[Hashable, Sized]
) -> Sized:
    """Of a job; `known` holds those of the jobs before it by the same announcements."""
    shapes, shape = _shapes(options, message, offer)
    pin = options.pin
    name = (kernel, pin, shape)
    if (found := known.get(name)) is not None:
        return found
    size, row = _read(shapes, offer)
    if size is _UNKNOWN:
        # Not kept by its shapes: those of a job that can be read may be equal to them, as 1 is to 1.0.
        name = (kernel, pin, None)
        if (found := known.get(name)) is not None:
            return found
    if len(known) >= _MOST:
        known.clear()
    alike = (kernel, pin, len(size.dims))
    found = known[name] = Sized(kernel, pin, offer, size, alike, size.key, row)
    return found


def _shapes(options: Options, message: bytes, offer: Offer | None) -> tuple[Mapping[str, Any] | None, Hashable]:
    """The declared shapes of a job, and of them what its cost depends on; None for both where they cannot be told."""
    if offer is None:
        return None, None
    try:
        shapes = options.shapes or _shapes_in_body(message, offer.signature)
        found = map(shapes.get, offer.sized_by)
        shape = tuple([tuple(each) if type(each) is list else each for each in found])
        hash(shape)
    except Exception:  # noqa: BLE001 - whatever stands there, it must not stop the router
        return None, None
    return shapes, shape


def _read(shapes: Mapping[str, Any] | None, offer: Offer | None) -> tuple[Size, bytes]:
    """The size of a job of these shapes, and its row. What cannot be told is the worker's to refuse."""
    if shapes is None or offer is None:
        return _UNKNOWN, packed(_UNKNOWN)
    try:
        work = offer.spec.work(offer.signature.dims(shapes))
        transfer_bytes = 0.0
        for name, argument in offer.signature.inputs.items():
            if argument.dims is not None and (name in shapes or name not in offer.signature.initial):
                transfer_bytes += math.prod(shapes[name]) * DTYPES[argument.dtype].itemsize
        size = Size(work.flops, work.bytes, transfer_bytes, tuple(map(float, work.dims)))
        return size, packed(size)
    # Declared sizes may be beyond any number; whatever they are, they must not stop the router.
    except Exception:  # noqa: BLE001
        return _UNKNOWN, packed(_UNKNOWN)


def _shapes_in_body(message: bytes, signature: Signature) -> dict[str, Any]:
    body = wire.read_body(wire.read_envelope(message), limit_bytes=_OPEN_LIMIT_BYTES)
    return shapes_of(inherit(signature, body))
