"""Size: what a launch asks for, and what the cost model looks at of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from lepton_ai.event import Observation
from lepton_ai.placement.problem import Floats

__all__ = ["FEATURES", "Key", "Size", "Sizes", "features_of", "packed"]

#: What launches share that are of exactly the same size: their jobs, then the dims of each, or the Work of all.
Key = tuple[float, ...]

#: Of a size: a constant, the log of the jobs in its launch, and the logs of as many dims as are looked at.
FEATURES: Final = 2 + 8
#: A scalar may be any number.
_LARGEST: Final = 1e18


class Size(msgspec.Struct, frozen=True, array_like=True):
    """What a launch asks for. Flops and bytes are those of all its jobs; transfer and dims are those of each."""

    flops: float
    bytes: float
    transfer_bytes: float = 0.0
    dims: tuple[float, ...] = ()
    """`Work.dims` of a job, where they are known."""
    jobs: int = 1

    @classmethod
    def of(cls, seen: Observation) -> Size:
        """The size of an observed launch, of one job at least."""
        return cls(seen.flops, seen.bytes, seen.transfer_bytes / seen.jobs, seen.dims, seen.jobs)

    @property
    def key(self) -> Key:
        return (self.jobs, *self.dims) if self.dims else (self.jobs, self.flops, self.bytes)

    def is_possible(self) -> bool:
        """Whether a launch could have been of this size."""
        numbers = (self.flops, self.bytes, self.transfer_bytes)
        return self.jobs >= 1 and all(0 <= each < math.inf for each in numbers) and all(map(math.isfinite, self.dims))

    @property
    def features(self) -> list[float]:
        """The constant, log(jobs), and log(1 + dim) of each dim, which may be nought."""
        dims = self.dims[: FEATURES - 2]
        return [1.0, math.log(self.jobs), *[math.log1p(min(abs(each), _LARGEST)) for each in dims]]


def packed(size: Size) -> bytes:
    """A row of `Sizes.numbers`."""
    return struct.pack(f"{3 + len(size.dims)}d", size.flops, size.bytes, size.transfer_bytes, *size.dims)


class Sizes(msgspec.Struct, frozen=True):
    """Many launches of one job each, all with equally many dims, laid out to be looked at together."""

    keys: Sequence[Key]
    """[size]: `Size.key`."""
    numbers: Floats
    """[size]: flops, bytes, transfer bytes, and the dims."""

    @classmethod
    def joined(cls, keys: Sequence[Key], rows: Sequence[bytes]) -> Sizes:
        """From `Size.key` and `packed`: an array from tuples takes ten times as long."""
        return cls(keys, np.frombuffer(b"".join(rows)).reshape(len(rows), -1))

    @classmethod
    def of(cls, sizes: Sequence[Size]) -> Sizes:
        """These, one or more."""
        return cls.joined([each.key for each in sizes], [packed(each) for each in sizes])


def features_of(dims: Floats) -> Floats:
    """[size, FEATURES]: `Size.features` of launches of one job, from their [size, dim]; nought where there are none."""
    found = np.zeros((len(dims), FEATURES))
    found[:, 0] = 1
    dims = dims[:, : FEATURES - 2]
    np.log1p(np.minimum(np.abs(dims), _LARGEST), out=found[:, 2 : 2 + dims.shape[1]])
    return found
