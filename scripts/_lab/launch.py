"""From options to a booted guest: what to share, what to start, the guardian, the waiting."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from . import host, image, nspawn, state, vllm, vm

SUITES = ("trixie", "bookworm", *image.UBUNTU)
BOOT_TIMEOUT = 90.0  # seconds; a boot takes one, the rest is for a machine that others keep busy
PROJECT_IN_GUEST = "/srv/llmux"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a guest is made. `bind` and `bind_ro` are "SRC" or "SRC:DST"."""

    suite: str = "trixie"
    machine: bool = False  # a whole virtual machine instead of a container
    bind_ro: tuple[str, ...] = ()
    bind: tuple[str, ...] = ()
    debs: tuple[str, ...] = ()
    with_vllm: bool = False
    owner_pid: int | None = None
    memory_mib: int = 2048  # machine only
    cpus: int = 1  # machine only; see vm.boot_argv
    reboots: bool = False  # machine only


@dataclasses.dataclass(frozen=True)
class Share:
    """A host directory or file that the guest sees."""

    source: str
    target: str
    read_only: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is decided before anything is started."""

    argv: list[str]
    environment: dict[str, str]
    lower: str | None
    shares: list[Share]
    facts: dict[str, Any]
    vllm: vllm.Environment | None
    name: str


def plan(name: str, directory: pathlib.Path, options: Options) -> Plan:
    host.need_root(f"start the guest {name}")
    if options.suite not in SUITES:
        raise host.LabError(f"suite {options.suite!r}: unknown; one of {', '.join(SUITES)}")
    shares = [Share(str(host.PROJECT), PROJECT_IN_GUEST, read_only=True)]
    shares += [_share(spec, read_only=True) for spec in options.bind_ro]
    shares += [_share(spec, read_only=False) for spec in options.bind]
    facts = {
        "suite": options.suite,
        "owner_pid": options.owner_pid,
        "shares": [dataclasses.asdict(share) for share in shares],
    }
    if options.machine and options.suite in image.UBUNTU:
        raise host.LabError(
            f"--vm with {options.suite}: its kernel is another package\n"
            "  next step: a guest without --vm, or a suite of Debian"
        )
    if options.machine:
        return _plan_machine(name, directory, options, shares, facts)
    host.need_tools(host.NSPAWN_TOOLS)
    environment = None
    if options.with_vllm:
        environment = vllm.environment()
        shares += [Share(path, path, read_only=True) for path in vllm.shared_paths(environment)]
    argv = nspawn.boot_argv(
        name,
        directory,
        [_bind(share) for share in shares if share.read_only],
        [_bind(share) for share in shares if not share.read_only],
    )
    return Plan(
        argv=argv,
        environment=dict(nspawn.ENVIRONMENT),
        lower=str(image.container_root(options.suite)),
        shares=shares,
        facts={**facts, "kind": "nspawn"},
        vllm=environment,
        name=name,
    )


def _plan_machine(
    name: str,
    directory: pathlib.Path,
    options: Options,
    shares: list[Share],
    facts: dict[str, Any],
) -> Plan:
    if options.with_vllm:
        raise host.LabError(
            "--vllm with --vm: vLLM takes many minutes to start under emulation\n"
            "  next step: use the stand-in engine in the machine, or --vllm without --vm"
        )
    writable = [share.source for share in shares if not share.read_only]
    if writable:
        raise host.LabError(
            f"--bind {writable[0]} with --vm: nothing writable can be shared with its kernel\n"
            "  next step: --bind-ro (a copy), or move files with 'lab run' or Guest.read and write"
        )
    files = [share.source for share in shares if not os.path.isdir(share.source)]
    if files:
        raise host.LabError(f"{files[0]}: only directories can be shared with a virtual machine")
    vm.need()
    built = image.machine_image(options.suite)
    port = vm.free_port()
    argv = vm.boot_argv(
        name,
        built,
        port,
        [share_disk(directory, index) for index in range(len(shares))],
        memory_mib=options.memory_mib,
        cpus=options.cpus,
        reboots=options.reboots,
    )
    return Plan(
        argv=argv,
        environment={"PATH": host.SEARCH_PATH, "TMPDIR": "/var/tmp"},
        lower=None,
        shares=shares,
        facts={**facts, "kind": "machine", "port": port, "ssh_key": str(built.ssh_key)},
        vllm=None,
        name=name,
    )


def share_disk(directory: pathlib.Path, index: int) -> pathlib.Path:
    return directory / f"share{index}.img"


def pack_shares(directory: pathlib.Path, shares: Sequence[Share]) -> None:
    """What a virtual machine is to see of the host is copied into disks of its own."""
    for index, share in enumerate(shares):
        image.pack_directory(share.source, share_disk(directory, index))


def _share(spec: str, *, read_only: bool) -> Share:
    source, _, target = spec.partition(":")
    path = os.path.abspath(source)
    if not os.path.exists(path):
        raise host.LabError(
            f"bind {spec!r}: {path} does not exist on the host\n  next step: create it first"
        )
    return Share(path, target or path, read_only)


def _bind(share: Share) -> str:
    return ":".join(part.replace(":", "\\:") for part in (share.source, share.target))


def is_shared(path: str, shares: Sequence[Share]) -> bool:
    return any(path == share.target or path.startswith(share.target + "/") for share in shares)


def spawn_guardian(
    directory: pathlib.Path, start: Plan, owner_pid: int | None, lock: int
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the guardian; returns it and the pipe on which it tells how the boot went."""
    status_read, status_write = os.pipe()
    # Opened here and handed over: inside its pid namespace the guardian cannot see the owner.
    owner_fd = None if owner_pid is None else _pidfd(owner_pid)
    inherited = [fd for fd in (status_write, lock, owner_fd) if fd is not None]
    spec = {
        "directory": str(directory),
        "cgroup": state.cgroup_name(start.name),
        "lower": start.lower,
        "argv": start.argv,
        "environment": start.environment,
        "notifies": start.facts["kind"] == "nspawn",
        "ready_fd": status_write,
        "owner_fd": owner_fd,
        "inherited_fds": inherited,
    }
    (directory / "spec.json").write_text(json.dumps(spec))
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    argv += [sys.executable, "-I", str(pathlib.Path(__file__).with_name("guardian.py"))]
    argv += [str(directory / "spec.json")]
    if os.path.isdir("/run/systemd/system"):
        # Where a systemd rules the host, a cgroup of our own is asked of it, with its controllers.
        scope = ["systemd-run", "--scope", "--quiet", "--collect", "--property=Delegate=yes"]
        argv = [*scope, f"--unit=llmux-lab-{start.name}", *argv]
    try:
        with open(directory / "guardian.log", "wb") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**host.clean_environment(), "PATH": host.SEARCH_PATH},
                pass_fds=inherited,
                start_new_session=True,  # a Ctrl-C at the terminal is not for the guest
            )
    finally:
        os.close(status_write)
        if owner_fd is not None:
            os.close(owner_fd)
    return process, status_read


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise host.LabError(
            f"owner pid {pid}: no such process\n  next step: give the pid of a living process"
        ) from None


