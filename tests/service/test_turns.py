"""The main job: models take turns behind one endpoint."""

from __future__ import annotations

import time

import pytest
from daemon_harness import AT_ONCE, SECONDS, Answer, Daemon, chat_body, in_background

pytestmark = pytest.mark.long

EVICTIONS = ["retain+stop", "offload+keep_running", "discard+keep_running"]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_two_models_take_turns_and_only_one_holds_the_gpu(daemon: Daemon, eviction: str) -> None:
    daemon.set_models({"alpha": {"eviction": eviction}, "beta": {"eviction": eviction}})
    for turn in range(4):
        name = ("alpha", "beta")[turn % 2]
        other = ("beta", "alpha")[turn % 2]
        answer = daemon.chat(name)
        assert answer.status == 200, answer.body
        assert answer.json()["model"] == name
        assert answer.text.startswith(f"{name}:")
        with daemon.stream(name, "again") as stream:
            stream.rest()
        assert stream.done
        assert stream.text.startswith(f"{name}:")
        assert {event["model"] for event in stream.events} == {name}
        memory = daemon.memory()
        assert memory.pop(name) == pytest.approx(72, abs=0.1)  # 0.9 of 80 GiB
        residue = 0 if eviction == "retain+stop" or turn == 0 else 1  # the CUDA context
        assert memory == ({other: residue} if residue else {})


def test_the_answers_are_the_same_after_every_way_of_parking(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}})
    first = daemon.chat("alpha", "the same question").text
    for eviction in EVICTIONS:
        daemon.park("alpha", eviction)
        assert daemon.chat("alpha", "the same question").text == first


def test_models_that_fit_side_by_side_do_not_take_turns(daemon: Daemon) -> None:
    small = {"gpu_memory": 0.45, "extra_args": ["--gpu-memory-utilization", "0.45"]}
    daemon.set_models({"alpha": small, "beta": small})
    mark = daemon.log.mark()
    for name in ("alpha", "beta", "alpha", "beta"):
        assert daemon.chat(name).text.startswith(f"{name}:")
    assert set(daemon.status()["active_models"]) == {"alpha", "beta"}
    assert not [line for line in daemon.log.since(mark) if "draining" in line]


def test_concurrent_clients_of_two_models_are_all_served_in_few_switches(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}})
    daemon.load("alpha")
    daemon.load("beta")
    mark = daemon.log.mark()

    def client(name: str) -> list[Answer]:
        return [daemon.chat(name, f"question {number}") for number in range(8)]

    clients = {
        f"{name}{number}": in_background(lambda name=name: client(name))  # type: ignore[misc]  # a default binds it
        for name in ("alpha", "beta")
        for number in range(4)
    }
    served = 0
    for who, future in clients.items():
        for answer in future.result(SECONDS):
            assert answer.status == 200, answer.body
            assert answer.text.startswith(f"{who[:-1]}:")
            served += 1
    assert served == 64
    switches = [line for line in daemon.log.since(mark) if " serves after " in line]
    # what waits when a model comes up is served by that switch: never one that serves no request
    assert len(switches) <= 33, switches


def test_a_drain_waits_for_streams_and_lets_nobody_in_meanwhile(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}})
    daemon.order("alpha", tokens_per_sec=40)
    daemon.load("alpha")
    with daemon.stream("alpha", max_tokens=20, min_tokens=20) as stream:
        stream.wait_for_token()
        mark = daemon.log.mark()
        beta = in_background(lambda: daemon.chat("beta"))
        daemon.log.wait("alpha: serving → draining", since=mark)
        late = in_background(lambda: daemon.chat("alpha", max_tokens=2))
        stream.rest()
    assert stream.done
    assert not stream.errors
    assert beta.result(SECONDS).text.startswith("beta:")
    assert late.result(SECONDS).text.startswith("alpha:")
    said = daemon.log.since(mark)
    order = [line for line in said if "serves after" in line]
    assert [line.split()[0] for line in order] == ["<6>beta", "<6>alpha"]


def test_the_drain_deadline_cuts_a_stream_with_an_error_event(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}}, drain_timeout_secs=0.2)
    daemon.order("alpha", tokens_per_sec=5)
    with daemon.stream("alpha", max_tokens=1000, min_tokens=1000) as stream:
        stream.wait_for_token()
        beta = daemon.chat("beta")
        stream.rest()
    assert beta.status == 200
    assert 0.2 < beta.seconds < AT_ONCE
    assert not stream.done
    assert [error["code"] for error in stream.errors] == ["cut_by_switch"]


def test_without_drain_a_plain_answer_is_cut_at_once(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}}, drain_before_switch=False)
    daemon.load("alpha")
    daemon.order("alpha", tokens_per_sec=2)
    slow = in_background(lambda: daemon.chat("alpha", max_tokens=1000, min_tokens=1000))
    daemon.until(lambda: daemon.model("alpha")["in_flight"] == 1)
    assert daemon.chat("beta").status == 200
    answer = slow.result(SECONDS)
    assert (answer.status, answer.code) == (503, "cut_by_switch")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_client_that_leaves_while_it_waits_causes_no_switch(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}})
    daemon.order("alpha", tokens_per_sec=40)
    with daemon.stream("alpha", max_tokens=40, min_tokens=40) as stream:
        stream.wait_for_token()
        mark = daemon.log.mark()
        with daemon.connection() as impatient:
            body = daemon.encode(chat_body("beta", "never mind"))
            impatient.request("POST", "/v1/chat/completions", body)
            daemon.log.wait("alpha: serving → draining", since=mark)
        daemon.log.wait("alpha: draining → serving", since=mark)
        stream.rest()
    assert stream.done
    assert daemon.model("alpha")["state"] == "serving"
    assert daemon.model("beta")["state"] == "stopped"
    assert daemon.chat("alpha").status == 200


def test_a_busy_model_serves_for_its_least_time_before_it_makes_room(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}}, min_active_secs=1.5)
    daemon.order("alpha", tokens_per_sec=40)
    began = time.monotonic()
    with daemon.stream("alpha", max_tokens=120, min_tokens=120) as stream:
        stream.wait_for_token()
        mark = daemon.log.mark()
        beta = in_background(lambda: daemon.chat("beta"))
        daemon.log.wait("alpha: serving → draining", since=mark)
        assert time.monotonic() - began > 1.5
        stream.rest()
    assert beta.result(SECONDS).status == 200


def test_an_idle_model_makes_room_at_once(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}}, min_active_secs=600)
    daemon.load("alpha")
    assert daemon.chat("beta").status == 200


def test_the_policy_s_least_time_does_not_hold_up_a_model_on_a_free_gpu(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}}, min_active_secs=600)
    assert daemon.chat("alpha").seconds < AT_ONCE
