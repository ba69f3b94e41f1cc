"""llmux with two real vLLM engines on the CPU in a guest: what the bench and the engine tests ask.

Both models claim the whole GPU, so they take turns. In an nspawn guest CRIU cannot dump another
user's processes (no CAP_SYS_RESOURCE), hence ``engine_user: root``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from _lab import vllm
from _lab.guest import Guest

from _bench.turns import Turn

PROGRAMS = "/srv/llmux/scripts/_bench"
CONFIG = "/etc/llmux/config.yaml"
IMAGES = "/var/lib/llmux/checkpoints"
URL = "http://127.0.0.1:3000"
NO_RELEASE = (
    "vLLM on the CPU cannot release its KV cache: it refuses --enable-sleep-mode, and /sleep frees"
    " nothing. What is unused of it is zero pages, which are taken out of the image"
)
MODELS = tuple(vllm.MODELS)


def socket_of(model: str) -> str:
    return f"/run/llmux/engines/{model}/api.sock"


def configuration(
    eviction: str, *, kv_cache_bytes: int | None = None, ballast_bytes: int = 0
) -> dict[str, Any]:
    """``kv_cache_bytes``: of each engine; 1 GiB when nothing is said. ``ballast_bytes``: what the
    first model holds besides, and never touches."""
    environment = vllm.environment()
    # dev mode is llmux's to open, when the eviction needs it
    env = {key: value for key, value in vllm.SETTINGS.items() if key != "VLLM_SERVER_DEV_MODE"}
    flags = [*vllm.SERVE_FLAGS]
    if kv_cache_bytes is not None:
        del env["VLLM_CPU_KVCACHE_SPACE"]  # whole GiB only, and stronger than the flag
        flags += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
    ballast = {"PYTHONPATH": f"{PROGRAMS}/large_image", "LLMUX_BENCH_BALLAST": str(ballast_bytes)}
    return {
        "vllm_command": [environment.vllm],
        "engine_user": "root",
        "metrics_port": 0,
        "policy": {"min_active_secs": 0},
        "models": {
            name: {
                "model_path": path,
                "eviction": eviction,
                "gpu_memory_parked": 0,  # there is no GPU that a frozen one could hold
                "extra_args": flags,
                "env": env | ballast if ballast_bytes and name == MODELS[0] else env,
            }
            for name, path in environment.models.items()
        },
    }


class Engines:
    """llmux in ``guest``, which was started ``with_vllm`` and with the package."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def begin(self, eviction: str) -> None:
        """A fresh start: no engine, no image, both models parked like this."""
        self.start(configuration(eviction))

    def start(self, document: Mapping[str, Any]) -> None:
        """A fresh start with this configuration."""
        self.end()
        self.guest.run(["rm", "-rf", IMAGES], timeout=60)
        self.guest.write(CONFIG, json.dumps(document, indent=1), mode=0o640)
        self.guest.run(["chgrp", "llmux", CONFIG])
        self.guest.run(["systemctl", "start", "llmux"])

    def end(self) -> None:
        self.guest.run(["systemctl", "stop", "llmux.slice"], timeout=90)
        self.guest.run(["systemctl", "reset-failed"])

    def turns(self, models: Sequence[str]) -> list[Turn]:
        """One request to each, in this order; each was answered, by the model it named."""
        done = self.guest.run(
            ["python3", f"{PROGRAMS}/turns.py", URL, *models],
            timeout=300 + 120 * len(models),  # a cold start takes 25 s, or 100 on a busy host
            check=False,
        )
        turns = [Turn(**json.loads(line)) for line in done.stdout.splitlines()]
        problems = [turn.problem for turn in turns if turn.problem]
        if done.returncode != 0 or problems or [turn.model for turn in turns] != list(models):
            raise RuntimeError(f"{problems or done.stderr}\n{self.journal()}")
        return turns

    def cycles(self, count: int) -> tuple[list[Turn], list[dict[str, Any]]]:
        """Each model cold, then ``count`` times each, parked as configured. With every other cycle,
        when both are parked, one image is restored by ``criu restore`` alone, as often: under the
        same load, to be compared."""
        turns, bare = self.turns(MODELS), []
        for first in range(0, count, 2):
            now = min(2, count - first)
            turns += self.turns(MODELS * now)
            self.guest.run(["llmux", "sleep", MODELS[-1]], timeout=120)
            bare += self.bare_restores(now)
        return turns, bare

    def bare_restores(self, count: int, *, lazy: bool = False) -> list[dict[str, Any]]:
        """``criu restore`` of the image of the model that is parked, without llmux; ``lazy``: its
        pages come when they are touched."""
        image, model = f"{IMAGES}/{MODELS[0]}/images", MODELS[0]
        done = self.guest.run(
            [
                *("python3", f"{PROGRAMS}/bare.py", image, str(count), model, socket_of(model)),
                *(["lazy"] if lazy else []),
            ],
            timeout=60 + 30 * count,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def image(self, model: str) -> dict[str, Any]:
        """The manifest of the model's image."""
        manifest: dict[str, Any] = json.loads(
            self.guest.read(f"{IMAGES}/{model}/images/manifest.json")
        )
        return manifest

    def journal(self, lines: int = 80) -> str:
        """What the supervisor itself said last."""
        said = ["_SYSTEMD_UNIT=llmux.service", "-n", str(lines), "-o", "short-monotonic"]
        return self.guest.run(["journalctl", "--no-pager", *said]).stdout
