"""The CUDA helper as a process: greeting, several calls at once, and nothing cuts one short."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_libcuda"))

from fake_cuda import COMPILER, FakeCuda

from llmux.drivers.cuda import driver
from llmux.drivers.cuda.calls import CudaCallError, CudaCallTimeout
from llmux.drivers.cuda.cuda_helper import CALLS, Library, Server
from llmux.drivers.cuda.driver import HELPER, Helper, HelperCalls, greeting_problem
from llmux.errors import Unsupported

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the fake libcuda.so.1")


class Client:
    def __init__(self, library: Path) -> None:
        argv = [sys.executable, "-I", str(HELPER), "--library", str(library)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.greeting = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def ask(self, number: int, operation: str, pid: int) -> None:
        assert self.process.stdin is not None
        request = {"id": number, "op": operation, "pid": pid, "timeout_ms": 10}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> int:
        with self.process as process:
            return process.wait(20)


@pytest.fixture
def fake(tmp_path: Path) -> FakeCuda:
    fake = FakeCuda(tmp_path)
    fake.add(101)
    fake.add(102)
    return fake


def test_greets_answers_and_leaves_at_the_end_of_input(fake: FakeCuda) -> None:
    client = Client(fake.library)
    assert client.greeting["driver_version"] == 13000
    assert client.greeting["code"] == 0
    client.ask(1, "lock", 101)
    assert client.answer() == {"id": 1, "code": 0}
    client.ask(2, "state", 101)
    assert client.answer() == {"id": 2, "code": 0, "value": 1}
    client.ask(3, "restore", 101)
    assert client.answer()["name"] == "CUDA_ERROR_ILLEGAL_STATE"
    client.hang_up()
    assert client.end() == 0


def test_what_the_driver_says_is_handed_on_in_its_words(fake: FakeCuda) -> None:
    library = Library(str(fake.library))
    assert library.usable
    assert library.greeting() == {
        "hello": 1, "pid": os.getpid(), "driver_version": 13000, "missing": [], "problem": None,
        "code": 0,
    }  # fmt: skip
    assert library.describe(2) == {
        "code": 2, "name": "CUDA_ERROR_OUT_OF_MEMORY", "text": "out of memory",
    }  # fmt: skip
    unknown = {"code": 4242, "name": "CUDA_ERROR_4242", "text": "unknown error"}
    assert library.describe(4242) == unknown
    assert library.call("restore_tid", 102, 0) == {"code": 0, "value": 102}
    for operation, state in (("lock", 1), ("checkpoint", 2), ("restore", 1), ("unlock", 0)):
        assert library.call(operation, 101, 10) == {"code": 0}
        assert library.call("state", 101, 10) == {"code": 0, "value": state}
    fake.fault("lock", "fail 4242", 102)
    assert library.call("lock", 102, 10) == unknown


@pytest.mark.parametrize(
    ("define", "code", "missing"),
    [("BEFORE_570", 0, list(CALLS.values())), ("WITHOUT_RESTORE", 0, [CALLS["restore"]]),
     ("", 999, [])],
)  # fmt: skip
def test_a_driver_without_a_function_or_that_does_not_start_is_not_used(
    tmp_path: Path, define: str, code: int, missing: list[str]
) -> None:
    fake = FakeCuda(tmp_path, *filter(None, [define]))
    fake.fault("cuInit", "fail 999")
    library = Library(str(fake.library))
    greeting = library.greeting()
    assert (greeting["code"], greeting["missing"], greeting["problem"]) == (code, missing, None)
    assert (greeting["driver_version"], library.usable) == (13000, False)


def test_what_the_library_prints_is_not_among_the_answers(fake: FakeCuda) -> None:
    script = f"""if True:
        import os, sys
        sys.path.insert(0, {str(HELPER.parent)!r})
        import cuda_helper
        def noisy(path):
            os.write(1, b"noise")
            return cuda_helper.Library(path)
        sys.exit(cuda_helper.main(noisy))
    """
    argv = [sys.executable, "-I", "-c", script, "--library", str(fake.library)]
    ran = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert json.loads(ran.stdout)["hello"] == 1
    assert ran.stderr == b"noise"


def test_requests_are_answered_until_input_ends_or_a_signal_comes(fake: FakeCuda) -> None:
    library = Library(str(fake.library))
    request = b'{"id": %d, "op": "%s", "pid": 101}\n'
    asked = request % (1, b"state") + request % (2, b"restore_tid") + b'{"id": 3'
    for signalled in (False, True):
        with contextlib.ExitStack() as stack:
            source, write = socket.socketpair()
            stop, signal_end = socket.socketpair()
            for end in (source, write, stop, signal_end):
                stack.enter_context(end)
            answers = io.BytesIO()
            write.sendall(asked)
            if signalled:
                signal_end.send(b"x")
            else:
                write.shutdown(socket.SHUT_WR)
            Server(library, source.fileno(), stop.fileno(), answers).serve()
        found = sorted(answers.getvalue().splitlines())
        want = [b'{"id":1,"code":0,"value":0}', b'{"id":2,"code":0,"value":101}']
        assert found == ([] if signalled else want)


def test_a_library_that_cannot_be_used_is_greeted_and_left(tmp_path: Path) -> None:
    client = Client(tmp_path / "libnothing.so.1")
    assert client.greeting["problem"].startswith(f"cannot load {tmp_path}/libnothing.so.1: ")
    assert client.end() == 1


def test_a_hung_call_does_not_hold_up_another(fake: FakeCuda) -> None:
    fifo = fake.fault("lock", "hang", 101)
    client = Client(fake.library)
    client.ask(1, "lock", 101)
    with fifo.open("wb"):  # opens only once the call is inside
        client.ask(2, "lock", 102)
        assert client.answer() == {"id": 2, "code": 0}
    assert client.answer() == {"id": 1, "code": 0}
    client.hang_up()
    assert client.end() == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, None])
def test_nothing_but_the_driver_ends_a_call(fake: FakeCuda, end: signal.Signals | None) -> None:
    fake.add(101, 1)
    fifo = fake.fault("checkpoint", "hang", 101)
    client = Client(fake.library)
    client.ask(1, "checkpoint", 101)
    with fifo.open("wb"):
        if end is None:
            client.hang_up()
        else:
            client.process.send_signal(end)
    assert client.answer() == {"id": 1, "code": 0}
    assert client.end() == 0
    assert fake.state(101) == 2


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_is_neither_lost_nor_a_failure(
    fake: FakeCuda, end: signal.Signals
) -> None:
    for asked in [False, True] * 4:
        client = Client(fake.library)
        if asked:
            client.ask(1, "state", 101)
        client.process.send_signal(end)
        assert client.end() == 0


def test_finishes_the_call_although_its_reader_is_gone(fake: FakeCuda) -> None:
    fake.add(101, 1)
    fifo = fake.fault("checkpoint", "hang", 101)
    client = Client(fake.library)
    client.ask(1, "checkpoint", 101)
    with fifo.open("wb"):
        client.hang_up()
        assert client.process.stdout is not None
        client.process.stdout.close()
    assert client.end() == 0
    assert fake.state(101) == 2


def test_closing_the_driver_leaves_a_busy_helper_to_finish(fake: FakeCuda) -> None:
    fake.add(101, 1)
    fifo = fake.fault("checkpoint", "hang", 101)

    async def main() -> None:
        calls = HelperCalls(str(fake.library), close_secs=0.0)
        with pytest.raises(CudaCallTimeout):
            await calls.call("checkpoint", 101, 0.0, on_late=lambda: None)
        await calls.close()

    asyncio.run(main())
    fake.release(fifo)
    fake.wait_for_state(101, 2)


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        ({"code": 0}, None),
        ({"problem": "cannot load it"}, "cannot load it"),
        ({"missing": ["cuInit"], "driver_version": 11080}, "(CUDA 11.8) lacks cuInit"),
        ({"missing": ["cuInit"]}, "(unknown CUDA version) lacks cuInit"),
        ({"code": 100, "name": "N", "text": "no device"}, "no device (N)"),
    ],
)
def test_a_greeting_says_what_is_wrong(greeting: dict[str, Any], words: str | None) -> None:
    problem = greeting_problem(greeting, "libcuda.so.1")
    assert (problem is None) if words is None else (problem is not None and words in problem[0])


def test_a_ctrl_c_in_a_terminal_does_not_reach_a_helper(fake: FakeCuda) -> None:
    """It goes to all processes of the terminal's session; a call that is cut harms the engine."""

    async def main() -> None:
        helper = await Helper.start(str(fake.library), {})
        try:
            assert os.getsid(helper.pid) == helper.pid
        finally:
            assert await helper.leave(60.0)

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(1, 4))
def test_a_start_that_is_cancelled_at_any_point_forgets_no_child(
    fake: FakeCuda, turns: int
) -> None:
    """A Popen that is collected before its child was seen to end warns, which is an error here."""

    async def main() -> None:
        starting = asyncio.create_task(Helper.start(str(fake.library), {}))
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(main())
    gc.collect()


