"""``llmux images``: checkpoint images to and from other hosts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

from llmux.cli.images.checkpoints import order
from llmux.cli.output import print_json, size
from llmux.cli.progress import Progress
from llmux.errors import LlmuxError

Verb = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add_arguments(client: Verb) -> None:
    """``client`` makes a verb's parser, with --json and --socket."""
    export = client("export", export_image, "write a model's image as a stream for another host")
    export.add_argument("model", metavar="MODEL")
    where = export.add_mutually_exclusive_group()
    where.add_argument("--to", metavar="DIR", help="write DIR/MODEL.tar (default: standard output)")
    where.add_argument("--ssh", metavar="HOST", help="import it on HOST over ssh")
    where.add_argument(
        "--resume", default="", metavar="ID:N", help="continue where `images received` says"
    )
    take = client("import", import_image, "make an image from another host this host's own")
    take.add_argument("file", nargs="?", metavar="FILE", help="read FILE (default: standard input)")
    received = client("received", print_received, "print how much of an image has arrived")
    received.add_argument("model", metavar="MODEL")


def export_image(args: argparse.Namespace) -> None:
    from llmux.daemon.images import ExportedImage

    if args.to is None and args.ssh is None and sys.stdout.isatty():
        raise LlmuxError(
            "cannot export to a terminal", hint="use --to DIR, --ssh HOST, or redirect the output"
        )
    with Progress(args.model) as progress:
        image = ExportedImage(args.model, _asking(args), _meter(progress, "export"))
        if args.to is not None:
            where = image.to_directory(args.to)
        elif args.ssh is not None:
            image.to_host(args.ssh)
            where = args.ssh
        else:
            image.to_stream(sys.stdout.buffer, args.resume)
            return
    print_json({"model": args.model, "to": where}) if args.json else print(where)


def import_image(args: argparse.Namespace) -> None:
    from llmux.daemon import images

    source = sys.stdin.buffer if args.file in (None, "-") else args.file
    with Progress("image") as progress:
        result = images.import_image(args.config, source, _asking(args), _meter(progress, "import"))
    if args.json:
        print_json(result)
        return
    print(f"{result['model']}: {size(result['disk_bytes'])} in {result['path']}")
    for warning in result["warnings"]:
        print(f"llmux: {warning}", file=sys.stderr)


def print_received(args: argparse.Namespace) -> None:
    from llmux.daemon.images import received

    found = received(args.config, args.model)
    print_json({"received": found}) if args.json else print(found)


def _asking(args: argparse.Namespace) -> Callable[[str, dict[str, Any]], Any]:
    return lambda verb, values: order(args, verb, values)


def _meter(progress: Progress, phase: str) -> Callable[[int], Callable[[int], None]]:
    def start(total: int) -> Callable[[int], None]:
        began, done = monotonic(), 0

        def count(amount: int) -> None:
            nonlocal done
            done += amount
            progress(phase, monotonic() - began, done, total)

        return count

    return start
