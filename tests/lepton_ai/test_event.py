from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai import event
from lepton_ai.errors import InvalidArguments
from lepton_ai.event import FINAL_EVENTS, TYPES, Cursor, Event, Observation, cloud_events, missed

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
    found = re.findall(r"^\| ([a-z]+\.[a-z_]+) ", event.__doc__, re.MULTILINE)
    assert len(found) == len(set(found)) > 10
    assert all(re.search(r"(ed|dead|lost|online|offline|heartbeat)$", name) for name in found)
    assert tuple(found) == TYPES
    assert {name.split(".", 2)[2] for name in FINAL_EVENTS} <= {f"{name}.v1" for name in TYPES}


# -- to the outside -------------------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=10)
milliseconds = st.integers(0, int(datetime(9999, 1, 1, tzinfo=UTC).timestamp() * 1000))
entries = st.builds("{}-{}".format, milliseconds, st.integers(0, 2**64 - 1))
cursors = st.builds(Cursor, milliseconds, st.integers(0, 2**64 - 1), st.integers(0, 10**9 - 1) | st.just(2**64 - 1))


@st.composite
def happenings(draw: st.DrawFn) -> Event:
    """An Event as our processes tell it: nothing without a name, and a number for each job where there are numbers."""
    jobs = tuple(draw(st.lists(names, max_size=4)))
    seconds = st.lists(st.floats(), min_size=len(jobs), max_size=len(jobs))
    told = draw(events)
    return msgspec.structs.replace(
        told,
        source=draw(names),
        kernel=draw(st.none() | names),
        device=draw(st.none() | names),
        jobs=jobs,
        data=told.data | draw(st.just({}) | st.fixed_dictionaries({"seconds": seconds})),
    )


@given(entries, st.lists(happenings(), max_size=4))
def test_every_event_is_a_cloud_event_to_the_sdk(entry: str, steps: list[Event]) -> None:
    for each in cloud_events(entry, steps):
        read = JSONFormat().read(None, msgspec.json.encode(each))
        assert (read.get_id(), read.get_source(), read.get_type()) == (each.id, each.source, each.type)
        assert (read.get_subject(), read.get_specversion()) == (each.subject, "1.0")
        assert read.get_datacontenttype() == "application/json"
        time = datetime.fromtimestamp(int(entry.partition("-")[0]) / 1000, UTC)
        assert read.get_time() == time.replace(microsecond=time.microsecond // 1000 * 1000)
        assert read.get_data() == msgspec.json.decode(msgspec.json.encode(each.data))
        assert not set(read.get_attributes()).difference(each.__struct_fields__)


@given(cursors)
def test_that_something_was_missed_is_a_cloud_event_too_and_its_id_the_place_to_go_on_from(cursor: Cursor) -> None:
    read = JSONFormat().read(None, msgspec.json.encode(told := missed(cursor, "5-0")))
    assert (read.get_id(), read.get_data()) == (cursor.entry, {"after": cursor.entry, "first": "5-0"})
    assert (Cursor.parse(told.id).milliseconds, Cursor.parse(told.id).sequence) == (
        *(cursor.milliseconds, cursor.sequence),
    )


@given(st.lists(entries, max_size=3, unique=True), st.lists(happenings(), max_size=3))
def test_ids_are_unique_and_rise_in_the_order_of_the_stream(stream: list[str], steps: list[Event]) -> None:
    ordered = sorted(stream, key=Cursor.parse)
    ids = [each.id for entry in ordered for each in cloud_events(entry, steps)]
    parsed = [Cursor.parse(each) for each in ids]
    assert all(one < two for one, two in itertools.pairwise(parsed))
    assert len(ids) == len(set(ids)) == len(stream) * sum(len(each.jobs) or 1 for each in steps)


@given(entries, st.lists(happenings(), min_size=1, max_size=4), st.data())
def test_a_cursor_parts_what_was_seen_from_what_was_not(entry: str, steps: list[Event], data: st.DataObject) -> None:
    told = list(cloud_events(entry, steps))
    at = data.draw(st.integers(0, len(told) - 1))
    assert list(Cursor.parse(told[at].id).unseen(told)) == told[at + 1 :]
    assert list(Cursor.parse(entry).unseen(told)) == []
    assert list(Cursor.parse("0").unseen(told)) == ([] if entry == "0-0" else told)


@given(cursors)
def test_a_cursor_is_read_as_it_is_written(cursor: Cursor) -> None:
    text = cursor.entry if cursor.number == 2**64 - 1 else f"{cursor.entry}.{cursor.number}"
    assert Cursor.parse(text) == cursor


@given(cursors)
def test_reading_before_a_cursor_finds_its_entry_again_only_where_some_of_it_is_unseen(cursor: Cursor) -> None:
    before, entry = Cursor.parse(cursor.before), Cursor.parse(cursor.entry)
    assert before <= entry
    if cursor.number == 2**64 - 1 or cursor.entry == "0-0":
        assert before == entry
    else:  # and nothing lies between
        assert before < entry
        following = (before.milliseconds, before.sequence + 1)
        assert (entry.milliseconds, entry.sequence) in (following, (before.milliseconds + 1, 0))


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-", "x", "1-", "-1", "1-2-3", "1.2", "1-2.", "1-2.x", "1 -2", "+1", "1e3", "0x1", "1-2.3\n"),
        *("18446744073709551616", "1-18446744073709551616", "9" * 21, "1-2.9999999999"),
    ],
)
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(InvalidArguments) as raised:
        Cursor.parse(text)
    assert raised.value.field == "since"


@given(st.text(max_size=30))
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    try:
        cursor = Cursor.parse(text)
    except InvalidArguments:
        return
    assert Cursor.parse(cursor.entry) >= cursor


def test_a_job_is_told_its_own_part_of_what_its_launch_took() -> None:
    launch = Observation("k", "cpu", 4, 1.0, 1.0, 0.2, 0.8)
    seconds = Event("job.placed", "r", jobs=("a", "b"), data={"seconds": [1.0, 2.0], "devices": {"cpu": 2}})
    succeeded = Event("job.succeeded", "w", "k", "cpu", ("a", "b"), launch)
    one, two, three, _ = (each.data for each in cloud_events("5-0", [seconds, succeeded]))
    assert (one, two) == ({"devices": {"cpu": 2}, "predicted_s": 1.0}, {"devices": {"cpu": 2}, "predicted_s": 2.0})
    assert three == {"kernel": "k", "device": "cpu", "transfer_s": 0.05, "run_s": 0.2, "batch": 4}
