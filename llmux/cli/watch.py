"""``llmux events`` and ``llmux logs``: what was, and with --follow what comes."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from llmux.cli.client import ask
from llmux.errors import ControlError
from llmux.protocol import Hello, News, Watch, decode


def follow(path: str, watch: Watch, verb: str, args: Mapping[str, Any]) -> Iterator[Any]:
    """The verb's result, then every item of news, for ever. What comes while the question is asked
    may be in both."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with suppress(OSError):  # the question says what is wrong
            sock.connect(path)
            sock.sendall(Hello(role="cli").encode() + watch.encode())
        yield ask(path, verb, args)
        with sock.makefile("rb") as lines:
            for line in lines:
                message = decode(line)
                if isinstance(message, News):
                    yield message.item
    raise ControlError("the supervisor went away", hint="`systemctl status llmux`")


def events(args: argparse.Namespace) -> None:
    if not args.follow:
        for event in ask(args.socket, "events")["events"]:
            _print_event(event, args.json)
        return
    items = follow(args.socket, Watch("events"), "events", {})
    last = 0
    for event in next(items)["events"]:
        _print_event(event, args.json)
        last = event["id"]
    for event in items:
        if event["id"] > last:
            _print_event(event, args.json)


def logs(args: argparse.Namespace) -> None:
    question = {"model": args.model, "lines": args.lines}
    if not args.follow:
        _print_lines(ask(args.socket, "logs", question)["lines"], args.json)
        return
    items = follow(args.socket, Watch("logs", args.model), "logs", question)
    _print_lines(next(items)["lines"], args.json, follow=True)
    for line in items:
        _print_lines([line], args.json, follow=True)


def _print_lines(lines: list[str], as_json: bool, *, follow: bool = False) -> None:
    if as_json and not follow:
        print(json.dumps({"lines": lines}, indent=2))
        return
    for line in lines:
        print(json.dumps({"line": line}) if as_json else line, flush=follow)


def _print_event(event: Mapping[str, Any], as_json: bool) -> None:
    print(json.dumps(event) if as_json else describe(event), flush=True)


def describe(event: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S.%f")[:-3]
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
    return f"{when} {model}: {event['type']}"
