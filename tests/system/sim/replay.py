"""Send the requests of a trace when it says, and print how long each waited for its model and
what ``watch_ledger.py`` saw of the GPUs meanwhile.

replay.py TRACE.json          [[seconds, model, tokens], …]
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "load"))

import client


async def main(trace: list[tuple[float, str, int]]) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    began = loop.time() + 0.5

    async def one(number: int, at: float, model: str, tokens: int) -> client.Answer:
        await asyncio.sleep(began + at - loop.time())
        return await client.ask(model, f"question {number}", tokens=tokens, timeout=600)

    answers = await asyncio.gather(*(one(n, *row) for n, row in enumerate(trace)))
    wrong = [f"{a.model} {a.status}: {a.error}" for a in answers if not a.ok]
    return {"waits": [a.wait_ms / 1000 for a in answers], "wrong": wrong}


watcher = subprocess.Popen(
    [sys.executable, str(pathlib.Path(__file__).with_name("watch_ledger.py"))],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
)
report = asyncio.run(main(json.loads(pathlib.Path(sys.argv[1]).read_text())))
seen, _ = watcher.communicate(b"", timeout=60)
print(json.dumps(report | {"ledger": json.loads(seen)}))
