"""Suspend and resume over the real ctypes code and a fake libcuda.so.1, and over a fake tool.

Every step is made to fail, to hang and to lose its caller; after each of these nothing is left
half-way that could be put right, and the error names what could not.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_libcuda"))

from fake_cuda import COMPILER, FakeCuda

from llmux.drivers.cuda.calls import CudaCalls, ProcessTable
from llmux.drivers.cuda.driver import CudaDriver, HelperCalls
from llmux.drivers.cuda.sequence import CudaSequence
from llmux.drivers.cuda.tool import CudaCheckpointTool, ToolCalls
from llmux.errors import (
    Blame,
    CheckpointFailed,
    DriverError,
    DriverTimeout,
    TreeState,
    Unsupported,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the fake libcuda.so.1")

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
LONG = 30.0
SHORT = 0.02  # for the one call that never answers by itself; all others get LONG
SUSPEND_STEPS = ("lock", "checkpoint")
RESUME_STEPS = ("restore", "unlock")
ALL_STEPS = ("restore_tid", "state", *SUSPEND_STEPS, *RESUME_STEPS)


@pytest.fixture
def fake(tmp_path: Path) -> FakeCuda:
    fake = FakeCuda(tmp_path)
    fake.add(100, None)  # the API server: no CUDA
    fake.add(101)
    fake.add(102)
    return fake


@pytest.fixture(params=["library", "tool"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Impatient:
    """Calls as they are, but the first one of each of these is waited for only a moment."""

    def __init__(self, calls: CudaCalls, bounds: Mapping[tuple[str, int], float]) -> None:
        self._calls = calls
        self._bounds = dict(bounds)
        self.ready = calls.ready
        self.close = calls.close

    async def call(
        self,
        operation: str,
        pid: int,
        timeout: float,
        *,
        on_late: Callable[[], None],
        lock_ms: int = 0,
    ) -> int:
        timeout = self._bounds.pop((operation, pid), timeout)
        return await self._calls.call(operation, pid, timeout, on_late=on_late, lock_ms=lock_ms)


@asynccontextmanager
async def driver(
    fake: FakeCuda,
    kind: str = "library",
    hung: tuple[str, int] | None = None,
    bounded: Mapping[tuple[str, int], float] = MappingProxyType({}),
) -> AsyncIterator[CudaSequence]:
    calls: CudaCalls
    if kind == "library":
        calls = HelperCalls(str(fake.library), close_secs=LONG)
    else:
        calls = ToolCalls(str(fake.tool))
    if hung or bounded:
        calls = Impatient(calls, {hung: SHORT} if hung else bounded)
    made = CudaSequence(calls, processes=ProcessTable(fake.proc))
    try:
        yield made
    finally:
        await made.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


async def failing(awaitable: Awaitable[object]) -> DriverError:
    with pytest.raises(DriverError) as caught:
        await awaitable
    return caught.value


async def refused(awaitable: Awaitable[object]) -> bool:
    try:
        await awaitable
    except CheckpointFailed:
        return True
    return False


def test_two_processes_go_and_come_back_locked_together_and_restored_together(
    fake: FakeCuda, kind: str
) -> None:
    async def main() -> None:
        async with driver(fake, kind) as cuda:
            assert list(await cuda.suspend([102, 100, 101], LONG)) == [101, 102]
            assert (fake.state(101), fake.state(102)) == (CHECKPOINTED, CHECKPOINTED)
            await cuda.resume([101, 102], LONG)
            assert (fake.state(101), fake.state(102)) == (RUNNING, RUNNING)

    run(main)
    order = [call for call, _ in fake.log()]
    pairs = [order[i : i + 2] for i in range(0, 8, 2)]
    assert pairs == [[call] * 2 for call in ("lock", "checkpoint", "restore", "unlock")]


def test_doing_it_twice_does_not_toggle(fake: FakeCuda, kind: str) -> None:
    async def main() -> None:
        async with driver(fake, kind) as cuda:
            await cuda.suspend([101], LONG)
            assert list(await cuda.suspend([101], LONG)) == [101]
            assert fake.state(101) == CHECKPOINTED
            await cuda.resume([101], LONG)
            await cuda.resume([101], LONG)
            assert fake.state(101) == RUNNING

    run(main)
    assert len(fake.log()) == 4


@pytest.mark.parametrize("state", [RUNNING, LOCKED, CHECKPOINTED, FAILED])
def test_it_says_who_is_suspended_and_changes_nothing(
    fake: FakeCuda, kind: str, state: int
) -> None:
    async def main() -> None:
        fake.add(101, state)
        async with driver(fake, kind) as cuda:
            suspended = list(await cuda.suspended([100, 101, 102], LONG))
            assert suspended == ([] if state == RUNNING else [101])

    run(main)
    assert fake.log() == []
    assert fake.state(101) == state


def test_no_cuda_process_means_nothing_to_do(fake: FakeCuda, kind: str) -> None:
    async def main() -> None:
        async with driver(fake, kind) as cuda:
            assert list(await cuda.suspend([100], LONG)) == []
            assert list(await cuda.suspend([], LONG)) == []
            await cuda.resume([100], LONG)

    run(main)
    assert fake.log() == []


@pytest.mark.parametrize("first", [RUNNING, LOCKED, CHECKPOINTED])
@pytest.mark.parametrize("second", [RUNNING, LOCKED, CHECKPOINTED])
def test_mixed_states_reach_the_goal_from_anywhere(fake: FakeCuda, first: int, second: int) -> None:
    async def main() -> None:
        async with driver(fake) as cuda:
            for goal, act in ((CHECKPOINTED, cuda.suspend), (RUNNING, cuda.resume)):
                fake.add(101, first)
                fake.add(102, second)
                await act([101, 102], LONG)
                assert (fake.state(101), fake.state(102)) == (goal, goal)

    run(main)


@pytest.mark.parametrize("verb", ["suspend", "resume"])
def test_a_failed_process_is_named_and_nothing_is_tried(fake: FakeCuda, verb: str) -> None:
    fake.add(102, FAILED)

    async def main() -> None:
        async with driver(fake) as cuda:
            error = await failing(getattr(cuda, verb)([101, 102], LONG))
            assert isinstance(error, CheckpointFailed)
            assert error.fields["pids"] == [102]
            assert "kill the model" in str(error)

    run(main)
    assert fake.log() == []


@pytest.mark.parametrize("code", [2, 304, 401, 600, 801, 999])
@pytest.mark.parametrize("step", SUSPEND_STEPS)
def test_a_failing_suspend_leaves_both_running(fake: FakeCuda, step: str, code: int) -> None:
    fake.fault(step, f"fail {code}", 102)

    async def main() -> None:
        async with driver(fake) as cuda:
            error = await failing(cuda.suspend([101, 102], LONG))
            assert isinstance(error, CheckpointFailed)
            assert f"{step} of process 102" in str(error)
            assert str(code) in str(error)
            assert (fake.state(101), fake.state(102)) == (RUNNING, RUNNING)
            fake.heal()
            assert list(await cuda.suspend([101, 102], LONG)) == [101, 102]

    run(main)


@pytest.mark.parametrize("step", SUSPEND_STEPS)
def test_a_failing_suspend_with_the_tool_leaves_both_running(fake: FakeCuda, step: str) -> None:
    fake.fault(step, "fail 600", 102)

    async def main() -> None:
        async with driver(fake, "tool") as cuda:
            error = await failing(cuda.suspend([101, 102], LONG))
            assert "device not ready" in str(error)
            assert "was the engine drained?" in str(error)
            assert (fake.state(101), fake.state(102)) == (RUNNING, RUNNING)

    run(main)


@pytest.mark.parametrize("step", SUSPEND_STEPS)
def test_a_process_that_ends_up_failed_is_named_and_the_other_put_back(
    fake: FakeCuda, step: str
) -> None:
    fake.fault(step, "fail 999 3", 102)

    async def main() -> None:
        async with driver(fake) as cuda:
            error = await failing(cuda.suspend([101, 102], LONG))
            assert "process 102 is now failed" in str(error)
            assert fake.state(101) == RUNNING

    run(main)


@pytest.mark.parametrize("step", SUSPEND_STEPS)
def test_a_driver_that_lies_is_found_out(fake: FakeCuda, step: str) -> None:
    fake.fault(step, "lie", 102)

    async def main() -> None:
        async with driver(fake) as cuda:
            await failing(cuda.suspend([101, 102], LONG))
            assert (fake.state(101), fake.state(102)) == (RUNNING, RUNNING)

    run(main)


@pytest.mark.parametrize("step", RESUME_STEPS)
def test_a_failing_resume_says_where_each_stands_and_can_be_repeated(
    fake: FakeCuda, kind: str, step: str
) -> None:
    fake.add(101, CHECKPOINTED)
    fake.add(102, CHECKPOINTED)
    fake.fault(step, "fail 999", 102)

    async def main() -> None:
        async with driver(fake, kind) as cuda:
            error = await failing(cuda.resume([101, 102], LONG))
            assert "unknown error" in str(error)
            left = "checkpointed" if step == "restore" else "locked"
            assert f"process 102 is now {left}" in str(error)
            fake.heal()
            await cuda.resume([101, 102], LONG)
            assert (fake.state(101), fake.state(102)) == (RUNNING, RUNNING)

    run(main)


def test_none_is_unlocked_unless_all_were_restored(fake: FakeCuda) -> None:
    fake.add(101, CHECKPOINTED)
    fake.add(102, CHECKPOINTED)
    fake.fault("restore", "fail 2", 102)

    async def main() -> None:
        async with driver(fake) as cuda:
            await failing(cuda.resume([101, 102], LONG))

    run(main)
    assert (fake.state(101), fake.state(102)) == (LOCKED, CHECKPOINTED)


@pytest.mark.parametrize("step", RESUME_STEPS)
@pytest.mark.parametrize("hung", [101, 102])
def test_a_hanging_resume_says_where_the_others_stand(
    fake: FakeCuda, kind: str, step: str, hung: int
) -> None:
    for pid in (101, 102):
        fake.add(pid, CHECKPOINTED)
    fifo = fake.fault(step, "hang", hung)

    async def main() -> None:
        async with driver(fake, kind, (step, hung)) as cuda:
            error = await failing(cuda.resume([101, 102], LONG))
            await asyncio.to_thread(fake.release, fifo)
            where = "(running|locked|checkpointed)"
            assert re.search(f"process {203 - hung} is now {where}", str(error))
            assert f"process {hung} is now" not in str(error), "it would be asked, and wait again"

    run(main)


@pytest.mark.parametrize("step", ALL_STEPS)
def test_a_hanging_call_ends_at_the_deadline_and_blocks_nobody_else(
    fake: FakeCuda, kind: str, step: str
) -> None:
    """The helper (or tool) goes on; the process is refused until the late answer has come."""
    waking = step in RESUME_STEPS
    fake.add(101, CHECKPOINTED if waking else RUNNING)
    fake.add(102, CHECKPOINTED if waking else RUNNING)
    fifo = fake.fault(step, "hang", 102)

    async def main() -> None:
        async with driver(fake, kind, (step, 102)) as cuda:
            act = cuda.resume if waking else cuda.suspend
            error = await failing(act([101, 102], LONG))
            assert isinstance(error, DriverTimeout)
            assert f"{step} of process 102" in str(error)
            if step in SUSPEND_STEPS:
                assert fake.state(101) == RUNNING
            # Still out: refused at once, by name, while others are served.
            again = await failing(act([102], LONG))
            assert isinstance(again, CheckpointFailed)
            assert f"{step} of process 102" in str(again)
            fake.add(103)
            assert list(await cuda.suspend([103], LONG)) == [103]
            # The late answer comes: the process may be touched again and the goal is reached.
            await asyncio.to_thread(fake.release, fifo)
            fake.heal()
            async with asyncio.timeout(LONG):
                while True:
                    try:
                        await act([101, 102], LONG)
                    except CheckpointFailed as error:
                        assert "has not ended" in str(error)
                        await asyncio.to_thread(lambda: None)  # lets the answer be read
                    else:
                        break
            goal = RUNNING if waking else CHECKPOINTED
            assert (fake.state(101), fake.state(102)) == (goal, goal)

    run(main)


def test_a_pid_used_again_by_another_process_is_not_tainted(fake: FakeCuda) -> None:
    fifo = fake.fault("checkpoint", "hang", 102)

    async def main() -> None:
        async with driver(fake, hung=("checkpoint", 102)) as cuda:
            await failing(cuda.suspend([102], LONG))
            fake.heal()
            fake.end(102)
            fake.add(102, ticks=2)
            assert list(await cuda.suspend([102], LONG)) == [102]
            fake.add(102, LOCKED, ticks=2)
            await asyncio.to_thread(fake.release, fifo)

    run(main)


@pytest.mark.parametrize("step", ALL_STEPS)
def test_a_helper_that_dies_in_the_call_is_replaced(fake: FakeCuda, step: str) -> None:
    waking = step in RESUME_STEPS
    fake.add(101, CHECKPOINTED if waking else RUNNING)
    fake.add(102, CHECKPOINTED if waking else RUNNING)
    fake.fault(step, "die", 102)

    async def main() -> None:
        async with driver(fake) as cuda:
            act = cuda.resume if waking else cuda.suspend
            error = await failing(act([101, 102], LONG))
            assert "the CUDA helper ended (status 70) during the call" in str(error)
            fake.heal()
            await act([101, 102], LONG)
            goal = RUNNING if waking else CHECKPOINTED
            assert (fake.state(101), fake.state(102)) == (goal, goal)

    run(main)


def test_a_cancelled_caller_does_not_interrupt_the_call(fake: FakeCuda) -> None:
    fifo = fake.fault("checkpoint", "hang", 101)

    async def main() -> None:
        async with driver(fake) as cuda:
            task = asyncio.create_task(cuda.suspend([101], LONG))
            # Returns when the call has opened its end: it is inside the driver now.
            opened = await asyncio.to_thread(fifo.open, "wb")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            again = await failing(cuda.resume([101], LONG))
            assert "checkpoint of process 101" in str(again)
            opened.close()

    run(main)
    assert ("checkpoint", 101) in fake.log()


def test_a_vanished_process_is_skipped_by_suspend_and_refused_by_resume(fake: FakeCuda) -> None:
    async def main() -> None:
        async with driver(fake) as cuda:
            assert list(await cuda.suspend([101, 4242], LONG)) == [101]
            error = await failing(cuda.resume([101, 4242], LONG))
            assert "process 4242: no such process" in str(error)

    run(main)


@pytest.mark.parametrize("maps", ["", "7f00-7f01 rw-s 00000000 00:06 1 /dev/nvidia0\n"])
def test_an_ambiguous_answer_counts_only_for_a_process_that_maps_a_gpu(
    fake: FakeCuda, maps: str
) -> None:
    fake.add(102, maps=maps)
    fake.fault("restore_tid", "fail 304", 102)

    async def main() -> None:
        async with driver(fake) as cuda:
            if not maps:
                assert list(await cuda.suspend([101, 102], LONG)) == [101]
                return
            error = await failing(cuda.suspend([101, 102], LONG))
            assert "must run as root" in str(error)

    run(main)


@pytest.mark.parametrize(
    ("define", "missing"),
    [("WITHOUT_RESTORE", ["cuCheckpointProcessRestore"]), ("BEFORE_570", ["Lock", "GetState"])],
)
def test_missing_functions_are_named(tmp_path: Path, define: str, missing: list[str]) -> None:
    fake = FakeCuda(tmp_path, define)
    fake.set_version(12040)

    async def main() -> None:
        async with driver(fake) as cuda:
            error = await failing(cuda.suspend([1], LONG))
            assert isinstance(error, Unsupported)
            assert "(CUDA 12.4) lacks" in str(error)
            assert "driver >= 570" in str(error)
            assert all(name in str(error) for name in missing)

    run(main)


def test_a_driver_that_does_not_start_is_left_alone_and_tried_again(fake: FakeCuda) -> None:
    fifo = fake.fault("cuInit", "hang")

    async def main() -> None:
        async with driver(fake) as cuda:
            error = await failing(cuda.suspend([101], SHORT))
            assert isinstance(error, DriverTimeout)
            assert "nothing was changed" in str(error)
            await asyncio.to_thread(fake.release, fifo)
            fake.heal()
            assert list(await cuda.suspend([101], LONG)) == [101]

    run(main)


def test_no_driver_and_no_gpu_and_no_tool_are_told_apart(fake: FakeCuda) -> None:
    async def main() -> None:
        for cuda, words in (
            (CudaDriver("/nonexistent/libcuda.so.1"), "cannot load /nonexistent/libcuda.so.1"),
            (CudaDriver(str(fake.library)), "no CUDA-capable device is detected"),
            (CudaCheckpointTool("/nonexistent/cuda-checkpoint"), "no such program"),
        ):
            fake.fault("cuInit", "fail 100")
            error = await failing(cuda.suspend([101], LONG))
            assert isinstance(error, Unsupported)
            assert words in str(error)
            await cuda.close()

    run(main)


# ---- what real drivers do (modes of the fake library) -------------------------------------------


def test_a_lock_that_answers_not_initialized_means_no_cuda_state(fake: FakeCuda, kind: str) -> None:
    """cuInit without a context: Triton and flash-attn do that in the API server."""
    fake.mode("cuinit_only", 101)

    async def main() -> None:
        async with driver(fake, kind) as cuda:
            assert list(await cuda.suspend([101, 102], LONG)) == [102]
            assert (fake.state(101), fake.state(102)) == (RUNNING, CHECKPOINTED)

    run(main)


def test_a_process_that_only_asked_nvml_has_none(fake: FakeCuda, kind: str) -> None:
    fake.mode("nvml_only", 101)

    async def main() -> None:
        async with driver(fake, kind) as cuda:
            assert list(await cuda.suspendable([101, 102], LONG)) == [102]
            assert list(await cuda.suspend([101, 102], LONG)) == [102]

    run(main)
    assert [pid for _, pid in fake.log()] == [102, 102]


def test_out_of_memory_in_a_restore_is_final_and_not_tried_again(fake: FakeCuda, kind: str) -> None:
    async def main() -> None:
        async with driver(fake, kind) as cuda:
            await cuda.suspend([101], LONG)
            fake.mode("final_oom", 101)
            error = await failing(cuda.resume([101], LONG))
            assert isinstance(error, CheckpointFailed)
            assert (error.tree, error.blame) == (TreeState.BROKEN, Blame.HOST)
            calls = len(fake.log())
            again = await failing(cuda.resume([101], LONG))
            assert "ran out of GPU memory in an earlier restore, which is final" in str(again)
            assert len(fake.log()) == calls, "the driver is not asked again"
            fake.add(101, CHECKPOINTED, ticks=2)  # another process by that pid
            fake.mode("ready", 101)
            await cuda.resume([101], LONG)

    run(main)


def test_a_lock_that_kills_its_process_is_not_called_a_lack_of_rights(
    fake: FakeCuda, kind: str
) -> None:
    fake.mode("lock_kills", 102)

    async def main() -> None:
        async with driver(fake, kind) as cuda:
            error = await failing(cuda.suspend([101, 102], LONG))
            assert isinstance(error, CheckpointFailed)
            assert error.tree is TreeState.BROKEN
            assert "process 102 died in the call" in str(error)
            assert "root" not in (error.hint or "")
            assert fake.state(101) == RUNNING, "the other one was unlocked"

    run(main)


@pytest.mark.parametrize("state", [RUNNING, CHECKPOINTED])
def test_a_busy_process_is_waited_for(fake: FakeCuda, kind: str, state: int) -> None:
    """A call that a former supervisor left to finish; states 4 and 5 of CUDA 13.4."""
    fake.add(101, state)
    fake.mode("busy", 101)

    async def main() -> None:
        async with driver(fake, kind) as cuda:
            assert list(await cuda.suspended([101], LONG)) == [101]
            fake.mode("busy", 101)
            assert list(await cuda.suspend([101], LONG)) == [101]
            assert fake.state(101) == CHECKPOINTED

    run(main)


def test_calls_that_wait_for_another_lock_end_at_the_deadline_and_are_undone(
    fake: FakeCuda,
) -> None:
    """cuda-checkpoint#30: with NCCL any call on B waits while A is locked."""
    fake.mode("one_at_a_time")

    async def main() -> None:
        async with driver(fake, bounded={("lock", 101): 1.0, ("lock", 102): 1.0}) as cuda:
            error = await failing(cuda.suspend([101, 102], LONG))
            assert isinstance(error, DriverTimeout), error
            assert {fake.state(101), fake.state(102)} != {LOCKED}
            late = error.fields["pids"]
            assert set(late) <= {101, 102}, late
            assert late
            fake.mode("plain")  # whichever waits still may end

    run(main)


