"""Every mistake of a client over HTTP has its status, a body that names the field, and no traceback in a log."""

import asyncio
import socket
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from pipeline.supervisor import Fleet
from queues.connection import Connection

A, B = [[1.0, 2.0]], [[3.0], [4.0]]
GOOD = {"kernel": "linalg.matmul", "arguments": {"a": A, "b": B}}


@pytest.fixture
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.http_url, timeout=15) as http:
        yield http


@pytest.fixture(autouse=True, scope="module")
def _no_traceback(fleet: Fleet) -> Iterator[None]:
    yield
    for log in fleet.logs.iterdir():
        assert "Traceback" not in log.read_text(), log.name


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["detail"]
    return body


def matmul(**arguments: Any) -> dict[str, Any]:
    return {"kernel": "linalg.matmul", "arguments": arguments}


def test_a_good_job_waits_for_its_result(http: httpx.Client) -> None:
    response = http.post("/v1/jobs?wait_s=10", json=GOOD)
    assert response.status_code == 200
    assert response.json()["result"] == {"c": [[11.0]]}
    assert response.json()["state"] == "succeeded"


def test_without_waiting_a_job_is_accepted_and_found_by_its_id(http: httpx.Client) -> None:
    accepted = http.post("/v1/jobs", json=GOOD)
    assert accepted.status_code == 202
    found = http.get(f"/v1/jobs/{accepted.json()['id']}", params={"wait_s": 10}).json()
    assert (found["state"], found["result"]) == ("succeeded", {"c": [[11.0]]})
    assert found["record"]["placement"]["device"].startswith("cpu.")


def test_msgpack_is_spoken_both_ways(http: httpx.Client) -> None:
    data = struct.pack("<2f", 1.0, 2.0)
    tensor = {"dtype": "<f4", "shape": [1, 2], "data": data}
    body = msgspec.msgpack.encode(matmul(a=tensor, b=tensor | {"shape": [2, 1]}))
    headers = {"content-type": "application/x-msgpack", "accept": "application/x-msgpack"}
    response = http.post("/v1/jobs", params={"wait_s": 10}, content=body, headers=headers)
    c = msgspec.msgpack.decode(response.content)["result"]["c"]
    assert struct.unpack("<f", c["data"]) == (5.0,)


def test_a_list_is_accepted_whole(http: httpx.Client) -> None:
    response = http.post("/v1/jobs?wait_s=10", json=[GOOD] * 20)
    assert response.status_code == 200
    assert [view["state"] for view in response.json()] == ["succeeded"] * 20


def test_a_list_with_one_wrong_job_is_refused_whole_and_the_job_is_named(http: httpx.Client) -> None:
    body = problem(http.post("/v1/jobs", json=[GOOD, matmul(a=A)]), 422)
    assert (body["index"], body["field"]) == (1, "b")


def test_an_unknown_kernel_is_404(http: httpx.Client) -> None:
    body = problem(http.post("/v1/jobs", json={"kernel": "no.such", "arguments": {}}), 404)
    assert (body["code"], body["field"]) == ("unknown_kernel", "kernel")
    assert "linalg.matmul" in body["detail"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"a": A}, "b"),
        ({"a": A, "b": B, "z": 1}, "z"),
        ({"a": A, "b": [[1.0]]}, "b"),
        ({"a": [1.0], "b": B}, "a"),
        ({"a": A, "b": [["x"], ["y"]]}, "b"),
        ({"a": A, "b": [[1.0], [2.0, 3.0]]}, "b"),
        ({"a": {"dtype": "<f8", "shape": [1, 2], "data": "AAAAAAAAAAAAAAAAAAAAAA=="}, "b": B}, "a"),
        ({"a": {"dtype": "<f4", "shape": [1, 2], "data": "AAAA"}, "b": B}, "a"),
        ({"a": {"dtype": "pickle", "shape": [1, 2], "data": ""}, "b": B}, "a"),
        ({"a": {"dtype": "<f4", "shape": [-1, 2], "data": ""}, "b": B}, "a"),
        ({"a": {"q": 1}, "b": B}, "a"),
        ({"a": A, "b": None}, "b"),
    ],
    ids=[
        "missing",
        "extra",
        "shape",
        "rank",
        "strings",
        "ragged",
        "dtype",
        "bytes",
        "unknown dtype",
        "negative",
        "map",
        "null",
    ],
)
def test_arguments_that_do_not_fit_are_422_and_named(http: httpx.Client, arguments: dict[str, Any], field: str) -> None:
    body = problem(http.post("/v1/jobs", json=matmul(**arguments)), 422)
    assert (body["code"], body["field"]) == ("invalid_arguments", field)


