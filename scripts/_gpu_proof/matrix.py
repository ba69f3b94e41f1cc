"""The rows of the parking matrix, each from a healthy engine to a healthy engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

from _gpu_proof.bench import STEP_SECS, Bench, OutOfBudgetError
from _gpu_proof.client import ProofError, same
from llmux.errors import DriverError, Unsupported

LEVELS = {"retain": 0, "offload": 1, "discard": 2}
# Most informative first: a budget may end the list anywhere. retain+keep_running parks nothing;
# what the weights axis did does not matter once it is stopped.
ROWS = (
    ("retain", "cuda_suspend"),
    ("discard", "checkpoint"),
    ("retain", "checkpoint"),
    ("offload", "checkpoint"),
    ("discard", "cuda_suspend"),
    ("offload", "cuda_suspend"),
    ("retain", "freeze"),
    ("discard", "freeze"),
    ("offload", "freeze"),
    ("discard", "keep_running"),
    ("offload", "keep_running"),
    ("retain", "stop"),
)
# Of what was used: "~97 % freed" by sleep, and the small models here have more share.
RESIDUE = 0.10
SLEEPING_MIB = 1400  # a sleeping engine keeps its CUDA context (0.5 to 1.3 GiB)
SUSPENDED_MIB = 64  # a suspended one must keep nothing


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

    @property
    def name(self) -> str:
        return f"{self.weights}+{self.process}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


async def run_row(bench: Bench, weights: str, process: str) -> Row:
    row = Row(bench.name, weights, process)
    try:
        if process == "checkpoint":
            await bench.require_checkpoint()
    except Unsupported as error:
        row.outcome, row.why = "not measured", str(error)
        return row
    try:
        await bench.ensure_running()
        await _measure(bench, row)
        return row
    except (OutOfBudgetError, Unsupported) as error:
        row.outcome, row.why = "not measured", str(error)
    except TimeoutError:
        if bench.budget.used_up:
            row.outcome, row.why = "not measured", str(bench.budget.over())
        else:
            row.outcome, row.why = "failed", f"a step was not done within its {STEP_SECS:g} s"
    except (ProofError, DriverError, RuntimeError, OSError) as error:
        row.outcome, row.why = "failed", str(error)
    await bench.note(f"{row.name}-{row.outcome.replace(' ', '-')}")
    await bench.engine.kill()
    return row


async def _measure(bench: Bench, row: Row) -> None:
    row.before_mib = await bench.memory.used_mib()
    await bench.note(f"{row.name}-before")
    begun = time.monotonic()
    async with asyncio.timeout(bench.budget.limit(3 * STEP_SECS)):
        await _park(bench, row)
    row.park_s = time.monotonic() - begun
    row.parked_mib = await bench.memory.used_mib()
    await bench.note(f"{row.name}-parked")
    begun = time.monotonic()
    async with asyncio.timeout(bench.budget.limit(3 * STEP_SECS)):
        await _wake(bench, row)
        answers = await bench.answers()
    row.wake_s = time.monotonic() - begun
    row.woken_mib = await bench.memory.used_mib()
    await bench.note(f"{row.name}-woken")
    row.equal = same(answers, bench.reference, bench.tolerance)
    await _judge(bench, row)


async def _park(bench: Bench, row: Row) -> None:
    level = LEVELS[row.weights]
    if level and row.process != "stop":
        await asyncio.to_thread(bench.engine.client.sleep, level)
    if row.process == "freeze":
        await bench.freeze()
    elif row.process in ("cuda_suspend", "checkpoint"):
        await bench.suspend()
    elif row.process == "stop":
        await bench.engine.kill()
    if row.process == "checkpoint":
        row.image_bytes = await bench.dump()


async def _wake(bench: Bench, row: Row) -> None:
    if row.process == "stop":
        await bench.ensure_running()
        return
    if row.process == "freeze":
        await bench.thaw()
    if row.process == "checkpoint":
        await bench.restore()
    if row.process in ("cuda_suspend", "checkpoint"):
        await bench.resume()
    await bench.engine.wait_healthy()
    if level := LEVELS[row.weights]:
        await asyncio.to_thread(bench.engine.client.wake, level)


async def _judge(bench: Bench, row: Row) -> None:
    """An unequal answer or memory that was not freed fails the row."""
    problems = []
    if not row.equal:
        problems.append("the answer after the wake differs")
    frees = row.process in ("cuda_suspend", "checkpoint", "stop") or row.weights != "retain"
    assert row.before_mib is not None
    assert row.parked_mib is not None
    used = row.before_mib - bench.baseline_mib
    left = row.parked_mib - bench.baseline_mib
    allowed: float = SUSPENDED_MIB
    if row.process in ("keep_running", "freeze"):
        allowed = max(SLEEPING_MIB, RESIDUE * used)
    if frees and left > allowed:
        problems.append(f"{left} of {used} MiB were not freed")
    if problems:
        row.outcome, row.why = "failed", "; ".join(problems)
        await bench.engine.kill()
