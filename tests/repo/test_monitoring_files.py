"""Dashboard and alerts name only metrics that exist; the dashboard is one that Grafana takes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmux.metrics import METRICS, Kind

ROLE = Path(__file__).parents[2] / "ansible/roles/llmux_monitoring"
DASHBOARD: dict[str, Any] = json.loads((ROLE / "files/llmux-dashboard.json").read_text())
RULES = yaml.safe_load((ROLE / "files/llmux.rules.yml").read_text())
PANELS = DASHBOARD["panels"]


def known() -> set[str]:
    names = set(METRICS)
    for name, definition in METRICS.items():
        if definition.kind is Kind.HISTOGRAM:
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")}
    return names


def expressions() -> list[str]:
    of_panels = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
    of_rules = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    return of_panels + of_rules


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_exists_with_its_labels(expression: str) -> None:
    names = set(re.findall(r"\bllmux_[a-z_]+", expression))
    assert names <= known()
    for name, inner in re.findall(r"\b(llmux_[a-z_]+)\{([^}]*)\}", expression):
        labels = set(re.findall(r"(\w+)[!=]", inner)) - {"host", "instance", "job"}
        base = re.sub(r"_(bucket|count|sum)$", "", name)
        definition = METRICS.get(name) or METRICS[base]
        assert labels <= set(definition.labels), name


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for a, b in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
        assert a["x"] + a["w"] <= 24


def test_every_target_names_the_dashboards_data_source() -> None:
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    for panel in PANELS:
        assert panel["type"] in {"row", "timeseries", "state-timeline"}
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(letters)) == len(letters)
        assert (panel["type"] == "row") == (not letters)
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    for group in RULES["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert {"summary", "description"} == rule["annotations"].keys()
