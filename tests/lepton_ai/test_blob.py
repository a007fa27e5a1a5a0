from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from hypothesis import example, given
from hypothesis import strategies as st

from lepton_ai import blob, tensor
from lepton_ai.blob import InRedis, InRing, Reference
from lepton_ai.errors import BlobLost, InvalidArguments, LeptonError, TooLarge

JOB = "0198c0de-0000-7000-8000-000000000001"
LIMIT = 1 << 30
MIB = 1 << 20


@pytest.fixture
def client(broker_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(broker_url) as client:
        yield client


def perform(client: redis.Redis, commands: Iterable[blob.Command], *, transaction: bool = False) -> list[Any]:
    with client.pipeline(transaction=transaction) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        return pipeline.execute()


def published(client: redis.Redis, array: np.ndarray[Any, Any], job: str = JOB) -> Reference:
    reference, commands = blob.write_commands(array, job)
    perform(client, commands)
    commands = blob.publish_commands(blob.keys(job, [reference.blob]))
    blob.require_published(perform(client, commands, transaction=True))
    return reference


def back(client: redis.Redis, reference: Reference, job: str = JOB) -> np.ndarray[Any, Any]:
    return blob.read(reference, perform(client, blob.read_commands(reference, job, LIMIT)))


def lasts_s(client: redis.Redis, reference: Reference) -> set[int]:
    """The seconds that its keys have left; -1 for ever, -2 where one is gone."""
    return set(perform(client, [("TTL", name) for name in blob.keys(JOB, [reference.blob])]))


@pytest.mark.parametrize("dtype", tensor.DTYPES)
def test_an_array_comes_back_as_it_was_written(client: redis.Redis, dtype: str) -> None:
    array = np.arange(24 * 1024).reshape(2, -1).astype(dtype)
    found = back(client, published(client, array))
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)
    assert not found.flags.writeable


def test_so_does_one_of_another_byte_or_memory_order(client: redis.Redis) -> None:
    array = np.arange(60_000, dtype=">f4").reshape(200, 300).T[::2]
    assert np.array_equal(back(client, published(client, array)), array)


