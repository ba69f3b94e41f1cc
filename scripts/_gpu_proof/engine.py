"""An engine for the proof: vLLM's HTTP control API over real GPU tensors (or pretended ones).

``engine.py --uds PATH [--gib N] [--cache-gib N] [--seed S] [--with EXTRA] [--fake DIR]``. Every
connection is closed after its answer, so that CRIU finds only the listening socket. EXTRA ``nccl``
adds a communicator; ``parent`` and ``cuinit`` make the engine the child of a process that asked
NVML, or called cuInit, and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socketserver
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _gpu_proof.tensors import VOCABULARY, Backend, FakeBackend, TorchBackend

MODEL = "proof"
TAGS = ("weights", "kv_cache")


class Engine:
    """The backend and which of its parts are awake."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._asleep: set[str] = set()

    def sleep(self, level: int) -> dict[str, Any]:
        if not self._asleep:
            if level == 1:
                self._backend.offload()
            elif level == 2:
                self._backend.discard()
            else:
                raise ValueError(f"no sleep level {level}")
            self._asleep = set(TAGS)
        return {"status": "sleeping", "level": level}

    def wake(self, tags: list[str]) -> dict[str, Any]:
        for tag in tags or TAGS:
            if tag not in self._asleep:
                continue
            if tag == "weights":
                self._backend.wake_weights()
            else:
                self._backend.wake_cache()
            self._asleep.discard(tag)
        return {"status": "awake" if not self._asleep else "partly awake"}

    def sleeping(self) -> dict[str, Any]:
        return {"is_sleeping": bool(self._asleep)}

    def rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("method") != "reload_weights":
            raise ValueError(f"no worker method {body.get('method')!r}")
        if "weights" in self._asleep:
            raise RuntimeError("weights are asleep")
        self._backend.reload_weights()
        return {"results": [None]}

    def reset(self) -> dict[str, Any]:
        self._backend.reset_prefix_cache()
        return {}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = tuple(ord(letter) % VOCABULARY for letter in str(body.get("prompt") or "x"))[:32]
        if self._asleep:
            raise RuntimeError("asleep")
        count = min(int(body.get("max_tokens") or 8), 24)
        tokens, probabilities = self._backend.generate(prompt, count)
        text = "".join(chr(0x4E00 + token) for token in tokens)
        choice = {
            "index": 0,
            "text": text,
            "finish_reason": "length",
            "logprobs": {"token_logprobs": probabilities, "tokens": list(text)},
        }
        return {"object": "text_completion", "model": MODEL, "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        sys.stderr.write(f"{format % args}\n")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        answers = {
            "/health": dict,
            "/v1/models": lambda: {"object": "list", "data": [{"id": MODEL, "object": "model"}]},
            "/is_sleeping": self.engine.sleeping,
        }
        self._answer(answers.get(path))

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        asked = parse_qs(parts.query)
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        answers = {
            "/sleep": lambda: self.engine.sleep(int(asked.get("level", ["1"])[0])),
            "/wake_up": lambda: self.engine.wake(asked.get("tags", [])),
            "/collective_rpc": lambda: self.engine.rpc(body),
            "/reset_prefix_cache": self.engine.reset,
            "/v1/completions": lambda: self.engine.complete(body),
        }
        self._answer(answers.get(parts.path))

    def _answer(self, work: Any) -> None:
        if work is None:
            self._send(404, {"error": {"message": f"no {self.path}"}})
            return
        try:
            result = work()
        except ValueError as error:
            self._send(400, {"error": {"message": str(error)}})
        except Exception as error:  # noqa: BLE001  # whatever torch says goes into the table
            self._send(500, {"error": {"message": f"{type(error).__name__}: {error}"}})
        else:
            self._send(200, result)

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(socketserver.UnixStreamServer):
    """One request after the other, all CUDA calls from one thread: nothing that could vary."""

    request_queue_size = 64


def be_parent(extra: str) -> int:
    """Look at the GPUs as an API server does, then wait for the engine as a child."""
    if extra == "cuinit":
        ctypes.CDLL("libcuda.so.1").cuInit(0)
    else:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        import torch

        torch.cuda.is_available()
    argv = [word for word in sys.argv if word not in ("--with", extra)]
    return subprocess.run([sys.executable, *argv]).returncode


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", required=True)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--cache-gib", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--with", dest="extra", default="")
    parser.add_argument("--fake", type=Path)
    asked = parser.parse_args()
    if asked.extra in ("parent", "cuinit"):
        sys.exit(be_parent(asked.extra))
    backend: Backend
    if asked.fake:
        backend = FakeBackend(asked.fake, asked.gib, asked.cache_gib, asked.seed)
    else:
        backend = TorchBackend(asked.gib, asked.cache_gib, asked.seed, nccl=asked.extra == "nccl")
    Handler.engine = Engine(backend)
    os.umask(0o077)
    with Server(asked.uds, Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
