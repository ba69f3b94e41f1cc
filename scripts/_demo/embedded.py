"""`llmux serve` with two stand-in models of one GPU's size each, on this machine, as any user."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _demo.client import Client, report, take_turns

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """\
vllm_command: ["{python}", "{root}/tests/standin/standin.py"]
port: {port}
metrics_port: 0
policy:
  min_active_secs: 0        # switch at once: this is a demonstration
models:
  poet:
    model_path: demo/poet
    eviction: offload+keep_running
    extra_args: [--standin-tokens-per-sec, "80"]
  critic:
    model_path: demo/critic
    eviction: discard+keep_running
    extra_args: [--standin-tokens-per-sec, "120"]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmux-demo-") as directory:
        ledger = f"{directory}/gpu.json"
        port = free_port()
        config = Path(directory, "config.yaml")
        config.write_text(CONFIG.format(python=sys.executable, root=ROOT, port=port))
        print(f"llmux serve --config {config}\n\n{config.read_text()}")
        environment = os.environ | {"STANDIN_LEDGER": ledger, "LLMUX_GPU_LEDGER": ledger}
        server = subprocess.Popen(
            [sys.executable, "-m", "llmux", "serve", "--config", str(config)],
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            if not listening(server, port):
                return 1
            client = Client(f"http://127.0.0.1:{port}", named=True, tokens=40)
            turns = ["poet", "critic", "poet", "critic", "poet", "critic"]
            return report(take_turns(client, turns), began)
        finally:
            server.send_signal(signal.SIGTERM)
            _, log = server.communicate(timeout=60)
            said = re.sub(r"^<\d>", "", log, flags=re.MULTILINE)  # priorities, for a journal
            print("\nwhat the supervisor said:\n" + said.strip())


def listening(server: subprocess.Popen[str], port: int) -> bool:
    """Wait until the port answers; False when the server ended instead."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if server.poll() is not None:
            return False
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
