"""What llmux needs to know of one type of engine: values, and functions of plain values. Pure.

Each type is one module that builds one ``EngineType``, and one entry of the table in the package.
Nothing else in llmux may depend on which type an engine is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmux.engines.canaries import Probe
from llmux.engines.parking import Eviction, Weights
from llmux.engines.progress import Stage


@dataclass(frozen=True, slots=True)
class Launch:
    """The start of one engine: everything its command line and environment depend on.

    ``command`` is the program and its leading arguments; ``uds`` or ``port`` is where the API
    listens; ``evictions`` are all ways in which it may be parked; ``ranks`` is the number of GPUs
    that the arguments spread the engine over, and ``gpu_memory`` the share of each that the model
    claims.
    """

    name: str
    model_path: str
    command: tuple[str, ...]
    extra_args: tuple[str, ...]
    evictions: tuple[Eviction, ...]
    ranks: int
    gpu_memory: float
    uds: str | None = None
    port: int | None = None


class WakeAction(StrEnum):
    WAKE_UP = "wake_up"
    RELOAD_WEIGHTS = "reload_weights"
    RESET_PREFIX_CACHE = "reset_prefix_cache"


@dataclass(frozen=True, slots=True)
class WakeStage:
    """One stage of a wake. The failure of an optional one is reported and passed over."""

    action: WakeAction
    tags: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class VersionFault:
    """What is known to be wrong with a version; ``serious`` when it breaks what the model needs."""

    problem: str
    remedy: str
    serious: bool


@dataclass(frozen=True, slots=True)
class EngineType:
    """``title`` is the name in messages, ``identifier`` that of the journal.

    Options are tuples of their spellings, the preferred one first. ``owned_options`` are those that
    llmux passes itself or cannot serve, each with what to do instead, and so are
    ``owned_variables``; ``rank_options`` multiply to the number of GPUs that an engine uses.
    """

    title: str
    identifier: str

    # arguments and environment
    owned_options: Mapping[str, str]
    owned_variables: Mapping[str, str]
    gpu_memory_option: tuple[str, ...]
    max_model_len_option: tuple[str, ...]
    rank_options: tuple[tuple[str, ...], ...]
    adapters: Callable[[Sequence[str]], tuple[str, ...]]  # names it serves besides the model's
    # (arguments) -> (index, message) of those that it would not start with
    argument_faults: Callable[[Sequence[str]], Iterable[tuple[int, str]]]
    argv: Callable[[Launch], tuple[str, ...]]
    # (launch, directory for its sockets, home of its alone or None)
    environment: Callable[[Launch, str, str | None], Mapping[str, str]]

    # (environment) -> what it writes there: directory; weights are downloaded to another one
    caches: Callable[[Mapping[str, str]], Mapping[str, str]]
    modules: tuple[str, ...]  # of Python, that its start imports; the slow ones first

    # sleep and wake
    sleep_levels: Mapping[Weights, int]
    wake_stages: Mapping[Weights, tuple[WakeStage, ...]]
    # (arguments): its KV cache lies where it can be given up by itself
    cache_apart: Callable[[Sequence[str]], bool]
    discards_cache: Callable[[str], bool]  # (version): its workers know how
    communicators_down: tuple[str, ...]  # worker methods; which of them exists depends on its patch
    communicators_up: tuple[str, ...]
    canaries: tuple[Probe, ...]  # best first
    sampled: tuple[Probe, ...]  # the same, answered at random
    control_hint: str  # why its control API may not know an order

    # what an image depends on
    libraries: tuple[str, ...]  # names of installed distributions
    shown_variables: re.Pattern[str]  # variables that hold no secrets

    # what it says
    distribution: str  # whose installed version is the engine's
    version_fault: Callable[[str, bool], VersionFault | None]  # (version, does the model sleep)
    metrics_prefix: str
    load_series: frozenset[str]  # their sum: requests that it runs or queues
    work_series: frozenset[str]  # their sum moves as long as it works
    line_priority: Callable[[str], int | None]  # syslog's, of a line of output
    root_cause: Callable[[Sequence[str]], str | None]  # of a death, from the last lines of output
    stage: Callable[[str], Stage | None]  # of its start, from one line of output
