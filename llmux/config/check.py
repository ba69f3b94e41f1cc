"""Find clashes between keys. Part of loading.

Never looks at the machine: see ``host``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from llmux.config.addresses import split_address
from llmux.config.files.marks import Fault, KeyPath, Marks, dotted, quote
from llmux.config.parse import NO_MIG
from llmux.config.schema import Config, ModelConfig
from llmux.engines.options import find_option

WILDCARDS: Final = {"0.0.0.0": ".", "::": ":"}  # noqa: S104  # address → mark of its family


@dataclass(frozen=True, slots=True)
class Draft:
    """A configuration whose values under ``broken`` are placeholders."""

    config: Config
    marks: Marks
    broken: frozenset[KeyPath]

    def sound(self, *paths: KeyPath) -> bool:
        """True when no problem was found at, in or around these paths."""
        return not any(
            bad[: len(path)] == path or path[: len(bad)] == bad
            for path in paths
            for bad in self.broken
        )

    def is_set(self, path: KeyPath) -> bool:
        return path in self.marks.table

    def place(self, path: KeyPath) -> str:
        """The value's path and place, for the message of another problem."""
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
                "every client that reaches this address could use and control all models: set "
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
    """Each name and alias belongs to one model."""
    models = draft.config.models
    owners: dict[str, KeyPath] = {name: ("models", name) for name in models}
    for name, model in models.items():
        for adapter in model.adapters:
            place: KeyPath = ("models", name, "extra_args")
            first = owners.setdefault(adapter, place)
            if first is not place and draft.sound(place):
                message = f"the adapter's name {quote(adapter)} is taken by {draft.place(first)}"
                yield draft.marks.fault(place, message)
    for name, model in models.items():
        for index, alias in enumerate(model.aliases):
            path: KeyPath = ("models", name, "aliases", index)
            first = owners.setdefault(alias, path)
            if first is not path and draft.sound(path):
                message = f"the name {quote(alias)} is taken by {draft.place(first)}"
                yield draft.marks.fault(path, message)


def _references(draft: Draft) -> Iterator[Fault]:
    """Names of models outside `models` name one."""
    config = draft.config
    named: list[tuple[KeyPath, str]] = [
        (("preload", index), name) for index, name in enumerate(config.preload)
    ]
    for index, group in enumerate(config.exclusive):
        named += ((("exclusive", index), name) for name in group)
    if config.gateway.fallback_model is not None:
        named.append((("gateway", "fallback_model"), config.gateway.fallback_model))
    if not draft.sound(("models",)):
        return
    for path, name in named:
        if draft.sound(path[:1]) and name not in config.models:
            yield draft.marks.fault(path, f"there is no model {quote(name)}")


def _never_evicted(draft: Draft) -> Iterator[Fault]:
    """Models that never leave a GPU must fit on it together."""
    kept: dict[int, list[str]] = {}
    for path, model in _models(draft, "never_evict", "gpus", "gpu_memory", "extra_args"):
        for gpu in model.gpus if model.never_evict and isinstance(model.gpus, tuple) else ():
            others = kept.setdefault(gpu, [])
            others.append(model.name)
            if sum(draft.config.models[name].gpu_memory for name in others) > 1 + 1e-6:
                message = f"{', '.join(others)} do not fit together on GPU {gpu}, and none leaves"
                yield draft.marks.fault((*path, "never_evict"), message)


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


def _rank_argument(model: ModelConfig) -> int:
    """Index of the first kind of argument that spreads the engine over several GPUs."""
    found = (find_option(model.extra_args, names) for names in model.engine_type.rank_options)
    return next((option.index for option in found if option and option.number != 1), 0)


def _gpu_numbers(draft: Draft) -> Iterator[Fault]:
    for path, model in _models(draft, "gpus", "extra_args"):
        gpus: KeyPath = (*path, "gpus")
        asked = model.gpus if isinstance(model.gpus, int) else len(model.gpus)
        if model.ranks > asked:
            message = (
                f"{model.engine_type.title} is told to use {model.ranks} GPUs, but "
                f"{draft.place(gpus)} gives it {asked}; write gpus: {model.ranks}"
            )
            yield draft.marks.fault((*path, "extra_args", _rank_argument(model)), message)


def gpu_count_faults(draft: Draft) -> Iterator[Fault]:
    """Models that this host does not have the GPUs for."""
    count = draft.config.gpu_count
    if count is None or not draft.sound(("gpu_count",)):
        return
    for path, model in _models(draft, "gpus", "extra_args"):
        gpus: KeyPath = (*path, "gpus")
        needed = model.gpus if isinstance(model.gpus, int) else max(model.gpus) + 1
        if needed > count:
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


def _parking(draft: Draft) -> Iterator[Fault]:
    keys = ("eviction", "extra_args", "allow_tensor_parallel_parking")
    for path, model in _models(draft, *keys):
        obstacle = next(filter(None, map(model.parking_obstacle, model.rungs)), None)
        if obstacle is None:
            continue
        eviction: KeyPath = (*path, "eviction")
        given = draft.is_set(eviction)
        if given or draft.sound(("policy", "eviction")):
            where = eviction if given else path
            hint = obstacle.hint[:1].upper() + obstacle.hint[1:]
            yield draft.marks.fault(where, f"{obstacle.message}. {hint}")


VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
GPUS_INSTEAD: Final = (
    "the engine would use other GPUs than those whose memory llmux counts: name them in"
)


def _variables(draft: Draft) -> Iterator[Fault]:
    for path, model in _models(draft, "env"):
        for name, remedy in model.engine_type.owned_variables.items():
            if name in model.env:
                message = f"cannot pass {name} to {model.engine_type.title}: {remedy}"
                yield draft.marks.fault((*path, "env", name), message)
        if visible := model.env.get(VISIBLE):  # an empty one hides all, for an engine on the CPU
            message = NO_MIG if "MIG-" in visible else f"{GPUS_INSTEAD} {dotted((*path, 'gpus'))}"
            yield draft.marks.fault((*path, "env", VISIBLE), message)


_CROSS_CHECKS: Final[tuple[Check, ...]] = (
    _ports,
    _listen_twice,
    _public_without_keys,
    _half_tls,
    _names,
    _references,
    _never_evicted,
    _backoff,
    _gpu_numbers,
    _gpu_memory,
    _parking,
    _variables,
)
