"""What SECURITY.md forbids, tried in a guest by each party; what an engine cannot leave behind."""

from __future__ import annotations

import json

import pytest
from llmux_guest import LOAD, SUPERVISOR, LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MODELS = {"alpha": model(), "beta": model()}
ATTACKS = "/srv/llmux/tests/system/forbidden/attacks.py"
FIRST, LAST = 60706, 61183


def uid_of(llmux: LlmuxGuest, name: str) -> int:
    """Of the engine's processes, which have one."""
    (uid,) = {
        llmux.run(["stat", "-c", "%u", f"/proc/{pid}"]).stdout.strip() for pid in llmux.pids()[name]
    }
    return int(uid)


def test_everything_that_is_forbidden_is_refused(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    for name in MODELS:
        assert llmux.ask(name)["error"] == "", llmux.journal()
    before = llmux.show(SUPERVISOR, "MainPID"), llmux.pids()
    done = llmux.run(
        ["env", f"PYTHONPATH={LOAD}", "python3", ATTACKS, "alpha", "beta"], check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report) == 5
    for party, attempts in report.items():
        assert len(attempts) > 20, party
        worked = {what: said for what, said in attempts.items() if not said.startswith("refused")}
        assert not worked, f"{party}: {worked}"
    assert (llmux.show(SUPERVISOR, "MainPID"), llmux.pids()) == before
    for name in MODELS:
        assert llmux.ask(name)["error"] == "", llmux.journal()


def test_an_engine_that_blocks_its_own_socket_starts_again(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS)
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
    uid = uid_of(llmux, "alpha")
    llmux.run(["llmux", "unload", "alpha"])
    as_engine = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "sh", "-c"]
    llmux.run(
        [*as_engine, "cd /run/llmux/engines/alpha && mkdir -p api.sock/x && touch api.sock/y"]
    )
    assert llmux.ask("alpha")["error"] == "", llmux.journal()


def test_users_are_kept_and_engines_of_a_shared_user_are_adopted(llmux: LlmuxGuest) -> None:
    llmux.begin(MODELS, engine_user="llmux-engine")
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
    shared = int(llmux.run(["id", "-u", "llmux-engine"]).stdout)
    assert uid_of(llmux, "alpha") == shared
    engine = llmux.pids()["alpha"]

    # as an upgrade from one user to many does it
    llmux.configure(MODELS)
    llmux.run(["systemctl", "restart", SUPERVISOR], timeout=100)
    assert llmux.pids()["alpha"] == engine
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
    assert llmux.pids()["alpha"] == engine
    llmux.run(["llmux", "restart", "alpha"], timeout=100)
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
    own = uid_of(llmux, "alpha")
    assert FIRST <= own <= LAST

    llmux.run(["systemctl", "restart", SUPERVISOR], timeout=100)
    llmux.run(["llmux", "restart", "alpha"], timeout=100)
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
    assert uid_of(llmux, "alpha") == own


def test_an_engine_has_the_limits_that_are_configured(llmux: LlmuxGuest) -> None:
    limits = {"tasks_max": 200, "memory_max": "2GiB", "ip_address_allow": ["10.0.0.0/8"]}
    llmux.begin({"alpha": model(limits=limits), "beta": model()})
    scope = "llmux-alpha.scope"
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
    assert llmux.show(scope, "TasksMax") == "200"
    assert llmux.show(scope, "MemoryMax") == str(2 * 1024**3)
    assert set(llmux.show(scope, "IPAddressDeny").split()) == {"0.0.0.0/0", "::/0"}
    assert "10.0.0.0/8" in llmux.show(scope, "IPAddressAllow").split()
    assert llmux.ask("beta")["error"] == "", llmux.journal()
    assert llmux.show("llmux-beta.scope", "TasksMax") == "32768"
    assert llmux.show("llmux-beta.scope", "IPAddressDeny") == ""


def test_the_gateway_listens_on_a_unix_socket_that_only_the_mode_opens(llmux: LlmuxGuest) -> None:
    path = "/run/llmux-gateway/http.sock"
    curl = ["curl", "-sS", "--unix-socket", path, "http://localhost/v1/models"]
    nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *curl]
    for mode, opened in (("0660", False), ("0666", True)):
        llmux.begin(MODELS, gateway={"listen": [f"unix:{path}"], "socket_mode": mode})
        for _ in range(2):
            assert '"alpha"' in llmux.run(curl).stdout
            tried = llmux.run(nobody, check=False)
            assert ('"alpha"' in tried.stdout) is opened, tried.stderr
            llmux.run(["systemctl", "restart", "llmux-gateway"], timeout=100)
    assert llmux.run(["llmux", "check", "--host"], check=False).stdout.count("http.sock") == 0
