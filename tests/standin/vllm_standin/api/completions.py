"""Requests and answers of the OpenAI API in vLLM's dialect: pure translation, no I/O."""

from __future__ import annotations

import base64
import os
import struct
import time
from collections.abc import Iterator
from typing import Any

from .. import text
from ..options import Options
from .http import HttpError

CHAT = "chat"
PLAIN = "plain"


class Piece:
    """One token of one sequence, as it goes to the client."""

    __slots__ = ("finish_reason", "logprob", "stop_reason", "token")

    def __init__(
        self,
        token: str,
        logprob: float | None,
        finish_reason: str | None,
        stop_reason: str | None = None,
    ) -> None:
        self.token = token
        self.logprob = logprob
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason


class Sequence:
    """One choice: what the engine is asked for it, and what it has said so far."""

    def __init__(self, index: int, engine_request: dict[str, Any], stop: list[str]) -> None:
        self.index = index
        self.engine_request = engine_request
        self.text = ""
        self.pieces: list[Piece] = []
        self.tokens = 0
        self._stop = stop

    @property
    def finish_reason(self) -> str | None:
        return self.pieces[-1].finish_reason if self.pieces else None

    @property
    def stop_reason(self) -> str | None:
        return self.pieces[-1].stop_reason if self.pieces else None

    def take(self, output: dict[str, Any]) -> Iterator[Piece]:
        """The pieces of an engine output, up to a stop string if there is one."""
        tokens: list[str] = output["t"]
        logprobs: list[float | None] = output.get("lp") or [None] * len(tokens)
        finish: str | None = output.get("f")
        if not tokens and finish is not None:
            yield self._add(Piece("", None, finish))
        for position, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            self.tokens += 1
            last = position == len(tokens) - 1
            piece = Piece(token, logprob, finish if last else None)
            for stop in self._stop:
                # only what the new token completes: earlier text was looked at when it came
                at = (self.text + token).find(stop, max(len(self.text) - len(stop) + 1, 0))
                if at >= 0:
                    cut = (self.text + token)[len(self.text) : at] if at > len(self.text) else ""
                    piece = Piece(cut, logprob, "stop", stop)
                    break
            yield self._add(piece)
            if piece.finish_reason is not None:
                return

    def _add(self, piece: Piece) -> Piece:
        self.text += piece.token
        self.pieces.append(piece)
        return piece


class Completion:
    """One request to /v1/chat/completions or /v1/completions."""

    def __init__(self, kind: str, body: dict[str, Any], options: Options) -> None:
        self._kind = kind
        self._model = options.name
        prefix = "chatcmpl" if kind == CHAT else "cmpl"
        self._id = f"{prefix}-{os.urandom(16).hex()}"
        self._created = int(time.time())
        self.stream = bool(body.get("stream"))
        stream_options = body.get("stream_options") or {}
        if stream_options and not self.stream:
            raise bad_request("Stream options can only be defined when `stream=True`.")
        self.include_usage = bool(stream_options.get("include_usage"))
        self._continuous_usage = self.include_usage and bool(
            stream_options.get("continuous_usage_stats")
        )
        self._logprobs, self._top_logprobs = _wanted_logprobs(kind, body)
        prompts = [_chat_prompt(body)] if kind == CHAT else _plain_prompts(body)
        self.prompt_tokens = sum(text.count_tokens(prompt) for prompt in prompts)
        self.sequences: list[Sequence] = []
        choices = _integer(body, "n", 1)
        seed = None if body.get("seed") is None else _integer(body, "seed", 0, least=-(2**63))
        stop = body.get("stop") or []
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
            raise bad_request("stop must be a string or a list of strings", "stop")
        for prompt in prompts:
            limit = _output_limit(kind, body, text.count_tokens(prompt), options.max_model_len)
            for _ in range(choices):
                index = len(self.sequences)
                request = {
                    "id": f"{self._id}-{index}",
                    "prompt": prompt,
                    "max_tokens": limit,
                    "min_tokens": _integer(body, "min_tokens", 0, least=0),
                    "ignore_eos": bool(body.get("ignore_eos")),
                    "temperature": _number(body, "temperature", 1.0),
                    "seed": seed,
                    "logprobs": self._logprobs,
                }
                self.sequences.append(Sequence(index, request, stops))

    # the whole answer

    def response(self) -> dict[str, Any]:
        response: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion" if self._kind == CHAT else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(sequence) for sequence in self.sequences],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": {**self._usage(), "prompt_tokens_details": None},
            "kv_transfer_params": None,
        }
        if self._kind == CHAT:
            response.update(prompt_logprobs=None, prompt_token_ids=None)
        return response

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        logprobs = self._logprobs_of(sequence.pieces, 0)
        ending = {
            "logprobs": logprobs,
            "finish_reason": sequence.finish_reason,
            "stop_reason": sequence.stop_reason,
            "token_ids": None,
        }
        if self._kind == CHAT:
            message: dict[str, Any] = {
                "role": "assistant",
                "content": sequence.text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            }
            return {"index": sequence.index, "message": message, **ending}
        return {
            "index": sequence.index,
            "text": sequence.text,
            **ending,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
        }

    # a stream

    def first_chunk(self, sequence: Sequence) -> dict[str, Any] | None:
        """What goes before the first token; only chat has such a chunk."""
        if self._kind != CHAT:
            return None
        delta = {"role": "assistant", "content": ""}
        choice = {
            "index": sequence.index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
        }
        return self._chunk([choice], 0)

    def chunk(self, sequence: Sequence, piece: Piece) -> dict[str, Any]:
        offset = len(sequence.text) - len(piece.token)
        choice: dict[str, Any] = {"index": sequence.index}
        if self._kind == CHAT:
            choice["delta"] = {"content": piece.token}
        else:
            choice["text"] = piece.token
        choice["logprobs"] = self._logprobs_of([piece], offset)
        choice["finish_reason"] = piece.finish_reason
        if piece.finish_reason is not None or self._kind == PLAIN:
            choice["stop_reason"] = piece.stop_reason
        choice["token_ids"] = None
        return self._chunk([choice], sequence.tokens)

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._chunk([], None), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]], tokens: int | None) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk" if self._kind == CHAT else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        if self._continuous_usage and tokens is not None:
            chunk["usage"] = usage(self.prompt_tokens, tokens)
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, sum(sequence.tokens for sequence in self.sequences))

    # log-probabilities

    def _logprobs_of(self, pieces: list[Piece], offset: int) -> dict[str, Any] | None:
        known = [(piece.token, piece.logprob) for piece in pieces if piece.logprob is not None]
        if not self._logprobs or not known:
            return None
        if self._kind == CHAT:
            content = []
            for token, logprob in known:
                top = [_token_logprob(*one) for one in self._top(token, logprob)]
                content.append({**_token_logprob(token, logprob), "top_logprobs": top})
            return {"content": content}
        offsets = []
        for token, _ in known:
            offsets.append(offset)
            offset += len(token)
        return {
            "text_offset": offsets,
            "token_logprobs": [logprob for _, logprob in known],
            "tokens": [token for token, _ in known],
            "top_logprobs": [dict(self._top(token, logprob)) for token, logprob in known],
        }

    def _top(self, token: str, logprob: float) -> list[tuple[str, float]]:
        others = [(f" other{rank}", logprob - rank) for rank in range(1, self._top_logprobs)]
        return [(token, logprob), *others][: self._top_logprobs]


