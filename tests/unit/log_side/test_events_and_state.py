"""Events and state in files: bounded, whole, and said where they are not."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from llmux.drivers.event_file import EventFile
from llmux.drivers.store import FileStateStore
from llmux.errors import StateFileError


def test_events_are_kept_in_two_files_of_a_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "events"
    line = len(json.dumps({"n": 0}, separators=(",", ":"))) + 1
    events = EventFile(str(path), max_bytes=3 * line)
    for number in range(3):
        events.append({"n": number})
    assert not Path(f"{path}.former").exists(), "just full"
    events.append({"n": 3})
    assert [event["n"] for event in events.load()] == [0, 1, 2, 3]
    assert path.stat().st_size == line
    for number in range(4, 7):
        events.append({"n": number})
    assert [event["n"] for event in events.load()] == [3, 4, 5, 6]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = EventFile(str(path), max_bytes=3 * line)
    with path.open("a") as file:
        file.write('{"n":')  # its writer was interrupted
    again.append({"n": 8})
    assert [event["n"] for event in again.load()] == [3, 4, 5, 6, 8]
    path.write_text('[1]\n"x"\n{"n":9}\n' + "[" * 2000 + "\n")
    full = EventFile(str(path), max_bytes=3 * line)
    full.append({"n": 10})  # what is too large turns at once
    assert [event["n"] for event in EventFile(str(path)).load()] == [9, 10]


def test_an_event_that_cannot_be_written_is_said_and_the_next_one_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events"
    events = EventFile(str(path))
    before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(StateFileError, match=r"cannot write the events file .*: not a plain file"):
        events.append({"n": 1})
    os.close(reader)
    with pytest.raises(StateFileError, match="cannot read the events file"):
        events.load()
    path.unlink()
    assert events.load() == []
    with pytest.raises(StateFileError, match="is not JSON serializable"):
        events.append({"n": object()})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:-2]))
    with pytest.raises(StateFileError, match="no room"):
        events.append({"n": 2})
    monkeypatch.undo()
    events.append({"n": 3})
    assert [event["n"] for event in events.load()] == [3]
    events._close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read the state file"), ("[]", "it is not a state file of llmux"),
        ("{}", "it is not a state file of llmux"),
        ('{"version": "1"}', "it is not a state file of llmux"),
        ('{"version": 2, "state": {}}', r"newer llmux \(format 2, this one knows 1\)"),
        ('{"version": 1}', "it holds no state"), ('{"version": 1, "state": []}', "no state"),
    ],
)  # fmt: skip
def test_a_state_file_that_is_none_says_why(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "state"
    store = FileStateStore(str(path))
    assert store.load() == {}
    store.save({"a": 1})
    assert store.load() == {"a": 1}
    assert json.loads(path.read_text()) == {"version": 1, "state": {"a": 1}}
    with pytest.raises(StateFileError, match="cannot write the state file") as raised:
        store.save({"a": object()})
    assert raised.value.hint
    assert store.load() == {"a": 1}
    path.write_text(text)
    with pytest.raises(StateFileError, match=words):
        store.load()
