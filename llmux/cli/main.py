"""``llmux``: argument parsing and exit codes. Each verb is a function in ``commands``."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from llmux import __version__
from llmux.cli import arguments, commands, ps, watch
from llmux.cli.images import checkpoints, keeping, transfer
from llmux.cli.output import failure, print_json
from llmux.errors import ConfigError, ControlError, LlmuxError, OrderTimeout, Reason, Refused

CONFIG = "/etc/llmux/config.yaml"
SOCKET = "/run/llmux/supervisor.sock"

# One table: what a failure means to a script (2 is argparse's own, for usage).
EXIT_CODES: tuple[tuple[type[LlmuxError], int], ...] = (
    (ConfigError, 78),  # EX_CONFIG; units use RestartPreventExitStatus=78
    (ControlError, 4),
    (OrderTimeout, 5),
    (Refused, 3),
    (LlmuxError, 1),
)
# Refusals that are failures of what was tried, and those by time or by another operator.
REFUSALS: Mapping[Reason, int] = {
    Reason.START_FAILED: 1,
    Reason.ENGINE_DIED: 1,
    Reason.WAIT_EXPIRED: 5,
    Reason.CANCELLED: 6,
}


# Of a full or broken disk that the output goes to.
_NO_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def exit_code(error: LlmuxError) -> int:
    if isinstance(error, Refused) and error.reason in REFUSALS:
        return REFUSALS[error.reason]
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(_with_times(sys.argv[1:] if argv is None else argv))
    if args.verb is None:
        args = parser.parse_args([*_global_options(args), *verb_of(args)])
    try:
        result = args.run(args)
        if sys.stdout is not None:  # as with >&-
            sys.stdout.flush()
    except LlmuxError as error:
        # Not where it was printed already, nor behind the lines of what is followed.
        told = getattr(args, "answered", False) or getattr(args, "follow", False)
        if getattr(args, "json", False) and not told:
            print_json(failure(error))
        print(f"llmux: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `llmux ps | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_OUTPUT:
            raise
        print(f"llmux: cannot write the output: {error.strerror}", file=sys.stderr)
        with suppress(OSError):
            sys.stdout.close()  # what is left could not be written at the end either
        return 1
    return int(result or 0)


def _with_times(argv: Sequence[str]) -> list[str]:
    """``--since -1h``, as journalctl takes it, in the form that argparse takes for no option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--since" and re.match(r"-\d", word):
            words[-1] = f"--since={word}"
        else:
            words.append(word)
    return words


def _global_options(args: argparse.Namespace) -> list[str]:
    return ["--config", args.config, *(["--verbose"] if args.verbose else [])]


def verb_of(args: argparse.Namespace) -> list[str]:
    """Translate the earlier system's options to a verb."""
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
    old = parser.add_argument_group(
        "options of the earlier system", "each does the same as a verb below"
    )
    old.add_argument("--checkpoint", dest="old_checkpoint", metavar="MODEL")
    old.add_argument("--no-warmup", dest="old_no_warmup", action="store_true")
    old.add_argument("--eviction", dest="old_eviction", metavar="W+P")
    old.add_argument("--validate", dest="old_validate", metavar="MODEL")
    old.add_argument("--policies", dest="old_policies", metavar="W+P,…")
    old.add_argument("--restore-detached", dest="old_restore", metavar="MODEL")


