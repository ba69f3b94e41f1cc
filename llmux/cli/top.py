"""``llmux top``: GPUs, orders and models in the terminal, drawn once a second.

``lines`` makes the screen from a status, without a terminal; the rest shows it with curses.
"""

from __future__ import annotations

import argparse
import curses
import os
import sys
from collections.abc import Mapping, Sequence
from time import monotonic, strftime
from typing import Any, Final

from llmux.cli.client import ask
from llmux.cli.output import cut, size, span
from llmux.cli.ps import explanation, queue, table
from llmux.errors import ControlError, LlmuxError

REFRESH_MS: Final = 1000
ASK_SECS: Final = 5.0
# States in which a model claims its whole share; a parked one keeps what it is seen to hold.
AWAKE: Final = frozenset({"serving", "draining", "starting", "waking", "parking", "stopping"})
ORDER: Final = {"failed": 0, "starting": 1, "waking": 1, "draining": 1, "parking": 1,
                "stopping": 1, "serving": 2}  # fmt: skip
BAR: Final = (10, 40)  # least and most cells
NARROW: Final = 64  # columns below which a model has lines of its own in place of a table
REDRAW: Final = 12  # Ctrl-L
HELP: Final = "q quit  ↑↓ scroll"

Status = Mapping[str, Any]


def top(args: argparse.Namespace) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LlmuxError("cannot draw: not a terminal", hint="llmux ps")
    first = ask(args.socket, "status", timeout=ASK_SECS)
    os.environ.setdefault("ESCDELAY", "25")
    try:
        curses.wrapper(lambda screen: _run(screen, args.socket, first))
    except curses.error as error:
        raise LlmuxError(f"cannot draw on this terminal: {error}", hint="llmux ps") from error


def _run(screen: curses.window, socket: str, status: Status) -> None:
    colours = _colours()
    curses.curs_set(0) if curses.tigetstr("civis") else None
    screen.timeout(REFRESH_MS)
    offset, problem, asked = 0, "", monotonic()
    while True:
        height, width = screen.getmaxyx()
        text = lines(status, width)
        offset = max(0, min(offset, len(text) - (height - 1)))
        foot = problem or f"{strftime('%H:%M:%S')}  {HELP}"
        _draw(screen, text[offset : offset + height - 1], foot, colours)
        key = screen.getch()
        if key in (ord("q"), ord("Q"), 27):
            return
        if key == REDRAW:
            screen.clearok(True)
        offset += _scroll(key, height)
        if key == ord(" ") or monotonic() - asked >= REFRESH_MS / 1000:
            asked = monotonic()
            try:
                status, problem = ask(socket, "status", timeout=ASK_SECS), ""
            except ControlError as error:  # it may be restarting: what is shown is of before
                problem = printable(str(error))


def _scroll(key: int, height: int) -> int:
    page = max(1, height - 3)
    moves = {curses.KEY_UP: -1, ord("k"): -1, curses.KEY_DOWN: 1, ord("j"): 1,
             curses.KEY_PPAGE: -page, curses.KEY_NPAGE: page, curses.KEY_HOME: -10**6,
             curses.KEY_END: 10**6}  # fmt: skip
    return moves.get(key, 0)


def _colours() -> Mapping[str, int]:
    if os.environ.get("NO_COLOR") or not curses.has_colors():
        return {}
    curses.use_default_colors()
    chosen = {"serving": curses.COLOR_GREEN, "failed": curses.COLOR_RED}
    chosen |= dict.fromkeys(
        ("starting", "waking", "draining", "parking", "stopping"), curses.COLOR_YELLOW
    )
    made = {}
    for number, (state, colour) in enumerate(chosen.items(), 1):
        curses.init_pair(number, colour, -1)
        made[state] = curses.color_pair(number)
    return made


def _draw(
    screen: curses.window, text: Sequence[str], foot: str, colours: Mapping[str, int]
) -> None:
    screen.erase()
    height, width = screen.getmaxyx()
    for row, line in enumerate(text[: height - 1]):
        words = line.split(maxsplit=2)
        state = words[1] if len(words) > 1 else ""
        attribute = colours.get(state, 0) | (curses.A_BOLD if words[:1] == ["MODEL"] else 0)
        _write(screen, row, line, width, attribute)
    _write(screen, height - 1, foot, width, curses.A_REVERSE)
    screen.refresh()


def _write(screen: curses.window, row: int, line: str, width: int, attribute: int) -> None:
    """The last cell of the screen cannot be written without an error of curses'."""
    if row >= 0 and width > 1:
        screen.addnstr(row, 0, cut(line, width - 1), width - 1, attribute)


