"""The finder sees what json.loads sees of the top level, however the body is cut into pieces."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmux.gateway.http.json_finder import (
    MAX_DEPTH,
    MAX_KEY,
    MAX_VALUE,
    JsonError,
    JsonFinder,
    is_true,
)
from llmux.gateway.http.openai import read_body

PREVIOUS = "previous_response_id"
keys = st.sampled_from(
    ["model", "stream", PREVIOUS, "mod\\el", "x", 'a"b', "models", "", "é", "model "]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20), st.sampled_from(["alpha", 'a"\\b', "{", "]", ":", ",", "\\", "true"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(keys | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
members = st.lists(st.tuples(keys, values), max_size=6)


def written(pairs: list[tuple[str, Any]], ascii_only: bool, indent: int) -> bytes:
    """An object that may have a key more than once."""
    space = " " * indent
    inner = f",{space}".join(
        f"{space}{json.dumps(key, ensure_ascii=ascii_only)}{space}:{space}"
        f"{json.dumps(value, ensure_ascii=ascii_only)}{space}"
        for key, value in pairs
    )
    return f"{space}{{{inner}}}{space}\n".encode("utf-8", "surrogatepass")


YES: list[Any] = [True, 1, 1.0, "1", "true", "TRUE", "t", "y", "Yes", "on"]
NO: list[Any] = [False, 0, 2, -1, 0.5, None, "", "0", "off", "tru", [1], {}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((value, True) for value in YES),
        *((value, False) for value in NO),
        ("y" * 200, False),
        (10**300, False),
    ],
)
def test_a_stream_is_what_vllm_takes_for_one(value: Any, expected: bool) -> None:
    """pydantic's reading of a bool; before, such streams got no signs of life while they waited."""
    body = json.dumps({"model": "a", "stream": value}).encode()
    assert read_body(body)[1] is expected
    for cut in range(len(body)):
        assert found(body, [cut]).stream is expected


def found(body: bytes, cuts: list[int]) -> JsonFinder:
    finder = JsonFinder()
    at = 0
    for cut in [*sorted({cut % (len(body) + 1) for cut in cuts}), len(body)]:
        finder.feed(body[at:cut])
        at = cut
    finder.close()
    return finder


@given(members, st.booleans(), st.integers(0, 2), st.lists(st.integers(0, 500), max_size=8))
@example([("model", "a"), ("x", {"model": "b"}), ("model", None)], True, 0, [])
@example([("stream", True), ("stream", "")], True, 0, [])
@example([("x", 1), ("", [[], {"model": "b"}]), ("model", "a"), ("models", 1)], True, 1, [20, 40])
@example([("model", "a"), ("x", [[[["]"]]]]), ("model", "c"), ("x", '"')], True, 0, [])
@example([("stream", 1)], True, 0, [])
@example([("stream", [1])], True, 0, [])
@example([("stream", "Yes"), ("model", "a")], True, 1, [3, 7, 9])
@example([(PREVIOUS, "a"), (PREVIOUS, None)], True, 0, [])
@example([(PREVIOUS, None), (PREVIOUS, "a"), ("x", {PREVIOUS: "b"})], True, 0, [])
def test_it_sees_what_the_engines_parser_sees(
    pairs: list[tuple[str, Any]], ascii_only: bool, indent: int, cuts: list[int]
) -> None:
    body = written(pairs, ascii_only, indent)
    whole = json.loads(body)
    finder = found(body, cuts)
    model = whole.get("model")
    assert finder.model == (model if isinstance(model, str) and model else None)
    assert finder.stream == (is_true(whole.get("stream")))
    previous = whole.get(PREVIOUS)
    assert finder.previous == (previous if isinstance(previous, str) else None)
    if finder.model is not None:
        start, end = finder.span
        assert json.loads(body[start:end]) == model
    start, end, naming = finder.naming("renamed")
    assert json.loads(body[:start] + naming + body[end:]) == whole | {"model": "renamed"}


@pytest.mark.parametrize(
    ("key", "value", "attribute"),
    [("model", '"alpha"', "model"), ("stream", "true", "stream"), (PREVIOUS, '"r"', "previous")],
)
def test_every_letter_of_the_key_may_be_escaped(key: str, value: str, attribute: str) -> None:
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in key)
    assert len(escaped) + 2 <= MAX_KEY
    body = f'{{"{escaped}": {value}}}'.encode()
    for cut in range(len(body)):
        assert getattr(found(body, [cut]), attribute) == json.loads(value)


def test_the_span_is_that_of_the_value_as_it_is_written() -> None:
    body = b'{"\\u006d\\u006f\\u0064\\u0065\\u006c": "\\u0061lpha"}'
    for cut in range(len(body)):
        finder = found(body, [cut])
        assert finder.model == "alpha"
        assert body[slice(*finder.span)] == b'"\\u0061lpha"'


