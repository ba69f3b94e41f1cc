"""What the tests of parking add to a guest: a fake CUDA driver, orders, a look at images."""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

from llmux_guest import GATEWAY, GPU, LEDGER, SUPERVISOR, LlmuxGuest, model

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "fake_libcuda"))

import fake_cuda

CUDA = "/var/tmp/cuda"
IMAGES = "/var/lib/llmux/checkpoints"
HOOK = f"""#!/bin/sh
exec /usr/bin/python3 /srv/llmux/tests/fake_libcuda/move_memory.py {LEDGER} "$@"
"""
# In a container CRIU cannot dump the processes of another user (no CAP_SYS_RESOURCE there).
AS_ROOT = {"engine_user": "root"}


# A GPU small enough for what is on it to fit into this machine's memory, as cuda_suspend asks.
SMALL_GPU = {
    "STANDIN_CAPACITY_GIB": "4",
    "STANDIN_WEIGHTS_GIB": "0.5",
    "STANDIN_CONTEXT_GIB": "0.1",
}


def small(eviction: str, mib: int = 0, env: dict[str, str] | None = None, **settings: Any) -> Any:
    """A model on that GPU. ``mib``: real memory that `discard` drops, by which an image and a
    resident set are measured."""
    host = {"STANDIN_HOST_WEIGHTS_MIB": str(mib)}
    return model(eviction, env={**SMALL_GPU, **host, **(env or {})}, **settings)


class ParkingLab:
    """llmux in a guest whose engines are CUDA processes of a fake driver."""

    def __init__(self, llmux: LlmuxGuest) -> None:
        self.llmux = llmux
        self.run = llmux.run
        self._cursor = ""
        for name in ("procs", "faults"):
            self.run(["install", "-d", "-m", "0777", f"{CUDA}/{name}"])
        with tempfile.TemporaryDirectory() as directory:
            fake = fake_cuda.FakeCuda(pathlib.Path(directory))
            llmux.guest.write(f"{CUDA}/libcuda.so.1", fake.library.read_bytes(), mode=0o755)
        llmux.guest.write(f"{CUDA}/hook", HOOK, mode=0o755)
        llmux.drop_in(
            SUPERVISOR,
            "cuda",
            f"[Service]\nEnvironment=LLMUX_LIBCUDA={CUDA}/libcuda.so.1 STANDIN_CUDA={CUDA}\n",
        )

    def begin(self, models: dict[str, dict[str, Any]], **top: Any) -> None:
        self.end()
        # killed engines leave files in /dev/shm; here it is the test that killed them
        mess = f"{IMAGES}/* {CUDA}/procs/* {CUDA}/faults/* {LEDGER}.saved /dev/shm/*"
        # as do marks of a hung host: it was the test that killed them with their CUDA state there
        mess += f" {CUDA}/restored/* {CUDA}/host_hung"
        self.run(["sh", "-c", f"rm -rf {mess}"])
        last = self.run(["journalctl", "--no-pager", "-n", "0", "--show-cursor"]).stdout
        self._cursor = last.partition("-- cursor: ")[2].strip()
        self.llmux.begin(models, **{**AS_ROOT, **top})

    def end(self) -> None:
        """A frozen engine hears no SIGTERM: without the kill, stopping its scope takes 10 s."""
        self.run(["systemctl", "stop", SUPERVISOR, GATEWAY], check=False)
        self.run(["systemctl", "kill", "--signal=SIGKILL", "llmux-*.scope"], check=False)
        self.llmux.end()

    def ask(self, name: str, prompt: str = "hello", *, timeout: float = 30) -> dict[str, Any]:
        return self.llmux.ask(name, prompt, timeout=timeout)

    def good(self, name: str, prompt: str = "hello", *, timeout: float = 30) -> dict[str, Any]:
        """An answer that is right to the last byte. Returns when nothing moves any more: another
        model's image may still be written while this one answers."""
        answer = self.ask(name, prompt, timeout=timeout)
        assert answer["error"] == "", f"{answer}\n{self.llmux.journal(lines=120)}"
        self.llmux.load("look", "until-rest")
        return answer

    def cli(self, *words: str, code: int = 0, timeout: float = 60) -> Any:
        """One of llmux's verbs with --json; its answer."""
        done = self.run(["llmux", *words, "--json"], check=False, timeout=timeout)
        assert done.returncode == code, f"{done.stdout}{done.stderr}{self.llmux.journal()}"
        return json.loads(done.stdout) if done.stdout else None

    def said(self, words: str) -> list[str]:
        """llmux's lines since begin() that have the words."""
        text = self.llmux.journal(f"--after-cursor={self._cursor}")
        return [line for line in text.splitlines() if words in line]

    def images(self) -> dict[str, dict[str, Any]]:
        return {row["model"]: row for row in self.cli("checkpoint")}

    def cuda_fault(self, call: str, words: str) -> None:
        """See libcuda.c; for "hang" the call waits until its FIFO is opened."""
        self.llmux.guest.write(f"{CUDA}/faults/{call}", words + "\n")
        if words == "hang":
            self.run(["mkfifo", f"{CUDA}/faults/{call}.fifo"])

    def heal_cuda(self) -> None:
        """No more faults, and calls that hang go on."""
        self.run(
            [
                "sh",
                "-c",
                f"cd {CUDA}/faults; for f in *.fifo; do [ -e $f ] && : <>$f; done; rm -f *",
            ]
        )

    def witness(self, *words: str) -> Any:
        return self.llmux.load("look", *words)


__all__ = ["AS_ROOT", "CUDA", "GPU", "IMAGES", "ParkingLab", "model", "small"]
