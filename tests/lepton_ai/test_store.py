from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_ai import blob, store, tensor
from lepton_ai.blob import InStore, Reference
from lepton_ai.errors import BlobLost, InvalidArguments, TooLarge

pytest.importorskip("fsspec", reason="needs the extra `store`")
MOST = 2**20


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on a store."""
    if request.param == "file":
        return f"file://{tmp_path}"
    return str(request.getfixturevalue("bucket"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a server of the test's own, which fsspec is told of as its users are: by the environment."""
    moto = pytest.importorskip("moto.server", reason="needs moto")
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs", reason="needs s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}"}
    try:
        fsspec.filesystem("s3").mkdir("scans")
        yield "s3://scans/lepton"
    finally:
        del fsspec.config.conf["s3"]
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def one(reference: Reference, limit_bytes: int = MOST) -> Any:
    (found,) = store.read([reference], limit_bytes)
    return found


@pytest.mark.parametrize("dtype", tensor.DTYPES)
@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_what_is_put_is_read_as_it_was(root: str, name: str, dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    reference = store.put(array, f"{root}/{name}")
    found = one(reference)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert not found.flags.writeable


def test_strided_and_big_endian_arrays_are_put_too(root: str) -> None:
    array = np.arange(24, dtype=">i4").reshape(4, 6)[::2, ::3]
    np.testing.assert_array_equal(one(store.put(array, f"{root}/a.npy")), array)
    np.testing.assert_array_equal(one(store.put(array, f"{root}/a")), array)


def test_many_are_read_at_once_and_each_fault_is_its_own(root: str) -> None:
    arrays = [np.full(5, at, np.float32) for at in range(20)]
    references: list[Reference] = [store.put(each, f"{root}/{at}.npy") for at, each in enumerate(arrays)]
    references.insert(7, Reference("<f4", (5,), f"{root}/none.npy"))
    found = store.read(references, MOST)
    assert isinstance(found[7], BlobLost)
    assert f"nothing is at {root}/none.npy" in found[7].message
    np.testing.assert_array_equal(found[:7] + found[8:], arrays)


def test_a_file_says_itself_what_it_holds(root: str) -> None:
    put = store.put(np.ones((3, 2)), f"{root}/a.npy")
    assert store.find(f"{root}/a.npy") == put
    raw = store.put(np.ones((3, 2)), f"{root}/a.raw")
    assert store.find(f"{root}/a.raw", "float64", (3, 2)) == raw
    with pytest.raises(InvalidArguments, match="say the dtype and the shape"):
        store.find(f"{root}/a.raw")
    with pytest.raises(BlobLost, match="nothing is at"):
        store.find(f"{root}/b.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
@pytest.mark.parametrize(("dtype", "shape"), [("<f8", (2,)), ("<f8", (4,)), ("<i8", (3,)), ("<f4", (3,))])
def test_what_is_not_what_the_reference_says_is_refused(
    root: str, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    store.put(np.ones(3), f"{root}/{name}")
    found = one(Reference(dtype, shape, f"{root}/{name}"))
    if (name, dtype) == ("a.bin", "<i8"):  # bytes have no type
        assert found.shape == shape
    else:
        assert isinstance(found, InvalidArguments)
        assert f"{root}/{name}" in found.message


@pytest.mark.parametrize(
    "made",
    [
        b"",
        b"\x93NUMPY",
        b"no array at all",
        np.asfortranarray(np.ones((2, 3))),
        np.ones(3, ">f8"),
        np.ones(3, complex),
        np.array(["text"]),
        np.array([{"an": "object"}], object),
    ],
    ids=["empty", "cut", "other", "fortran", "big-endian", "complex", "text", "pickle"],
)
def test_files_that_no_kernel_could_read_are_refused(tmp_path: Path, made: Any) -> None:
    data = made
    if isinstance(made, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, made, allow_pickle=True)
        data = buffer.getvalue()
    (tmp_path / "a.npy").write_bytes(data)
    url = f"file://{tmp_path}/a.npy"
    assert isinstance(one(Reference("<f8", (2, 3), url)), InvalidArguments)
    with pytest.raises(InvalidArguments):
        store.find(url)


def test_nothing_above_the_limit_is_read(tmp_path: Path) -> None:
    reference = store.put(np.ones(100), f"file://{tmp_path}/a.npy")
    with pytest.raises(TooLarge):
        store.read([reference], 799)
    assert one(reference, 800).shape == (100,)


def test_a_store_that_cannot_be_reached_is_told_and_not_raised() -> None:
    assert isinstance(one(Reference("<f8", (2,), "nosuch://bucket/a.npy")), Exception)


@pytest.mark.skipif(os.geteuid() == 0 or not sys.platform.startswith("linux"), reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    reference = store.put(np.ones(3), f"file://{tmp_path}/a.npy")
    (tmp_path / "a.npy").chmod(0)
    assert isinstance(one(reference), BlobLost)


@pytest.mark.parametrize(
    "url",
    [
        "a.npy",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/../a.npy",
        "s3://bucket/a/./b.npy",
        "s3://bucket/%2e%2e/a.npy",
        "s3://key:secret@bucket/a.npy",
        "http://host/a.npy?token=1",
        "s3://bucket/a b.npy",
        "s3://bucket/a::file://b",
        "S3://bucket/a.npy",
        "s3://bucket/" + "a" * 1024,
        "redis:0123456789abcdef:1",
    ],
)
def test_what_is_no_plain_place_on_a_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidArguments):
        store.put(np.ones(3), url)


@pytest.mark.parametrize(
    ("url", "prefixes", "is_below"),
    [
        ("s3://bucket/scans/a.npy", ["s3://bucket/scans"], True),
        ("s3://bucket/scans/a.npy", ["s3://bucket/scans/"], True),
        ("s3://bucket/scans/a.npy", ["s3://other", "s3://bucket"], True),
        ("s3://bucket/scans2/a.npy", ["s3://bucket/scans"], False),
        ("s3://bucket2/a.npy", ["s3://bucket"], False),
        ("file:///etc/a.npy", ["s3://bucket"], False),
        ("s3://bucket/a.npy", [], False),
    ],
)
def test_a_prefix_is_a_folder(url: str, prefixes: list[str], is_below: bool) -> None:
    place = blob.place_of(Reference("<f8", (1,), url))
    assert isinstance(place, InStore)
    assert place.is_below(prefixes) == is_below


def test_arrays_of_no_elements_and_of_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArguments, match="sizes"):
        store.put(np.ones((0, 3)), f"file://{tmp_path}/a.npy")
    with pytest.raises(InvalidArguments, match="cannot be sent"):
        store.put(np.ones(3, complex), f"file://{tmp_path}/a.npy")
