"""``scripts/gpu-proof``: every way of parking that needs no supervisor, on a GPU, in a table."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from _gpu_proof import report
from _gpu_proof.client import Client, Engine, ProofError
from _gpu_proof.host import Criu, FakeMemory, Freezer, NotHere, find_memory
from _gpu_proof.matrix import ROWS, Bench, Row, run_row
from llmux.drivers import launcher
from llmux.drivers.cuda import LIBRARY, CudaDriver
from llmux.drivers.cuda_cli import CudaCheckpointTool
from llmux.errors import DriverError
from llmux.ports import DeviceCheckpointer

ROOT = Path(__file__).resolve().parents[2]
STARTUP_SECS = 1800.0
# Another batch shape after a wake moves vLLM's bfloat16 log-probs a little; its words must stay.
VLLM_TOLERANCE = 0.05
# What makes vLLM's processes checkpointable: no forked CUDA, no io_uring, no other network.
VLLM_ENV = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "UV_USE_IO_URING": "0",
    "USE_LIBUV": "0",
    "NO_COLOR": "1",
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-proof", description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0, help="weights of the PyTorch engine")
    parser.add_argument("--cache-gib", type=float, default=1.0, help="its KV cache")
    parser.add_argument("--gpu", type=int, default=0, help="index as nvidia-smi counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--rows", default="", help="only these: retain+freeze,discard+checkpoint")
    parser.add_argument(
        "--images", type=Path, help="directory for CRIU images (default: temporary)"
    )
    parser.add_argument("--criu", default="criu")
    parser.add_argument("--cuda-checkpoint", metavar="PATH", help="the tool in place of libcuda")
    parser.add_argument("--python", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--vllm-model", metavar="DIR", help="measure vLLM too, with this model")
    parser.add_argument("--vllm", default="vllm", metavar="COMMAND")
    parser.add_argument("--vllm-arg", action="append", default=[], metavar="ARG")
    parser.add_argument("--fake", action="store_true", help="no GPU: try out the script itself")
    asked = parser.parse_args(argv)
    if asked.rows:
        legal = {f"{weights}+{process}": (weights, process) for weights, process in ROWS}
        wrong = [row for row in asked.rows.split(",") if row not in legal]
        if wrong:
            parser.error(f"no row {', '.join(wrong)}; there are: {', '.join(legal)}")
        asked.rows = tuple(legal[row] for row in asked.rows.split(","))
    else:
        asked.rows = ROWS
    return asked


def engine_environment(gpu: int) -> dict[str, str]:
    return {
        **os.environ,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi counts
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # reproducible, as PyTorch's documentation asks
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def proof_engine(asked: argparse.Namespace, work: Path, fake: Path | None) -> Engine:
    script = Path(__file__).with_name("engine.py")
    uds = work / "proof.sock"
    python = sys.executable if fake else asked.python
    argv = [python, str(script), "--uds", str(uds), "--gib", str(asked.gib)]
    argv += ["--cache-gib", str(asked.cache_gib), *(["--fake", str(fake)] if fake else [])]
    client = Client(uds, "proof")
    return Engine(argv, engine_environment(asked.gpu), client, work / "proof.log", STARTUP_SECS)


def vllm_engine(asked: argparse.Namespace, work: Path) -> Engine:
    uds = work / "vllm.sock"
    argv = [asked.vllm, "serve", asked.vllm_model, "--uds", str(uds), "--enable-sleep-mode"]
    argv += ["--served-model-name", "proof", *asked.vllm_arg]
    env = {**engine_environment(asked.gpu), **VLLM_ENV, "VLLM_RPC_BASE_PATH": str(work)}
    return Engine(argv, env, Client(uds, "proof"), work / "vllm.log", STARTUP_SECS)


def need_torch(python: str) -> str:
    """PyTorch's version, when it sees a GPU. Asked in a process of its own: no context in ours."""
    code = "import torch; assert torch.cuda.is_available(), 'sees no GPU'; print(torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise NotHere(f"PyTorch: {lines[-1] if lines else 'failed'}")
    return done.stdout.strip()


