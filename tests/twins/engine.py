"""Twin of vLLM's control API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from llmux.errors import DriverError, DriverTimeout, EngineUnhealthy
from llmux.ports import Canary, Vitals
from llmux.protocol import Address
from tests.twins.world import TwinEngine, World

GARBAGE: Final = "!!!!!!!!"


class MemoryEngine:
    """Twin of VllmEngine. A call to a frozen or suspended engine is a violation: it would hang."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def healthy(self, address: Address, deadline: float) -> bool:
        engine = self._world.at(address)
        await self._world.act("engine.healthy", engine.handle.model if engine else "")
        return engine is not None and self._answers(engine) and self._is_ready(engine)

    async def wait_healthy(self, address: Address, deadline: float) -> None:
        engine = self._world.at(address)
        await self._world.act("engine.wait_healthy", engine.handle.model if engine else "")
        engine = self._world.at(address)
        if engine is None or not self._answers(engine) or not self._is_ready(engine):
            last = (engine.dying if engine else None) or "/health did not say 200"
            raise DriverTimeout("wait for", f"the engine at {address}", last)

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        if (engine := self._world.at(address)) is not None:
            self._world.busy(engine.handle.model, "sleep")
        engine = await self._reach("engine.sleep", "put to sleep", address, level)
        engine.level = level
        engine.asleep = {"weights", "kv_cache"}
        engine.held = {"context": engine.used["context"]}
        engine.spoiled = engine.spoiled or level >= 2

    async def wake(self, address: Address, tags: Sequence[str], deadline: float) -> None:
        engine = await self._reach("engine.wake", "wake", address, *tags)
        wanted = {
            kind: engine.used[kind]
            for kind in (tags or ("weights", "kv_cache"))
            if kind in engine.asleep
        }
        complaint = self._world.take(engine, wanted)
        if complaint is not None:
            raise EngineUnhealthy(
                "wake",
                f"the engine at {address}",
                f"/wake_up answered 500: {complaint}",
                status=500,
            )
        engine.asleep -= set(wanted)
        if not engine.asleep:
            engine.level = 0

    async def reload_weights(self, address: Address, deadline: float) -> None:
        engine = await self._reach("engine.reload_weights", "reload the weights of", address)
        if "weights" in engine.asleep:
            self._world.violate(f"reload of {engine.handle.model} before its weights are awake")
        engine.spoiled = False

    async def communicators(self, address: Address, *, up: bool, deadline: float) -> None:
        verb = "restore" if up else "suspend"
        await self._reach("engine.communicators", f"{verb} the communicators of", address, verb)

    async def reset_prefix_cache(self, address: Address, deadline: float) -> None:
        call, words = "engine.reset_prefix_cache", "reset the prefix cache of"
        (await self._reach(call, words, address)).remembers = False

    async def discard_cache(self, address: Address, deadline: float) -> None:
        engine = await self._reach("engine.discard_cache", "discard the KV cache of", address)
        model = engine.handle.model
        self._world.busy(model, "discard of the KV cache")
        if engine.remembers:
            self._world.violate(f"KV cache of {model} discarded before its prefix cache was reset")
        engine.held.pop("kv_cache", None)
        engine.cacheless = True

    async def return_cache(self, address: Address, deadline: float) -> None:
        engine = await self._reach("engine.return_cache", "return the KV cache of", address)
        if not engine.cacheless:
            return
        wanted = {"kv_cache": engine.used["kv_cache"]}
        if (complaint := self._world.take(engine, wanted)) is not None:
            target = f"the engine at {address}"
            raise EngineUnhealthy("return the KV cache of", target, complaint, status=500)
        engine.cacheless = False

    async def sleeping(self, address: Address, deadline: float) -> bool | None:
        engine = await self._reach("engine.sleeping", "ask", address)
        return bool(engine.asleep)

    async def canary(self, address: Address, model: str, deadline: float) -> Canary:
        engine = await self._infer("engine.canary", "test", address, model)
        if engine.spoiled:
            return Canary(GARBAGE, (-9.0,))
        return Canary(f"{model} says Paris", (-0.5, -0.25))

    async def sample(self, address: Address, model: str, deadline: float) -> None:
        await self._infer("engine.sample", "sample", address, model)

    async def _infer(self, call: str, verb: str, address: Address, model: str) -> TwinEngine:
        engine = await self._reach(call, verb, address)
        if engine.asleep:
            # It hangs until a wake (vLLM 0.32).
            self._world.violate(f"inference of {model} while it sleeps")
            raise DriverTimeout(verb, f"the engine at {address}", "no answer: it sleeps")
        if engine.cacheless:
            self._world.violate(f"inference of {model} without its KV cache")
            raise EngineUnhealthy(verb, f"the engine at {address}", "CUDA error: illegal access")
        engine.remembers = True
        return engine

    async def vitals(self, address: Address, deadline: float) -> Vitals:
        try:
            engine = await self._reach("engine.vitals", "look at", address)
        except DriverError:
            return Vitals(None)
        model = engine.handle.model
        seen = self._world.vitals.get(model, Vitals(200))
        if seen.progress is not None:
            moved = seen.progress + self._world.progress_per_look.get(model, 0)
            self._world.vitals[model] = replace(seen, progress=moved)
        return seen

    async def describe(self, address: Address, deadline: float) -> Mapping[str, Any]:
        await self._reach("engine.describe", "describe", address)
        paths = ["/v1/completions", "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc"]
        return {"version": self._world.version, "max_model_len": 4096, "paths": paths}

    def _is_ready(self, engine: TwinEngine) -> bool:
        return engine.healthy and engine.handle.model not in self._world.unready

    def _answers(self, engine: TwinEngine) -> bool:
        return not (engine.frozen or engine.suspended)

    async def _reach(self, call: str, operation: str, address: Address, *args: Any) -> TwinEngine:
        engine = self._world.at(address)
        await self._world.act(call, engine.handle.model if engine else "", *args)
        engine = self._world.at(address)  # it may have died while the call stood still
        target = f"the engine at {address}"
        if engine is None:
            raise EngineUnhealthy(operation, target, "nothing listens")
        if not self._answers(engine):
            state = "frozen" if engine.frozen else "suspended"
            self._world.violate(f"{call} of {engine.handle.model} while it is {state}")
            raise DriverTimeout(operation, target, f"no answer: it is {state}")
        return engine
