"""The rows of the parking matrix, each from a healthy engine to a healthy engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _gpu_proof.client import Engine, ProofError, same
from _gpu_proof.host import Criu, FakeMemory, Freezer, NotHere, Nvml, Smi, nvidia_leftovers
from llmux.errors import DriverError
from llmux.ports import DeviceCheckpointer

LEVELS = {"retain": 0, "offload": 1, "discard": 2}
WAYS = ("keep_running", "freeze", "cuda_suspend", "checkpoint")
# retain+keep_running parks nothing; what the weights axis did does not matter once it is stopped.
ROWS = (
    *((w, p) for p in WAYS for w in LEVELS if (w, p) != ("retain", "keep_running")),
    ("retain", "stop"),
)
CUDA_SECS = 600.0
RESIDUE = (
    0.10  # of what was used: "~97 % freed" by sleep, and the small models here have more share
)


@dataclass
class Row:
    """One line of the table; None is "not measured", and ``why`` says why."""

    engine: str
    weights: str
    process: str
    park_s: float | None = None
    wake_s: float | None = None
    before_mib: int | None = None
    parked_mib: int | None = None
    woken_mib: int | None = None
    equal: bool | None = None
    image_bytes: int | None = None
    outcome: str = "ok"  # ok, failed, not measured
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Bench:
    """What all rows share. ``cuda``, ``criu`` and ``freezer`` are reasons (str) where not here."""

    name: str
    engine: Engine
    memory: Nvml | Smi | FakeMemory
    baseline_mib: int
    cuda: DeviceCheckpointer | str
    criu: Criu | str
    freezer: Freezer | str
    runner: asyncio.Runner
    preexec: Callable[[], None] | None = None
    tolerance: float = 0.0
    reference: list[Any] = field(default_factory=list)
    image: Path | None = None
    cuda_pids: list[int] = field(default_factory=list)

    def fresh(self) -> float | None:
        """A healthy engine; the seconds of its start when it had to be started."""
        if self.engine.running:
            return None
        taken = self.engine.start(self.preexec)
        answers = self.engine.client.answers()
        if self.reference and not same(answers, self.reference, self.tolerance):
            raise ProofError("two cold starts do not answer the same: nothing can be compared")
        # Asked twice: the second answer comes from the prefix cache, as those after a wake will.
        self.reference = self.engine.client.answers()
        if not same(answers, self.reference, self.tolerance):
            raise ProofError("two greedy answers in a row differ: nothing can be compared")
        return taken


def run_row(bench: Bench, weights: str, process: str) -> Row:
    row = Row(bench.name, weights, process)
    missing = _missing(bench, process)
    if missing:
        row.outcome, row.why = "not measured", missing
        return row
    try:
        bench.fresh()
        _measure(bench, row)
    except NotHere as error:
        row.outcome, row.why = "not measured", str(error)
        bench.engine.kill()
    except (ProofError, DriverError, RuntimeError, OSError) as error:
        row.outcome, row.why = "failed", str(error)
        bench.engine.kill()
    return row


def _missing(bench: Bench, process: str) -> str:
    needs = {
        "freeze": [bench.freezer],
        "cuda_suspend": [bench.cuda],
        "checkpoint": [bench.cuda, bench.criu],
    }
    return "; ".join(need for need in needs.get(process, []) if isinstance(need, str))


def _measure(bench: Bench, row: Row) -> None:
    level = LEVELS[row.weights]
    client = bench.engine.client
    row.before_mib = bench.memory.used_mib()
    begun = time.monotonic()
    if level and row.process != "stop":
        client.sleep(level)
    _park(bench, row)
    row.park_s = time.monotonic() - begun
    row.parked_mib = bench.memory.used_mib()
    begun = time.monotonic()
    _unpark(bench, row)
    if level and row.process != "stop":
        client.wake(level)
    answers = client.answers()
    row.wake_s = time.monotonic() - begun
    row.woken_mib = bench.memory.used_mib()
    row.equal = same(answers, bench.reference, bench.tolerance)
    _judge(bench, row)


def _park(bench: Bench, row: Row) -> None:
    engine = bench.engine
    if row.process == "freeze":
        assert isinstance(bench.freezer, Freezer)
        # Now and not at the start: a restored tree is born in our own cgroup, not in this one.
        bench.freezer.take(engine.tree())
        bench.freezer.set(True)
    elif row.process in ("cuda_suspend", "checkpoint"):
        assert not isinstance(bench.cuda, str)
        if not isinstance(bench.memory, FakeMemory):  # what is pretended takes no host memory
            used = max(0, bench.memory.used_mib() - bench.baseline_mib) << 20
            bench.runner.run(bench.cuda.check_memory(engine.tree(), used))
        suspended = bench.runner.run(bench.cuda.suspend(engine.tree(), CUDA_SECS))
        bench.cuda_pids = list(suspended)
        if not bench.cuda_pids:
            raise ProofError("no process of the engine has CUDA state")
    elif row.process == "stop":
        engine.kill()
    if row.process == "checkpoint":
        _dump(bench, row)


def _dump(bench: Bench, row: Row) -> None:
    assert isinstance(bench.criu, Criu)
    engine = bench.engine
    left = nvidia_leftovers(engine.tree())
    if left:
        raise ProofError(f"still open after the CUDA checkpoint: {', '.join(left[:4])}")
    bench.image, row.image_bytes = bench.criu.dump(engine.pid, f"{row.engine}-{row.weights}")
    engine.reap()


def _unpark(bench: Bench, row: Row) -> None:
    engine = bench.engine
    if row.process == "freeze":
        assert isinstance(bench.freezer, Freezer)
        bench.freezer.set(False)
    elif row.process == "stop":
        bench.fresh()
        return
    if row.process == "checkpoint":
        assert isinstance(bench.criu, Criu)
        assert bench.image is not None
        engine.client.uds.unlink(missing_ok=True)
        engine.adopt(bench.criu.restore(bench.image))
    if row.process in ("cuda_suspend", "checkpoint"):
        assert not isinstance(bench.cuda, str)
        bench.runner.run(bench.cuda.resume(bench.cuda_pids, CUDA_SECS))
    engine.client.wait_healthy(60.0, engine.ended)


def _judge(bench: Bench, row: Row) -> None:
    """An unequal answer or memory that stayed where it should have gone fails the row."""
    problems = []
    if not row.equal:
        problems.append("the answer after the wake differs")
    frees = row.process in ("cuda_suspend", "checkpoint", "stop") or row.weights != "retain"
    assert row.before_mib is not None
    assert row.parked_mib is not None
    used = row.before_mib - bench.baseline_mib
    left = row.parked_mib - bench.baseline_mib
    # A sleeping engine keeps its CUDA context (0.5 to 1.3 GiB); a suspended one must keep nothing.
    spare = 1400 if row.process in ("keep_running", "freeze") else 64
    if frees and left > max(spare, RESIDUE * used if spare > 64 else 0):
        problems.append(f"{left} of {used} MiB were not freed")
    if problems:
        row.outcome, row.why = "failed", "; ".join(problems)
        bench.engine.kill()
