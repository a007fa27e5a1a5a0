from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.errors import InvalidSettings
from lepton_ai.settings import Settings

ABOVE_NOUGHT = [
    "body_limit_bytes",
    "result_ttl_s",
    "lease_s",
    "heartbeat_s",
    "window",
    "credit_s",
    "batch_jobs",
    "batch_s",
    "events_kept",
]


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.read({}) == Settings()


def test_what_is_not_ours_in_the_environment_is_left_alone() -> None:
    assert Settings.read({"PATH": "/bin", "LEPTONIC": "x", "lepton_window": "0"}) == Settings()


def test_text_becomes_the_type_that_a_setting_has() -> None:
    found = Settings.read(
        {"LEPTON_WINDOW": "17", "LEPTON_LEASE_S": "2.5", "LEPTON_REDIS_URL": "redis://h", "LEPTON_LOG": "json"}
    )
    assert (found.window, found.lease_s, found.redis_url, found.log) == (17, 2.5, "redis://h", "json")


def test_every_setting_can_be_given_by_its_name() -> None:
    values = {name: value for name, value in msgspec.structs.asdict(Settings()).items() if value is not None}
    environ = {f"LEPTON_{name.upper()}": str(value) for name, value in values.items()}
    assert Settings.read(environ) == Settings()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("LEPTON_REDIS_ULR", "LEPTON_REDIS_URL"),
        ("LEPTON_LEASE", "LEPTON_LEASE_S"),
        ("LEPTON_http_port", "LEPTON_HTTP_PORT"),
    ],
)
def test_a_name_that_is_nearly_right_is_refused_with_the_right_one(variable: str, meant: str) -> None:
    with pytest.raises(InvalidSettings, match=f"{variable}; did you mean {meant}") as refused:
        Settings.read({variable: "1"})
    assert refused.value.field == variable


@given(st.text(st.characters(categories=["Lu", "Ll", "Nd"], max_codepoint=127), min_size=1, max_size=20))
def test_an_unknown_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidSettings, match=f"LEPTON_QQ{name}"):
        Settings.read({f"LEPTON_QQ{name}": "1"})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("LEPTON_HTTP_PORT", "http"),
        ("LEPTON_HTTP_PORT", ""),
        ("LEPTON_WINDOW", "1.5"),
        ("LEPTON_LEASE_S", "soon"),
        ("LEPTON_LOG", "xml"),
        ("LEPTON_LOG_LEVEL", "loud"),
        ("LEPTON_RESULT_SERIALIZER", "pickle"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(variable: str, text: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^{variable} does not fit: .*, and it is {text!r}$") as refused:
        Settings.read({variable: text})
    assert refused.value.field == variable


@pytest.mark.parametrize("url", ["http://h", "127.0.0.1:6379", "h", "redis"])
def test_a_broker_of_another_scheme_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^LEPTON_REDIS_URL must begin with redis://") as refused:
        Settings.read({"LEPTON_REDIS_URL": url})
    assert refused.value.field == "redis_url"


@pytest.mark.parametrize("url", ["redis://h:1/2", "rediss://u:p@h", "unix://:p@/run/valkey.sock"])
def test_a_broker_may_have_three_schemes(url: str) -> None:
    assert Settings.read({"LEPTON_REDIS_URL": url}).redis_url == url


@pytest.mark.parametrize("name", ABOVE_NOUGHT)
@pytest.mark.parametrize("text", ["0", "-1"])
def test_a_size_or_time_must_be_above_nought(name: str, text: str) -> None:
    with pytest.raises(InvalidSettings, match=f"LEPTON_{name.upper()} must be above 0") as refused:
        Settings.read({f"LEPTON_{name.upper()}": text})
    assert refused.value.field == name


@pytest.mark.parametrize("name", [name for name in ABOVE_NOUGHT if name.endswith("_s")])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_a_time_must_be_finite(name: str, text: str) -> None:
    with pytest.raises(InvalidSettings, match=f"LEPTON_{name.upper()}"):
        Settings.read({f"LEPTON_{name.upper()}": text})


@pytest.mark.parametrize("text", ["-1", "65536"])
def test_a_port_must_be_one(text: str) -> None:
    with pytest.raises(InvalidSettings, match="LEPTON_HTTP_PORT must be 0 to 65535"):
        Settings.read({"LEPTON_HTTP_PORT": text})


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_lease_outlasts_two_heartbeats(lease_s: float, heartbeat_s: float) -> None:
    environ = {"LEPTON_LEASE_S": str(lease_s), "LEPTON_HEARTBEAT_S": str(heartbeat_s)}
    if lease_s >= 2 * heartbeat_s:
        assert math.isclose(Settings.read(environ).lease_s, lease_s)
    else:
        with pytest.raises(InvalidSettings, match=r"LEPTON_LEASE_S .* at least twice LEPTON_HEARTBEAT_S"):
            Settings.read(environ)


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Settings().window = 1  # type: ignore[misc]


def test_kernel_modules_are_split_at_commas() -> None:
    assert Settings.read({"LEPTON_KERNELS": "my.kernels, yours ,,"}).kernel_modules == ("my.kernels", "yours")


@pytest.mark.parametrize(
    "name", ["memory_limit", "network_limit", "temperature_limit", "utilization_limit", "power_limit"]
)
@pytest.mark.parametrize("value", ["-0.1", "inf", "nan"])
def test_a_limit_of_a_device_is_a_share_or_nought(name: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=r"a share such as 0\.95, or 0 for no limit"):
        Settings.read({f"LEPTON_{name.upper()}": value})
    assert getattr(Settings.read({f"LEPTON_{name.upper()}": "0"}), name) == 0


@pytest.mark.parametrize("value", ["0", "1.5", "nan"])
def test_the_band_below_a_limit_is_a_share_above_nought(value: str) -> None:
    with pytest.raises(InvalidSettings, match="LEPTON_LIMIT_BAND is above 0 and at most 1"):
        Settings.read({"LEPTON_LIMIT_BAND": value})


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        ("", ["linalg.matmul", "a.b"], []),
        ("linalg.*, nn.mlp_forward", ["linalg.matmul", "nn.mlp_forward"], ["nn.other", "Linalg.matmul"]),
        ("!linalg.*", ["vision.ndvi"], ["linalg.matmul"]),
        ("vision.*,!vision.ndvi", ["vision.other"], ["vision.ndvi", "linalg.matmul"]),
    ],
)
def test_a_worker_serves_the_kernels_that_it_may(patterns: str, allowed: list[str], refused: list[str]) -> None:
    settings = Settings.read({"LEPTON_KERNELS_ALLOWED": patterns})
    assert all(map(settings.allows, allowed))
    assert not any(map(settings.allows, refused))
