"""An OpenAI client that makes models take turns and checks every answer. Standard library only.

Run inside the guest as well: ``python3 client.py URL named|any TOKENS MODEL …``. For each turn a
stream is begun on the resident model; once its first token is there, the next model is asked for.
So every switch has to wait for a stream, and the stream has to come to its end.
"""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 300.0


@dataclass
class Result:
    model: str
    kind: str  # plain, stream
    waited_ms: float = 0.0
    first_token_s: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    text: str = ""
    switched_from: str = "-"
    phases: str = "-"
    problems: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        busy = self.seconds - self.first_token_s if self.kind == "stream" else self.seconds
        return self.tokens / busy if busy > 0 else 0.0


class Client:
    """``named``: answers of the engine begin with its model's name (the stand-in's do)."""

    def __init__(self, url: str, *, named: bool, tokens: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._named = named
        self._tokens = tokens

    def status(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=30)
        connection.request("GET", "/control/status")
        result: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return result

    def ask(self, model: str, *, stream: bool, first: threading.Event | None = None) -> Result:
        result = Result(model, "stream" if stream else "plain")
        body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": f"Say hello to {model}"}],
                "max_tokens": self._tokens,
                "temperature": 0,
                "stream": stream,
                "ignore_eos": True,
            }
        )
        began = time.monotonic()
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            result.waited_ms = float(response.headers.get("X-Llmux-Wait-Ms") or 0)
            if response.status != 200:
                text = response.read()[:400].decode(errors="replace")
                result.problems.append(f"status {response.status}: {text}")
            elif stream:
                self._read_stream(result, response, began, first)
            else:
                self._read_plain(result, json.loads(response.read()))
        except (OSError, http.client.HTTPException, ValueError) as error:
            result.problems.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()
            if first is not None:
                first.set()
        result.seconds = time.monotonic() - began
        if not stream:
            result.first_token_s = result.seconds
        if self._named and not result.text.startswith(f"{model}:"):
            result.problems.append(f"the answer is not {model}'s: {result.text[:40]!r}")
        return result

    def _read_plain(self, result: Result, answer: dict[str, Any]) -> None:
        result.text = answer["choices"][0]["message"]["content"] or ""
        result.tokens = answer["usage"]["completion_tokens"]
        self._check_name(result, answer)

    def _read_stream(
        self,
        result: Result,
        response: http.client.HTTPResponse,
        began: float,
        first: threading.Event | None,
    ) -> None:
        done = False
        for data in _events(response):
            if data == "[DONE]":
                done = True
                continue
            answer = json.loads(data)
            if "error" in answer:
                result.problems.append(f"error in the stream: {answer['error']}")
                return
            self._check_name(result, answer)
            for choice in answer["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and not result.tokens:
                    result.first_token_s = time.monotonic() - began
                    if first is not None:
                        first.set()
                result.text += piece
                result.tokens += bool(piece)
        if not done:
            result.problems.append("the stream ended without [DONE]")

    @staticmethod
    def _check_name(result: Result, answer: dict[str, Any]) -> None:
        if answer["model"] != result.model:
            result.problems.append(f"answered by {answer['model']!r}")


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        text = line.decode().strip()
        if text.startswith("data: "):
            yield text.removeprefix("data: ")


def take_turns(client: Client, turns: list[str]) -> list[Result]:
    """One plain request per turn; while it waits, a stream still runs on the model before it."""
    results = [_switching(client, turns[0])]
    for before, model in itertools.pairwise(turns):
        first = threading.Event()
        across: list[Result] = []
        thread = threading.Thread(
            target=lambda model=before, event=first, to=across: to.append(
                client.ask(model, stream=True, first=event)
            )
        )
        thread.start()
        first.wait(TIMEOUT)
        results.append(_switching(client, model))
        thread.join(TIMEOUT)
        results += across
        if not across:
            results.append(Result(before, "stream", problems=["the stream never ended"]))
    return results


def _switching(client: Client, model: str) -> Result:
    before = client.status()["active_model"]
    result = client.ask(model, stream=False)
    if before != model:
        result.switched_from = before or "nothing"
        switch = client.status()["models"][model].get("last_switch") or {}
        result.phases = ", ".join(
            f"{key.removesuffix('_secs')} {value:.3f}"
            for key, value in switch.items()
            if key in ("drain_secs", "park_secs", "wake_secs", "start_secs")
        )
    return result


def print_table(results: list[Result]) -> None:
    head = ("model", "kind", "waited", "switched from", "phases (s)", "first token", "tokens/s")
    rows = [head]
    rows += [
        (
            r.model,
            r.kind,
            f"{r.waited_ms:.0f} ms",
            r.switched_from,
            r.phases,
            f"{r.first_token_s:.3f} s",
            f"{r.tokens_per_second:.0f}",
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def report(results: list[Result], began: float, *, switches_wanted: int = 4) -> int:
    print_table(results)
    bad = [(r, problem) for r in results for problem in r.problems]
    for result, problem in bad:
        print(f"WRONG: {result.kind} request to {result.model}: {problem}")
    switches = sum(r.switched_from not in ("-", "nothing") for r in results)
    streams = sum(r.kind == "stream" for r in results)
    print(
        f"{len(results)} requests, {len(bad)} problems, {switches} switches,"
        f" {streams} streams across them, {time.monotonic() - began:.1f} s"
    )
    return 1 if bad or switches < switches_wanted else 0


def main(url: str, named: str, tokens: str, *turns: str) -> int:
    began = time.monotonic()
    client = Client(url, named=named == "named", tokens=int(tokens))
    return report(take_turns(client, list(turns)), began)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
