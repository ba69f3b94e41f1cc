"""``scripts/gpu-proof``: every way of parking that needs no supervisor, on a GPU, in a table."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from _gpu_proof import report, whole
from _gpu_proof.bench import Bench, Budget, Engine, OutOfBudgetError, environment
from _gpu_proof.carried import criu as criu_carry
from _gpu_proof.carried import vllm as vllm_carry
from _gpu_proof.client import ProofError
from _gpu_proof.evidence import Evidence
from _gpu_proof.matrix import ROWS, Row, run_row
from _gpu_proof.memory import Memory, PretendedMemory, find_memory
from llmux.drivers.criu.driver import Criu
from llmux.drivers.cuda.driver import LIBRARY, CudaDriver
from llmux.drivers.cuda.tool import CudaCheckpointTool
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.bare import BareUnits, find_cgroup
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.drivers.processes.run import run
from llmux.errors import DriverError, Unsupported
from llmux.ports import DeviceCheckpointer

ROOT = Path(__file__).resolve().parents[2]
GPU_NODES = "/dev/nvidia[0-9]*"
ENGINES = ("pytorch", "vllm", "none")
TORCH_SECS = 60.0
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
# What the proof's engine has besides its weights and cache, and the rows that it is measured with:
# each of these may be what a driver cannot checkpoint, so each has an engine of its own.
VARIANTS = {
    "nccl": "a single-rank NCCL communicator",
    "parent": "a parent process that only asked torch about GPUs (NVML)",
    "cuinit": "a parent process that called cuInit without a context",
}
VARIANT_ROWS = (("retain", "cuda_suspend"), ("retain", "checkpoint"))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-proof", description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0, help="weights of the PyTorch engine")
    parser.add_argument("--cache-gib", type=float, default=1.0, help="its KV cache")
    parser.add_argument("--gpu", type=int, default=0, help="index as nvidia-smi counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--rows", default="", help="only these: retain+freeze,discard+checkpoint")
    parser.add_argument(
        "--images", type=Path, help="directory for CRIU images (default: temporary)"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECS", help="end after that long; best rows come first"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep logs, maps, open files and results there"
    )
    parser.add_argument(
        "--carry", type=Path, metavar="DIR", help="collect CRIU for a host without network, and end"
    )
    parser.add_argument(
        "--vllm-carry", type=Path, metavar="DIR", help="collect vLLM for such a host, and end"
    )
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help="engines with something more; '' for none"
    )
    parser.add_argument(
        "--engines", default="pytorch,vllm", help=f"only these: {', '.join(ENGINES)}"
    )
    parser.add_argument("--criu", default="criu")
    parser.add_argument("--cuda-checkpoint", metavar="PATH", help="the tool in place of libcuda")
    parser.add_argument("--python", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--vllm-model", metavar="DIR", help="measure vLLM too, with this model")
    parser.add_argument("--vllm", default="vllm", metavar="COMMAND")
    parser.add_argument("--vllm-arg", action="append", default=[], metavar="ARG")
    parser.add_argument(
        "--serve", type=int, default=0, metavar="N", help="N switches of a whole llmux on vLLM, too"
    )
    parser.add_argument("--fake", action="store_true", help="no GPU: try out the script itself")
    asked = parser.parse_args(argv)
    asked.engines = tuple(asked.engines.split(","))
    if wrong := [engine for engine in asked.engines if engine not in ENGINES]:
        parser.error(f"no engine {', '.join(wrong)}; there are: {', '.join(ENGINES)}")
    if asked.rows:
        legal = {f"{weights}+{process}": (weights, process) for weights, process in ROWS}
        wrong = [row for row in asked.rows.split(",") if row not in legal]
        if wrong:
            parser.error(f"no row {', '.join(wrong)}; there are: {', '.join(legal)}")
        asked.rows = tuple(legal[row] for row in asked.rows.split(","))
    else:
        asked.rows = ROWS
    return asked


def proof_engine(
    asked: argparse.Namespace, work: Path, units: BareUnits, fake: Path | None, extra: str
) -> Engine:
    script = Path(__file__).with_name("engine.py")
    python = sys.executable if fake else asked.python
    argv = [shutil.which(python) or python, str(script), "--gib", str(asked.gib)]
    argv += ["--cache-gib", str(asked.cache_gib), *(["--fake", str(fake)] if fake else [])]
    argv += ["--with", extra] if extra else []
    return Engine(argv, environment(asked.gpu), work, units, f"proof{extra}")


def vllm_engine(asked: argparse.Namespace, work: Path, units: BareUnits) -> Engine:
    program = shutil.which(asked.vllm) or asked.vllm
    argv = [program, "serve", asked.vllm_model, "--enable-sleep-mode"]
    argv += ["--served-model-name", "proof", *asked.vllm_arg]
    env = {**environment(asked.gpu), **VLLM_ENV, "VLLM_RPC_BASE_PATH": str(work)}
    return Engine(argv, env, work, units, "vllm")


async def need_torch(python: str) -> str:
    """PyTorch's version, when it sees a GPU. Asked in a process of its own: no context in ours."""
    code = "import torch; assert torch.cuda.is_available(), 'sees no GPU'; print(torch.__version__)"
    done = await run([python, "-c", code], TORCH_SECS)
    if done.code != 0:
        raise Unsupported("use", "PyTorch", done.excerpt or f"status {done.code}")
    return done.stdout.strip()


