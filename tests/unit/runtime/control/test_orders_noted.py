"""What operators ordered is noted down when it was ordered, not at the next model's move."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from llmux.config.schema import Config, Eviction, ModelConfig
from llmux.core.reducer import initial
from llmux.runtime.loop import orders_changed, phases_changed

STATE = initial(
    Config(models=MappingProxyType({"alpha": ModelConfig("alpha", "-")})),
    gpu_count=1,
    epoch_prefix="e",
)


def test_the_mode_and_the_pin_are() -> None:
    for new in (replace(STATE, manual=True), replace(STATE, pinned="alpha")):
        assert orders_changed(STATE, new)
        assert orders_changed(new, STATE)
        assert not phases_changed(STATE, new)


def test_an_eviction_is() -> None:
    record = replace(STATE.models["alpha"], eviction_override=Eviction())
    new = replace(STATE, models=MappingProxyType({"alpha": record}))
    assert orders_changed(STATE, new)
    assert not phases_changed(STATE, new)


def test_nothing_else_is() -> None:
    assert not orders_changed(STATE, replace(STATE, generation=7))
