"""The file format: each mapping's keys, their parsers, and remedies for keys of earlier versions.

Defaults are in ``schema``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any, Final

from llmux.config import addresses, parse, quantities
from llmux.config.files.marks import Node, Parser, Scalar, invalid, quote
from llmux.config.schema import (
    AfterReboot,
    CheckpointConfig,
    Config,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    PolicyType,
)
from llmux.config.sections import GoneKey, Spec, ladder, limits
from llmux.engines import ENGINE_TYPES

DAY: Final = 86400.0


def _engine(node: Node) -> str:
    name = parse.line(node, f"one of {', '.join(ENGINE_TYPES)}")
    if name not in ENGINE_TYPES:
        raise invalid(node, f"unknown engine {quote(name)}; there are: {', '.join(ENGINE_TYPES)}")
    return name


def _defaults(cls: type[Any]) -> Mapping[str, Any]:
    values = {}
    for item in fields(cls):
        made = item.default_factory() if item.default_factory is not MISSING else item.default
        values[item.name] = made
    return MappingProxyType(values)


def _use_extra_args(flag: str, *, default: str) -> GoneKey:
    def message(node: Node) -> str:
        value = node.text if isinstance(node, Scalar) and node.text else default
        return (
            f"this key is gone; pass it to vLLM: extra_args: [{quote(flag)}, {quote(value)}]"
            if value != default
            else f"this key is gone; remove it ({default} is the default), "
            f"or pass {flag} in extra_args"
        )

    return message


def _gone_gpu_memory(node: Node) -> str:
    value = node.text if isinstance(node, Scalar) and node.text else "0.9"
    return f"this key is gone; write gpu_memory: {value}"


# Sleep levels of llmux 0.4 and 0.5; in 0.1 to 0.3 level 3 stopped the engine.
_SLEEP_LEVELS: Final = MappingProxyType(
    {
        "1": "offload+keep_running",
        "2": "discard+keep_running",
        "3": "retain+cuda_suspend",
        "4": "discard+checkpoint",
        "5": "retain+stop",
    }
)


def _gone_sleep_level(node: Node) -> str:
    level = node.text if isinstance(node, Scalar) else ""
    if level == "3":
        return (
            "this key is gone; write eviction: retain+cuda_suspend "
            "(or eviction: retain+stop, if the file was made for 0.3 or older)"
        )
    if level in _SLEEP_LEVELS:
        return f"this key is gone; write eviction: {_SLEEP_LEVELS[level]}"
    listed = ", ".join(f"{number} = {words}" for number, words in _SLEEP_LEVELS.items())
    return f"this key is gone; write eviction: WEIGHTS+PROCESS ({listed})"


def _gone(message: str) -> GoneKey:
    return lambda _node: message


def _seconds(low: float, high: float) -> Parser[float]:
    return quantities.duration("s", low, high)


def _milliseconds(low: float, high: float) -> Parser[float]:
    return quantities.duration("ms", low, high)


_PORT: Final = quantities.integer(1, 65535, "a port")
_ARGUMENTS: Final = parse.listing(parse.argument, '["--max-model-len", "4096"]')
_MODELS: Final = parse.listing(parse.alias, '["chat", "coder"]')
_LISTEN: Final = parse.one_or_more(addresses.listen_address, '["127.0.0.1:3000"]')

MODEL: Final = Spec(
    {
        "model_path": parse.model_path,
        "engine": _engine,
        "port": _PORT,
        "eviction": ladder,
        "extra_args": _ARGUMENTS,
        "aliases": parse.listing(parse.alias, '["gpt-4o-mini"]'),
        "env": parse.environment,
        "checkpoint_path": parse.absolute_path,
        "gpus": parse.gpus,
        "gpu_memory": quantities.number(0, 1, above=True),
        "gpu_memory_parked": quantities.number(0, 1),
        "vllm_command": parse.command,
        "startup_timeout_secs": _seconds(1, DAY),
        "sleep_timeout_secs": _seconds(0.1, DAY),
        "wake_timeout_secs": _seconds(0.1, DAY),
        "checkpoint_timeout_secs": _seconds(1, DAY),
        "stop_grace_secs": _seconds(0, 3600),
        "stall_timeout_secs": _seconds(0, DAY),
        "canary": parse.boolean,
        "limits": limits,
        "allow_tensor_parallel_parking": parse.boolean,
        "priority": quantities.integer(-1000, 1000),
        "never_evict": parse.boolean,
        "idle_timeout_secs": _seconds(0, 365 * DAY),
    },
    required={"model_path": "a Hugging Face id such as Qwen/Qwen3-0.6B, or an absolute path"},
    gone={
        "sleep_level": _gone_sleep_level,
        "gpu_memory_utilization": _gone_gpu_memory,
        "tensor_parallel_size": _use_extra_args("--tensor-parallel-size", default="1"),
        "dtype": _use_extra_args("--dtype", default="auto"),
    },
    defaults=_defaults(ModelConfig),
)

POLICY: Final = Spec(
    {
        "policy_type": parse.choice(PolicyType),
        "eviction": ladder,  # for the models that have none of their own
        "request_timeout_secs": _seconds(0.01, 7 * DAY),
        "drain_before_switch": parse.boolean,
        "drain_timeout_secs": _seconds(0, DAY),
        "min_active_secs": _seconds(0, DAY),
        "coalesce_window_ms": _milliseconds(0, 3_600_000),
        "amortization_factor": quantities.number(0, 1000),
        "max_wait_secs": _seconds(0, DAY),
        "tick_interval_ms": _milliseconds(1, 60_000),
        "min_quantum_ms": _milliseconds(0, 3_600_000),
        "give_up_start_secs": _seconds(0, DAY),
        "idle_timeout_secs": _seconds(0, 365 * DAY),
        "parked_max_bytes": quantities.size(1024**2, 1024**5),
        "backoff_secs": _seconds(0.01, DAY),
        "backoff_max_secs": _seconds(0.01, DAY),
    },
    gone={"sleep_level": _gone_sleep_level},
    idle={
        "tick_interval_ms": "time_slice decides when something changes, not at intervals",
        "min_quantum_ms": "min_active_secs is the least time of a turn",
    },
    defaults=_defaults(PolicyConfig),
)

CHECKPOINT: Final = Spec(
    {
        "criu_path": parse.executable,
        "cuda_plugin_dir": parse.absolute_path,
        "images_dir": parse.absolute_path,
        "cuda_checkpoint_path": parse.executable,
        "keep_images": parse.boolean,
        "after_reboot": parse.choice(AfterReboot),
        "max_bytes": quantities.size(1024**2, 1024**5),
    },
    gone={
        "object_store": _gone(
            "this key is gone; images live in images_dir: remove the key, and put images_dir on "
            "a shared file system if hosts must share them"
        )
    },
    defaults=_defaults(CheckpointConfig),
)

GATEWAY: Final = Spec(
    {
        "listen": _LISTEN,
        "socket_mode": parse.file_mode,
        "socket_group": parse.user_name,
        "workers": quantities.integer(1, 256),
        "drain_timeout_secs": _seconds(0, DAY),
        "max_body_bytes": quantities.size(1024, 16 * 1024**3),
        "max_buffered_bytes": quantities.size(1024**2, 1024**4),
        "max_connections": quantities.integer(1, 1_000_000),
        "max_waiting": quantities.integer(1, 1_000_000),
        "max_in_flight": quantities.integer(1, 1_000_000),
        "cors_origins": parse.one_or_more(addresses.origin, '["https://chat.example.org"]'),
        "keep_alive_comment_secs": _seconds(0, 3600),
        "loading_text": parse.boolean,
        "keys_file": parse.secret_path,
        "allowed_hosts": parse.one_or_more(addresses.host_name, '["llm.example.org"]'),
        "allow_public_without_keys": parse.boolean,
        "tls_certificate": parse.secret_path,
        "tls_key": parse.secret_path,
        "metrics_listen": _LISTEN,
        "ui": parse.boolean,
        "fallback_model": parse.alias,
    },
    defaults=_defaults(GatewayConfig),
)

SCALARS: Final[Mapping[str, Parser[Any]]] = MappingProxyType(
    {
        "port": _PORT,
        "metrics_port": quantities.integer(0, 65535, "a port (0 for none)"),
        "vllm_command": parse.command,
        "engine_user": parse.user_name,
        "gpu_count": quantities.integer(1, 64),
        "warmup": parse.boolean,
        "preload": _MODELS,
        "exclusive": parse.listing(_MODELS, '[["chat", "coder"]]'),
        "startup_timeout_secs": _seconds(1, DAY),
    }
)

SECTIONS: Final = MappingProxyType({"policy": POLICY, "checkpoint": CHECKPOINT, "gateway": GATEWAY})


def _as_is(node: Node) -> Node:
    return node


# Where a key belongs that is in the wrong mapping.
HOMES: Final[Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(MODEL.parsers, "under a model")
    | {key: f"under {name}" for name, spec in SECTIONS.items() for key in spec.parsers}
    | dict.fromkeys(SCALARS, "at the top level")
)

TOP: Final = Spec(
    {"models": _as_is, **dict.fromkeys(SECTIONS, _as_is), **SCALARS},
    gone={
        "admin_port": _gone(
            "this key is gone; remove it: the control API is on the gateway's address"
        ),
        "vllm_logging": _gone(
            "this key is gone; remove it: vLLM's output always goes to the journal "
            "(llmux logs MODEL)"
        ),
    },
    defaults=_defaults(Config),
)
