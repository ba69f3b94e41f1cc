"""``llmux config``: values in force and their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmux.cli.main import main
from llmux.config.keys import CHECKPOINT, GATEWAY, MODEL, POLICY, SCALARS

TEXT = """\
policy: {min_active_secs: 7, eviction: offload+freeze}
models:
  a:
    model_path: org/a
    extra_args: [--hf-token, hf_x]
    env: {HF_TOKEN: hf_x, HF_HOME: /srv/hf}
"""


@pytest.fixture
def rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[object, str]]:
    file = tmp_path / "c.yaml"
    file.write_text(TEXT)
    assert main(["config", "--json", "-c", str(file)]) == 0
    out = capsys.readouterr().out
    assert "hf_x" not in out, "secrets are hidden"
    return {
        row["path"]: (row["value"], row["source"].removeprefix(f"{file}:"))
        for row in json.loads(out)
    }


def test_values_have_their_place_or_are_defaults(rows: dict[str, tuple[object, str]]) -> None:
    assert rows["policy.min_active_secs"] == (7, "1:27")
    assert rows["policy.max_wait_secs"] == (15, "default")
    assert rows["models.a.eviction"] == ("offload+freeze", "1:40 (policy.eviction)")
    assert rows["models.a.env"][0] == {"HF_TOKEN": "(hidden)", "HF_HOME": "/srv/hf"}
    assert rows["models.a.extra_args"][0] == ["--hf-token", "(hidden)"]
    assert rows["models.a.gpu_memory"] == (0.9, "default, or models.a.extra_args")


def test_every_key_is_shown(rows: dict[str, tuple[object, str]]) -> None:
    keys = {f"models.a.{key}" for key in MODEL.parsers} | set(SCALARS)
    for section, spec in (("policy", POLICY), ("checkpoint", CHECKPOINT), ("gateway", GATEWAY)):
        keys |= {f"{section}.{key}" for key in spec.parsers if key not in spec.idle}
    assert set(rows) == keys - {"policy.eviction"}


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(TEXT)
    assert main(["config", "-c", str(file)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "min_active_secs" in x)
    assert line.split() == ["policy.min_active_secs", "7.0", f"{file}:1:27"]


def test_a_ladder_is_shown_as_its_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        TEXT.replace("eviction: offload+freeze", "eviction: [offload+freeze, retain+stop]")
    )
    assert main(["config", "-c", str(file)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "models.a.eviction" in x)
    assert '["offload+freeze", "retain+stop"]' in line
