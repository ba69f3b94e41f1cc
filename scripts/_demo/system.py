"""As it is installed: the .deb in a real systemd guest, two real vLLM engines on the CPU.

The two claim the whole GPU each, so they have to take turns; parked they are frozen. On the CPU a
frozen engine holds no GPU memory, which `gpu_memory_parked: 0` tells the supervisor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from _lab import vllm
from _lab.guest import Guest

ROOT = Path(__file__).resolve().parents[2]

MODEL = """\
  {name}:
    model_path: {path}
    eviction: retain+freeze
    gpu_memory_parked: 0
    extra_args: {flags}
    env: {env}
"""


def build_deb() -> str:
    done = subprocess.run(
        [ROOT / "scripts" / "build-deb"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout.decode().split()[-1]


def config(environment: vllm.Environment) -> str:
    env = {k: v for k, v in vllm.SETTINGS.items() if k != "VLLM_SERVER_DEV_MODE"}
    models = "".join(
        MODEL.format(
            name=name, path=path, flags=json.dumps(list(vllm.SERVE_FLAGS)), env=json.dumps(env)
        )
        for name, path in environment.models.items()
    )
    return (
        f'vllm_command: ["{environment.vllm}"]\n'
        "metrics_port: 0\n"
        "policy:\n  min_active_secs: 0\n"
        f"models:\n{models}"
    )


def main() -> int:
    environment = vllm.environment()
    deb = build_deb()
    began = time.monotonic()
    with Guest.up(with_vllm=True, debs=[deb]) as guest:
        text = config(environment)
        guest.write("/etc/llmux/config.yaml", text, mode=0o640)
        print(f"/etc/llmux/config.yaml\n\n{text}")
        # the engine has a user of its own, which must be able to reach the environment
        guest.run(["chmod", "a+x", "/root"])
        guest.run(["chgrp", "llmux", "/etc/llmux/config.yaml"])
        guest.run(["systemctl", "enable", "--now", "llmux"])
        print(f"guest up, llmux running after {time.monotonic() - began:.1f} s", flush=True)
        first, second = environment.models
        turns = [first, second, first, second, first, second]
        client = guest.run(
            ["python3", "/srv/llmux/scripts/_demo/client.py", "http://127.0.0.1:3000", "any", "24"]
            + turns,
            timeout=600,
            check=False,
        )
        print(client.stdout, client.stderr)
        journal = guest.run(
            ["journalctl", "-u", "llmux.service", "-o", "cat", "_SYSTEMD_UNIT=llmux.service"]
        )
        print("what the supervisor said:\n" + journal.stdout)
    print(f"all in all {time.monotonic() - began:.1f} s")
    return client.returncode


if __name__ == "__main__":
    sys.exit(main())
