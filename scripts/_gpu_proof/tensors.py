"""The weights and the KV cache of the proof's engine: on a GPU with PyTorch, or pretended.

Both answer deterministically from what is really in memory: weights that were not brought back, or
a KV cache that was lost while a prefix was still thought to be cached, change the answer.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from pathlib import Path
from typing import Any, Protocol

GIB = 1 << 30
WIDTH = 4096
VOCABULARY = 4096
PINNED_ELEMENTS = GIB // 4  # one GiB of float32
POSITIONS = 64  # of one prompt and its answer; every cached prompt takes so many rows of the cache


class Backend(Protocol):
    def offload(self) -> None:
        """Sleep level 1: weights to host memory, KV cache dropped, both off the GPU."""

    def discard(self) -> None:
        """Sleep level 2: weights and KV cache dropped."""

    def wake_weights(self) -> None:
        """Room for the weights again; after level 1 with them in it, after level 2 with rubbish."""

    def wake_cache(self) -> None: ...

    def reload_weights(self) -> None:
        """The weights as they were at the start."""

    def reset_prefix_cache(self) -> None: ...

    def generate(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probs."""


class TorchBackend:
    """A residual stack of WIDTH x WIDTH bfloat16 matrices with a cache of every position's state.

    The reference for "answers equal" is bit-equality on the same GPU: fixed shapes, one thread and
    stream, no atomics in what is called, and CUBLAS_WORKSPACE_CONFIG set by the caller. (Not
    use_deterministic_algorithms: it imports the whole compiler, and would only check this.)
    """

    def __init__(
        self, weights_gib: float, cache_gib: float, seed: int, *, nccl: bool = False
    ) -> None:
        import torch

        self._torch = torch
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._device = torch.device("cuda", 0)
        self._seed = seed
        matrix = WIDTH * WIDTH * 2
        # First the embedding and the output head, then as many layers as fill the size.
        self._count = 2 + max(1, round(weights_gib * GIB / matrix) - 2)
        self._cache_rows = max(POSITIONS, int(cache_gib * GIB / (WIDTH * 2)))
        self._weights: list[Any] = []
        self._host: list[Any] = []
        self._cache: Any = None
        self._prefixes: dict[tuple[int, ...], int] = {}
        self.wake_weights()
        self.reload_weights()
        self.wake_cache()
        self._extras = Extras(torch, self._device, nccl=nccl)

    def wake_weights(self) -> None:
        torch = self._torch
        shape = (WIDTH, WIDTH)
        self._weights = [
            torch.zeros(shape, dtype=torch.bfloat16, device=self._device)
            for _ in range(self._count)
        ]
        for target, source in zip(self._weights, self._host, strict=False):
            target.copy_(source)
        self._host = []
        torch.cuda.synchronize()

    def reload_weights(self) -> None:
        torch = self._torch
        for index, weight in enumerate(self._weights):
            generator = torch.Generator(device=self._device).manual_seed(self._seed * 1000 + index)
            weight.normal_(0.0, 1.0 / math.sqrt(WIDTH), generator=generator)
        torch.cuda.synchronize()

    def wake_cache(self) -> None:
        shape = (self._cache_rows, WIDTH)
        self._cache = self._torch.zeros(shape, dtype=self._torch.bfloat16, device=self._device)
        self.reset_prefix_cache()
        self._torch.cuda.synchronize()

    def offload(self) -> None:
        torch = self._torch
        self._host = [
            torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
            for weight in self._weights
        ]
        self.discard()

    def discard(self) -> None:
        self._weights = []
        self._cache = None
        self.reset_prefix_cache()
        self._torch.cuda.synchronize()
        self._torch.cuda.empty_cache()

    def reset_prefix_cache(self) -> None:
        self._prefixes = {}

    def generate(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        torch = self._torch
        with torch.inference_mode():
            start = self._prefixes.get(prompt)
            if start is None:
                start = len(self._prefixes) * POSITIONS % (self._cache_rows - POSITIONS + 1)
                for offset, token in enumerate(prompt):
                    self._step(start, offset, token)
                self._prefixes[prompt] = start
            token, offset = prompt[-1], len(prompt)
            tokens, probabilities = [], []
            for _ in range(count):
                state = self._step(start, offset, token)
                scores = torch.log_softmax((self._weights[1] @ state).float(), dim=0)
                best = int(torch.argmax(scores))
                tokens.append(best)
                probabilities.append(float(scores[best]))
                token, offset = best, offset + 1
            return tokens, [*probabilities, self._extras.value()]

    def _step(self, start: int, offset: int, token: int) -> Any:
        """The state of one position, from its token and the mean of those cached before it."""
        torch = self._torch
        # The offset plays the positional embedding; without it answers fall into one token.
        row = (token + 37 * offset) % min(VOCABULARY, WIDTH)
        state = self._weights[0][row] * math.sqrt(WIDTH)
        if offset:
            state = state + self._cache[start : start + offset].float().mean(dim=0).bfloat16()
        for weight in self._weights[2:]:
            state = state + torch.tanh(weight @ state)
            state = state * torch.rsqrt(state.float().pow(2).mean() + 1e-6).bfloat16()
        self._cache[start + offset] = state
        return state


class Extras:
    """What engines hold besides tensors, each used in every answer: a captured CUDA graph, pinned
    host memory, and a communicator if asked for."""

    def __init__(self, torch: Any, device: Any, *, nccl: bool) -> None:
        self._torch = torch
        self._pinned = torch.arange(PINNED_ELEMENTS, dtype=torch.float32).pin_memory()
        self._input = torch.ones((WIDTH, WIDTH), device=device)
        self._nccl = nccl
        if nccl:
            store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
            torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # as torch's documentation of graphs asks: warm up first
            self._output = self._input.sum(dim=0)
        side.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._input.sum(dim=0)

    def value(self) -> float:
        """The same number as long as graph, pinned memory and communicator work."""
        torch = self._torch
        self._graph.replay()
        total = self._output.sum() + self._pinned[-1024:].to(self._output.device).sum()
        if self._nccl:
            torch.distributed.all_reduce(total)
        torch.cuda.synchronize()
        return float(total)


class FakeBackend:
    """The same behaviour without a GPU: sizes go into a ledger, answers come from hashes.

    ``directory`` is that of the fake libcuda (tests/fake_libcuda): while it says that this process
    is locked or checkpointed, work stops with an error, where real CUDA calls would block.
    """

    def __init__(self, directory: Path, weights_gib: float, cache_gib: float, seed: int) -> None:
        self._directory = directory
        self._sizes = {"weights": int(weights_gib * GIB), "cache": int(cache_gib * GIB)}
        self._seed = seed
        self._weights = b""
        self._host = b""
        self._cache: dict[tuple[int, ...], bytes] | None = None
        self._held: dict[str, int] = {"context": GIB // 2}
        (directory / "ledger").mkdir(exist_ok=True)
        (directory / "procs" / str(os.getpid())).write_text("0\n")
        self.wake_weights()
        self.reload_weights()
        self.wake_cache()

    def _hold(self, kind: str, held: bool) -> None:
        self._running()
        self._held[kind] = self._sizes[kind] if held else 0
        path = self._directory / "ledger" / str(os.getpid())
        path.with_suffix(".new").write_text(str(sum(self._held.values())))
        path.with_suffix(".new").rename(path)

    def _running(self) -> None:
        state = (self._directory / "procs" / str(os.getpid())).read_text().strip()
        if state != "0":
            raise RuntimeError(f"CUDA state of this process is {state}, not running")

    def wake_weights(self) -> None:
        self._hold("weights", True)
        self._weights, self._host = self._host or bytes(4096), b""

    def reload_weights(self) -> None:
        self._running()
        self._weights = random.Random(self._seed).randbytes(4096)

    def wake_cache(self) -> None:
        self._hold("cache", True)
        self._cache = {}

    def offload(self) -> None:
        self._host = self._weights
        self.discard()

    def discard(self) -> None:
        self._hold("weights", False)
        self._hold("cache", False)
        self._weights, self._cache = b"", None

    def reset_prefix_cache(self) -> None:
        if self._cache is not None:
            self._cache = {}

    def generate(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        self._running()
        if not self._weights or self._cache is None:
            raise RuntimeError("asleep")
        state = self._cache.setdefault(prompt, hashlib.sha256(repr(prompt).encode()).digest())
        tokens, probabilities = [], []
        for index in range(count):
            state = hashlib.sha256(self._weights + state + bytes([index % 256])).digest()
            tokens.append(int.from_bytes(state[:2], "big") % VOCABULARY)
            probabilities.append(-state[2] / 256)
        return tokens, probabilities
