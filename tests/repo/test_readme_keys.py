"""README's tables of keys against the schema: every key, with its true default."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llmux.config.keys import CHECKPOINT, GATEWAY, MODEL, POLICY, SCALARS
from llmux.config.load import load_config
from llmux.config.schema import Config, GatewayConfig, Key, ModelConfig, PolicyType

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SECTION = README.partition("### The endpoint\n")[2].partition("\n## ")[0]
ROW = re.compile(r"\| `([a-z_.<>]+)` \| (`?)([^|`]+)\2 \| [^|]+ \|")
KEYED = re.findall(r"\| key \| default \| \|\n(?:\|.*\n)+", README)  # the tables of keys
FOUND = ROW.findall("".join(KEYED))
ROWS = {key: (bool(code), default) for key, code, default in FOUND}

SPECS = {"models.<name>": MODEL, "policy": POLICY, "checkpoint": CHECKPOINT, "gateway": GATEWAY}
KEYS = {f"{section}.{key}" for section, spec in SPECS.items() for key in spec.parsers} | set(
    SCALARS
)
WITHOUT_EFFECT = {f"policy.{key}" for key in POLICY.idle}
ADDRESSES = {
    "gateway.listen": Config().listen_addresses(),
    "gateway.metrics_listen": Config().metrics_addresses(),
}
WORDS: dict[str, tuple[Any, ...]] = {
    "none": (None, (), {}),
    "off": (0.0,),
    "no": (False,),
    "yes": (True,),
    "required": ("m",),
}


def default_of(key: str) -> Any:
    section, _, name = key.rpartition(".")
    owner: Any = {
        "": Config(), "policy": Config().policy, "checkpoint": Config().checkpoint,
        "gateway": GatewayConfig(), "models.<name>": ModelConfig("m", "m"),
    }[section]  # fmt: skip
    return ModelConfig("m", "m").eviction if key == "policy.eviction" else getattr(owner, name)


def test_the_tables_have_every_key_once() -> None:
    assert set(ROWS) == KEYS - WITHOUT_EFFECT
    assert len(FOUND) == len(ROWS)
    for key in WITHOUT_EFFECT:
        assert README.count(f"`{key}`") == 1


def test_every_policy_is_named() -> None:
    (row,) = re.findall(r"\| `policy.policy_type` \|.*", README)
    for policy in PolicyType:
        assert f"`{policy}` (" in row or f"`{policy}` |" in row, policy


def read(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


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
        document: dict[str, Any] = {"models": {"a": {"model_path": "m/a"}}}
        if section == "models.<name>":
            document["models"]["a"][name] = read(told)
        elif section:
            document[section] = {name: read(told)}
        else:
            document[name] = read(told)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(document))
        loaded: Any = load_config(str(file))
        if section == "models.<name>" or key == "policy.eviction":
            loaded = getattr(loaded.models["a"], name)
        else:
            for part in key.split("."):
                loaded = getattr(loaded, part)
        assert loaded == default_of(key)


def test_every_property_of_a_key_is_named() -> None:
    for field in fields(Key):
        if field.name not in ("name", "sha256"):
            assert f"`{field.name}`" in SECTION, field.name
