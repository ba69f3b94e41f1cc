"""Read and extend the file of API keys: one JSON object a line, or a YAML list of such mappings.

It holds hashes only. A key is 256 random bits, so one round of SHA-256 is as good as any number.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from llmux.config.choices import KeyRole
from llmux.config.schema import Key
from llmux.errors import ConfigError, Problem
from llmux.small_files import read_small

MAX_BYTES: Final = 8 * 1024 * 1024  # forty thousand keys
MIN_RATE: Final = 0.001  # a request in 17 hours; less is a mistake, or a number near no number
PREFIX: Final = "sk-llmux-"
_KNOWN: Final = (
    "name", "sha256", "role", "models", "max_in_flight", "max_waiting", "requests_per_minute",
)  # fmt: skip


def load_keys(path: str) -> tuple[Key, ...]:
    """Raise ConfigError, which never quotes the file, when any key is wrong."""
    try:
        text = read_small(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError((_problem(path, 1, f"cannot read the keys: {cause}"),)) from None
    keys: list[Key] = []
    problems: list[Problem] = []
    for line, entry in _entries(path, text, problems):
        try:
            key = _key(entry)
            if any(key.name == other.name for other in keys):
                raise ValueError(f"there is another key called {key.name}")
            keys.append(key)
        except ValueError as error:
            problems.append(_problem(path, line, str(error)))
    if problems:
        raise ConfigError(tuple(problems))
    return tuple(keys)


def make_key(
    name: str,
    *,
    role: KeyRole = KeyRole.USE,
    models: tuple[str, ...] = (),
    max_in_flight: int | None = None,
    max_waiting: int | None = None,
    requests_per_minute: float | None = None,
) -> tuple[str, str]:
    """Return (the key, its line for the file)."""
    secret = PREFIX + secrets.token_urlsafe(32)
    entry: dict[str, Any] = {"name": name, "sha256": hash_key(secret).hex(), "role": role.value}
    if models:
        entry["models"] = list(models)
    if max_in_flight is not None:
        entry["max_in_flight"] = max_in_flight
    if max_waiting is not None:
        entry["max_waiting"] = max_waiting
    if requests_per_minute is not None:
        entry["requests_per_minute"] = requests_per_minute
    _key(entry)
    return secret, json.dumps(entry)


def without_key(text: str, name: str) -> str:
    """The file's text without the key. Comments stay where it has a line for each key; a YAML list
    is written again as such lines."""
    lines = text.splitlines(keepends=True)
    objects = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if all(line.lstrip().startswith("{") for line in objects):
        return "".join(
            line for line in lines if line not in objects or json.loads(line).get("name") != name
        )
    kept = [entry for entry in yaml.safe_load(text) if entry["name"] != name]
    return "".join(f"{json.dumps(entry)}\n" for entry in kept)


def hash_key(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _entries(path: str, text: str, problems: list[Problem]) -> Iterator[tuple[int, object]]:
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if all(line.startswith("{") for _, line in lines):
        for number, line in lines:
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                problems.append(_problem(path, number, "this line is not a JSON object"))
        return
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2026-02-31
        mark = getattr(error, "problem_mark", None)
        number = mark.line + 1 if mark else 1
        problems.append(_problem(path, number, "neither YAML nor one JSON object a line"))
        return
    if not isinstance(document, list):
        problems.append(_problem(path, 1, "expected a list of keys"))
        return
    for entry in document:
        yield 1, entry


def _key(entry: object) -> Key:
    if not isinstance(entry, Mapping):
        raise ValueError("a key is a mapping with name and sha256")
    unknown = sorted(str(name) for name in entry if name not in _KNOWN)
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)[:80]} (a key has {', '.join(_KNOWN)})")
    name, digest = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
        raise ValueError("name: expected 1 to 100 printable characters")
    try:
        hashed = bytes.fromhex(digest) if isinstance(digest, str) else b""
    except ValueError:
        hashed = b""
    if len(hashed) != hashlib.sha256().digest_size:
        raise ValueError(f"{name}: sha256: expected 64 hexadecimal digits (llmux key new makes it)")
    role = entry.get("role", "use")
    if role not in tuple(KeyRole):
        raise ValueError(f"{name}: role: expected use or admin")
    models = entry.get("models")
    if models is not None and not (
        isinstance(models, list) and all(isinstance(model, str) for model in models)
    ):
        raise ValueError(f"{name}: models: expected a list of model names")
    return Key(
        name,
        hashed,
        KeyRole(role),
        None if models is None else frozenset(models),
        _limit(name, entry, "max_in_flight", whole=True),
        _limit(name, entry, "requests_per_minute", whole=False),
        _limit(name, entry, "max_waiting", whole=True),
    )


def _limit(key: str, entry: Mapping[Any, Any], name: str, *, whole: bool) -> Any:
    value = entry.get(name)
    if value is None:
        return None
    good = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not good or isinstance(value, bool) or not (1 if whole else MIN_RATE) <= value < 1e9:
        expected = "a number above 0" if whole else f"a number from {MIN_RATE} to below 1e9"
        raise ValueError(f"{key}: {name}: expected {expected}")
    return value


def _problem(path: str, line: int, message: str) -> Problem:
    return Problem(path, line, 1, "", message)
