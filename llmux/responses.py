"""Which model's engine keeps the response of an id: the newest ones, as workers tell of them.

Each worker has one of these for what it passed on itself, and the supervisor one for all of them. A
worker that does not know an id asks; a supervisor that starts is told anew by every worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

MAX_RESPONSES: Final = 10_000  # ids remembered; vLLM keeps the responses themselves until it ends
MAX_TOLD: Final = 1000  # ids in one message
MAX_ID: Final = 200
MAX_NAME: Final = 600  # of a model


class ResponseModels:
    """Id → model, oldest first."""

    def __init__(self, limit: int = MAX_RESPONSES) -> None:
        self._limit = limit
        self._models: dict[str, str] = {}

    def keep(self, responses: Mapping[str, str]) -> None:
        for response_id, model in responses.items():
            if len(response_id) > MAX_ID or len(model) > MAX_NAME:
                continue  # no worker says so; the supervisor's memory is not in anybody's hands
            self._models.pop(response_id, None)
            self._models[response_id] = model
        for response_id in list(islice(self._models, max(0, len(self._models) - self._limit))):
            del self._models[response_id]

    def model_of(self, response_id: str | None) -> str | None:
        return self._models.get(response_id or "")

    def answer(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """To the verb ``response``: {"id"} → {"model"}, null when it is not known."""
        return {"model": self.model_of(str(args.get("id", "")))}

    def parts(self) -> Iterator[dict[str, str]]:
        """All of it, in pieces that fit into a message."""
        items = iter(self._models.items())
        while part := dict(islice(items, MAX_TOLD)):
            yield part
