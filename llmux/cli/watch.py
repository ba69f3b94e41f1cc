"""``llmux events`` and ``llmux logs``: print the last items; --follow continues."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, NoReturn

from llmux.cli.client import ask
from llmux.errors import ControlError, LlmuxError
from llmux.names import identifier
from llmux.printable import printable_tree
from llmux.protocol import Hello, News, Watch, decode
from llmux.typed_json import fits


def follow(path: str, watches: Sequence[Watch], first: Callable[[], Any]) -> Iterator[Any]:
    """Yield what ``first`` returns, then every News. Items that arrive in between may be in
    both."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with suppress(OSError):  # ``first`` reports the cause
            sock.connect(path)
            sock.sendall(Hello(role="cli").encode() + b"".join(one.encode() for one in watches))
        yield first()
        with sock.makefile("rb") as lines:
            for line in lines:
                message = decode(line)
                if isinstance(message, News):
                    yield replace(message, item=printable_tree(message.item))
    raise ControlError("the supervisor went away", hint="`systemctl status llmux`")


def events(args: argparse.Namespace) -> None:
    if not args.follow:
        for event in ask(args.socket, "events")["events"]:
            _print_event(event, args.json)
        return
    items = follow(args.socket, [Watch("events")], lambda: ask(args.socket, "events"))
    last = 0
    for event in next(items)["events"]:
        _print_event(event, args.json)
        last = _number(event, last)
    for news in items:
        if _number(news.item, last + 1) > last:
            _print_event(news.item, args.json)


def _number(event: Mapping[str, Any], otherwise: int) -> int:
    number = event.get("id", otherwise)
    return number if fits(int, number) else otherwise


def logs(args: argparse.Namespace) -> None:
    if args.since is not None:
        _from_journal(args)
    names = args.model or sorted(ask(args.socket, "status")["models"])
    show = _Lines(args.json, prefixed=len(names) > 1 or not args.model)

    def last() -> None:
        for name in names:
            question = {"model": name, "lines": args.lines}
            if args.previous:
                question["previous"] = True
            lines = ask(args.socket, "logs", question)["lines"]
            if args.previous and not lines and not args.json:
                print(f"{name}: nothing is kept of an engine before this one", file=sys.stderr)
            show.all(name, lines, follow=args.follow)

    if not args.follow:
        last()
        show.end()
        return
    items = follow(args.socket, [Watch("logs", name) for name in names], last)
    next(items)
    for news in items:
        show.line(news.model, news.item)


def _from_journal(args: argparse.Namespace) -> NoReturn:
    """The engines' files have no times; the journal has. Does not return."""
    command = ["journalctl", "--quiet", "--output=short-iso", f"--since={args.since}"]
    names = args.model or sorted(ask(args.socket, "status")["models"])
    command += [f"SYSLOG_IDENTIFIER={identifier(name)}" for name in names]
    command += ["--follow"] if args.follow else []
    try:
        os.execvp(command[0], command)  # noqa: S606  # no shell is wanted
    except OSError as error:
        raise LlmuxError(
            f"cannot read the journal: {error.strerror}", hint="leave --since out"
        ) from None


class _Lines:
    """Prints lines of one or several models."""

    def __init__(self, as_json: bool, *, prefixed: bool) -> None:
        self._json = as_json
        self._prefixed = prefixed
        self._kept: dict[str, list[str]] = {}

    def all(self, model: str, lines: list[str], *, follow: bool) -> None:
        if self._json and not follow:
            self._kept[model] = lines
            return
        for line in lines:
            self.line(model, line)

    def line(self, model: str, line: str) -> None:
        if self._json:
            text = json.dumps({"model": model, "line": line} if self._prefixed else {"line": line})
        else:
            text = f"{model}: {line}" if self._prefixed else line
        print(text, flush=True)

    def end(self) -> None:
        if not self._json:
            return
        if self._prefixed:
            print(
                json.dumps({name: {"lines": lines} for name, lines in self._kept.items()}, indent=2)
            )
        else:
            (lines,) = self._kept.values()
            print(json.dumps({"lines": lines}, indent=2))


def _print_event(event: Mapping[str, Any], as_json: bool) -> None:
    print(json.dumps(event) if as_json else describe(event), flush=True)


def describe(event: Mapping[str, Any]) -> str:
    """One line; of an event that a supervisor of another version says otherwise, as it is."""
    try:
        return _described(event)
    except (LookupError, TypeError, ValueError, OverflowError, OSError):
        return f"an event that this llmux does not know: {json.dumps(event)}"


def _described(event: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(event["time"]).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    model = event["model"]
    if event["type"] == "transition":
        reason = f" ({event['reason']})" if event["reason"] else ""
        lasted = event["duration_secs"]
        after = "" if lasted is None else f" after {lasted:.3f} s"
        return f"{when} {model}: {event['from'] or 'unknown'} → {event['to']}{reason}{after}"
    if event["type"] == "switch":
        victims = f", in place of {', '.join(event['victims'])}" if event["victims"] else ""
        how = "cold" if event["cold"] else "woken"
        return f"{when} {model}: serves after {event['duration_secs']:.3f} s ({how}{victims})"
    if event["type"] == "order":
        order = f"order {event['order']} by {event['by']}"
        return f"{when} {model}: {event['verb']}, {order}: {event['result']}"
    return f"{when} {model}: {event['type']}"
