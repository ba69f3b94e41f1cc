"""The guardian: the init of a guest's own pid and mount namespaces.

Started by launch.py as ``unshare --mount --pid --fork --kill-child … python guardian.py SPEC``.
It mounts what the guest needs, starts it (systemd-nspawn or qemu), tells the starter when the guest
has booted, and then only waits: for the guest's end or for the death of the guest's owner.

Why namespaces: everything here must vanish whatever is killed, kill -9 of this process included.
The kernel kills a pid namespace together with its init, and drops the mounts with the last process
of the mount namespace. (A plain ``kill -9`` of systemd-nspawn leaves the guest's PID 1 alive, seen
with systemd 252.) What the kernel does not remove, the throw-away directory and the empty cgroups,
is removed here at an orderly end and by ``state.sweep`` otherwise.

Runs as a file of its own, importing nothing of the lab but the cgroup module beside it, so that it
starts fast and a changed tree does not disturb it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import cgroups  # type: ignore[import-not-found,unused-ignore]  # beside this file, not a package


def main() -> int:
    spec: dict[str, Any] = json.loads(pathlib.Path(sys.argv[1]).read_text())
    directory = pathlib.Path(spec["directory"])
    for fd in spec["inherited_fds"]:
        os.set_inheritable(fd, False)  # ours: the guest's processes must not hold the lock
    seats = cgroups.seats(spec["cgroup"])
    overlay: str | None = spec["lower"]
    # For the sweep, should we be killed: only we know where our cgroups are.
    (directory / "cgroups.json").write_text(json.dumps([str(own) for _, own in seats]))
    try:
        cgroups.enter(seats)
        if overlay is not None:
            mount_overlay(directory, overlay)
        supervise(spec, directory)
    except subprocess.CalledProcessError as error:
        tell(spec["ready_fd"], f"failed: {error}: {error.stderr.decode(errors='replace').strip()}")
    except OSError as error:
        tell(spec["ready_fd"], f"failed: {error}")
    kill_everything()
    if overlay is not None:
        # Before the directory goes: a removal through the mount would only make whiteouts.
        subprocess.run(["umount", "--lazy", directory / "root"], check=False)
    cgroups.leave(seats)
    shutil.rmtree(directory, ignore_errors=True)
    return 0


def tell(fd: int, text: str) -> None:
    with contextlib.suppress(OSError):  # the starter is gone: no reader is left
        os.write(fd, text.encode() + b"\n")


def mount(kind: str, options: str, target: pathlib.Path) -> None:
    argv = ["mount", "-t", kind, "-o", options, kind, str(target)]
    subprocess.run(argv, check=True, capture_output=True)


def mount_overlay(directory: pathlib.Path, lower: str) -> None:
    root = directory / "root"
    root.mkdir()
    try:
        _mount_layers(directory, lower, root)
    except subprocess.CalledProcessError:
        # The state directory lies on an overlay itself (a container's root), which cannot be the
        # upper layer of another: keep the layers in RAM then.
        layers = directory / "layers"
        layers.mkdir()
        mount("tmpfs", "mode=0755", layers)
        _mount_layers(layers, lower, root)
    # systemd-nspawn leaves a directory per machine here; a private one goes with us.
    scratch = pathlib.Path("/run/systemd/nspawn")
    scratch.mkdir(parents=True, exist_ok=True)
    mount("tmpfs", "mode=0755", scratch)


def _mount_layers(layers: pathlib.Path, lower: str, root: pathlib.Path) -> None:
    for name in ("upper", "work"):
        (layers / name).mkdir(mode=0o755)
    mount("overlay", f"lowerdir={lower},upperdir={layers}/upper,workdir={layers}/work", root)


def supervise(spec: dict[str, Any], directory: pathlib.Path) -> None:
    """Run the guest until it ends, its owner dies, or we are told to stop."""
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(directory / "notify"))

    console = str(directory / "console.log")
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    guest = os.posix_spawnp(
        spec["argv"][0],
        spec["argv"],
        {**spec["environment"], "NOTIFY_SOCKET": str(directory / "notify")},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, console, append, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    ready_fd: int = spec["ready_fd"]
    if not spec["notifies"]:
        tell(ready_fd, "started")

    poll = select.poll()
    poll.register(wakeup_read, select.POLLIN)
    poll.register(notify, select.POLLIN)
    owner_fd: int | None = spec["owner_fd"]
    if owner_fd is not None:
        poll.register(owner_fd, select.POLLIN)  # a pidfd becomes readable when its process ends
    # Reports when the starter closed its end: it is done with the start, or was killed during it.
    poll.register(ready_fd, 0)
    while True:
        for fd, _ in poll.poll():
            if fd == owner_fd:
                return
            if fd == ready_fd:
                if not (directory / "facts.json").exists():
                    return  # no command knows of this guest
                poll.unregister(ready_fd)
            elif fd == notify.fileno():
                if b"READY=1" in notify.recv(65536).split(b"\n"):
                    tell(ready_fd, "ready")
            elif signal.SIGTERM in os.read(wakeup_read, 4096):
                return
            elif guest in reap():
                tell(ready_fd, "failed: the guest ended before it had booted")
                return


def reap() -> set[int]:
    """Collect every child that has ended: as init of the namespace, orphans are ours too."""
    ended = set()
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.add(pid)
    return ended


def kill_everything() -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all of this pid namespace but ourselves
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


if __name__ == "__main__":
    sys.exit(main())