def _token_logprob(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def bad_request(message: str, param: str | None = None) -> HttpError:
    return HttpError(400, message, "BadRequestError", param)


def missing(field: str) -> HttpError:
    """What FastAPI's validation says of a body without a field."""
    text_ = (
        "1 validation error:\n"
        f"  {{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required'}}"
    )
    return HttpError(400, text_, "Bad Request", f"body.{field}")


def embedding_inputs(body: dict[str, Any]) -> list[str]:
    if "input" not in body:
        raise missing("input")
    return _texts(body["input"], "input")


def encode_embedding(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return vector


def _chat_prompt(body: dict[str, Any]) -> str:
    if "messages" not in body:
        raise missing("messages")
    return chat_prompt(body["messages"])


def chat_prompt(messages: object) -> str:
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a non-empty list", "messages")
    lines = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise bad_request("each message must be an object with a role", "messages")
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(
                str(part.get("text", "")) for part in content if isinstance(part, dict)
            )
        lines.append(f"<|{message['role']}|>{content}")
    return "\n".join([*lines, "<|assistant|>"])


def _plain_prompts(body: dict[str, Any]) -> list[str]:
    if body.get("prompt") is None:
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.")
    return _texts(body["prompt"], "prompt")


def _texts(value: object, field: str) -> list[str]:
    """A text, tokens, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, int) for item in value):
            return [text.detokenize(value)]
        return [one for item in value for one in _texts(item, field)]
    raise bad_request(f"{field} must be a string, a list of tokens, or a list of those", field)


def _wanted_logprobs(kind: str, body: dict[str, Any]) -> tuple[bool, int]:
    if kind == CHAT:
        top = _integer(body, "top_logprobs", 0, least=0)
        wanted = bool(body.get("logprobs"))
        if top and not wanted:
            raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.")
    else:
        wanted = body.get("logprobs") is not None
        top = _integer(body, "logprobs", 0, least=0)
    if top > 20:
        raise bad_request(f"Requested sample logprobs of {top}, which is greater than max: 20")
    return wanted, top


def _output_limit(kind: str, body: dict[str, Any], prompt_tokens: int, context: int) -> int:
    room = context - prompt_tokens
    wanted = body.get("max_completion_tokens") if kind == CHAT else None
    if wanted is None:
        wanted = body.get("max_tokens", 16 if kind == PLAIN else None)
    limit = room if wanted is None else wanted
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise bad_request(f"max_tokens must be an integer, got {limit!r}", "max_tokens")
    if limit < 1 and wanted is not None:
        raise bad_request(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    if limit > room or room < 1:
        raise bad_request(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{limit} output tokens and your prompt contains at least {prompt_tokens} input "
            f"tokens, for a total of at least {prompt_tokens + limit} tokens. Please reduce the "
            "length of the input prompt or the number of requested output tokens.",
            "input_tokens",
        )
    return limit


def _integer(body: dict[str, Any], field: str, default: int, *, least: int = 1) -> int:
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad_request(f"{field} must be an integer of at least {least}, got {value!r}", field)
    return value


def _number(body: dict[str, Any], field: str, default: float) -> float:
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        raise bad_request(f"{field} must be non-negative, got {value!r}.", field)
    return float(value)
