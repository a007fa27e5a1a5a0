"""Errors over HTTP: application/problem+json (RFC 9457), with our code and the field at fault. Never a traceback."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from lepton_ai.errors import LeptonError, Unavailable

__all__ = ["HANDLERS", "MEDIA_TYPE", "Problem"]

MEDIA_TYPE = "application/problem+json"
_CODES = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}

log = structlog.get_logger()


class Problem(msgspec.Struct, omit_defaults=True):
    """What went wrong. `field` names the argument, option or parameter; `index` the job of a list.

    `estimate_s`: when a job would end that cannot meet its deadline, in seconds from now.
    """

    title: str
    status: int
    detail: str
    code: str
    type: str = "about:blank"
    field: str | None = None
    index: int | None = None
    estimate_s: float | None = None


def _respond(problem: Problem, headers: dict[str, str] | None = None) -> Response[bytes]:
    content = msgspec.json.encode(problem)
    return Response(content, status_code=problem.status, media_type=MEDIA_TYPE, headers=headers)


def _ours(request: Request[Any, Any, Any], error: LeptonError) -> Response[bytes]:
    title = type(error).__name__
    index = getattr(error, "index", None)
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))} if isinstance(error, Unavailable) else None
    log.info("request_refused", path=request.url.path, status=error.status, code=error.code, field=error.field)
    problem = Problem(title, error.status, error.message, error.code, field=error.field, index=index)
    problem.estimate_s = getattr(error, "estimate_s", None)
    return _respond(problem, headers)


def _parameter(request: Request[Any, Any, Any], error: ValidationException) -> Response[bytes]:
    extra = error.extra if isinstance(error.extra, list) else []
    first = extra[0] if extra and isinstance(extra[0], dict) else {}
    detail = str(first.get("message", error.detail))
    return _respond(Problem("InvalidParameter", 422, detail, "invalid_parameter", field=first.get("key")))


def _http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    status = error.status_code
    code = _CODES.get(status, "refused" if status < 500 else "internal")
    return _respond(Problem(type(error).__name__.removesuffix("Exception"), status, error.detail, code))


def _unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("request_failed", path=request.url.path, exc_info=error)
    return _respond(Problem("InternalError", 500, "an error of ours; it has been logged", "internal"))


HANDLERS: Any = {
    LeptonError: _ours,
    ValidationException: _parameter,
    HTTPException: _http,
    Exception: _unexpected,
}
