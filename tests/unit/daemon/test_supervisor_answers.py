"""What the supervisor answers and ends itself: reloads, metrics, the catalogue, its own end."""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import replace
from pathlib import Path
from time import time
from types import MappingProxyType
from typing import Any

import pytest
from runtime_harness import (
    STOP,
    config_of,
    drivers_on,
    in_loop,
    model,
)

from llmux.config.schema import Config
from llmux.core.effects import SwitchFinished
from llmux.core.events import LoadAsked, WorkerJoined
from llmux.daemon.supervisor import Supervisor, reload_needs
from llmux.drivers.engine.output import EngineFiles
from llmux.errors import ConfigError, Problem, Reason, Refused, StateFileError
from llmux.protocol import Ask, Catalog
from llmux.runtime.control.orders import ignore_progress
from tests.twins.disk import MemoryEvents, MemoryStore
from tests.twins.world import World

CONFIG = config_of(model("a"), model("b", eviction=STOP))


def supervisor_on(
    world: World, runtime: Path, config: Config = CONFIG, load: Any = None, **settings: Any
) -> Supervisor:
    drivers = replace(drivers_on(world, str(runtime)), **settings.pop("drivers", {}))
    store = settings.pop("store", MemoryStore())
    return Supervisor(config, drivers, store, load or (lambda _: config), **settings)


def changed() -> Config:
    models = {
        "a": replace(CONFIG.models["a"], extra_args=("--x",)), "c": model("c"),
    }  # fmt: skip
    return replace(CONFIG, models=MappingProxyType(models), port=4242, warmup=True)