def test_a_library_that_is_not_there_is_the_problem_and_not_each_of_its_functions() -> None:
    library = Library("libnothing.so.1")
    assert library.problem is not None
    assert library.problem.startswith("cannot load libnothing.so.1: ")
    assert (library.missing, library.driver_version) == ([], 0)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("", "the CUDA helper ended without a word"),
        ("print('no json', flush=True)", "the CUDA helper ended without a word"),
        ("import sys; sys.stdin.read()", "the CUDA helper said nothing for 0 s"),
    ],
)
def test_a_helper_without_a_greeting_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    (tmp_path / "helper.py").write_text(script)
    monkeypatch.setattr(driver, "HELPER", tmp_path / "helper.py")
    if "nothing" in said:
        monkeypatch.setattr(driver, "START_SECS", 0.01)

    async def main() -> None:
        calls = HelperCalls("libcuda.so.1", close_secs=60.0)
        with pytest.raises(Unsupported, match=said):
            await calls.ready()
        (unfit,) = calls._retired
        assert unfit._reading is not None
        async with asyncio.timeout(60):
            await unfit._reading  # it was told to leave
        with pytest.raises(CudaCallError, match=said) as raised:
            await calls.call("lock", 101, 1.0, on_late=lambda: None)
        assert (raised.value.operation, raised.value.pid, raised.value.code) == ("lock", 101, None)
        await calls.close()

    asyncio.run(main())


def test_a_helper_that_ended_takes_no_call_and_is_replaced(fake: FakeCuda) -> None:
    async def main() -> None:
        helper = await Helper.start(str(fake.library), {})
        assert (await helper.send("state", 101, 0))["value"] == 0
        os.kill(helper.pid, signal.SIGKILL)
        # It has ended, and the loop does not know yet: the request finds nobody.
        os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222  # so it is meant
        async with asyncio.timeout(20):
            with pytest.raises(EOFError, match="the CUDA helper ended"):
                await helper.send("state", 101, 0)
        assert await helper.leave(60.0)
        assert (helper.alive, helper.ended) == (False, True)
        with pytest.raises(EOFError, match="the CUDA helper has ended"):
            await helper.send("state", 101, 0)
        calls = HelperCalls(str(fake.library), close_secs=60.0)
        await calls.ready()
        first = calls._current
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        assert await first.leave(60.0)
        assert await calls.call("state", 101, 60.0, on_late=lambda: None) == 0
        assert calls._current is not first
        assert calls._retired == [first]
        await calls.ready()
        assert calls._retired == [], "it has ended"
        await calls.close()

    asyncio.run(main())
