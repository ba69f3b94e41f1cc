"""Arguments of the verbs whose modules are imported when they run: the services start through the
same parser, and whatever is imported stays in their memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from llmux.config.choices import KeyRole, PolicyType

KEY_VARIABLE: Final = "LLMUX_API_KEY"
# Comments come every 15 s until an answer begins, and an engine that stands still for 120 s is
# ended; both are defaults of the gateway, which this may meet with others.
SILENCE_SECS: Final = 300.0


def add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["new", "list", "revoke"])
    parser.add_argument("name", metavar="NAME", nargs="?", help="the key's name; not for list")
    parser.add_argument("--file", metavar="FILE", help="use FILE (default: gateway.keys_file)")
    parser.add_argument(
        "--role",
        choices=[role.value for role in KeyRole],
        default="use",
        help="allow inference (use, the default), or control too (admin)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="allow MODEL only; may be repeated",
    )
    parser.add_argument("--max-in-flight", type=int, metavar="N", help="limit concurrent requests")
    parser.add_argument("--max-waiting", type=int, metavar="N", help="limit waiting requests")
    parser.add_argument("--requests-per-minute", type=float, metavar="N", help="limit the rate")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="(default: standard input)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="limit the answer")
    parser.add_argument(
        "--url", metavar="URL", help="use the gateway at URL (default: as configured)"
    )
    # A key among the arguments would be there for every user to see: no --key, not even as short
    # for this.
    parser.allow_abbrev = False
    parser.add_argument(
        "--key-file", metavar="FILE", help=f"read the API key from FILE (default: ${KEY_VARIABLE})"
    )
    parser.add_argument(
        "--ca-file",
        metavar="FILE",
        help="verify TLS with the authorities in FILE (default: the configured certificate; with"
        " --url the system's authorities)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECS",
        type=positive,
        default=SILENCE_SECS,
        help=f"give up after SECS without a byte (default: {SILENCE_SECS:g})",
    )


def add_sim(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE.csv",
                        help="read rows of seconds and names under the heading"
                        " arrival_s,model,service_s[,deadline_s][,key]")  # fmt: skip
    source.add_argument("--from-journal", type=Path, metavar="FILE",
                        help="rebuild trace and costs from `journalctl -u llmux -o json`"
                        " (- reads standard input);"
                        " compare all policies unless one is named")  # fmt: skip
    parser.add_argument("--policy", choices=[p.value for p in PolicyType],
                        help="decide by this policy, not the configured one")  # fmt: skip
    parser.add_argument("--costs", type=Path, metavar="FILE.json",
                        help='read seconds, as {"default": {"start": 60}, "models": {"NAME":'
                        ' {"wake": 2}}}; also park, stop, and failures, a share')  # fmt: skip
    parser.add_argument("--gpus", type=_gpus, metavar="N",
                        help="simulate N GPUs (default: gpu_count, else 1)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="choose which operations fail")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg|png",
                        help="draw the timeline (PNG: with rsvg-convert)")  # fmt: skip


def _gpus(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 1024:
        raise argparse.ArgumentTypeError("must be 1 to 1024")
    return count


def positive(text: str) -> float:
    """Seconds, more than none, of up to ten years."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3.2e8:
        raise argparse.ArgumentTypeError(f'must be a number of seconds above 0, not "{text}"')
    return seconds
