"""The records of running guests, and the removal of what dead ones left.

A guest is alive exactly while its guardian holds the lock of its directory; there is no other
truth. Nothing here trusts a pid that it read from a file without holding that test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import select
import shutil
import signal
from collections.abc import Iterator
from typing import Any

from . import cgroups, host

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known on disk about one guest."""

    directory: pathlib.Path
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name


def cgroup_name(name: str) -> str:
    return f"llmux-lab-{name}"


def directory_of(name: str) -> pathlib.Path:
    if not NAME.fullmatch(name):
        raise host.LabError(
            f"guest name {name!r}: only a-z, 0-9 and inner '-', at most 40 characters\n"
            "  next step: choose a name that can also be a host name, such as 'guest1'"
        )
    return host.state_dir() / name


@contextlib.contextmanager
def registry() -> Iterator[None]:
    """Serialise creating and sweeping: a directory being made must not be taken for a dead one."""
    host.state_dir().mkdir(parents=True, exist_ok=True)
    with host.locked(host.state_dir() / ".registry", "starting or removing a guest"):
        yield


def is_alive(directory: pathlib.Path) -> bool:
    try:
        fd = os.open(directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def save(directory: pathlib.Path, facts: dict[str, Any]) -> None:
    scratch = directory / "facts.json.new"
    scratch.write_text(json.dumps(facts, indent=1))
    scratch.rename(directory / "facts.json")


def load(directory: pathlib.Path) -> Record | None:
    try:
        return Record(directory, json.loads((directory / "facts.json").read_text()))
    except (OSError, ValueError):
        return None  # still being started, or half removed


def living() -> list[Record]:
    if not host.state_dir().is_dir():
        return []
    records = [
        load(directory)
        for directory in sorted(host.state_dir().iterdir())
        if directory.is_dir() and is_alive(directory)
    ]
    return [record for record in records if record is not None]


def sweep() -> list[str]:
    """Remove what guests left whose guardian is dead; the registry must be held."""
    swept = []
    for directory in sorted(host.state_dir().iterdir()):
        if directory.is_dir() and not is_alive(directory):
            remove(directory)
            swept.append(directory.name)
    return swept


def remove(directory: pathlib.Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        for path in json.loads((directory / "cgroups.json").read_text()):
            cgroups.remove_tree(pathlib.Path(path))
    shutil.rmtree(directory, ignore_errors=True)


def kill_and_wait(pids: list[int], timeout: float) -> bool:
    """SIGKILL a guardian and wait for its end and its parent's; `pids` begins with the guardian.

    The end of the guardian, init of its pid namespace, is the end of all in it.
    """
    fds = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fds.append(os.pidfd_open(pid))
    try:
        for fd in fds[:1]:  # its parent reaps it and then ends by itself
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        return all(select.select([fd], [], [], timeout)[0] for fd in fds)
    finally:
        for fd in fds:
            os.close(fd)
