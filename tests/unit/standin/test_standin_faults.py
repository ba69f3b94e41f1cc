"""The stand-in fails as ordered."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from ledger import GIB, Ledger, find_start_time
from standin_engines import Start
from vllm_standin import faults as fault_orders

pytestmark = pytest.mark.long


def test_dies_at_start_with_last_lines(start: Start) -> None:
    order = '{"exit_code": 3, "after_secs": 0.05, "lines": ["ValueError: bad checkpoint"]}'
    engine = start("alpha", "--standin-fault", f"die_at_start={order}", ready=False)
    assert engine.wait_exit() == 3
    assert engine.lines[-1] == "ValueError: bad checkpoint\n"


def test_whole_tree_dies_in_mid_stream(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders))
    fault_orders.order(orders, die_mid_stream={"after_chunks": 3})
    stream = engine.open_stream()
    stream.read()
    assert stream.text.startswith("alpha:")
    assert not stream.done
    assert len(stream.events) == 1 + 3
    assert engine.wait_exit() == -signal.SIGKILL


@pytest.mark.parametrize("who", ["core", "worker"])
def test_dead_core_is_unhealthy_and_ends_the_engine(start: Start, orders: Path, who: str) -> None:
    engine = start("alpha", "--standin-faults", str(orders), "--standin-tokens-per-sec", "200")
    fault_orders.order(orders, die_mid_stream={"after_chunks": 2, "who": who})
    stream = engine.open_stream(ignore_eos=True)
    stream.read()
    assert stream.done
    assert stream.events[-1]["error"]["code"] == 500
    assert engine.ask("GET", "/health")[0] == 503
    status, answer = engine.ask("POST", "/v1/completions", {"prompt": "x"})
    assert status == 500
    assert "EngineCore encountered an issue" in answer["error"]["message"]
    assert engine.wait_exit() == 0


def test_dead_core_ends_the_engine_without_a_request_too(start: Start) -> None:
    engine = start("alpha", "--standin-dead-exit-secs", "0.05")
    os.kill(engine.children()["VLLM::EngineCor"], signal.SIGKILL)
    assert engine.wait_exit() == 0
    assert "EngineDeadError" in engine.log


def test_hang_stalls_streams_while_health_is_fine(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders), "--standin-tokens-per-sec", "100")
    stream = engine.open_stream(ignore_eos=True, max_tokens=50)
    stream.next()
    fault_orders.order(orders, hang=True)
    connection = engine.connect()
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1}))
    assert connection.sock is not None
    connection.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        connection.getresponse()
    assert engine.get("/health") == ""
    connection.close()
    fault_orders.order(orders)
    stream.read()
    assert stream.done


def test_errors_on_order_happen_as_often_as_ordered(start: Start, orders: Path) -> None:
    fault_orders.order(orders, sleep_error=1, wake_error=2, reload_error=1, completion_error=1)
    engine = start("alpha", "--standin-faults", str(orders))
    assert engine.ask("POST", "/v1/completions", {"prompt": "x"})[0] == 500
    assert engine.ask("POST", "/sleep")[0] == 500
    assert engine.get("/is_sleeping") == {"is_sleeping": False}
    assert engine.ask("POST", "/sleep")[0] == 200
    assert [engine.ask("POST", "/wake_up")[0] for _ in range(3)] == [500, 500, 200]
    reload = {"method": "reload_weights"}
    assert [engine.ask("POST", "/collective_rpc", reload)[0] for _ in range(2)] == [500, 200]
    assert engine.say().startswith("alpha:")


def test_slow_sleep_and_slow_wake(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders))
    fault_orders.order(orders, slow_sleep_secs=0.2, slow_wake_secs=0.2)
    for path in ("/sleep", "/wake_up"):
        begun = time.monotonic()
        engine.post(path)
        assert time.monotonic() - begun >= 0.2


def test_never_healthy_has_its_port_open(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "never_healthy", ready=False)
    assert engine.read_until("Started server process")
    connection = engine.connect()
    connection.request("GET", "/health")
    assert connection.sock is not None
    connection.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()


def test_refuses_sigterm(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "ignore_sigterm")
    os.killpg(engine.process.pid, signal.SIGTERM)
    assert engine.read_until("SIGTERM ignored")
    assert engine.say().startswith("alpha:")


def test_orphan_outlives_the_engine_and_holds_gpu_memory(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--standin-fault", 'orphan={"gpu_gib": 3}')
    engine.say()
    # the orphan is made by the worker once it serves; any control call comes after that, and before
    # it a child of the worker may be there with the worker's name
    engine.post("/sleep?level=1")
    worker = engine.children()["VLLM::Worker_TP"]
    orphans = [row for row in ledger.rows() if row.pid != worker]
    engine.process.terminate()
    assert engine.wait_exit() == 0
    assert ledger.usage_by_model() == {"alpha": 3 * GIB}
    os.kill(orphans[0].pid, signal.SIGTERM)
    assert find_start_time(orphans[0].pid) is not None
    os.kill(orphans[0].pid, signal.SIGKILL)


def test_wrong_answers_after_wake(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders))
    text = engine.say()
    engine.post("/sleep")
    fault_orders.order(orders, wrong_after_wake=True)
    engine.post("/wake_up")
    wrong = engine.say()
    assert wrong != text
    assert wrong.startswith("alpha:")


def test_memory_not_freed_on_sleep(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--standin-fault", "leak_on_sleep")
    engine.post("/sleep")
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}


def test_dies_in_waking(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "die_on=wake")
    engine.post("/sleep")
    status, _answer = engine.ask("POST", "/wake_up")
    assert status == 500
    assert engine.wait_exit() == 0
