"""Verbs that make, use and try checkpoints. The supervisor does the work; without one, this process
does (daemon.supervise.order)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmux.cli.client import NotRunningError, ask
from llmux.cli.images.keeping import show
from llmux.cli.output import print_json, print_table, size
from llmux.cli.progress import Progress

POLICIES = "offload+keep_running,discard+keep_running"
MIB = 2**20


def checkpoint(args: argparse.Namespace) -> None:
    if args.model is None or args.list:
        _list(args)
        return
    values = {"model": args.model, "warm_up": not args.no_warmup}
    if args.eviction is not None:
        values["eviction"] = args.eviction
    result = order(args, "checkpoint", values)
    if args.json:
        print_json(result)
        return
    if result["reused"]:
        print(f"{args.model} has an image of {result['eviction']} already")
    else:
        print(f"started     {result['start_secs']:.1f} s")
        print(f"checkpoint  {result['checkpoint_secs']:.1f} s ({result['eviction']})")
    on_disk, apparent = size(result["disk_bytes"]), size(result["apparent_bytes"])
    print(f"image       {result['path']}")
    print(f"size        {on_disk} on disk, {apparent} in all")
    print("\nto restore it on the first request, in the model's configuration:")
    print(f"  checkpoint_path: {json.dumps(result['path'])}")


def _list(args: argparse.Namespace) -> None:
    show(order(args, "images", {})["images"], as_json=args.json)


def restore(args: argparse.Namespace) -> None:
    result = order(args, "restore", {"model": args.model})
    if args.json:
        print_json(result)
        return
    print(
        f"restored  {result['restore_secs']:.1f} s (a cold start takes {result['cold_secs']:.1f})"
    )
    print(f"answers   {result['answer']!r}")
    print(f"runs in   {result['unit']}, pid {result['pid']}, {result['address']}")


def validate(args: argparse.Namespace) -> int:
    policies = [policy.strip() for policy in args.policies.split(",") if policy.strip()]
    result = order(args, "validate", {"model": args.model, "policies": policies})
    if args.json:
        print_json(result)
    else:
        print_table(table(result["policies"]))
        for row in result["policies"]:
            for problem in row["problems"]:
                print(f"{row['policy']}: {problem}")
        print(f"\n{result['message']}")
    return 0 if result["passed"] else 1


def table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    head = ("Policy", "Sleep (s)", "Wake (s)", "GPU before", "GPU parked", "GPU woken", "Image",
            "Response", "Pass")  # fmt: skip
    return [
        head,
        *(
            (
                row["policy"],
                _seconds(row["sleep_secs"]),
                _seconds(row["wake_secs"]),
                *(
                    "-" if row[f"gpu_{when}_bytes"] is None else _mib(row[f"gpu_{when}_bytes"])
                    for when in ("before", "parked", "woken")
                ),
                "-" if row["image_bytes"] is None else size(row["image_bytes"]),
                row["response"] or "-",
                "yes" if row["passed"] else "NO",
            )
            for row in rows
        ),
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mib(count: int) -> str:
    return f"{count / MIB:.0f} MiB"


def order(args: argparse.Namespace, verb: str, values: dict[str, Any]) -> Any:
    """Ask the supervisor; without one, do the work in this process."""
    with Progress(values.get("model", "")) as progress:
        try:
            return ask(args.socket, verb, values, progress=progress)
        except NotRunningError:
            from llmux.daemon.process import setup_logging
            from llmux.daemon.supervise import order as do

            setup_logging(args.verbose)
            return do(args.config, verb, values, progress)