@pytest.mark.parametrize("dry_run", [True, False])
@in_loop
async def test_a_reload_says_what_changed_and_what_is_not_in_force_yet(
    tmp_path: Path, dry_run: bool, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[bool] = []

    def load(dry: bool) -> Config:
        given.append(dry)
        return changed()

    supervisor = supervisor_on(World(), tmp_path, load=load)
    await supervisor.start()
    running = asyncio.create_task(supervisor.loop.run())
    await supervisor.verbs.answer(Ask(1, "load", {"model": "a"}))
    caplog.clear()
    result = await supervisor.verbs.answer(Ask(1, "reload", {"dry_run": True} if dry_run else {}))
    assert given == [dry_run]
    gateway, restart = result.pop("restart_gateway_for"), result.pop("restart_supervisor_for")
    assert any("port" in name for name in gateway), gateway
    assert result == {
        "message": "nothing was changed (dry run)" if dry_run else "configuration reloaded",
        "added": ["c"], "removed": ["b"], "changed": ["a"], "restart_models": ["a"],
    }  # fmt: skip
    assert supervisor.loop.pending == (0 if dry_run else 1)
    settings = {"restart_gateway_for": gateway, "restart_supervisor_for": restart}
    needs = reload_needs(result | settings)
    assert caplog.messages == ([] if dry_run else needs)
    assert needs[0] == "running engines keep their arguments until `llmux restart a`"
    assert needs[1].startswith("not in force before `systemctl restart llmux-gateway`: ")
    await supervisor.verbs.answer(Ask(1, "unload", {"model": "a"}))
    await supervisor.loop.wait_for(lambda _: not supervisor.loop.pending, 20)
    again = await supervisor.reload(dry_run=True)
    assert (again["restart_models"], again["changed"]) == ([], ["a"] if dry_run else [])
    running.cancel()
    await asyncio.wait([running])
    await supervisor.close()


@in_loop
async def test_a_bad_file_leaves_the_configuration_and_is_refused(tmp_path: Path) -> None:
    def load(_: bool) -> Config:
        raise ConfigError((Problem("x.yaml", 3, 1, "port", "it is odd"),))

    supervisor = supervisor_on(World(), tmp_path, load=load)
    await supervisor.start()
    with pytest.raises(Refused, match=r"x.yaml:3:1: port: it is odd") as refused:
        await supervisor.reload()
    assert refused.value.reason is Reason.BAD_REQUEST
    assert supervisor.loop.pending == 0
    await supervisor.close()


def test_what_a_reload_needs_is_named_with_its_command() -> None:
    assert reload_needs({}) == []
    needs = {"restart_models": ["a", "b"], "restart_supervisor_for": ["x", "y"]}
    assert reload_needs(needs) == [
        "running engines keep their arguments until `llmux restart a b`",
        "not in force before `systemctl restart llmux`: x, y",
    ]


@in_loop
async def test_verbs_that_are_not_of_models_are_answered_where_they_belong(tmp_path: Path) -> None:
    supervisor = supervisor_on(World(), tmp_path, events=MemoryEvents())
    await supervisor.start()
    supervisor.loop.post(WorkerJoined("w", {}))

    async def ask(verb: str, **args: Any) -> Any:
        return await supervisor._answer(Ask(1, verb, args), ignore_progress)

    supervisor.control_socket.responses.keep({"r": "a"}, {})
    assert await ask("alive") is None
    assert await ask("events") == {"events": [], "more": False}
    assert (await ask("response", id="r"))["model"] == "a"
    metrics = await ask("metrics", worker="w", snapshot={})
    assert set(metrics) == {"supervisor", "workers"}
    assert set((await ask("status"))["models"]) == {"a", "b"}
    await supervisor.close()


@in_loop
async def test_each_part_is_closed_once_and_engines_live_on(tmp_path: Path) -> None:
    world = World()
    supervisor = supervisor_on(world, tmp_path)
    await supervisor.start()
    running = asyncio.create_task(supervisor.loop.run())
    await supervisor.verbs.answer(Ask(1, "load", {"model": "a"}))
    assert await supervisor._engine_pids() == {
        world.engines["a"].handle.pid + n for n in range(3)
    }  # fmt: skip
    order = asyncio.create_task(supervisor.verbs.answer(Ask(1, "validate", {"model": "a"})))
    await asyncio.wait([order])
    assert isinstance(order.exception(), Refused)
    hold = world.hold("engine.sleep")
    parking = asyncio.create_task(supervisor.verbs.answer(Ask(1, "sleep", {"model": "a"})))
    await hold.reached.wait()
    path = tmp_path / "control"
    await supervisor.control_socket.listen(str(path), None)
    running.cancel()
    await supervisor.close()
    assert isinstance(parking.exception() if parking.done() else await failed(parking), Refused)
    assert world.names("cuda.close", "units.close") == ["cuda.close", "units.close"]
    assert "control" not in os.listdir(tmp_path)
    assert "a" in world.engines


async def failed(task: asyncio.Task[Any]) -> BaseException | None:
    await asyncio.wait([task])
    return task.exception()


@in_loop
async def test_workers_get_the_catalogue_when_it_has_changed(tmp_path: Path) -> None:
    supervisor = supervisor_on(World(), tmp_path)
    await supervisor.start()
    sent: list[Any] = []
    send: Any = supervisor.control_socket
    send.broadcast = sent.append
    running = asyncio.create_task(supervisor.loop.run())
    supervisor.loop.post(LoadAsked("a"))
    await supervisor.loop.wait_for(lambda state: state.models["a"].state.value == "serving", 20)
    assert all(isinstance(one, Catalog) for one in sent)
    states = [[one.state for one in catalog.infos()] for catalog in sent]
    assert states[-2:] == [["starting", "stopped"], ["serving", "stopped"]]
    assert all(one != other for one, other in itertools.pairwise(sent))
    running.cancel()
    await asyncio.wait([running])
    await supervisor.close()


@pytest.mark.parametrize(
    ("switch", "text"),
    [
        (SwitchFinished("a", ("b", "c"), True, 1.0, 1.5, 3.0, 7.0),
         ("a serves after 6.000 s (cold, in place of b, c; drain 0.500 s, park 1.500 s,"
          " start 4.000 s)")),
        (SwitchFinished("a", (), False, 1.0, 1.5, 3.0, 7.0, ("x", "y"), 2.5),
         ("a serves after 6.000 s (woken; drain 0.500 s, park 1.500 s, wake 4.000 s),"
          " after 2.500 s behind x, y, pinned or by never_evict")),
    ],
)  # fmt: skip
@in_loop
async def test_a_switch_is_one_line_with_its_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, switch: SwitchFinished, text: str
) -> None:
    caplog.set_level("INFO")
    supervisor = supervisor_on(World(), tmp_path)
    await supervisor.start()
    caplog.clear()
    for listener in supervisor.loop.listeners:
        listener.switched(switch)
    assert caplog.messages == [text]
    (record,) = caplog.records
    assert (record.model, record.duration_ms) == ("a", 6000.0)  # type: ignore[attr-defined]
    await supervisor.close()


