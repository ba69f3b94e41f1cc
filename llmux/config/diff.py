"""Compare two configurations: what a reload changes, and when that takes effect. Pure.

The tables name every field of the schema; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final

from llmux.config.schema import Config, ModelConfig


class Effect(StrEnum):
    """When a changed value takes effect."""

    LIVE = "live"
    ENGINE = "engine restart"  # at the model's next cold start
    GATEWAY = "gateway restart"
    SUPERVISOR = "supervisor restart"


# gpu_memory is a start argument of the engine as well as its claim: a running engine holds what it
# was started with. The same is true of its address; a checkpoint is an image of that process.
MODEL_EFFECTS: Final[dict[str, Effect]] = {
    "model_path": Effect.ENGINE,
    "engine": Effect.ENGINE,
    "port": Effect.ENGINE,
    "extra_args": Effect.ENGINE,
    "aliases": Effect.LIVE,
    "env": Effect.ENGINE,
    "gpus": Effect.ENGINE,
    "gpu_memory": Effect.ENGINE,
    "vllm_command": Effect.ENGINE,
    "eviction": Effect.LIVE,
    "ladder": Effect.LIVE,
    "checkpoint_path": Effect.LIVE,
    "gpu_memory_parked": Effect.LIVE,
    "startup_timeout_secs": Effect.LIVE,
    "sleep_timeout_secs": Effect.LIVE,
    "wake_timeout_secs": Effect.LIVE,
    "checkpoint_timeout_secs": Effect.LIVE,
    "stop_grace_secs": Effect.LIVE,
    "stall_timeout_secs": Effect.LIVE,
    "canary": Effect.LIVE,
    "limits": Effect.ENGINE,
    "allow_tensor_parallel_parking": Effect.LIVE,
    "priority": Effect.LIVE,
    "never_evict": Effect.LIVE,
    "idle_timeout_secs": Effect.LIVE,
}

# A section stands for its keys without an entry of their own. Listeners are bound when the gateway
# starts; drivers are built once, with their tools, directories and user.
SETTING_EFFECTS: Final[dict[str, Effect]] = {
    "policy": Effect.LIVE,
    "gateway": Effect.GATEWAY,
    "checkpoint": Effect.SUPERVISOR,
    "checkpoint.keep_images": Effect.LIVE,
    "checkpoint.max_bytes": Effect.LIVE,
    "port": Effect.GATEWAY,
    "metrics_port": Effect.GATEWAY,
    "vllm_command": Effect.LIVE,  # shows as a change of the models that use it
    "engine_user": Effect.SUPERVISOR,
    "gpu_count": Effect.SUPERVISOR,
    "warmup": Effect.LIVE,
    "preload": Effect.LIVE,  # read when the supervisor starts on a host without engines
    "exclusive": Effect.LIVE,
    "startup_timeout_secs": Effect.LIVE,
}

_SECTIONS: Final = ("policy", "checkpoint", "gateway")


@dataclass(frozen=True, slots=True)
class ModelChange:
    """Changed fields of a model that both configurations have, by when they take effect."""

    name: str
    live: tuple[str, ...]
    engine_restart: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConfigDiff:
    """Names of models, and paths of settings (``policy.min_active_secs``)."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[ModelChange, ...] = ()
    live: tuple[str, ...] = ()
    gateway_restart: tuple[str, ...] = ()
    supervisor_restart: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """True when anything changed but the names of the files."""
        return self != ConfigDiff()


def diff_config(old: Config, new: Config) -> ConfigDiff:
    changed = []
    for name, model in new.models.items():
        before = old.models.get(name)
        if before is not None:
            change = _model_change(old, before, new, model)
            if change.live or change.engine_restart:
                changed.append(change)
    settings = {path: setting_effect(path) for path in _changed_settings(old, new)}

    def having(effect: Effect) -> tuple[str, ...]:
        return tuple(path for path, its in settings.items() if its is effect)

    return ConfigDiff(
        added=tuple(name for name in new.models if name not in old.models),
        removed=tuple(name for name in old.models if name not in new.models),
        changed=tuple(changed),
        live=having(Effect.LIVE),
        gateway_restart=having(Effect.GATEWAY),
        supervisor_restart=having(Effect.SUPERVISOR),
    )


def setting_effect(path: str) -> Effect:
    return SETTING_EFFECTS.get(path) or SETTING_EFFECTS[path.partition(".")[0]]


def _model_change(old: Config, before: ModelConfig, new: Config, after: ModelConfig) -> ModelChange:
    names = [name for name in _changed(before, after) if name != "vllm_command"]
    # A model without a command of its own has the top-level one: compare what would be run.
    if (before.vllm_command or old.vllm_command) != (after.vllm_command or new.vllm_command):
        names.append("vllm_command")
    return ModelChange(
        after.name,
        live=tuple(name for name in names if MODEL_EFFECTS[name] is Effect.LIVE),
        engine_restart=tuple(name for name in names if MODEL_EFFECTS[name] is Effect.ENGINE),
    )


def _changed_settings(old: Config, new: Config) -> Iterator[str]:
    for name in _changed(old, new):
        if name in _SECTIONS:
            for key in _changed(getattr(old, name), getattr(new, name)):
                yield f"{name}.{key}"
        elif name not in ("models", "sources"):
            yield name


def _changed(old: Any, new: Any) -> list[str]:
    names = (field.name for field in fields(new))
    return [name for name in names if getattr(old, name) != getattr(new, name)]
