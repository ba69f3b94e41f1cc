"""What is known of vLLM: its arguments, environment, sleep and wake, versions and output. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Final

from llmux.engines import canaries
from llmux.engines.engine_type import EngineType, Launch, VersionFault, WakeAction, WakeStage
from llmux.engines.failures import root_cause
from llmux.engines.options import find_option, split_option
from llmux.engines.parking import SUSPENDING, Weights
from llmux.engines.progress import vllm_stage

# ---- arguments and environment -------------------------------------------------------------------

KEY_REMEDY: Final = (
    "remove it: the engine listens for llmux alone, whose requests carry no key; "
    "`gateway.keys_file` is for clients' keys"
)
CONTEXT_REMEDY: Final = (
    "remove it: llmux suspends CUDA contexts itself (`cuda_suspend`, `checkpoint`), "
    "and what vLLM has suspended cannot be suspended or resumed once more"
)
OWNED_OPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "--port": "llmux sets it; use the model's key `port`, or nothing for a unix socket",
        "--host": "llmux sets it: engines listen on 127.0.0.1 or a unix socket; "
        "clients connect to `gateway.listen`",
        "--uds": "llmux sets it; leave out the model's key `port` for a unix socket",
        "--served-model-name": "llmux sets it to the model's name under `models`",
        "--model": "llmux sets it from `model_path`",
        "--api-key": KEY_REMEDY,
    }
)
GPU_MEMORY: Final = ("--gpu-memory-utilization", "--device-memory-utilization")
MAX_MODEL_LEN: Final = ("--max-model-len",)
LORA_MODULES: Final = "--lora-modules"
# The KV cache is in vLLM's own allocator with either, and only there can it be discarded by itself.
# Never passed for a `retain` model: the weights would be in it too, and the CPU build refuses both.
OWN_ALLOCATOR: Final = (
    ("--enable-sleep-mode", "--no-enable-sleep-mode"),
    ("--enable-cumem-allocator", "--no-enable-cumem-allocator"),
)
CONFIG_FILE: Final = ("--config",)  # its values count less than arguments
RANK_OPTIONS: Final = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
)
# What is looked for by its name. vLLM's parser takes the beginning of a name for the whole, and
# ``--name.key`` for a key of the option's JSON object.
READ_OPTIONS: Final = (
    *OWNED_OPTIONS,
    *GPU_MEMORY,
    *MAX_MODEL_LEN,
    LORA_MODULES,
    *chain(*OWN_ALLOCATOR),
    *CONFIG_FILE,
    *chain(*RANK_OPTIONS),
    "--hf-token",
)
# Begin like one of those, and are options of their own (to vLLM 0.10).
WHOLE_NAMES: Final = frozenset({"--device"})

ALWAYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "NO_COLOR": "1",  # escape sequences do not belong in the journal
        "PYTHONUNBUFFERED": "1",  # the last lines before a death must not be lost in a buffer
        "VLLM_NO_USAGE_STATS": "1",  # telemetry keeps a connection open that CRIU cannot dump
        "DO_NOT_TRACK": "1",
    }
)

# For CUDA suspend and images: facts of vLLM, libuv, NCCL and Python.
SUSPENDABLE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # forked children keep /dev/nvidia* descriptors
        "UV_USE_IO_URING": "0",
        "USE_LIBUV": "0",
        "NCCL_IB_DISABLE": "1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "VLLM_HOST_IP": "127.0.0.1",
        # Tracebacks without markers below the lines, and 4 MB less in each of vLLM's processes and
        # in the image: 12 MB of 1.30 GB (vLLM 0.32, Python 3.11, measured 2026-11-21).
        "PYTHONNODEBUGRANGES": "1",
    }
)


def argv(launch: Launch) -> tuple[str, ...]:
    where: tuple[str, ...] = ("--uds", launch.uds) if launch.uds else ("--host", "127.0.0.1")
    if launch.port is not None:
        where = (*where, "--port", str(launch.port))
    return (
        *launch.command,
        "serve",
        launch.model_path,
        "--served-model-name",
        launch.name,  # alone: aliases are the gateway's, so a new one makes no image stale
        *where,
        *(("--enable-sleep-mode",) if sleeps(launch) else ()),
        *_gpu_memory(launch),
        *launch.extra_args,
    )


def _gpu_memory(launch: Launch) -> tuple[str, ...]:
    """The engine takes what the model claims; its own default differs by version (0.92 in 0.32)."""
    if find_option(launch.extra_args, (*GPU_MEMORY, *CONFIG_FILE)):
        return ()
    return GPU_MEMORY[0], f"{launch.gpu_memory:g}"


def adapters(extra_args: Sequence[str]) -> tuple[str, ...]:
    """Names of LoRA adapters: ``--lora-modules NAME=PATH …`` or JSON objects with a name. vLLM
    forgets those of an earlier ``--lora-modules``."""
    last = find_option(extra_args, (LORA_MODULES,))
    if last is None:
        return ()
    names = (_adapter_name(word) for _, word in _adapter_words(extra_args[last.index :]))
    return tuple(dict.fromkeys(filter(None, names)))


def argument_faults(extra_args: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(index, message) of words that vLLM would end with at its start, or that it would read as
    what llmux does not see in them."""
    for index, argument in enumerate(extra_args):
        name, _ = split_option(argument)
        if stands_for := _stands_for(name):
            remedy = OWNED_OPTIONS.get(stands_for, "write it out")
            yield index, f"cannot pass {name} to vLLM, which takes it for {stands_for}: {remedy}"
    for index, word in _adapter_words(extra_args):
        if not _adapter_name(word):
            needed = "NAME=PATH without a comma, or a JSON object with name and path"
            yield index, f"{LORA_MODULES} needs {needed}, got {json.dumps(word)}"


