"""``llmux validate``: does a model survive ways of parking, and do they free what they promise?

Uses the running supervisor's own operations, in manual mode and on this model only: what is
validated is what will be done later. Never makes room by parking another model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import SwitchFinished
from llmux.core.events import ImageKnown, ModeSet, TrialSet
from llmux.core.records import (
    Failed,
    Parked,
    Serving,
    Starting,
    State,
    Stopped,
    parked_share,
    share_after,
)
from llmux.errors import LlmuxError, Reason, Refused
from llmux.image_ports import Image
from llmux.ports import Canary, UnitHandle
from llmux.protocol import ProgressCallback
from llmux.runtime.control.checkpoints import ask_canary
from llmux.runtime.control.orders import bring_down, bring_up, followed, record_of
from llmux.runtime.engines.canary import same_answer
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.gpu_memory import SLACK_BYTES, total_held
from llmux.runtime.host import Drivers
from llmux.runtime.loop import Loop

ROUNDING = 1e-6
WOKEN_SHARE = 0.5  # of the memory before; caches may be smaller after a wake, not this much


@dataclass(slots=True)
class _Row:
    """One policy's trial; None = not known or not reached."""

    policy: Eviction
    sleep_secs: float | None = None
    wake_secs: float | None = None
    gpu: dict[str, int | None] = field(default_factory=dict)  # before, parked, woken → bytes
    image_bytes: int | None = None
    response: str | None = None
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "policy": str(self.policy),
            "sleep_secs": None if self.sleep_secs is None else round(self.sleep_secs, 3),
            "wake_secs": None if self.wake_secs is None else round(self.wake_secs, 3),
            "gpu_before_bytes": self.gpu.get("before"),
            "gpu_parked_bytes": self.gpu.get("parked"),
            "gpu_woken_bytes": self.gpu.get("woken"),
            "image_bytes": self.image_bytes,
            "response": self.response,
            "passed": not self.problems,
            "problems": self.problems,
        }


