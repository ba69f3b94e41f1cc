"""The verbs: run a daemon, ask the supervisor or check here, and print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmux import __version__
from llmux.cli.client import ask
from llmux.cli.order import order
from llmux.cli.output import print_json, print_table, span
from llmux.errors import ConfigError, LlmuxError, Problem

if TYPE_CHECKING:  # reading configurations takes time that the client's verbs need not spend
    from llmux.config.files.marks import Marks
    from llmux.config.schema import Config

Command = Callable[[argparse.Namespace], int | None]


# ---- daemons ------------------------------------------------------------------------------------


def supervise(args: argparse.Namespace) -> None:
    from llmux.daemon.process import setup_logging
    from llmux.daemon.supervise import supervise as work

    setup_logging(args.verbose)
    _run(work(args.config))


def gateway(args: argparse.Namespace) -> None:
    from llmux.daemon.gateway import gateway as work
    from llmux.daemon.process import setup_logging

    setup_logging(args.verbose)
    try:
        work(args.config)
    except OSError as error:
        raise _cannot_run(error) from error


def serve(args: argparse.Namespace) -> None:
    from llmux.daemon.process import setup_logging
    from llmux.daemon.serve import serve as work

    setup_logging(args.verbose)
    port, control = getattr(args, "port", None), getattr(args, "socket", None)
    _run(work(args.config, port=port, control=control))


def _run(work: Any) -> None:
    from llmux.daemon.process import run as run_loop

    try:
        run_loop(work)
    except OSError as error:
        raise _cannot_run(error) from error


def _cannot_run(error: OSError) -> LlmuxError:
    where = f"{error.filename}: " if error.filename else ""
    return LlmuxError(f"cannot run: {where}{error.strerror or error}")


SERVICE_FILES = "/etc/llmux/"

# ---- local --------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> int:
    from llmux.config.advice import WITHOUT_KEYS
    from llmux.config.files.sources import Candidate
    from llmux.config.host import check_gateway_reads, check_host
    from llmux.config.load import load_marked

    path, candidate = args.file or args.config, None
    if args.in_place_of:
        if not args.file:
            raise LlmuxError("cannot check: no file given (llmux check --in-place-of PATH FILE)")
        path = args.config
        candidate = Candidate(Path(args.file), Path(os.path.abspath(args.in_place_of)))
    try:
        marked = load_marked(path, candidate=candidate)
        host = check_host(marked.config, marked.marks) if args.host else ()
        if args.host and not host:  # what is said already would be said again
            host = _closed_to_engines(marked.config, marked.marks)
        # Another user's check, or one of a file elsewhere, says nothing of the service.
        if os.geteuid() == 0 and path.startswith(SERVICE_FILES) and candidate is None:
            host += check_gateway_reads(marked.config, marked.marks)
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
    elif not args.quiet:
        count = len(config.models)
        print(f"{args.file or path}: good, {count} model{'s' if count != 1 else ''}")
        for note in marked.notes:
            print(f"note: {note}")
        if config.gateway.keys_file is None:
            print(f"note: {WITHOUT_KEYS}", file=sys.stderr)
    return 0


def _closed_to_engines(config: Config, marks: Marks) -> tuple[Problem, ...]:
    """What the configured engines cannot do on this host, as the doctor finds it."""
    from llmux.cli.progress import Looking
    from llmux.daemon.host import look_as_engines

    with Looking() as looking:
        checks = look_as_engines(config, looking)
    return tuple(
        marks.problem(("vllm_command",), f"{check.seen} ({check.remedy})")
        for check in checks
        if check.level == "FAIL"
    )


def _problem(problem: Any) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("file", "line", "column", "path", "message")}


def doctor(args: argparse.Namespace) -> int:
    """Check what the configuration needs; without a valid one, check the host alone."""
    from llmux.cli.doctor import doctor as show
    from llmux.cli.progress import Looking
    from llmux.config.load import load_config
    from llmux.daemon.host import look_at_host

    config = None
    try:
        config = load_config(args.config, check_files=False)
    except LlmuxError as error:
        print(f"llmux: checking the host only, without a configuration: {error}", file=sys.stderr)
    with Looking() as looking:
        checks = look_at_host(config, tell=looking, deep=args.deep, cuda_round_trip=args.cuda)
    return show(checks, as_json=args.json)


def config(args: argparse.Namespace) -> None:
    from llmux.cli.effective import config as show

    show(args)


def key(args: argparse.Namespace) -> None:
    from llmux.cli.key import key as work

    work(args)


def run(args: argparse.Namespace) -> None:
    from llmux.cli.prompt import run as ask_model

    ask_model(args)


def sim(args: argparse.Namespace) -> int:
    from llmux.cli.sim import sim as simulate

    return simulate(args)


def version(args: argparse.Namespace) -> None:
    print(json.dumps({"version": __version__}) if args.json else f"llmux {__version__}")


# ---- asking the supervisor ----------------------------------------------------------------------


def status(args: argparse.Namespace) -> None:
    result = ask(args.socket, "status")
    if args.json:
        print_json(result)
        return
    mode = result["mode"]
    pins = [*([mode["pinned"]] if "pinned" in mode else ()), *mode.get("pins", ())]
    models = result["models"].values()
    states = sorted(Counter(model["state"] for model in models).items())
    waiting, in_flight = (sum(m[of] for m in models) for of in ("queue_depth", "in_flight"))
    print_table(
        [
            ("state", result["state"]),
            ("mode", mode["mode"] + (f", pinned to {', '.join(pins)}" if pins else "")),
            ("models", ", ".join(f"{count} {state}" for state, count in states) or "none"),
            ("requests", f"{waiting} waiting, {in_flight} in flight"),
            ("gateway", _gateway(result["workers"])),
            *(
                (f"order {one['id']}", f"{one['verb']} {', '.join(one['models'])}, by {one['by']}")
                for one in result.get("orders", ())
            ),
        ]
    )


def _gateway(workers: int) -> str:
    if workers == 0:
        return "none is connected, so no client is served: `systemctl status llmux-gateway`"
    return f"{workers} worker{'s' if workers != 1 else ''}"


def load(args: argparse.Namespace) -> None:
    order(args, "load", {})


def unload(args: argparse.Namespace) -> None:
    order(args, "unload", {})


def sleep(args: argparse.Namespace) -> None:
    order(args, "sleep", {} if args.eviction is None else {"eviction": args.eviction})


def pin(args: argparse.Namespace) -> None:
    order(args, "pin", {} if args.seconds is None else {"seconds": args.seconds})


def unpin(args: argparse.Namespace) -> None:
    _order(args, "unpin", {"models": args.model} if args.model else {})


def mode(args: argparse.Namespace) -> None:
    if args.mode is not None:
        _order(args, "mode", {"mode": args.mode})
        return
    found = ask(args.socket, "status")["mode"]
    _print_message(args, {"message": found["mode"], **found})


def restart(args: argparse.Namespace) -> None:
    if args.stale:
        models = ask(args.socket, "status")["models"]
        args.model = [*args.model, *(name for name, one in models.items() if one["stale"])]
        if not args.model:
            _print_message(args, {"message": "nothing to restart: no engine is stale"})
            return
    order(args, "restart", {})


def cancel(args: argparse.Namespace) -> None:
    if not args.order and not args.all:
        raise LlmuxError("cannot cancel: no order is named", hint="`llmux orders`, or --all")
    _order(args, "cancel", {} if args.all else {"orders": args.order})


def orders(args: argparse.Namespace) -> None:
    listed = ask(args.socket, "orders")["orders"]
    if args.json:
        print_json(listed)
        return
    if not listed:
        print("no orders")
        return
    rows = [("ORDER", "VERB", "MODELS", "BY", "SINCE")]
    rows += [
        (
            str(one["id"]),
            one["verb"],
            ", ".join(one["models"]),
            one["by"],
            span(one["since_secs"]),
        )
        for one in listed
    ]
    print_table(rows)


def top(args: argparse.Namespace) -> None:
    from llmux.cli.top import top as draw

    draw(args)


def reload(args: argparse.Namespace) -> None:
    result = _order(args, "reload", {"dry_run": True} if args.dry_run else {})
    if args.json:
        return
    for what in ("added", "removed", "changed"):
        if names := result.get(what):
            print(f"{what}: {', '.join(names)}")
    from llmux.daemon.supervisor import reload_needs

    for line in reload_needs(result):
        print(line)


def _order(args: argparse.Namespace, verb: str, values: dict[str, Any]) -> Any:
    result = ask(args.socket, verb, {k: v for k, v in values.items() if v is not None})
    _print_message(args, result)
    return result


def _print_message(args: argparse.Namespace, result: Any) -> None:
    if args.json:
        print_json(result)
    else:
        print(result["message"])