def _stands_for(name: str) -> str | None:
    """The option that llmux owns or reads and that vLLM may find under another ``name``."""
    head, dot, _ = name.partition(".")
    if not head.strip("-") or head in WHOLE_NAMES or (head in READ_OPTIONS and not dot):
        return None
    return next((option for option in READ_OPTIONS if option.startswith(head)), None)


def _adapter_words(extra_args: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(index, word) of each adapter."""
    inside = False
    for index, argument in enumerate(extra_args):
        option, value = split_option(argument)
        if option == LORA_MODULES:
            inside, word = value is None, value
        elif argument.startswith("-"):
            inside, word = False, None
        else:
            word = argument if inside else None
        if word:
            yield index, word


def _adapter_name(word: str) -> str:
    """Empty for what names none."""
    if "=" not in word or "," in word or word.lstrip().startswith("{"):
        try:
            found = json.loads(word)
            name, path = found["name"], found["path"]
        except (ValueError, LookupError, TypeError):
            return ""
        return name if isinstance(name, str) and isinstance(path, str) and path else ""
    name, _, path = word.partition("=")
    return name if path else ""


def environment(launch: Launch, directory: str, home: str | None) -> Mapping[str, str]:
    env = {**ALWAYS, "VLLM_RPC_BASE_PATH": directory}
    if home is not None:
        # Code that comes with models: never in an HF_HOME that others use.
        env["HF_MODULES_CACHE"] = f"{home}/.cache/huggingface/modules"
    if needs_development_mode(launch):
        env["VLLM_SERVER_DEV_MODE"] = "1"
    if suspends(launch):
        env.update(SUSPENDABLE)
    return env


def caches(env: Mapping[str, str]) -> Mapping[str, str]:
    """Where vLLM and the compilers that it calls keep what they compile, as they look for it."""
    home = env.get("HOME", "/")
    cache = env.get("XDG_CACHE_HOME") or f"{home}/.cache"
    temporary = env.get("TMPDIR") or "/tmp"  # noqa: S108  # looked at, not used
    inductor = f"{temporary}/torchinductor_{env.get('USER', 'user')}"
    flashinfer = env.get("FLASHINFER_WORKSPACE_BASE") or home
    return {
        "vLLM's cache": env.get("VLLM_CACHE_ROOT") or f"{cache}/vllm",
        "Triton's cache": env.get("TRITON_CACHE_DIR") or f"{home}/.triton/cache",
        "TorchInductor's cache": env.get("TORCHINDUCTOR_CACHE_DIR") or inductor,
        "FlashInfer's cache": f"{flashinfer}/.cache/flashinfer",
        "CUDA's cache": env.get("CUDA_CACHE_PATH") or f"{home}/.nv/ComputeCache",
    }


def sleeps(launch: Launch) -> bool:
    return any(eviction.weights is not Weights.RETAIN for eviction in launch.evictions)


def suspends(launch: Launch) -> bool:
    return any(eviction.process in SUSPENDING for eviction in launch.evictions)


def needs_development_mode(launch: Launch) -> bool:
    """Sleep, wake and workers' methods are vLLM's development endpoints; they are opened only when
    they are used."""
    methods = launch.ranks > 1 or cache_apart(launch.extra_args)
    return sleeps(launch) or (suspends(launch) and methods)


# ---- sleep and wake ------------------------------------------------------------------------------

SLEEP_LEVELS: Final = MappingProxyType({Weights.OFFLOAD: 1, Weights.DISCARD: 2})
WAKE_STAGES: Final = MappingProxyType(
    {
        Weights.RETAIN: (),
        Weights.OFFLOAD: (WakeStage(WakeAction.WAKE_UP),),
        # Weights first, then the reload, then the KV cache: the other order needs the memory of
        # both at once, and level 2 without a reload answers garbage (vllm#29341, #16564).
        Weights.DISCARD: (
            WakeStage(WakeAction.WAKE_UP, tags=("weights",)),
            WakeStage(WakeAction.RELOAD_WEIGHTS),
            WakeStage(WakeAction.WAKE_UP, tags=("kv_cache",)),
            WakeStage(WakeAction.RESET_PREFIX_CACHE, optional=True),
        ),
    }
)

# The workers' ``discard``; before it only a sleep gives the KV cache back, and the weights with it.
DISCARDS_CACHE: Final = (0, 32)


def cache_apart(extra_args: Sequence[str]) -> bool:
    """Of an option and its opposite the last one counts."""
    found = (find_option(extra_args, names) for names in OWN_ALLOCATOR)
    return any(option is not None and not option.name.startswith("--no-") for option in found)


def discards_cache(version: str) -> bool:
    return _numbers(version) >= DISCARDS_CACHE


# ---- versions ------------------------------------------------------------------------------------

# vllm#32714: weights are not freed on sleep from the first version to before the second (PR#32947).
SLEEP_BROKEN: Final = ((0, 14), (0, 17))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def version_fault(version: str, sleeping: bool) -> VersionFault | None:
    numbers = _numbers(version)
    if not numbers:
        return None
    if SLEEP_BROKEN[0] <= numbers < SLEEP_BROKEN[1]:
        return VersionFault(
            "sleep does not free the weights (vllm#32714, 0.14.0 to 0.16.x)",
            "upgrade to 0.17.0 or later, or park with weights: retain",
            serious=sleeping,
        )
    if numbers < SLEEP_BROKEN[0]:
        return VersionFault(
            "older than what llmux is tested with; /sleep has no mode=wait",
            "upgrade to 0.17.0 or later",
            serious=False,
        )
    return None


# ---- output --------------------------------------------------------------------------------------

# "INFO 11-21 20:41:07 [api_server.py:1]", "(EngineCore_DP0 pid=7) ERROR …", "INFO:     Started …"
_LEVEL: Final = re.compile(r"\s*(?:\([^)]*\)\s*)*(DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)\b")
_PRIORITIES: Final = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2, "FATAL": 2}
_FAULT: Final = re.compile(
    r"\s*(?:\([^)]*\)\s*)*(?:Traceback \(most recent call last\)|[\w.]*(?:Error|Exception)(?::|$)"
    r"|Segmentation fault|terminate called)"
)


def line_priority(line: str) -> int | None:
    """By the level word that vLLM and uvicorn begin a line with; None without one."""
    if (match := _LEVEL.match(line)) is not None:
        return _PRIORITIES[match.group(1)]
    return 3 if _FAULT.match(line) else None


VLLM: Final = EngineType(
    title="vLLM",
    identifier="vllm",
    owned_options=OWNED_OPTIONS,
    owned_variables=MappingProxyType(
        {"VLLM_API_KEY": KEY_REMEDY, "VLLM_SLEEP_OFFLOAD_CUDA_CONTEXT": CONTEXT_REMEDY}
    ),
    gpu_memory_option=GPU_MEMORY,
    max_model_len_option=MAX_MODEL_LEN,
    rank_options=RANK_OPTIONS,
    adapters=adapters,
    argument_faults=argument_faults,
    argv=argv,
    environment=environment,
    caches=caches,
    modules=("torch", "vllm"),
    sleep_levels=SLEEP_LEVELS,
    wake_stages=WAKE_STAGES,
    cache_apart=cache_apart,
    discards_cache=discards_cache,
    # vLLM's own since 0.32, and those of the patches that were used before
    communicators_down=("checkpoint_prepare", "suspend_nccl"),
    communicators_up=("checkpoint_restore", "resume_nccl"),
    canaries=canaries.OPENAI,
    sampled=canaries.SAMPLED,
    control_hint="is VLLM_SERVER_DEV_MODE=1 in its environment, and this vLLM recent enough?",
    libraries=("vllm", "torch", "transformers", "triton", "flashinfer_python"),
    shown_variables=re.compile(
        r"^(VLLM_(?!.*(KEY|TOKEN|SECRET|PASSWORD))|CUDA_VISIBLE|CUDA_DEVICE|NCCL_|OMP_|TORCH"
        r"|HF_HUB_OFFLINE$|TRANSFORMERS_OFFLINE$|UV_USE_IO_URING$|USE_LIBUV$|NO_COLOR$|DO_NOT_TRACK$"
        r"|LANG$|LC_|TZ$|PATH$|HOME$|PYTHONNODEBUGRANGES$)"
    ),
    distribution="vllm",
    version_fault=version_fault,
    metrics_prefix="vllm:",
    load_series=frozenset({"vllm:num_requests_running", "vllm:num_requests_waiting"}),
    # prompt_tokens would also move for a request that is only received.
    work_series=frozenset(
        {
            "vllm:generation_tokens_total",
            "vllm:iteration_tokens_total_count",
            "vllm:request_success_total",
        }
    ),
    line_priority=line_priority,
    root_cause=root_cause,
    stage=vllm_stage,
)
