"""The OpenAI Responses API and Anthropic's Messages over the same completions: translation only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from ..options import Options
from . import completions
from .completions import Completion, missing

JSON = dict[str, Any]


class Reply:
    """One completion told in another API's words. ``events`` are (name, data) pairs."""

    def __init__(self, completion: Completion, model: str) -> None:
        self.completion = completion
        self.model = model

    @property
    def text(self) -> str:
        return self.completion.sequences[0].text

    @property
    def tokens(self) -> int:
        return self.completion.sequences[0].tokens


def _chat(body: JSON, messages: list[Any], limit: object, options: Options) -> Completion:
    chat: JSON = {"messages": messages, "stream": bool(body.get("stream"))}
    chat |= {key: body[key] for key in ("temperature", "seed", "ignore_eos") if key in body}
    if limit is not None:
        chat["max_tokens"] = limit
    return Completion(completions.CHAT, chat, options)


# ---- /v1/responses ------------------------------------------------------------------------------


class Response(Reply):
    def __init__(self, body: JSON, options: Options) -> None:
        if "input" not in body:
            raise missing("input")
        given = body["input"]
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if body.get("instructions"):
            messages = [{"role": "system", "content": body["instructions"]}, *messages]
        super().__init__(
            _chat(body, messages, body.get("max_output_tokens"), options), options.name
        )
        self.id = f"resp_{os.urandom(16).hex()}"
        self.status = "in_progress"
        self.background = bool(body.get("background"))
        self._item = f"msg_{os.urandom(8).hex()}"
        self._created = int(time.time())
        self._number = -1

    def whole(self) -> JSON:
        done = self.status == "completed"
        output, spent = self.tokens, self.completion.prompt_tokens
        return {
            "id": self.id,
            "created_at": self._created,
            "model": self.model,
            "object": "response",
            "output": [self._message("completed")] if done else [],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "background": self.background,
            "status": self.status,
            "usage": {
                "input_tokens": spent,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": spent + output,
            }
            if done
            else None,
        }

    def _message(self, status: str) -> JSON:
        content = [self._part(self.text)] if status == "completed" else []
        return {
            "id": self._item,
            "content": content,
            "role": "assistant",
            "status": status,
            "type": "message",
        }

    @staticmethod
    def _part(text: str) -> JSON:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}

    def _event(self, kind: str, **content: Any) -> tuple[str, JSON]:
        self._number += 1
        name = f"response.{kind}"
        return name, {**content, "sequence_number": self._number, "type": name}

    def _at(self) -> JSON:
        return {"content_index": 0, "item_id": self._item, "output_index": 0}

    def begin(self) -> Iterator[tuple[str, JSON]]:
        yield self._event("created", response=self.whole())
        yield self._event("in_progress", response=self.whole())
        item = self._message("in_progress")
        yield self._event("output_item.added", item=item, output_index=0)
        yield self._event("content_part.added", **self._at(), part=self._part(""))

    def token(self, text: str) -> tuple[str, JSON]:
        return self._event("output_text.delta", **self._at(), delta=text, logprobs=[])

    def end(self) -> Iterator[tuple[str, JSON]]:
        yield self._event("output_text.done", **self._at(), text=self.text, logprobs=[])
        yield self._event("content_part.done", **self._at(), part=self._part(self.text))
        item = self._message("completed")
        yield self._event("output_item.done", item=item, output_index=0)
        self.status = "completed"
        yield self._event("completed", response=self.whole())


# ---- /v1/messages -------------------------------------------------------------------------------


def anthropic_prompt(body: JSON) -> list[Any]:
    if "messages" not in body:
        raise missing("messages")
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    return [*system, *body["messages"]]


class Message(Reply):
    def __init__(self, body: JSON, options: Options) -> None:
        if "max_tokens" not in body:
            raise missing("max_tokens")
        messages = anthropic_prompt(body)
        super().__init__(_chat(body, messages, body["max_tokens"], options), options.name)
        self.id = f"chatcmpl-{os.urandom(16).hex()}"

    def _message(self, content: list[JSON], output_tokens: int) -> JSON:
        usage = {"input_tokens": self.completion.prompt_tokens, "output_tokens": output_tokens}
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "usage": usage,
        }

    def _stop_reason(self) -> str:
        length = self.completion.sequences[0].finish_reason == "length"
        return "max_tokens" if length else "end_turn"

    def whole(self) -> JSON:
        message = self._message([{"type": "text", "text": self.text}], self.tokens)
        return {**message, "stop_reason": self._stop_reason()}

    def begin(self) -> Iterator[tuple[str, JSON]]:
        yield self._event("message_start", message=self._message([], 0))
        block = {"type": "text", "text": ""}
        yield self._event("content_block_start", index=0, content_block=block)

    def token(self, text: str) -> tuple[str, JSON]:
        delta = {"type": "text_delta", "text": text}
        return self._event("content_block_delta", index=0, delta=delta)

    def end(self) -> Iterator[tuple[str, JSON]]:
        yield self._event("content_block_stop", index=0)
        usage = {"input_tokens": self.completion.prompt_tokens, "output_tokens": self.tokens}
        yield self._event("message_delta", delta={"stop_reason": self._stop_reason()}, usage=usage)
        yield self._event("message_stop")

    @staticmethod
    def _event(kind: str, **content: Any) -> tuple[str, JSON]:
        return kind, {"type": kind, **content}
