"""The model that the faults are ordered of, beside another."""

from __future__ import annotations

from daemon_harness import Daemon


def with_alpha(daemon: Daemon, **alpha: object) -> None:
    daemon.set_models({"alpha": alpha, "other": {}})


def asleep(daemon: Daemon, **alpha: object) -> int:
    """Alpha served once and is parked now; its pid."""
    with_alpha(daemon, **alpha)
    assert daemon.chat("alpha").status == 200
    daemon.park("alpha")
    model = daemon.model("alpha")
    assert model["state"] == "parked", model
    return int(model["pid"])
