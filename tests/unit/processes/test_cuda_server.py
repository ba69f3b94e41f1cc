"""The CUDA helper's server over a library that is none: what ends it, what it waits for."""

from __future__ import annotations

import io
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llmux.drivers.cuda import cuda_helper
from llmux.drivers.cuda.cuda_helper import Server


class Answering:
    """A library whose calls are noted; ``during`` runs in each."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.during = during

    def call(self, operation: str, pid: int, timeout_ms: int) -> dict[str, Any]:
        self.asked.append((operation, pid, timeout_ms))
        self.during()
        return {"code": 0}


def served(library: Answering, asked: bytes, sink: Any, unread: bool = False) -> Server:
    """What becomes of a server that was asked this, whose supervisor then went."""
    ours, theirs = socket.socketpair()
    stop, other = socket.socketpair()
    with ours, stop, other:
        theirs.sendall(asked)
        if unread:
            ours.send(b"an answer")
        theirs.close()
        server = Server(library, ours.fileno(), stop.fileno(), sink)  # type: ignore[arg-type]
        server.serve()
    return server


def test_a_supervisor_that_is_gone_in_any_way_ends_it_with_all_answers_made() -> None:
    serving = threading.current_thread()
    others: list[bool] = []
    library = Answering(lambda: others.append(threading.current_thread() is not serving))
    asked = b'{"id":1,"op":"lock","pid":7}\n{"id":2,"op":"lock","pid":8,"timeout_ms":9}\n'
    served(library, asked, io.BytesIO())
    assert sorted(library.asked) == [("lock", 7, 0), ("lock", 8, 9)]
    assert others == [True, True]
    gone = Answering()
    served(gone, asked, io.BytesIO(), unread=True)  # a reset, which may take requests along
    assert gone.asked in ([], *(sorted(library.asked)[:n] for n in (1, 2)))


def test_it_waits_for_the_calls_that_run() -> None:
    ended = threading.Event()
    seen: list[bool] = []
    library = Answering(lambda: seen.append(ended.wait(0.05)))
    served(library, b'{"id":1,"op":"lock","pid":7}\n', io.BytesIO())
    ended.set()
    assert seen == [False]


def test_calls_that_have_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce(threading.Thread):
        def start(self) -> None:
            super().start()
            self.join()

    monkeypatch.setattr(threading, "Thread", AtOnce)
    requests = b'{"id":1,"op":"lock","pid":7}\n' * 50
    answers = io.BytesIO()
    assert len(served(Answering(), requests, answers)._threads) == 1
    assert answers.getvalue() == b'{"id":1,"code":0}\n' * 50


def test_answers_that_nobody_reads_are_dropped_and_a_fault_is_not() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb", buffering=0) as sink:
        served(Answering(), b'{"id":1,"op":"lock","pid":7}\n', sink)  # no thread's exception
        server = Server(Answering(), 0, 0, sink)  # type: ignore[arg-type]
        server.send({"id": 1})
    with pytest.raises(ValueError, match="closed file"):
        server.send({"id": 1})


def test_any_number_of_signals_is_one_end_and_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", wrong.append)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    held = signal.set_wakeup_fd(-1)
    try:
        readable = cuda_helper._stop_signals()
        with readable:
            assert select.select([readable], [], [], 0)[0] == []
            for _ in range(2000):
                for number in numbers:
                    signal.raise_signal(number)
            assert select.select([readable], [], [], 0)[0] == [readable]
    finally:
        os.close(signal.set_wakeup_fd(held))
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert wrong == []
