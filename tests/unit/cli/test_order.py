"""Orders from the command line: several models, a terminal, time limits, exit status."""

from __future__ import annotations

import argparse
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmux.cli import order as order_module
from llmux.cli.client import Question
from llmux.cli.main import main
from llmux.cli.order import Order, View, _looks, carry_out
from llmux.errors import Reason
from llmux.protocol import Answer, Ask, Hello, decode

MODEL: dict[str, Any] = {
    "state": "stopped",
    "why": "waits for alpha: 1 request in flight, at most 108 s",
    "phase": None,
    "pinned": False,
    "stale": False,
}


class Supervisor:
    """Answers each connection in a thread of its own; ``hold`` keeps answers back."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.asked: list[Ask] = []
        self.left = threading.Event()  # a client that was not answered is gone
        self.hold: set[str] = set()
        self.looked = threading.Event()
        self.refused: dict[str, Reason] = {}
        self.models: dict[str, Any] = {"alpha": MODEL, "beta": MODEL | {"stale": True}}
        self.status: dict[str, Any] | None = None  # instead of one of these models
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(peer,), daemon=True).start()

    def _talk(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as lines:
            for line in lines:
                message = decode(line)
                if isinstance(message, Hello):
                    continue
                assert isinstance(message, Ask)
                if message.verb == "status":
                    self.looked.set()
                    status = {"models": self.models} if self.status is None else self.status
                    peer.sendall(Answer(message.id, True, status).encode())
                    continue
                self.asked.append(message)
                model = str(message.args.get("model", ""))
                if model in self.hold:
                    lines.read()
                    self.left.set()
                    return
                reason = self.refused.get(model)
                text = f"{message.verb} {model}"
                answer = (
                    Answer(message.id, True, {"message": f"{text}: done"})
                    if reason is None
                    else Answer(message.id, False, None, reason.value, f"cannot {text}")
                )
                peer.sendall(answer.encode())

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(str(tmp_path / "s.sock"))
    yield made
    made.close()


@pytest.fixture
def run(supervisor: Supervisor) -> Callable[..., int]:
    return lambda *words: main([*words, "--socket", supervisor.path])


def test_several_models_are_ordered_and_answered_in_the_order_given(
    supervisor: Supervisor, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("load", "beta", "alpha", "beta") == 0
    assert capsys.readouterr().out == "load beta: done\nload alpha: done\n"
    assert sorted(ask.args["model"] for ask in supervisor.asked) == ["alpha", "beta"]


def test_all_are_those_of_the_configuration(
    supervisor: Supervisor, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("unload", "--all") == 0
    assert capsys.readouterr().out == "unload alpha: done\nunload beta: done\n"
    assert run("restart", "--stale") == 0
    assert capsys.readouterr().out == "restart beta: done\n"
    supervisor.models = {"alpha": MODEL}
    assert run("restart", "--stale") == 0
    assert "no engine is stale" in capsys.readouterr().out


def test_an_order_without_a_model_says_how_to_name_one(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("load") == 1
    assert capsys.readouterr().err == (
        "llmux: cannot load: no model is named (name models, or use --all)\n"
    )


def test_one_failure_decides_the_status_and_the_others_are_still_done(
    supervisor: Supervisor, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.refused = {"alpha": Reason.START_FAILED}
    assert run("load", "--all") == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("load beta: done\n", "llmux: cannot load alpha\n")


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.START_FAILED, 1),
        (Reason.ENGINE_DIED, 1),
        (Reason.MANUAL_MODE, 3),
        (Reason.CANNOT_FIT, 3),
        (Reason.WAIT_EXPIRED, 5),
        (Reason.CANCELLED, 6),
    ],
)
def test_the_exit_status_is_the_kind_of_failure_and_json_has_it_too(
    supervisor: Supervisor,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    reason: Reason,
    status: int,
) -> None:
    supervisor.refused = {"alpha": reason}
    assert run("load", "alpha", "--json") == status
    printed = capsys.readouterr()
    error = {"code": reason.value, "message": "cannot load alpha"}
    assert json.loads(printed.out) == {"error": error}
    assert printed.err == "llmux: cannot load alpha\n"
    assert run("load", "--all", "--json") == status
    both = json.loads(capsys.readouterr().out)
    assert both == {"alpha": {"error": error}, "beta": {"message": "load beta: done"}}


def test_after_its_time_an_order_is_withdrawn(
    supervisor: Supervisor, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.hold = {"alpha"}
    assert run("load", "alpha", "--timeout", "0.05") == 5
    # a slow machine may reach that time before the order was given at all
    assert supervisor.left.wait(10) or not supervisor.asked
    assert "cannot wait longer for alpha: the order was withdrawn" in capsys.readouterr().err


def test_an_interrupted_order_is_withdrawn(
    supervisor: Supervisor, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        while not supervisor.asked:
            threading.Event().wait(0.001)
        raise KeyboardInterrupt

    supervisor.hold = {"alpha"}
    monkeypatch.setattr(order_module, "_wait", interrupted)
    assert run("load", "alpha") == 130
    assert supervisor.left.wait(10)


def test_without_waiting_the_supervisor_keeps_the_order(
    supervisor: Supervisor, run: Callable[..., int]
) -> None:
    assert run("sleep", "alpha", "--no-wait", "--eviction", "discard+stop") == 0
    assert supervisor.asked[0].args == {
        "model": "alpha",
        "wait": False,
        "eviction": "discard+stop",
    }


class Broken(Question):
    def __init__(self) -> None:
        """No connection is made."""

    def answer(self) -> Any:
        raise RuntimeError("can't start new thread")


def test_what_nobody_expected_ends_the_command_and_is_no_failure_of_the_order(
    supervisor: Supervisor,
) -> None:
    """Before, its thread printed a traceback of its own, and the command another, of a result that
    was None."""
    args = argparse.Namespace(socket=supervisor.path, timeout=None, json=True)
    other = Order("beta", Question(supervisor.path, "load", {"model": "beta"}))
    with pytest.raises(RuntimeError, match="new thread"):
        carry_out(args, [Order("alpha", Broken()), other])
    assert other.result == {"message": "load beta: done"}


def test_a_status_that_is_no_status_is_not_hidden_and_one_that_is_not_given_is_nothing_to_show(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    orders = [Order("alpha", Broken())]
    assert len(_looks(supervisor.path, orders, 1.0)) == 1
    assert _looks(str(tmp_path / "nobody"), orders, 1.0) == []
    supervisor.status = {}
    with pytest.raises(KeyError):
        _looks(supervisor.path, orders, 1.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_each_model_waits_for(
    supervisor: Supervisor, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    supervisor.hold = {"alpha"}
    assert run("load", "alpha", "--timeout", "0.2") == 5
    shown = terminal.getvalue()
    assert "alpha: stopped, waits for alpha: 1 request in flight, at most 108 s  (0s)\n" in shown
    assert shown.split("\x1b[K")[-1].startswith("llmux: cannot wait longer"), "nothing is left"


def test_lines_are_written_again_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    out = Terminal()
    view = View(out)
    view.show(["a: starting", "b"])
    view.show(["c"])
    view.clear()
    up = "\x1b[A\r\x1b[K"
    assert out.getvalue() == f"a: starti…\nb\n{up}{up}c\n{up}"
