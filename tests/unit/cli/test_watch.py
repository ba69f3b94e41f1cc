"""``llmux events`` and ``llmux logs -f``, against a supervisor that says what the test wants."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmux.cli.main import main
from llmux.protocol import Answer, Ask, Message, News, Watch, decode

SWITCH = {"id": 2, "time": 1.5, "model": "b", "type": "switch", "victims": ["a"], "cold": False,
          "duration_secs": 1.25}  # fmt: skip
MOVE = {"id": 1, "time": 1.0, "model": "a", "type": "transition", "from": "serving",
        "to": "draining", "reason": "room for b", "duration_secs": 3.0}  # fmt: skip


@contextmanager
def supervisor(path: Path, result: Any, news: list[Message]) -> Iterator[None]:
    """Answers every question with ``result``; then says the news to who watches, and goes away."""
    listener = socket.create_server(str(path), family=socket.AF_UNIX)
    answered = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                message = decode(line)
                if isinstance(message, Ask):
                    connection.sendall(Answer(message.id, True, result).encode())
                    answered.set()
                elif isinstance(message, Watch):
                    answered.wait(10)
                    connection.sendall(b"".join(item.encode() for item in news))
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def test_events_that_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    with supervisor(path, {"events": [MOVE, SWITCH]}, []):
        assert main(["events", "--socket", str(path)]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.000 a: ", first)
        assert first.endswith("a: serving → draining (room for b) after 3.000 s")
        assert second.endswith("b: serves after 1.250 s (woken, in place of a)")
        assert main(["events", "--json", "--socket", str(path)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[0]) == MOVE


def test_events_that_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    news: list[Message] = [News("events", "", MOVE), News("events", "", SWITCH)]
    with supervisor(path, {"events": [MOVE]}, news):
        assert main(["events", "--follow", "--json", "--socket", str(path)]) == 4, "it went away"
    out = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.out.splitlines()] == [1, 2], "none twice"
    assert "went away" in out.err


def test_lines_that_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    with supervisor(path, {"lines": ["one"]}, [News("logs", "a", "two")]):
        assert main(["logs", "a", "-f", "--socket", str(path)]) == 4
        assert capsys.readouterr().out == "one\ntwo\n"
        assert main(["logs", "a", "--socket", str(path)]) == 0
        assert capsys.readouterr().out == "one\n"


def test_what_an_engine_prints_is_no_order_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in the lines that were nor in those that come."""
    lines, events = tmp_path / "lines", tmp_path / "events"
    with supervisor(lines, {"lines": ["\x1b[2Jone"]}, [News("logs", "a", "\x9b2Jtwo")]):
        assert main(["logs", "a", "-f", "--socket", str(lines)]) == 4
    told = MOVE | {"reason": "\x1b]0;title\x07owned"}
    with supervisor(events, {"events": []}, [News("events", "", told)]):
        assert main(["events", "--follow", "--socket", str(events)]) == 4
    said = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & set(said), repr(said)
    assert all(word in said for word in ("one", "two", "owned"))


def test_lines_of_several_models_name_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    answer = {"lines": ["one"], "models": {"a": {}, "b": {}}}
    with supervisor(path, answer, [News("logs", "b", "two")]):
        assert main(["logs", "--socket", str(path)]) == 0
        assert capsys.readouterr().out == "a: one\nb: one\n"
        assert main(["logs", "--json", "--socket", str(path)]) == 0
        both = json.loads(capsys.readouterr().out)
        assert both == {"a": {"lines": ["one"]}, "b": {"lines": ["one"]}}
        assert main(["logs", "-f", "--socket", str(path)]) == 4
        assert capsys.readouterr().out == "a: one\nb: one\nb: two\n"


def test_lines_since_a_time_are_the_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(_program: str, command: list[str]) -> None:
        raise FileNotFoundError(2, " ".join(command))

    monkeypatch.setattr("os.execvp", execute)
    assert main(["logs", "a", "-f", "--since", "10 min ago"]) == 1
    command = [""]
    monkeypatch.setattr("os.execvp", lambda _, words: command.__setitem__(0, " ".join(words)))
    answer = {"models": {"a": {}, "org/b": {}}, "lines": []}
    monkeypatch.setattr("llmux.cli.watch.ask", lambda *_: answer)
    assert main(["logs", "a", "--since", "10 min ago"]) == 0
    assert command[0] == (
        "journalctl --quiet --output=short-iso --since=10 min ago SYSLOG_IDENTIFIER=vllm:a"
    )
    assert main(["logs", "--since", "10 min ago"]) == 0
    assert command[0].endswith("SYSLOG_IDENTIFIER=vllm:a SYSLOG_IDENTIFIER=vllm:org/b")
    assert main(["logs", "--since", "-1h", "a"]) == 0
    assert "--since=-1h" in command[0]


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "a", "-f", "--socket", str(tmp_path / "none")]) == 4
    assert "is it running?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "odd", [{"time": 1e300}, {"time": 10**400}, {"time": None}, {"duration_secs": "x"}, {"id": []}]
)
def test_an_event_that_cannot_be_described_ends_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: dict[str, Any]
) -> None:
    path = tmp_path / "s"
    news: list[Message] = [News("events", "", MOVE | odd), News("events", "", SWITCH)]
    with supervisor(path, {"events": [MOVE | {"id": 0}, MOVE | {"id": 1} | odd]}, news):
        assert main(["events", "--follow", "--socket", str(path)]) == 4, "it went away"
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first.endswith("after 3.000 s")
    assert "id" in odd or second.startswith('an event that this llmux does not know: {"id": 1')
    assert others[-1].endswith("b: serves after 1.250 s (woken, in place of a)")
