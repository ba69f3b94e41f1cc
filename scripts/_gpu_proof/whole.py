"""``--serve N``: a whole llmux, three models of one GPU's size parked in three ways, asked in turn.

What a client waits for its first token is the figure, with all that llmux does in between: drain,
park, wake, verify.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from _gpu_proof.client import ProofError
from llmux.drivers.processes.bare import find_cgroup
from llmux.drivers.processes.cgroup import kill_all

EVICTIONS: Final = {
    "suspended": "discard+cuda_suspend",
    "imaged": "discard+checkpoint",
    "offloaded": "offload+keep_running",
}
CONFIG = """\
vllm_command: {command}
port: {port}
metrics_port: 0
policy: {{min_active_secs: 0}}
checkpoint: {{images_dir: {images}, criu_path: {criu}}}
models:
"""
MODEL = """\
  {name}: {{model_path: {path}, gpu_memory: 0.6, eviction: {eviction}, extra_args: {args}}}
"""
PROMPT: Final = "1, 2, 3, 4, 5, 6, 7, 8,"
START_SECS = 30.0
ANSWER_SECS = 300.0  # a first cold start is in it
END_SECS = 60.0
LIMIT_SECS = 900.0


@dataclass(frozen=True, slots=True)
class Turn:
    """``first``: seconds until the first token; ``cold``: the model was started for it."""

    model: str
    first: float
    text: str
    cold: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a whole llmux runs, and on what."""

    directory: Path
    images: Path
    vllm: str
    model: str
    args: tuple[str, ...]
    criu: str
    env: Mapping[str, str] = field(default_factory=dict)  # besides our own
    evictions: Mapping[str, str] = field(default_factory=lambda: EVICTIONS)  # by model

    @property
    def environment(self) -> dict[str, str]:
        ours = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        return {**os.environ, **ours, **self.env}


def pretended(directory: Path, images: Path, criu: str, cuda: Path) -> Place:
    """The stand-in engine on the fake driver in ``cuda``, on a simulated GPU."""
    standin = Path(__file__).resolve().parents[2] / "tests" / "standin" / "standin.py"
    program = directory / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {standin} "$@"\n')
    program.chmod(0o755)
    ledger = str(directory / "gpus.json")
    env = {
        "LLMUX_LIBCUDA": str(cuda / "libcuda.so.1"),
        "STANDIN_CUDA": str(cuda),
        "STANDIN_LEDGER": ledger,
        "LLMUX_GPU_LEDGER": ledger,
    }
    return Place(directory, images, str(program), "demo/model", (), criu, env)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(place: Place, port: int) -> Path:
    quoted = json.dumps  # JSON is YAML
    text = CONFIG.format(
        command=quoted([place.vllm]),
        port=port,
        images=quoted(str(place.images)),
        criu=quoted(place.criu),
    )
    for name, eviction in place.evictions.items():
        args = quoted(list(place.args))
        text += MODEL.format(name=name, path=quoted(place.model), eviction=eviction, args=args)
    path = place.directory / "whole.yaml"
    path.write_text(text)
    return path


def order(names: Sequence[str], count: int) -> list[str]:
    """Each model once, cold; then ``count`` switches, never to the model that is there."""
    draw = random.Random(1)
    turns = list(names)
    while len(turns) < count + len(names):
        turns.append(draw.choice([name for name in names if name != turns[-1]]))
    return turns


