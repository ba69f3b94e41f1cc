"""How a guest is started and entered as a whole virtual machine: qemu with ssh inside.

Software emulation, which works everywhere, unless LLMUX_LAB_ACCEL=kvm: a /dev/kvm that exists need
not work (inside another virtual machine the kernel died of "KVM internal error" at once).
"""

from __future__ import annotations

import os
import pathlib
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence

from . import host, image

# TCG on a shared core: 86 s to multi-user when idle, twice that when others work.
BOOT_TIMEOUT = 400.0
# What no test needs and emulation makes slow: a quarter of the boot (117 s, without them 86 s).
_UNNEEDED = (
    "getty@tty1.service", "modprobe@configfs.service", "modprobe@drm.service",
    "modprobe@efi_pstore.service", "modprobe@fuse.service", "serial-getty@ttyS0.service",
    "systemd-binfmt.service", "systemd-logind.service",
    "systemd-networkd-persistent-storage.service", "systemd-random-seed.service",
    "systemd-timesyncd.service", "systemd-udev-load-credentials.service",
)  # fmt: skip
KERNEL_OPTIONS = (
    "root=/dev/vda", "rw", "console=ttyS0", "panic=-1",
    "nowatchdog",  # a busy host looks like a lockup
    "mitigations=off",  # page-table isolation empties the emulator's TLB at every system call
    *(f"systemd.mask={unit}" for unit in _UNNEEDED),
)  # fmt: skip
# What the console says when waiting on is of no use.
HOPELESS = (b"KVM internal error", b"Kernel panic")


def boot_argv(
    name: str,
    built: image.MachineImage,
    port: int,
    disks: Sequence[pathlib.Path],
    *,
    memory_mib: int,
    cpus: int,
    reboots: bool,
) -> list[str]:
    """`disks` are read-only disk images, /dev/vdb and up in the machine (see share_device).

    `reboots`: a reboot boots it again, with the same disk; otherwise it ends the machine.

    `cpus`: more than one only with KVM. With two emulated ones the kernel died in every second run,
    "Oops: int3" in its scheduler: it patches its own code behind a breakpoint, and qemu 7.2 went on
    showing the other processor that breakpoint when it had been taken out again.
    """
    if os.environ.get("LLMUX_LAB_ACCEL") == "kvm":
        speed = ["-accel", "kvm", "-cpu", "host"]
    else:
        # "-cpu max" and "-cpu Nehalem" panic under TCG (qemu 7.2); pku is what TCG lacks. Without
        # cx16=off the kernel died now and then in its allocator right after a cmpxchg16b, with a
        # pointer in EFLAGS.
        speed = ["-accel", "tcg,thread=multi", "-cpu", "Skylake-Client-v1,pku=off,cx16=off"]
    argv = [
        "qemu-system-x86_64",
        *("-name", name, "-M", "q35", *speed),
        *("-smp", str(cpus), "-m", str(memory_mib)),
        *("-nographic", "-nodefaults", "-serial", "stdio", "-monitor", "none"),
        *("-kernel", str(built.kernel), "-initrd", str(built.initrd)),
        *("-append", f"{' '.join(KERNEL_OPTIONS)} systemd.hostname={name}"),
        # -snapshot: writes go to an unlinked file, so nothing is left whatever is killed.
        *("-drive", f"file={built.disk},format=raw,if=virtio,cache=unsafe", "-snapshot"),
        # A kernel that died ends the machine; who waits for a command learns it.
        *(() if reboots else ("-no-reboot",)),
        # restrict: the machine reaches nothing; only our ssh reaches it.
        *("-netdev", f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", "virtio-net-pci,netdev=net0,romfile="),
        *("-device", "virtio-rng-pci"),
    ]
    for disk in disks:
        argv += ["-drive", f"file={disk},format=raw,if=virtio,readonly=on"]
    return argv


def share_device(index: int) -> str:
    return f"/dev/vd{chr(ord('b') + index)}"


def free_port() -> int:
    """A port that was free a moment ago; the start fails clearly should another take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ssh_argv(directory: pathlib.Path, key: pathlib.Path, port: int, *, tty: bool) -> list[str]:
    return [
        "ssh",
        *("-F", "none", "-i", str(key), "-p", str(port), "-l", "root"),
        *("-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
        # The machine is ours, on the loopback, and its host key dies with it.
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
        # One connection for all commands: a key exchange costs a second under emulation.
        *("-o", f"ControlPath={directory}/ssh"),
        "-t" if tty else "-T",
        "127.0.0.1",
    ]


def remote_command(argv: Sequence[str]) -> list[str]:
    """ssh hands one string to the guest's shell: quote it so that the words stay what they are."""
    return [shlex.join(argv)]


def wait_for_ssh(
    argv: Sequence[str],
    port: int,
    still_running: subprocess.Popen[bytes],
    console: pathlib.Path,
) -> bool:
    """Until the machine has booted to the end; False when that is not to be expected any more."""
    deadline = time.monotonic() + BOOT_TIMEOUT
    while time.monotonic() < deadline and still_running.poll() is None:
        said = console.read_bytes()
        if any(word in said for word in HOPELESS):
            return False
        if _banner(port):
            # The shared connection. Its process would keep a captured stderr open: give it none.
            _quiet([argv[0], "-M", "-N", "-f", *argv[1:]], deadline)
            # --wait: until the boot has finished, degraded or not.
            state = _quiet([*argv, "systemctl is-system-running --wait"], deadline)
            if state in {b"running", b"degraded"}:
                return True
        time.sleep(0.3)
    return False


def wait_for_reboot(
    argv: Sequence[str],
    port: int,
    still_running: subprocess.Popen[bytes],
    console: pathlib.Path,
    boots: int,
) -> bool:
    """Until the machine has booted once more than `boots` times; its first ssh connection is gone
    by then."""
    deadline = time.monotonic() + BOOT_TIMEOUT
    while boots_of(console) <= boots:
        if time.monotonic() > deadline or still_running.poll() is not None:
            return False
        time.sleep(0.3)
    _quiet([argv[0], "-O", "exit", *argv[1:]], deadline)
    return wait_for_ssh(argv, port, still_running, console)


def boots_of(console: pathlib.Path) -> int:
    return console.read_bytes().count(b"Linux version ")


def last_words(console: pathlib.Path) -> str | None:
    """What a kernel that died said, from its oops on if there was one; None: it did not die."""
    said = console.read_bytes()
    died = max(said.find(word) for word in HOPELESS)
    if died < 0:
        return None
    oops = said.rfind(b"Oops: ", 0, died)
    start = oops if oops >= 0 else died
    return said[start : start + 8000].decode("utf-8", "replace")


def _quiet(argv: Sequence[str], deadline: float) -> bytes:
    try:
        answer = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if argv[-1] != "127.0.0.1" else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=max(1.0, deadline - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return b""
    return (answer.stdout or b"").strip()


def _banner(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def need() -> None:
    host.need_root("start a virtual machine")
    host.need_tools(host.VM_TOOLS)
