"""The roles' interface: defaults/ and meta/argument_specs.yml name the same variables.

Ansible itself and its linter run in tests/system/fleets/test_fleet.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ANSIBLE = Path(__file__).resolve().parents[2] / "ansible"
ROLES = sorted(path for path in (ANSIBLE / "roles").iterdir() if path.is_dir())
KINDS = {"str": str, "path": str, "int": int, "bool": bool, "list": list, "dict": dict}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_variable_is_described_with_its_type_and_default(role: Path) -> None:
    defaults = load(role / "defaults/main.yml")
    entries = load(role / "meta/argument_specs.yml")["argument_specs"].values()
    options = {name: option for entry in entries for name, option in entry["options"].items()}
    assert set(defaults) <= set(options)
    assert {name for name, option in options.items() if "default" in option} <= set(defaults)
    for name, option in options.items():
        assert name.startswith(role.name + "_")
        assert option["description"]
        if option.get("required"):
            continue
        assert option["default"] == defaults[name], name
        assert isinstance(defaults[name], KINDS[option["type"]]), name
        assert option["type"] != "list" or option["elements"] in KINDS, name


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_what_holds_a_secret_is_not_logged(role: Path) -> None:
    for path in sorted((role / "tasks").glob("*.yml")):
        for task in load(path):
            if re.search(r"_key_src|_keys_src|_probe_key", str(task)):
                assert "no_log" in task, f"{path.name}: {task['name']}"


def test_a_model_of_the_example_inventory_is_of_the_schema(tmp_path: Path) -> None:
    from llmux.config.load import load_config

    shared = load(ANSIBLE / "inventory.example/group_vars/llmux.yml")
    more = load(ANSIBLE / "inventory.example/group_vars/h100.yml")
    settings = {**shared["llmux_config"], "models": shared["llmux_models"]}
    settings["models"] |= more["llmux_models__h100"]
    settings["gateway"] |= {"keys_file": "/etc/llmux/keys"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert set(load_config(file, check_files=False).models) == {"qwen3-4b", "qwen3-32b"}


def test_every_alert_has_a_test_of_its_rule_and_a_fault_that_fires_it() -> None:
    tests = ANSIBLE.parent / "tests"
    rules = load(ANSIBLE / "roles/llmux_monitoring/files/llmux.rules.yml")["groups"]
    names = [rule["alert"] for group in rules for rule in group["rules"]]
    units = (tests / "fixtures/monitoring/llmux.rules.test.yml").read_text()
    faults = ("front/test_alerts.py", "fleets/test_host_alerts.py")
    made = "".join((tests / "system" / path).read_text() for path in faults)
    assert [name for name in names if f'alertname="{name}"' not in units] == []
    assert [name for name in names if f'"{name}"' not in made] == []
