from __future__ import annotations

import re

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai import event
from lepton_ai.event import Event, Observation

finite = st.floats(allow_nan=False)
texts = st.text(max_size=10)
observations = st.builds(Observation, texts, texts, st.integers(1, 1000), finite, finite, finite, finite)
events = st.builds(
    Event,
    type=texts,
    source=texts,
    kernel=st.none() | texts,
    device=st.none() | texts,
    jobs=st.lists(texts, max_size=3).map(tuple),
    observation=st.none() | observations,
    data=st.dictionaries(texts, st.integers(-(2**63), 2**63) | texts | st.lists(finite, max_size=2), max_size=3),
)


@given(st.lists(events, max_size=4))
def test_the_events_of_one_step_come_back_in_their_order(sent: list[Event]) -> None:
    assert event.decode(event.encode(*sent)) == tuple(sent)


def test_what_an_event_does_not_say_takes_no_room() -> None:
    assert event.encode(Event("router.online", "r")) == msgspec.msgpack.encode(
        [{"type": "router.online", "source": "r"}]
    )


def test_a_field_of_a_later_release_is_passed_over() -> None:
    raw = msgspec.msgpack.encode([{"type": "job.placed", "source": "r", "colour": "red"}])
    assert event.decode(raw) == (Event("job.placed", "r"),)


def test_every_type_in_the_table_is_in_the_past_tense_or_a_state() -> None:
    assert event.__doc__ is not None
    found = re.findall(r"^\| ([a-z]+\.[a-z]+) ", event.__doc__, re.MULTILINE)
    assert len(found) == len(set(found)) > 10
    assert all(re.search(r"(ed|online|offline|heartbeat)$", name) for name in found)
