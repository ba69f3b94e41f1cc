"""What a file cannot show key by key: clashes between keys. Part of loading.

Never looks at the machine: see ``host``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from llmux.config.addresses import split_address
from llmux.config.marks import Fault, KeyPath, Marks, dotted, quote
from llmux.config.schema import Config, ModelConfig, Process
from llmux.config.vllm_args import PIPELINE_PARALLEL, TENSOR_PARALLEL, find_flag

WILDCARDS: Final = {"0.0.0.0": ".", "::": ":"}  # noqa: S104  # address → mark of its family


@dataclass(frozen=True, slots=True)
class Draft:
    """A configuration in which the values under ``broken`` are only stand-ins."""

    config: Config
    marks: Marks
    broken: frozenset[KeyPath]

    def sound(self, *paths: KeyPath) -> bool:
        """No problem was found at, in or around these paths: a check may rely on them."""
        return not any(
            bad[: len(path)] == path or path[: len(bad)] == bad
            for path in paths
            for bad in self.broken
        )

    def is_set(self, path: KeyPath) -> bool:
        return path in self.marks.table

    def place(self, path: KeyPath) -> str:
        """How another problem refers to this value."""
        where = f"{self.marks.at(path)}" if self.is_set(path) else "default"
        return f"{dotted(path)} ({where})"


Check = Callable[[Draft], Iterator[Fault]]


def cross_faults(draft: Draft) -> list[Fault]:
    return [fault for check in _CROSS_CHECKS for fault in check(draft)]


def _ports(draft: Draft) -> Iterator[Fault]:
    """Engines, gateway and metrics share the machine's ports; a clash shows only when they bind."""
    config = draft.config
    claims: list[tuple[int, KeyPath]] = []
    if not config.gateway.metrics_listen:
        claims.append((config.metrics_port, ("metrics_port",)))
    if config.gateway.listen:
        for path, _, port in _tcp_addresses(draft):
            claims.append((port, path))
    else:
        claims.append((config.port, ("port",)))
    for name, model in config.models.items():
        if model.port is not None:
            claims.append((model.port, ("models", name, "port")))
    seen: dict[int, KeyPath] = {}
    for port, path in claims:
        if port == 0 or not draft.sound(path):
            continue
        first = seen.setdefault(port, path)
        both_listen = first[0] == "gateway" and path[0] == "gateway"
        if first is path or both_listen:
            continue
        here, there = (path, first) if draft.is_set(path) else (first, path)
        message = f"port {port} is taken by {draft.place(there)}; give each its own"
        yield draft.marks.fault(here, message)


def _tcp_addresses(draft: Draft) -> Iterator[tuple[KeyPath, str, int]]:
    listed = ("gateway", "listen", 0) in draft.marks.table
    for index, address in enumerate(draft.config.gateway.listen):
        path: KeyPath = ("gateway", "listen", index) if listed else ("gateway", "listen")
        parts = split_address(address)
        if parts:
            yield path, *parts


def _listen_twice(draft: Draft) -> Iterator[Fault]:
    addresses = draft.config.gateway.listen
    for index, address in enumerate(addresses):
        if address in addresses[:index]:
            path: KeyPath = ("gateway", "listen", index)
            yield draft.marks.fault(path, f"{quote(address)} is here twice")
    tcp = list(_tcp_addresses(draft))
    for path, host, port in tcp:
        family = WILDCARDS.get(host)
        for other_path, other, other_port in tcp:
            if family and other != host and other_port == port and family in other:
                wide = f"{quote(addresses[_index(path)])} already covers it; keep one of the two"
                if WILDCARDS.get(other) is None:
                    yield draft.marks.fault(other_path, wide)


def _index(path: KeyPath) -> int:
    return path[-1] if isinstance(path[-1], int) else 0


def _public_without_keys(draft: Draft) -> Iterator[Fault]:
    gateway = draft.config.gateway
    own: KeyPath = ("gateway", "allow_public_without_keys")
    if gateway.keys_file or gateway.allow_public_without_keys:
        return
    if not draft.sound(own, ("gateway", "keys_file"), ("gateway", "listen")):
        return
    for path, host, _ in _tcp_addresses(draft):
        if not _is_loopback(host):
            message = (
                "anybody who reaches this address could use and control all models: set "
                "gateway.keys_file, or gateway.allow_public_without_keys: true"
            )
            yield draft.marks.fault(path, message)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in ("", "localhost")


def _half_tls(draft: Draft) -> Iterator[Fault]:
    gateway = draft.config.gateway
    pair = {"tls_certificate": gateway.tls_certificate, "tls_key": gateway.tls_key}
    for name, other in (("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")):
        path: KeyPath = ("gateway", name)
        if pair[name] and not pair[other] and draft.sound(path, ("gateway", other)):
            yield draft.marks.fault(path, f"TLS needs gateway.{other} as well")