def test_a_large_one_is_kept_in_chunks_of_which_none_keeps_the_broker_long(client: redis.Redis) -> None:
    array = np.random.default_rng(0).random(MIB, np.float32)
    reference = published(client, array)
    names = blob.keys(JOB, [reference.blob])
    assert [client.strlen(name) for name in names] == [blob.CHUNK_BYTES] * (4 * MIB // blob.CHUNK_BYTES)
    assert np.array_equal(back(client, reference), array)


def test_a_reference_crosses_the_wire_as_a_small_map() -> None:
    reference, _ = blob.write_commands(np.zeros((300, 300), np.float32), JOB)
    raw = msgspec.msgpack.encode(reference)
    assert len(raw) < 100
    assert msgspec.msgpack.decode(raw, type=Reference) == reference
    assert msgspec.msgpack.decode(raw).keys() == {"dtype", "shape", "blob"}


def test_what_nobody_publishes_goes_by_itself(client: redis.Redis) -> None:
    reference, commands = blob.write_commands(np.zeros(MIB, np.float32), JOB)
    perform(client, commands[:3])  # and here its producer dies
    names = blob.keys(JOB, [reference.blob])
    assert all(0 < client.ttl(name) <= blob.WRITTEN_S for name in names[:3])
    assert not client.exists(*names[3:])


def test_what_is_published_stays(client: redis.Redis) -> None:
    assert lasts_s(client, published(client, np.zeros(MIB, np.float32))) == {-1}


def test_writing_again_does_not_make_what_is_published_expire(client: redis.Redis) -> None:
    reference, commands = blob.write_commands(np.zeros(MIB, np.float32), JOB)
    names = blob.keys(JOB, [reference.blob])
    for _ in range(2):  # the answer to the first was lost
        perform(client, commands)
        blob.require_published(perform(client, blob.publish_commands(names)))
        perform(client, commands)
        assert lasts_s(client, reference) == {-1}


def test_publishing_what_has_gone_is_no_acceptance(client: redis.Redis) -> None:
    reference, commands = blob.write_commands(np.zeros(MIB, np.float32), JOB)
    perform(client, commands)
    names = blob.keys(JOB, [reference.blob])
    client.unlink(names[1])
    with pytest.raises(BlobLost):
        blob.require_published(perform(client, blob.publish_commands(names)))


def test_a_dropped_blob_goes_soon(client: redis.Redis) -> None:
    reference = published(client, np.zeros(MIB, np.float32))
    perform(client, blob.drop_commands(blob.keys(JOB, [reference.blob])))
    (left_s,) = lasts_s(client, reference)
    assert 0 < left_s <= blob.DROPPED_S


def test_a_dead_letters_blob_outlives_its_second_message_and_can_be_published_again(client: redis.Redis) -> None:
    reference = published(client, np.zeros(MIB, np.float32))
    names = blob.keys(JOB, [reference.blob])
    perform(client, blob.keep_commands(names))
    perform(client, blob.drop_commands(names))
    assert min(lasts_s(client, reference)) > blob.LETTER_S - 60
    blob.require_published(perform(client, blob.publish_commands(names)))
    assert lasts_s(client, reference) == {-1}


def test_what_is_gone_is_said_to_be_lost(client: redis.Redis) -> None:
    reference = published(client, np.zeros(MIB, np.float32))
    client.unlink(blob.keys(JOB, [reference.blob])[-1])
    with pytest.raises(BlobLost, match="1 of 16 chunks"):
        back(client, reference)


def test_what_is_of_another_size_is_refused(client: redis.Redis) -> None:
    reference = published(client, np.zeros(MIB, np.float32))
    client.append(blob.keys(JOB, [reference.blob])[0], b"x")
    with pytest.raises(InvalidArguments, match="has 4194305 bytes"):
        back(client, reference)


def test_a_job_cannot_name_the_blobs_of_another(client: redis.Redis) -> None:
    reference = published(client, np.zeros(MIB, np.float32))
    with pytest.raises(BlobLost):
        back(client, reference, job="another")


@given(st.text(), st.text() | st.from_regex(r"redis:[0-9a-f]{16}:[0-9]{1,3}", fullmatch=True))
@example("a:0123456789abcdef:0", "redis:0123456789abcdef:1")
def test_the_keys_of_a_blob_say_whose_it_is(job: str, place: str) -> None:
    for name in blob.keys(job, [place]):
        assert name.rsplit(":", 2)[0] == f"lepton-blob:{job}"


def test_small_arrays_stay_in_their_message() -> None:
    assert not blob.is_worth(np.zeros(blob.WORTH_BYTES, np.uint8))
    assert blob.is_worth(np.zeros(blob.WORTH_BYTES + 1, np.uint8))


def test_a_dtype_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(InvalidArguments, match="complex64"):
        blob.write_commands(np.zeros(9000, np.complex64), JOB)


GOOD = Reference("<f4", (1024, 1024), "redis:0123456789abcdef:16")


@pytest.mark.parametrize(
    "place",
    [
        "",
        "redis",
        "redis:0123456789abcdef:0",
        "redis:0123456789abcdef:-1",
        "redis:0123456789abcdef:16\n",
        "redis:0123456789ABCDEF:16",
        "redis:../../etc/passwd:16",
        "redis:*:16",
        "redis:0123456789abcdef:99999999",
        "ring:" + "0" * 32 + ":" + "0" * 31 + "/:0:1",
        "ring:" + "0" * 32 + ":../../../etc/passwd:0:1",
        "ring:" + "0" * 32 + ":" + "0" * 32 + ":-64:1",
        "ring:" + "0" * 32 + ":" + "0" * 32 + ":0:0",
        "ring:" + "0" * 32 + ":" + "0" * 32 + ":0:1e3",
        "ring:" + "0" * 32 + ":" + "0" * 32 + ":\u0661:1",
        "lepton:jobs:1",
        "s3://bucket/../key",
    ],
)
def test_what_is_no_place_is_refused(place: str) -> None:
    with pytest.raises(InvalidArguments, match="no place of a blob"):
        blob.place_of(msgspec.structs.replace(GOOD, blob=place), "a")


@pytest.mark.parametrize("dtype", ["float32", ">f4", "|O", "<c8", "", "<f4, <f4", "V8"])
def test_what_is_no_dtype_of_ours_is_refused(dtype: str) -> None:
    with pytest.raises(InvalidArguments, match="unknown dtype"):
        blob.layout(msgspec.structs.replace(GOOD, dtype=dtype), LIMIT, "a")


@pytest.mark.parametrize("shape", [(-1,), (-(2**40), -(2**40)), (0, 5), (2**63,), (1,) * 33])
def test_a_shape_that_no_blob_has_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArguments, match="the shape of a blob"):
        blob.layout(msgspec.structs.replace(GOOD, shape=shape), LIMIT, "a")


def test_what_is_larger_than_a_worker_takes_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLarge):
        blob.read_commands(msgspec.structs.replace(GOOD, shape=(2**62, 2**62)), JOB, LIMIT)


def test_nobody_is_made_to_ask_for_more_chunks_than_the_size_can_have() -> None:
    with pytest.raises(InvalidArguments, match="9999 chunks"):
        blob.read_commands(msgspec.structs.replace(GOOD, blob="redis:0123456789abcdef:9999"), JOB, LIMIT)


def test_what_is_in_shared_memory_is_not_asked_of_the_broker() -> None:
    place = f"ring:{'0' * 32}:{'1' * 32}:4096:7"
    assert blob.keys(JOB, [place]) == []
    assert blob.place_of(msgspec.structs.replace(GOOD, blob=place)) == InRing("0" * 32, "1" * 32, 4096, 7)
    assert blob.place_of(GOOD) == InRedis("0123456789abcdef", 16)
    with pytest.raises(InvalidArguments, match="not in the broker"):
        blob.read_commands(msgspec.structs.replace(GOOD, blob=place), JOB, LIMIT)


@given(
    st.builds(
        Reference,
        dtype=st.sampled_from(["<f4", "|u1", "<i8", "float32"]) | st.text(),
        shape=st.lists(st.integers(-(2**64), 2**64), max_size=4).map(tuple),
        blob=st.from_regex(r"(redis:[0-9a-f]{16}:\d+|ring:[0-9a-f]{32}:[0-9a-f]{32}:\d+:\d+)", fullmatch=True)
        | st.text(),
    ),
    st.lists(st.none() | st.binary(max_size=64), max_size=4),
)
def test_a_forged_reference_meets_errors_of_ours_only(reference: Reference, answers: list[bytes | None]) -> None:
    try:
        blob.read_commands(reference, JOB, LIMIT)
        blob.read(reference, answers)
    except LeptonError:
        pass
