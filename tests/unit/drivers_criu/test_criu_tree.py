"""What is read from /proc of the processes that a dump is to take."""

from __future__ import annotations

import asyncio
import os
import pathlib
import socket
import subprocess
from collections.abc import Sequence

import pytest

from llmux.drivers.criu.driver import Criu
from llmux.drivers.criu.tree import TreeFacts, decode_address, inspect
from llmux.drivers.images.store import ImageStore
from llmux.ports import UnitHandle
from tests.twins.units import MemoryUnits
from tests.twins.world import World


def test_our_own_process_is_seen_as_a_tree() -> None:
    tree = inspect(os.getpid(), [os.getpid()])
    assert tree is not None
    assert tree.pids == (os.getpid(),)
    assert os.getpid() in tree.processes[0].tids
    assert tree.resident_bytes > 0
    assert inspect(2**22 + 1, [2**22 + 1]) is None


def test_a_unix_connection_to_somebody_outside_is_named_with_both_ends(
    tmp_path: pathlib.Path,
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as ours:
        listener.bind(path)
        listener.listen()
        ours.connect(path)
        accepted, _ = listener.accept()
        with accepted:
            engine = subprocess.Popen(["cat"], stdin=accepted.fileno(), start_new_session=True)
        tree = inspect(engine.pid, [engine.pid])
        both = inspect(engine.pid, [engine.pid, os.getpid()])
    assert engine.wait(10) == 0
    assert tree is not None
    assert both is not None
    texts = [problem.text for problem in tree.problems]
    assert len(texts) == 1
    assert f"unix stream connection that leaves the engine: fd 0 at {path}, to process" in texts[0]
    assert f"to process {os.getpid()} (" in texts[0]
    assert not any(path in problem.text for problem in both.problems)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0100007F:1F90", "127.0.0.1:8080"),
        ("0000000000000000FFFF00000100007F:1F90", "127.0.0.1:8080"),
        ("00000000000000000000000001000000:0050", "[0000:0000:0000:0000:0000:0000:0000:0001]:80"),
    ],
)
def test_socket_addresses_are_decoded(text: str, address: str) -> None:
    assert decode_address(text) == address


def pretend(proc: pathlib.Path, pid: int, parent: int, *opened: str) -> None:
    """A process in a /proc of ours that has these files open."""
    own = proc / str(pid)
    (own / "fd").mkdir(parents=True)
    (own / "task" / str(pid)).mkdir(parents=True)
    (own / "net").mkdir()
    for name in ("tcp", "tcp6", "unix"):
        (own / "net" / name).write_text("head\n")
    (own / "maps").write_text("")
    state = f"Name:\tpython3\nState:\tS (sleeping)\nPPid:\t{parent}\nTracerPid:\t0\n"
    (own / "status").write_text(state)
    root = pid if parent == 1 else parent
    (own / "stat").write_text(f"{pid} (python3) S {parent} {root} {root} 0\n")
    for number, path in enumerate(opened):
        (own / "fd" / str(number)).symlink_to(path)


def seen(proc: pathlib.Path, *pids: int) -> TreeFacts:
    facts = inspect(pids[0], pids, proc=str(proc))
    assert facts is not None
    return facts


def test_a_device_that_criu_cannot_dump_is_named_whatever_it_is(tmp_path: pathlib.Path) -> None:
    """As /dev/gdrdrv: before, only devices that were known by name were seen before the dump."""
    strange = pathlib.Path("/dev/fuse")
    if not strange.is_char_device():
        pytest.skip("no /dev/fuse here, whose place another driver's device would take")
    pretend(tmp_path, 7, 1, "/dev/null", "/dev/urandom", "/dev/ptmx", "/dev/shm", str(strange))
    (problem,) = seen(tmp_path, 7).problems
    assert "process 7 (python3) holds a device that CRIU cannot dump: fd 4" in problem.text
    assert problem.gpu_user is None


@pytest.mark.parametrize(
    ("suspendable", "named"),
    [(None, None), ([7, 8], None), ([8], "process 7 "), ([], "process 7 ")],
)
def test_a_gpu_device_without_cuda_state_is_an_obstacle_from_the_start(
    tmp_path: pathlib.Path, suspendable: list[int] | None, named: str | None
) -> None:
    """The API server asked NVML how many GPUs there are, and keeps the device open."""
    proc = tmp_path / "proc"
    pretend(proc, 7, 1, "/dev/nvidiactl", "/dev/nvidia0")
    pretend(proc, 8, 7, "/dev/nvidia-uvm")
    assert {problem.gpu_user for problem in seen(proc, 7, 8).problems} == {7, 8}

    class Units(MemoryUnits):
        async def pids(self, handle: UnitHandle) -> Sequence[int]:
            return [7, 8]

    units, images = Units(World()), str(tmp_path / "images")
    criu = Criu(units, ImageStore(images), images, proc=str(proc))
    handle = UnitHandle("m", "llmux-m.scope", 7, 1)
    found = asyncio.run(criu.obstacle(handle, suspendable))
    assert (found is None) is (named is None)
    if named is not None:
        assert found is not None
        assert found.startswith(named)
        assert "park the model by discard+cuda_suspend" in found
