"""Kill the supervisor in the middle of one operation on model alpha; prints a JSON report.

The stand-in is told to be slow or deaf, so that the operation is sure to be under way. What counts
is the end: the request that caused the operation is answered, alpha is where the operation was to
bring it, its processes are the ones it had (or none), and the GPU is not held by two.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
from time import monotonic

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import client
import witness
from vllm_standin import faults

FAULTS = "/var/tmp/gpu/alpha.faults"

# moment → (models made resident before, who is asked for then, state of alpha that is waited for,
# states it may be in at the end, whether it keeps its processes)
MOMENTS = {
    "starting": ((), "alpha", "starting", ("serving",), True),
    "parking": (("alpha",), "beta", "parking", ("parked",), True),
    "freezing": (("alpha",), "beta", "parking", ("parked",), True),
    "waking": (("alpha", "beta"), "alpha", "waking", ("serving",), True),
    "ending": (("alpha",), "beta", "parking", ("stopped",), False),
    "stopping": (("alpha", "beta"), None, "stopping", ("stopped",), False),
}


def order(model: str | None) -> asyncio.Task[str]:
    """What causes the operation; the task's result is what went wrong with it."""

    async def request(name: str) -> str:
        answer = await client.ask(name, "cause", stream=True)
        return answer.error

    async def unload() -> str:
        # its connection to the supervisor is cut: only the order counts, not the answer
        await asyncio.to_thread(
            subprocess.run, ["llmux", "unload", "alpha"], capture_output=True, check=False
        )
        return ""

    return asyncio.create_task(request(model) if model else unload())


async def run(moment: str, orders: dict[str, object]) -> dict[str, object]:
    before, cause, state, ends, keeps = MOMENTS[moment]
    wrong = []
    for model in before:
        answer = await client.ask(model, "before")
        if not answer.ok:
            raise witness.WitnessError(f"cannot begin: {answer.error}")
    faults.order(FAULTS, **orders)
    caused = order(cause)

    def under_way() -> bool:
        return witness.states().get("alpha") == state and witness.engine_runs("alpha")

    await asyncio.to_thread(witness.until, f"alpha is {state}", under_way)
    engines = witness.scopes()["alpha"]
    supervisor = witness.main_pid(witness.SUPERVISOR)
    os.kill(supervisor, signal.SIGKILL)
    killed = monotonic()
    if error := await caused:
        wrong.append(f"the request that caused it: {error}")

    def at_rest() -> bool:
        return witness.states().get("alpha") in ends

    await asyncio.to_thread(witness.until, f"alpha is {' or '.join(ends)}", at_rest)
    settled = monotonic() - killed
    after = witness.scopes().get("alpha", set())
    if keeps and not engines <= after:
        wrong.append(f"engine processes {sorted(engines)} became {sorted(after)}")
    if not keeps and after:
        wrong.append(f"processes left: {sorted(after)}")
    if moment == "freezing" and not witness.frozen("alpha"):
        wrong.append("alpha is parked but not frozen")
    if witness.main_pid(witness.SUPERVISOR) in (0, supervisor):
        wrong.append("the supervisor was not started anew")
    wrong += witness.strays(("alpha", "beta"))
    faults.order(FAULTS)
    for model in ("alpha", "beta", "alpha"):  # and it all goes on
        answer = await client.ask(model, "after", stream=True)
        if not answer.ok:
            wrong.append(f"afterwards, {model}: {answer.error}")
    held = witness.held()
    if not held.get("beta", {}).keys() <= {"context"} or "kv" not in held.get("alpha", {}):
        wrong.append(f"GPU memory at the end: {held}")
    return {"wrong": wrong, "settled_secs": round(settled, 3)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], json.loads(sys.argv[2])))))
