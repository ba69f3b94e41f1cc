"""The supervisor as a whole on the twins: one order without a service, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from runtime_harness import OFFLOAD_FREEZE, STOP, config_of, drivers_on, in_loop, model

from llmux.config.schema import CheckpointConfig, Config, Eviction, Process, Weights
from llmux.daemon.places import credentials_directory
from llmux.daemon.serve import embedded_drivers
from llmux.daemon.supervise import _plugin_dir, _trial, carry_out
from llmux.daemon.supervisor import Supervisor
from llmux.errors import DriverError, LlmuxError
from llmux.protocol import Ask
from llmux.runtime.control.orders import ignore_progress
from llmux.runtime.reconcile import first_state
from tests.twins.disk import MemoryStore
from tests.twins.gpu import MemoryGpu
from tests.twins.units import MemoryUnits
from tests.twins.world import World

FREEZES = config_of(model("a", eviction=OFFLOAD_FREEZE, gpu_memory=0.4), model("b", gpu_memory=0.4))


def supervisor_on(
    world: World, runtime: Path, store: MemoryStore, config: Config = FREEZES, **drivers: Any
) -> Supervisor:
    made = replace(drivers_on(world, str(runtime)), **drivers)
    return Supervisor(config, made, store, lambda _: config)


async def order(supervisor: Supervisor, verb: str, **args: Any) -> Any:
    return await carry_out(supervisor, Ask(1, verb, args), ignore_progress)


@in_loop
async def test_orders_one_after_the_other_find_what_the_former_left(tmp_path: Path) -> None:
    """`llmux load` and the like without the service: each is a supervisor of its own."""
    world, store = World(), MemoryStore()

    async def next_order(verb: str, **args: Any) -> Any:
        return await order(supervisor_on(world, tmp_path, store), verb, **args)

    assert await next_order("load", model="a") == {"message": "Model a is serving"}
    pid = world.engines["a"].handle.pid
    await next_order("sleep", model="a")
    assert world.engines["a"].frozen
    states = {n: m["state"] for n, m in (await next_order("status"))["models"].items()}
    assert states == {"a": "parked", "b": "stopped"}
    await next_order("wake", model="a")
    assert (world.engines["a"].handle.pid, world.engines["a"].frozen) == (pid, False)
    await next_order("unload", model="a")
    assert world.engines == {}
    assert world.names("units.start") == ["units.start a"]
    assert world.violations == []


@pytest.mark.parametrize("own", [STOP, Eviction(Weights.OFFLOAD, Process.CHECKPOINT)], ids=str)
@in_loop
async def test_an_engine_is_started_for_the_image_that_was_ordered(
    tmp_path: Path, own: Eviction
) -> None:
    config = config_of(model("a", eviction=own))
    supervisor = supervisor_on(World(), tmp_path, MemoryStore(), config)
    made = await order(supervisor, "checkpoint", model="a", eviction="discard+checkpoint")
    assert made["reused"] is False
    assert made["eviction"] == "discard+checkpoint"


@pytest.mark.parametrize(
    ("args", "is_one"),
    [
        ({"model": "a", "eviction": "discard+checkpoint"}, True),
        ({"model": "a"}, False),
        ({"model": "a", "eviction": "soundly"}, False),
    ],
)
def test_what_is_wrong_with_an_order_is_said_by_its_verb(
    args: Mapping[str, Any], is_one: bool
) -> None:
    trial = _trial(args)
    assert (trial is not None) is is_one
    if trial is not None:
        assert (trial.model, str(trial.eviction)) == ("a", "discard+checkpoint")


@in_loop
async def test_an_order_that_fails_leaves_nothing_at_work(tmp_path: Path) -> None:
    world = World()
    world.fail("units.start")
    with pytest.raises(LlmuxError, match="a fault was ordered"):
        await order(supervisor_on(world, tmp_path, MemoryStore()), "load", model="a")
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Unforeseen(dict[str, Any]):
    """Notes of a kind that no check knows."""

    def items(self) -> Any:
        raise OverflowError("int too large to convert to float")


@in_loop
async def test_notes_that_end_the_adoption_are_met_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, store = World(), MemoryStore()
    await order(supervisor_on(world, tmp_path, store), "load", model="a")
    pid, notes = world.engines["a"].handle.pid, dict(store.document)
    store.document = damaged = notes | {"models": Unforeseen(notes["models"])}
    states = (await order(supervisor_on(world, tmp_path, store), "status"))["models"]
    assert states["a"]["state"] == "serving", "by what is observed"
    assert world.engines["a"].handle.pid == pid
    assert store.aside == damaged
    assert caplog.text.count("cannot read the state file (memory): OverflowError: int too") == 1
    assert world.violations == []


@in_loop
async def test_a_fault_that_does_not_come_of_the_notes_is_none_of_theirs(tmp_path: Path) -> None:
    world, store = World(), MemoryStore()
    await order(supervisor_on(world, tmp_path, store), "load", model="a")
    before = dict(store.document)

    class Broken(MemoryUnits):
        async def observe(self) -> Any:
            raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        await supervisor_on(world, tmp_path, store, units=Broken(world)).start()
    assert (store.document, store.aside) == (before, None)


class Faulty(MemoryStore):
    def save(self, document: Mapping[str, Any]) -> None:
        raise RuntimeError("a fault of ours")


@in_loop
async def test_an_order_ends_with_the_loops_fault_if_it_has_one(tmp_path: Path) -> None:
    world = World()
    with pytest.raises(RuntimeError, match="a fault of ours"):
        await order(supervisor_on(world, tmp_path, Faulty()), "load", model="a")
    assert "units.close" in world.names()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_loop
async def test_an_embedded_supervisor_lacks_only_what_needs_systemd(tmp_path: Path) -> None:
    config = config_of(model("a"))
    drivers = embedded_drivers(replace(config, vllm_command=("v", "x")), str(tmp_path))
    lacking = {one.name for one in fields(drivers) if getattr(drivers, one.name) is None}
    assert lacking == {"checkpointer", "cuda", "cuda_started"}
    assert (drivers.places.runtime, drivers.places.vllm_command) == (str(tmp_path), ("v", "x"))
    assert drivers.places.users is None
    assert drivers.places.environment["PATH"] == os.environ["PATH"]


# ---- the end -------------------------------------------------------------------------------------


class Ending(MemoryUnits):
    """``answer``: whether everything is being stopped; an error: nobody knows."""

    answer: bool | DriverError = True

    async def ending(self) -> bool:
        if isinstance(self.answer, DriverError):
            raise self.answer
        return self.answer


NO_BUS = DriverError("ask", "systemd", "no bus")


@pytest.mark.parametrize(
    ("answer", "thawed", "said"),
    [
        (True, ["freezer.thaw a"], []),
        (False, [], ["stopped; the engines of a, b go on"]),
        (NO_BUS, [], ["cannot thaw engines", "cannot ask what else is being stopped"]),
    ],
    ids=["all ends", "llmux alone", "unknown"],
)
@in_loop
async def test_engines_are_thawed_when_all_is_stopped_and_named_when_they_go_on(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    answer: bool | DriverError,
    thawed: list[str],
    said: list[str],
) -> None:
    world, store = World(), MemoryStore()
    for verb, name in (("load", "a"), ("sleep", "a"), ("load", "b")):
        await order(supervisor_on(world, tmp_path, store), verb, model=name)
    units = Ending(world)
    units.answer = answer
    supervisor = supervisor_on(world, tmp_path, store, units=units)
    await supervisor.start()
    caplog.clear()
    caplog.set_level(logging.WARNING)
    await supervisor.thaw_if_ending()
    assert world.names("freezer.thaw") == thawed
    await supervisor.tell_what_goes_on()
    assert len(caplog.messages) == len(said)
    assert all(got.startswith(text) for got, text in zip(caplog.messages, said, strict=True))
    await supervisor.close()


@in_loop
async def test_without_an_engine_there_is_nothing_to_thaw_and_nothing_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    supervisor = supervisor_on(world, tmp_path, MemoryStore(), units=Ending(world))
    await supervisor.start()
    supervisor.loop.executor.instance(FREEZES.models["a"])  # known, and not started
    await supervisor.thaw_if_ending()
    await supervisor.tell_what_goes_on()
    assert world.names("freezer.thaw") == []
    assert caplog.messages == []
    await supervisor.close()


@pytest.mark.parametrize("there", [True, False])
def test_criu_gets_a_plugin_directory_only_where_the_plugin_is(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "cuda_plugin.so").touch()
    config = Config(checkpoint=CheckpointConfig(cuda_plugin_dir=str(tmp_path)))
    assert _plugin_dir(config) == (str(tmp_path) if there else None)
    assert _plugin_dir(Config(checkpoint=CheckpointConfig(cuda_plugin_dir=None))) is None


class Count(MemoryGpu):
    """``answer``: how many there are, or the driver's error."""

    answer: int | DriverError = 0
    seen = True

    @property
    def available(self) -> bool:
        return self.seen

    async def gpu_count(self) -> int:
        if isinstance(self.answer, DriverError):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("seen", "answer", "gpus", "count"),
    [
        (False, 4, 1, 1),
        (True, 4, 1, 4),
        (True, 1, 1, 1),
        (True, 0, 1, 1),
        (True, NO_BUS, 1, 1),
        (True, NO_BUS, 2, 2),
        (True, NO_BUS, (0, 3), 4),
    ],
)
@in_loop
async def test_gpus_are_counted_or_as_many_as_the_models_name(
    tmp_path: Path,
    seen: bool,
    answer: int | DriverError,
    gpus: int | tuple[int, ...],
    count: int,
) -> None:
    world = World()
    gpu = Count(world)
    gpu.seen, gpu.answer = seen, answer
    drivers = replace(drivers_on(world, str(tmp_path)), gpu=gpu)
    assert (await first_state(config_of(model("a", gpus=gpus)), drivers)).gpu_count == count
    assert (await first_state(replace(config_of(model("a")), gpu_count=3), drivers)).gpu_count == 3
    none = 1 if not seen or isinstance(answer, DriverError) else max(1, answer)
    assert (await first_state(config_of(), drivers)).gpu_count == none


@pytest.mark.parametrize("notes", ["kept", "lost"])
@pytest.mark.parametrize("cuda", [True, False])
@in_loop
async def test_the_driver_is_asked_of_an_engine_only_where_no_note_says_how_it_is(
    tmp_path: Path, cuda: bool, notes: str
) -> None:
    world, store = World(), MemoryStore()
    drivers: dict[str, Any] = {} if cuda else {"cuda": None}
    await order(supervisor_on(world, tmp_path, store, **drivers), "load", model="a")
    asked = world.names("cuda.suspended")
    store = store if notes == "kept" else MemoryStore()
    status = await order(supervisor_on(world, tmp_path, store, **drivers), "status")
    assert status["models"]["a"]["state"] == "serving"
    more = len(world.names("cuda.suspended")) - len(asked)
    assert more == (1 if cuda and notes == "lost" else 0)


def test_credentials_are_where_systemd_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/somewhere")
    assert credentials_directory() == "/somewhere"
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert credentials_directory() == "/run/credentials"
