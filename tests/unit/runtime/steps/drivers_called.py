"""Drivers that say what was called, under the steps of plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from runtime_harness import model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import RunPlan
from llmux.core.plans import Step, park_plan
from llmux.ports import Canary, UnitHandle
from llmux.protocol import Address
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.steps import Steps
from llmux.runtime.host import Drivers, Places

GIB = 1 << 30
CHECKPOINT = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
CONFIG = model("a", gpu_memory=0.5, eviction=CHECKPOINT)
HANDLE = UnitHandle("a", "llmux-a.scope", 77, 5, "/a")
ADDRESS = Address(port=4242)
CANARY = Canary("Paris", (-0.5,))
SYNC = {"watch", "unwatch", "attach", "detach", "paths"}


class Calls:
    """A driver that says what was called, and answers what a test has put there."""

    def __init__(self, port: str, seen: list[Any], answers: dict[str, Any]) -> None:
        self._port, self._seen, self._answers = port, seen, answers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("available", "blind"):
            found: bool | None = self._answers.get(f"{self._port}.{name}", False)
            return found

        def called(*args: Any, **kwargs: Any) -> Any:
            call = f"{self._port}.{name}"
            self._seen.append((call, *args, *kwargs.values()))
            answer = self._answers.get(call)
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else answer

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return called(*args, **kwargs)

        return called if name in SYNC else awaited


class Bench:
    def __init__(self, **answers: Any) -> None:
        self.seen: list[Any] = []
        self.told: list[Any] = []
        self.answers: dict[str, Any] = {
            "engine.canary": CANARY, "engine.describe": {"version": "0.32.0", "max_model_len": 7},
            "units.pids": [77, 78], "units.start": HANDLE, "checkpointer.shm_names": ("x",),
            "cuda.suspend": [77], "cuda.suspendable": [77], "freezer.frozen": False,
            "output.paths": ("/o", "/e"), "gpu.totals": {0: 100 * GIB}, "gpu.used": {0: 0},
            "gpu.processes": [],
        } | {name.replace("_", ".", 1): value for name, value in answers.items()}  # fmt: skip
        parts = {
            name: Calls(name, self.seen, self.answers)
            for name in ("units", "freezer", "engine", "output", "gpu", "checkpointer", "cuda")
        }
        self.drivers = Drivers(
            **cast(Any, parts), places=Places("/run"), identity=lambda *_: {"model": "m"},
            portable_identity=lambda *_: {},
        )  # fmt: skip
        self.instance = Instance(CONFIG, HANDLE, EngineFacts(address=ADDRESS, version="0.32.0"))
        self.steps = self.made()

    def made(self) -> Steps:
        images = ImageLifecycle(self.drivers, self.told.append, lambda _: None)
        return Steps(self.drivers, images, cast(Any, "take over"), self.exited, self.told.append)

    def without(self, **drivers: Any) -> None:
        self.drivers = replace(self.drivers, **drivers)
        self.steps = self.made()

    def exited(self, handle: UnitHandle, description: str) -> None: ...

    async def run(self, step: Step, plan: Any = None) -> list[Any]:
        plan = plan or park_plan(CONFIG, CHECKPOINT)
        effect = RunPlan("a", 3, plan, CONFIG, (0,))
        await self.steps.run(step, effect, self.instance)
        return self.seen