class _Verbs:
    """Adds verbs, with the options that all verbs of a kind have."""

    def __init__(self, parsers: Any) -> None:  # argparse's own class is private
        self._parsers = parsers

    def group(self, name: str, text: str) -> _Verbs:
        """A verb that has verbs of its own."""
        parser = self._parsers.add_parser(name, help=text, description=text)
        return _Verbs(parser.add_subparsers(dest="action", metavar="ACTION", required=True))

    def verb(self, name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = self._parsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        # also after the verb, without resetting what stood before it
        sub.add_argument(
            "-c",
            "--config",
            default=argparse.SUPPRESS,
            metavar="FILE",
            help=f"read FILE (default: {CONFIG})",
        )
        sub.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            default=argparse.SUPPRESS,
            help="log debug messages",
        )
        return sub

    def local(self, name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        """A verb with a result to print."""
        sub = self.verb(name, run, text)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    def client(self, name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        """A verb that asks the supervisor."""
        sub = self.local(name, run, text)
        sub.add_argument(
            "--socket", default=SOCKET, metavar="PATH", help=f"connect to PATH (default: {SOCKET})"
        )
        return sub


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmux",
        description="Many vLLM models, few GPUs, one OpenAI endpoint.",
        epilog="Exit status: 0 done, 1 failed, 2 usage, 3 refused, 4 supervisor unreachable,"
        " 5 timed out, 6 cancelled, 78 bad configuration, 130 interrupted.",
    )
    parser.add_argument(
        "-c", "--config", default=CONFIG, metavar="FILE", help=f"read FILE (default: {CONFIG})"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log debug messages")
    parser.add_argument("-V", "--version", action="version", version=f"llmux {__version__}")
    _add_old_forms(parser)
    verbs = _Verbs(parser.add_subparsers(dest="verb", metavar="VERB"))
    verb, local, client = verbs.verb, verbs.local, verbs.client
    serve = verb(
        "serve", commands.serve, "run supervisor and gateway in one process, without systemd"
    )
    serve.add_argument(
        "-p",
        "--port",
        type=int,
        help="listen on 127.0.0.1:PORT instead of the configured addresses",
    )
    serve.add_argument(
        "--socket", metavar="PATH", help="listen for other verbs at PATH (default: a new one)"
    )
    verb("supervise", commands.supervise, "run the supervisor (llmux.service)")
    verb("gateway", commands.gateway, "run the HTTP front end (llmux-gateway.service)")
    check = local("check", commands.check, "validate the configuration")
    check.add_argument("file", nargs="?", metavar="FILE", help="validate FILE instead")
    check.add_argument(
        "--in-place-of",
        metavar="PATH",
        help="validate the configuration as it would be with FILE at PATH",
    )
    check.add_argument(
        "--host",
        action="store_true",
        help="check this host's programs and users, and what engines can do here, as well",
    )
    check.add_argument("-q", "--quiet", action="store_true", help="print problems only")
    watching = verb("top", commands.top, "watch GPUs, orders and models in the terminal")
    watching.add_argument(
        "--socket", default=SOCKET, metavar="PATH", help=f"connect to PATH (default: {SOCKET})"
    )
    _add_orders(client)
    _add_watching(client)
    arguments.add_key(local("key", commands.key, "make, list and revoke API keys"))
    arguments.add_prompt(
        local("run", commands.run, "send a prompt to a model and print its answer")
    )
    reload = client("reload", commands.reload, "apply the configuration file")
    reload.add_argument("--dry-run", action="store_true", help="print what would change, only")
    local("config", commands.config, "print the values in force with their sources")
    _add_checkpoints(client)
    images = verbs.group("images", "list and remove checkpoint images, move them between hosts")
    keeping.add_arguments(images.client)
    transfer.add_arguments(images.client)
    arguments.add_sim(local("sim", commands.sim, "simulate a trace of requests under a policy"))
    doctor = local("doctor", commands.doctor, "check this host's prerequisites")
    text = (
        "measure the disk of images, too, and make a CUDA context on each GPU as an engine would:"
        " takes seconds, writes half a GiB for a moment"
    )
    doctor.add_argument("--deep", action="store_true", help=text)
    text = (
        "send a throw-away process with a CUDA context through suspend, dump, restore and resume on"
        " each GPU, and compare its bytes: ten seconds a GPU, while no engine starts or parks"
    )
    doctor.add_argument("--cuda", action="store_true", help=text)
    local("version", commands.version, "print the version")
    return parser


_Client = Callable[[str, commands.Command, str], argparse.ArgumentParser]


def _add_orders(client: _Client) -> None:
    _add_ps(client("ps", ps.ps, "list models, their states, and what they do or wait for"))
    client("status", commands.status, "print a summary; --json prints the full /control/status")
    for name, run, text in (
        ("load", commands.load, "make models resident"),
        ("unload", commands.unload, "stop models"),
        ("sleep", commands.sleep, "park models"),
        ("restart", commands.restart, "restart engines after a drain"),
        ("pin", commands.pin, "keep models resident: they make no room for others"),
    ):
        sub = client(name, run, text)
        _add_order(sub)
        if name == "sleep":
            sub.add_argument("--eviction", metavar="W+P", help="park so instead of as configured")
        if name == "pin":
            sub.add_argument(
                "--for",
                dest="seconds",
                type=arguments.positive,
                metavar="SECS",
                help="unpin after SECS seconds",
            )
        if name == "restart":
            sub.add_argument(
                "--stale", action="store_true", help="restart all that run with earlier arguments"
            )
    client("orders", commands.orders, "list the orders under way")
    cancel = client("cancel", commands.cancel, "cancel orders")
    cancel.add_argument("order", metavar="ORDER", nargs="*", type=int, help="cancel this order")
    cancel.add_argument("--all", action="store_true", help="cancel all that can be cancelled")
    unpin = client("unpin", commands.unpin, "let models make room for others again")
    unpin.add_argument(
        "model", metavar="MODEL", nargs="*", help="this model (default: all, and automatic mode)"
    )
    mode = client("mode", commands.mode, "print the mode, or set it")
    mode.add_argument(
        "mode",
        nargs="?",
        choices=["auto", "manual"],
        help="manual: only operators move models; auto: requests do",
    )


def _add_order(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", nargs="*", help="the models, all at the same time")
    sub.add_argument("--all", action="store_true", help="all configured models")
    sub.add_argument(
        "--timeout",
        type=arguments.positive,
        metavar="SECS",
        help="withdraw the order after SECS seconds",
    )
    sub.add_argument(
        "--no-wait", action="store_true", help="return once the order is accepted; see orders"
    )


def _add_ps(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", nargs="*", help="list this model only")
    sub.add_argument("-q", "--quiet", action="store_true", help="print names only")
    sub.add_argument(
        "--format",
        metavar="TEXT",
        help='print TEXT for each model, with fields of --json in it: "{name} {state} {why}"',
    )
    sub.add_argument(
        "-w",
        "--watch",
        metavar="SECS",
        nargs="?",
        type=float,
        const=2.0,
        help="print again every SECS seconds (default: 2)",
    )


def _add_watching(client: _Client) -> None:
    logs = client("logs", watch.logs, "print the last lines of models' engines")
    logs.add_argument("model", metavar="MODEL", nargs="*", help="of this model (default: all)")
    logs.add_argument(
        "-p", "--previous", action="store_true", help="print those of the engine before this one"
    )
    logs.add_argument(
        "--since", metavar="TIME", help="print the journal's lines since TIME, as for journalctl"
    )
    logs.add_argument(
        "-n", "--lines", type=int, default=100, metavar="N", help="print N lines (default: 100)"
    )
    events = client("events", watch.events, "print the last transitions and switches")
    for sub in (logs, events):
        sub.add_argument("-f", "--follow", action="store_true", help="keep following")


def _add_checkpoints(client: _Client) -> None:
    make = client("checkpoint", checkpoints.checkpoint, "make a model's image, or list images")
    make.add_argument(
        "model", nargs="?", metavar="MODEL", help="make this model's image (default: list images)"
    )
    make.add_argument("--list", action="store_true", help="list images")
    make.add_argument("--eviction", metavar="W+P", help="park so instead of as configured")
    make.add_argument("--no-warmup", action="store_true", help="skip the inference before the dump")
    restore = client("restore", checkpoints.restore, "restore a model from its image")
    restore.add_argument("model", metavar="MODEL")
    restore.add_argument(
        "--detached", action="store_true", help="leave the engine running (it always stays)"
    )
    validate = client(
        "validate",
        checkpoints.validate,
        "park and wake a model in several ways and compare its answers",
    )
    validate.add_argument("model", metavar="MODEL")
    validate.add_argument(
        "--policies",
        default=checkpoints.POLICIES,
        metavar="W+P,…",
        help=f"try these (default: {checkpoints.POLICIES})",
    )
