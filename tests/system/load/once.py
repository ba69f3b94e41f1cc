"""One request, checked in full; prints what became of it."""

from __future__ import annotations

import argparse
import asyncio
import json

import client


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--timeout", type=float, default=30)
    arguments = parser.parse_args()
    answer = asyncio.run(client.ask(arguments.model, arguments.prompt, timeout=arguments.timeout))
    print(json.dumps(answer.as_json()))


if __name__ == "__main__":
    main()
