"""Compare a woken engine's answer with the one recorded before."""

from __future__ import annotations

from llmux.errors import EngineUnhealthy
from llmux.ports import Canary

LOGPROB_TOLERANCE = 0.05  # other kernels after a reload differ in the last digits


def compare(model: str, expected: Canary, got: Canary) -> None:
    """Raises EngineUnhealthy when the woken model is not to be trusted."""
    if not same_answer(expected, got):
        raise EngineUnhealthy(
            "trust",
            f'the woken model "{model}"',
            f"its canary answered {got.text!r} instead of {expected.text!r}",
        )


def same_answer(expected: Canary, got: Canary) -> bool:
    """Whether the texts are equal and the log-probs close."""
    close = len(got.logprobs) == len(expected.logprobs) and all(
        abs(a - b) <= LOGPROB_TOLERANCE
        for a, b in zip(got.logprobs, expected.logprobs, strict=True)
    )
    return got.text == expected.text and close
