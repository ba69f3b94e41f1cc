"""Several ``llmux serve`` with stand-in engines, and in front Debian's HAProxy as the role has it.

Everything runs on this machine and ends with its block.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from front_programs import ROOT, need

ROLE = ROOT / "ansible/roles/llmux_frontend"
SECONDS = 30.0  # how long any single wait may take
JSON = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(seen: Callable[[], Any], what: str) -> Any:
    """What ``seen`` returns once it is true; the things waited for have no event of their own."""
    deadline = time.monotonic() + SECONDS
    while not (result := seen()):
        assert time.monotonic() < deadline, f"not seen within {SECONDS:g} s: {what}"
        time.sleep(0.02)
    return result


def get(
    port: int,
    path: str,
    headers: dict[str, str] | None = None,
    *,
    certificate: Path | None = None,
) -> tuple[int, bytes]:
    """Status and body; (0, …) where nothing answers."""
    if certificate is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    else:
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(
            "localhost", port, timeout=SECONDS, context=context
        )
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError as error:
        return 0, str(error).encode()
    finally:
        connection.close()


def certificates(directory: Path) -> tuple[Path, Path]:
    """A certificate for localhost, which is its own authority, and its key."""
    directory.mkdir()
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-out", str(certificate), "-keyout", str(key)],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


# ---- the hosts ----------------------------------------------------------------------------------


@dataclass
class Host:
    name: str
    directory: Path
    models: Sequence[str]
    model: JSON = field(default_factory=dict)  # what every model's entry has besides
    each: dict[str, JSON] = field(default_factory=dict)  # what single models' entries have
    policy: JSON = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    aliases: JSON = field(default_factory=dict)
    gateway: JSON = field(default_factory=dict)
    checkpoint: JSON = field(default_factory=dict)
    public: bool = False  # on every address
    certificate: Path | None = None  # with which it speaks TLS
    key: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        home = self.directory / self.name
        home.mkdir(exist_ok=True)
        config = home / "config.yaml"
        gateway = self.gateway | (self._everywhere() if self.public else {})
        listen = gateway.get("listen") or [f"127.0.0.1:{self.port}"]
        entry = {"eviction": "offload+keep_running", "canary": False, **self.model}
        models = {
            name: {"model_path": name, **entry, **self.each.get(name, {})}
            | ({"aliases": self.aliases[name]} if name in self.aliases else {})
            for name in self.models
        }
        config.write_text(
            yaml.safe_dump(
                {
                    "vllm_command": [sys.executable, str(ROOT / "tests/standin/standin.py")],
                    "port": self.port,
                    "metrics_port": 0,
                    "policy": self.policy,
                    "gateway": {**gateway, "listen": [*listen, f"unix:{self.orders}"]},
                    "checkpoint": self.checkpoint,
                    "models": models,
                }
            )
        )
        ledger = str(home / "gpu.json")
        environment = {
            "STANDIN_LEDGER": ledger,
            "LLMUX_GPU_LEDGER": ledger,
            "PYTHONPATH": str(ROOT),
        }
        with (home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmux", "serve", "--config", str(config)],
                env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: self.get("/health/ready")[0] == 200, f"{self.name} is ready")

    def _everywhere(self) -> JSON:
        return {"listen": [f"0.0.0.0:{self.port}"], "allow_public_without_keys": True}

    def get(self, path: str) -> tuple[int, bytes]:
        assert self.process is None or self.process.poll() is None, self.log()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return get(self.port, path, headers, certificate=self.certificate)

    def states(self) -> dict[str, str]:
        models = json.loads(self.get("/health/weights")[1])["models"]
        return {name: model["state"] for name, model in models.items()}

    def load(self, model: str) -> None:
        body = json.dumps({"model": model, "prompt": "warm", "max_tokens": 1})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()

    @property
    def orders(self) -> Path:
        """The gateway's unix socket: whose peer is its own user may give orders."""
        return self.directory / self.name / "http.sock"

    def unload(self) -> None:
        connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.orders))
        connection.request("POST", "/unload", b"")
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()

    def count(self, series: str) -> float:
        """The sum of a metric's samples; ``series`` is an expression over name and labels."""
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(series, line))

    def kill(self) -> None:
        """As a host that loses its power. The engines' guardians end them."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log(self) -> str:
        return (self.directory / self.name / "log").read_text()[-3000:]


@contextlib.contextmanager
def hosts(directory: Path, count: int, models: Sequence[str], **more: Any) -> Iterator[list[Host]]:
    fleet = [Host(f"gpu{number}", directory, models, **more) for number in range(1, count + 1)]
    try:
        for host in fleet:
            host.start()
        yield fleet
    finally:
        for host in fleet:
            host.stop()


# ---- the proxy ----------------------------------------------------------------------------------


def defaults() -> JSON:
    loaded: JSON = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    return loaded


@dataclass
class Proxy:
    directory: Path
    fleet: Sequence[Host]
    program: str
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    variables: JSON = field(default_factory=dict)
    edit: Callable[[str], str] = str
    master: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.directory / "haproxy.cfg"

    def write(self) -> None:
        """The role's own template, with the role's defaults."""
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True,
            autoescape=False,
        )  # fmt: skip
        template = environment.from_string((ROLE / "templates/haproxy.cfg.j2").read_text())
        text = template.render(
            defaults()
            | {
                "ansible_managed": "a test",
                "llmux_frontend_system": False,
                "llmux_frontend_log": f"unix@{self.directory}/log.sock",
                "llmux_frontend_directory": str(ROLE / "files"),
                "llmux_frontend_weights_socket": f"abns@llmux-weights-{self.port}",
                "llmux_frontend_admin_socket": str(self.directory / "admin.sock"),
                "llmux_frontend_state_file": str(self.directory / "server-state"),
                "llmux_frontend_listen": [f"127.0.0.1:{self.port}"],
                "llmux_frontend_metrics_listen": f"127.0.0.1:{self.metrics_port}",
                "llmux_frontend_all_hosts": [
                    {"name": host.name, "address": f"127.0.0.1:{host.port}"} for host in self.fleet
                ],
            }
            | self.variables
        )
        self.config.write_text(self.edit(text))

    def start(self) -> None:
        self.write()
        (self.directory / "server-state").touch()
        check = [self.program, "-c", "-f", str(self.config)]
        checked = subprocess.run(check, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        with (self.directory / "haproxy.log").open("ab") as log:
            self.master = subprocess.Popen(
                [self.program, "-W", "-f", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: set(self.usable()) == set(self.names()), "every host is up to the proxy")

    def stop(self) -> None:
        if self.master is not None and self.master.poll() is None:
            self.master.terminate()
            try:
                self.master.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.master.kill()
                self.master.wait()

    def reload(self) -> None:
        """What the unit's ExecReload does."""
        (self.directory / "server-state").write_text(self.order("show servers state"))
        assert self.master is not None
        before = self.workers()
        self.master.send_signal(signal.SIGUSR2)
        until(lambda: self.workers() - before, "a worker of the new configuration")

    def workers(self) -> set[int]:
        assert self.master is not None
        return {
            int(line)
            for line in Path(f"/proc/{self.master.pid}/task/{self.master.pid}/children")
            .read_text()
            .split()
        }

    def order(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(SECONDS)
            admin.connect(str(self.directory / "admin.sock"))
            admin.sendall(f"{line}\n".encode())
            answer = b""
            while data := admin.recv(65536):
                answer += data
        return answer.decode()

    def names(self) -> list[str]:
        return [host.name for host in self.fleet]

    def usable(self) -> list[str]:
        """Hosts that the proxy has heard of and would send requests to."""
        try:
            weights = self.weights()
        except OSError:
            return []
        return [
            name
            for name in self.names()
            if weights and all(hosts[name] != "-" for hosts in weights.values())
        ]

    def status(self) -> dict[str, str]:
        """Each host as HAProxy sees it: UP, DOWN, DRAIN, …"""
        lines = [line.split(",") for line in self.order("show stat").splitlines() if line]
        return {line[1]: line[17] for line in lines if line[0] == "llmux" and line[1] != "BACKEND"}

    def weights(self) -> dict[str, dict[str, str]]:
        """By model, what the proxy has heard of every host, the model's home first."""
        lines = [line.split("\t") for line in self.order("show llmux").splitlines() if line]
        return {
            model: dict(host.split("=", 1) for host in ranked) for model, *ranked in lines
        }  # fmt: skip

    def until_awake(self, model: str, host: str) -> None:
        """And nowhere else."""

        def seen() -> bool:
            weights = self.weights().get(model, {})
            return [name for name, weight in weights.items() if weight == "100"] == [host]

        until(seen, f"the proxy hears that {model} is awake on {host}")


def patience(directory: Path) -> JSON:
    """The role's proxy takes a host for dead that does not answer for two seconds, and wakes its
    models elsewhere. On a machine that all of this shares a host is slow without being dead."""
    lua = (ROLE / "files/llmux.lua").read_text()
    patient = lua.replace("STALE_S = 250, 5", "STALE_S = 250, 600").replace("2000", "60000")
    assert patient != lua
    (directory / "llmux.lua").write_text(patient)
    return {
        "llmux_frontend_directory": str(directory),
        "llmux_frontend_server_options": "fall 1000",
    }


@contextlib.contextmanager
def proxy(
    directory: Path,
    fleet: Sequence[Host],
    *,
    edit: Callable[[str], str] = str,
    **variables: Any,
) -> Iterator[Proxy]:
    """``edit`` changes the configuration that the role would write."""
    program = need("haproxy", "haproxy")
    running = Proxy(directory, fleet, program, variables=variables, edit=edit)
    try:
        running.start()
        yield running
    finally:
        running.stop()
