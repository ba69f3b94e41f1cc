"""Orders for one or several models, given at the same time; what each model does is shown on a
terminal until all have ended.

An order is withdrawn with the command that gave it: at ``--timeout``, or when it is interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, TextIO

from llmux.cli.client import Question, ask
from llmux.cli.output import as_json, cut, failure, span
from llmux.cli.ps import explanation
from llmux.errors import LlmuxError, OrderTimeout

LOOK_SECS: Final = 0.5  # between two looks at the status, on a terminal only
ERASE: Final = "\r\x1b[K"  # ECMA-48: erase to the end of the line
UP: Final = "\x1b[A"


@dataclass(slots=True, eq=False)
class Order:
    """One model's: runs in a thread of its own until it is answered."""

    model: str
    question: Question
    ended: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: LlmuxError | None = None
    crash: Exception | None = None  # what nobody expected

    def run(self) -> None:
        try:
            self.result = self.question.answer()
        except LlmuxError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 (raised again where the command ends by it)
            self.crash = error
        finally:
            self.ended.set()

    def as_json(self) -> Any:
        return self.result if self.error is None else failure(self.error)


def order(args: argparse.Namespace, verb: str, values: Mapping[str, Any]) -> None:
    """Give the order for each of the models. Raises the error of the first that failed, after all
    have ended."""
    names = args.model
    if args.all:
        names = sorted(ask(args.socket, "status")["models"])
    if not names:
        raise LlmuxError(f"cannot {verb}: no model is named", hint="name models, or use --all")
    if args.no_wait:
        values = {**values, "wait": False}
    orders = [
        Order(name, Question(args.socket, verb, {**values, **_named(verb, name)}))
        for name in dict.fromkeys(names)
    ]
    carry_out(args, orders)
    if args.json:
        found = {one.model: one.as_json() for one in orders}
        print(as_json(found if len(orders) > 1 else found[orders[0].model]))
        args.answered = True  # failures are in it
    report(orders, quiet=args.json)


def _named(verb: str, name: str) -> dict[str, Any]:
    """A pin of one ``model`` alone is the earlier system's, with manual mode."""
    return {"models": [name]} if verb == "pin" else {"model": name}


def report(orders: Sequence[Order], *, quiet: bool) -> None:
    failed = [one for one in orders if one.error is not None]
    for one in orders:
        if one.error is None and not quiet:
            print(one.result["message"])
        elif one.error is not None and one is not failed[0]:
            print(f"llmux: {one.error}", file=sys.stderr)
    if failed and (error := failed[0].error) is not None:
        raise error


def carry_out(args: argparse.Namespace, orders: Sequence[Order]) -> None:
    """Give them and wait until all have ended; raises what nobody expected of any."""
    threads = [threading.Thread(target=one.run, daemon=True) for one in orders]
    deadline = None if args.timeout is None else monotonic() + args.timeout
    view = View(sys.stderr) if sys.stderr.isatty() and not args.json else None
    for thread in threads:
        thread.start()
    try:
        _wait(args.socket, orders, deadline, view)
    except KeyboardInterrupt:
        for one in orders:
            one.question.abandon()
        raise
    finally:
        if view is not None:
            view.clear()
    for one in orders:
        if one.crash is not None:
            raise one.crash


def _wait(path: str, orders: Sequence[Order], deadline: float | None, view: View | None) -> None:
    began = monotonic()
    while waiting := [one for one in orders if not one.ended.is_set()]:
        left = None if deadline is None else deadline - monotonic()
        if left is not None and left <= 0:
            _give_up(waiting)
            return
        if view is not None:
            view.show(_looks(path, waiting, monotonic() - began))
            left = LOOK_SECS if left is None else min(left, LOOK_SECS)
        waiting[0].ended.wait(left)


def _give_up(waiting: Sequence[Order]) -> None:
    for one in waiting:
        one.question.abandon()
        one.ended.wait()
        one.error = OrderTimeout(
            f"cannot wait longer for {one.model}: the order was withdrawn",
            hint="--timeout was over; `llmux ps` shows what it waited for",
        )


def _looks(path: str, waiting: Sequence[Order], seconds: float) -> list[str]:
    """A line for each model that is waited for; none while the supervisor does not answer."""
    try:
        models = ask(path, "status")["models"]
    except LlmuxError:
        return []
    lines = []
    for one in waiting:
        if (model := models.get(one.model)) is not None:
            text = explanation(model)
            lines.append(
                f"{one.model}: {model['state']}{f', {text}' if text else ''}  ({span(seconds)})"
            )
    return lines


class View:
    """Lines that are written again in place."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown = 0

    def show(self, lines: Sequence[str]) -> None:
        width = shutil.get_terminal_size().columns
        self.clear()
        for line in lines:
            self._out.write(f"{cut(line, width)}\n")
        self._out.flush()
        self._shown = len(lines)

    def clear(self) -> None:
        self._out.write((UP + ERASE) * self._shown)
        self._out.flush()
        self._shown = 0
