"""What is known of one engine besides its process: it travels in notes and in image recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from llmux import typed_json
from llmux.config.schema import Eviction
from llmux.ports import Canary
from llmux.protocol import Address
from llmux.typed_json import LARGEST_INT, BadJson, Within

COLD_SECS = 60.0  # assumed cost of a cold start before the first was measured

Gpu = Annotated[int, Within(0, 1023)]  # more than any host has
Pid = Annotated[int, Within(1, 2**22)]  # the kernel's PID_MAX_LIMIT


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """``identity``: what an image of this engine is valid for. ``cuda_pids``: processes with their
    CUDA state in host memory, of ``cuda_bytes`` on its GPUs; ``resumed``: it came back from there
    once, so it must go there again before the engine ends. ``cold_seconds``: what the last cold
    start took. ``started_as``: digest of the command line and environment of its start.
    ``cache_discarded``: its KV cache may have no memory."""

    address: Address | None = None
    canary: Canary | None = None
    max_model_len: int | None = None
    version: str | None = None
    gpus: tuple[int, ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict)
    cold_seconds: float = COLD_SECS
    cuda_pids: tuple[int, ...] = ()
    cuda_bytes: int = 0
    started_as: str | None = None
    resumed: bool = False
    cache_discarded: bool = False

    def to_json(self) -> dict[str, Any]:
        address, canary = self.address, self.canary
        return {
            "uds": address.uds if address else None,
            "port": address.port if address else None,
            "canary": [canary.text, list(canary.logprobs)] if canary else None,
            "max_model_len": self.max_model_len,
            "version": self.version,
            "gpus": list(self.gpus),
            "identity": dict(self.identity),
            "cold_seconds": self.cold_seconds,
            "cuda_pids": list(self.cuda_pids),
            "cuda_bytes": self.cuda_bytes,
            "started_as": self.started_as,
            "resumed": self.resumed,
            "cache_discarded": self.cache_discarded,
        }

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Raises BadJson: damaged facts are no facts."""
        written = typed_json.read(_Written, document)
        address = None
        if written.uds is not None or written.port is not None:
            address = Address(written.uds, None if written.uds else written.port)
        return cls(
            address=address,
            canary=None if written.canary is None else Canary(*written.canary),
            max_model_len=written.max_model_len,
            version=written.version,
            gpus=written.gpus,
            identity=written.identity,
            cold_seconds=written.cold_seconds or COLD_SECS,
            cuda_pids=written.cuda_pids,
            cuda_bytes=max(0, written.cuda_bytes),
            started_as=written.started_as,
            resumed=written.resumed,
            cache_discarded=written.cache_discarded,
        )


@dataclass(frozen=True, slots=True)
class _Written:
    """The same as JSON has it."""

    uds: str | None = None
    port: Annotated[int, Within(1, 65535)] | None = None
    canary: tuple[str, tuple[float, ...]] | None = None
    max_model_len: Annotated[int, Within(0, LARGEST_INT)] | None = None
    version: str | None = None
    gpus: tuple[Gpu, ...] = ()
    identity: dict[str, str] = field(default_factory=dict)
    cold_seconds: Annotated[float, Within(0, LARGEST_INT)] = COLD_SECS
    cuda_pids: tuple[Pid, ...] = ()
    cuda_bytes: int = 0
    started_as: str | None = None
    resumed: bool = False
    cache_discarded: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the engine in an image was parked, and so how it is woken."""

    eviction: Eviction
    facts: EngineFacts

    def to_json(self) -> dict[str, Any]:
        return {"eviction": str(self.eviction), **self.facts.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Raises BadJson."""
        try:
            eviction = Eviction.parse(str(document.get("eviction")))
        except ValueError as error:
            raise BadJson(f"eviction: {error}") from error
        return cls(eviction, EngineFacts.from_json(dict(document)))


def eviction_of(document: Mapping[str, Any]) -> Eviction | None:
    """The eviction in a recipe; None when it is damaged."""
    try:
        return Recipe.from_json(document).eviction
    except BadJson:
        return None
