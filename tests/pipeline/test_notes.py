from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.job import Candidate, Estimate, Placement
from pipeline.notes import Note, packed, written

numbers = st.floats(0, 1e12)
estimates = st.builds(Estimate, st.just(0.0), numbers, numbers, numbers)
candidates = st.builds(Candidate, st.text(), estimates) | st.builds(Candidate, st.text(), excluded=st.text(min_size=1))
placements = st.builds(
    Placement,
    st.text(),
    st.text(),
    st.sampled_from(["placed", "parked"]),
    st.text(),
    numbers,
    st.text(),
    st.none() | st.text(),
    st.none() | estimates,
    st.lists(candidates, max_size=4).map(tuple),
    st.text(),
    st.booleans(),
)


def waiting(estimate: Estimate | None, wait_s: float) -> Estimate | None:
    return None if estimate is None else msgspec.structs.replace(estimate, wait_s=wait_s)


@given(placements, st.text(max_size=300), st.text(max_size=300), st.lists(numbers, min_size=5, max_size=5))
def test_a_note_is_the_placement_of_its_job_with_its_reason_and_its_waits(
    placement: Placement, job: str, reason: str, waits: list[float]
) -> None:
    own, *others = waits
    found = Note(placement).of(job, written(reason), packed(own), [packed(each) for each in others])
    meant = msgspec.structs.replace(
        placement,
        job=job,
        reason=reason,
        estimate=waiting(placement.estimate, own),
        candidates=tuple(
            msgspec.structs.replace(each, estimate=waiting(each.estimate, wait_s))
            for each, wait_s in zip(placement.candidates, others, strict=False)
        ),
    )
    assert found == msgspec.msgpack.encode(meant)
