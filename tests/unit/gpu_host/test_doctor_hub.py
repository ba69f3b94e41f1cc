"""Models of the hub that are complete for somebody else than the engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmux.config.schema import Config, ModelConfig
from llmux.drivers.doctor import access
from llmux.drivers.doctor.facts import Host, Level, Ran
from llmux.ports import LaunchSpec

COMMIT = "0" * 40


def a_hub(place: Path, *names: str) -> str:
    for name in names:
        model = place / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / COMMIT
        (model / "refs").mkdir(parents=True)
        (model / "blobs").mkdir()
        (model / "refs" / "main").write_text(COMMIT)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "model.safetensors").write_bytes(b"x")
    return str(place)


def test_who_tried_a_model_by_hand_is_told_that_engines_cannot_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = a_hub(tmp_path / "ours", "org/good", "org/twice")
    roots = a_hub(tmp_path / "root", "org/tried")
    monkeypatch.setattr(access, "ROOT", {"HF_HUB_CACHE": roots})
    paths = {"a": "org/tried", "b": "org/good", "c": "org/none", "d": "org/twice", "e": "org/twice"}
    config = Config(models={name: ModelConfig(name, path) for name, path in paths.items()})
    given = {"HF_HUB_CACHE": ours, "HOME": str(tmp_path)}
    specs = [LaunchSpec(name, ("/v",), given, None, "", "", "/r") for name in paths]
    host = Host(
        root=tmp_path,
        euid=0,
        which=lambda name: name,
        as_engine=lambda spec, seconds: Ran(None, "not now"),
        starts=lambda config: specs,
    )
    found = [one for one in access.check_access(host, config) if one.name == access.HUB]
    tried, none, good = found
    lacks = "is not complete in"
    assert tried.seen.startswith(f"org/tried of a {lacks} {ours}: ")
    assert tried.seen.endswith(f"; {roots} has it, which engines cannot read")
    assert none.seen.startswith(f"org/none of c {lacks} {ours}: ")
    assert "cannot read" not in none.seen
    assert {tried.level, none.level} == {Level.WARN}
    assert (good.level, good.seen) == (Level.OK, "complete on this host: org/good, org/twice")
