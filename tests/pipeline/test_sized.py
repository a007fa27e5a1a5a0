from __future__ import annotations

from collections.abc import Hashable

from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from pipeline.sized import Offer, Sized, sized

SPEC = KernelSpec("test.one", {"x": "float32[n]", "times": "int64 = 2"}, {"y": "float32[n]"}, "n*times", "8*n")
OFFER = Offer.of(SPEC)


def read(known: dict[Hashable, Sized], offer: Offer | None = OFFER, pin: str | None = None, **shapes: object) -> Sized:
    return sized(SPEC.name, Options(shapes=shapes, device=pin), b"", offer, known)


def test_jobs_of_the_same_size_have_the_very_same_one() -> None:
    known: dict[Hashable, Sized] = {}
    assert read(known, x=[10], times=3) is read(known, x=[10], times=3)
    assert read(known, x=[10], times=3) is not read(known, x=[11], times=3)
    assert read(known, x=[10], times=3) is not read(known, x=[10], times=3, pin="gpu")


def test_a_size_is_the_work_the_bytes_of_the_arrays_and_the_dims() -> None:
    size = read({}, x=[10], times=3).size
    assert (size.flops, size.bytes, size.transfer_bytes, size.dims) == (30.0, 80.0, 40.0, (10.0, 3.0))


def test_all_whose_size_cannot_be_told_share_one_until_the_kernel_is_announced() -> None:
    known: dict[Hashable, Sized] = {}
    assert read(known, x="large") is read(known, x=[1, 2]) is read(known, y=3)
    assert read({}, None, x=[10]) is not read({}, x=[10])
    assert read(known, x="large").offer is OFFER


def test_what_is_no_size_does_not_stand_for_an_equal_one_that_is() -> None:
    known: dict[Hashable, Sized] = {}
    assert read(known, x=[1.0]).size.flops == 0
    assert read(known, x=[1]).size.flops == 2
