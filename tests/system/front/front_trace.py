"""A trace of requests, sent through a proxy, and what is the best that could be made of it.

``LLMUX_FRONT_REQUESTS`` is how many; the short form is for every run, 2,000 is the long one.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

REQUESTS = int(os.environ.get("LLMUX_FRONT_REQUESTS", "200"))
SMALLEST, LARGEST = 100, 20 * 1024 * 1024
CLIENTS = 12
SECONDS = 120.0
FILLING = 'a "quoted" word, a {brace}, a \\ and a\nline; "model": "wrong" '


@dataclass(frozen=True)
class Asked:
    model: str
    size: int
    model_first: bool

    def body(self) -> bytes:
        """JSON of just that size, with text in it that looks like other keys."""
        rest = {"max_tokens": 1, "prompt": "p", "metadata": {"model": "wrong", "text": ""}}
        name = {"model": self.model}
        bare = json.dumps({**name, **rest} if self.model_first else {**rest, **name})
        room = max(0, self.size - len(bare))
        filling = json.dumps(FILLING)[1:-1]
        text = filling * (room // len(filling))
        text += "x" * (room - len(text))
        return bare.replace('"text": ""', f'"text": "{text}"').encode()


def trace(models: Sequence[str], count: int, *, seed: int = 1) -> list[Asked]:
    """Popular and rare models (Zipf), bodies of every order of magnitude equally often."""
    dice = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(models) + 1)]
    asked = []
    for number in range(count):
        size = int(math.exp(dice.uniform(math.log(SMALLEST), math.log(LARGEST))))
        if number < 2:
            size = LARGEST
        asked.append(Asked(dice.choices(models, weights)[0], size, number % 2 == 0))
    return asked


@dataclass
class Outcome:
    awake: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)
    hosts_of: dict[str, set[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # answers of another model than was asked
    broken: list[int] = field(default_factory=list)  # which requests were not answered with 200

    def share(self) -> float:
        return self.awake / max(1, self.statuses.total())


def send(port: int, asked: Iterable[Asked], clients: int = CLIENTS) -> Outcome:
    """All of it, in order, by several clients at a time."""
    outcome, lock = Outcome(), threading.Lock()
    left = iter(enumerate(asked))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        for number, one in _shared(left, lock):
            try:
                answer, payload = _answer(connection, one)
            except (OSError, http.client.HTTPException):
                connection.close()  # the next request opens it again
                with lock:
                    outcome.statuses[0] += 1
                    outcome.broken.append(number)
                continue
            host = answer.headers.get("x-llmux-host", "")
            with lock:
                outcome.statuses[answer.status] += 1
                outcome.hosts[host] += 1
                outcome.hosts_of.setdefault(one.model, set()).add(host)
                if answer.status != 200:
                    outcome.broken.append(number)
                    continue
                outcome.awake += answer.headers["x-llmux-switch"] == "none"
                if json.loads(payload)["model"] != one.model:
                    outcome.wrong.append(payload[:200].decode())
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def _answer(
    connection: http.client.HTTPConnection, one: Asked
) -> tuple[http.client.HTTPResponse, bytes]:
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", one.body(), headers)
    answer = connection.getresponse()
    return answer, answer.read()


def _shared(left: Iterator[tuple[int, Asked]], lock: threading.Lock) -> Iterator[tuple[int, Asked]]:
    take: Callable[[], tuple[int, Asked] | None] = lambda: next(left, None)  # noqa: E731
    while True:
        with lock:
            one = take()
        if one is None:
            return
        yield one


def best_possible(asked: Sequence[Asked], places: int) -> float:
    """The share that finds its model awake when all places are anyone's and who knows what comes
    (Belady) says which model makes room. Nothing that is real can be better."""
    never = len(asked)
    upcoming: dict[str, list[int]] = {}
    for number in reversed(range(len(asked))):
        upcoming.setdefault(asked[number].model, []).append(number)
    resident: set[str] = set()
    found = 0
    for one in asked:
        upcoming[one.model].pop()
        if one.model in resident:
            found += 1
            continue
        if len(resident) >= places:
            next_use = {
                model: upcoming[model][-1] if upcoming[model] else never for model in resident
            }
            resident.remove(max(next_use, key=lambda model: next_use[model]))
        resident.add(one.model)
    return found / len(asked)
