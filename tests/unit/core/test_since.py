"""Since when a model is in its first state: since it is known, not since the host was booted. Since
when an engine is silent: since it serves."""

from __future__ import annotations

from types import MappingProxyType

from core_harness import Core, model

from llmux.config.schema import Config, ModelConfig
from llmux.core.events import ConfigChanged
from llmux.core.reducer import initial, reduce


def config(*names: str) -> Config:
    return Config(models=MappingProxyType({name: ModelConfig(name, "-") for name in names}))


def test_those_of_the_first_configuration_and_those_that_are_added() -> None:
    state = initial(config("a"), gpu_count=1, epoch_prefix="e", now=1000.0)
    assert state.models["a"].phase.since == 1000.0
    state, _ = reduce(state, ConfigChanged(config("a", "b")), 2000.0)
    assert {name: record.phase.since for name, record in state.models.items()} == {
        "a": 1000.0,
        "b": 2000.0,
    }


def test_an_engine_is_not_silent_since_before_it_served() -> None:
    core = Core(model("a", stall_timeout_secs=30.0))
    core.demand("a", waiting=1)
    core.now += 1000.0
    core.finish("a")
    assert core.record("a").progress_at == core.now
