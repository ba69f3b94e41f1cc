"""``llmux ps``: models and their states, as a table that fits the terminal."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmux.cli.client import ask
from llmux.cli.output import aligned, as_json, cut, size, span
from llmux.errors import LlmuxError

Model = Mapping[str, Any]

GAP: Final = 2  # between columns
LEAST_WHY: Final = 24  # columns go before the last one is cut shorter than this
HOME: Final = "\x1b[H\x1b[J"  # ECMA-48: to the top left, erase to the end
_FIELD: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Column:
    """``dropped``: which of the columns go first where the table is too wide; 0 = never."""

    head: str
    cell: Callable[[str, Model], str]
    dropped: int = 0


def parking(model: Model) -> str:
    return str(model["parked_as"] or model["eviction"])


def idle(model: Model) -> str:
    seconds = model["idle_secs"]
    return "-" if seconds is None else "now" if seconds == 0 else span(seconds)


def queue(model: Model) -> str:
    """The waiting requests, with the age of the oldest."""
    age = model["oldest_wait_secs"]
    return f"{model['queue_depth']}" + ("" if age is None else f" ({span(age)})")


def held(model: Model) -> str:
    """GPU memory, and host memory behind it."""
    parts = [model["gpu_bytes"], model["ram_bytes"]]
    return "/".join("-" if part is None else size(part).replace(" ", "") for part in parts)


def explanation(model: Model) -> str:
    """What the model does or waits for: its phase, or why it is where it is."""
    parts = []
    if model["phase"] is not None:
        parts.append(_phase(model))
        if model["writing_image"]:
            parts.append("its GPU is free already")
    elif model["why"]:
        parts.append(str(model["why"]))
    if model["pinned"]:
        parts.append("pinned")
    if model["stale"]:
        parts.append("older than its configuration: llmux restart")
    return "; ".join(parts)


def _phase(model: Model) -> str:
    text = str(model["phase_text"])
    progress = model["progress"]
    if progress is not None:
        counts = [progress["done"], progress["total"]]
        shown = [size(n) if progress["unit"] == "bytes" else str(n) for n in counts]
        text += f" {shown[0]}" + (f" of {shown[1]}" if counts[1] else "")
        text += "" if progress["unit"] == "bytes" else f" {progress['unit']}"
    if model["left_secs"] is not None:
        text += f", about {span(model['left_secs'])} left"
    elif model["usual_secs"] is not None:
        text += f", usually done after {span(model['usual_secs'])}"
    return text


COLUMNS: Final = (
    Column("MODEL", lambda name, _: name),
    Column("STATE", lambda _, model: str(model["state"])),
    Column("SINCE", lambda _, model: span(model["since_secs"]), 6),
    Column("WAITING", lambda _, model: queue(model)),
    Column("IN FLIGHT", lambda _, model: str(model["in_flight"])),
    Column("IDLE", lambda _, model: idle(model), 5),
    Column("GPUS", lambda _, model: ",".join(map(str, model["gpus"])) or "-", 4),
    Column("GPU/RAM", lambda _, model: held(model), 7),
    Column("PARKING", lambda _, model: parking(model), 3),
    Column("IMAGE", lambda _, model: "yes" if model["image"] else "-", 1),
    Column("PID", lambda _, model: str(model["pid"] or "-"), 2),
    Column("WHY", lambda _, model: explanation(model)),
)


def ps(args: argparse.Namespace) -> None:
    while True:
        status = ask(args.socket, "status")
        text = "\n".join([*_lines(args, status["models"]), *_blindness(args, status)])
        if args.watch is None:
            if text:
                print(text)
            return
        sys.stdout.write(f"{HOME}{text}\n" if sys.stdout.isatty() else f"{text}\n")
        sys.stdout.flush()
        time.sleep(args.watch)


def _lines(args: argparse.Namespace, models: Mapping[str, Model]) -> list[str]:
    chosen = {name: models[name] for name in args.model or sorted(models) if name in models}
    if missing := [name for name in args.model or () if name not in models]:
        raise LlmuxError(f"cannot show {missing[0]}: no such model", hint="llmux ps -q")
    if args.json:
        return [as_json(chosen)]
    if args.quiet:
        return list(chosen)
    if args.format is not None:
        return [formatted(args.format, name, model) for name, model in chosen.items()]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return table(chosen, width)


def _blindness(args: argparse.Namespace, status: Mapping[str, Any]) -> list[str]:
    """A line below the table while GPU memory cannot be seen."""
    observer = status.get("gpu_observer", "ok")
    if observer == "ok" or args.json or args.quiet or args.format is not None:
        return []
    return [f"GPU memory cannot be seen, so no GPU that is left counts as free: {observer}"]


def formatted(template: str, name: str, model: Model) -> str:
    """``{field}`` replaced by the field of ``ps --json``; "name" is the model's."""
    values = {"name": name, **model}

    def value(found: re.Match[str]) -> str:
        field = found.group(1)
        if field not in values:
            known = ", ".join(sorted(values))
            raise LlmuxError(f"cannot print {{{field}}}: no such field", hint=f"one of {known}")
        one = values[field]
        return "-" if one is None else str(one)

    return _FIELD.sub(value, template).replace("\\t", "\t").replace("\\n", "\n")


def table(models: Mapping[str, Model], width: int | None) -> list[str]:
    """The table's lines; where they are longer than ``width``, the least important columns are
    left out and the last one is cut."""
    columns = list(COLUMNS)
    while width is not None and _width(columns[:-1], models) + LEAST_WHY > width:
        candidates = [column for column in columns if column.dropped]
        if not candidates:
            break
        columns.remove(min(candidates, key=lambda column: column.dropped))
    rows = [[column.head for column in columns]]
    rows += [[column.cell(name, model) for column in columns] for name, model in models.items()]
    lines = aligned(rows)
    return lines if width is None else [cut(line, width) for line in lines]


def _width(columns: Sequence[Column], models: Mapping[str, Model]) -> int:
    return sum(
        GAP + max([len(column.head), *(len(column.cell(n, m)) for n, m in models.items())])
        for column in columns
    )