def test_a_scalar_outside_its_limits_is_422_and_named(http: httpx.Client) -> None:
    arguments = {"items": [[1.0]], "queries": [[1.0]], "k": 5}
    body = problem(http.post("/v1/jobs", json={"kernel": "retrieval.top_k", "arguments": arguments}), 422)
    assert body["field"] == "k"


@pytest.mark.parametrize(
    ("request_body", "field"),
    [
        ({"kernel": "linalg.matmul"}, "arguments"),
        ({"arguments": {}}, "kernel"),
        (GOOD | {"colour": "red"}, "colour"),
        (GOOD | {"priority": "high"}, "priority"),
        (GOOD | {"priority": 12}, "priority"),
    ],
    ids=["no arguments", "no kernel", "unknown option", "wrong type", "out of range"],
)
def test_a_request_of_another_shape_is_422_and_named(
    http: httpx.Client, request_body: dict[str, Any], field: str
) -> None:
    assert problem(http.post("/v1/jobs", json=request_body), 422)["field"] == field


DEEP_JSON = b'{"kernel":"linalg.matmul","arguments":{"a":' + b"[" * 100_000
DEEP_MSGPACK = b"\x82\xa6kernel\xadlinalg.matmul\xa9arguments\x81\xa1a" + b"\x91" * 100_000


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"\xff\xfe", DEEP_JSON, b'{"kernel": NaN}'],
    ids=["cut", "empty", "no text", "deep", "nan"],
)
def test_malformed_json_is_400(http: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert problem(http.post("/v1/jobs", content=content, headers=headers), 400)["code"] == "malformed"


FOUR_BILLION_JOBS = b"\xdd\xff\xff\xff\xff"


def test_more_jobs_than_a_request_may_have_are_413_before_they_are_read(http: httpx.Client) -> None:
    headers = {"content-type": "application/x-msgpack"}
    assert problem(http.post("/v1/jobs", content=FOUR_BILLION_JOBS, headers=headers), 413)["code"] == "too_large"


@pytest.mark.parametrize("content", [b"\xc1", b"\xdc\x00\x01", DEEP_MSGPACK], ids=["no msgpack", "cut", "deep"])
def test_malformed_msgpack_is_400(http: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/x-msgpack"}
    assert problem(http.post("/v1/jobs", content=content, headers=headers), 400)["code"] == "malformed"


def test_an_unknown_content_type_is_415(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", content=b"<job/>", headers={"content-type": "text/xml"})
    body = problem(response, 415)
    assert (body["title"], body["code"]) == ("UnsupportedMediaType", "unsupported_media_type")
    assert "application/json" in body["detail"]


def test_a_body_over_the_limit_is_413(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", content=b"x" * (9 * 1024 * 1024), headers={"content-type": "application/json"})
    assert problem(response, 413)["code"] == "too_large"


def test_a_body_over_the_limit_without_a_length_is_413(http: httpx.Client) -> None:
    parts = (b"x" * 1024 * 1024 for _ in range(9))
    assert problem(http.post("/v1/jobs", content=parts), 413)["code"] == "too_large"


@pytest.mark.parametrize("body", [b"zz\r\n{}\r\n0\r\n\r\n", b"2\r\n{}XX0\r\n\r\n"], ids=["size", "end"])
def test_a_broken_chunk_is_400(fleet: Fleet, body: bytes) -> None:
    url = urlsplit(fleet.http_url)
    head = "POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection((url.hostname, url.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"malformed"' in answer


def test_an_unknown_job_is_404(http: httpx.Client) -> None:
    assert problem(http.get("/v1/jobs/01990000-0000-7000-8000-000000000000"), 404)["code"] == "unknown_job"


@pytest.mark.parametrize("wait_s", ["soon", "-1", "1e9"])
def test_a_wait_that_is_no_wait_is_422_and_named(http: httpx.Client, wait_s: str) -> None:
    assert problem(http.post(f"/v1/jobs?wait_s={wait_s}", json=GOOD), 422)["field"] == "wait_s"


def test_an_unknown_path_is_404_and_a_wrong_method_405(http: httpx.Client) -> None:
    body = problem(http.get("/v1/nothing"), 404)
    assert (body["title"], body["code"]) == ("NotFound", "not_found")
    body = problem(http.delete("/v1/jobs"), 405)
    assert (body["title"], body["code"]) == ("MethodNotAllowed", "method_not_allowed")


def test_the_service_says_that_it_is_alive_and_ready(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}


def test_devices_and_kernels_are_listed(http: httpx.Client) -> None:
    devices = {each["device"]: each["slots"] for each in http.get("/v1/devices").json()}
    assert devices == {"cpu.big": 2, "cpu.little": 1}
    kernels = {each["name"]: each["inputs"] for each in http.get("/v1/kernels").json()}
    assert kernels["linalg.matmul"] == {"a": "float32[m,k]", "b": "float32[k,n]"}


@pytest.mark.parametrize("page", ["", "/swagger", "/redoc", "/elements", "/rapidoc", "/scalar"])
def test_openapi_has_no_page_that_loads_scripts_from_elsewhere(http: httpx.Client, page: str) -> None:
    assert "<script" not in http.get(f"/openapi{page}").text


def test_openapi_comes_in_yaml_too(http: httpx.Client) -> None:
    assert "/v1/jobs:" in http.get("/openapi/openapi.yaml").text


def test_openapi_describes_the_body_of_a_job(http: httpx.Client) -> None:
    paths = http.get("/openapi/openapi.json").json()["paths"]
    content = paths["/v1/jobs"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "application/x-msgpack", "application/x-ndjson"}
    assert "kernel" in msgspec.json.encode(content).decode()


def test_two_hundred_may_wait_at_once(fleet: Fleet) -> None:
    async def ask() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=fleet.http_url, timeout=60, limits=limits) as http:
            asked = [http.post("/v1/jobs?wait_s=30", json=GOOD) for _ in range(200)]
            return [response.status_code for response in await asyncio.gather(*asked)]

    assert set(asyncio.run(ask())) == {200}


def test_a_job_whose_message_would_be_too_large_is_413_and_not_a_failure_later(http: httpx.Client) -> None:
    numbers = "[" + ",".join(["1.0"] * 1_500_000) + "]"  # 6 MB of JSON, and 13 MB of msgpack
    body = f'{{"kernel": "monitor.anomaly", "arguments": {{"series": {numbers}}}}}'
    response = http.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert problem(response, 413)["code"] == "too_large"


def test_a_task_of_celerys_own_is_no_job_of_ours(http: httpx.Client, fleet: Fleet) -> None:
    connection = Connection(fleet.broker_url, "test")
    connection.call("SET", "celery-task-meta-foreign", '{"status": "SUCCESS", "result": 42, "task_id": "foreign"}')
    connection.call("SET", "celery-task-meta-junk", b"\xc1junk")
    connection.close()
    assert problem(http.get("/v1/jobs/foreign"), 404)["code"] == "unknown_job"
    assert problem(http.get("/v1/jobs/junk"), 404)["code"] == "unknown_job"