def ask(port: int, model: str, *, cold: bool) -> Turn:
    """Raises ProofError on anything but a whole stream."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECS)
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": True}
    begun, first, text = time.monotonic(), None, ""
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ProofError(f"{model}: {answer.status} {answer.read(300).decode()}")
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - begun
                text += _text(model, json.loads(line[6:]))
    except (OSError, http.client.HTTPException) as error:
        raise ProofError(f"{model}: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()
    if first is None:
        raise ProofError(f"{model}: a stream without a token")
    return Turn(model, first, text, cold)


def _text(model: str, event: dict[str, Any]) -> str:
    if "error" in event:
        raise ProofError(f"{model}: {event['error']}")
    return "".join(choice.get("text") or "" for choice in event.get("choices", ()))


def table(turns: list[Turn]) -> str:
    """Markdown: seconds to the first token, by how the model was parked."""
    lines = [
        "| parked by | cold start | switches | first token: median s | least | most |",
        "|---|---|---|---|---|---|",
    ]
    for name, eviction in EVICTIONS.items():
        cold = [turn.first for turn in turns if turn.model == name and turn.cold]
        woken = [turn.first for turn in turns if turn.model == name and not turn.cold]
        started = f"{cold[0]:.1f}" if cold else "-"
        figures = (
            [f"{statistics.median(woken):.2f}", f"{min(woken):.2f}", f"{max(woken):.2f}"]
            if woken
            else ["-"] * 3
        )
        lines.append(f"| {' | '.join([eviction, started, str(len(woken)), *figures])} |")
    return "\n".join(lines)


def document(turns: list[Turn], problem: str) -> dict[str, Any]:
    """``first_token_secs``: until the first token; ``cold``: the model was started for it."""
    seen = [
        {
            "model": turn.model,
            "parked_by": EVICTIONS[turn.model],
            "first_token_secs": round(turn.first, 3),
            "cold": turn.cold,
        }
        for turn in turns
    ]
    return {"turns": seen, "problem": problem}


class Whole:
    """``turns``: what was seen so far, also when a later one raises."""

    def __init__(self, place: Place, log: Path) -> None:
        self._place = place
        self._log = log
        self._socket = place.directory / "control.sock"
        self.turns: list[Turn] = []

    async def run(self, count: int, say: Callable[[str], None], limit: float) -> None:
        """Raises ProofError when an answer is not as before, TimeoutError after ``limit``
        seconds; llmux and its engines have ended then."""
        port = free_port()
        config = write_config(self._place, port)
        server = await asyncio.to_thread(self._begin, config)
        try:
            async with asyncio.timeout(limit):
                await self._listening(server, port)
                await self._take_turns(port, count, say)
                self._check_starts()
        finally:
            await asyncio.to_thread(self._end, server)

    def _begin(self, config: Path) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "_gpu_proof.service", str(config), str(self._socket)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._place.environment,
            )

    async def _listening(self, server: subprocess.Popen[bytes], port: int) -> None:
        async with asyncio.timeout(START_SECS):
            while True:
                if server.poll() is not None:
                    last = self._log.read_text(errors="replace").strip().splitlines()[-3:]
                    raise ProofError(f"llmux ended: {' | '.join(last)}")
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    return
                except OSError:
                    await asyncio.sleep(0.1)

    async def _take_turns(self, port: int, count: int, say: Callable[[str], None]) -> None:
        answers: dict[str, str] = {}
        for model in order(list(self._place.evictions), count):
            turn = await asyncio.to_thread(ask, port, model, cold=model not in answers)
            self.turns.append(turn)
            say(f"llmux: {model} ({EVICTIONS[model]}): first token after {turn.first:.2f} s")
            if answers.setdefault(model, turn.text) != turn.text:
                raise ProofError(f"{model} answered {turn.text!r} after {answers[model]!r}")

    def _check_starts(self) -> None:
        """A wake that failed is a cold start, for the same client."""
        log = self._log.read_text(errors="replace")
        for name in self._place.evictions:
            if (more := log.count(f"Starting {name} cold") - 1) > 0:
                raise ProofError(f"{name} was started cold {more} times more: see llmux.log")

    def _end(self, server: subprocess.Popen[bytes], patience: float = END_SECS) -> None:
        """Engines are stopped by llmux itself first: a restored one has to leave the GPU. What a
        llmux that does not end leaves is killed, and told."""
        try:
            if server.poll() is None:
                self._unload(patience)
                server.send_signal(signal.SIGTERM)
            server.wait(patience)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
            place = find_cgroup()
            home = Path(place[0] + place[1]) if place else None
            left = list(home.glob(f"llmux-trial-{server.pid}-*")) if home else []
            for unit in left:
                kill_all(str(unit))
            text = f"llmux did not end within {patience:g} s and was killed"
            raise ProofError(f"{text}, and so were {len(left)} engines") from None

    def _unload(self, patience: float) -> None:
        argv = [sys.executable, "-m", "llmux", "unload", "--all", "--socket", str(self._socket)]
        with suppress(subprocess.TimeoutExpired):  # then SIGTERM has to do
            subprocess.run(argv, timeout=patience, capture_output=True, env=self._place.environment)