def make_fake(work: Path) -> tuple[Path, str]:
    """A directory with the fake libcuda in it, and the library's path."""
    sys.path.insert(0, str(ROOT / "tests" / "fake_libcuda"))
    from fake_cuda import FakeCuda

    fake = FakeCuda(work / "cuda")
    return fake.directory, str(fake.library)


class Proof:
    """One run: the rows so far, shown and kept as soon as they are known."""

    def __init__(self, asked: argparse.Namespace, work: Path) -> None:
        self._asked = asked
        self._work = work
        self._images = asked.images or work / "images"
        self._budget = Budget(asked.budget)
        self._evidence = Evidence(asked.out)
        self.rows: list[Row] = []
        self.turns: list[whole.Turn] = []
        self.whole_problem = ""
        self.facts: dict[str, str] = {"kernel": platform.release()}

    async def measure(self) -> None:
        fake, library = make_fake(self._work) if self._asked.fake else (None, LIBRARY)
        name = "pretended" if fake else "PyTorch"
        memory: Memory
        try:
            memory = PretendedMemory(fake) if fake else await find_memory(self._asked.gpu)
            self.facts["GPU"] = await memory.describe()
            self.facts["memory read by"] = memory.name
            if not fake:
                self.facts["PyTorch"] = await need_torch(self._asked.python)
        except DriverError as error:
            why = str(error) if glob(GPU_NODES) else f"no GPU: {error}"
            self.facts.setdefault("GPU", f"not measured: {why}")
            self._unmeasured(name, why, self._asked.rows)
            return
        tool = self._asked.cuda_checkpoint
        driver = CudaCheckpointTool(tool) if tool else CudaDriver(library)
        try:
            await self._engines(name, fake, memory, driver)
        finally:
            await driver.close()

    async def _engines(
        self, name: str, fake: Path | None, memory: Memory, driver: DeviceCheckpointer
    ) -> None:
        place = find_cgroup()
        units = BareUnits(place)
        store = ImageStore(str(self._images))
        root = place[0] if place else "/sys/fs/cgroup"
        criu = Criu(units, store, str(self._images), criu_path=self._asked.criu, cgroup_root=root)
        freezer = CgroupFreezer(root)
        baseline = await memory.used_mib()
        self.facts["GPU MiB used by others"] = str(baseline)

        def bench(name: str, engine: Engine, tolerance: float = 0.0) -> Bench:
            return Bench(
                name, engine, memory, baseline, driver, criu, store, freezer, self._budget,
                self._evidence, self._images, tolerance, fake is not None,
            )  # fmt: skip

        if fake:
            note = "pretended engine and driver: no number here says anything about a GPU"
            self.facts["note"] = note
        if "pytorch" in self._asked.engines:
            extras = [] if fake else list(filter(None, self._asked.variants.split(",")))
            for extra in ["", *extras]:
                engine = proof_engine(self._asked, self._work, units, fake, extra)
                rows = VARIANT_ROWS if extra else self._asked.rows
                await self._run(bench(f"{name} with {extra}" if extra else name, engine), rows)
        if "vllm" in self._asked.engines and not fake:
            await self._vllm(units, bench)
        if self._asked.serve:
            await self._whole(fake, criu)
        await freezer.close()

    async def _vllm(self, units: BareUnits, bench: Callable[[str, Engine, float], Bench]) -> None:
        asked = self._asked
        if shutil.which(asked.vllm) is None:
            self._unmeasured("vLLM", f"{asked.vllm} is not installed", asked.rows)
        elif not asked.vllm_model:
            self._unmeasured("vLLM", "no --vllm-model was given", asked.rows)
        else:
            try:
                self.facts["vLLM"] = importlib.metadata.version("vllm")
            except importlib.metadata.PackageNotFoundError:
                self.facts["vLLM"] = asked.vllm
            engine = vllm_engine(asked, self._work, units)
            await self._run(bench("vLLM", engine, VLLM_TOLERANCE), asked.rows)

    async def _whole(self, fake: Path | None, criu: Criu) -> None:
        asked, images = self._asked, self._images / "whole"
        if fake:
            place = whole.pretended(self._work, images, asked.criu, fake)
        elif asked.vllm_model and (vllm := shutil.which(asked.vllm)):
            args = tuple(asked.vllm_arg)
            place = whole.Place(self._work, images, vllm, asked.vllm_model, args, asked.criu)
        else:
            self.whole_problem = "not measured: it needs --vllm and --vllm-model"
            return
        try:
            await criu.require("imaged")
        except Unsupported as error:
            self.whole_problem = f"not measured: discard+checkpoint: {error}"
            kept = {name: way for name, way in whole.EVICTIONS.items() if name != "imaged"}
            place = replace(place, evictions=kept)
        run = whole.Whole(place, self._work / "llmux.log")
        try:
            await run.run(asked.serve, self._say, self._budget.limit(whole.LIMIT_SECS))
        except OutOfBudgetError as error:
            self.whole_problem = f"not measured: {error}"
        except (ProofError, TimeoutError, OSError) as error:
            self.whole_problem = f"failed: {str(error) or 'the time was up'}"
        finally:
            self.turns = run.turns
            self._evidence.results(self.document())
            self._evidence.keep_logs("whole", [self._work])

    async def _run(self, bench: Bench, rows: Sequence[tuple[str, str]]) -> None:
        try:
            try:
                started = await bench.ensure_running()
                self._say(f"{bench.name}: cold start {started:.1f} s")
            except OutOfBudgetError as error:
                self._unmeasured(bench.name, str(error), rows)
                return
            except (ProofError, DriverError, TimeoutError, OSError) as error:
                why = f"the engine does not start: {str(error) or 'not healthy in time'}"
                self._add([Row(bench.name, w, p, outcome="failed", why=why) for w, p in rows])
                return
            for weights, process in rows:
                row = await run_row(bench, weights, process)
                self._evidence.keep_logs(f"{bench.name}-{row.name}", [bench.images])
                self._add([row])
                self._say(f"{bench.name}: {row.name}: {row.outcome} {row.why}")
        finally:
            await bench.engine.kill()
            self._evidence.keep_logs(bench.name, [self._work])

    def _unmeasured(self, name: str, why: str, rows: Sequence[tuple[str, str]]) -> None:
        self._add([Row(name, w, p, outcome="not measured", why=why) for w, p in rows])

    def _add(self, rows: list[Row]) -> None:
        self.rows += rows
        self._evidence.results(self.document())

    def document(self) -> dict[str, Any]:
        measured = report.document(self.rows, self.facts)
        if self._asked.serve:
            measured["whole"] = whole.document(self.turns, self.whole_problem)
        return measured

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    asked = parse(sys.argv[1:] if argv is None else argv)
    if asked.carry is not None:
        return criu_carry.collect(asked.carry)
    if asked.vllm_carry is not None:
        return vllm_carry.collect(asked.vllm_carry)
    # Not below a directory of others: an image is trusted by who owns the path to it.
    with tempfile.TemporaryDirectory(prefix="gpu-proof-", dir=_work_parent()) as directory:
        proof = Proof(asked, Path(directory))
        asyncio.run(proof.measure())
    print(report.table(proof.rows))
    print()
    print(report.remarks(proof.rows, proof.facts))
    if proof.turns or proof.whole_problem:
        print(f"\n{whole.table(proof.turns)}")
        print(proof.whole_problem or "a whole llmux: every answer as before")
    if asked.json:
        asked.json.write_text(json.dumps(proof.document(), indent=2) + "\n")
    if proof.whole_problem.startswith("failed"):
        return 1
    if proof.turns and not proof.rows:
        return 0
    return report.exit_status(proof.rows)


def _work_parent() -> str:
    """/var/tmp rather than /tmp, which may be a tmpfs: images take gigabytes."""
    return os.environ.get("TMPDIR", "/var/tmp")  # the directory below it is private
