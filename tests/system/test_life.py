"""Life under systemd: ready when it is true, stopped for good, watched, silent when idle."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llmux_guest import GATEWAY, SUPERVISOR, LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

MODELS = {"alpha": model("offload+keep_running"), "beta": model("offload+freeze")}
IDLE_SECS = 25  # twice the supervisor's sign of life, and more


def test_a_request_works_as_soon_as_systemctl_start_returns(llmux: LlmuxGuest) -> None:
    llmux.end()
    llmux.configure(MODELS)
    for _ in range(3):
        report = llmux.load("lifecycle", "start")
        print(f"start: {report}")
        assert report["error"] == "", llmux.journal()
        llmux.end()


def test_status_tells_the_active_model(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    assert llmux.show(SUPERVISOR, "StatusText") == "no model active"
    for name in ("alpha", "beta"):
        assert llmux.ask(name)["error"] == ""
        assert llmux.show(SUPERVISOR, "StatusText").startswith(f"serving {name}")


def test_stopping_the_supervisor_leaves_engines_and_a_start_adopts_them(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    cursor = llmux.cursor()
    report = llmux.load("lifecycle", "stop-and-start")
    print(f"stop and start: {report}")
    assert report["wrong"] == [], llmux.journal()
    assert report["same"]
    assert report["stop_secs"] < 10, "it waits for no engine"
    said = llmux.journal("-u", SUPERVISOR, f"--after-cursor={cursor}")
    assert "go on, and a gateway that runs serves them: `systemctl stop llmux.slice`" in said
    assert "alpha" in said.partition("stopped; the engines of ")[2].partition(" go on")[0]


def test_stopping_the_slice_leaves_no_process(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    report = llmux.load("lifecycle", "slice")
    print(f"stop of the slice: {report}")
    assert report["before"] >= 10  # two engines' trees and both services
    assert (report["left"], report["in_slice"], report["strays"]) == ([], [], [])
    assert report["held"] == {}
    for unit in (SUPERVISOR, GATEWAY):  # and they are not started again
        assert llmux.show(unit, "ActiveState") == "inactive"


def test_frozen_engines_hear_that_everything_ends(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    for name in ("beta", "alpha"):
        assert llmux.ask(name)["error"] == ""
    assert llmux.status()["models"]["beta"]["state"] == "parked"
    before = llmux.cursor()
    llmux.guest.run(["systemctl", "stop", "llmux.slice"])
    # what systemd says of the scope: it ended by itself, not by SIGKILL at a timeout
    said = llmux.journal("--after-cursor", before, "-u", "llmux-beta.scope")
    assert "llmux-beta.scope: Deactivated successfully." in said, said
    assert "timed out" not in said


def test_the_timeline_outlasts_a_restart_of_both(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    for name in ("alpha", "beta"):
        assert llmux.ask(name)["error"] == ""
    before = history(llmux)
    said = {(event["model"], event.get("to")) for event in before}
    assert said >= {("alpha", "serving"), ("beta", "serving")}
    llmux.guest.run(["systemctl", "restart", SUPERVISOR, GATEWAY])
    assert llmux.ask("beta")["error"] == ""
    after = history(llmux)
    assert after[: len(before)] == before
    numbers = [event["id"] for event in after]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    kept = llmux.guest.run(["stat", "-c", "%a %U", "/run/llmux/events.jsonl"])
    assert kept.stdout.strip() == "600 root"


def history(llmux: LlmuxGuest) -> list[dict[str, Any]]:
    """What the page's timeline is drawn from."""
    answer = llmux.guest.run(["curl", "-sS", "http://127.0.0.1:3000/ui/history"])
    found: list[dict[str, Any]] = json.loads(answer.stdout)["events"]
    return found


def test_a_supervisor_that_hangs_is_replaced(llmux: LlmuxGuest) -> None:
    llmux.drop_in(SUPERVISOR, "watchdog", "[Service]\nWatchdogSec=2\n")
    try:
        llmux.begin(MODELS)
        report = llmux.load("lifecycle", "watchdog")
    finally:
        llmux.remove_drop_in(SUPERVISOR, "watchdog")
    print(f"watchdog: {report}")
    assert report["replaced"]
    assert report["same"]
    assert "Watchdog timeout" in llmux.journal("-u", SUPERVISOR, "-n", "40")


def test_no_connection_is_refused_while_the_gateway_is_away(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    report = llmux.load("flood")
    print(f"kill of the gateway: {report}")
    assert int(llmux.show(GATEWAY, "NFileDescriptorStore")) >= 1
    assert report["made_while_no_gateway_ran"] > 20
    assert report["refused"] == 0
    assert report["failed"] == []


def test_a_restart_of_the_gateway_is_noticed_by_no_client(llmux: LlmuxGuest) -> None:
    """Former workers finish their streams beside the next gateway, and a stop ends them too."""
    llmux.begin({"alpha": model(env={"STANDIN_TOKENS_PER_SEC": "10"})})
    report = llmux.load("handover", "20", "3")
    print(f"restarts under streams: {report}")
    assert report["gateways"] == 4
    assert report["streams_over_the_restarts"] == 20, llmux.journal("-u", GATEWAY, "-n", "60")
    assert report["processes_at_the_end"] > 2, "former workers drain beside the last gateway"
    assert (report["failed"], report["cut"]) == ([], [])
    # Printed above; what is asked for is 1 s, and a gateway that did not hand over would cost ten.
    assert report["longest_ms"] < 5000
    llmux.guest.run(["systemctl", "stop", GATEWAY])
    left = llmux.guest.run(
        ["cat", f"/sys/fs/cgroup/llmux.slice/{GATEWAY}/cgroup.procs"], check=False
    )
    assert left.stdout.strip() == ""


def test_engine_output_is_in_the_journal_under_its_scope(llmux: LlmuxGuest) -> None:
    cursor = llmux.cursor()
    llmux.begin({"speaker": model(), "silent": model()})  # names that no other test uses
    assert llmux.ask("speaker")["error"] == ""
    text = llmux.journal("-u", "llmux-speaker.scope")
    assert "Application startup complete." in text
    assert "lab/tiny" in text
    assert "startup complete" not in llmux.journal("-u", "llmux-silent.scope")
    # and not in between the transitions
    said = llmux.journal("-u", SUPERVISOR, f"--after-cursor={cursor}")
    assert "speaker: starting → serving" in said
    assert "startup complete" not in said
    assert "vllm:speaker[" in text, "whose line it is, also where lines of all are read"


def test_an_idle_llmux_says_nothing(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    llmux.ask("beta")
    llmux.ask("alpha")  # one serves, one is parked and frozen
    watch = ["journalctl", "-f", "-n", "0", "-o", "cat", "-u", "llmux*"]
    said = llmux.run(["timeout", str(IDLE_SECS), *watch], check=False, timeout=IDLE_SECS + 20)
    assert said.returncode == 124  # it listened all the time
    assert said.stdout == ""
