"""README's table of the endpoint's keys against the schema: every key, with its true default."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llmux.config.keys import GATEWAY
from llmux.config.load import load_config
from llmux.config.schema import Config, GatewayConfig, Key, ModelConfig

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SECTION = README.partition("### The endpoint\n")[2].partition("\n## ")[0]
ROW = re.compile(r"\| `([a-z_.<>]+)` \| (`?)([^|`]+)\2 \| [^|]+ \|")
ROWS = {key: (bool(code), default) for key, code, default in ROW.findall(SECTION)}

ELSEWHERE = {"port", "metrics_port", "models.<name>.aliases", "policy.request_timeout_secs"}
ADDRESSES = {
    "gateway.listen": Config().listen_addresses(),
    "gateway.metrics_listen": Config().metrics_addresses(),
}
WORDS = {"none": (None, ()), "off": (0.0,), "no": (False,)}


def default_of(key: str) -> Any:
    section, _, name = key.rpartition(".")
    owner: Any = {
        "": Config(), "policy": Config().policy, "gateway": GatewayConfig(),
        "models.<name>": ModelConfig("m", "m"),
    }[section]  # fmt: skip
    return getattr(owner, name)


def test_the_table_has_every_key() -> None:
    assert set(ROWS) == {f"gateway.{key}" for key in GATEWAY.parsers} | ELSEWHERE


@pytest.mark.parametrize("key", sorted(ROWS))
def test_the_defaults_are_true(key: str, tmp_path: Path) -> None:
    code, told = ROWS[key]
    if key in ADDRESSES:
        assert (told,) == ADDRESSES[key]
    elif not code:
        assert default_of(key) in WORDS[told]
    else:
        # what a reader would write into the file
        section, _, name = key.rpartition(".")
        value = json.loads(told) if told.isdigit() else told
        setting = {section: {name: value}} if section else {name: value}
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"models": {"a": {"model_path": "m/a"}}} | setting))
        loaded: Any = load_config(str(file))
        for part in key.split("."):
            loaded = getattr(loaded, part)
        assert loaded == default_of(key)


def test_every_property_of_a_key_is_named() -> None:
    for field in fields(Key):
        if field.name not in ("name", "sha256"):
            assert f"`{field.name}`" in SECTION, field.name
