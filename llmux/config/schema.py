"""The configuration as frozen values. Every default appears once, here.

Durations are seconds as float (keys end in _secs or _ms), sizes are bytes. Key names follow
the user's guide of the earlier system wherever it had one, so that its files load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import reduce
from types import MappingProxyType

from llmux.config.choices import KeyRole as KeyRole
from llmux.config.choices import PolicyType as PolicyType
from llmux.engines import DEFAULT_ENGINE, ENGINE_TYPES
from llmux.engines.engine_type import EngineType
from llmux.engines.options import find_option
from llmux.engines.parking import Eviction as Eviction
from llmux.engines.parking import Obstacle, parking_obstacle
from llmux.engines.parking import Process as Process
from llmux.engines.parking import Weights as Weights

DEFAULT_EVICTION = Eviction()
NOTHING: Mapping[str, str] = MappingProxyType({})

DEFAULT_GPU_MEMORY = 0.9
ENGINES = "llmux-engine"  # the user whose groups every engine of the service has
GPU_RESIDUE = 0.03  # CUDA context and graphs that sleep leaves behind: "~97 % freed" (guide)


LOCALHOST: tuple[str, ...] = ("127.0.0.0/8", "::1/128")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one engine's unit. Networks are written out: 10.0.0.0/8."""

    memory_max: int | None = None  # bytes of RAM; None = the share below
    memory_max_share: float = 0.95  # of the host's RAM: an engine ends before the host swaps
    tasks_max: int = 32768  # vLLM with 8 ranks on 256 processors has some 5000 threads
    ip_address_deny: tuple[str, ...] = ()  # empty = nothing, or all when some are allowed
    ip_address_allow: tuple[str, ...] = ()  # besides the loopback


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. ``name`` is what clients put into ``model``."""

    name: str
    model_path: str
    engine: str = DEFAULT_ENGINE  # a key of ENGINE_TYPES
    port: int | None = None  # TCP on 127.0.0.1; None = a unix socket
    eviction: Eviction = DEFAULT_EVICTION
    ladder: tuple[Eviction, ...] = ()  # below ``eviction``: further down while not used
    extra_args: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # further names that clients may use
    env: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    checkpoint_path: str | None = None
    gpus: tuple[int, ...] | int = (0,)  # indices, or a number of GPUs
    gpu_memory: float = DEFAULT_GPU_MEMORY  # share of each GPU, (0, 1]
    gpu_memory_parked: float | None = None  # share still held while parked; None = by eviction
    vllm_command: tuple[str, ...] | None = None  # None = the top-level one
    startup_timeout_secs: float | None = None  # None = the top-level one
    sleep_timeout_secs: float = 120.0
    wake_timeout_secs: float = 300.0  # one bound for wake_up and reload_weights: slow disks count
    checkpoint_timeout_secs: float = 900.0  # a dump or a restore: tens of GB on a slow disk
    stop_grace_secs: float = 10.0  # SIGTERM to cgroup kill
    stall_timeout_secs: float = 120.0  # busy without progress: probe, then kill; 0 = off
    canary: bool = True
    limits: Limits = Limits()
    allow_tensor_parallel_parking: bool = False  # cuda_suspend and checkpoint across several GPUs
    priority: int = 0  # a higher one is made resident first and leaves last
    never_evict: bool = False  # makes no room for others; operators may park it
    idle_timeout_secs: float | None = None  # parked after so long without a request; 0 = never

    @property
    def rungs(self) -> tuple[Eviction, ...]:
        """All ways in which it may be parked, the first first."""
        return (self.eviction, *self.ladder)

    @property
    def makes_images(self) -> bool:
        return any(rung.process is Process.CHECKPOINT for rung in self.rungs)

    @property
    def engine_type(self) -> EngineType:
        return ENGINE_TYPES[self.engine]

    @property
    def max_model_len(self) -> int | None:
        """From the engine's arguments; None when they leave it to the model (or use a suffix)."""
        option = find_option(self.extra_args, self.engine_type.max_model_len_option)
        return option.number if option else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of adapters that the engine serves as models of their own."""
        return self.engine_type.adapters(self.extra_args)

    @property
    def ranks(self) -> int:
        """The number of GPUs that the engine's arguments spread it over. Nothing else tells:
        counting processes has misled before."""
        found = (find_option(self.extra_args, names) for names in self.engine_type.rank_options)
        sizes = (option.number or 1 for option in found if option)
        return reduce(lambda product, size: product * size, sizes, 1)

    def parking_obstacle(self, eviction: Eviction) -> Obstacle | None:
        """Why this model cannot be parked so; None when it can."""
        return parking_obstacle(
            eviction,
            engine=self.engine_type.title,
            ranks=self.ranks,
            allow_parallel=self.allow_tensor_parallel_parking,
        )


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    policy_type: PolicyType = PolicyType.FAIR
    request_timeout_secs: float = 300.0
    drain_before_switch: bool = True
    drain_timeout_secs: float = 120.0
    min_active_secs: float = 5.0
    coalesce_window_ms: float = 2000.0
    amortization_factor: float = 0.5
    max_wait_secs: float = 15.0
    give_up_start_secs: float = 10.0  # for an unwanted start that is nearly done, others waiting
    idle_timeout_secs: float = 0.0  # for models without their own
    parked_max_bytes: int | None = None  # host memory of parked engines; None = no limit
    backoff_secs: float = 2.0  # first wait after a failed start; doubles
    backoff_max_secs: float = 300.0


class AfterReboot(StrEnum):
    """What becomes of images of an earlier boot."""

    DISCARD = "discard"
    TRY = "try"  # where kernel and driver are the same; the canary decides


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    criu_path: str = "criu"
    cuda_plugin_dir: str | None = None  # None = CUDA out of band, CRIU with an empty plugin dir
    images_dir: str = "/var/lib/llmux/checkpoints"
    cuda_checkpoint_path: str | None = None  # None = the driver API
    keep_images: bool = True
    after_reboot: AfterReboot = AfterReboot.DISCARD
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    listen: tuple[str, ...] = ()  # "host:port" or "unix:/path"; empty = 127.0.0.1:port
    socket_mode: str = "0660"  # of the unix sockets in listen
    socket_group: str | None = None  # their group; None = the gateway's own
    workers: int = 1
    max_body_bytes: int = 64 * 1024 * 1024
    max_buffered_bytes: int = 1024**3  # of all bodies together; each worker has its part
    max_connections: int = 8192  # of clients; each worker has its part
    drain_timeout_secs: float = 600.0  # for a former gateway's requests, beside the next one
    max_waiting: int = 1024  # requests waiting for one model; divided among workers
    max_in_flight: int = 1024  # requests at one model's engine; divided among workers
    cors_origins: tuple[str, ...] = ()  # web pages that may use the API; "*" = all of them
    keep_alive_comment_secs: float = 15.0  # between SSE comments until a stream begins; 0 = none
    loading_text: bool = False  # what chat streams wait for, in words, as reasoning_content
    keys_file: str | None = None  # a path, or credential:NAME; None = no key is needed
    allowed_hosts: tuple[str, ...] = ()  # further names in Host while there are no keys; "*" = all
    allow_public_without_keys: bool = False
    tls_certificate: str | None = None  # a path, or credential:NAME; needs tls_key
    tls_key: str | None = None
    metrics_listen: tuple[str, ...] = ()  # empty = 127.0.0.1:metrics_port
    ui: bool = True  # the page at /ui
    fallback_model: str | None = None  # answers requests for names that no model has


@dataclass(frozen=True, slots=True)
class Key:
    """One API key, as its hash. Each worker enforces its part of the limits, rounded up."""

    name: str
    sha256: bytes
    role: KeyRole = KeyRole.USE
    models: frozenset[str] | None = None  # None = all
    max_in_flight: int | None = None  # concurrent requests, waiting ones included
    requests_per_minute: float | None = None
    max_waiting: int | None = None  # requests waiting for a model or for a place at its engine


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
    engine_user: str | None = None  # None = a user of its own for each model
    gpu_count: int | None = None  # None = ask the GPU observer, else 1
    warmup: bool = False
    preload: tuple[str, ...] = ()  # models started with the host, as far as they fit together
    exclusive: tuple[tuple[str, ...], ...] = ()  # of each group one model is resident at a time
    startup_timeout_secs: float = 1800.0
    sources: tuple[str, ...] = ()

    def listen_addresses(self) -> tuple[str, ...]:
        """The gateway's addresses; by default the loopback, on ``port``."""
        return self.gateway.listen or (f"127.0.0.1:{self.port}",)

    def metrics_addresses(self) -> tuple[str, ...]:
        """Addresses that serve /metrics only, without keys."""
        if self.metrics_port == 0:
            return ()
        return self.gateway.metrics_listen or (f"127.0.0.1:{self.metrics_port}",)

    def resolved(self) -> Config:
        """With the top-level command in models without their own: what each would be started by."""
        models = {
            name: replace(model, vllm_command=model.vllm_command or self.vllm_command)
            for name, model in self.models.items()
        }
        return replace(self, models=MappingProxyType(models))

    def idle_timeout(self, model: ModelConfig) -> float:
        own = model.idle_timeout_secs
        return self.policy.idle_timeout_secs if own is None else own

    def startup_timeout(self, model: ModelConfig) -> float:
        own = model.startup_timeout_secs
        return self.startup_timeout_secs if own is None else own
