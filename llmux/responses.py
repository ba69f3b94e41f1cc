"""Stored responses: which model's engine keeps the response of an id, and which API key made it,
for the newest ids.

Each worker has one table for the responses it passed on, and the supervisor one for all workers. A
worker that does not know an id asks the supervisor; a supervisor that restarts gets every worker's
table again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

MAX_RESPONSES: Final = 10_000  # ids; vLLM keeps the responses themselves until it ends
MAX_PER_MESSAGE: Final = 500
MAX_ID: Final = 200
MAX_NAME: Final = 600  # of a model or a key, in characters
NO_KEYS: Final[Mapping[str, str]] = MappingProxyType({})


class ResponseModels:
    """Id → (model, name of the key; "" without keys), oldest first."""

    def __init__(self, limit: int = MAX_RESPONSES) -> None:
        self._limit = limit
        self._models: dict[str, tuple[str, str]] = {}

    def keep(self, responses: Mapping[str, str], keys: Mapping[str, str] = NO_KEYS) -> None:
        for response_id, model in responses.items():
            key = keys.get(response_id, "")
            if len(response_id) > MAX_ID or max(len(model), len(key)) > MAX_NAME:
                continue  # bounded: a client must not grow the supervisor's memory
            self._models.pop(response_id, None)
            self._models[response_id] = model, key
        for response_id in list(islice(self._models, max(0, len(self._models) - self._limit))):
            del self._models[response_id]

    def model_of(self, response_id: str | None) -> str | None:
        return self._models.get(response_id or "", (None, ""))[0]

    def key_of(self, response_id: str | None) -> str:
        return self._models.get(response_id or "", (None, ""))[1]

    def answer(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The result of the verb "response": {"id"} → {"model", "key"}, null for an unknown id."""
        response_id = str(args.get("id", ""))
        return {"model": self.model_of(response_id), "key": self.key_of(response_id)}

    def parts(self) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
        """The whole table, in parts that fit into a message: models and keys by id."""
        items = iter(self._models.items())
        while part := dict(islice(items, MAX_PER_MESSAGE)):
            models = {one: model for one, (model, _) in part.items()}
            yield models, {one: key for one, (_, key) in part.items() if key}
