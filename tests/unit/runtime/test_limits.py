"""A model's limits, from the file to the properties of its engine's unit."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from llmux.config.host import check_embedded
from llmux.config.load import load_config
from llmux.config.schema import Config, Limits, ModelConfig
from llmux.errors import ConfigError
from llmux.runtime.engines.launch import launch_digest
from llmux.runtime.engines.limits import unit_properties
from llmux.runtime.host import Places

LOOPBACK = [
    (int(socket.AF_INET), [127, 0, 0, 0], 8),
    (int(socket.AF_INET6), [0] * 15 + [1], 128),
]


def limits_of(text: str, tmp_path: Path) -> Limits:
    path = tmp_path / "c.yaml"
    path.write_text(f"models: {{m: {{model_path: org/m, limits: {text}}}}}\n")
    return load_config(path).models["m"].limits


def test_by_default_an_engine_cannot_take_the_whole_host(tmp_path: Path) -> None:
    properties = unit_properties(limits_of("{}", tmp_path))
    assert properties == {"TasksMax": 32768, "MemoryMaxScale": int(0.95 * (2**32 - 1))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{memory_max: 64GiB}", {"MemoryMax": 64 * 2**30}),
        ("{memory_max_share: 0.5}", {"MemoryMaxScale": int(0.5 * (2**32 - 1))}),
        ("{tasks_max: 100}", {"TasksMax": 100}),
        (
            "{ip_address_deny: 169.254.169.254}",
            {
                "IPAddressDeny": [(int(socket.AF_INET), [169, 254, 169, 254], 32)],
                "IPAddressAllow": LOOPBACK,
            },
        ),
        (
            "{ip_address_allow: [10.1.2.3/8]}",
            {
                "IPAddressDeny": [
                    (int(socket.AF_INET), [0] * 4, 0),
                    (int(socket.AF_INET6), [0] * 16, 0),
                ],
                "IPAddressAllow": [*LOOPBACK, (int(socket.AF_INET), [10, 0, 0, 0], 8)],
            },
        ),
    ],
)
def test_what_is_written_is_what_systemd_is_given(
    text: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    properties = unit_properties(limits_of(text, tmp_path))
    assert {name: properties[name] for name in expected} == expected


def test_words_for_networks(tmp_path: Path) -> None:
    found = limits_of("{ip_address_deny: any, ip_address_allow: [localhost, link-local]}", tmp_path)
    assert found.ip_address_deny == ("0.0.0.0/0", "::/0")
    assert found.ip_address_allow == ("127.0.0.0/8", "::1/128", "169.254.0.0/16", "fe80::/64")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ip_address_allow: [example.org]}", 'a network such as "10.0.0.0/8"'),
        ("{memory_max: 1}", "from 64MiB"),
        ("{tasks_max: 0}", "from 16"),
        ("{memory_max_share: 0}", "above 0"),
        ("{memory: 1GiB}", 'unknown key "memory"; did you mean "memory_max"'),
        ("16GiB", "a mapping such as"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        limits_of(text, tmp_path)
    assert message in str(caught.value)


def test_other_limits_take_a_new_engine() -> None:
    places = Places("/run/llmux", environment={"PATH": "/usr/bin", "HOME": "/root"})
    one = launch_digest(ModelConfig("m", "org/m"), (0,), places)
    other = launch_digest(ModelConfig("m", "org/m", limits=Limits(tasks_max=99)), (0,), places)
    assert one != other


def test_without_systemd_there_are_none() -> None:
    config = Config(models={"m": ModelConfig("m", "org/m", limits=Limits(tasks_max=99))})
    (problem,) = check_embedded(config)
    assert problem.path == "models.m.limits"