def deny_io_uring() -> None:
    """In vLLM's process before it starts: CRIU cannot dump the ring that libuv opens."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which no filter may be set
    launcher.deny_io_uring(libc)


def make_fake(work: Path) -> tuple[Path, str]:
    """A directory with the fake libcuda in it, and the library's path."""
    sys.path.insert(0, str(ROOT / "tests" / "fake_libcuda"))
    from fake_cuda import FakeCuda

    fake = FakeCuda(work / "cuda")
    return fake.directory, str(fake.library)


def probe_cuda(driver: DeviceCheckpointer, runner: asyncio.Runner) -> DeviceCheckpointer | str:
    try:
        runner.run(driver.suspend([], 60.0))
    except DriverError as error:
        return str(error)
    return driver


def run_engine(
    name: str, engine: Engine, asked: argparse.Namespace, parts: dict[str, object], rows: list[Row]
) -> None:
    """All rows on one engine; each is shown as soon as it is known."""
    bench = Bench(name=name, engine=engine, **parts)  # type: ignore[arg-type]
    try:
        try:
            started = bench.fresh()
            print(f"{name}: cold start {started:.1f} s", file=sys.stderr)
        except (ProofError, OSError) as error:
            why = f"the engine does not start: {error}"
            rows += [Row(name, w, p, outcome="failed", why=why) for w, p in asked.rows]
            return
        for weights, process in asked.rows:
            row = run_row(bench, weights, process)
            rows.append(row)
            print(f"{name}: {weights}+{process}: {row.outcome} {row.why}", file=sys.stderr)
    finally:
        engine.kill()


def attempt(make: type, *arguments: object) -> object:
    try:
        return make(*arguments)
    except NotHere as error:
        return str(error)


def unmeasured(name: str, why: str, asked: argparse.Namespace) -> list[Row]:
    return [Row(name, w, p, outcome="not measured", why=why) for w, p in asked.rows]


def measure(
    asked: argparse.Namespace, work: Path, stack: ExitStack
) -> tuple[list[Row], dict[str, str]]:
    facts = {"kernel": platform.release()}
    rows: list[Row] = []
    fake, library = make_fake(work) if asked.fake else (None, LIBRARY)
    name = "pretended" if fake else "PyTorch"
    try:
        memory = FakeMemory(fake) if fake else find_memory(asked.gpu)
        facts["GPU"] = memory.describe()
        facts["memory read by"] = memory.name
        if not fake:
            facts["PyTorch"] = need_torch(asked.python)
    except NotHere as error:
        facts["GPU"] = f"not measured: {error}"
        return unmeasured(name, str(error), asked), facts
    runner = stack.enter_context(asyncio.Runner())
    driver = (
        CudaCheckpointTool(asked.cuda_checkpoint) if asked.cuda_checkpoint else CudaDriver(library)
    )
    stack.callback(lambda: runner.run(driver.close()))
    freezer = attempt(Freezer)
    if isinstance(freezer, Freezer):
        stack.callback(freezer.close)
    parts: dict[str, object] = {
        "memory": memory,
        "baseline_mib": memory.used_mib(),
        "cuda": probe_cuda(driver, runner),
        "criu": attempt(Criu, asked.criu, asked.images or work / "images"),
        "freezer": freezer,
        "runner": runner,
    }
    facts["GPU MiB used by others"] = str(parts["baseline_mib"])
    run_engine(name, proof_engine(asked, work, fake), asked, parts, rows)
    if asked.fake:
        facts["note"] = "pretended engine and driver: no number here says anything about a GPU"
        return rows, facts
    if shutil.which(asked.vllm) is None:
        return rows + unmeasured("vLLM", f"{asked.vllm} is not installed", asked), facts
    if not asked.vllm_model:
        return rows + unmeasured("vLLM", "no --vllm-model was given", asked), facts
    try:
        facts["vLLM"] = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        facts["vLLM"] = asked.vllm
    parts |= {"preexec": deny_io_uring, "tolerance": VLLM_TOLERANCE}
    run_engine("vLLM", vllm_engine(asked, work), asked, parts, rows)
    return rows, facts


def main(argv: list[str] | None = None) -> int:
    asked = parse(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as directory, ExitStack() as stack:
        work = Path(directory)
        rows, facts = measure(asked, work, stack)
    print(report.table(rows))
    print()
    print(report.remarks(rows, facts))
    if asked.json:
        report.write_json(asked.json, rows, facts)
    return report.exit_status(rows)