def test_the_process_that_another_ones_lock_waits_for_runs_again(fake: FakeCuda) -> None:
    fake.mode("one_at_a_time")
    fake.add(101, LOCKED)

    async def main() -> None:
        async with driver(fake, hung=("lock", 102)) as cuda:
            error = await failing(cuda.suspend([101, 102], LONG))
            assert isinstance(error, DriverTimeout), error
            assert error.fields["pids"] == [102]
            assert fake.state(101) == RUNNING
            # What it waited for is gone: the late lock ends, and a later call is not refused.
            await asyncio.to_thread(fake.wait_for_state, 102, LOCKED)
            async with asyncio.timeout(LONG):
                while await refused(cuda.resume([102], LONG)):
                    await asyncio.to_thread(lambda: None)
            assert fake.state(102) == RUNNING

    run(main)
    assert [call for call in fake.log() if call[1] == 101] == [("unlock", 101)]


def test_one_that_dies_restored_and_running_is_recorded_as_a_hung_host(fake: FakeCuda) -> None:
    async def main() -> None:
        async with driver(fake) as cuda:
            for pid in (101, 102):
                await cuda.suspend([pid], LONG)
                await cuda.resume([pid], LONG)
            await cuda.suspend([102], LONG)
            assert fake.hung_hosts() == []
            fake.end(102)
            assert fake.hung_hosts() == [], "suspended again first"
            fake.end(101)
            assert fake.hung_hosts() == [101]

    run(main)
