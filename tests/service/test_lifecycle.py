"""Starting, reloading and ending the whole daemon."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import SECONDS, Daemon, Start, in_background, wait_gone

from llmux.cli.client import ask

pytestmark = pytest.mark.long

# ---- warm-up ------------------------------------------------------------------------------------


def test_a_warm_up_leaves_every_model_parked_that_parking_keeps_something_of(
    start_daemon: Start,
) -> None:
    asleep = {"eviction": "offload+keep_running"}
    models = {"alpha": asleep, "beta": asleep, "gamma": {"eviction": "retain+stop"}}
    daemon = start_daemon(models, top={"warmup": True})
    states = {"alpha": "parked", "beta": "parked", "gamma": "stopped"}
    daemon.until(lambda: {name: daemon.model(name)["state"] for name in models} == states)
    assert daemon.chat("beta").text.startswith("beta:")


# ---- reload -------------------------------------------------------------------------------------


def test_a_reload_adds_and_removes_models_and_leaves_the_rest_alone(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}, "other": {}})
    daemon.load("alpha")
    daemon.load("beta")
    kept, removed = daemon.model("beta")["pid"], daemon.model("alpha")["pid"]
    daemon.set_models({"beta": {}, "gamma": {}})
    assert daemon.chat("alpha").code == "model_not_found"
    wait_gone(removed)
    assert daemon.chat("gamma").text.startswith("gamma:")
    assert daemon.chat("beta").status == 200
    assert daemon.model("beta")["pid"] == kept


def test_a_reload_ends_the_streams_of_a_removed_model_in_order(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "other": {}})
    daemon.order("alpha", tokens_per_sec=40)
    with daemon.stream("alpha", max_tokens=30, min_tokens=30) as stream:
        stream.wait_for_token()
        daemon.models = {"other": {}}
        daemon.reload()
        stream.rest()
    assert stream.done
    daemon.until(lambda: set(daemon.status()["models"]) == {"other"})


def test_an_alias_that_a_reload_adds_reaches_the_engine_that_runs(daemon: Daemon) -> None:
    daemon.set_models({"named": {}, "other": {}})
    daemon.load("named")
    epoch = daemon.model("named")["epoch"]
    daemon.set_models({"named": {"aliases": ["org/new"]}, "other": {}})
    answer = daemon.chat("org/new")
    assert (answer.status, answer.json()["model"]) == (200, "org/new")
    with daemon.stream("org/new") as stream:
        stream.wait_for_token()
        stream.rest()
    assert {event["model"] for event in stream.events} == {"org/new"}
    assert daemon.model("named")["epoch"] == epoch


def test_a_reload_changes_how_long_requests_wait(daemon: Daemon) -> None:
    daemon.set_models({"ever": {}} | daemon.models, request_timeout_secs=0.2)
    daemon.order("ever", startup_secs=60)
    answer = daemon.chat("ever")
    assert (answer.status, answer.code) == (504, "wait_expired")


def test_a_reload_refuses_those_who_wait_for_a_removed_model(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "other": {}})
    daemon.order("alpha", startup_secs=60)
    mark = daemon.log.mark()
    waiting = in_background(lambda: daemon.chat("alpha"))
    daemon.log.wait("alpha: stopped → starting", since=mark)
    daemon.models = {"other": {}}
    daemon.reload()
    answer = waiting.result(SECONDS)
    assert (answer.status, answer.code) == (404, "model_not_found")


def test_the_journal_says_what_a_reload_could_not_put_in_force(start_daemon: Start) -> None:
    daemon = start_daemon({"alpha": {}})
    mark = daemon.log.mark()
    daemon.top = {"port": 3500, "gpu_count": 2}
    daemon.reload()
    daemon.log.wait("not in force before `systemctl restart llmux-gateway`: port", since=mark)
    daemon.log.wait("not in force before `systemctl restart llmux`: gpu_count", since=mark)


def test_a_bad_file_leaves_the_running_configuration_in_force(daemon: Daemon) -> None:
    daemon.load("other")
    pid = daemon.model("other")["pid"]
    mark = daemon.log.mark()
    daemon.models = {"other": {"gpu_memory": 7, "no_such_key": 1}}
    said = daemon.reload()
    daemon.models = {"other": {}}
    assert any("not reloaded" in message for message in said)
    lines = daemon.log.since(daemon.log.wait("configuration not reloaded", since=mark))
    assert any("models.other.gpu_memory" in line for line in lines)
    assert any("models.other.no_such_key" in line for line in lines)
    assert daemon.listed() == {"other"}
    assert daemon.chat("other").status == 200
    assert daemon.model("other")["pid"] == pid


# ---- the end ------------------------------------------------------------------------------------


def test_sigterm_lets_answers_end_and_leaves_no_process(start_daemon: Start) -> None:
    daemon = start_daemon({"alpha": {}, "beta": {}}, own_interpreter=True)
    daemon.load("beta")
    daemon.order("alpha", tokens_per_sec=40)
    with daemon.stream("alpha", max_tokens=20, min_tokens=20) as stream:
        stream.wait_for_token()
        pids = daemon.all_pids()
        assert len(pids) > 8  # two trees, one of them asleep
        ended = in_background(lambda: daemon.stop(signal.SIGTERM))
        stream.rest()
    assert stream.done
    assert ended.result(SECONDS) == 0
    for pid in pids:
        wait_gone(pid)
    assert daemon.memory() == {}
    daemon.notified.wait("STOPPING=1")


def test_sigterm_while_a_model_starts_refuses_who_waits(start_daemon: Start) -> None:
    daemon = start_daemon({"alpha": {}})
    daemon.order("alpha", startup_secs=60)
    waiting = in_background(lambda: daemon.chat("alpha"))
    daemon.log.wait("Spawning vLLM process")
    daemon.until(lambda: daemon.model("alpha")["pid"] is not None)
    assert daemon.stop(signal.SIGTERM) == 0
    answer = waiting.result(SECONDS)
    assert (answer.status, answer.code) == (503, "shutting_down")
    assert daemon.memory() == {}


def test_sigkill_leaves_no_engine(start_daemon: Start) -> None:
    daemon = start_daemon({"alpha": {}, "beta": {}})
    daemon.order("beta", ignore_sigterm=True, orphan=True)
    daemon.load("beta")
    daemon.load("alpha")
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL  # sees every process gone
    assert daemon.memory() == {}


# ---- the start ----------------------------------------------------------------------------------


def test_a_bad_configuration_ends_the_start_with_78_and_names_every_problem(
    tmp_path: Path,
) -> None:
    file = f"{tmp_path}/config.yaml"
    with open(file, "w", encoding="utf-8") as out:
        out.write("prot: 3000\nmodels:\n  alpha:\n    model_path: m\n    gpu_memory: 3\n")
    ended = subprocess.run(
        [sys.executable, "-m", "llmux", "serve", "-c", file], capture_output=True, check=False
    )
    assert ended.returncode == 78
    said = ended.stderr.decode()
    assert f"{file}:1:1: prot: " in said
    assert f"{file}:5:17: models.alpha.gpu_memory: " in said


def test_what_needs_systemd_is_refused_with_what_is_missing(start_daemon: Start) -> None:
    with pytest.raises(AssertionError, match=r"models\.alpha\.eviction"):
        start_daemon({"alpha": {"eviction": "retain+freeze"}})


def order(daemon: Daemon, verb: str, **args: Any) -> Any:
    """By the control socket, as the command line asks."""
    (path,) = daemon.directory.glob("llmux-*/control.sock")
    return ask(str(path), verb, args)


def test_changed_arguments_mark_a_running_engine_and_a_restart_applies_them(
    daemon: Daemon,
) -> None:
    daemon.set_models({"alpha": {}, "other": {}})
    daemon.load("alpha")
    before = daemon.model("alpha")
    assert before["stale"] is False
    mark = daemon.log.mark()
    daemon.set_models({"alpha": {"extra_args": ["--max-model-len", "2048"]}, "other": {}})
    daemon.log.wait("until `llmux restart alpha`", since=mark)
    now = daemon.model("alpha")
    assert (now["stale"], now["pid"]) == (True, before["pid"])
    daemon.until(lambda: daemon.listed_as("alpha").get("stale") is True)
    assert order(daemon, "restart", stale=True)["restarted"] == ["alpha"]
    after = daemon.model("alpha")
    assert (after["state"], after["stale"]) == ("serving", False)
    assert after["pid"] != before["pid"]
    assert order(daemon, "restart", stale=True)["restarted"] == []


def test_the_top_level_command_takes_effect_on_reload(daemon: Daemon) -> None:
    daemon.top["vllm_command"] = ["/bin/false"]
    daemon.set_models({"fresh": {}})
    assert daemon.chat("fresh").status == 503
    del daemon.top["vllm_command"]
    daemon.set_models({"fresh": {}, "other": {}}, backoff_secs=0.01)
    assert order(daemon, "load", model="fresh")
    assert daemon.chat("fresh").status == 200


def test_a_dry_reload_says_what_would_change_and_changes_nothing(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}})
    daemon.models = {"alpha": {"stop_grace_secs": 3}, "beta": {}}
    daemon.write_config()
    result = order(daemon, "reload", dry_run=True)
    assert (result["added"], result["changed"]) == (["beta"], ["alpha"])
    assert set(daemon.status()["models"]) == {"alpha"}
    daemon.reload()
    daemon.until(lambda: daemon.listed() == {"alpha", "beta"})
