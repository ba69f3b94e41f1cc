"""The arguments of verbs, checked against the state. Each refusal names what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmux.config.schema import Eviction, Process
from llmux.errors import Reason, Refused
from llmux.runtime.control.orders import record_of
from llmux.runtime.host import Drivers
from llmux.runtime.loop import Loop


class Arguments:
    def __init__(self, loop: Loop, drivers: Drivers) -> None:
        self._loop = loop
        self._drivers = drivers

    def model(self, args: Mapping[str, Any]) -> str:
        name = args.get("model")
        if not isinstance(name, str):
            raise Refused(Reason.BAD_REQUEST, 'cannot act: "model" is missing or not a string')
        if name not in self._loop.state.models:
            raise Refused(Reason.UNKNOWN_MODEL, f"Model not found: {name}")
        return name

    def models(self, names: Iterable[Any]) -> list[str]:
        """Each once, however often it is named."""
        return list(dict.fromkeys(self.model({"model": name}) for name in names))

    def eviction(self, args: Mapping[str, Any]) -> Eviction | None:
        value = args.get("eviction")
        if value is None:
            return None
        if isinstance(value, dict):
            value = f"{value.get('weights')}+{value.get('process')}"
        try:
            return Eviction.parse(str(value))
        except ValueError as error:
            raise Refused(Reason.BAD_REQUEST, f"cannot read the eviction: {error}") from error

    def check_parking(self, name: str, eviction: Eviction | None) -> None:
        """Refuse what the configuration's checks refuse, and what this host has no means for."""
        config = record_of(self._loop, name).config
        if eviction is None:
            return
        if obstacle := config.parking_obstacle(eviction):
            raise Refused(Reason.BAD_REQUEST, obstacle.message, hint=obstacle.hint)
        drivers = self._drivers
        if eviction.process is Process.CUDA_SUSPEND and drivers.cuda is None:
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot park {name} by {eviction}: there is no CUDA driver here",
                hint="llmux doctor",
            )
        if eviction.process is Process.CHECKPOINT and drivers.checkpointer is None:
            raise Refused(
                Reason.BAD_REQUEST,
                f"cannot park {name} by {eviction}: images need llmux as a service",
            )

    def flag(self, args: Mapping[str, Any], name: str, default: bool) -> bool:
        value = args.get(name, default)
        if not isinstance(value, bool):
            raise Refused(Reason.BAD_REQUEST, f'"{name}" must be true or false, not {value!r}')
        return value
