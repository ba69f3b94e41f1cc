"""Which model's engine keeps a response: bounded, newest first to stay, told in parts."""

from __future__ import annotations

from llmux.protocol import MAX_LINE, ResponseOwners
from llmux.responses import MAX_ID, MAX_NAME, MAX_PER_MESSAGE, MAX_RESPONSES, ResponseModels


def test_the_oldest_are_forgotten() -> None:
    known = ResponseModels(limit=3)
    known.keep({"a": "x", "b": "x", "c": "y"})
    known.keep({"a": "z"})  # named again: young again
    known.keep({"d": "x"})
    assert [known.model_of(one) for one in "abcd"] == ["z", None, "y", "x"]
    known.keep({str(number): "x" for number in range(10)})
    assert [known.model_of(str(number)) for number in range(10)] == [None] * 7 + ["x"] * 3
    assert known.model_of(None) is None


def test_what_is_too_long_is_not_kept() -> None:
    known = ResponseModels()
    known.keep({"a" * (MAX_ID + 1): "x", "b": "x" * (MAX_NAME + 1), "c": "x"})
    assert [known.model_of(one) for one in ("a" * (MAX_ID + 1), "b", "c")] == [None, None, "x"]


def test_what_the_verb_answers() -> None:
    known = ResponseModels()
    known.keep({"resp_1": "alpha", "resp_3": "alpha"}, {"resp_3": "anna"})
    assert known.answer({"id": "resp_1"}) == {"model": "alpha", "key": ""}
    assert known.answer({"id": "resp_3"}) == {"model": "alpha", "key": "anna"}
    assert known.answer({"id": "resp_2"}) == known.answer({}) == {"model": None, "key": ""}


def test_all_of_it_is_told_in_lines_that_fit() -> None:
    known = ResponseModels()
    longest = "m" * MAX_NAME
    ids = [f"{number:0{MAX_ID}}" for number in range(MAX_RESPONSES + 5)]
    known.keep(dict.fromkeys(ids, longest), dict.fromkeys(ids, "k" * 100))
    parts = list(known.parts())
    assert len(parts) == MAX_RESPONSES // MAX_PER_MESSAGE
    assert max(len(ResponseOwners(*part).encode()) for part in parts) < MAX_LINE
    again = ResponseModels()
    for part in parts:
        again.keep(*part)
    last = f"{MAX_RESPONSES:0{MAX_ID}}"
    assert (again.model_of(last), again.key_of(last)) == (longest, "k" * 100)
