"""The configuration as frozen values. Every default appears once, here.

Durations are seconds as float (keys end in ``_secs`` or ``_ms``), sizes are bytes. Key names follow
the user's guide of the earlier system wherever it had one, so that its files load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from llmux.config.vllm_args import MAX_MODEL_LEN, TENSOR_PARALLEL, find_flag

NOTHING: Mapping[str, str] = MappingProxyType({})

DEFAULT_GPU_MEMORY = 0.9  # vLLM's own default for --gpu-memory-utilization
GPU_RESIDUE = 0.03  # CUDA context and graphs that sleep leaves behind: "~97 % freed" (guide)


class Weights(StrEnum):
    """What vLLM does with the weights before the process axis acts."""

    RETAIN = "retain"
    OFFLOAD = "offload"  # sleep level 1
    DISCARD = "discard"  # sleep level 2


class Process(StrEnum):
    """What happens to the engine's processes."""

    KEEP_RUNNING = "keep_running"
    FREEZE = "freeze"
    CUDA_SUSPEND = "cuda_suspend"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


class PolicyType(StrEnum):
    FIFO = "fifo"
    COST_AWARE = "cost_aware"
    TIME_SLICE = "time_slice"


@dataclass(frozen=True, slots=True)
class Eviction:
    """The two axes of parking; written ``weights+process`` on the command line and in logs."""

    weights: Weights = Weights.RETAIN
    process: Process = Process.STOP

    def __str__(self) -> str:
        return f"{self.weights}+{self.process}"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. ``name`` is what clients put into ``model``."""

    name: str
    model_path: str
    port: int | None = None  # TCP on 127.0.0.1; None = a unix socket of ours
    eviction: Eviction = Eviction()
    extra_args: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # further names that clients may use
    env: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    checkpoint_path: str | None = None
    gpus: tuple[int, ...] | int = (0,)  # indices, or a count to be placed
    gpu_memory: float = DEFAULT_GPU_MEMORY  # share of each GPU, (0, 1]
    gpu_memory_parked: float | None = None  # share still held while parked; None = by eviction
    vllm_command: tuple[str, ...] | None = None  # None = the top-level one
    startup_timeout_secs: float | None = None  # None = the top-level one
    sleep_timeout_secs: float = 120.0
    wake_timeout_secs: float = 300.0  # one bound for wake_up and reload_weights: slow disks count
    checkpoint_timeout_secs: float = 900.0  # a dump or a restore: tens of GB on a slow disk
    stop_grace_secs: float = 10.0  # SIGTERM to cgroup kill
    stall_timeout_secs: float = 120.0  # busy and no byte for so long: probe, then kill; 0 = off
    canary: bool = True
    allow_tensor_parallel_parking: bool = False  # cuda_suspend and checkpoint across several GPUs

    @property
    def max_model_len(self) -> int | None:
        """As the engine's own arguments say; None when it is left to the model (or to a suffix)."""
        flag = find_flag(self.extra_args, MAX_MODEL_LEN)
        return int(flag.value) if flag and flag.value and flag.value.isdigit() else None

    @property
    def tensor_parallel_size(self) -> int:
        """As the engine's own arguments say; from nothing else can it be known (facts, not guesses:
        counting processes has misled before)."""
        flag = find_flag(self.extra_args, TENSOR_PARALLEL)
        return int(flag.value) if flag and flag.value and flag.value.isdigit() else 1


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    policy_type: PolicyType = PolicyType.FIFO
    request_timeout_secs: float = 300.0
    drain_before_switch: bool = True
    drain_timeout_secs: float = 120.0
    min_active_secs: float = 5.0
    coalesce_window_ms: float = 2000.0
    amortization_factor: float = 0.5
    max_wait_secs: float = 15.0
    backoff_secs: float = 2.0  # first wait after a failed start; doubles
    backoff_max_secs: float = 300.0


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    criu_path: str = "criu"
    cuda_plugin_dir: str | None = None  # None = CUDA out of band, CRIU with an empty plugin dir
    images_dir: str = "/var/lib/llmux/checkpoints"
    cuda_checkpoint_path: str | None = None  # None = the driver API
    keep_images: bool = True
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    listen: tuple[str, ...] = ()  # "host:port" or "unix:/path"; empty = 127.0.0.1:port
    workers: int = 1
    max_body_bytes: int = 64 * 1024 * 1024
    max_waiting: int = 1024  # requests that may wait for one model; each worker has its part
    max_in_flight: int = 1024  # requests of one model at its engine; each worker has its part
    cors_origins: tuple[str, ...] = ()  # web pages that may use the API; "*" = all of them
    keep_alive_comment_secs: float = 0.0  # a comment to streams that wait, so often; 0 = none
    keys_file: str | None = None  # a path, or credential:NAME; None = nobody needs a key
    allow_public_without_keys: bool = False
    tls_certificate: str | None = None  # a path, or credential:NAME; with tls_key, for all of TCP
    tls_key: str | None = None
    metrics_listen: tuple[str, ...] = ()  # empty = 127.0.0.1:metrics_port


class KeyRole(StrEnum):
    USE = "use"
    ADMIN = "admin"  # the control endpoints as well


@dataclass(frozen=True, slots=True)
class Key:
    """One API key, as its hash. Limits hold for the whole gateway: a worker has its part of them,
    rounded up."""

    name: str
    sha256: bytes
    role: KeyRole = KeyRole.USE
    models: frozenset[str] | None = None  # None = all
    max_in_flight: int | None = None  # requests at a time, those that wait included
    requests_per_minute: float | None = None
    max_waiting: int | None = None  # requests that wait for a model, or for a place at its engine


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; ``sources`` are the files it came from, in order."""

    models: Mapping[str, ModelConfig] = field(default_factory=lambda: MappingProxyType({}))
    policy: PolicyConfig = PolicyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    gateway: GatewayConfig = GatewayConfig()
    port: int = 3000
    metrics_port: int = 9090  # 0 = off
    vllm_command: tuple[str, ...] = ("vllm",)
    engine_user: str = "llmux-engine"
    gpu_count: int | None = None  # None = ask the GPU observer, else 1
    warmup: bool = False
    startup_timeout_secs: float = 1800.0
    sources: tuple[str, ...] = ()

    def listen_addresses(self) -> tuple[str, ...]:
        """Where the gateway listens; without a choice only the loopback, on ``port``."""
        return self.gateway.listen or (f"127.0.0.1:{self.port}",)

    def metrics_addresses(self) -> tuple[str, ...]:
        """Where /metrics alone is served, to whoever can connect."""
        if self.metrics_port == 0:
            return ()
        return self.gateway.metrics_listen or (f"127.0.0.1:{self.metrics_port}",)

    def startup_timeout(self, model: ModelConfig) -> float:
        own = model.startup_timeout_secs
        return self.startup_timeout_secs if own is None else own