def test_what_is_escaped_ends_no_string_wherever_the_body_is_cut() -> None:
    body = b'{"x\\"y":"{\\"","z":[{"\\"]}":"\\\\"}],"model":"c\\"d\\\\"}'
    model = json.loads(body)["model"]
    for cut in range(len(body)):
        assert found(body, [cut, cut + 1, cut + 2]).model == model


@pytest.mark.parametrize("room", [0, 1])
def test_a_key_or_a_value_may_be_as_long_as_the_bound_and_no_longer(room: int) -> None:
    name = "m" * (MAX_VALUE - 2 + room)
    previous = json.dumps({PREVIOUS: name}).encode()
    body = json.dumps({"x" * (MAX_KEY + room): "model", "model": name}).encode()
    for cut in (0, 100, MAX_KEY, MAX_KEY + 5, len(body) - 5):
        assert found(previous, [cut]).previous == ("too long" if room else name)
        if room:
            with pytest.raises(JsonError, match="too long"):
                found(body, [cut])
        else:
            assert found(body, [cut]).model == name


@pytest.mark.parametrize(
    "start",
    [b'{"model": "', b'{"stream": "', b'{"stream": 1', b'{"previous_response_id": "', b'{"'],
    ids=range(5),
)
def test_what_is_held_of_an_endless_value_is_bounded(start: bytes) -> None:
    finder = JsonFinder()
    finder.feed(start)
    for _ in range(20):
        finder.feed(b"1" * MAX_VALUE)
    assert len(finder._capture or b"") == MAX_VALUE + 1


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b"{}", "missing"),
        (b'{"model": null}', "missing"),
        (b'{"model": 5}', "not a string"),
        (b'{"model": ["a"]}', "not a string"),
        (b'{"model": ""}', "empty"),
    ],
)
def test_it_says_what_is_wrong(body: bytes, wrong: str) -> None:
    finder = found(body, [])
    assert finder.model is None and finder.wrong == wrong


@pytest.mark.parametrize(("depth", "refused"), [(MAX_DEPTH - 1, False), (MAX_DEPTH, True)])
def test_an_object_may_be_as_deep_as_the_engines_parser_reads(depth: int, refused: bool) -> None:
    body = b'{"x":' + b"[" * depth + b"]" * depth + b',"model":"a"}'
    for cut in (0, 10, 500):
        if refused:
            with pytest.raises(JsonError, match="nested too deeply"):
                found(body, [cut])
        else:
            assert found(body, [cut]).model == "a"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'"x"', b'{"model": "a"', b'{"a": "b', b"{} x", b"{\0", b'{"a": ' + b"[" * 2000],
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(JsonError):
        found(body, [])


@pytest.mark.parametrize(
    "inner",
    [
        b"[" + b'"ab",' * (1 << 18) + b"1]",
        b'"' + b"A" * (1 << 20) + b'"',
        b"[" + b"123456," * (1 << 17) + b"1]",
        b"[" + b"{}," * (1 << 18) + b"{}]",
        b'"' + b"\\n" * (1 << 19) + b'"',
        b"[" + b"[1,[2,[3,[4]]]]," * (1 << 16),
        b'"' + b'\\"' * (1 << 19) + b'"',
    ],
    ids=["strings", "text", "numbers", "objects", "escapes", "depth", "quotes"],
)  # fmt: skip
def test_its_work_is_linear_and_its_memory_bounded(inner: bytes) -> None:
    """1 MiB of anything; a nested tree of it is never built."""
    finder = JsonFinder()
    body = b'{"model": "a", "x": ' + inner
    for at in range(0, len(body), 1 << 16):
        finder.feed(body[at : at + (1 << 16)])
    assert finder.model == "a"
    assert finder._capture is None or len(finder._capture) < 1 << 16


@pytest.mark.parametrize(
    "member",
    [b'"a":1,', b'"":"",', b' "model " : [[],{"model":"b"}] ,', b'"streams":"\\"model\\":",',
     b'"previous_response_id2":null,'],
)  # fmt: skip
def test_members_that_nobody_looks_for_cost_no_turns_of_python(member: bytes) -> None:
    """20 MiB of them took 13 s, five turns a member."""
    turns = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal turns
        turns += event == "call"

    body = b'{"stream":true,' + member * (100_000 // len(member)) + b'"model":"a"}'
    finder = JsonFinder()
    sys.setprofile(count)
    try:
        for at in range(0, len(body), 16_384):
            finder.feed(body[at : at + 16_384])
    finally:
        sys.setprofile(None)
    finder.close()
    assert (finder.model, finder.stream, finder.previous) == ("a", True, None)
    assert body[slice(*finder.span)] == b'"a"'
    assert turns < 500
