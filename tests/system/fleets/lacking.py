"""Hosts that lack something: one guest under several names, each with a fault of its own.

Ansible runs each of them with an interpreter of that name, in a mount namespace in which the fault
is made: what the playbook reads and runs there is the host's own, but for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmux_guest import Guest

PLACE: Final = "/opt/lacking"

UBUNTU: Final = """PRETTY_NAME="Ubuntu {version} LTS"
NAME="Ubuntu"
VERSION_ID="{version}"
VERSION="{version} LTS ({name})"
VERSION_CODENAME={code}
ID=ubuntu
ID_LIKE=debian
UBUNTU_CODENAME={code}
"""
FILES: Final[Mapping[str, str]] = {
    "systemctl": "#!/bin/sh\necho 'systemd 247 (247.3-7+deb11u5)'\n",
    "meminfo": "MemTotal: 2097152 kB\nMemFree: 2097152 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
    "version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6\n",
    "noble": UBUNTU.format(version="24.04", name="Noble Numbat", code="noble"),
    "resolute": UBUNTU.format(version="26.04", name="Resolute Raccoon", code="resolute"),
}
# name → the commands that make it so, in a mount namespace of its own
FAULTS: Final[Mapping[str, str]] = {
    "old-systemd": f"mount --bind {PLACE}/systemctl /usr/bin/systemctl",
    "no-cgroup": "mount -t tmpfs none /sys/fs/cgroup",
    "no-memory": f"mount --bind {PLACE}/meminfo /proc/meminfo",
    "no-disk": "mount -t tmpfs -o size=8m none /var/lib",
    "no-driver": "true",
    "old-driver": "mount -t tmpfs none /proc/driver && mkdir /proc/driver/nvidia"
    f" && cp {PLACE}/version /proc/driver/nvidia/",
    "no-criu": "mount --bind /dev/null /usr/sbin/criu",
    "noble": f"mount --bind {PLACE}/noble /usr/lib/os-release",
    "resolute": f"mount --bind {PLACE}/resolute /usr/lib/os-release",
}


def prepare(guest: Guest) -> None:
    """Put the interpreters into the guest."""
    guest.run(["install", "-d", PLACE])
    for name, text in FILES.items():
        guest.write(f"{PLACE}/{name}", text, mode=0o755)
    for name, fault in FAULTS.items():
        inside = f'{fault} && exec /usr/bin/python3 "$@"'
        script = f"#!/bin/sh\nexec unshare --mount sh -c '{inside}' python3 \"$@\"\n"
        guest.write(interpreter(name), script, mode=0o755)


def interpreter(name: str) -> str:
    return f"{PLACE}/python-{name}"