def wait_until_booted(
    start: Plan,
    directory: pathlib.Path,
    process: subprocess.Popen[bytes],
    status: int,
    console: IO[bytes],
) -> dict[str, Any]:
    """The facts of a guest that has booted; raises with its console when it does not."""
    began = time.monotonic()
    told = b""
    while not told.endswith(b"\n"):
        left = began + BOOT_TIMEOUT - time.monotonic()
        if left <= 0 or not select.select([status], [], [], left)[0]:
            told = f"failed: not booted after {BOOT_TIMEOUT:.0f} s\n".encode()
            break
        chunk = os.read(status, 4096)
        if not chunk:
            told = b"failed: the guardian ended\n"
            break
        told += chunk
    facts = {**start.facts, "started": time.time()}
    booted = not told.startswith(b"failed")
    if booted:
        guardian = nspawn.children(process.pid)
        facts["guardian"] = [*guardian, process.pid]
        if start.facts["kind"] == "machine":
            key = pathlib.Path(facts["ssh_key"])
            ssh = vm.ssh_argv(directory, key, facts["port"], tty=False)
            booted = vm.wait_for_ssh(ssh, facts["port"], process, directory / "console.log")
            told = b"failed: the machine did not boot\n"
        else:
            facts["pid1"] = nspawn.find_pid1(guardian[0]) if guardian else None
            booted = facts["pid1"] is not None
            told = b"failed: its PID 1 is gone\n"
    if booted:
        facts["boot_seconds"] = round(time.monotonic() - began, 2)
        return facts
    console.seek(0)
    said = console.read().decode(errors="replace")
    with contextlib.suppress(OSError):
        said += (directory / "guardian.log").read_text(errors="replace")
    reason = told.decode(errors="replace").removeprefix("failed: ").strip()
    raise host.LabError(
        f"guest {start.name}: {reason}; its console said:\n{host.indented(said, 60)}\n"
        "  next step: the last lines above name the unit or the mount that failed"
    )
