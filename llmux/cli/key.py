"""``llmux key new NAME``: make an API key, print it once, keep its hash."""

from __future__ import annotations

import argparse
import grp
import json
import os
from contextlib import suppress

from llmux.config.keyfile import load_keys, make_key, resolve_secret
from llmux.config.load import load_config
from llmux.config.schema import KeyRole
from llmux.errors import LlmuxError

GATEWAY_GROUP = "llmux"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["new"])
    parser.add_argument("name", metavar="NAME", help="who or what the key is for")
    parser.add_argument("--file", metavar="FILE", help="the file of keys (gateway.keys_file)")
    parser.add_argument(
        "--role",
        choices=[role.value for role in KeyRole],
        default="use",
        help="use: ask models (the default); admin: /control too",
    )
    parser.add_argument(
        "--model", action="append", default=[], metavar="MODEL", help="only this one; repeatable"
    )
    parser.add_argument("--max-in-flight", type=int, metavar="N", help="requests at a time")
    parser.add_argument("--max-waiting", type=int, metavar="N", help="of them waiting at a time")
    parser.add_argument("--requests-per-minute", type=float, metavar="N")


def key(args: argparse.Namespace) -> None:
    path = args.file or _configured(args.config)
    try:
        secret, line = make_key(
            args.name,
            role=KeyRole(args.role),
            models=tuple(args.model),
            max_in_flight=args.max_in_flight,
            max_waiting=args.max_waiting,
            requests_per_minute=args.requests_per_minute,
        )
    except ValueError as error:
        raise LlmuxError(f"cannot make a key: {error}") from None
    if os.path.exists(path) and any(one.name == args.name for one in load_keys(path)):
        raise LlmuxError(
            f"cannot make a key: {path} has one called {args.name}",
            hint="choose another name, or remove its line from the file",
        )
    try:
        _append(path, line)
    except OSError as error:
        raise LlmuxError(f"cannot write {path}: {error.strerror}") from None
    if args.json:
        print(json.dumps({"name": args.name, "key": secret, "file": path}))
    else:
        print(secret)


def _configured(config: str) -> str:
    path = load_config(config, check_files=False).gateway.keys_file
    if path is None:
        raise LlmuxError(
            "cannot tell where keys are kept",
            hint="set gateway.keys_file in the configuration, or say --file",
        )
    if path.startswith("credential:") and not os.path.exists(resolve_secret(path)):
        raise LlmuxError(f"cannot write to {path}", hint="say --file with the credential's source")
    return resolve_secret(path)


def _append(path: str, line: str) -> None:
    """One write, so that a gateway that reads meanwhile sees a whole line or none."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            with suppress(KeyError, PermissionError):
                os.fchown(fd, -1, grp.getgrnam(GATEWAY_GROUP).gr_gid)
        elif os.pread(fd, 1, 0) == b"-":
            line = f"- {line}"  # JSON is YAML: one more item of the list
        apart = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
        os.write(fd, f"{apart}{line}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)
