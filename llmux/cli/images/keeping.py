"""``llmux images``: list checkpoint images, remove them, remove those that fit nothing any more."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from llmux.cli.client import ask
from llmux.cli.output import print_json, print_table, size, span

Verb = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]

_MISMATCH: Final = re.compile(r"does not fit: ([\w.]+) was ")
# What changed since the dump, by the first part of the identity's name for it.
_CHANGED: Final = {
    "boot_id": "the host was rebooted",
    "kernel": "another kernel",
    "processor": "another processor",
    "driver": "another GPU driver",
    "arguments": "other arguments",
    "user": "another user",
    "env": "another environment",
    "revision": "the model has changed",
    "file": "the model has changed",
    "model_path": "another model",
}


def add_arguments(client: Verb) -> None:
    client("ls", list_images, "list images and whether each can be restored")
    remove = client("rm", remove_images, "remove models' images")
    remove.add_argument("model", metavar="MODEL", nargs="+")
    client("prune", prune, "remove images that fit nothing any more")


def in_words(state: str) -> str:
    """Why an image cannot be restored, in a few words; --json has the whole of it."""
    if (found := _MISMATCH.search(state)) is not None:
        name = found.group(1)
        first = re.split(r"[._]", name)[0]
        return f"stale: {_CHANGED.get(name) or _CHANGED.get(first) or f'{name} changed'}"
    if "was never completed" in state or "does not exist" in state:
        return "missing or incomplete"
    if "cannot be used" in state or "failed before" in state:
        return "damaged"
    return state if len(state) <= 40 else f"{state[:39]}…"


def rows_of(rows: list[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        ("MODEL", "EVICTION", "ON DISK", "SIZE", "AGE", "DUMP", "STATE", "PATH")
    ]
    table += [
        (
            row["model"],
            row["eviction"] or "-",
            "-" if row["disk_bytes"] is None else size(row["disk_bytes"]),
            "-" if row["apparent_bytes"] is None else size(row["apparent_bytes"]),
            "-" if row["age_secs"] is None else span(row["age_secs"]),
            "-" if row["dump_secs"] is None else f"{row['dump_secs']:.1f} s",
            in_words(row["state"]),
            row["path"],
        )
        for row in rows
    ]
    return table


def list_images(args: argparse.Namespace) -> None:
    show(ask(args.socket, "images")["images"], as_json=args.json)


def show(rows: list[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
    elif not rows:
        print("no images")
    else:
        print_table(rows_of(rows))


def remove_images(args: argparse.Namespace) -> None:
    results = {name: ask(args.socket, "image_remove", {"model": name}) for name in args.model}
    if args.json:
        print_json(results)
        return
    for result in results.values():
        print(result["message"])


def prune(args: argparse.Namespace) -> None:
    result = ask(args.socket, "image_prune")
    if args.json:
        print_json(result)
        return
    for row in result["removed"]:
        print(f"{row['model']}: {in_words(row['state'])}, {size(row['disk_bytes'])} freed")
    print(result["message"])