@in_loop
async def test_lines_of_engines_reach_those_who_watch_and_the_operation(tmp_path: Path) -> None:
    files = EngineFiles(str(tmp_path / "logs"))
    supervisor = supervisor_on(World(), tmp_path, drivers={"output": files})
    await supervisor.start()
    heard: list[Any] = []
    supervisor.watchers.line = lambda *line: heard.append(("watchers", *line))  # type: ignore[method-assign]
    supervisor.loop.executor.heard = lambda *line: heard.append(line)  # type: ignore[method-assign]
    assert files.on_line is not None and files.on_progress is not None
    files.on_line("a", "one")
    files.on_progress("a", "50%")
    assert heard == [("watchers", "a", "one"), ("a", "one"), ("a", "50%")]
    await supervisor.close()


class BadStore(MemoryStore):
    error: Exception = StateFileError("cannot read the notes: no such device")

    def load(self) -> Any:
        raise self.error


@in_loop
async def test_each_part_is_given_to_those_who_need_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    former = {"id": 7, "time": time(), "model": "a", "type": "transition", "to": "serving"}
    events, learned = MemoryEvents(former), MemoryStore()
    supervisor = supervisor_on(
        World(), tmp_path, store=BadStore(), events=events, learned=learned,
        allowed_uids=frozenset({5}), admins=6,
    )  # fmt: skip
    await supervisor.start()
    assert caplog.messages == ["cannot read the notes: no such device; relying on observation"]
    found = list(supervisor.events.recent)
    assert (found[0], found[-1]["id"]) == (former, 8)
    assert (found[-1]["from"], found[-1]["to"]) == ("serving", "stopped")
    socket = supervisor.control_socket
    assert (socket._uids, socket._admins, socket._watchers) == (
        frozenset({5}), 6, supervisor.watchers,
    )  # fmt: skip
    kinds = [type(one).__name__ for one in supervisor.loop.listeners]
    assert kinds == ["_Catalogue", "Telemetry", "EventLog", "ArrivalLog", "Learned"]
    sent: list[Any] = []
    socket.send = lambda *message: sent.append(message)  # type: ignore[method-assign]
    supervisor._send("w", "x")
    assert sent == [("w", "x")]
    running = asyncio.create_task(supervisor.loop.run())
    await supervisor.verbs.answer(Ask(1, "load", {"model": "a", "by": "bob"}))
    orders = [one["result"] for one in supervisor.events.recent if one["type"] == "order"]
    assert orders == ["given", "done"]
    running.cancel()
    await asyncio.wait([running])
    await supervisor.close()
    broken = BadStore()
    broken.error = RuntimeError("a fault")
    with pytest.raises(RuntimeError):
        await supervisor_on(World(), tmp_path, store=broken).start()


@in_loop
async def test_a_fault_of_ours_in_a_reload_is_no_mistake_in_the_file(tmp_path: Path) -> None:
    def load(_: bool) -> Config:
        raise RuntimeError("a fault")

    supervisor = supervisor_on(World(), tmp_path, load=load)
    await supervisor.start()
    with pytest.raises(RuntimeError):
        await supervisor.reload()
    models = dict(CONFIG.models) | {"a": replace(CONFIG.models["a"], aliases=("x",))}
    supervisor._load = lambda _: replace(CONFIG, models=MappingProxyType(models))
    running = asyncio.create_task(supervisor.loop.run())
    await supervisor.verbs.answer(Ask(1, "load", {"model": "a"}))
    result = await supervisor.reload(dry_run=True)
    assert (result["changed"], result["restart_models"]) == (["a"], [])
    running.cancel()
    await asyncio.wait([running])
    await supervisor.close()
