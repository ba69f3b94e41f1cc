"""Engines that die, stand still, answer otherwise or were restored ahead: each rule at its edge."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from drivers_called import ADDRESS, CANARY, CONFIG, HANDLE, Bench
from runtime_harness import in_loop, in_virtual_time, model

from llmux.core.effects import RestoreAhead
from llmux.core.events import EngineExited
from llmux.core.plans import PlanKind
from llmux.core.records import ModelRecord, Serving
from llmux.engines.progress import Stage
from llmux.errors import EngineUnhealthy, LlmuxError
from llmux.ports import Canary, Vitals
from llmux.runtime.engines.canary import compare, same_answer
from llmux.runtime.engines.deaths import TAIL_LINES, behind_answer, with_cause
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.vitals import Progress, Watch, _Sample


@pytest.mark.parametrize(
    ("got", "same"),
    [
        (Canary("x", (-0.5, -1.0)), True),
        (Canary("x", (-0.54, -0.96)), True),
        (Canary("x", (-0.56, -1.0)), False),
        (Canary("x", (-0.5, -1.06)), False),
        (Canary("x", (-0.5,)), False),
        (Canary("x", (-0.5, -1.0, -2.0)), False),
        (Canary("y", (-0.5, -1.0)), False),
    ],
)
def test_answers_are_the_same_in_every_word_and_nearly_in_their_odds(
    got: Canary, same: bool
) -> None:
    expected = Canary("x", (-0.5, -1.0))
    assert same_answer(expected, got) is same
    if same:
        compare("a", expected, got)
    else:
        with pytest.raises(EngineUnhealthy, match='the woken model "a": its canary answered'):
            compare("a", expected, got)


# ---- deaths --------------------------------------------------------------------------------------

CAUSE = "torch.OutOfMemoryError: CUDA out of memory."
SEE = " (see `llmux logs a`)"


@pytest.mark.parametrize(
    ("tail", "shortage", "said", "told"),
    [
        ([CAUSE], None, "exit status 1", f"exit status 1: {CAUSE}{SEE}"),
        ([CAUSE], "no room", "exit status 1",
         f"exit status 1, perhaps of its own output: no room: {CAUSE}{SEE}"),
        ([], None, "exit status 1", "exit status 1"),
        ([], None, "killed by SIGKILL",
         "killed by SIGKILL (out of memory? see `journalctl -k`)"),
        ([], None, "SIGKILL: out of Memory", "SIGKILL: out of Memory"),
        ([], None, "exit status 0",
         "exit status 0 (an engine's program must stay in the foreground: see vllm_command)"),
        (["one", "two"], None, "exit status 3", "exit status 3; its last lines:\none\ntwo"),
        ([str(n) for n in range(30)], None, "exit status 3",
         "exit status 3; its last lines:\n" + "\n".join(map(str, range(30 - TAIL_LINES, 30)))),
    ],
)  # fmt: skip
def test_a_death_is_told_with_its_cause_or_its_last_lines(
    tail: list[str], shortage: str | None, said: str, told: str
) -> None:
    asked: list[Any] = []

    def lines(*args: Any) -> list[str]:
        asked.append(args)
        return tail

    output: Any = SimpleNamespace(tail=lines, shortage=lambda: shortage)
    assert with_cause(output, CONFIG, said) == told
    assert asked == [("a", 200)]


@pytest.mark.parametrize(
    ("kind", "status", "tail", "told"),
    [
        (PlanKind.START, 500, [CAUSE], f": {CAUSE}{SEE}"),
        (PlanKind.START, 503, [CAUSE], f": {CAUSE}{SEE}"),
        (PlanKind.START, 499, [CAUSE], ""),
        (PlanKind.START, None, [CAUSE], ""),
        (PlanKind.WAKE, 500, [CAUSE], ""),
        (PlanKind.START, 500, ["a line"], ""),
    ],
)
def test_a_fault_behind_an_answer_is_looked_for_where_one_was_said(
    kind: PlanKind, status: int | None, tail: list[str], told: str
) -> None:
    output: Any = SimpleNamespace(tail=lambda *_: tail)
    fields: dict[str, Any] = {} if status is None else {"status": status}
    error = EngineUnhealthy("test", "it", "no", **fields)
    assert behind_answer(output, CONFIG, kind, error) == told
    assert behind_answer(output, CONFIG, kind, LlmuxError("x")) == ""


# ---- signs of life -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "stalled", "counter", "cpu", "at", "since", "lives"),
    [
        (None, False, None, 0.0, 10.0, None, False),
        (None, False, None, 2.5, 10.0, None, True),
        (None, False, None, 2.4, 10.0, None, False),
        (None, False, None, 5.0, 0.9, None, False),
        (None, False, None, 0.25, 1.0, None, True),
        (200, False, None, 0.0, 10.0, None, True),
        (499, False, None, 0.0, 10.0, None, True),
        (500, False, None, 9.0, 10.0, None, False),
        (200, True, None, 0.0, 10.0, None, True),
        (200, True, 7.0, 9.0, 10.0, 0.0, True),
        (200, True, 7.0, 0.0, 10.0, 0.0, False),
        (200, True, 7.0, 90.0, 99.9, 0.0, True),
        (200, True, 7.0, 90.0, 100.0, 0.0, False),
        (500, True, 7.0, 9.0, 10.0, None, True),
        (200, True, 8.0, 0.0, 10.0, 0.0, True),
    ],
)
def test_an_engine_lives_by_what_moves(
    status: int | None, stalled: bool, counter: float | None, cpu: float, at: float,
    since: float | None, lives: bool,
) -> None:  # fmt: skip
    drivers = Bench().drivers
    progress = None if since is None else Progress(7.0, since)
    watch = Watch(drivers, "a", ADDRESS, HANDLE, stalled=stalled, progress=progress)
    watch._baseline = 7.0 if counter == 8.0 else None
    sample = _Sample(Vitals(status, progress=counter), cpu, at)
    assert watch._lives(sample, 5.0) is lives


@pytest.mark.parametrize(
    ("running", "left", "error", "idles"),
    [
        (0, 2.0, None, True),
        (1, 2.0, None, False),
        (None, 2.0, None, False),
        (0, 0.0, None, False),
        (0, 2.0, EngineUnhealthy("test", "it", "no", status=404), True),
        (0, 2.0, EngineUnhealthy("test", "it", "no"), False),
    ],
)
@in_loop
async def test_an_idle_engine_is_asked_for_an_answer_in_the_time_that_is_left(
    running: int | None, left: float, error: Exception | None, idles: bool
) -> None:
    bench = Bench(engine_canary=error or CANARY)
    watch = Watch(bench.drivers, "a", ADDRESS, HANDLE, stalled=True, progress=None)
    vitals = replace(Vitals(200), running=running)
    assert await watch._idles(_Sample(vitals, 0.0, 10.0), 10.0 + left) is idles
    asked = running == 0 and left > 0
    assert bench.seen == ([("engine.canary", ADDRESS, "a", left)] if asked else [])


@in_loop
async def test_counters_are_dated_by_when_they_were_first_seen_so() -> None:
    former = Progress(7.0, -1.0)
    for counter, known in ((7.0, former), (None, former), (8.0, None)):
        bench = Bench(engine_vitals=Vitals(200, 1, counter), units_cpu_seconds=0.0)
        watch = Watch(bench.drivers, "a", ADDRESS, HANDLE, stalled=True, progress=former)
        at = (await watch._sample(5.0)).at
        assert watch.progress == (known or Progress(8.0, at))


@in_virtual_time
async def test_a_watch_ends_with_a_verdict_when_its_time_is_over() -> None:
    for status, words in (
        (None, "no answer and no computing for 30 s"), (500, "/health says 500 for 30 s"),
        (200, "its counters stand still and it does not compute, for 30 s"),
    ):  # fmt: skip
        counter = 7.0 if status == 200 else None
        bench = Bench(engine_vitals=Vitals(status, 1, counter), units_cpu_seconds=0.0)
        watch = Watch(bench.drivers, "a", ADDRESS, HANDLE, stalled=True, progress=None)
        with pytest.raises(EngineUnhealthy, match=words):
            await watch.run(30.0)
        looks = [call for call in bench.seen if call[0] == "engine.vitals"]
        assert looks[0] == ("engine.vitals", ADDRESS, 5.0)


# ---- the executor's own --------------------------------------------------------------------------


def executor_on(bench: Bench) -> Executor:
    images = ImageLifecycle(bench.drivers, bench.told.append, lambda _: None)
    return Executor(bench.drivers, images, bench.told.append, lambda *_: None)


@in_loop
async def test_an_exit_is_told_to_the_core_or_to_the_operation_and_of_this_engine_only() -> None:
    bench = Bench(output_tail=[], output_shortage=None)
    cast(Any, bench.drivers.output).tail = lambda *_: []
    cast(Any, bench.drivers.output).shortage = lambda: None
    executor = executor_on(bench)
    executor._exited(HANDLE, "exit status 1")
    instance = executor.adopt(CONFIG, HANDLE, EngineFacts(gpus=(1,)))
    assert bench.seen == [("output.attach", HANDLE), ("units.watch", HANDLE, executor._exited)]
    executor._exited(replace(HANDLE, pid=1), "exit status 1")
    assert bench.told == []
    executor._exited(HANDLE, "exit status 1")
    assert bench.told == [EngineExited("a", "exit status 1")]
    instance.died = asyncio.get_running_loop().create_future()
    for said in ("exit status 2", "exit status 3"):
        executor._exited(HANDLE, said)
    assert instance.died.result() == "exit status 2" and len(bench.told) == 1
    assert executor.notes("x") == {}
    assert executor.notes("a")["pid"] == HANDLE.pid
    await executor.close()


def test_an_engine_is_stale_when_it_was_started_otherwise() -> None:
    executor = executor_on(Bench())
    record = ModelRecord(CONFIG, Serving("e", 0.0), (0,))
    assert executor.stale(record) is False
    instance = executor.instance(CONFIG)
    instance.facts = EngineFacts(started_as="x", gpus=(0,))
    assert executor.stale(record) is False, "it has no process"
    instance.handle = HANDLE
    assert executor.stale(record) is True
    assert instance.wanted is not None
    instance.facts = EngineFacts(started_as=instance.wanted[2], gpus=(0,))
    assert executor.stale(record) is False
    instance.facts = replace(instance.facts, started_as=None)
    assert executor.stale(record) is False
    instance.facts = EngineFacts(started_as=instance.wanted[2], gpus=(1,))
    assert executor.stale(record) is True, "on another GPU"
    other = replace(record, config=replace(CONFIG, extra_args=("--x",)))
    assert executor.stale(other) is True


@in_loop
async def test_memory_of_models_that_leave_is_kept_free_for_them() -> None:
    executor, given = executor_on(Bench()), list[Any]()
    executor.ahead.begin = lambda *args: given.append(args)  # type: ignore[method-assign]
    executor.adopt(CONFIG, HANDLE, EngineFacts())
    executor.instance(model("b"))
    effect = RestoreAhead("c", model("c"), (0,), ("a", "b", "x"), 9.0)
    executor.restore_ahead(effect)
    assert given == [(effect, [HANDLE])]


def test_an_instance_says_how_far_it_is_and_forgets_its_process() -> None:
    told: list[Any] = []
    instance = Instance(CONFIG, follower=lambda *args: told.append(args))
    instance.heard("Loading safetensors checkpoint shards: 25% Completed | 1/4 [")
    assert told == [] and instance.notes() == {}
    instance.report("wait_healthy")
    first = instance.step
    instance.report("wait_healthy", 1, 2)
    assert first is not None and instance.step == replace(first, done=1, total=2)
    instance.heard("Loading safetensors checkpoint shards: 25% Completed | 1/4 [")
    instance.heard("nothing of it")
    assert told == [("wait_healthy", 0, 0), ("wait_healthy", 1, 2), ("load_weights", 1, 4)]
    instance.handle, instance.used_before = HANDLE, {1: 2}
    instance.facts = EngineFacts(gpus=(1,), cold_seconds=5.0, version="x", canary=CANARY)
    notes = instance.notes()
    assert (notes["pid"], notes["start_ticks"], notes["unit"]) == (77, 5, "llmux-a.scope")
    instance.progress = Progress(1.0, 2.0)
    instance.forget()
    assert instance.facts == EngineFacts(gpus=(1,), cold_seconds=5.0)
    left: tuple[Any, ...] = (instance.handle, instance.used_before, instance.progress)
    assert left == (None, {}, None)


def test_a_line_that_cannot_be_read_is_said_once_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stage(line: str) -> Stage | None:
        if "bad" in line:
            raise ValueError(line)
        return Stage("load_weights", 1, 4)

    odd = SimpleNamespace(name="a", engine_type=replace(CONFIG.engine_type, stage=stage))
    instance = Instance(cast(Any, odd))
    instance.report("wait_healthy")
    for line in ("bad", "good", "bad again"):
        instance.heard(line)
    assert instance.step is not None and instance.step.name == "load_weights"
    assert [record.getMessage() for record in caplog.records] == ["cannot read how far a has come"]
