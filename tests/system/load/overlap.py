"""alpha is restored up to its GPU memory while beta is still leaving the GPU; prints a JSON report.

    overlap.py order | short | leaves MOMENT | ends BLOW MOMENT… | gain COUNT

alpha is parked in an image, beta serves and is held where a test needs it. ``wrong`` says what was
not as it must be. MOMENT is a point of alpha's way back: "criu:before", "criu:inside", "criu:after"
(CRIU is held there, see criu-that-stops), "prepared" (it waits for its GPU) or "resuming" (its GPU
memory is coming back). BLOW is what comes then: "kill" or "restart" the supervisor, "stop" it all.
"""

# One scenario at a time, in a program of its own: blocking harms none.
# ruff: noqa: ASYNC240

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import client
import witness
from killed_at import ORDERS, litter
from vllm_standin import faults

FAULTS = "/var/tmp/gpu/beta.faults"
CUDA = pathlib.Path("/var/tmp/cuda")
IMAGE = pathlib.Path("/var/lib/llmux/checkpoints/alpha/images/manifest.json")
PREPARED = "alpha: restored ahead in"
REFUSED = "alpha is not restored ahead"


def journal(*arguments: str) -> str:
    command = ["journalctl", "--no-pager", "-o", "cat", "-u", witness.SUPERVISOR, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Words:
    """What the supervisor said since this was made."""

    def __init__(self) -> None:
        self._cursor = journal("-n", "0", "--show-cursor").partition("-- cursor: ")[2].strip()

    def __contains__(self, words: str) -> bool:
        return self.count(words) > 0

    def count(self, words: str) -> int:
        return journal(f"--after-cursor={self._cursor}").count(words)


async def until(what: str, look: Callable[[], Any]) -> None:
    await asyncio.to_thread(witness.until, what, look)


async def good(model: str, prompt: str) -> client.Answer:
    answer = await client.ask(model, prompt, stream=True)
    if not answer.ok:
        raise witness.WitnessError(f"{model}, {prompt}: {answer.error}")
    return answer


async def alpha_on_disk_beta_serves() -> None:
    for model in ("alpha", "beta"):
        await good(model, "before")
    # beta may answer while alpha's image is being written
    at_rest = {"alpha": "parked", "beta": "serving"}
    await until("alpha is on disk, beta serves", lambda: witness.states() == at_rest)


@contextmanager
def hung(call: str) -> Any:
    """A call of the fake driver stands still meanwhile."""
    fault = CUDA / "faults" / call
    fifo = pathlib.Path(f"{fault}.fifo")
    os.mkfifo(fifo)
    fault.write_text("hang\n")
    try:
        yield
    finally:
        fault.unlink()
        os.close(os.open(fifo, os.O_RDWR))
        fifo.unlink()


def cuda_calls(*calls: str) -> list[str]:
    lines = (CUDA / "log").read_text().splitlines()
    return [line for line in lines if line.split()[0] in calls]


def cuda_states(pids: set[int]) -> set[str]:
    found = (CUDA / "procs" / str(pid) for pid in pids)
    return {path.read_text().strip() for path in found if path.exists()}


# ---- what comes before what ---------------------------------------------------------------------


async def order() -> dict[str, object]:
    """beta stands in the driver on its way out: alpha's processes are there, its memory is not."""
    await alpha_on_disk_beta_serves()
    words, wrong = Words(), []
    beta = witness.scopes()["beta"]
    (CUDA / "log").write_text("")
    with hung("lock"):
        asking = asyncio.create_task(client.ask("alpha", "overlap", stream=True))
        await until("alpha is restored ahead", lambda: PREPARED in words)
        states, held, alpha = witness.states(), witness.held(), witness.scopes()["alpha"]
        if states != {"alpha": "parked", "beta": "parking"}:
            wrong.append(f"states meanwhile: {states}")
        if held.keys() != {"beta"} or "kv" not in held["beta"]:
            wrong.append(f"GPU memory meanwhile: {held}")
        if cuda_states(alpha) != {"2"}:
            wrong.append(f"alpha's CUDA states meanwhile: {cuda_states(alpha)}, not checkpointed")
    answer = await asking
    if not answer.ok:
        wrong.append(answer.error)
    calls = cuda_calls("lock", "checkpoint", "restore", "unlock")
    owners = [(call.split()[0], int(call.split()[1]) in beta) for call in calls]
    expected = [("lock", True), ("checkpoint", True), ("restore", False), ("unlock", False)]
    if owners != expected:
        wrong.append(f"calls of the driver: {calls}")
    if witness.scopes()["alpha"] != alpha:
        wrong.append("the engine that serves is not the one that was restored ahead")
    lines = ("Restoring alpha from checkpoint", "criu restore: success", PREPARED)
    told = {line: words.count(line) for line in lines}
    wrong += [f'"{line}" was said {count} times' for line, count in told.items() if count != 1]
    wrong += after(("alpha", "beta"))
    return {"wrong": wrong, "calls": calls}


def after(models: tuple[str, ...]) -> list[str]:
    held = witness.held()
    wrong = [] if held.keys() == {"alpha"} else [f"GPU memory at the end: {held}"]
    return wrong + witness.strays(models)


# ---- held while beta drains ---------------------------------------------------------------------


class Draining:
    """beta has a request that does not end, and alpha is at MOMENT of its way back."""

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self.words = Words()
        self.running: asyncio.Task[client.Answer]
        self.asking: asyncio.Task[client.Answer]

    async def begin(self) -> None:
        for name in ("order", "reached"):
            (ORDERS / name).unlink(missing_ok=True)
        if self.moment.startswith("criu:"):
            when = self.moment.removeprefix("criu:")
            (ORDERS / "order").write_text(f"restore {when} block\n")
        faults.order(FAULTS, hang=True)
        self.running = asyncio.create_task(client.ask("beta", "long", stream=True))
        await until("beta is busy", lambda: in_flight("beta") == 1)
        self.asking = asyncio.create_task(client.ask("alpha", "overlap", stream=True))
        if self.moment.startswith("criu:"):
            await until("criu is held", (ORDERS / "reached").exists)
            return
        words = REFUSED if self.moment == "refused" else PREPARED
        await until(words, lambda: words in self.words)
        assert witness.states() == {"alpha": "parked", "beta": "draining"}, witness.states()

    def go_on(self) -> None:
        faults.order(FAULTS)


def in_flight(model: str) -> int:
    status = subprocess.run(["llmux", "status", "--json"], capture_output=True, text=True)
    if status.returncode != 0:
        return -1
    return int(json.loads(status.stdout)["models"][model]["in_flight"])


def only_beta() -> bool:
    return witness.scopes().keys() == {"beta"} and not [x for x in litter() if "shm" not in x]


async def short() -> dict[str, object]:
    """beta may need the host memory: alpha is restored when beta has left."""
    await alpha_on_disk_beta_serves()
    draining = Draining("refused")
    await draining.begin()
    wrong = [] if only_beta() else [f"engines meanwhile: {witness.scopes()}"]
    draining.go_on()
    for task in (draining.running, draining.asking):
        answer = await task
        if not answer.ok:
            wrong.append(f"{answer.model}: {answer.error}")
    if draining.words.count("criu restore: success") != 1:
        wrong.append("not restored from the image")
    return {"wrong": wrong}


async def leaves(moment: str) -> dict[str, object]:
    """The only client of alpha leaves: nothing of alpha stays but its image."""
    await alpha_on_disk_beta_serves()
    wrong = []
    shm = witness.in_shm()
    image = IMAGE.read_bytes()
    draining = Draining(moment)
    await draining.begin()
    draining.asking.cancel()
    await until("only beta is there", only_beta)
    await until("beta serves", lambda: witness.states().get("beta") == "serving")
    if left := witness.in_shm() - shm:
        wrong.append(f"left in /dev/shm: {left}")
    if witness.held().keys() != {"beta"}:
        wrong.append(f"GPU memory: {witness.held()}")
    draining.go_on()
    answer = await draining.running
    if not answer.ok:
        wrong.append(f"the request that ran meanwhile: {answer.error}")
    if IMAGE.read_bytes() != image:
        wrong.append("the image was touched")
    again = Words()
    await good("alpha", "after")
    if again.count("criu restore: success") != 1:
        wrong.append("the image was not used afterwards")
    return {"wrong": wrong + after(("alpha", "beta"))}


async def ends(blow: str, moments: list[str]) -> dict[str, object]:
    wrong = []
    for moment in moments:
        await alpha_on_disk_beta_serves()
        problems = await (stop_all if blow == "stop" else end_supervisor)(blow, moment)
        wrong += [f"{blow} at {moment}: {problem}" for problem in problems]
    return {"wrong": wrong, "blows": len(moments)}


async def end_supervisor(blow: str, moment: str) -> list[str]:
    """The next one ends what was begun, and both clients get their answers."""
    wrong: list[str] = []
    if moment == "resuming":
        draining = await resuming(blow)
    else:
        draining = Draining(moment)
        await draining.begin()
        await strike(blow)
        draining.go_on()
    for task in (draining.running, draining.asking):
        answer = await task
        if not answer.ok:
            wrong.append(f"{answer.model}: {answer.error}")
    wrong += after(("alpha", "beta"))
    for model in ("alpha", "beta"):
        unload = ["llmux", "unload", model]
        await asyncio.to_thread(subprocess.run, unload, stdout=subprocess.PIPE, check=True)
    return wrong + [f"left: {name}" for name in litter()]


async def resuming(blow: str) -> Draining:
    draining = Draining("prepared")
    (CUDA / "log").write_text("")
    with hung("restore"):
        await draining.begin()
        draining.go_on()
        await until("alpha's GPU memory is coming back", lambda: cuda_calls("restore"))
        await strike(blow)
    return draining


async def strike(blow: str) -> None:
    supervisor = witness.main_pid(witness.SUPERVISOR)
    if blow == "kill":
        os.kill(supervisor, signal.SIGKILL)
    else:
        await asyncio.to_thread(
            subprocess.run, ["systemctl", "restart", witness.SUPERVISOR], check=True
        )
    await until(
        "another supervisor answers",
        lambda: witness.main_pid(witness.SUPERVISOR) not in (0, supervisor) and witness.states(),
    )


async def stop_all(_blow: str, moment: str) -> list[str]:
    draining = Draining(moment)
    await draining.begin()
    await asyncio.to_thread(subprocess.run, ["systemctl", "stop", "llmux.slice"], check=True)
    wrong = [f"left: {name}" for name in witness.scopes()]
    for task in (draining.running, draining.asking):
        task.cancel()
    draining.go_on()
    await asyncio.to_thread(subprocess.run, ["systemctl", "start", "llmux"], check=True)
    await good("alpha", "after")
    return wrong + after(("alpha", "beta"))


# ---- what it gains ------------------------------------------------------------------------------


async def gain(count: int) -> dict[str, object]:
    """Seconds from the request for alpha to its first token, beta leaving meanwhile."""
    wrong: list[str] = []
    seconds: list[float] = []
    words = Words()
    for _ in range(count):
        await alpha_on_disk_beta_serves()
        answer = await good("alpha", "gain")
        assert answer.first_token is not None
        seconds.append(answer.first_token - answer.started)
    return {
        "wrong": wrong,
        "ahead": words.count(PREPARED),
        "waited": words.count(REFUSED),
        "restored": words.count("criu restore: success"),
        "median_secs": round(statistics.median(seconds), 3),
        "secs": [round(value, 3) for value in seconds],
    }


def main(arguments: list[str]) -> dict[str, object]:
    match arguments:
        case ["order"]:
            return asyncio.run(order())
        case ["short"]:
            return asyncio.run(short())
        case ["leaves", moment]:
            return asyncio.run(leaves(moment))
        case ["ends", blow, *moments]:
            return asyncio.run(ends(blow, moments))
        case ["gain", count]:
            return asyncio.run(gain(int(count)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