def _names(draft: Draft) -> Iterator[Fault]:
    """A name that two models answer to would go to one of them by chance."""
    models = draft.config.models
    owners: dict[str, KeyPath] = {name: ("models", name) for name in models}
    for name, model in models.items():
        for index, alias in enumerate(model.aliases):
            path: KeyPath = ("models", name, "aliases", index)
            first = owners.setdefault(alias, path)
            if first is not path and draft.sound(path):
                message = f"the name {quote(alias)} is taken by {draft.place(first)}"
                yield draft.marks.fault(path, message)


def _backoff(draft: Draft) -> Iterator[Fault]:
    policy = draft.config.policy
    first: KeyPath = ("policy", "backoff_secs")
    last: KeyPath = ("policy", "backoff_max_secs")
    if draft.sound(first, last) and policy.backoff_secs > policy.backoff_max_secs:
        here, there = (last, first) if draft.is_set(last) else (first, last)
        message = (
            f"backoff_secs ({policy.backoff_secs:g}) may not exceed backoff_max_secs "
            f"({policy.backoff_max_secs:g}); see {draft.place(there)}"
        )
        yield draft.marks.fault(here, message)


def _models(draft: Draft, *keys: str) -> Iterator[tuple[KeyPath, ModelConfig]]:
    for name, model in draft.config.models.items():
        path: KeyPath = ("models", name)
        if draft.sound(*((*path, key) for key in keys)):
            yield path, model


def _parallel(model: ModelConfig) -> tuple[int, int]:
    """(GPUs that the engine's own arguments spread it over, index of the argument that says so)."""
    size, where = 1, 0
    for names in (PIPELINE_PARALLEL, TENSOR_PARALLEL):
        flag = find_flag(model.extra_args, names)
        if flag and flag.value and int(flag.value) > 1:
            size, where = size * int(flag.value), flag.index
    return size, where


def _gpu_numbers(draft: Draft) -> Iterator[Fault]:
    count = draft.config.gpu_count
    for path, model in _models(draft, "gpus", "extra_args"):
        gpus: KeyPath = (*path, "gpus")
        asked = model.gpus if isinstance(model.gpus, int) else len(model.gpus)
        size, where = _parallel(model)
        if size > asked:
            message = (
                f"vLLM is told to use {size} GPUs, but {draft.place(gpus)} gives it {asked}; "
                f"write gpus: {size}"
            )
            yield draft.marks.fault((*path, "extra_args", where), message)
        needed = model.gpus if isinstance(model.gpus, int) else max(model.gpus) + 1
        if count is not None and draft.sound(("gpu_count",)) and needed > count:
            has = f"but {draft.place(('gpu_count',))} is {count}"
            if isinstance(model.gpus, int):
                message = f"{model.gpus} GPUs are asked for, {has}"
            else:
                message = f"GPU {max(model.gpus)} is asked for, {has} (indices start at 0)"
            here = gpus if draft.is_set(gpus) else (*path, "extra_args")
            yield draft.marks.fault(here, message)


def _gpu_memory(draft: Draft) -> Iterator[Fault]:
    for path, model in _models(draft, "gpu_memory", "gpu_memory_parked", "extra_args"):
        if model.gpu_memory_parked is not None and model.gpu_memory_parked > model.gpu_memory:
            message = (
                f"a parked model cannot hold more ({model.gpu_memory_parked:g}) than an awake one "
                f"(gpu_memory is {model.gpu_memory:g})"
            )
            yield draft.marks.fault((*path, "gpu_memory_parked"), message)


def _parallel_parking(draft: Draft) -> Iterator[Fault]:
    """NCCL communicators between GPUs do not survive CUDA checkpoints unless vLLM is patched."""
    keys = ("eviction", "extra_args", "allow_tensor_parallel_parking")
    for path, model in _models(draft, *keys):
        size, _ = _parallel(model)
        suspends = model.eviction.process in (Process.CUDA_SUSPEND, Process.CHECKPOINT)
        if size > 1 and suspends and not model.allow_tensor_parallel_parking:
            message = (
                f"cannot use {model.eviction.process} with a model on {size} GPUs: NCCL's "
                "connections do not survive it in a stock vLLM. Use keep_running, freeze or stop, "
                "or, for a vLLM that can, set allow_tensor_parallel_parking: true"
            )
            eviction: KeyPath = (*path, "eviction")
            inherited: KeyPath = ("policy", "eviction")
            given = draft.is_set(eviction)
            if given or draft.sound(inherited):
                where = eviction if given else path
                yield draft.marks.fault(where, message)


_CROSS_CHECKS: Final[tuple[Check, ...]] = (
    _ports,
    _listen_twice,
    _public_without_keys,
    _half_tls,
    _names,
    _backoff,
    _gpu_numbers,
    _gpu_memory,
    _parallel_parking,
)