class Validation:
    """One run. A listener of the loop meanwhile, for the reasons of cold starts."""

    def __init__(
        self,
        loop: Loop,
        executor: Executor,
        drivers: Drivers,
        name: str,
        report: ProgressCallback,
    ) -> None:
        self._loop = loop
        self._executor = executor
        self._drivers = drivers
        self._name = name
        self._report = report
        self._reasons: list[str] = []

    async def run(self, policies: list[Eviction]) -> dict[str, Any]:
        loop, name = self._loop, self._name
        self._refuse_if_in_the_way()
        state = loop.state
        configured = state.models[name].config
        trial = self._for_all(configured.eviction, policies)
        served = isinstance(state.models[name].phase, Serving)
        loop.listeners.append(self)
        # Manual: no request may move models while one is being measured.
        mode = loop.lend_mode(ModeSet(True, name))
        try:
            if trial != configured.eviction and not isinstance(state.models[name].phase, Stopped):
                await self._stop()
            loop.post(TrialSet(name, trial))
            async with followed(loop, self._executor, name, self._report):
                rows = [await self._try(policy) for policy in policies]
        finally:
            try:
                if trial != configured.eviction:
                    await self._stop()
                loop.post(TrialSet(name, None))
            finally:
                loop.listeners.remove(self)
                loop.post(mode)
        if served and name in loop.state.models:
            await bring_up(loop, name)  # as it was found
        passed = all(not row.problems for row in rows)
        return {
            "message": f"Result: {'ALL PASSED' if passed else 'SOME FAILED'}",
            "model": name,
            "passed": passed,
            "policies": [row.as_json() for row in rows],
        }

    # ---- before and after -----------------------------------------------------------------------

    def _refuse_if_in_the_way(self) -> None:
        state, name = self._loop.state, self._name
        record = state.models[name]
        if state.in_flight(name) or state.waiting(name):
            raise Refused(
                Reason.ALREADY_RUNNING,
                f"cannot validate {name}: it serves requests now",
                hint="try again when it has no requests",
            )
        gpus = record.gpus or (
            record.config.gpus
            if isinstance(record.config.gpus, tuple)
            else tuple(range(record.config.gpus))
        )
        for gpu in gpus:
            others = {
                other: share_after(found)
                for other, found in state.models.items()
                if other != name and gpu in found.gpus and share_after(found)
            }
            if sum(others.values()) + record.config.gpu_memory > 1.0 + ROUNDING:
                names = ", ".join(sorted(others))
                raise Refused(
                    Reason.CANNOT_FIT,
                    f"cannot validate {name}: GPU {gpu} has no room for it beside {names}, and"
                    " validation parks no other model",
                    hint="; ".join(f"llmux unload {other}" for other in sorted(others)),
                )

    @staticmethod
    def _for_all(own: Eviction, policies: list[Eviction]) -> Eviction:
        """The eviction for which the engine must be started, to allow all these policies."""
        asleep = any(policy.weights is not Weights.RETAIN for policy in policies)
        needs = {Process.CHECKPOINT, Process.CUDA_SUSPEND}
        copied = any(policy.process in needs for policy in policies)
        return Eviction(
            Weights.DISCARD if asleep and own.weights is Weights.RETAIN else own.weights,
            Process.CHECKPOINT if copied and own.process not in needs else own.process,
        )

    async def _stop(self) -> None:
        if self._name in self._loop.state.models:
            await bring_down(self._loop, self._name, Eviction(Weights.RETAIN, Process.STOP))

    # ---- one policy -----------------------------------------------------------------------------

    async def _try(self, policy: Eviction) -> _Row:
        row = _Row(policy)
        try:
            await self._measure(row, policy)
        except LlmuxError as error:
            row.problems.append(str(error))
        return row

    async def _measure(self, row: _Row, policy: Eviction) -> None:
        loop, name = self._loop, self._name
        await bring_up(loop, name)
        expected = await ask_canary(loop, self._executor, name)
        before = self._handle()
        row.gpu["before"] = await self._held(before)
        if policy.process is Process.CHECKPOINT:
            await self._discard()  # an image that is there already would only be reused

        began = monotonic()
        self._reasons.clear()
        record = await bring_down(loop, name, policy) or record_of(loop, name)
        row.sleep_secs = monotonic() - began
        phase = record.phase
        row.gpu["parked"] = await self._held(before)
        if policy.process is not Process.STOP and not isinstance(phase, Parked):
            reason = phase.reason if isinstance(phase, Stopped) else ""
            reason = phase.message if isinstance(phase, Failed) else reason
            row.problems.append(f"not parked: {reason or 'a request needs it'}")
            return
        if isinstance(phase, Parked) and phase.eviction != policy:  # a full disk, too little memory
            row.problems.append(f"parked by {phase.eviction} instead: {phase.reason}")
            return
        self._judge_memory(row, policy, await self._allowed(policy))
        image = await self._image() if policy.process is Process.CHECKPOINT else None
        row.image_bytes = image.disk_bytes if image else None

        began = monotonic()
        self._reasons.clear()
        await bring_up(loop, name)
        row.wake_secs = monotonic() - began
        after = self._handle()
        row.gpu["woken"] = await self._held(after)
        self._judge_woken(row)
        self._judge_answer(row, expected, await ask_canary(loop, self._executor, name))
        if policy.process is not Process.STOP and after.pid != before.pid:
            reason = self._reasons[-1] if self._reasons else "its processes are new"
            row.problems.append(f"not woken but started cold: {reason}")
            row.response = "MISMATCH" if "canary" in reason else row.response
        if image is not None and policy != self._configured():
            await self._discard()

    def _judge_woken(self, row: _Row) -> None:
        """An engine that serves holds its weights; one that answers without was not woken."""
        before, woken = row.gpu.get("before"), row.gpu.get("woken")
        if before is not None and woken is not None and woken < before * WOKEN_SHARE:
            row.problems.append(
                f"woke without its memory: {woken >> 20} MiB of {before >> 20} on the GPU"
            )

    def _configured(self) -> Eviction:
        return record_of(self._loop, self._name).eviction

    def _handle(self) -> UnitHandle:
        instance = self._executor.instance(record_of(self._loop, self._name).config)
        if instance.handle is None:
            raise LlmuxError(f"cannot measure {self._name}: it has no engine")
        return instance.handle

    async def _held(self, handle: UnitHandle) -> int | None:
        """Bytes of GPU memory of the unit's processes; None where it cannot be seen."""
        return await total_held(self._drivers, handle)

    async def _allowed(self, policy: Eviction) -> int | None:
        record = record_of(self._loop, self._name)
        if (policy.weights, policy.process) in (
            (Weights.RETAIN, Process.KEEP_RUNNING),
            (Weights.RETAIN, Process.FREEZE),
        ):
            return None  # promises nothing
        share = parked_share(record.config, policy)
        if not share:
            return 0
        totals = await self._drivers.gpu.totals()
        return sum(round(totals.get(gpu, 0) * share) + SLACK_BYTES for gpu in record.gpus)

    @staticmethod
    def _judge_memory(row: _Row, policy: Eviction, allowed: int | None) -> None:
        held = row.gpu["parked"]
        if held is not None and allowed is not None and held > allowed:
            row.problems.append(
                f"GPU memory not freed: {held / 2**20:.0f} MiB held while parked, {policy} promises"
                f" at most {allowed / 2**20:.0f}"
            )

    @staticmethod
    def _judge_answer(row: _Row, expected: Canary, got: Canary) -> None:
        row.response = "match" if same_answer(expected, got) else "MISMATCH"
        if row.response != "match":
            row.problems.append(f"answered {got.text!r} instead of {expected.text!r}")

    async def _image(self) -> Image | None:
        checkpointer = self._drivers.checkpointer
        images = await checkpointer.images() if checkpointer is not None else ()
        return next((image for image in images if image.model == self._name), None)

    async def _discard(self) -> None:
        checkpointer = self._drivers.checkpointer
        if checkpointer is not None:
            await checkpointer.discard(self._name)
            self._loop.post(ImageKnown(self._name, None))

    # ---- listening ------------------------------------------------------------------------------

    def published(self, old: State, new: State) -> None:
        record = new.models.get(self._name)
        former = old.models.get(self._name)
        if record is None or former is None or record.phase is former.phase:
            return
        if isinstance(record.phase, Starting) and record.phase.reason:
            self._reasons.append(record.phase.reason)

    def switched(self, switch: SwitchFinished) -> None:
        pass
