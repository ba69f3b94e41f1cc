"""The command line: vLLM's flags, loosely, and the stand-in's own, strictly.

vLLM has hundreds of flags; those that change nothing here are accepted and ignored, as a test or a
user's extra_args may carry any of them. A misspelt --standin-… flag would make a test show nothing,
so those are checked.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class UsageError(Exception):
    """The command line is wrong; exit status 2, as argparse does."""


class Options:
    """What the engine was started with."""

    def __init__(self) -> None:
        # vLLM's
        self.model = ""
        self.served_names: list[str] = []
        self.host = ""
        self.port = 8000
        self.uds: str | None = None
        self.api_key: str | None = os.environ.get("VLLM_API_KEY") or None
        self.sleep_mode = False
        self.max_model_len = 4096
        self.max_num_seqs = 256
        self.gpu_memory_utilization = 0.9
        self.tensor_parallel_size = 1
        self.dev_mode = os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0")
        self.gpus: list[int] = [0]
        # the stand-in's: memory
        self.ledger: str | None = None
        self.cuda: str | None = None
        self.capacity_gib = 80.0
        self.weights_gib = 1.0
        self.context_gib = 1.0
        self.device_checks = False
        self.profile_secs = 0.0
        self.sampler_compiles = False
        self.ram_mib = 0
        self.host_weights_mib = 0
        # the stand-in's: speed
        self.startup_secs = 0.0
        self.load_secs_per_gib = 0.0
        self.sleep_secs = 0.0
        self.wake_secs = 0.0
        self.tokens_per_sec = 0.0
        self.ttft_secs = 0.0
        # the stand-in's: behaviour
        self.answer_tokens = 24
        self.keep_alive_secs = 5.0
        self.dead_exit_secs = 5.0
        self.access_log = False
        self.metrics_file: str | None = None
        self.faults: str | None = None
        self.fault: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The name answers carry: the first served one, as vLLM does."""
        return self.served_names[0]


# flag → attribute and type; each can also be given as STANDIN_<NAME> in the environment
STANDIN_FLAGS: dict[str, type] = {
    "ledger": str,
    "cuda": str,
    "capacity-gib": float,
    "weights-gib": float,
    "context-gib": float,
    "device-checks": bool,
    "profile-secs": float,
    "sampler-compiles": bool,
    "ram-mib": int,
    "host-weights-mib": int,
    "startup-secs": float,
    "load-secs-per-gib": float,
    "sleep-secs": float,
    "wake-secs": float,
    "tokens-per-sec": float,
    "ttft-secs": float,
    "answer-tokens": int,
    "keep-alive-secs": float,
    "dead-exit-secs": float,
    "access-log": bool,
    "metrics-file": str,
    "faults": str,
}

VLLM_FLAGS: dict[str, tuple[str, type]] = {
    "model": ("model", str),
    "host": ("host", str),
    "port": ("port", int),
    "uds": ("uds", str),
    "api-key": ("api_key", str),
    "max-num-seqs": ("max_num_seqs", int),
    "gpu-memory-utilization": ("gpu_memory_utilization", float),
    "tensor-parallel-size": ("tensor_parallel_size", int),
    "tp": ("tensor_parallel_size", int),
}

# Flags without a value. vLLM's boolean flags begin in these ways, save the few named.
_SWITCH_PREFIXES = ("enable-", "disable-", "no-", "use-", "log-", "return-", "allow-credentials")
_SWITCHES = {"enforce-eager", "trust-remote-code", "async-scheduling", "skip-tokenizer-init"}


def parse(argv: list[str]) -> Options:
    if not argv or argv[0] != "serve":
        raise UsageError("usage: standin.py serve MODEL [vLLM's flags] [--standin-… flags]")
    options = Options()
    _apply_environment(options)
    words = list(argv[1:])
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            if options.model:
                raise UsageError(f"unrecognized arguments: {word}")
            options.model = word
            continue
        flag, equals, value = word.partition("=")
        flag = flag.lstrip("-").replace("_", "-")
        _apply_flag(options, flag, value if equals else None, words)
    if not options.model:
        raise UsageError("no model: standin.py serve MODEL")
    options.served_names = options.served_names or [options.model]
    options.gpus = _visible_gpus(options.tensor_parallel_size)
    return options


def _apply_environment(options: Options) -> None:
    for name, kind in STANDIN_FLAGS.items():
        variable = "STANDIN_" + name.upper().replace("-", "_")
        text = os.environ.get(variable)
        if text:
            value = text not in ("0", "false") if kind is bool else _convert(kind, text, variable)
            setattr(options, name.replace("-", "_"), value)


def _apply_flag(options: Options, flag: str, value: str | None, words: list[str]) -> None:
    if flag.startswith("standin-"):
        _apply_standin_flag(options, flag.removeprefix("standin-"), value, words)
    elif flag == "enable-sleep-mode":
        options.sleep_mode = True
    elif flag == "no-enable-sleep-mode":
        options.sleep_mode = False
    elif flag == "served-model-name":
        options.served_names = [] if value is None else [value]
        while value is None and words and not words[0].startswith("-"):
            options.served_names.append(words.pop(0))
        if not options.served_names:
            raise UsageError("argument --served-model-name: expected at least one argument")
    elif flag == "max-model-len":
        options.max_model_len = _context_length(_value(flag, value, words))
    elif flag in VLLM_FLAGS:
        attribute, kind = VLLM_FLAGS[flag]
        setattr(options, attribute, _convert(kind, _value(flag, value, words), f"--{flag}"))
    elif value is None and not _is_switch(flag) and words and not words[0].startswith("-"):
        words.pop(0)  # a flag that changes nothing here, with its value


def _apply_standin_flag(options: Options, name: str, value: str | None, words: list[str]) -> None:
    if name == "fault":
        fault, equals, argument = _value("standin-fault", value, words).partition("=")
        options.fault[fault.replace("-", "_")] = _fault_value(argument) if equals else True
    elif name not in STANDIN_FLAGS:
        raise UsageError(f"unrecognized arguments: --standin-{name}")
    elif STANDIN_FLAGS[name] is bool:
        setattr(options, name.replace("-", "_"), True)
    else:
        text = _value(f"standin-{name}", value, words)
        converted = _convert(STANDIN_FLAGS[name], text, f"--standin-{name}")
        setattr(options, name.replace("-", "_"), converted)


def _is_switch(flag: str) -> bool:
    return flag in _SWITCHES or flag.startswith(_SWITCH_PREFIXES)


def _value(flag: str, value: str | None, words: list[str]) -> str:
    if value is not None:
        return value
    if not words:
        raise UsageError(f"argument --{flag}: expected one argument")
    return words.pop(0)


def _convert(kind: type, text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"argument {what}: invalid {kind.__name__} value: {text!r}") from None


def _fault_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _context_length(text: str) -> int:
    """vLLM's human-readable lengths: 1k is 1000, 1K is 1024."""
    scales = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}
    if text in ("auto", "-1"):
        return 4096
    scale = scales.get(text[-1:], 1)
    number = text[:-1] if text[-1:] in scales else text
    length: float = _convert(float, number, "--max-model-len")
    return int(length * scale)


def _visible_gpus(count: int) -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if visible:
        gpus = [int(gpu) for gpu in visible.split(",") if gpu.strip().isdigit()]
    else:
        gpus = list(range(count))
    if len(gpus) < count:
        raise UsageError(
            f"World size ({count}) is larger than the number of available GPUs ({len(gpus)})"
        )
    return gpus[:count]
