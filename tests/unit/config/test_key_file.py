"""The file of API keys: each field's range, each mistake with its line, and what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmux.config.keyfile import PREFIX, hash_key, load_keys, make_key, without_key
from llmux.config.schema import Key, KeyRole
from llmux.errors import ConfigError

MAX_BYTES = 8 * 1024**2
DIGEST = hash_key("x").hex()
NO_LIMITS: list[Any] = [0, -1, True, 1_000_000_000, "1", []]
GOOD: dict[str, Any] = {"name": "a", "sha256": DIGEST}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def load(file: Path, *entries: dict[str, Any]) -> tuple[Key, ...]:
    file.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return load_keys(str(file))


def problems(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_keys(str(file))
    assert {problem.file for problem in caught.value.problems} == {str(file)}
    return [f"{one.line}:{one.column}: {one.message}" for one in caught.value.problems]


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "x" * 100},
        {"role": "use"},
        {"role": "admin"},
        {"models": []},
        {"models": None, "max_in_flight": None},
        {"models": ["b", "a"], "max_in_flight": 1, "max_waiting": 999_999_999},
        {"requests_per_minute": 0.001, "max_waiting": 1},
        {"requests_per_minute": 7},
    ],
)
def test_every_field_is_read(entry: dict[str, Any], file: Path) -> None:
    (key,) = load(file, {**GOOD, **entry})
    models = entry.get("models")
    assert key == Key(
        entry.get("name", "a"),
        hash_key("x"),
        KeyRole(entry.get("role", "use")),
        None if models is None else frozenset(models),
        entry.get("max_in_flight"),
        entry.get("requests_per_minute"),
        entry.get("max_waiting"),
    )


NAME = "name: expected 1 to 100 printable characters"
SHA = "a: sha256: expected 64 hexadecimal digits (llmux key new makes it)"
RATE = "expected a number from 0.001 to below 1e9"
KNOWN = "name, sha256, role, models, max_in_flight, max_waiting, requests_per_minute"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": ""}, NAME),
        ({"name": "x" * 101}, NAME),
        ({"name": "a\n"}, NAME),
        ({"name": 7}, NAME),
        ({"sha256": DIGEST[:-2]}, SHA),
        ({"sha256": DIGEST + "00"}, SHA),
        ({"sha256": 7}, SHA),
        ({"role": "root"}, "a: role: expected use or admin"),
        ({"role": []}, "a: role: expected use or admin"),
        ({"models": "m"}, "a: models: expected a list of model names"),
        ({"models": ["m", 7]}, "a: models: expected a list of model names"),
        ({"z": 1, "b": 2}, f"unknown: b, z (a key has {KNOWN})"),
        ({"z" * 90: 1}, f"unknown: {'z' * 80} (a key has {KNOWN})"),
        *(({limit: value}, f"a: {limit}: expected a number above 0")
          for limit in ("max_in_flight", "max_waiting")
          for value in NO_LIMITS),
        *(({"requests_per_minute": value}, f"a: requests_per_minute: {RATE}")
          for value in (*NO_LIMITS, 1e-320, 0.00099, float("nan"))),
        ({"max_in_flight": 1.5}, "a: max_in_flight: expected a number above 0"),
        ({"max_waiting": 1.0}, "a: max_waiting: expected a number above 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_key(entry: dict[str, Any], message: str, file: Path) -> None:
    file.write_text(json.dumps({**GOOD, **entry}))
    assert problems(file) == [f"1:1: {message}"]


def test_each_line_is_judged(file: Path) -> None:
    lines = [json.dumps({**GOOD, "name": name}) for name in ("a", "b", "a", "c")]
    nameless = json.dumps({"name": "d"})
    file.write_text("\n".join([lines[0], "{", "", "# x", *lines[1:], nameless, "{" * 100_000]))
    no_object = "this line is not a JSON object"
    assert problems(file) == [
        f"2:1: {no_object}",
        "6:1: there is another key called a",
        "8:1: d: sha256: expected 64 hexadecimal digits (llmux key new makes it)",
        f"9:1: {no_object}",
    ]


def test_a_list_is_judged_as_a_whole(file: Path) -> None:
    file.write_text(f"- 7\n- name: a\n  sha256: {DIGEST}\n- name: b\n")
    assert [problem.partition(": ")[0] for problem in problems(file)] == ["1:1", "1:1"]
    file.write_text(f"# x\n- name: a\n  sha256: {DIGEST}\n- name: b\n  sha256: {DIGEST}\n")
    assert [key.name for key in load_keys(str(file))] == ["a", "b"]
    for text, told in (
        ("a: 1", "1:1: expected a list of keys"),
        ("- a\n- [", "3:1: neither YAML nor one JSON object a line"),
        ("- 2026-02-31\n", "1:1: neither YAML nor one JSON object a line"),
        ('{"name": "a"}\n- 7\n', "2:1: neither YAML nor one JSON object a line"),
    ):
        file.write_text(text if text.endswith("\n") else f"{text}\n")
        assert problems(file) == [told]


def test_a_file_that_cannot_be_read(file: Path) -> None:
    assert problems(file) == ["1:1: cannot read the keys: No such file or directory"]
    file.write_bytes(b"\xff")
    assert problems(file) == ["1:1: cannot read the keys: not UTF-8"]
    file.write_text("")
    assert load_keys(str(file)) == ()
    line = f"{json.dumps(GOOD)}\n"
    file.write_text(line + "\n" * (MAX_BYTES - len(line)))
    assert len(load_keys(str(file))) == 1
    os.truncate(file, MAX_BYTES + 1)
    assert problems(file) == [f"1:1: cannot read the keys: larger than {MAX_BYTES} bytes"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"role": KeyRole.ADMIN},
        {"models": ("a", "b")},
        {"max_in_flight": 1},
        {"max_waiting": 2},
        {"requests_per_minute": 0.5},
        {"models": ("m",), "max_in_flight": 1, "max_waiting": 2, "requests_per_minute": 3.0},
    ],
)
def test_a_new_key_has_what_was_asked_for_and_no_more(given: dict[str, Any], file: Path) -> None:
    secret, line = make_key("new", **given)
    assert secret.startswith(PREFIX)
    assert len(secret) == len(PREFIX) + 43, "256 bits"
    assert secret != make_key("new")[0]
    assert set(json.loads(line)) == {"name", "sha256", "role", *given}
    file.write_text(line)
    expected = {**given, "models": frozenset(given["models"])} if "models" in given else given
    assert load_keys(str(file)) == (Key("new", hash_key(secret), **expected),)


@pytest.mark.parametrize("wrong", [{"max_in_flight": 0}, {"requests_per_minute": 1e9}])
def test_no_key_is_made_that_could_not_be_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        make_key("new", **wrong)


def test_a_key_is_taken_out_and_the_rest_stays_as_it_was() -> None:
    lines = '# x\n\n  {"name": "a"}\n  # y\n{"name": "b"}\n{"name": "a"}\n{"x": 1}'
    assert without_key(lines, "a") == '# x\n\n  # y\n{"name": "b"}\n{"x": 1}'
    assert without_key(lines, "c") == lines
    listed = "- name: a\n- {name: b, role: use}\n- name: c\n"
    assert without_key(listed, "a") == '{"name": "b", "role": "use"}\n{"name": "c"}\n'
