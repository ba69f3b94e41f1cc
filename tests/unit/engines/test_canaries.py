"""How answers to canaries are read: what is compared word for word, and what within a tolerance."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmux.engines.canaries import OPENAI, TOKENS, UNFIT, Answer, Probe, encode, fits


def probe(path: str) -> Probe:
    (found,) = (one for one in OPENAI if one.path == path)
    return found


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SPOKEN = {"content": "Paris", "reasoning_content": "I think "}
TOLD = {"content": [{"logprob": -0.5}, {"logprob": -1}]}


@pytest.mark.parametrize(
    ("path", "answer", "read"),
    [
        (COMPLETION, {"choices": [{"text": " Paris"}]}, (" Paris", ())),
        (COMPLETION, {"choices": [{"text": "a", "logprobs": None}]}, ("a", ())),
        (
            COMPLETION,
            {"choices": [{"text": "a", "logprobs": {"token_logprobs": [None, -0.25, -2]}}]},
            ("a", (-0.25, -2.0)),  # the first token of an echo has none
        ),
        (COMPLETION, {"choices": [{"text": "a", "logprobs": {"token_logprobs": None}}]}, ("a", ())),
        (CHAT, {"choices": [{"message": SPOKEN}]}, ("I think Paris", ())),
        (CHAT, {"choices": [{"message": {"content": None}, "logprobs": None}]}, ("", ())),
        (CHAT, {"choices": [{"message": SPOKEN, "logprobs": TOLD}]}, ("I think Paris", (-0.5, -1))),
        ("/v1/embeddings", {"data": [{"embedding": [0.5, 1]}]}, ("", (0.5, 1.0))),
        ("/classify", {"data": [{"probs": [1] * 100}]}, ("", (1.0,) * TOKENS)),
        ("/score", {"data": [{"score": 0.75}]}, ("", (0.75,))),
        ("/pooling", {"data": [{"data": [[0.5], [[2]]]}]}, ("", (0.5, 2.0))),
        ("/v1/audio/transcriptions", {"text": "hm"}, ("hm", ())),
    ],
)
def test_what_is_read_of_an_answer(path: str, answer: Any, read: Answer) -> None:
    assert probe(path).read(answer) == read


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_no_note_can_hold_are_refused(number: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        probe("/score").read(json.loads(f'{{"data": [{{"score": {number}}}]}}'))


def test_every_body_names_the_model_and_one_of_them_is_a_form() -> None:
    forms = []
    for one in OPENAI:
        body, content_type = encode(one.body("the model"))
        assert b"the model" in body
        if content_type == "application/json":
            assert json.loads(body)["model"] == "the model"
        else:
            forms.append(one.path)
    assert forms == ["/v1/audio/transcriptions"]


@pytest.mark.parametrize("status", sorted({*UNFIT, 200, 401, 500, 503}))
def test_which_statuses_say_that_a_model_has_no_such_task(status: int) -> None:
    assert fits(status, b"{}") is (status not in UNFIT)
    assert fits(status, b'{"message": "The model `m` does not exist."}'), "whatever the route"
