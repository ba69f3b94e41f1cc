"""``llmux key``: make an API key and keep its hash, list keys, revoke one."""

from __future__ import annotations

import argparse
import codecs
import errno
import grp
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llmux.cli.output import print_json, print_table
from llmux.config.choices import KeyRole
from llmux.config.keyfile import load_keys, make_key, without_key
from llmux.config.load import load_config
from llmux.config.schema import Key
from llmux.errors import LlmuxError

GATEWAY_GROUP = "llmux"
IN_FORCE = "in force after `systemctl reload llmux-gateway`"


def key(args: argparse.Namespace) -> None:
    path = args.file or _configured(args.config)
    if args.action == "list":
        _list(path, as_json=args.json)
        return
    if args.name is None:
        raise LlmuxError(f"cannot {args.action} a key: no name is given")
    if args.action == "revoke":
        _revoke(path, args.name)
        _print(args, {"name": args.name, "file": path}, f"revoked {args.name}; {IN_FORCE}")
    else:
        _new(args, path)


def _print(args: argparse.Namespace, document: Mapping[str, Any], text: str) -> None:
    print(json.dumps(document) if args.json else text)


def _list(path: str, *, as_json: bool) -> None:
    keys = load_keys(path)
    if as_json:
        print_json([_shown(one) for one in keys])
        return
    rows = [("NAME", "ROLE", "MODELS", "IN FLIGHT", "WAITING", "PER MINUTE")]
    rows += [
        (
            one.name,
            one.role.value,
            "all" if one.models is None else ",".join(sorted(one.models)),
            _limit(one.max_in_flight),
            _limit(one.max_waiting),
            _limit(one.requests_per_minute),
        )
        for one in keys
    ]
    print_table(rows)


def _limit(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _shown(key: Key) -> dict[str, Any]:
    return {
        "name": key.name,
        "role": key.role.value,
        "models": None if key.models is None else sorted(key.models),
        "max_in_flight": key.max_in_flight,
        "max_waiting": key.max_waiting,
        "requests_per_minute": key.requests_per_minute,
    }


def _revoke(path: str, name: str) -> None:
    """Replace the file by one without the key, with the same owner and mode."""
    if all(one.name != name for one in load_keys(path)):
        raise LlmuxError(f"cannot revoke {name}: {path} has no such key", hint="llmux key list")
    path = os.path.realpath(path)
    with open(path, encoding="utf-8-sig") as file:
        text = without_key(file.read(), name)
    temporary = f"{path}.new"
    try:
        there = os.stat(path)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_whole(fd, text.encode())
            os.fchown(fd, there.st_uid, there.st_gid)
            os.fchmod(fd, there.st_mode & 0o7777)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise LlmuxError(f"cannot write {path}: {error.strerror}") from None


def _new(args: argparse.Namespace, path: str) -> None:
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
    _print(args, {"name": args.name, "key": secret, "file": path}, secret)


def _configured(config: str) -> str:
    from llmux.daemon.places import credentials_directory, resolve_secret

    path = load_config(config, check_files=False).gateway.keys_file
    if path is None:
        raise LlmuxError(
            "cannot make a key: the configuration names no file of keys",
            hint="set gateway.keys_file, or use --file",
        )
    file = resolve_secret(path, credentials_directory())
    if path.startswith("credential:") and not os.path.exists(file):
        raise LlmuxError(f"cannot write to {path}", hint="name the credential's source with --file")
    return file


def _append(path: str, line: str) -> None:
    """Append in one write: a gateway that reads at that moment sees a whole line or none."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            with suppress(KeyError, PermissionError):
                os.fchown(fd, -1, grp.getgrnam(GATEWAY_GROUP).gr_gid)
        elif os.pread(fd, 4, 0).removeprefix(codecs.BOM_UTF8)[:1] == b"-":
            line = f"- {line}"  # JSON is YAML: one more item of the list
        apart = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
        _write_whole(fd, f"{apart}{line}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_whole(fd: int, data: bytes) -> None:
    """In one write. Raises OSError, and then nothing of it is there: also where a disk takes only
    the beginning. Half a line would make the whole file none of keys."""
    written = os.write(fd, data)
    if written < len(data):
        # Where it began by the descriptor: another's line may have come since the file was read.
        os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR) - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
