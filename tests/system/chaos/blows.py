"""What can be done to llmux while it serves: every blow, by name. In the guest, as root.

A blow returns when what it did is over, or has begun and will end by itself. It raises nothing that
the target's absence explains: an engine that is parked on disk has no process to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "load"))

import client  # noqa: E402 (the path first)
import witness  # noqa: E402
from vllm_standin import faults  # noqa: E402

CONFIG = pathlib.Path("/etc/llmux/config.yaml")
STATE = pathlib.Path("/run/llmux/state.json")
SOCKET = pathlib.Path("/run/llmux/supervisor.sock")
IMAGES = pathlib.Path("/var/lib/llmux/checkpoints")
GPU = pathlib.Path("/var/tmp/gpu")
ORDERED = "the stand-in engine was ordered to fail this completion"
FAULT_BLOWS = 10  # a fault is ordered for 2 s; so many blows take longer

Blow = Callable[["Blows", str], Awaitable[None]]


def run(*argv: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """A program's end, whatever its status: a blow that misses is no fault."""
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
    )


class Blows:
    """``random`` decides details; ``models`` are the names that the configuration has."""

    def __init__(self, random: random.Random, models: tuple[str, ...]) -> None:
        self.random = random
        self.models = models
        self.document: dict[str, Any] = json.loads(CONFIG.read_text())
        self.restarts = 0  # supervisors that these blows ended
        self.tasks: set[asyncio.Task[Any]] = set()

    async def strike(self, name: str, model: str) -> None:
        await TABLE[name](self, model)

    async def settle(self) -> None:
        """The blows that go on beside the next ones have ended."""
        if self.tasks:
            await asyncio.wait(self.tasks)

    def _beside(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _cli(self, *words: str) -> bool:
        """An order; whether it was carried out, which may be refused for good reasons."""
        try:
            done = await asyncio.to_thread(run, "llmux", *words, timeout=90.0)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    # ---- engines ----------------------------------------------------------------------------

    def _pids(self, model: str) -> dict[int, str]:
        return witness.processes(witness.SLICE / f"llmux-{model}.scope")

    def _signal(self, pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def kill_engine(self, model: str) -> None:
        self._signal(list(self._pids(model)), signal.SIGKILL)

    async def kill_process(self, model: str) -> None:
        """One process of the tree, drawn."""
        if pids := sorted(self._pids(model)):
            self._signal([self.random.choice(pids)], signal.SIGKILL)

    async def stop_processes(self, model: str) -> None:
        """SIGSTOP for less than the stall timeout, as a debugger does it."""
        pids = list(self._pids(model))
        self._signal(pids, signal.SIGSTOP)
        await asyncio.sleep(0.5 + self.random.random())
        self._signal(pids, signal.SIGCONT)

    async def hang_engine(self, model: str) -> None:
        """SIGSTOP that is not taken back: the stall watchdog or a step's deadline must act."""
        self._signal(list(self._pids(model)), signal.SIGSTOP)

    async def freeze_outside(self, model: str) -> None:
        path = witness.SLICE / f"llmux-{model}.scope" / "cgroup.freeze"
        with contextlib.suppress(OSError):
            path.write_text("1")
        await asyncio.sleep(0.3 + self.random.random())
        with contextlib.suppress(OSError):
            path.write_text("0")

    async def stop_scope(self, model: str) -> None:
        await asyncio.to_thread(run, "systemctl", "stop", f"llmux-{model}.scope")

    async def fault(self, model: str) -> None:
        """The stand-in misbehaves for the next moments, and then no more."""
        what: dict[str, Any] = self.random.choice(
            [
                {"die_on": "sleep"}, {"die_on": "wake"}, {"die_on": "reload"},
                {"sleep_error": 1}, {"wake_error": 1}, {"reload_error": 1},
                {"slow_sleep_secs": 1.0}, {"slow_wake_secs": 1.0}, {"wrong_after_wake": True},
                {"leak_on_sleep": True}, {"completion_error": 2}, {"hang": "completions"},
                {"die_at_start": True}, {"ignore_sigterm": True}, {"orphan": True},
                {"startup_secs": 1.0}, {"die_mid_stream": 2},
            ]
        )  # fmt: skip
        path = str(GPU / f"{model}.faults")
        faults.order(path, **what)

        async def heal() -> None:
            await asyncio.sleep(2.0)
            faults.order(path)

        self._beside(heal())

    # ---- llmux itself -----------------------------------------------------------------------

    async def _kill_service(self, unit: str) -> None:
        main = await asyncio.to_thread(witness.main_pid, unit)
        if main:
            with contextlib.suppress(ProcessLookupError):
                os.kill(main, signal.SIGKILL)
            await asyncio.to_thread(witness.gone, [main], 20.0)

    async def kill_supervisor(self, _model: str) -> None:
        self.restarts += 1
        await self._kill_service(witness.SUPERVISOR)

    async def kill_gateway(self, _model: str) -> None:
        await self._kill_service(witness.GATEWAY)

    async def kill_worker(self, _model: str) -> None:
        main = await asyncio.to_thread(witness.main_pid, witness.GATEWAY)
        pids = set(witness.processes(witness.SLICE / witness.GATEWAY)) - {main}
        if pids:
            self._signal([self.random.choice(sorted(pids))], signal.SIGKILL)

    async def restart_supervisor(self, _model: str) -> None:
        await asyncio.to_thread(run, "systemctl", "restart", witness.SUPERVISOR)

    async def restart_gateway(self, _model: str) -> None:
        await asyncio.to_thread(run, "systemctl", "restart", witness.GATEWAY)

    async def pause_supervisor(self, _model: str) -> None:
        main = await asyncio.to_thread(witness.main_pid, witness.SUPERVISOR)
        if main:
            self._signal([main], signal.SIGSTOP)
            await asyncio.sleep(0.5 + self.random.random())
            self._signal([main], signal.SIGCONT)

    async def remove_socket(self, _model: str) -> None:
        await asyncio.to_thread(SOCKET.unlink, missing_ok=True)

    async def garbage_on_the_socket(self, _model: str) -> None:
        lines = [
            b"\xff\xfe nonsense\n", b"{}\n", b'{"type":"hello","role":"gateway","holds":5}\n',
            b'{"type":"drained","model":[],"epoch":"x"}\n', b"[" * 5000 + b"\n",
            b'{"type":"ask","id":1,"verb":"logs","arguments":{"model":{},"lines":"x"}}\n',
            b'{"type":"demand","model":"alpha","waiting":1,"oldest_age":"x"}\n',
        ]  # fmt: skip
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as ours:
            ours.settimeout(2.0)
            ours.connect(str(SOCKET))
            for _ in range(3):
                ours.sendall(self.random.choice(lines))

    async def reload(self, _model: str) -> None:
        """Another value of a key that takes effect at once."""
        self.document["policy"]["max_wait_secs"] = self.random.choice([5, 10, 15])
        await self._write_and_reload(json.dumps(self.document))

    async def reload_nonsense(self, _model: str) -> None:
        await self._write_and_reload('{"models": {"alpha": {"evictoin": 1}}')
        await self._write_and_reload(json.dumps(self.document))

    async def remove_and_add(self, model: str) -> None:
        rest = {name: one for name, one in self.document["models"].items() if name != model}
        await self._write_and_reload(json.dumps({**self.document, "models": rest}))
        await asyncio.sleep(self.random.random())
        await self._write_and_reload(json.dumps(self.document))

    async def _write_and_reload(self, text: str) -> None:
        new = CONFIG.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o644)
        new.replace(CONFIG)
        await asyncio.to_thread(run, "systemctl", "reload", witness.SUPERVISOR)

    # ---- files ------------------------------------------------------------------------------

    def _files(self, model: str, pattern: str) -> list[pathlib.Path]:
        return sorted(IMAGES.glob(f"{model}/**/{pattern}"))

    def _damage(self, path: pathlib.Path) -> None:
        """A bit, the end, or all of it; replaced, since who reads it may have it open."""
        with contextlib.suppress(OSError):
            data = bytearray(path.read_bytes())
            match self.random.randrange(4):
                case 0:
                    data = data[: len(data) // 2]
                case 1 if data:
                    data[self.random.randrange(len(data))] ^= 0xFF
                case 2:
                    data = bytearray(b'{"models": {"alpha": 5}, "identity": [null]}')
                case _:
                    data = bytearray()
            other = path.with_name(path.name + ".chaos")
            other.write_bytes(bytes(data))
            other.replace(path)

    async def damage_notes(self, model: str) -> None:
        self._damage(STATE)
        await self.kill_supervisor(model)

    async def damage_manifest(self, model: str) -> None:
        for path in self._files(model, "manifest.json"):
            self._damage(path)

    async def damage_image(self, model: str) -> None:
        if files := self._files(model, "*.img"):
            self._damage(self.random.choice(files))

    async def fill_run(self, _model: str) -> None:
        used = run("df", "-k", "--output=used", "/run").stdout.split()[-1]
        await asyncio.to_thread(run, "mount", "-o", f"remount,size={used}k", "/run")
        await asyncio.sleep(1 + 2 * self.random.random())
        await asyncio.to_thread(run, "mount", "-o", "remount,size=100m", "/run")

    # ---- the system -------------------------------------------------------------------------

    async def restart_journald(self, _model: str) -> None:
        await asyncio.to_thread(run, "systemctl", "restart", "systemd-journald")

    async def daemon_reload(self, _model: str) -> None:
        await asyncio.to_thread(run, "systemctl", "daemon-reload")

    async def daemon_reexec(self, _model: str) -> None:
        await asyncio.to_thread(run, "systemctl", "daemon-reexec")

    # ---- clients and operators --------------------------------------------------------------

    async def storm(self, model: str) -> None:
        """Many requests at once, of which some leave before they are answered."""

        async def one(number: int) -> None:
            left = self.random.random() < 0.5
            timeout = 0.2 if left else 60.0
            await client.ask(model, f"storm {number}", tokens=4, timeout=timeout)

        self._beside(asyncio.gather(*(one(number) for number in range(100))))
        await asyncio.sleep(0.2)

    async def raw_nonsense(self, _model: str) -> None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", 3000)
            writer.write(self.random.choice([b"\x16\x03\x01\x02", b"GET\r\n\r\n", b"x" * 40_000]))
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(3):
                    await reader.read()
            writer.transport.abort()

    async def load_order(self, model: str) -> None:
        self._beside(self._cli("load", model))

    async def unload_order(self, model: str) -> None:
        self._beside(self._cli("unload", model))

    async def pin_for_a_while(self, model: str) -> None:
        async def pinned() -> None:
            await self._cli("pin", model)
            # A pin outlives the supervisor, which may be away or killed while it is to be ended.
            for _ in range(100):
                if await self._cli("unpin"):
                    return
                await asyncio.sleep(0.2)

        self._beside(pinned())

    async def checkpoint_order(self, model: str) -> None:
        self._beside(self._cli("checkpoint", model))


QUIET = {"strike", "settle"}
TABLE: dict[str, Blow] = {
    name: member
    for name, member in vars(Blows).items()
    if not name.startswith("_") and name not in QUIET and callable(member)
}
# Blows after which an answer that was under way may have been cut by the gateway's own end.
ENDS_GATEWAY = frozenset({"kill_gateway", "kill_worker", "restart_gateway"})
