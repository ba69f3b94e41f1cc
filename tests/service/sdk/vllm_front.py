"""The package in a guest with the real vLLM on the CPU: one model that chats, one that embeds.

Clients here reach the gateway's TCP port in the guest through a forwarded one.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdk_front import ALIASES, Front, Keys

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "system"))

from llmux_guest import Guest, build_package  # found by the line above; knows the way to scripts/

# isort: split
from _bench.engines import MODELS, Engines, configuration, socket_of
from _lab.forward import forwarded
from _lab.vllm import environment

KEYS = "/etc/llmux/keys"
# The first tiny model, which here never ends an answer by itself and may go on for minutes: an
# engine on the CPU leaves its own HTTP server little time, so what it says is seconds late.
MODEL = "/var/lib/endless-model"
CONTEXT = 65536
PORT = 3000
HIDDEN = 256  # of the tiny models: the length of their embeddings
START_SECS = 300.0


def _copy_model(guest: Guest) -> None:
    source = environment().models[MODELS[0]]
    longer = f's/"max_position_embeddings": 2048/"max_position_embeddings": {CONTEXT}/'
    edit = f"cp -r {source} {MODEL} && sed -i -e /eos_token/d -e '{longer}' {MODEL}/*config.json"
    guest.run(["sh", "-c", edit])


def _document() -> dict[str, Any]:
    """Both fit together; responses are kept, so that they can be asked for again."""
    document = configuration("retain+keep_running")
    chats, embeds = (document["models"][name] for name in MODELS)
    for one in (chats, embeds):
        one.pop("eviction")
        one["gpu_memory"] = 0.5
    chats["model_path"] = MODEL
    chats["aliases"] = list(ALIASES)
    chats["extra_args"] = [*chats["extra_args"], "--max-model-len", str(CONTEXT)]
    chats["env"] = {**chats["env"], "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    embeds["extra_args"] = [*embeds["extra_args"], "--runner", "pooling"]
    document["models"] = {"alpha": chats, "gamma": embeds}
    document["gateway"] = {"keys_file": KEYS}
    return document


def _load(front: Front) -> None:
    """Both models, at the same time: a cold start is half a minute."""

    def ask(path: str, **body: Any) -> None:
        request = urllib.request.Request(f"{front.url}{path}", json.dumps(body).encode())
        request.add_header("Authorization", f"Bearer {front.keys.use}")
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request, timeout=START_SECS).close()

    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(ask, "/v1/completions", model=front.chat, prompt="x", max_tokens=1),
            pool.submit(ask, "/v1/embeddings", model=front.embedder, input="x"),
        ]
        for one in asked:
            one.result()


@contextmanager
def vllm_front() -> Iterator[Front]:
    keys = Keys()
    with Guest.up(debs=[build_package()], with_vllm=True) as guest:
        engines = Engines(guest)
        _copy_model(guest)
        guest.write(KEYS, keys.lines, mode=0o640)
        guest.run(["chgrp", "llmux", KEYS])
        engines.start(_document())
        with forwarded(guest.pid1, PORT) as port:
            url, models = f"http://127.0.0.1:{port}", frozenset({"alpha", "gamma"})
            sockets = {name: f"{guest.root}{socket_of(name)}" for name in models}
            front = Front(url, keys, models, "alpha", "gamma", HIDDEN, sockets)
            try:
                _load(front)
            except OSError as error:
                raise RuntimeError(f"{error}\n{engines.journal()}") from error
            yield front
