"""beta comes up while alpha's image is being written; prints a JSON report.

    kills/behind.py serves | fails | unload | ends

alpha serves and leaves for beta; its CUDA state is in host memory and CRIU is held before it begins
(criu-that-stops). ``wrong`` says what was not as it must be then: the image is made, or CRIU is
killed, or alpha is to be stopped, or the supervisor is killed.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import witness
from killed_at import ORDERS, litter
from overlap import Words, good, strike, until

RESTORED = "criu restore: success"


async def writing(when: str, how: str) -> list[str]:
    """beta has answered, and alpha's image is not there yet."""
    wrong = []
    await good("alpha", "before")
    for name in ("order", "reached"):
        (ORDERS / name).unlink(missing_ok=True)
    (ORDERS / "order").write_text(f"dump {when} {how}\n")
    answering = asyncio.create_task(good("beta", "while alpha's image is written"))
    await until("criu is held", (ORDERS / "reached").exists)
    await answering
    if how == "block":
        if (states := witness.states()) != {"alpha": "parking", "beta": "serving"}:
            wrong.append(f"states meanwhile: {states}")
        if witness.scopes().keys() != {"alpha", "beta"}:
            wrong.append(f"engines meanwhile: {witness.scopes()}")
    if (held := witness.held()).keys() != {"beta"}:
        wrong.append(f"GPU memory meanwhile: {held}")
    return wrong


def go_on() -> None:
    (ORDERS / "go").write_text("\n")


async def becomes(state: str) -> None:
    await until(f"alpha is {state}", lambda: witness.states().get("alpha") == state)


async def answers_again(restored: int) -> list[str]:
    """alpha takes its turn once more; how often it was restored since it left."""
    words = Words()
    await good("alpha", "after")
    wrong = [] if words.count(RESTORED) == restored else ["not by the way that is left"]
    if (held := witness.held()).keys() != {"alpha"}:
        wrong.append(f"GPU memory at the end: {held}")
    return wrong + witness.strays(("alpha", "beta"))


async def serves() -> list[str]:
    wrong = await writing("before", "block")
    go_on()
    await becomes("parked")
    return wrong + await answers_again(restored=1)


async def fails() -> list[str]:
    """A killed CRIU breaks the engine, which is ended without its GPU and without harm to beta."""
    wrong = await writing("inside", "kill")
    await becomes("stopped")
    if witness.states()["beta"] != "serving":
        wrong.append("beta does not serve any more")
    return wrong + await answers_again(restored=0)


async def unload() -> list[str]:
    wrong = await writing("before", "block")
    asking = await asyncio.create_subprocess_exec(
        "llmux", "unload", "alpha", stdout=subprocess.DEVNULL
    )
    go_on()
    if await asking.wait() != 0:
        wrong.append("llmux unload failed")
    if (scopes := witness.scopes().keys()) != {"beta"}:
        wrong.append(f"engines after it: {scopes}")
    return wrong + await answers_again(restored=1)


async def ends() -> list[str]:
    """The next supervisor ends alpha, whose CRIU may be anywhere, and keeps beta."""
    wrong = await writing("before", "block")
    beta = witness.scopes()["beta"]
    await strike("kill")  # the next one ends the held CRIU, too
    await until("only beta is there", lambda: witness.scopes().keys() == {"beta"})
    if witness.scopes()["beta"] != beta:
        wrong.append("beta was started again")
    wrong += await answers_again(restored=0)
    for model in ("alpha", "beta"):
        await asyncio.to_thread(subprocess.run, ["llmux", "unload", model], capture_output=True)
    return wrong + [f"left: {name}" for name in litter()]


SCENARIOS = {"serves": serves, "fails": fails, "unload": unload, "ends": ends}


def main(arguments: list[str]) -> dict[str, object]:
    if len(arguments) != 1 or arguments[0] not in SCENARIOS:
        sys.exit(__doc__)
    return {"wrong": asyncio.run(SCENARIOS[arguments[0]]())}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
