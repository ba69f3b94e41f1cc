"""What a process tree holds, read from /proc: everything that a dump must know or must refuse.

Blocks for about a millisecond a process; runs in a worker thread. Changes nothing. ``proc`` and
``shm`` are arguments so that tests can give directories of their own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from llmux.drivers.criu import unix_diag
from llmux.drivers.images.manifest import TreeProcess

PROC: Final = "/proc"
SHM: Final = "/dev/shm"  # noqa: S108  # where glibc keeps POSIX semaphores and shared memory

_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
_TCP_ESTABLISHED: Final = frozenset({"01", "02", "03", "04", "05", "08", "09", "0B"})
_TCP_LISTEN: Final = "0A"
_HTTPS: Final = ":01BB"  # port 443
HUB_REMEDY: Final = (
    "set HF_HUB_OFFLINE=1 in the model's env once its files are here, or give model_path their"
    " directory: the hub's client keeps its connection open"
)
_ACCEPTING: Final = 0x10000  # __SO_ACCEPTCON in /proc/net/unix: a listener


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why CRIU cannot dump the tree, and what to do about it. ``gpu_user``: the process,
    where it is a GPU device, which a CUDA suspend may close."""

    text: str
    remedy: str
    gpu_user: int | None = None


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """A tree as it was seen. ``shm`` has the (device, inode) of its files in /dev/shm."""

    root: int
    processes: tuple[TreeProcess, ...]
    problems: tuple[Problem, ...]
    resident_bytes: int
    shm: frozenset[tuple[int, int]]
    unix_paths: tuple[str, ...]
    tcp_ports: tuple[int, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self.processes)


@dataclass(slots=True)
class _Found:
    problems: list[Problem] = field(default_factory=list)
    sockets: dict[str, tuple[int, int]] = field(default_factory=dict)  # inode → (pid, fd)
    shm: set[tuple[int, int]] = field(default_factory=set)

    def refuse(self, text: str, remedy: str, *, gpu_user: int | None = None) -> None:
        self.problems.append(Problem(text, remedy, gpu_user))


