"""What is read from /proc of the processes that a dump is to take."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess

import pytest

from llmux.drivers.criu_tree import decode_address, inspect


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
            engine = subprocess.Popen(["cat"], stdin=accepted, start_new_session=True)
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
