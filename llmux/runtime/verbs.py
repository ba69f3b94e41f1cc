"""The verbs of the control socket: what operators ask, answered from the published state.

Every order goes through the core as an event; the answer says what became of it, observed.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from llmux.config.schema import Eviction, Process
from llmux.core.events import EvictionSet, ModeSet
from llmux.errors import Reason, Refused
from llmux.ports import EngineOutput
from llmux.protocol import MAX_LINE, Ask, Tell
from llmux.runtime.checkpoints import Checkpoints
from llmux.runtime.loop import Loop
from llmux.runtime.orders import bring_down, bring_up, nobody
from llmux.runtime.status import process_state, status
from llmux.runtime.validation import Validation
from llmux.runtime.words import parse_eviction


class Verbs:
    """``reload`` re-reads the configuration and says what changed."""

    def __init__(
        self, loop: Loop, output: EngineOutput, reload: Callable[[], Awaitable[Any]]
    ) -> None:
        self._loop = loop
        self._output = output
        self._reload = reload
        self._checkpoints = Checkpoints(loop)
        self._table: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Any]]] = {
            "status": self._status,
            "load": self._load,
            "wake": self._load,
            "switch": self._switch,
            "unload": self._unload,
            "sleep": self._sleep,
            "mode": self._mode,
            "pin": self._pin,
            "unpin": self._unpin,
            "eviction_get": self._eviction_get,
            "eviction_set": self._eviction_set,
            "logs": self._logs,
            "reload": self._reload_config,
            "images": self._images,
        }
        # long work, told about while it goes on
        self._told: Mapping[str, Callable[[Mapping[str, Any], Tell], Awaitable[Any]]] = {
            "checkpoint": self._checkpoint,
            "restore": self._restore,
            "validate": self._validate,
        }

    async def answer(self, ask: Ask, tell: Tell = nobody) -> Any:
        """``tell`` hears what a long verb is doing."""
        if (long := self._told.get(ask.verb)) is not None:
            return await long(ask.args, tell)
        verb = self._table.get(ask.verb)
        if verb is None:
            raise Refused(Reason.BAD_REQUEST, f"cannot do {ask.verb!r}: no such verb")
        return await verb(ask.args)

    # ---- arguments ------------------------------------------------------------------------------

    def _model(self, args: Mapping[str, Any]) -> str:
        name = args.get("model")
        if not isinstance(name, str):
            raise Refused(Reason.BAD_REQUEST, 'cannot act: "model" is missing or not a string')
        if name not in self._loop.state.models:
            raise Refused(Reason.UNKNOWN_MODEL, f"Model not found: {name}")
        return name

    def _eviction(self, args: Mapping[str, Any]) -> Eviction | None:
        value = args.get("eviction")
        if value is None:
            return None
        if isinstance(value, dict):
            value = f"{value.get('weights')}+{value.get('process')}"
        try:
            return parse_eviction(str(value))
        except ValueError as error:
            raise Refused(Reason.BAD_REQUEST, f"cannot read the eviction: {error}") from error

    def _check_gpus(self, name: str, eviction: Eviction | None) -> None:
        """What the configuration refuses an operator cannot order either."""
        config = self._loop.state.models[name].config
        count = config.gpus if isinstance(config.gpus, int) else len(config.gpus)
        copied = eviction and eviction.process in (Process.CUDA_SUSPEND, Process.CHECKPOINT)
        if eviction and copied and count > 1 and not config.allow_tensor_parallel_parking:
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot use {eviction.process} with a model on {count} GPUs: NCCL's connections"
                " do not survive it in a stock vLLM",
                hint="for a vLLM that can, set allow_tensor_parallel_parking: true",
            )

    # ---- verbs ----------------------------------------------------------------------------------

    async def _status(self, args: Mapping[str, Any]) -> Any:
        return status(self._loop.state, self._loop.executor, self._loop.last_switches)

    async def _load(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        await bring_up(self._loop, name)
        return {"message": f"Model {name} is serving"}

    async def _switch(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        state = self._loop.state
        if state.manual and state.pinned is not None:
            self._loop.post(ModeSet(True, name))
        await bring_up(self._loop, name)
        return {"message": f"Switched to model: {name}"}

    async def _unload(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        weights = self._loop.state.models[name].eviction.weights
        await bring_down(self._loop, name, Eviction(weights, Process.STOP))
        return {"message": f"Model {name} is stopped"}

    async def _sleep(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        eviction = self._eviction(args)
        self._check_gpus(name, eviction)
        await bring_down(self._loop, name, eviction)
        record = self._loop.state.models[name]
        return {"message": f"Model {name} is {record.state}", "state": process_state(record)}

    async def _mode(self, args: Mapping[str, Any]) -> Any:
        mode = args.get("mode")
        if mode not in ("auto", "manual"):
            raise Refused(Reason.BAD_REQUEST, f'mode must be "auto" or "manual", not {mode!r}')
        self._loop.post(ModeSet(mode == "manual", None))
        return {"message": f"Mode set to {mode}"}

    async def _pin(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        before = self._loop.state
        self._loop.post(ModeSet(True, name))
        try:
            await bring_up(self._loop, name)
        except Refused:
            self._loop.post(ModeSet(before.manual, before.pinned))  # no pin that nobody serves
            raise
        return {"message": f"Pinned to model: {name}"}

    async def _unpin(self, args: Mapping[str, Any]) -> Any:
        self._loop.post(ModeSet(False, None))
        return {"message": "Unpinned; mode set to auto"}

    async def _eviction_get(self, args: Mapping[str, Any]) -> Any:
        models = {
            name: {
                "eviction": {
                    "weights": record.eviction.weights.value,
                    "process": record.eviction.process.value,
                },
                "process_state": process_state(record),
            }
            for name, record in self._loop.state.models.items()
        }
        return {"models": models}

    async def _eviction_set(self, args: Mapping[str, Any]) -> Any:
        name, eviction = self._model(args), self._eviction(args)
        if eviction is None:
            raise Refused(Reason.BAD_REQUEST, 'cannot set the eviction: "eviction" is missing')
        self._check_gpus(name, eviction)
        self._loop.post(EvictionSet(name, eviction))
        return {"message": f"Eviction of {name} set to {eviction}"}

    async def _logs(self, args: Mapping[str, Any]) -> Any:
        lines = args.get("lines", 100)
        if not isinstance(lines, int) or lines < 1:
            raise Refused(Reason.BAD_REQUEST, f"cannot show {lines!r} lines: a whole number > 0")
        return {"lines": _that_fit(self._output.tail(self._model(args), lines))}

    async def _reload_config(self, args: Mapping[str, Any]) -> Any:
        return await self._reload()

    # ---- checkpoints ----------------------------------------------------------------------------

    async def _images(self, args: Mapping[str, Any]) -> Any:
        return {"images": await self._checkpoints.listing()}

    async def _checkpoint(self, args: Mapping[str, Any], tell: Tell) -> Any:
        warm_up = args.get("warm_up", True)
        if not isinstance(warm_up, bool):
            raise Refused(Reason.BAD_REQUEST, f'"warm_up" must be true or false, not {warm_up!r}')
        name, eviction = self._model(args), self._eviction(args)
        self._check_gpus(name, eviction)
        return await self._checkpoints.make(name, eviction, warm_up=warm_up, tell=tell)

    async def _restore(self, args: Mapping[str, Any], tell: Tell) -> Any:
        return await self._checkpoints.restore(self._model(args), tell=tell)

    async def _validate(self, args: Mapping[str, Any], tell: Tell) -> Any:
        policies = args.get("policies")
        if not isinstance(policies, list) or not policies:
            raise Refused(Reason.BAD_REQUEST, 'cannot validate: "policies" is missing or empty')
        name = self._model(args)
        evictions = [self._eviction({"eviction": policy}) for policy in policies]
        wanted = [eviction for eviction in evictions if eviction is not None]
        for eviction in wanted:
            self._check_gpus(name, eviction)
        return await Validation(self._loop, name, tell).run(wanted)


def _that_fit(lines: list[str]) -> list[str]:
    """The last of them that fit into one message; an engine may write lines without end."""
    room = MAX_LINE // 2
    kept = 0
    for line in reversed(lines):
        room -= len(json.dumps(line)) + 1
        if room < 0:
            break
        kept += 1
    return lines[len(lines) - kept :]
