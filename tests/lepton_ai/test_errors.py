from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai import errors
from lepton_ai.errors import (
    BrokerUnavailable,
    DeadlineUnattainable,
    InvalidRequest,
    JobFailed,
    LeptonError,
    ResultTimeout,
    Unavailable,
    UnknownKernel,
)


def tree(root: type[LeptonError]) -> Iterator[type[LeptonError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


PUBLIC = [found for name in errors.__all__ if isinstance(found := getattr(errors, name), type)]
each_class = pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in tree(LeptonError)]
    assert sorted(codes) == sorted(set(codes))


def test_every_class_of_the_module_is_public() -> None:
    defined = {cls.__name__ for cls in tree(LeptonError) if cls.__module__ == errors.__name__}
    assert defined == {cls.__name__ for cls in PUBLIC}


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = {word for line in errors.__doc__.splitlines() for word in line.strip("│├└─ ").split()[:1]}
    assert {cls.__name__ for cls in PUBLIC} <= drawn


@each_class
@given(message=st.text(max_size=200), field=st.none() | st.text(max_size=200))
def test_an_error_comes_back_from_the_wire_as_it_went(cls: type[LeptonError], message: str, field: str | None) -> None:
    found = errors.from_wire(cls(message, field).to_wire())
    assert (type(found), found.message, found.field) == (cls, message, field)


@each_class
def test_an_error_is_made_from_one_message_as_celery_makes_it(cls: type[LeptonError]) -> None:
    error = cls("what went wrong")
    assert (str(error), error.args, error.field) == ("what went wrong", ("what went wrong",), None)


def test_a_field_that_is_not_there_is_not_sent() -> None:
    assert errors.InvalidArguments("no").to_wire() == {"code": "invalid_arguments", "message": "no"}


def test_a_code_of_another_release_becomes_a_failed_job_that_keeps_the_message() -> None:
    found = errors.from_wire({"code": "from_the_future", "message": "what went wrong", "field": "x"})
    assert (type(found), found.message, found.field) == (JobFailed, "what went wrong", "x")


@pytest.mark.parametrize("foreign", [None, "text", 7, [], {}, {"code": None, "message": None}, {"code": []}])
def test_whatever_stands_on_the_wire_becomes_an_error_of_ours(foreign: Any) -> None:
    assert isinstance(errors.from_wire(foreign), LeptonError)


def test_a_message_that_is_no_text_can_be_sent() -> None:
    error = LeptonError("no such file: \udcff")
    assert error.to_wire()["message"].encode() == b"no such file: \\udcff"


def test_a_caller_may_catch_the_kind_or_pythons_own() -> None:
    assert issubclass(ResultTimeout, TimeoutError)
    assert issubclass(BrokerUnavailable, Unavailable)


def test_only_the_callers_mistakes_are_answered_with_400s() -> None:
    for cls in PUBLIC:
        assert (400 <= cls.status < 500) == (issubclass(cls, InvalidRequest) or cls.status in (409, 429))


def test_what_is_quoted_of_millions_of_characters_is_shortened() -> None:
    error = UnknownKernel(f"no live worker announces {'x' * 6_000_000!r}", "y" * 6_000_000)
    assert len(error.message) == 2000
    assert error.message.endswith("... (6000027 characters)")
    assert len(error.to_wire()["field"]) == 200
    assert errors.from_wire(error.to_wire()).message == error.message


def test_an_estimate_comes_back_from_the_wire() -> None:
    found = errors.from_wire(DeadlineUnattainable("too late", "deadline_s", estimate_s=2.5).to_wire())
    assert isinstance(found, DeadlineUnattainable)
    assert found.estimate_s == 2.5


@pytest.mark.parametrize("estimate", [None, "soon", [1]])
def test_what_is_no_estimate_is_left_out(estimate: Any) -> None:
    found = errors.from_wire({"code": "deadline_unattainable", "estimate_s": estimate})
    assert isinstance(found, DeadlineUnattainable)
    assert found.estimate_s is None
