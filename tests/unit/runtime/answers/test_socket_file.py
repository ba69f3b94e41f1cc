"""The control socket's file: who may open it, and what it is made of again."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from runtime_harness import in_loop

from llmux.errors import LlmuxError, Reason, Refused
from llmux.protocol import MAX_LINE, Answer, Ask, Catalog, Hello, News, Progress, Watch, decode
from llmux.runtime.control import socket as module
from llmux.runtime.control.socket import ControlSocket
from llmux.runtime.control.watchers import Watchers


def control_of(**settings: Any) -> ControlSocket:
    async def ask(*_: Any) -> None: ...

    return ControlSocket(post=lambda _: None, ask=ask, catalog=Catalog, **settings)


@pytest.mark.parametrize(("group", "mode"), [(None, 0o600), (os.getgid(), 0o660)])
@in_loop
async def test_the_file_is_open_to_the_group_that_is_named_or_to_none(
    tmp_path: Path, group: int | None, mode: int
) -> None:
    path = str(tmp_path / "control")
    (tmp_path / "control").touch()  # a former one is replaced
    control = control_of()
    await control.listen(path, group)
    found = os.stat(path)
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == mode
    assert group is None or found.st_gid == group
    assert control.workers() == []
    await control.close()
    assert os.listdir(tmp_path) == []
    await control.close()


@pytest.mark.parametrize("fails", [True, False])
@in_loop
async def test_admins_are_let_in_by_a_list_and_without_one_root_alone(
    tmp_path: Path, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        admitted: list[Any] = []

        def admit(path: str, group: int) -> None:
            admitted.append((path, group))
            if fails:
                raise OSError(95, "Operation not supported")

        monkeypatch.setattr(module, "admit_group", admit)
        path = str(tmp_path / "control")
        control = control_of(admins=7)
        await control.listen(path, None)
        assert admitted == [(path, 7)]
        assert any("only root may give orders" in line for line in caplog.messages) is fails
        await control.close()
        control = control_of()
        await control.listen(path, None)
        assert len(admitted) == 1
        await control.close()


@in_loop
async def test_a_socket_that_is_replaced_is_made_again_and_one_that_cannot_be_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        control, bound = control_of(), asyncio.Queue[str]()
        bind = control._bind
        failures = [OSError(13, "Permission denied")]

        async def again(path: str, group: int | None) -> None:
            if caplog.messages and failures:
                raise failures.pop()
            await bind(path, group)
            bound.put_nowait(path)

        monkeypatch.setattr(control, "_bind", again)
        path = str(tmp_path / "control")
        await control.listen(path, None, look_secs=0.001)
        assert await bound.get() == path
        os.unlink(path)
        assert await bound.get() == path
        assert stat.S_ISSOCK(os.stat(path).st_mode)
        assert sum("was removed or replaced" in line for line in caplog.messages) == 1
        assert sum("cannot make the control socket" in line for line in caplog.messages) == 1
        await control.close()


@in_loop
async def test_it_is_looked_for_again_and_again(tmp_path: Path) -> None:
    path, looks, stat_of = str(tmp_path / "control"), asyncio.Queue[str](), os.stat

    def look(file: Any, **settings: Any) -> os.stat_result:
        found = stat_of(file, **settings)
        if file == path:
            looks.put_nowait(file)
        return found

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "stat", look)
        control = control_of()
        await control.listen(path, None, look_secs=0.001)
        for _ in range(4):
            await looks.get()
        await control.close()


@in_loop
async def test_one_end_of_a_pair_takes_lines_as_long_as_the_file_does() -> None:
    """asyncio's own limit is 64 KiB; a gateway's answer about its requests may be longer."""
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async def ask(asked: Ask, *_: Any) -> int:
        heard.put_nowait(asked)
        return len(asked.args["text"])

    control = ControlSocket(post=lambda _: None, ask=ask, catalog=Catalog)
    ours, theirs = socket.socketpair()
    await control.join(ours)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    text = "x" * (MAX_LINE - 1000)
    writer.write(Hello(role="cli").encode() + Ask(1, "do", {"text": text}).encode())
    answer = decode(await reader.readline())
    assert isinstance(answer, Answer)
    assert answer.result == len(text)
    assert heard.get_nowait().args["text"] == text
    writer.close()
    await control.close()


@in_loop
async def test_every_end_of_an_ask_is_told_and_its_progress_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends: dict[str, Exception] = {
        "refused": Refused(Reason.NOT_FOUND, "there is none", retry_after=2.5),
        "failed": LlmuxError("cannot do it", hint="ask again"),
        "broken": RuntimeError("can't start new thread"),
        "mute": ValueError(),
    }

    async def ask(asked: Ask, report: Any) -> str:
        report("sleep", 1.5, 2, 3)
        if asked.verb in ends:
            raise ends[asked.verb]
        return "done"

    control = ControlSocket(post=lambda _: None, ask=ask, catalog=Catalog)
    ours, theirs = socket.socketpair()
    await control.join(ours)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    writer.write(Hello(role="cli").encode())
    words: list[tuple[Any, ...]] = [
        ("well", True, "done", None, None, None),
        ("refused", False, None, "not_found", "there is none", 2.5),
        ("failed", False, None, "internal_error", "cannot do it (ask again)", None),
        ("broken", False, None, "internal_error",
         "cannot broken: internal error: can't start new thread", None),
        ("mute", False, None, "internal_error", "cannot mute: internal error: ValueError", None),
    ]  # fmt: skip
    for number, (verb, *answer) in enumerate(words, 7):
        writer.write(Ask(number, verb).encode())
        assert decode(await reader.readline()) == Progress(number, "sleep", 1.5, 2, 3)
        assert decode(await reader.readline()) == Answer(number, *answer)
    assert caplog.messages == ["cannot answer broken", "cannot answer mute"]
    writer.close()
    await control.close()


@in_loop
async def test_what_cannot_be_encoded_ends_no_one(caplog: pytest.LogCaptureFixture) -> None:
    """A number of 4301 digits, from a damaged file, ended the supervisor with each transition."""
    watchers = Watchers()

    async def ask(asked: Ask, *_: Any) -> object:
        return 10**4301 if asked.verb == "huge" else "well"

    control = ControlSocket(post=lambda _: None, ask=ask, catalog=Catalog, watchers=watchers)
    ours, theirs = socket.socketpair()
    await control.join(ours)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    writer.write(Hello(role="cli").encode() + Watch("events").encode() + Ask(1, "huge").encode())
    refused = decode(await reader.readline())
    assert isinstance(refused, Answer)
    assert (refused.id, refused.ok, refused.code) == (1, False, "internal_error")
    assert (refused.message or "").startswith("the answer cannot be encoded: ")
    watchers.publish("events", "", {"id": 10**4301})
    watchers.publish("events", "", {"id": 2})
    assert decode(await reader.readline()) == News("events", "", {"id": 2})
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "cannot send a message of kind answer", "cannot send a message of kind news",
    ]  # fmt: skip
    writer.close()
    await control.close()


@in_loop
async def test_a_directory_in_the_sockets_place_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "control"
    (path / "x").mkdir(parents=True)
    control = control_of()
    with pytest.raises(IsADirectoryError):  # a path that somebody named, by mistake
        await control.listen(str(path), None)
    await control.listen(str(path), None, ours=True)
    assert stat.S_ISSOCK(path.stat().st_mode)
    (aside,) = tmp_path.glob("control.aside-*/x")  # noqa: ASYNC240
    assert caplog.messages == [
        f"a directory was in the place of the control socket: it is now {aside.parent}"
    ]
    await control.close()


@in_loop
async def test_a_socket_that_cannot_be_made_again_is_said_once_until_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "control"
    path.parent.mkdir()
    control = control_of()
    await control.listen(str(path), None, look_secs=0.001)
    path.unlink()
    path.parent.rmdir()
    tried = asyncio.Event()
    loop = asyncio.get_running_loop()
    caplog.set_level("ERROR")
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += bool(caplog.messages)
        tried.set() if turns > 20 else loop.call_later(0.002, turn)

    turn()
    await asyncio.wait_for(tried.wait(), 60)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"cannot make the control socket {path} again: ")
    await control.close()
