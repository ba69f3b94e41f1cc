"""Every way in which the stand-in engine can fail: what the client gets, how soon, and that the
next request to another model works."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
from daemon_harness import AT_ONCE, GIB, SECONDS, Daemon, in_background
from ledger import find_start_time


@pytest.fixture(autouse=True)
def another_model_works_afterwards(daemon: Daemon) -> Iterator[None]:
    yield
    answer = daemon.chat("other")
    assert answer.status == 200, answer.body
    assert answer.text.startswith("other:")
    assert answer.seconds < AT_ONCE
    assert set(daemon.memory()) <= {"other", *daemon.models}


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


# ---- starting -----------------------------------------------------------------------------------


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


# ---- serving ------------------------------------------------------------------------------------


def test_an_engine_that_dies_mid_stream_ends_the_stream_with_an_error_event(
    daemon: Daemon,
) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", die_mid_stream=3)
    with daemon.stream("alpha") as stream:
        stream.rest()
    assert not stream.done
    assert [error["code"] for error in stream.errors] == ["engine_died"]
    daemon.order("alpha")
    answer = daemon.chat("alpha")  # the first crash is answered by a start
    assert answer.status == 200, answer.body
    assert answer.seconds < AT_ONCE


def test_an_engine_that_dies_before_the_first_byte_costs_a_request_only_time(
    daemon: Daemon,
) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", ttft_secs=30)
    waiting = in_background(lambda: daemon.chat("alpha"))
    daemon.until(lambda: daemon.model("alpha")["in_flight"] == 1)
    daemon.order("alpha")
    os.kill(daemon.model("alpha")["pid"], 9)
    answer = waiting.result(SECONDS)
    assert answer.status == 200, answer.body
    assert answer.text.startswith("alpha:")


def test_a_request_that_kills_its_engine_is_answered_alone(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", ttft_secs=30)
    prompts = ["one", "two", "poison", "four", "five"]
    began = []
    # One after the other: the newest is tried first, so that two wait when poison's turn comes.
    for prompt in prompts:
        began.append(in_background(partial(daemon.chat, "alpha", prompt)))
        daemon.until(lambda: daemon.model("alpha")["in_flight"] == len(began))
    mark = daemon.log.mark()
    daemon.order("alpha", die_on_prompt="poison")
    os.kill(daemon.model("alpha")["pid"], 9)
    answers = [request.result(SECONDS) for request in began]
    told = [(answer.status, answer.code if answer.status != 200 else "") for answer in answers]
    assert told == [(200, ""), (200, ""), (502, "engine_died"), (200, ""), (200, "")]
    assert "2 engines died with this request" in answers[2].message
    starts = [line for line in daemon.log.since(mark) if "Starting alpha cold" in line]
    assert len(starts) == 2  # after the first death, and after the one that named the request


def test_an_engine_whose_core_dies_is_replaced(daemon: Daemon) -> None:
    with_alpha(daemon, env={"STANDIN_DEAD_EXIT_SECS": "0.3", "STANDIN_TOKENS_PER_SEC": "50"})
    daemon.load("alpha")
    pid = daemon.model("alpha")["pid"]
    mark = daemon.log.mark()
    daemon.order("alpha", die_mid_stream={"after_chunks": 3, "who": "core"})
    with daemon.stream("alpha") as stream:
        stream.rest()
    assert stream.errors  # vLLM's own
    daemon.order("alpha")
    daemon.log.wait("alpha: serving → stopping", since=mark)
    assert daemon.chat("alpha").status == 200
    assert daemon.model("alpha")["pid"] != pid


def test_an_engine_that_crashes_again_and_again_backs_off(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", die_mid_stream=2)
    mark = daemon.log.mark()
    for _ in range(2):
        with daemon.stream("alpha") as stream:
            stream.rest()
        assert stream.errors, stream.events
    # A request that reached the dead engine would be repeated, for which it would be started again.
    daemon.log.wait("alpha: stopping → failed", since=mark)
    answer = daemon.chat("alpha")
    assert (answer.status, answer.code) in [(503, "model_backing_off"), (503, "model_start_failed")]
    assert "engine d" in answer.message  # died, or does not answer: whichever is seen first
    assert int(answer.headers["retry-after"]) > 30


@pytest.mark.parametrize("hang", [True, "completions"])
def test_a_hung_engine_that_says_it_is_healthy_is_replaced(
    daemon: Daemon, hang: bool | str
) -> None:
    with_alpha(daemon, stall_timeout_secs=0.5)
    daemon.load("alpha")
    mark = daemon.log.mark()
    daemon.order("alpha", hang=hang)
    stuck = in_background(lambda: daemon.chat("alpha"))
    daemon.log.wait("alpha: serving → stopping", since=mark)
    daemon.order("alpha")
    answer = stuck.result(SECONDS)
    # not repeated: the next engine might hang on it, too
    assert (answer.status, answer.code) == (502, "engine_died"), answer.body
    assert daemon.chat("alpha").status == 200


def test_a_hung_engine_ends_its_streams_with_an_error_event(daemon: Daemon) -> None:
    with_alpha(daemon, stall_timeout_secs=0.5)
    daemon.order("alpha", tokens_per_sec=20)
    with daemon.stream("alpha", max_tokens=100, min_tokens=100) as stream:
        stream.wait_for_token()
        daemon.order("alpha", hang=True)
        stream.rest()
    assert not stream.done
    assert [error["code"] for error in stream.errors] == ["engine_died"]


def test_a_slow_engine_is_not_taken_for_a_hung_one(daemon: Daemon) -> None:
    with_alpha(daemon, stall_timeout_secs=0.5)
    daemon.load("alpha")
    pid = daemon.model("alpha")["pid"]
    daemon.order("alpha", tokens_per_sec=60)
    answer = daemon.chat("alpha", max_tokens=60, min_tokens=60)  # probes are answered in between
    assert answer.status == 200
    assert answer.seconds > 0.9
    assert daemon.model("alpha")["pid"] == pid


def test_an_engine_s_own_error_is_passed_on_as_it_is(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", completion_error=1)
    assert daemon.chat("alpha").status == 500
    assert daemon.chat("alpha").status == 200


# ---- making room --------------------------------------------------------------------------------


def test_an_engine_that_cannot_sleep_is_stopped_and_the_other_served(daemon: Daemon) -> None:
    with_alpha(daemon, sleep_timeout_secs=0.3)
    daemon.load("alpha")
    daemon.order("alpha", sleep_error=True)
    answer = daemon.chat("other")
    assert answer.status == 200
    assert answer.seconds < AT_ONCE
    assert daemon.model("alpha")["state"] == "stopped"
    assert set(daemon.memory()) == {"other"}


def test_a_sleep_that_fails_once_is_tried_again(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", sleep_error=1)
    assert daemon.chat("other").seconds < AT_ONCE
    assert daemon.model("alpha")["state"] == "parked"


def test_a_sleep_that_takes_too_long_ends_in_a_stop(daemon: Daemon) -> None:
    with_alpha(daemon, sleep_timeout_secs=0.3)
    daemon.load("alpha")
    daemon.order("alpha", slow_sleep_secs=60)
    answer = daemon.chat("other")
    assert answer.status == 200
    assert answer.seconds < AT_ONCE  # the time-out, then SIGTERM's grace
    assert daemon.model("alpha")["state"] == "stopped"


def test_an_engine_that_dies_going_to_sleep_makes_room_all_the_same(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", die_on="sleep")
    answer = daemon.chat("other")
    assert answer.status == 200
    assert answer.seconds < AT_ONCE
    assert daemon.model("alpha")["state"] == "stopped"


def test_memory_that_a_sleeping_engine_keeps_is_found_out_and_freed(daemon: Daemon) -> None:
    with_alpha(daemon)
    daemon.load("alpha")
    daemon.order("alpha", leak_on_sleep=True)
    answer = daemon.chat("other")
    assert answer.status == 200
    assert answer.seconds < AT_ONCE  # the release is not seen, then the stop
    assert daemon.model("alpha")["state"] == "stopped"
    assert set(daemon.memory()) == {"other"}


def test_an_engine_that_refuses_sigterm_is_killed_after_its_grace(daemon: Daemon) -> None:
    with_alpha(daemon, eviction="retain+stop", stop_grace_secs=0.5)
    daemon.order("alpha", ignore_sigterm=True)
    daemon.load("alpha")
    answer = daemon.chat("other")
    assert answer.status == 200
    assert 0.5 < answer.seconds < AT_ONCE
    assert set(daemon.memory()) == {"other"}


@pytest.mark.parametrize("ending", ["stop", "death"])
def test_a_child_that_outlives_its_engine_does_not_keep_the_gpu(
    daemon: Daemon, ending: str
) -> None:
    with_alpha(daemon, eviction="retain+stop")
    daemon.order("alpha", orphan={"gpu_gib": 7})
    daemon.load("alpha")

    def orphans() -> set[int]:
        return {row.pid for row in daemon.ledger.rows() if row.nbytes == 7 * GIB}

    daemon.until(lambda: len(orphans()) == 1)
    (orphan,) = orphans()
    if ending == "death":
        os.kill(daemon.model("alpha")["pid"], 9)
    answer = daemon.chat("other")
    assert answer.status == 200
    assert answer.seconds < AT_ONCE
    assert set(daemon.memory()) == {"other"}
    assert find_start_time(orphan) is None


# ---- waking -------------------------------------------------------------------------------------


def test_a_wake_that_fails_twice_is_tried_again(daemon: Daemon) -> None:
    pid = asleep(daemon)
    daemon.order("alpha", wake_error=2)
    answer = daemon.chat("alpha")
    assert answer.status == 200
    assert answer.seconds < AT_ONCE
    assert daemon.model("alpha")["pid"] == pid


FAILED_WAKES = {
    "always an error": {"wake_error": True},
    "too slow": {"slow_wake_secs": 60},
    "dies": {"die_on": "wake"},
    "other answers": {"wrong_after_wake": True},
}


@pytest.mark.parametrize("faults", FAILED_WAKES.values(), ids=FAILED_WAKES)
def test_a_wake_that_fails_becomes_a_cold_start_within_the_same_wait(
    daemon: Daemon, faults: dict[str, object]
) -> None:
    pid = asleep(daemon, wake_timeout_secs=0.3)
    right = daemon.chat("alpha").text
    daemon.park("alpha")
    daemon.order("alpha", **faults)
    answer = daemon.chat("alpha")
    assert answer.status == 200, answer.body
    assert answer.text == right
    assert answer.seconds < AT_ONCE
    assert daemon.model("alpha")["pid"] != pid


def test_a_failed_reload_of_discarded_weights_becomes_a_cold_start(daemon: Daemon) -> None:
    pid = asleep(daemon, eviction="discard+keep_running", wake_timeout_secs=0.3)
    daemon.order("alpha", reload_error=True)
    answer = daemon.chat("alpha")
    assert answer.status == 200, answer.body
    assert daemon.model("alpha")["pid"] != pid


def test_a_slow_wake_within_its_time_is_waited_for(daemon: Daemon) -> None:
    pid = asleep(daemon)
    daemon.order("alpha", slow_wake_secs=0.4)
    answer = daemon.chat("alpha")
    assert answer.status == 200
    assert 0.4 < answer.seconds < AT_ONCE
    assert daemon.model("alpha")["pid"] == pid


def test_an_engine_that_dies_asleep_is_started_when_somebody_asks(daemon: Daemon) -> None:
    pid = asleep(daemon)
    mark = daemon.log.mark()
    os.kill(pid, 9)
    daemon.log.wait("alpha: stopping → stopped", since=mark)
    answer = daemon.chat("alpha")
    assert answer.status == 200
    assert daemon.model("alpha")["failures"] == 0
