"""``llmux``: argument parsing and exit codes. Each verb is a function in ``commands``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from llmux import __version__
from llmux.cli import checkpoints, commands, watch
from llmux.cli.key import add_arguments, key
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
        args = parser.parse_args([*_global_options(args), *verb_of(args)])
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


def verb_of(args: argparse.Namespace) -> list[str]:
    """The verb of a command line of the earlier system, which had options instead."""
    match args:
        case argparse.Namespace(old_checkpoint=str(model)):
            warm_up = ["--no-warmup"] if args.old_no_warmup else []
            eviction = [f"--eviction={args.old_eviction}"] if args.old_eviction else []
            return ["checkpoint", *warm_up, *eviction, "--", model]
        case argparse.Namespace(old_validate=str(model)):
            policies = [f"--policies={args.old_policies}"] if args.old_policies else []
            return ["validate", *policies, "--", model]
        case argparse.Namespace(old_restore=str(model)):
            return ["restore", "--detached", "--", model]
        case _:
            return ["serve"]


def _add_old_forms(parser: argparse.ArgumentParser) -> None:
    old = parser.add_argument_group("as the earlier system had it", "the verbs below do the same")
    old.add_argument("--checkpoint", dest="old_checkpoint", metavar="MODEL")
    old.add_argument("--no-warmup", dest="old_no_warmup", action="store_true")
    old.add_argument("--eviction", dest="old_eviction", metavar="W+P")
    old.add_argument("--validate", dest="old_validate", metavar="MODEL")
    old.add_argument("--policies", dest="old_policies", metavar="W+P,…")
    old.add_argument("--restore-detached", dest="old_restore", metavar="MODEL")


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
    _add_old_forms(parser)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        # also after the verb, without undoing what was said before it
        sub.add_argument(
            "-c", "--config", default=argparse.SUPPRESS, metavar="FILE", help=f"({CONFIG})"
        )
        sub.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="debug messages"
        )
        return sub

    def local(name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        sub = verb(name, run, text)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    def client(name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        sub = local(name, run, text)
        sub.add_argument("--socket", default=SOCKET, metavar="PATH", help=f"({SOCKET})")
        return sub

    serve = verb("serve", commands.serve, "supervisor and gateway in one process, without systemd")
    serve.add_argument(
        "-p", "--port", type=int, help="of 127.0.0.1, instead of the configured addresses"
    )
    serve.add_argument("--socket", metavar="PATH", help="where other verbs reach it (a new one)")
    verb("supervise", commands.supervise, "the supervisor (llmux.service)")
    verb("gateway", commands.gateway, "the HTTP front end (llmux-gateway.service)")
    check = local("check", commands.check, "is the configuration right?")
    check.add_argument("--host", action="store_true", help="also what it needs of this host")
    _add_orders(client)
    _add_watching(client)
    add_arguments(local("key", key, "make an API key; only its hash is kept"))
    client("reload", commands.reload, "read the configuration anew")
    _add_checkpoints(client)
    local("doctor", commands.doctor, "what this host has and lacks")
    local("version", commands.version, "print the version")
    return parser


_Client = Callable[[str, commands.Command, str], argparse.ArgumentParser]


def _add_orders(client: _Client) -> None:
    client("ps", commands.ps, "the models and their states")
    client("status", commands.status, "the whole; with --json all that /control/status gives")
    for name, run, text in (
        ("load", commands.load, "make a model resident"),
        ("unload", commands.unload, "stop a model"),
        ("sleep", commands.sleep, "park a model"),
        ("pin", commands.pin, "keep a model resident, switch to manual mode"),
    ):
        sub = client(name, run, text)
        sub.add_argument("model", metavar="MODEL")
        if name == "sleep":
            sub.add_argument("--eviction", metavar="W+P", help="instead of the model's own")
    client("unpin", commands.unpin, "back to automatic mode")


def _add_watching(client: _Client) -> None:
    logs = client("logs", watch.logs, "the last lines of a model's engine")
    logs.add_argument("model", metavar="MODEL")
    logs.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="how many (100)")
    events = client("events", watch.events, "the last transitions and switches")
    for sub in (logs, events):
        sub.add_argument("-f", "--follow", action="store_true", help="and those that come")


def _add_checkpoints(client: _Client) -> None:
    make = client("checkpoint", checkpoints.checkpoint, "make a model's image, or list all images")
    make.add_argument(
        "model", nargs="?", metavar="MODEL", help="without it: the images that there are"
    )
    make.add_argument("--list", action="store_true", help="the images that there are")
    make.add_argument("--eviction", metavar="W+P", help="instead of the model's own")
    make.add_argument("--no-warmup", action="store_true", help="no inference before the dump")
    restore = client("restore", checkpoints.restore, "bring a model back from its image")
    restore.add_argument("model", metavar="MODEL")
    restore.add_argument(
        "--detached", action="store_true", help="leave the engine running (it always is)"
    )
    validate = client("validate", checkpoints.validate, "try ways of parking a model")
    validate.add_argument("model", metavar="MODEL")
    validate.add_argument(
        "--policies",
        default=checkpoints.POLICIES,
        metavar="W+P,…",
        help=f"({checkpoints.POLICIES})",
    )
