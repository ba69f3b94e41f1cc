"""``llmux config``: every value in force, with the file and place that it comes from."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from llmux.cli.output import print_table
from llmux.config.files.marks import KeyPath, Marks, dotted
from llmux.config.load import load_marked
from llmux.config.schema import Config
from llmux.engines.options import SECRET_OPTION

SECTIONS = ("policy", "checkpoint", "gateway")
HIDDEN = ("models", "sources", "name", "ladder")  # the ladder is shown as a list of evictions
DEFAULT = "default"
HIDDEN_VALUE = "(hidden)"
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  # in a variable's name


def config(args: argparse.Namespace) -> None:
    marked = load_marked(args.config, check_files=False)
    rows = [
        {"path": dotted(path), "value": value, "source": _source(path, value, marked.marks)}
        for path, value in values(marked.config)
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table([(row["path"], json.dumps(row["value"]), row["source"]) for row in rows])


def values(config: Config) -> Iterator[tuple[KeyPath, Any]]:
    """Every key of the file with its value, as JSON has it."""
    yield from _fields((), config, hidden=SECTIONS)
    for section in SECTIONS:
        yield from _fields((section,), getattr(config, section))
    for name, model in config.models.items():
        for path, value in _fields(("models", name), model):
            if path[-1] == "eviction" and model.ladder:
                yield path, _plain((model.eviction, *model.ladder))
            else:
                yield path, value


def _fields(
    path: KeyPath, owner: Any, hidden: tuple[str, ...] = ()
) -> Iterator[tuple[KeyPath, Any]]:
    for field in fields(owner):
        if field.name not in (*HIDDEN, *hidden):
            yield (*path, field.name), _plain(getattr(owner, field.name))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        before = ("", *value)
        return [
            HIDDEN_VALUE if isinstance(last, str) and SECRET_OPTION.match(last) else _plain(item)
            for last, item in zip(before, value, strict=False)
        ]
    if isinstance(value, Mapping):
        return {k: HIDDEN_VALUE if SECRET.search(k) else _plain(v) for k, v in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _source(path: KeyPath, value: Any, marks: Marks) -> str:
    if path in marks.table:
        return str(marks.table[path])
    inherited: KeyPath = ("policy", "eviction")
    if path[-1] == "eviction" and inherited in marks.table:
        return f"{marks.table[inherited]} ({dotted(inherited)})"
    arguments: KeyPath = (*path[:-1], "extra_args")
    if path[-1] in ("gpus", "gpu_memory") and arguments in marks.table:
        return f"{DEFAULT}, or {dotted(arguments)}"
    return DEFAULT