def _read(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read()


def read_status(pid: int, proc: str = PROC) -> dict[str, str] | None:
    """/proc/PID/status as a mapping, None when there is no such process or thread."""
    try:
        text = _read(f"{proc}/{pid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def find_tids(pid: int, proc: str = PROC) -> tuple[int, ...]:
    try:
        return tuple(sorted(int(name) for name in os.listdir(f"{proc}/{pid}/task")))
    except (FileNotFoundError, ProcessLookupError):
        return ()


def _kilobytes(status: Mapping[str, str], *keys: str) -> int:
    return sum(int(status[key].split()[0]) * 1024 for key in keys if key in status)


def _session(pid: int, proc: str) -> int:
    return int(_read(f"{proc}/{pid}/stat").rpartition(")")[2].split()[3])


GPU_DEVICES: Final = "/dev/nvidia"
_FORBIDDEN: Final = (
    (
        "anon_inode:[io_uring]",
        "an io_uring, which CRIU cannot dump",
        "start the engine through llmux, which denies io_uring_setup to it",
    ),
    (
        GPU_DEVICES,
        "a GPU device, which CRIU cannot dump",
        (
            "suspend its CUDA state first; a process that has none and asked NVML only keeps the"
            " device: park the model by discard+cuda_suspend"
        ),
    ),
    (
        "anon_inode:[userfaultfd]",
        "a userfaultfd, which CRIU cannot dump",
        "find out what in the engine uses it and switch that off",
    ),
    (
        "/dev/infiniband",
        "an InfiniBand device, which CRIU cannot dump",
        "set NCCL_IB_DISABLE=1 in the model's env",
    ),
)


# <linux/major.h>, criu/files.c: memory devices, terminals and their kin
_DUMPED_MAJORS: Final = frozenset({1, 2, 3, 4, 5, 188, *range(128, 144)})
_DUMPED_MISC: Final = frozenset({(10, 200), (10, 235)})  # tun, autofs


def _is_foreign_device(link: str) -> bool:
    """Is it a character device that CRIU has no way to dump, as /dev/gdrdrv?"""
    try:
        status = os.stat(link)
    except OSError:
        return False  # closed since
    number = os.major(status.st_rdev), os.minor(status.st_rdev)
    known = number[0] in _DUMPED_MAJORS or number in _DUMPED_MISC
    return stat.S_ISCHR(status.st_mode) and not known


def _scan_fds(pid: int, comm: str, proc: str, shm: str, found: _Found) -> None:
    directory = f"{proc}/{pid}/fd"
    for name in os.listdir(directory):
        try:
            target = os.readlink(f"{directory}/{name}")
        except OSError:
            continue  # closed since
        if match := _SOCKET.fullmatch(target):
            found.sockets.setdefault(match[1], (pid, int(name)))
            continue
        for prefix, what, remedy in _FORBIDDEN:
            if target.startswith(prefix):
                text = f"process {pid} ({comm}) holds {what}: fd {name}, {target}"
                found.refuse(text, remedy, gpu_user=pid if prefix == GPU_DEVICES else None)
                break
        else:
            if target.startswith("/dev/") and _is_foreign_device(f"{directory}/{name}"):
                found.refuse(
                    f"process {pid} ({comm}) holds a device that CRIU cannot dump: fd {name},"
                    f" {target}",
                    "find out what in the engine uses it and switch that off",
                )
        if target.startswith(f"{shm}/"):
            with suppress(OSError):
                status = os.stat(f"{directory}/{name}")
                found.shm.add((status.st_dev, status.st_ino))


def _scan_maps(pid: int, comm: str, proc: str, shm: str, found: _Found) -> None:
    devices = set()
    with open(f"{proc}/{pid}/maps", errors="replace") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            if len(fields) < 6:
                continue
            path = fields[5].rstrip("\n")
            if path.startswith(f"{shm}/"):
                major, minor = (int(part, 16) for part in fields[3].split(":"))
                found.shm.add((os.makedev(major, minor), int(fields[4])))
            elif path.startswith(GPU_DEVICES):
                devices.add(path)
    for path in sorted(devices):
        found.refuse(f"process {pid} ({comm}) maps {path}", _FORBIDDEN[1][2], gpu_user=pid)


def _tcp_rows(root: int, proc: str) -> Iterator[tuple[str, str, str, str]]:
    """(local, remote, state, inode) of all TCP sockets in the tree's network namespace."""
    for name in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            for line in _read(f"{proc}/{root}/net/{name}").splitlines()[1:]:
                fields = line.split()
                yield fields[1], fields[2], fields[3], fields[9]


def decode_address(text: str) -> str:
    """``0100007F:1F90`` of /proc/net/tcp as ``127.0.0.1:8080``."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
    data = b"".join(words)  # each 32-bit word is in host order, little-endian on what CRIU runs on
    if data.startswith(bytes(10) + b"\xff\xff"):
        data = data[12:]
    if len(data) == 4:
        return f"{'.'.join(map(str, data))}:{int(port, 16)}"
    return f"[{':'.join(data[i : i + 2].hex() for i in range(0, 16, 2))}]:{int(port, 16)}"


def _scan_tcp(root: int, comms: Mapping[int, str], proc: str, found: _Found) -> tuple[int, ...]:
    """Refuse connections that leave the tree; returns the ports it listens on."""
    rows = list(_tcp_rows(root, proc))
    inside = {decode_address(local) for local, _, _, inode in rows if inode in found.sockets}
    ports = set()
    for local, remote, state, inode in rows:
        if inode not in found.sockets:
            continue
        pid, fd = found.sockets[inode]
        if state == _TCP_LISTEN:
            ports.add(int(local.rpartition(":")[2], 16))
        elif state in _TCP_ESTABLISHED and decode_address(remote) not in inside:
            hub = remote.endswith(_HTTPS)
            found.refuse(
                f"process {pid} ({comms[pid]}) has a TCP connection that leaves the engine:"
                f" fd {fd}, {decode_address(local)} to {decode_address(remote)}"
                + (", probably the Hugging Face hub" if hub else ""),
                HUB_REMEDY
                if hub
                else "let clients close their connections to the engine before it is parked",
            )
    return tuple(sorted(ports))


def _scan_unix(
    root: int,
    comms: Mapping[int, str],
    named: Mapping[str, tuple[str, bool]],
    proc: str,
    found: _Found,
) -> None:
    """Refuse stream connections whose other end is outside: CRIU dumps whole ones only. Where the
    kernel does not show the ends (no unix_diag, another network namespace), CRIU finds them."""
    try:
        if os.readlink(f"{proc}/{root}/ns/net") != os.readlink(f"{PROC}/self/ns/net"):
            return
        leaving = unix_diag.leaving(found.sockets)
    except OSError:
        return
    for inode, peer in leaving.items():
        pid, fd = found.sockets[inode]
        end = named.get(inode) or named.get(peer)
        path = f" at {end[0]}" if end else ""
        found.refuse(
            f"process {pid} ({comms[pid]}) has a unix stream connection that leaves the engine:"
            f" fd {fd}{path}, to {unix_diag.holder_of(peer, proc)}",
            "close the other end before the model is parked",
        )


def read_unix(root: int, proc: str = PROC) -> dict[str, tuple[str, bool]]:
    """inode → (path, listening) of the named unix sockets in a process's network namespace."""
    sockets = {}
    for line in _read(f"{proc}/{root}/net/unix").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:
            sockets[fields[6]] = (fields[7], bool(int(fields[3], 16) & _ACCEPTING))
    return sockets


def _check_process(pid: int, status: Mapping[str, str], found: _Found) -> None:
    name = f"process {pid} ({status['Name']})"
    state = status["State"][:1]
    if state == "Z":
        found.refuse(
            f"{name} is a zombie: its parent {status['PPid']} has not reaped it",
            "wait until the engine has reaped it; if it never does, restart the engine",
        )
    elif state in "Tt":
        found.refuse(f"{name} is stopped", f"`kill -CONT {pid}` continues it")
    if status["TracerPid"] != "0":
        found.refuse(
            f"{name} is traced by process {status['TracerPid']}",
            "end the debugger or strace that is attached to it",
        )


def inspect(
    root: int, members: Sequence[int], *, proc: str = PROC, shm: str = SHM
) -> TreeFacts | None:
    """The tree at ``root`` in a unit with the processes ``members``; None when the root is gone."""
    found = _Found()
    statuses = {pid: status for pid in members if (status := read_status(pid, proc))}
    if root not in statuses:
        return None
    parents = {pid: int(status["PPid"]) for pid, status in statuses.items()}
    comms = {pid: status["Name"] for pid, status in statuses.items()}
    processes = []
    resident = 0
    for pid in sorted(statuses, key=lambda pid: (pid != root, pid)):
        _check_process(pid, statuses[pid], found)
        above = pid
        while above != root and above in parents:
            above = parents[above]
        if above != root:
            found.refuse(
                f"process {pid} ({comms[pid]}) is in the unit but not below its root process"
                f" {root}: its parent is {parents[pid]}",
                "an engine must not start daemons; find the part that detached itself",
            )
        with suppress(FileNotFoundError, ProcessLookupError):
            _scan_fds(pid, comms[pid], proc, shm, found)
            _scan_maps(pid, comms[pid], proc, shm, found)
        resident += _kilobytes(statuses[pid], "RssAnon", "RssShmem", "VmSwap")
        processes.append(TreeProcess(pid, comms[pid], find_tids(pid, proc)))
    try:
        session, unix = _session(root, proc), read_unix(root, proc)
        ports = _scan_tcp(root, comms, proc, found)
        _scan_unix(root, comms, unix, proc, found)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if session != root:
        found.refuse(
            f"process {root} ({comms[root]}) is not the leader of its session",
            "start the engine through llmux's launcher",
        )
    paths = {
        unix[inode][0] for inode in found.sockets if inode in unix and unix[inode][0][:1] == "/"
    }
    return TreeFacts(
        root=root,
        processes=tuple(processes),
        problems=tuple(found.problems),
        resident_bytes=resident,
        shm=frozenset(found.shm),
        unix_paths=tuple(sorted(paths)),
        tcp_ports=ports,
    )
