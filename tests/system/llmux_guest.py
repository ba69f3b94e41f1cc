"""A guest with llmux installed and the stand-in engine: what system tests ask of it.

The harness only configures, orders and asks; load and observation run inside the guest (load/), so
that nothing between host and guest is measured.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from _lab import host as host  # noqa: E402 (the path first)
from _lab.guest import Guest as Guest  # noqa: E402

LOAD = "/srv/llmux/tests/system/load"
GPU = "/var/tmp/gpu"
LEDGER = f"{GPU}/ledger.json"
CONFIG = "/etc/llmux/config.yaml"
STANDIN = "/srv/llmux/tests/standin/standin.py"
SUPERVISOR, GATEWAY = "llmux.service", "llmux-gateway.service"


def build_package() -> str:
    """The package of this tree, or the one that $LLMUX_DEB names."""
    if given := os.environ.get("LLMUX_DEB"):
        return given
    done = subprocess.run(
        [str(ROOT / "scripts/build-deb")], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def model(eviction: str = "offload+keep_running", **settings: Any) -> dict[str, Any]:
    """One model's configuration; ``env`` are settings of its stand-in (STANDIN_…)."""
    return {"model_path": "lab/tiny", "eviction": eviction, **settings}


class LlmuxGuest:
    """llmux in a guest. ``begin`` makes a fresh start out of whatever was before."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.run = guest.run
        self.run(["install", "-d", "-m", "1777", GPU])
        self.run(["chmod", "0777", GPU])  # not sticky: engines replace each other's ledger
        self.drop_in(
            SUPERVISOR,
            "ledger",
            f"[Service]\nEnvironment=LLMUX_GPU_LEDGER={LEDGER} STANDIN_LEDGER={LEDGER}\n",
        )

    def drop_in(self, unit: str, name: str, text: str) -> None:
        self.guest.write(f"/etc/systemd/system/{unit}.d/{name}.conf", text)
        self.run(["systemctl", "daemon-reload"])

    def remove_drop_in(self, unit: str, name: str) -> None:
        self.run(["rm", f"/etc/systemd/system/{unit}.d/{name}.conf"])
        self.run(["systemctl", "daemon-reload"])

    def configure(self, models: Mapping[str, Mapping[str, Any]], **top: Any) -> None:
        document = {
            "vllm_command": [STANDIN],
            "policy": {"policy_type": "fifo", "min_active_secs": 0},
            "metrics_port": 0,
            "models": models,
            **top,
        }
        self.write_config(json.dumps(document, indent=1))

    def write_config(self, text: str) -> None:
        self.guest.write(CONFIG, text, mode=0o640)
        self.run(["chgrp", "llmux", CONFIG])

    def begin(self, models: Mapping[str, Mapping[str, Any]], **top: Any) -> None:
        """Everything down, then both services up on this configuration."""
        self.end()
        self.configure(models, **top)
        started = self.run(["systemctl", "start", "llmux"], check=False, timeout=180)
        assert started.returncode == 0, self.journal()

    def end(self) -> None:
        self.run(["systemctl", "stop", "llmux.slice"], check=False, timeout=60)
        # the notes too: a model that failed in another test would still back off
        self.run(["sh", "-c", f"rm -f {GPU}/* /run/llmux/state.json; systemctl reset-failed"])

    # --- asking -------------------------------------------------------------------------------

    def load(self, program: str, *arguments: str, timeout: float = 240) -> dict[str, Any]:
        """Run one of load/'s programs in the guest; its report."""
        done = self.run(
            ["python3", f"{LOAD}/{program}.py", *arguments], check=False, timeout=timeout
        )
        said = f"{program} ended with {done.returncode}: {done.stderr}"
        assert done.returncode == 0, f"{said}\n{self.journal()}"
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report

    def ask(self, name: str, prompt: str = "hello", *, timeout: float = 30) -> dict[str, Any]:
        """One plain request, checked to the last byte."""
        return self.load("once", name, prompt, f"--timeout={timeout:g}")

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.run(["llmux", "status", "--json"]).stdout)
        return status

    def show(self, unit: str, name: str) -> str:
        return self.run(["systemctl", "show", "--value", f"--property={name}", unit]).stdout.strip()

    def pids(self) -> dict[str, list[int]]:
        """model → all processes of its engine."""
        report: dict[str, list[int]] = self.load("look", "scopes")
        return report

    def reload(self) -> int:
        """As an operator does it; returns systemctl's exit status when the supervisor is done."""
        cursor = self.cursor()
        code = self.run(["systemctl", "reload", "llmux"], check=False).returncode
        follow = f"journalctl -o cat -u {SUPERVISOR} -f --after-cursor='{cursor}'"
        said = "grep -q -m1 -E 'configuration (not )?reloaded'"
        self.run(["timeout", "20", "bash", "-c", f"{said} < <({follow})"])
        return code

    def cursor(self) -> str:
        """The end of the journal, for what comes after it."""
        text = self.run(["journalctl", "-n", "0", "--show-cursor", "--no-pager"]).stdout
        return text.partition("-- cursor: ")[2].strip()

    def journal(self, *arguments: str, lines: int = 60) -> str:
        """Of both services when nothing else is asked for."""
        which: Sequence[str] = arguments or ("-u", SUPERVISOR, "-u", GATEWAY, "-n", str(lines))
        return self.run(["journalctl", "--no-pager", "-o", "short-monotonic", *which]).stdout
