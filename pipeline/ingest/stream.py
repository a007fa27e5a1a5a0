"""Responses that are written while they are made, and whose making ends with the request, however that ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from litestar.response import Stream
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Scope, Send

__all__ = ["Streamed"]

#: A proxy that keeps a stream, or collects it first, makes no stream of it.
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Streamed(Stream):
    """Parts as they come. The generator must have begun, so that what it raises first is answered as a problem."""

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str, status_code: int = 200) -> None:
        super().__init__(parts, media_type=media_type, status_code=status_code, headers=_HEADERS)
        self._parts = parts

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        return _Closing(self._parts, headers=_HEADERS, media_type=self.media_type, status_code=self.status_code)


class _Closing(ASGIStreamingResponse):
    """Litestar leaves a generator that was cut off to the garbage collector, which may come much later."""

    def __init__(self, parts: AsyncGenerator[bytes, None], **more: Any) -> None:
        super().__init__(iterator=parts, **more)
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._parts.aclose()
