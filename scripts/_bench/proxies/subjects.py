"""What is compared: nginx, llmux's gateway, LiteLLM's proxy, each one process before one engine.

All are pinned to ``PROXY_CPU``; engine and clients run on ``LOAD_CPU``. What a machine lacks is put
into the cache: Debian's nginx is unpacked there and not installed, so that no service starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from _lab import host

from llmux.protocol import Catalog, Grant, ModelInfo

HERE = pathlib.Path(__file__).resolve().parent
MODEL = "alpha"
CPUS = sorted(os.sched_getaffinity(0))
PROXY_CPU, LOAD_CPU = CPUS[0], CPUS[-1]
START_SECS = 120.0
LITELLM = "litellm[proxy]==1.106.2"


@dataclass(frozen=True)
class Subject:
    """A proxy that runs. ``pid`` and all below it are its processes; None: no proxy at all."""

    name: str
    address: str
    pid: int | None = None

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(pid) for pid in _family(self.pid))

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes."""
        return sum(_pss(pid) for pid in _family(self.pid))


def _family(pid: int | None) -> list[int]:
    if pid is None:
        return []
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in _family(int(child)))]


def cpu_seconds(pid: int) -> float:
    """Time on a CPU of all threads, from the scheduler's own nanoseconds."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _pss(pid: int) -> int:
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise host.LabError(f"cannot read the memory of process {pid}")


# ---- tools --------------------------------------------------------------------------------------


def compiled(name: str, directory: pathlib.Path) -> str:
    """The C program of that name."""
    compiler = host.find_tool("cc") or host.find_tool("gcc")
    if compiler is None:
        host.install_packages(["gcc", "libc6-dev"])
        compiler = "gcc"
    program = str(directory / name)
    host.run_logged(
        [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, str(HERE / f"{name}.c")],
        what=f"compiling {name}.c",
    )
    return program


def nginx_program() -> str:
    found = host.find_tool("nginx")
    if found is not None:
        return found
    target = host.cache_dir() / "nginx"
    program = target / "usr/sbin/nginx"
    with host.locked(host.cache_dir() / "nginx.lock", "unpacking nginx"):
        if not program.exists():
            host.say(f"unpacking Debian's nginx into {target} (no service is installed)")
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            script = (
                "apt-get -q download nginx || { apt-get -q update && apt-get -q download nginx; }"
            )
            host.run_logged(["sh", "-c", f"cd {target} && {script}"], what="downloading nginx")
            package = next(target.glob("nginx_*.deb"))
            host.run_logged(["dpkg", "-x", str(package), str(target)], what="unpacking nginx")
    return str(program)


def litellm_program() -> str:
    target = host.cache_dir() / f"litellm-{host.recipe_key([LITELLM, sys.version])}"
    with host.locked(host.cache_dir() / f"{target.name}.lock", "installing LiteLLM"):
        if not (target / "complete").exists():
            host.say(f"installing {LITELLM} in {target} (a minute, once)")
            shutil.rmtree(target, ignore_errors=True)
            venv.create(target, with_pip=True)
            pip = [f"{target}/bin/python", "-m", "pip", "install", "-q", "--no-input", LITELLM]
            host.run_logged(pip, what="installing LiteLLM", log=target / "pip.log")
            (target / "complete").touch()
    return f"{target}/bin/litellm"


def versions() -> dict[str, str]:
    nginx = subprocess.run([nginx_program(), "-v"], capture_output=True, text=True, check=True)
    ask = "import sys, sanic, uvloop, httptools; print(sys.version.split()[0], uvloop.__version__)"
    python = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return {
        "nginx": nginx.stderr.strip().rpartition("/")[2],
        "litellm": LITELLM.rpartition("=")[2],
        **dict(zip(("python", "uvloop"), python.stdout.split(), strict=True)),
    }


# ---- running ------------------------------------------------------------------------------------


def pinned(cpu: int, argv: Sequence[str]) -> list[str]:
    return ["taskset", "-c", str(cpu), *argv]


@contextlib.contextmanager
def running(argv: Sequence[str], log: pathlib.Path, **more: str) -> Iterator[int]:
    """The pid of a program, which is ended with the block."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **more},
            start_new_session=True,
        )
    try:
        yield child.pid
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int, log: pathlib.Path, pid: int) -> None:
    deadline = time.monotonic() + START_SECS
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        if time.monotonic() > deadline or _has_ended(pid):
            raise host.LabError(f"port {port} was not opened\n{host.indented(log.read_text())}")
        time.sleep(0.05)


