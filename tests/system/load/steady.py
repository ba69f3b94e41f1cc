"""Streams and short requests without a pause until told to end; prints what became of them.

    steady.py --port=8080 --streams=20 --rate=5 alpha beta …

Every stream that ends is followed by the next one; short requests are sent at a rate, whatever
becomes of those before. Ends when its standard input has and all that was sent is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections import Counter

import client


async def main(arguments: argparse.Namespace) -> dict[str, object]:
    answers: list[client.Answer] = []
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    began = loop.time()
    models = itertools.cycle(arguments.models)
    numbers = itertools.count()

    async def ask(*, stream: bool) -> None:
        tokens = arguments.tokens if stream else 4
        prompt = f"question {next(numbers)}"
        answers.append(
            await client.ask(
                next(models), prompt, stream=stream, tokens=tokens, port=arguments.port,
                timeout=arguments.timeout,
            )
        )  # fmt: skip

    def end() -> None:
        loop.remove_reader(sys.stdin)  # what has ended stays readable
        over.set()

    async def streams() -> None:
        while not over.is_set():
            await ask(stream=True)

    loop.add_reader(sys.stdin, end)
    async with asyncio.TaskGroup() as group:
        for _ in range(arguments.streams):
            group.create_task(streams())
        while not over.is_set():
            group.create_task(ask(stream=False))
            await asyncio.sleep(1 / arguments.rate)
    wrong = [answer for answer in answers if not answer.ok]
    kinds = Counter("stream" if answer.stream else "short" for answer in answers)
    return {
        **kinds,
        "seconds": round(loop.time() - began),
        "failed": len(wrong),
        "errors": [f"{answer.model} {answer.status}: {answer.error}" for answer in wrong[:5]],
        "longest_short_secs": round(
            max((answer.seconds for answer in answers if not answer.stream), default=0), 2
        ),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--timeout", type=float, default=240)
    print(json.dumps(asyncio.run(main(parser.parse_args()))))
