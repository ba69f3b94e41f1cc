"""Every way in which a start of the stand-in engine can fail: what the client gets, how soon."""

from __future__ import annotations

import os

import pytest
from daemon_harness import AT_ONCE, GIB, SECONDS, Daemon, in_background
from fault_models import with_alpha
from ledger import find_start_time

pytestmark = pytest.mark.long


def test_a_start_that_dies_is_a_503_with_the_engine_s_last_lines(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.order("alpha", die_at_start={"exit_code": 3, "lines": ["first", "no such weights"]})
    answer = daemon.chat("alpha")
    assert (answer.status, answer.code) == (503, "model_start_failed")
    assert answer.headers["retry-after"] == "30"
    assert "exit status 3" in answer.message
    assert answer.message.endswith("no such weights")
    assert answer.seconds < AT_ONCE


def test_after_a_failed_start_the_model_backs_off_and_an_operator_overrides(
    daemon: Daemon,
) -> None:
    with_alpha(daemon)
    daemon.order("alpha", die_at_start=True)
    assert daemon.chat("alpha").code == "model_start_failed"
    again = daemon.chat("alpha")
    assert (again.status, again.code) == (503, "model_backing_off")
    assert again.seconds < AT_ONCE
    assert 25 <= int(again.headers["retry-after"]) <= 30
    assert 25 <= daemon.model("alpha")["retry_in_secs"] <= 30
    refused = daemon.ask("wake", model="alpha")
    assert (refused.status, refused.code) == (503, "model_start_failed")
    assert daemon.model("alpha")["failures"] == 2
    assert daemon.model("alpha")["retry_in_secs"] > 50  # it grows
    daemon.order("alpha")
    daemon.load("alpha")
    assert daemon.chat("alpha").text.startswith("alpha:")


def test_a_start_that_dies_after_a_while_is_a_503_as_soon_as_it_died(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.order("alpha", die_at_start={"after_secs": 0.5, "lines": ["half way"]})
    answer = daemon.chat("alpha")
    assert (answer.status, answer.code) == (503, "model_start_failed")
    assert "half way" in answer.message
    assert 0.5 < answer.seconds < AT_ONCE


def test_an_engine_that_never_gets_healthy_is_a_503_at_the_start_up_timeout(
    daemon: Daemon,
) -> None:
    with_alpha(daemon, startup_timeout_secs=1)
    daemon.order("alpha", never_healthy=True)
    answer = daemon.chat("alpha")
    assert (answer.status, answer.code) == (503, "model_start_failed")
    assert "/health did not say 200 within 1s" in answer.message
    assert 1 < answer.seconds < AT_ONCE
    assert daemon.memory() == {}
    assert daemon.model("alpha")["pid"] is None


def test_everyone_who_waits_for_a_failed_start_is_told_once(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.order("alpha", die_at_start={"after_secs": 0.5})
    clients = [in_background(lambda: daemon.chat("alpha")) for _ in range(5)]
    assert [client.result(SECONDS).status for client in clients] == [503] * 5
    assert daemon.model("alpha")["queue_depth"] == 0


def test_a_start_without_memory_is_a_503_that_says_so(daemon: Daemon) -> None:
    with_alpha(daemon)
    pid = os.getpid()
    start = find_start_time(pid)
    assert start is not None
    daemon.ledger.allocate(0, pid, start, "foreign", {"weights": 40 * GIB})
    try:
        answer = daemon.chat("alpha")
    finally:
        daemon.ledger.release(pid)
    assert (answer.status, answer.code) == (503, "model_start_failed")
    assert "CUDA out of memory" in answer.message
    daemon.load("alpha")


def test_a_program_that_does_not_exist_is_a_503_that_names_it(daemon: Daemon) -> None:
    with_alpha(daemon, vllm_command="llmux-no-such-program")
    answer = daemon.chat("alpha")
    assert (answer.status, answer.code) == (503, "model_start_failed")
    assert "llmux-no-such-program" in answer.message
    assert answer.seconds < AT_ONCE
