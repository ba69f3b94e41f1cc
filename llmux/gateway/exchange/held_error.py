"""A response with status 500 is held until it is known whether its engine lives."""

from __future__ import annotations

from typing import Final

from llmux.gateway.engine.answer_head import AnswerHead

MAX_HELD: Final = 64 * 1024  # an error is short


class HeldError:
    __slots__ = ("body", "head", "length")

    def __init__(self, head: AnswerHead, length: bytes) -> None:
        self.head = head
        self.length = length
        self.body = bytearray()
