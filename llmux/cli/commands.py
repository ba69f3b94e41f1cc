"""The verbs: ask the supervisor or check here, print. ``--json`` for machines."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from llmux import __version__
from llmux.cli.client import ask
from llmux.errors import ConfigError, LlmuxError

Command = Callable[[argparse.Namespace], int | None]


# ---- daemons ------------------------------------------------------------------------------------


def supervise(args: argparse.Namespace) -> None:
    from llmux import daemon

    daemon.setup_logging(args.verbose)
    _run(daemon.supervise(args.config))


def gateway(args: argparse.Namespace) -> None:
    from llmux import daemon

    daemon.setup_logging(args.verbose)
    try:
        daemon.gateway(args.config)
    except OSError as error:
        raise _cannot_run(error) from error


def serve(args: argparse.Namespace) -> None:
    from llmux import daemon

    daemon.setup_logging(args.verbose)
    port, control = getattr(args, "port", None), getattr(args, "socket", None)
    _run(daemon.serve(args.config, port=port, control=control))


def _run(work: Any) -> None:
    from llmux import daemon

    try:
        daemon.run(work)
    except OSError as error:
        raise _cannot_run(error) from error


def _cannot_run(error: OSError) -> LlmuxError:
    where = f"{error.filename}: " if error.filename else ""
    return LlmuxError(f"cannot run: {where}{error.strerror or error}")


# ---- local --------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> int:
    from llmux.config.host import check_host
    from llmux.config.load import load_marked

    try:
        marked = load_marked(args.config)
        host = check_host(marked.config, marked.marks) if args.host else ()
        if host:
            raise ConfigError(host)
    except ConfigError as error:
        if args.json:
            print(json.dumps({"ok": False, "problems": [_problem(p) for p in error.problems]}))
            return 78
        raise
    config = marked.config
    if args.json:
        notes = [_problem(note) for note in marked.notes]
        print(json.dumps({"ok": True, "models": list(config.models), "notes": notes}))
    else:
        count = len(config.models)
        print(f"{args.config}: good, {count} model{'s' if count != 1 else ''}")
        for note in marked.notes:
            print(f"note: {note}")
    return 0


def _problem(problem: Any) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("file", "line", "column", "path", "message")}


def doctor(args: argparse.Namespace) -> int:
    """The configuration tells what is needed; without a good one the host is looked at alone."""
    from llmux import daemon
    from llmux.cli.doctor import doctor as show
    from llmux.config.load import load_config

    config = None
    try:
        config = load_config(args.config, check_files=False)
    except LlmuxError as error:
        print(f"llmux: the host only, without a configuration: {error}", file=sys.stderr)
    return show(config, as_json=args.json, run_checks=daemon.look_at_host)


def version(args: argparse.Namespace) -> None:
    print(json.dumps({"version": __version__}) if args.json else f"llmux {__version__}")


# ---- asking the supervisor ----------------------------------------------------------------------


def ps(args: argparse.Namespace) -> None:
    result = ask(args.socket, "status")
    if args.json:
        print_json(result["models"])
        return
    rows = [("MODEL", "STATE", "SINCE", "PARKED AS", "WAITING", "IN FLIGHT", "GPUS", "PID", "")]
    rows += [
        (
            name,
            model["state"],
            span(model["since_secs"]),
            model["parked_as"] or "-",
            str(model["queue_depth"]),
            str(model["in_flight"]),
            ",".join(map(str, model["gpus"])) or "-",
            str(model["pid"] or "-"),
            (model["message"] or "").split("\n")[0],
        )
        for name, model in sorted(result["models"].items())
    ]
    print_table(rows)


def status(args: argparse.Namespace) -> None:
    result = ask(args.socket, "status")
    if args.json:
        print_json(result)
        return
    mode = result["mode"]
    models = result["models"].values()
    states = sorted(Counter(model["state"] for model in models).items())
    waiting, in_flight = (sum(m[of] for m in models) for of in ("queue_depth", "in_flight"))
    print_table(
        [
            ("state", result["state"]),
            ("mode", mode["mode"] + (f", pinned to {mode['pinned']}" if "pinned" in mode else "")),
            ("models", ", ".join(f"{count} {state}" for state, count in states) or "none"),
            ("requests", f"{waiting} waiting, {in_flight} in flight"),
            ("gateway", f"{result['workers']} worker{'s' if result['workers'] != 1 else ''}"),
        ]
    )


def load(args: argparse.Namespace) -> None:
    _order(args, "load", {"model": args.model})


def unload(args: argparse.Namespace) -> None:
    _order(args, "unload", {"model": args.model})


def sleep(args: argparse.Namespace) -> None:
    _order(args, "sleep", {"model": args.model, "eviction": args.eviction})


def pin(args: argparse.Namespace) -> None:
    _order(args, "pin", {"model": args.model})


def unpin(args: argparse.Namespace) -> None:
    _order(args, "unpin", {})


def reload(args: argparse.Namespace) -> None:
    result = _order(args, "reload", {})
    if args.json:
        return
    for what in ("added", "removed", "changed"):
        if names := result.get(what):
            print(f"{what}: {', '.join(names)}")
    for unit in ("gateway", "supervisor"):
        if settings := result.get(f"restart_{unit}_for"):
            service = "llmux-gateway" if unit == "gateway" else "llmux"
            print(f"not in force before `systemctl restart {service}`: {', '.join(settings)}")


def _order(args: argparse.Namespace, verb: str, values: dict[str, Any]) -> Any:
    result = ask(args.socket, verb, {k: v for k, v in values.items() if v is not None})
    if args.json:
        print_json(result)
    else:
        print(result["message"])
    return result


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f}s"
    if seconds < 7200:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.0f}h"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
