"""Every way in which the stand-in engine can fail on its way to sleep, asleep, and back."""

from __future__ import annotations

import os

import pytest
from daemon_harness import AT_ONCE, GIB, Daemon
from fault_models import asleep, with_alpha
from ledger import find_start_time

pytestmark = pytest.mark.long

FAILED_WAKES = {
    "always an error": {"wake_error": True},
    "too slow": {"slow_wake_secs": 60},
    "dies": {"die_on": "wake"},
    "other answers": {"wrong_after_wake": True},
}


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


def test_a_wake_that_fails_twice_is_tried_again(daemon: Daemon) -> None:
    pid = asleep(daemon)
    daemon.order("alpha", wake_error=2)
    answer = daemon.chat("alpha")
    assert answer.status == 200
    assert answer.seconds < AT_ONCE
    assert daemon.model("alpha")["pid"] == pid


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
