"""What engines find on their host, and what a real one may do there: in a guest, as their users."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from llmux_guest import STANDIN, LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

CLOSED = "/opt/closed"


def checks(llmux: LlmuxGuest) -> dict[str, dict[str, Any]]:
    report = llmux.run(["llmux", "doctor", "--json"], check=False, timeout=120)
    return {check["name"]: check for check in json.loads(report.stdout)["checks"]}


def test_the_doctor_tries_what_each_engine_may_do(llmux: LlmuxGuest) -> None:
    """As the users of the models, of which none has run yet; nothing is left."""
    llmux.end()
    llmux.configure({"fresh": model(), "other": model()})
    before = llmux.run(["ls", "-A", "/var/cache/llmux"]).stdout
    found = checks(llmux)
    print(found["engine access"], found["engine directories"], found["models of the hub"])
    users = re.findall(r"as llmux-(\d+): ", found["engine access"]["seen"])
    assert len(set(users)) == 2, found["engine access"]
    assert found["engine access"]["level"] == found["engine directories"]["level"] == "OK"
    hub = found["models of the hub"]
    assert hub["level"] == "WARN"
    assert "lab/tiny of" in hub["seen"]
    assert llmux.run(["ls", "-A", "/var/cache/llmux"]).stdout == before
    assert llmux.run(["llmux", "check", "--host"], check=False).returncode == 0


def test_what_is_closed_to_engines_is_refused_by_the_check_of_the_host(llmux: LlmuxGuest) -> None:
    llmux.end()
    llmux.run(["install", "-d", "-m", "0700", CLOSED])
    llmux.run(["install", "-m", "0755", STANDIN, f"{CLOSED}/vllm"])
    try:
        llmux.configure({"alpha": model()}, vllm_command=[f"{CLOSED}/vllm"])
        checked = llmux.run(["llmux", "check", "--host"], check=False)
        assert checked.returncode == 78
        words = f"cannot execute {CLOSED}/vllm: {CLOSED} is closed to it"
        assert re.search(rf"vllm_command: llmux-\d+ {re.escape(words)}", checked.stderr)
        assert checks(llmux)["engine access"]["level"] == "FAIL"
    finally:
        llmux.run(["rm", "-r", CLOSED])


def core_limits(llmux: LlmuxGuest, pid: int) -> list[str]:
    limits = llmux.run(["cat", f"/proc/{pid}/limits"]).stdout
    (core,) = [line for line in limits.splitlines() if "core file size" in line]
    return core.split()[4:6]


def test_core_dumps_of_engines_are_off_until_someone_wants_one(llmux: LlmuxGuest) -> None:
    """Each process of the scope has no room for one, and may be given it while it runs."""
    llmux.begin({"alpha": model()})
    assert llmux.ask("alpha")["error"] == ""
    pids = llmux.pids()["alpha"]
    assert len(pids) > 2
    user = llmux.run(["stat", "-c", "%u", f"/proc/{pids[0]}"]).stdout.strip()
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    for pid in pids:
        assert core_limits(llmux, pid) == ["0", "unlimited"]
        # root could as well, but not in a guest without CAP_SYS_RESOURCE
        llmux.run([*as_user, "prlimit", f"--pid={pid}", "--core=unlimited"])
        assert core_limits(llmux, pid) == ["unlimited", "unlimited"]
    assert llmux.ask("alpha")["error"] == ""


def test_weights_of_the_next_model_are_read_while_another_drains(llmux: LlmuxGuest) -> None:
    path = "/var/tmp/gpu-host/weights/model.safetensors"
    llmux.run(["install", "-d", "-m", "0755", "/var/tmp/gpu-host", "/var/tmp/gpu-host/weights"])
    try:
        llmux.begin(
            {
                "alpha": model(env={"STANDIN_TOKENS_PER_SEC": "20"}),
                "beta": {**model("retain+stop"), "model_path": path.rpartition("/")[0]},
            },
            policy={"policy_type": "fifo", "min_active_secs": 0, "drain_timeout_secs": 200},
        )
        report = llmux.load("ahead/weights", path)
    finally:
        llmux.run(["rm", "-r", "/var/tmp/gpu-host"])
    print(report)
    assert report["errors"] == []
    assert report["before"] == 0
    assert report["read"] >= report["size"] // 2
    assert report["meanwhile"]["alpha"] == "draining"
    assert report["engines meanwhile"] == ["alpha"], "the reader is no engine"
