"""``llmux``: argument parsing and exit codes. Each verb is a function in ``commands``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llmux import __version__
from llmux.cli import commands
from llmux.errors import ConfigError, ControlError, LlmuxError, Refused

CONFIG = "/etc/llmux/config.yaml"
SOCKET = "/run/llmux/supervisor.sock"

# One table: what a failure means to a script (2 is argparse's own, for usage).
EXIT_CODES: tuple[tuple[type[LlmuxError], int], ...] = (
    (ConfigError, 78),  # EX_CONFIG; units use RestartPreventExitStatus=78
    (ControlError, 4),
    (Refused, 3),
    (LlmuxError, 1),
)


def exit_code(error: LlmuxError) -> int:
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        args = parser.parse_args([*_global_options(args), "serve"])
    try:
        result = args.run(args)
    except LlmuxError as error:
        print(f"llmux: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `llmux ps | head`
        sys.stderr.close()
        return 0
    return int(result or 0)


def _global_options(args: argparse.Namespace) -> list[str]:
    return ["--config", args.config, *(["--verbose"] if args.verbose else [])]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmux",
        description="Many vLLM models, few GPUs, one OpenAI endpoint.",
        epilog="Exit status: 0 done, 1 failed, 2 usage, 3 refused, 4 supervisor unreachable,"
        " 78 bad configuration.",
    )
    parser.add_argument("-c", "--config", default=CONFIG, metavar="FILE", help=f"({CONFIG})")
    parser.add_argument("-v", "--verbose", action="store_true", help="debug messages")
    parser.add_argument("-V", "--version", action="version", version=f"llmux {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        # also after the verb, without undoing what was said before it
        sub.add_argument("-c", "--config", default=argparse.SUPPRESS, metavar="FILE")
        sub.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS)
        return sub

    serve = verb("serve", commands.serve, "supervisor and gateway in one process, without systemd")
    serve.add_argument("-p", "--port", type=int, help="listen here instead (127.0.0.1)")
    verb("supervise", commands.supervise, "the supervisor (llmux.service)")
    verb("gateway", commands.gateway, "the HTTP front end (llmux-gateway.service)")

    def client(name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        sub = verb(name, run, text)
        sub.add_argument("--socket", default=SOCKET, metavar="PATH", help=f"({SOCKET})")
        sub.add_argument("--json", action="store_true", help="for machines")
        return sub

    check = verb("check", commands.check, "is the configuration right?")
    check.add_argument("--host", action="store_true", help="also what it needs of this host")
    check.add_argument("--json", action="store_true", help="for machines")
    client("ps", commands.ps, "the models and their states")
    client("status", commands.status, "the whole state, as /control/status gives it")
    for name, run, text in (
        ("load", commands.load, "make a model resident"),
        ("unload", commands.unload, "stop a model"),
        ("sleep", commands.sleep, "park a model"),
        ("pin", commands.pin, "keep a model resident, switch to manual mode"),
    ):
        client(name, run, text).add_argument("model")
    sleep = verbs.choices["sleep"]
    sleep.add_argument("--eviction", metavar="W+P", help="instead of the model's own")
    client("unpin", commands.unpin, "back to automatic mode")
    logs = client("logs", commands.logs, "the last lines of a model's engine")
    logs.add_argument("model")
    logs.add_argument("-n", "--lines", type=int, default=100)
    client("reload", commands.reload, "read the configuration anew")
    version = verb("version", commands.version, "print the version")
    version.add_argument("--json", action="store_true", help="for machines")
    return parser