def _has_ended(pid: int) -> bool:
    """A child that is not waited for yet is a zombie."""
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0] == "Z"


@dataclass(frozen=True)
class Engine:
    path: str
    port: int
    pid: int


@contextlib.contextmanager
def engine(directory: pathlib.Path) -> Iterator[Engine]:
    path, port, log = str(directory / "engine.sock"), free_port(), directory / "stub.log"
    argv = pinned(LOAD_CPU, [compiled("stub", directory), path, str(port)])
    with running(argv, log) as pid:
        wait_for(port, log, pid)
        yield Engine(path, port, pid)


# "user": the worker of a root nginx runs as nobody, which may not connect to the engine's socket.
NGINX = """
{user} daemon off; worker_processes 1;
pid {directory}/nginx.pid; error_log {directory}/nginx.err warn;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 100000000;
    client_body_temp_path {directory}/t1; proxy_temp_path {directory}/t2;
    fastcgi_temp_path {directory}/t3; uwsgi_temp_path {directory}/t4; scgi_temp_path {directory}/t5;
    upstream engine {{ server unix:{engine}; keepalive 512; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 600s;
        }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(directory: pathlib.Path, behind: Engine) -> Iterator[Subject]:
    port, configuration, log = free_port(), directory / "nginx.conf", directory / "nginx.log"
    user = "user root;" if os.geteuid() == 0 else ""
    configuration.write_text(
        NGINX.format(user=user, directory=directory, engine=behind.path, port=port)
    )
    argv = [nginx_program(), "-c", str(configuration), "-e", str(log)]
    with running(pinned(PROXY_CPU, argv), log) as pid:
        wait_for(port, log, pid)
        yield Subject("nginx", f"127.0.0.1:{port}", pid)


LLMUX = """
import sys
from llmux.daemon.gateway import gateway
from llmux.daemon.process import setup_logging
setup_logging(False)
gateway(sys.argv[1], link=sys.argv[2], last_good=sys.argv[3])
"""


@contextlib.contextmanager
def llmux(directory: pathlib.Path, behind: Engine) -> Iterator[Subject]:
    port, configuration, log = free_port(), directory / "llmux.json", directory / "llmux.log"
    settings = {"port": port, "metrics_port": 0, "models": {MODEL: {"model_path": "/models/alpha"}}}
    # The memory of 1024 streams is measured, and the goal is about the relay, not the limit.
    configuration.write_text(json.dumps({**settings, "gateway": {"max_in_flight": 100_000}}))
    link = str(directory / "supervisor.sock")
    files = [str(configuration), link, str(directory / "last-good.json")]
    argv = pinned(PROXY_CPU, [sys.executable, "-c", LLMUX, *files])
    with supervisor(link, behind), running(argv, log) as pid:
        wait_for(port, log, pid)
        yield Subject("llmux", f"127.0.0.1:{port}", pid)


@contextlib.contextmanager
def supervisor(path: str, behind: Engine) -> Iterator[None]:
    """As much of a supervisor as the gateway needs: it says where the engine is, and listens."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):  # the block ended
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)  # hello
                catalog = Catalog.of([ModelInfo(MODEL, "serving")])
                peer.sendall(catalog.encode() + Grant(MODEL, "e1", uds=behind.path).encode())
                while peer.recv(65536):
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.close()


@contextlib.contextmanager
def litellm(directory: pathlib.Path, behind: Engine) -> Iterator[Subject]:
    port, configuration, log = free_port(), directory / "litellm.yaml", directory / "litellm.log"
    parameters = {
        "model": f"openai/{MODEL}",
        "api_base": f"http://127.0.0.1:{behind.port}/v1",
        "api_key": "none",
    }
    models = [{"model_name": MODEL, "litellm_params": parameters}]
    configuration.write_text(
        json.dumps({"model_list": models, "litellm_settings": {"telemetry": False}})
    )
    options = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    argv = pinned(PROXY_CPU, [litellm_program(), "--config", str(configuration), *options])
    settings = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the internet for prices
        # Without keys, as the others here; it listens on the loopback only.
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with running(argv, log, **settings) as pid:
        wait_for(port, log, pid)
        yield Subject("LiteLLM", f"127.0.0.1:{port}", pid)


@contextlib.contextmanager
def direct(_directory: pathlib.Path, behind: Engine) -> Iterator[Subject]:
    yield Subject("direct", f"127.0.0.1:{behind.port}")


Start = Callable[[pathlib.Path, Engine], contextlib.AbstractContextManager[Subject]]
