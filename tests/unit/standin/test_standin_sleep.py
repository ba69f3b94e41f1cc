"""The stand-in asleep and awake."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from ledger import GIB, Ledger
from standin_engines import Start


def test_sleep_frees_the_gpu_and_a_request_waits_for_waking(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--standin-weights-gib", "16")
    text = engine.say()
    assert engine.post("/sleep?level=1") == {"status": "sleeping", "level": 1}
    assert ledger.usage_by_model() == {"alpha": 1 * GIB}, "the context stays"
    assert engine.get("/health") == ""
    assert engine.get("/is_sleeping") == {"is_sleeping": True}
    assert engine.metric("engine_sleep_state", sleep_state="weights_offloaded") == 1
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(engine.say()))
    asking.start()
    engine.wait_metric("num_requests_waiting", 1)
    assert engine.post("/wake_up?tags=weights") == {"status": "sleeping", "tags": ["weights"]}
    assert ledger.show()["models"]["alpha"]["weights"] == 16 * GIB
    assert engine.metric("num_requests_waiting") == 1
    assert engine.post("/wake_up?tags=kv_cache")["status"] == "awake"
    asking.join(timeout=10)
    assert answers == [text]
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}


def test_level_two_gives_garbage_until_weights_are_reloaded(start: Start) -> None:
    engine = start()
    text = engine.say()
    engine.post("/sleep?level=2")
    assert engine.metric("engine_sleep_state", sleep_state="discard_all") == 1
    status, answer = engine.ask("POST", "/collective_rpc", {"method": "reload_weights"})
    assert status == 500, "there is no room to load into"
    engine.post("/wake_up")
    assert engine.say() == "!!!!!!!!"
    assert engine.post("/collective_rpc", method="reload_weights") == {"results": [None]}
    assert engine.say() == text
    status, answer = engine.ask("POST", "/collective_rpc", {"method": "nonsense"})
    assert status == 500
    assert "not implemented" in answer["error"]["message"]
    assert engine.ask("POST", "/collective_rpc", {})[0] == 400
    assert engine.ask("POST", "/sleep?level=3")[0] == 400


KV = {"tags": ["kv_cache"]}


def test_the_kv_cache_alone_is_discarded_and_mapped_again(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--standin-weights-gib", "16")
    text = engine.say()
    engine.post("/reset_prefix_cache")
    engine.post("/collective_rpc", method="discard", kwargs=KV)
    assert ledger.usage_by_model() == {"alpha": 17 * GIB}, "context and weights stay"
    assert engine.post("/wake_up?tags=kv_cache")["status"] == "awake"
    assert ledger.usage_by_model() == {"alpha": 17 * GIB}, "the engine does not know of it"
    for _ in range(2):
        engine.post("/collective_rpc", method="wake_up", kwargs=KV)
        assert ledger.usage_by_model() == {"alpha": 72 * GIB}
    assert engine.say() == text


def test_a_prefix_cache_that_was_not_reset_gives_garbage(start: Start) -> None:
    engine = start()
    engine.say()
    engine.post("/collective_rpc", method="discard", kwargs=KV)
    engine.post("/collective_rpc", method="wake_up", kwargs=KV)
    assert engine.say() == "!!!!!!!!"


def test_a_request_without_a_kv_cache_ends_the_engine(start: Start) -> None:
    engine = start()
    engine.post("/collective_rpc", method="discard", kwargs=KV)
    status, answer = engine.ask(
        "POST", "/v1/completions", {"model": engine.name, "prompt": "a", "max_tokens": 2}
    )
    assert status == 500, answer


def test_without_sleep_mode_sleeping_frees_nothing(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--no-enable-sleep-mode")
    engine.post("/sleep?level=2")
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}
    engine.post("/wake_up")
    assert engine.say().startswith("alpha:")


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("wait", "length")])
def test_sleep_aborts_or_waits_for_what_runs(start: Start, mode: str, reason: str) -> None:
    engine = start("alpha", "--standin-tokens-per-sec", "100")
    stream = engine.open_stream(max_tokens=30, ignore_eos=True)
    stream.next()
    engine.post(f"/sleep?level=1&mode={mode}")
    stream.read()
    assert stream.done
    assert stream.finish_reason == reason


def test_host_weights_are_real_memory_that_level_two_drops(start: Start) -> None:
    engine = start("alpha", "--standin-host-weights-mib", "32", "--standin-ram-mib", "16")
    worker = engine.children()["VLLM::Worker_TP"]

    def anonymous_mib() -> int:
        for line in Path(f"/proc/{worker}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) // 1024
        raise AssertionError

    loaded = anonymous_mib()
    engine.post("/sleep?level=1")
    assert anonymous_mib() - loaded >= 15
    engine.post("/wake_up")
    engine.post("/sleep?level=2")
    assert loaded - anonymous_mib() >= 31
    engine.post("/wake_up")
    engine.post("/collective_rpc", method="reload_weights")
    assert abs(anonymous_mib() - loaded) <= 1
