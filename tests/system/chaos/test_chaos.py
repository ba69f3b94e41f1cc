"""Kill anything, at any time: no wrong answer, nothing left behind, nothing wedged."""

from __future__ import annotations

import json
import os
import secrets

import pytest
from llmux_guest import GPU, LEDGER, LlmuxGuest, model

PROGRAM = "/srv/llmux/tests/system/chaos/kill_anything.py"
BLOWS = int(os.environ.get("LLMUX_CHAOS_BLOWS", "200"))
GO_ON = ["--go-on"] if os.environ.get("LLMUX_CHAOS_GO_ON") else []  # after a violation
SEED = 5  # of the short form, so that two runs of it do the same; the long form draws one
MODELS = {
    "alpha": ("offload+keep_running", {}),
    "beta": ("offload+checkpoint", {}),
    "gamma": ("offload+freeze", {}),
    "delta": ("discard+checkpoint", {}),
    "omega": (
        "discard+keep_running",
        {"gpus": [0, 1], "extra_args": ["--tensor-parallel-size", "2"]},
    ),
}
# In a container CRIU cannot dump the processes of another user (no CAP_SYS_RESOURCE there).
SETTINGS = {
    "engine_user": "root",
    "gpu_count": 2,
    "startup_timeout_secs": 20,
    "policy": {
        "min_active_secs": 0.2, "max_wait_secs": 5, "request_timeout_secs": 40,
        "drain_timeout_secs": 5,
    },
    "gateway": {"workers": 2},
}  # fmt: skip
MEMORY_KIB = 40_000  # what a service's processes may grow by, all together
DESCRIPTORS = 60

pytestmark = [pytest.mark.system, pytest.mark.timeout(300 + 10 * BLOWS)]


def test_nothing_that_is_done_to_it_makes_it_lie_or_wedge(llmux: LlmuxGuest) -> None:
    drawn = secrets.randbelow(1 << 32) if "LLMUX_CHAOS_BLOWS" in os.environ else SEED
    seed = int(os.environ.get("LLMUX_CHAOS_SEED") or drawn)
    print(f"seed {seed}, {BLOWS} blows")
    standin = "/srv/llmux/tests/standin"
    llmux.end()
    llmux.run(["python3", f"{standin}/ledger.py", "init", LEDGER, "--gpus", "2"])
    llmux.run(["chmod", "0666", LEDGER])
    models = {
        name: model(
            eviction,
            env={"STANDIN_FAULTS": f"{GPU}/{name}.faults", "STANDIN_TOKENS_PER_SEC": "200"},
            stall_timeout_secs=8,
            sleep_timeout_secs=5,  # a stopped engine hears neither
            wake_timeout_secs=5,
            **settings,
        )
        for name, (eviction, settings) in MODELS.items()
    }
    llmux.configure(models, **SETTINGS)
    started = llmux.run(["systemctl", "start", "llmux"], check=False, timeout=180)
    assert started.returncode == 0, llmux.journal()
    done = llmux.run(
        ["python3", PROGRAM, f"--seed={seed}", f"--blows={BLOWS}", *GO_ON, *MODELS],
        check=False,
        timeout=240 + 10 * BLOWS,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}\n{llmux.journal(lines=200)}"
    report = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    repeat = f"./scripts/test chaos --blows {BLOWS} --seed {seed}"
    assert report["violations"] == [], f"{repeat}\n{report}\n{llmux.journal(lines=300)}"
    assert report["answers"]["right"] > BLOWS
    for unit, now in report["after"].items():
        before = report["before"][unit]
        assert now["rss_kib"] - before["rss_kib"] < MEMORY_KIB, (unit, before, now)
        assert now["descriptors"] - before["descriptors"] < DESCRIPTORS, (unit, before, now)
