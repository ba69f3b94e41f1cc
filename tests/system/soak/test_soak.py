"""Mixed load for long: everything is answered, and nothing grows but what has a bound."""

from __future__ import annotations

import json
import os
import statistics
from typing import Any

import pytest
from llmux_guest import LEDGER, STANDIN, LlmuxGuest, model

from tests.seeds import seed_of

PROGRAM = "/srv/llmux/tests/system/soak/mixed_load.py"
MINUTES = float(os.environ.get("LLMUX_SOAK_MINUTES", "1"))
ROWS = max(12, round(MINUTES))  # one a minute, or as many as tell something
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
    "policy": {"min_active_secs": 2, "max_wait_secs": 5, "drain_timeout_secs": 60},
    "gateway": {"workers": 2},
}
# What a process may grow by from the first third to the last, each after the warm-up: pages that
# the allocator keeps for the largest body or answer so far, and the last 10,000 events, 5 MB, which
# the supervisor has after 20 minutes of a switch a second, and no more from then on.
GROWTH_KIB = 4096
DESCRIPTORS = 8  # those of requests that are under way when it is looked at
GONE = {"rss_kib": 0, "pss_kib": 0, "descriptors": 0}
LINES = (10, 10, 10)  # of a service's journal, for each switch, order and minute

pytestmark = [pytest.mark.system, pytest.mark.timeout(600 + 90 * MINUTES)]


def test_minutes_of_mixed_load_leave_everything_as_it_was(llmux: LlmuxGuest) -> None:
    seed = seed_of("LLMUX_SOAK_SEED")
    llmux.end()
    llmux.run(["python3", f"{os.path.dirname(STANDIN)}/ledger.py", "init", LEDGER, "--gpus", "2"])
    llmux.run(["chmod", "0666", LEDGER])
    speed = {"STANDIN_TOKENS_PER_SEC": "200"}
    models = {
        name: model(eviction, env=speed, **settings)
        for name, (eviction, settings) in MODELS.items()
    }
    llmux.configure(models, **SETTINGS)
    started = llmux.run(["systemctl", "start", "llmux"], check=False, timeout=180)
    assert started.returncode == 0, llmux.journal()
    done = llmux.run(
        ["python3", PROGRAM, f"--minutes={MINUTES}", f"--rows={ROWS}", f"--seed={seed}", *MODELS],
        check=False,
        timeout=500 + 90 * MINUTES,
    )
    assert done.returncode == 0, f"{done.stderr}\n{llmux.journal(lines=200)}"
    report = json.loads(done.stdout.splitlines()[-1])
    rows = report.pop("rows")
    print(table(rows))
    print(json.dumps(report, indent=1))
    for what in ("wrong", "failed", "left", "strays"):
        assert report[what] == [], f"{report}\n{llmux.journal(lines=300)}"
    assert set(report["answers"]) == {"stream", "short", "embedding", "left"}
    assert report["answers"]["stream"] > 20 * MINUTES
    assert grown(rows) == []
    acts = report["switches"], sum(report["orders"].values()), MINUTES
    most = sum(number * lines for number, lines in zip(acts, LINES, strict=True))
    assert report["journal_lines"]["supervisor"] <= most, report["journal_kinds"]
    assert report["journal_lines"]["gateway"] <= most, report["journal_kinds"]


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["processes"])
    head = ["minute", "answered", "left", "wrong", "failed"]
    head += [f"{name} MiB (PSS), fds" for name in names] + ["lines", "disk MiB"]
    lines = [" | ".join(head)]
    for row in rows:
        used = [
            f"{one['rss_kib'] / 1024:.1f} ({one['pss_kib'] / 1024:.1f}), {one['descriptors']}"
            for one in (row["processes"].get(name, GONE) for name in names)
        ]
        cells = [str(row[name]) for name in head[:5]] + used
        cells += [str(row["journal"]), f"{sum(row['disk_kib'].values()) / 1024:.1f}"]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def grown(rows: list[dict[str, Any]]) -> list[str]:
    """What grew beyond its bound, the first sixth of the rows being the warm-up."""
    rows = rows[len(rows) // 6 :]
    third = len(rows) // 3
    found = []
    for name in rows[0]["processes"]:
        for key, bound in (
            ("rss_kib", GROWTH_KIB), ("pss_kib", GROWTH_KIB), ("descriptors", DESCRIPTORS),
        ):  # fmt: skip
            first, last = (
                statistics.median(row["processes"].get(name, GONE)[key] for row in part)
                for part in (rows[:third], rows[-third:])
            )
            if last - first > bound:
                found.append(f"{key} of {name}: {first:g}, in the end {last:g}")
    return found
