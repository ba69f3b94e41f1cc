"""A host that is switched off: engines that are frozen, too, end in order and in time."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from llmux_guest import Guest, LlmuxGuest, model

LIMIT_SECS = 30.0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, marks=[pytest.mark.system, pytest.mark.timeout(200)], id="container"),
        pytest.param(
            {"machine": True}, marks=[pytest.mark.vm, pytest.mark.timeout(900)], id="machine"
        ),
    ],
)
def test_a_power_off_with_frozen_engines_takes_less_than_30_s(
    package: str, kind: dict[str, Any]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a guest")
    with Guest.up(debs=[package], **kind) as guest:
        llmux = LlmuxGuest(guest)
        llmux.begin({"alpha": model("offload+freeze"), "beta": model()})
        for name in ("alpha", "beta"):
            assert llmux.ask(name)["error"] == "", llmux.journal()
        assert llmux.status()["models"]["alpha"]["state"] == "parked"
        began = time.monotonic()
        guest.run(["systemctl", "poweroff", "--no-block"], check=False)
        assert guest._process is not None
        guest._process.wait(timeout=150)
        seconds = time.monotonic() - began
        print(f"power off with a frozen engine: {seconds:.1f} s")
        assert seconds < LIMIT_SECS, guest.console[-4000:]
