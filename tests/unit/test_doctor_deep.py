"""What the doctor measures when it is asked to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmux.config.schema import CheckpointConfig, Config, Eviction, ModelConfig, Process
from llmux.drivers.doctor import deep
from llmux.drivers.doctor.facts import GIB, Host, Level, Space
from llmux.drivers.doctor.run import run_checks

CHECKPOINT = Config(
    models={"m": ModelConfig("m", "/m", eviction=Eviction(process=Process.CHECKPOINT))},
    checkpoint=CheckpointConfig(images_dir="/images"),
)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    (tmp_path / "images").mkdir(mode=0o700)
    monkeypatch.setattr(deep, "MEASURED", 8 << 20)
    monkeypatch.setattr(deep, "untrusted", lambda path: None)  # /tmp is everyone's
    return Host(root=tmp_path, space=lambda _: Space(100 * GIB, 50 * GIB))


def test_a_file_is_written_and_read_and_leaves_nothing(tmp_path: Path) -> None:
    writes, reads = deep.measure(tmp_path, 8 << 20)
    assert writes > 0 and reads > 0
    assert list(tmp_path.iterdir()) == []


def test_the_wake_time_follows_from_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "measure", lambda *_: (1e9, 2e9))
    check = deep.check_throughput(host, CHECKPOINT)
    assert check.level is Level.OK
    assert check.seen == (
        "/images: writes 1000 MB/s, reads 2000 MB/s; a wake from an image of 10 GiB reads for 5 s"
    )
    for model, size in {"small": 1 * GIB, "large": 8 * GIB}.items():
        directory = host.path(f"/images/{model}/images")
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_text(json.dumps({"model": model, "disk_bytes": size}))
    (host.path("/images/small/images/../../bad/images")).mkdir(parents=True)
    host.path("/images/bad/images/manifest.json").write_text("{")
    seen = deep.check_throughput(host, CHECKPOINT).seen
    assert seen.endswith("large (8.0 GiB) reads for 4.3 s; small (1.0 GiB) reads for 0.5 s")


def test_a_slow_disk_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "measure", lambda *_: (5e7, 1e8))
    check = deep.check_throughput(host, CHECKPOINT)
    assert (check.level, "faster disk" in check.remedy) == (Level.WARN, True)
    assert deep.check_throughput(host, None).level is Level.OK, "no model needs it"


def test_what_cannot_be_measured_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> tuple[float, float]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(deep, "measure", fails)
    assert "Input/output error" in deep.check_throughput(host, CHECKPOINT).seen
    full = replace(host, space=lambda _: Space(GIB, 0))
    assert "too little space" in deep.check_throughput(full, CHECKPOINT).seen
    host.path("/images").rmdir()
    assert "not there yet" in deep.check_throughput(host, CHECKPOINT).seen


def test_it_is_measured_only_when_asked(host: Host) -> None:
    assert deep.NAME not in {check.name for check in run_checks(CHECKPOINT, host)}
    assert deep.NAME in {check.name for check in run_checks(CHECKPOINT, host, deep=True)}
