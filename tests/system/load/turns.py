"""Alternating requests to two models, each a switch; prints a JSON report.

After each answer the ledger must hold the memory of the model that answered and, of the other one,
nothing but the context that its way of parking leaves there.
"""

from __future__ import annotations

import argparse
import asyncio
import json

import client
import witness

MODELS = ("alpha", "beta")


def memory_is_wrong(active: str, others_keep: frozenset[str]) -> str:
    """What is held by models that do not serve, or not held by the one that does."""
    held = witness.held()
    if not {"weights", "kv"} <= held.get(active, {}).keys():
        return f"{active} answers without its memory: {held}"
    for model, kinds in held.items():
        if model != active and not kinds.keys() <= others_keep:
            return f"{model} still holds {kinds} while {active} serves"
    return ""


async def take_turns(count: int, residue: frozenset[str]) -> dict[str, object]:
    wrong = []
    answers = []
    for at in range(count):
        model = MODELS[at % 2]
        # plain, plain, streamed, streamed: both kinds on both models
        answer = await client.ask(model, f"turn {at}", stream=at % 4 >= 2)
        answers.append(answer)
        if not answer.ok:
            wrong.append(f"turn {at} ({model}): {answer.error}")
        elif problem := memory_is_wrong(model, residue):
            wrong.append(f"turn {at}: {problem}")
    seconds = sorted(answer.seconds for answer in answers[2:])  # the first two start cold
    return {
        "answers": len(answers),
        "streams": sum(answer.stream for answer in answers),
        "wrong": wrong,
        "median_ms": round(seconds[len(seconds) // 2] * 1000, 1),
        "worst_ms": round(seconds[-1] * 1000, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--residue", nargs="*", default=["context"])
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(take_turns(arguments.count, frozenset(arguments.residue)))))


if __name__ == "__main__":
    main()