# ---- the screen, as text ------------------------------------------------------------------------


def lines(status: Status, width: int) -> list[str]:
    """The whole screen, each line no longer than ``width``."""
    models: Mapping[str, Mapping[str, Any]] = status["models"]
    made = [_title(status, width)]
    made += [_gpu(index, status, width) for index in range(int(status["gpu_count"]))]
    if status["gpu_observer"] != "ok":
        made.append(f"GPU memory cannot be seen: {status['gpu_observer']}")
    for order in status["orders"]:
        made.append(
            f"order {order['id']}: {order['verb']} {' '.join(order['models'])},"
            f" by {order['by']}, for {span(order['since_secs'])}"
        )
    ordered = {name: models[name] for name in sorted(models, key=lambda name: _rank(models[name]))}
    made.append("")
    if width < NARROW:
        made += [line for name, model in ordered.items() for line in _entry(name, model, width)]
    else:
        made += table(_short_named(ordered, width // 3), width)
    return [cut(printable(line), width) for line in made]


def _rank(model: Mapping[str, Any]) -> tuple[int, float]:
    """What needs a look first: failures, what moves, what serves, whom requests wait for."""
    waits = -float(model["oldest_wait_secs"] or 0) if model["queue_depth"] else 1.0
    return (ORDER.get(model["state"], 3 if model["queue_depth"] else 4), waits)


def _entry(name: str, model: Mapping[str, Any], width: int) -> list[str]:
    """A model on a narrow terminal: its state, and below it what there is to say."""
    state = str(model["state"])
    named = _shortened(name, max(1, width - len(state) - 1))
    words = []
    if model["in_flight"]:
        words.append(f"{model['in_flight']} in flight")
    if model["queue_depth"]:
        words.append(f"{queue(model)} waiting")
    if why := explanation(model):
        words.append(why)
    entry = [f"{named.ljust(width - len(state) - 1)} {state}"]
    return [*entry, *([f"  {', '.join(words)}"] if words else [])]


def _short_named(
    models: Mapping[str, Mapping[str, Any]], most: int
) -> Mapping[str, Mapping[str, Any]]:
    """By names of at most so many characters, unless two would be the same."""
    short = {_shortened(name, most): model for name, model in models.items()}
    return short if len(short) == len(models) else models


def _shortened(name: str, most: int) -> str:
    """Its middle is left out: quantizations and sizes are at the end."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[len(name) - end :]}"


def _title(status: Status, width: int) -> str:
    models = status["models"].values()
    waiting = sum(model["queue_depth"] for model in models)
    running = sum(model["in_flight"] for model in models)
    mode = status["mode"]
    pinned = f", pinned: {mode['pinned']}" if "pinned" in mode else ""
    counts = f"{len(models)} models  {running} in flight  {waiting} waiting  {mode['mode']}{pinned}"
    return counts if width < NARROW else f"llmux: {status['state']}  {counts}"


def _gpu(index: int, status: Status, width: int) -> str:
    """A bar of what is claimed: # where memory is seen in use, + claimed and free, ~ of others."""
    here = {n: m for n, m in status["models"].items() if index in m["gpus"]}
    awake = {name: model for name, model in here.items() if model["state"] in AWAKE}
    claimed = min(1.0, sum(model["gpu_memory"] for model in awake.values()))
    seen = next((gpu for gpu in status["gpus"] if gpu["index"] == index), None)
    cells = max(BAR[0], min(BAR[1], width // 4))
    names = ", ".join([*awake, *(n for n in _holding(here) if n not in awake)]) or "free"
    if seen is None or not seen["total_bytes"]:
        bar = "+" * round(claimed * cells)
        return f"GPU {index} [{bar.ljust(cells)}] {claimed:.0%} claimed  {names}"
    total = seen["total_bytes"]
    ours = round(seen["engines_bytes"] / total * cells)
    others = round((seen["used_bytes"] - seen["engines_bytes"]) / total * cells)
    free = max(0, round(claimed * cells) - ours)
    bar = ("#" * ours + "+" * free + "~" * others)[:cells]
    used = f"{size(seen['used_bytes'])} of {size(total)}"
    if width < NARROW:
        used = size(seen["used_bytes"])
    return f"GPU {index} [{bar.ljust(cells)}] {used}  {names}"


def _holding(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name, model in models.items() if model["gpu_bytes"]]


def printable(text: str) -> str:
    """Without control characters: an engine's words must not steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)
