"""The stand-in's processes, GPU memory and command line."""

from __future__ import annotations

import http.client
import os
import signal
import socket
from pathlib import Path

import pytest
from ledger import GIB, Ledger, find_start_time
from standin_engines import Start, shared_files
from vllm_standin import worker as worker_module
from vllm_standin.options import Options, UsageError, parse


def test_tree_has_vllms_processes_and_goes_without_a_trace(start: Start, ledger: Ledger) -> None:
    engine = start()
    children = engine.children()
    assert set(children) == {"vllm", "VLLM::EngineCor", "VLLM::Worker_TP", "resource_tracke"}
    files = engine.files
    assert sorted(Path(path).name.split("-")[0].split("_")[0] for path in files) == [
        "psm",
        "sem.mp",
    ]
    assert shared_files(children["VLLM::Worker_TP"]) == files
    assert [row.pid for row in ledger.rows()] == [children["VLLM::Worker_TP"]] * 3
    engine.process.send_signal(signal.SIGTERM)
    assert engine.wait_exit() == 0
    assert not [path for path in files if os.path.exists(path)]
    assert ledger.rows() == []
    assert not [pid for pid in children.values() if find_start_time(pid) is not None]


def test_killed_tree_frees_gpu_memory_and_leaves_files_behind(start: Start, ledger: Ledger) -> None:
    engine = start()
    files = engine.files
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}
    os.killpg(engine.process.pid, signal.SIGKILL)
    engine.wait_exit()
    assert ledger.usage_by_model() == {}
    assert all(os.path.exists(path) for path in files)


def test_killed_root_takes_its_children_along(start: Start, ledger: Ledger) -> None:
    engine = start()
    files = engine.files
    engine.process.kill()
    engine.wait_exit()  # the log ends when the last child is gone
    assert ledger.rows() == []
    assert not [path for path in files if os.path.exists(path)], "the resource tracker cleaned up"


def test_serves_on_tcp_too_and_a_port_in_use_is_fatal(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        taken = start("taken", "--host", "127.0.0.1", "--port", str(port), ready=False)
        assert taken.wait_exit() == 1
        assert "Address already in use" in taken.log
    start("alpha", "--host", "127.0.0.1", "--port", str(port))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def test_second_engine_on_a_full_gpu_dies_of_out_of_memory(start: Start, ledger: Ledger) -> None:
    start("alpha")
    beta = start("beta", "--standin-weights-gib", "14", ready=False)
    assert beta.wait_exit() == 1
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 14.00 GiB" in beta.log
    assert "Engine core initialization failed" in beta.log
    assert set(ledger.usage_by_model()) == {"alpha"}


def test_waking_onto_a_full_gpu_fails_and_leaves_the_engine_asleep(
    start: Start, ledger: Ledger
) -> None:
    alpha = start("alpha")
    alpha.post("/sleep?level=1")
    beta = start("beta")
    status, answer = alpha.ask("POST", "/wake_up")
    assert status == 500
    assert "CUDA out of memory" in answer["error"]["message"]
    assert alpha.get("/is_sleeping") == {"is_sleeping": True}
    assert ledger.usage_by_model()["alpha"] == 1 * GIB
    beta.post("/sleep?level=1")
    alpha.post("/wake_up")
    assert alpha.say().startswith("alpha:")


def test_tensor_parallel_takes_its_share_of_each_gpu(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "-tp", "2", "--standin-weights-gib", "8", CUDA_VISIBLE_DEVICES="2,3")
    rows = {(row.gpu, row.kind): row for row in ledger.rows()}
    assert sorted({gpu for gpu, _ in rows}) == [2, 3]
    assert rows[2, "weights"].nbytes == rows[3, "weights"].nbytes == 4 * GIB
    assert rows[2, "weights"].pid != rows[3, "weights"].pid
    engine.post("/sleep?level=2")
    assert ledger.usage_by_model() == {"alpha": 2 * GIB}


def test_restored_worker_takes_its_memory_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options()
    options.served_names = ["alpha"]
    options.ledger = ledger.path
    memory = worker_module.GpuMemory(options, 0)
    memory.allocate("weights", 5 * GIB)
    assert not memory.reclaim_if_restored()
    assert ledger.usage_by_model() == {"alpha": 5 * GIB}
    # CRIU brings a process back with its old pid and a new start time, and the rows of the dead
    # one count no more; there is no other way to make that happen to a process under test
    ledger.init()
    monkeypatch.setattr(memory, "_start", -1)
    assert memory.reclaim_if_restored()
    assert ledger.usage_by_model() == {"alpha": 5 * GIB}
    ledger.release(os.getpid())


def test_vllms_flags_are_taken_and_unknown_ones_ignored() -> None:
    line = (
        "serve --enforce-eager /models/x --tensor-parallel-size=1 --dtype bfloat16 --foo=bar "
        "--gpu_memory_utilization 0.5 --foo bar --served-model-name a b --max-model-len 8k "
        '--compilation-config {"level":3} -O3 --enable-prefix-caching'
    )
    options = parse(line.split())
    assert options.model == "/models/x"
    assert options.served_names == ["a", "b"]
    assert options.gpu_memory_utilization == 0.5
    assert options.max_model_len == 8000


@pytest.mark.parametrize(
    "words",
    ["serve x --standin-tokns 1", "serve x --standin-ttft-secs soon", "serve", "serve x --port y"],
)
def test_wrong_command_lines_are_refused(words: str) -> None:
    with pytest.raises(UsageError):
        parse(words.split())


def test_unknown_fault_is_refused(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "no_such", ready=False)
    assert engine.wait_exit() == 2
    assert "unknown fault no_such" in engine.log
