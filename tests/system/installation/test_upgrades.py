"""Upgrades and downgrades while clients stream: none is cut, and a new request hardly waits.

``LLMUX_UPGRADES=20,200`` takes twenty upgrades with 200 streams each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from llmux_guest import CONFIG, LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

# Printed; 1 s is asked for. A busy machine adds to it, an endpoint that is away adds thirty.
LONGEST_MS = 5000
TIMES, STREAMS = map(int, os.environ.get("LLMUX_UPGRADES", "2,30").split(","))
MODELS = {
    "alpha": model(gpu_memory=0.4, env={"STANDIN_TOKENS_PER_SEC": "1"}),
    "beta": model(gpu_memory=0.4),
}
DEBS = ("/root/next.deb", "/root/this.deb")  # ends with this version


@pytest.fixture
def debs(llmux: LlmuxGuest, package: str, next_package: Path) -> str:
    for path, deb in zip(DEBS, (next_package, Path(package)), strict=True):
        llmux.guest.write(path, deb.read_bytes())
    return ",".join(DEBS)


def test_upgrades_under_streams_are_noticed_by_no_client(llmux: LlmuxGuest, debs: str) -> None:
    llmux.begin(MODELS)
    report = llmux.load(
        "installation/upgrades", f"--streams={STREAMS}", f"--debs={debs}", f"--times={TIMES}",
        timeout=1700,
    )  # fmt: skip
    print(f"upgrades: {report}")
    assert report["failed"] == [], llmux.journal(lines=200)
    assert report["over"] == STREAMS, "the streams were shorter than an upgrade"
    assert report["engines_the_same"]
    for which in zip(*report["mains"], strict=True):
        assert len(set(which)) == TIMES + 1, "each upgrade restarts both services"
    assert report["longest_ms"] < LONGEST_MS


def test_with_a_broken_file_they_change_nothing_and_say_why(llmux: LlmuxGuest, debs: str) -> None:
    llmux.begin(MODELS)
    good = llmux.guest.read(CONFIG).decode()
    llmux.write_config(good.replace('"models"', '"bogus": 1, "models"'))
    report = llmux.load(
        "installation/upgrades", f"--streams={STREAMS}", f"--debs={debs}", "--times=2",
        timeout=1700,
    )  # fmt: skip
    print(f"upgrades with a mistake: {report}")
    assert report["failed"] == []
    assert report["over"] == STREAMS
    assert report["engines_the_same"]
    assert all(mains == report["mains"][0] for mains in report["mains"])
    assert "not restarted" in report["said"]
    assert f"{CONFIG}:" in report["said"]
    assert ": bogus: unknown key" in report["said"]
    assert report["longest_ms"] < LONGEST_MS
