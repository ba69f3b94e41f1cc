"""CRIU's command line, its help, its log: pure functions, tried against recorded output."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

DUMP_LOG: Final = "dump.log"
RESTORE_LOG: Final = "restore.log"
PID_FILE: Final = "root.pid"
# 4.1: vvar_vclock, without which nothing is dumped on kernel 6.13 and later.
OLDEST: Final = (4, 1)
_GHOST_LIMIT: Final = (
    "1G"  # deleted files kept in the image; the default of 1M fails on shared memory
)
_SEIZE_SECONDS: Final = 30  # CRIU's own limit for stopping all threads; its default of 10 is tight

# Harmless, in many logs: an rlimit raised without CAP_SYS_RESOURCE.
_HARMLESS: Final = ("rlimit: Can't setup RLIMIT_NOFILE for self",)

LINKS_TAKEN: Final = "Can't link remap to "  # a name that CRIU wants for a link exists

_HINTS: Final[tuple[tuple[str, str], ...]] = (
    (
        "Can't dump half of stream unix connection",
        "the engine has a unix stream connection to something outside, such as the journal",
    ),
    ("anon_inode:[io_uring]", "the engine was started without llmux's filter against io_uring"),
    ("No space left on device", "free some space in checkpoint.images_dir"),
    ("Disk quota exceeded", "raise the quota on checkpoint.images_dir"),
    ("Can't fork for", "a process with one of the image's pids is running, or a zombie holds it"),
    (LINKS_TAKEN, "a link_remap.N in /dev/shm is in the way, left by another CRIU: remove it"),
    ("has bad size", "a file that the engine has open changed since the dump"),
    ("has bad build-ID", "a library of the engine was replaced since the dump"),
    ("has bad mode", "the permissions of a file that the engine has open changed since the dump"),
    ("Can't open file", "a file that the engine has open was removed since the dump"),
    ("SO_PASSSEC", "this kernel needs CRIU 4.2.1 or later"),
    ("vdso", "this kernel needs a newer CRIU"),
    ("Can't get rlimit", "CRIU needs CAP_SYS_RESOURCE to dump a process of another user"),
    (
        "suspending seccomp failed",
        "something denies ptrace of seccomp filters, such as a container",
    ),
    ("Cannot allocate memory", "there is not enough memory for the engine"),
    ("Address already in use", "another process listens where the engine did"),
)


def _common(images: str, work: str, log: str, libdir: str) -> list[str]:
    return [
        "--images-dir", images,
        "--work-dir", work,
        "--log-file", log,
        "-v4",
        "--no-default-config",  # else /etc/criu and ~/.criu are merged in
        "--libdir", libdir,
        "--tcp-established",  # inside the tree: torch's TCPStore
        "--skip-in-flight",
        "--ext-unix-sk",
        "--file-locks",  # the Hugging Face cache's
        "--link-remap",
        # The tree inherits the cgroup of the criu process, which is in the new unit.
        "--manage-cgroups=ignore",
    ]  # fmt: skip


def dump_arguments(
    criu: str, root: int, images: str, libdir: str, freeze_cgroup: str | None = None
) -> list[str]:
    frozen = ["--freeze-cgroup", freeze_cgroup] if freeze_cgroup else []
    return [
        criu, "dump", "--tree", str(root), *_common(images, images, DUMP_LOG, libdir),
        # No connection leaves the tree (checked before), so no packet can be lost; and a killed
        # CRIU leaves no firewall rules behind. A restore takes the method from the image.
        "--network-lock", "skip",
        "--ghost-limit", _GHOST_LIMIT, "--timeout", str(_SEIZE_SECONDS), *frozen,
    ]  # fmt: skip


def restore_arguments(criu: str, images: str, work: str, libdir: str) -> list[str]:
    return [
        criu, "restore", *_common(images, work, RESTORE_LOG, libdir),
        "--restore-detached", "--pidfile", f"{work}/{PID_FILE}",
        "--leave-stopped",  # until what it holds was compared with what it held: known_files.py
    ]  # fmt: skip


def parse_version(text: str) -> tuple[int, ...]:
    """``Version: 4.1.1`` as (4, 1, 1); empty when there is no such line."""
    match = re.search(r"^Version:\s*([0-9]+(?:\.[0-9]+)*)", text, re.MULTILINE)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def excerpt(log: str, limit: int = 3) -> str:
    """The first errors of a CRIU log, the cause, and the last, the outcome; without time and
    source."""
    errors = []
    for line in log.splitlines():
        match = re.search(r"Error \([^)]*\): ?(.*)", line)
        if match and not any(text in match[1] for text in _HARMLESS):
            errors.append(match[1].strip())
    if not errors:
        return ""
    kept = errors if len(errors) <= limit else [*errors[: limit - 1], errors[-1]]
    return "; ".join(dict.fromkeys(kept))


def hint_for(text: str) -> str | None:
    """The remedy for a known error."""
    return next((hint for sign, hint in _HINTS if sign in text), None)


# Errors of the host, not of the image.
_HOST: Final = (
    "killed by signal 9",
    "File exists",
    "Cannot allocate memory",
    "No space left",
    "Address already in use",
    "Can't fork for",
)


def blames_host(text: str) -> bool:
    return any(sign in text for sign in _HOST)


def succeeded(log: str, operation: str) -> bool:
    """CRIU logs success last. A restore exits with 0 even when a late step failed."""
    sign = (
        "Dumping finished successfully" if operation == "dump" else "Restore finished successfully"
    )
    return sign in log


def missing_features(help_text: str, wanted: Sequence[str]) -> list[str]:
    return [option for option in wanted if option not in help_text]


WANTED: Final = (
    "--link-remap",
    "--skip-in-flight",
    "--network-lock",
    "--manage-cgroups",
    "--no-default-config",
    "--ghost-limit",
    "--freeze-cgroup",
)
