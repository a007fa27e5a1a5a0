"""Log events, not sentences: structlog, for people on a terminal, as JSON for machines. Never an argument's value."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from lepton_ai.settings import Settings

__all__ = ["configure"]


def configure(settings: Settings, service: str, stream: TextIO | None = None) -> None:
    """Sends structlog's events and the standard library's records to a stream (stderr) in one format."""
    stream = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]

    def name_service(_: Any, __: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        entry["service"] = service  # not a context variable: those do not reach other threads
        return entry

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        name_service,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log == "json"
        else structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=24,
            exception_formatter=structlog.dev.plain_traceback,  # the other ones print locals, and so arguments
        )
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One write a line: lines of several threads, and those of the handler below, stay whole.
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
