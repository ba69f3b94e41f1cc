"""Disks that are full and a journal that is away: clients are served, operators are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from llmux_guest import SUPERVISOR, LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

IMAGES = "/mnt/images"
LOGS = "/var/log/llmux"
JOURNALD = (
    "systemd-journald.socket", "systemd-journald-dev-log.socket", "systemd-journald-audit.socket",
    "systemd-journald.service",
)  # fmt: skip


def fill(llmux: LlmuxGuest, directory: str) -> None:
    """Until not a byte more can be written there."""
    llmux.run(["sh", "-c", f"cat /dev/zero >{directory}/fill 2>/dev/null || true"], timeout=120)


@contextmanager
def small_disk(llmux: LlmuxGuest, mebibytes: int, where: str) -> Iterator[None]:
    llmux.end()
    llmux.run(["mkdir", "-p", where])
    llmux.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}M,mode=0700", "small", where])
    try:
        yield
    finally:
        llmux.end()
        llmux.run(["umount", "-l", where])


@contextmanager
def full_run(llmux: LlmuxGuest) -> Iterator[None]:
    """/run has no byte left, for llmux and for all others."""
    before = llmux.run(["findmnt", "-no", "OPTIONS", "/run"]).stdout
    sizes = [part for part in before.strip().split(",") if part.startswith("size=")]
    used = int(llmux.run(["df", "--output=used", "-k", "/run"]).stdout.split()[-1])
    llmux.run(["mount", "-o", f"remount,size={used + 512}k", "/run"])
    try:
        fill(llmux, "/run")
        yield
    finally:
        llmux.run(["rm", "-f", "/run/fill"])
        llmux.run(["mount", "-o", f"remount,{(sizes or ['size=20%'])[0]}", "/run"])


def test_a_full_images_dir_costs_no_model_and_no_line_of_its_engine(llmux: LlmuxGuest) -> None:
    with small_disk(llmux, 64, IMAGES):
        llmux.begin(
            {"alpha": model("retain+checkpoint"), "beta": model()},
            engine_user="root",
            checkpoint={"images_dir": f"{IMAGES}/checkpoints"},
        )
        assert llmux.ask("alpha")["error"] == "", llmux.journal()
        fill(llmux, IMAGES)
        before = llmux.pids()
        refused = llmux.run(["llmux", "checkpoint", "alpha"], check=False)
        assert refused.returncode in (1, 3)
        assert "free" in refused.stderr, refused.stderr
        assert llmux.pids() == before, "looked for room before anything was drained"
        assert llmux.status()["models"]["alpha"]["state"] == "serving"
        for name in ("beta", "alpha", "beta"):  # a switch needs no image
            assert llmux.ask(name)["error"] == "", llmux.journal()
        said = llmux.run(["llmux", "logs", "beta"]).stdout
        assert "Application startup complete" in said


PRINTS = """#!/bin/sh
{ echo starting; } || { echo "cannot write" >&2; exit 1; }
exec /srv/llmux/tests/standin/standin.py "$@"
"""


def test_an_engine_that_ends_because_it_cannot_print_names_the_disk(llmux: LlmuxGuest) -> None:
    with small_disk(llmux, 16, LOGS):
        llmux.guest.write("/opt/prints.sh", PRINTS, mode=0o755)
        llmux.begin({"loud": model("retain+stop", vllm_command=["/opt/prints.sh"])})
        fill(llmux, LOGS)
        refused = llmux.run(["llmux", "load", "loud"], check=False, timeout=100)
        assert refused.returncode != 0
        assert f"the disk of {LOGS} is full" in refused.stderr, refused.stderr
        llmux.run(["rm", f"{LOGS}/fill"])
        llmux.run(["llmux", "load", "loud"])  # an operator does not wait for the back-off
        assert llmux.ask("loud")["error"] == "", llmux.journal()


def test_a_full_run_stops_nobody_who_is_served(llmux: LlmuxGuest) -> None:
    llmux.begin({"alpha": model(), "beta": model(), "never": model()})
    for name in ("beta", "alpha"):
        assert llmux.ask(name)["error"] == ""
    main, cursor = llmux.show(SUPERVISOR, "MainPID"), llmux.cursor()
    with full_run(llmux):
        for name in ("beta", "alpha"):  # switches between engines that are there
            assert llmux.ask(name)["error"] == "", llmux.journal()
        told = llmux.journal("-u", SUPERVISOR, f"--after-cursor={cursor}")
        assert "cannot write the state file /run/llmux/state.json" in told
        assert "No space left on device" in told
        refused = llmux.run(["llmux", "load", "never"], check=False, timeout=100)
        assert refused.returncode != 0
        assert "/run is full" in refused.stderr, refused.stderr
        assert llmux.show(SUPERVISOR, "MainPID") == main
    assert llmux.show(SUPERVISOR, "NRestarts") == "0"
    assert llmux.ask("beta")["error"] == ""
    llmux.run(["systemctl", "restart", SUPERVISOR], timeout=100)
    assert llmux.ask("alpha")["error"] == "", llmux.journal()


def test_without_a_journal_all_goes_on_and_is_told_when_it_is_back(llmux: LlmuxGuest) -> None:
    llmux.begin({"alpha": model(), "beta": model()})
    assert llmux.ask("alpha")["error"] == ""
    before = llmux.pids()
    llmux.run(["systemctl", "stop", *JOURNALD])
    try:
        llmux.run(["systemctl", "restart", SUPERVISOR], timeout=100)  # its start meets no journal
        for name in ("beta", "alpha"):
            assert llmux.ask(name)["error"] == ""
    finally:
        llmux.run(["systemctl", "start", *JOURNALD])
    assert llmux.pids()["alpha"] == before["alpha"]
    wanted = "grep -q -m1 'beta: starting → serving'"
    follow = f"journalctl -o cat -b -u {SUPERVISOR} -n all -f"
    llmux.run(["timeout", "20", "bash", "-c", f"{wanted} < <({follow})"])
