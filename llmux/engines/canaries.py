"""Short deterministic requests by which a woken engine is compared with itself. Pure.

An engine type lists those that its models may serve, best first; the first one that an engine
serves is its canary.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

PROMPT: Final = "The capital of France is"
TOKENS: Final = 8
SILENCE_RATE: Final = 16_000  # Hz; what speech models resample to
BOUNDARY: Final = "llmux-canary"

# An engine that does not serve the request answers so; anything else is a fault of the engine.
UNFIT: Final = frozenset({400, 404, 405, 415, 422, 501})

Answer = tuple[str, tuple[float, ...]]  # what is compared: word for word, and within a tolerance


@dataclass(frozen=True, slots=True)
class Probe:
    """``read`` takes the decoded answer and raises ValueError, LookupError or TypeError on others.

    ``optional`` is a field of the JSON body that an engine may refuse.
    """

    path: str
    body: Callable[[str], Mapping[str, Any] | bytes]  # of the model's name; bytes: a form
    read: Callable[[Any], Answer]
    optional: str | None = None


def fits(status: int, body: bytes) -> bool:
    """False when the engine says that this model has no such route or task. A model that does not
    exist is a fault, whatever the route."""
    return status not in UNFIT or b"does not exist" in body


_GREEDY: Final = {"max_tokens": TOKENS, "temperature": 0, "seed": 0}


# As clients ask by default. Some kernels are compiled at the first such request, not at the start.
_SAMPLED: Final = {"max_tokens": TOKENS, "temperature": 1, "top_p": 0.9, "seed": 0}


def _completion(model: str) -> Mapping[str, Any]:
    return {"model": model, "prompt": PROMPT, **_GREEDY, "logprobs": 1}


def _sampled_completion(model: str) -> Mapping[str, Any]:
    return {"model": model, "prompt": PROMPT, **_SAMPLED}


def _read_completion(answer: Any) -> Answer:
    choice = answer["choices"][0]
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
    return str(choice["text"]), _numbers(p for p in logprobs if p is not None)


def _chat(model: str) -> Mapping[str, Any]:
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": model, "messages": messages, **_GREEDY, "logprobs": True}


def _sampled_chat(model: str) -> Mapping[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": PROMPT}], **_SAMPLED}


def _read_chat(answer: Any) -> Answer:
    choice = answer["choices"][0]
    message = choice["message"]
    said = (message.get("reasoning_content"), message.get("content"))
    tokens = (choice.get("logprobs") or {}).get("content") or ()
    return "".join(filter(None, said)), _numbers(token["logprob"] for token in tokens)


def _input(model: str) -> Mapping[str, Any]:
    return {"model": model, "input": PROMPT}


def _pair(model: str) -> Mapping[str, Any]:
    return {"model": model, "text_1": PROMPT, "text_2": "Paris"}


def _reader(field: str) -> Callable[[Any], Answer]:
    def read(answer: Any) -> Answer:
        return "", _numbers(_flat(answer["data"][0][field]))

    return read


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    numbers = tuple(float(value) for _, value in zip(range(TOKENS), values, strict=False))
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number that is not finite")  # notes and manifests could not hold it
    return numbers


def _silence(model: str) -> bytes:
    """A form with one second of silence as WAV (RIFF, 16 bit, mono)."""
    samples = bytes(2 * SILENCE_RATE)
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1),
        *(SILENCE_RATE, 2 * SILENCE_RATE, 2, 16, b"data", len(samples)),
    )
    fields = {"model": model, "temperature": "0", "response_format": "json"}
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    file = 'Content-Disposition: form-data; name="file"; filename="silence.wav"'
    start = f"--{BOUNDARY}\r\n{file}\r\nContent-Type: audio/wav\r\n\r\n".encode()
    return b"".join((*parts, start, header, samples, f"\r\n--{BOUNDARY}--\r\n".encode()))


def _read_transcription(answer: Any) -> Answer:
    return str(answer["text"]), ()


OPENAI: Final = (
    Probe("/v1/completions", _completion, _read_completion, optional="logprobs"),
    Probe("/v1/chat/completions", _chat, _read_chat, optional="logprobs"),
    Probe("/v1/embeddings", _input, _reader("embedding")),
    Probe("/classify", _input, _reader("probs")),
    Probe("/score", _pair, _reader("score")),
    Probe("/pooling", _input, _reader("data")),
    Probe("/v1/audio/transcriptions", _silence, _read_transcription),
)


# Answers are not compared: other kernels may draw other tokens.
SAMPLED: Final = (
    Probe("/v1/completions", _sampled_completion, _read_completion, optional="seed"),
    Probe("/v1/chat/completions", _sampled_chat, _read_chat, optional="seed"),
)


def encode(body: Mapping[str, Any] | bytes) -> tuple[bytes, str]:
    """Return (body, content type)."""
    if isinstance(body, bytes):
        return body, f"multipart/form-data; boundary={BOUNDARY}"
    return json.dumps(body).encode(), "application/json"
