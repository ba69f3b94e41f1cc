"""What the stand-in says: a function of model, prompt and, when sampling, seed.

An answer begins with the model's name, so that a proxy that mixes models up is caught by the first
token; the words after it depend on the whole prompt, so that mixed-up prompts are caught too.
"""

from __future__ import annotations

import os
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

GOOD = "good"
GARBAGE = "garbage"  # weights discarded and not loaded again
WRONG = "wrong"  # looks like an answer, is not the one it was before

_MASK = 2**64 - 1
_WORDS = [
    "the",
    "a",
    "one",
    "some",
    "each",
    "stone",
    "river",
    "cloud",
    "light",
    "garden",
    "winter",
    "morning",
    "quiet",
    "open",
    "narrow",
    "early",
    "paper",
    "silver",
    "distant",
    "gentle",
    "carries",
    "follows",
    "opens",
    "answers",
    "keeps",
    "leaves",
    "holds",
    "remembers",
    "beside",
    "under",
    "over",
    "between",
    "toward",
    "without",
    "slowly",
    "often",
    "never",
    "always",
    "here",
    "there",
    "again",
    "and",
    "but",
    "while",
    "until",
    "because",
    "window",
    "letter",
    "bridge",
    "harbour",
    "forest",
    "signal",
    "number",
    "colour",
    "engine",
    "table",
    "story",
    "music",
    "answer",
    "question",
    "path",
]


class Answer:
    """The tokens of one answer, by position."""

    def __init__(
        self,
        model: str,
        prompt: str,
        *,
        natural_tokens: int,
        temperature: float,
        seed: int | None,
        content: str,
    ) -> None:
        key = f"{model}\0{prompt}"
        if temperature > 0:
            key += f"\0{os.urandom(8).hex() if seed is None else seed}"
        if content == WRONG:
            key += "\0wrong"
        data = key.encode()
        self._key = zlib.crc32(data) << 32 | zlib.crc32(data, 0x5DEECE66)
        self._model = model
        self._content = content
        spread = max(natural_tokens // 4, 1)
        length = natural_tokens - spread + self._hash(-1) % (2 * spread + 1)
        # garbage never hits the end-of-sequence token: it goes on to max_tokens
        self.natural_length = 256 if content == GARBAGE else max(length, 3)
        self.ends_by_itself = content != GARBAGE

    def token(self, index: int) -> str:
        if self._content == GARBAGE:
            return "!"
        if index == 0:
            return self._model
        if index == 1:
            return ":"
        if index == self.natural_length - 1:
            return "."
        return " " + _WORDS[self._hash(index) % len(_WORDS)]

    def logprob(self, index: int) -> float:
        if self._content == GARBAGE:
            return -11.0  # one of many: the softmax of noise is flat
        return -(self._hash(index + 1_000_003) % 10_000) / 5_000.0

    def _hash(self, index: int) -> int:
        """splitmix64 of key and position."""
        value = (self._key + (index & _MASK) * 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
        return value ^ value >> 31


# The tokenizer: three bytes of UTF-8 to a token, the count of bytes in the topmost. Reversible
# without a vocabulary, and about as many tokens as a real one makes of English.


def tokenize(text: str) -> list[int]:
    data = text.encode()
    pieces = [data[at : at + 3] for at in range(0, len(data), 3)]
    return [int.from_bytes(piece, "little") | len(piece) << 24 for piece in pieces]


def count_tokens(text: str) -> int:
    return (len(text.encode()) + 2) // 3


def detokenize(tokens: Sequence[int]) -> str:
    pieces = []
    for token in tokens:
        length = min(token >> 24 & 0xFF, 3)
        pieces.append((token & 0xFFFFFF).to_bytes(3, "little")[:length])
    return b"".join(pieces).decode(errors="replace")


def embedding(model: str, text: str, dimensions: int, content: str) -> list[float]:
    """A unit vector that depends on model and text; zeros from garbage."""
    if content == GARBAGE:
        return [0.0] * dimensions
    source = Answer(model, text, natural_tokens=8, temperature=0, seed=None, content=content)
    raw = [source.logprob(index) + 1.0 for index in range(dimensions)]
    norm = sum(value * value for value in raw) ** 0.5 or 1.0
    return [value / norm for value in raw]
