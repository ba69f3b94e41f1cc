"""What the lab needs from the host: paths, tools, the package mirror, locks.

Everything here runs on the host, never in a guest. Standard library only: the lab must work before
any virtual environment exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

PROJECT = pathlib.Path(__file__).resolve().parents[2]
DEFAULT_MIRROR = "http://deb.debian.org/debian"
UBUNTU_MIRROR = "http://archive.ubuntu.com/ubuntu"
UBUNTU_KEYRING = "/usr/share/keyrings/ubuntu-archive-keyring.gpg"

# tool → the Debian package that has it
PACKAGE_OF_TOOL = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "qemu-system-x86_64": "qemu-system-x86",
    "mkfs.ext4": "e2fsprogs",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
NSPAWN_TOOLS = ("mmdebstrap", "systemd-nspawn", "unshare", "nsenter", "mount")
VM_TOOLS = ("mmdebstrap", "unshare", "qemu-system-x86_64", "mkfs.ext4", "ssh", "ssh-keygen")

# root's shells in containers often come without the sbin directories, where mkfs.ext4 lives
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class LabError(Exception):
    """Something a person can act on: the message says what, why, and what to do next."""


def say(text: str) -> None:
    """Progress, for people: stderr, so that stdout stays the guest command's own."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def cache_dir() -> pathlib.Path:
    """Where built images and environments live: outside the tree, shared by all checkouts."""
    chosen = os.environ.get("LLMUX_CACHE")
    if chosen:
        return pathlib.Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base).absolute() / "llmux"


def state_dir() -> pathlib.Path:
    """Where running guests keep their throw-away layers: on disk, CRIU images are gigabytes."""
    return pathlib.Path(os.environ.get("LLMUX_LAB_STATE") or "/var/tmp/llmux-lab").absolute()


def recipe_key(recipe: object) -> str:
    """A short name for a recipe: equal recipes share what was built from them."""
    text = json.dumps(recipe, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def locked(path: pathlib.Path, waiting_for: str) -> Iterator[None]:
    """Hold an exclusive lock on a file; says what it waits for when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process: {waiting_for}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=SEARCH_PATH)


def need_root(purpose: str) -> None:
    if os.geteuid() != 0:
        raise LabError(
            f"cannot {purpose}: this needs root, and the user id is {os.geteuid()}\n"
            f"  next step: run it as root, for example with 'sudo scripts/lab …'"
        )


def need_tools(tools: Sequence[str]) -> None:
    """Make sure that the tools exist, installing their packages when we are root."""
    missing = [tool for tool in tools if find_tool(tool) is None]
    if not missing:
        return
    install_packages([PACKAGE_OF_TOOL[tool] for tool in missing])
    still = [tool for tool in missing if find_tool(tool) is None]
    if still:
        raise LabError(
            f"{', '.join(still)}: still missing after installing "
            f"{', '.join(PACKAGE_OF_TOOL[tool] for tool in still)}\n"
            "  next step: see which package has it on this system and install that"
        )


def install_packages(packages: Sequence[str]) -> None:
    wanted = sorted(set(packages))
    command = "apt-get install --no-install-recommends " + " ".join(wanted)
    if os.geteuid() != 0:
        raise LabError(
            f"packages missing on this host: {' '.join(wanted)}\n  next step: sudo {command}"
        )
    if find_tool("apt-get") is None:
        raise LabError(
            f"packages missing on this host: {' '.join(wanted)}, and there is no apt-get here\n"
            "  next step: install them with this system's own package manager"
        )
    say(f"installing on this host: {' '.join(wanted)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=180"]
    run_logged([*apt, "update"], environment=environment, what="refreshing the package lists")
    run_logged(
        [*apt, "install", "-y", "--no-install-recommends", *wanted],
        environment=environment,
        what=f"installing {' '.join(wanted)}",
    )


def run_logged(
    argv: Sequence[str],
    *,
    what: str,
    environment: Mapping[str, str] | None = None,
    log: pathlib.Path | None = None,
) -> None:
    """Run a build command quietly; on failure raise with the end of what it printed."""
    result = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment) if environment is not None else None,
        check=False,
    )
    output = result.stdout.decode(errors="replace")
    if log is not None:
        log.write_text(output)
    if result.returncode != 0:
        tail = "\n".join("  | " + line for line in output.splitlines()[-25:])
        raise LabError(
            f"{what} failed with status {result.returncode}: {' '.join(argv[:4])} …\n{tail}\n"
            "  next step: read the lines above; the same command can be run by hand"
        )


def clean_environment() -> dict[str, str]:
    """For what enters the guest: the host's PATH would decide what a bare command name means."""
    return {
        "PATH": SEARCH_PATH,
        "LC_ALL": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
    }


def indented(text: str, lines: int = 30) -> str:
    return "\n".join("  | " + line for line in text.splitlines()[-lines:]) or "  | (nothing)"


# --- the mirror -----------------------------------------------------------------------------


def debian_mirror() -> str:
    """The Debian mirror of the host's own apt sources, or the public one when it has none."""
    found = mirror_in_sources(_read_sources(pathlib.Path("/etc/apt")))
    if found is None:
        return DEFAULT_MIRROR
    if found.startswith("mirror+file:"):
        # Cloud images name a file with one mirror per line.
        listing = pathlib.Path(found.removeprefix("mirror+file:").replace("//", "/", 1))
        lines = listing.read_text().split() if listing.exists() else []
        return lines[0].rstrip("/") if lines else DEFAULT_MIRROR
    return found


def ubuntu_archive() -> tuple[str, str]:
    """Mirror and keyring of Ubuntu: its own, or what the environment names."""
    keyring = os.environ.get("LLMUX_UBUNTU_KEYRING", UBUNTU_KEYRING)
    if not pathlib.Path(keyring).exists():
        raise LabError(
            f"cannot verify Ubuntu's archive: {keyring} does not exist\n"
            "  next step: put the file of Ubuntu's package ubuntu-keyring there, or name it in"
            " LLMUX_UBUNTU_KEYRING"
        )
    return os.environ.get("LLMUX_UBUNTU_MIRROR", UBUNTU_MIRROR).rstrip("/"), keyring


def _read_sources(apt: pathlib.Path) -> list[tuple[str, str]]:
    directory = apt / "sources.list.d"
    paths = [apt / "sources.list"]
    if directory.is_dir():
        paths += sorted(p for p in directory.iterdir() if p.suffix in {".list", ".sources"})
    return [(p.suffix, p.read_text(errors="replace")) for p in paths if p.is_file()]


def mirror_in_sources(sources: Sequence[tuple[str, str]]) -> str | None:
    """The first Debian main archive in apt source texts; each is (file suffix, text)."""
    for suffix, text in sources:
        entries = _deb822_entries(text) if suffix == ".sources" else _one_line_entries(text)
        for uri, suites, components in entries:
            is_debian = re.search(r"/debian/?$|/debian/\d{8}T|mirror\+file:.*debian\.list$", uri)
            release = any(re.fullmatch(r"[a-z]+", suite) for suite in suites)
            if is_debian and release and "main" in components:
                return uri.rstrip("/")
    return None


def _deb822_entries(text: str) -> Iterator[tuple[str, list[str], list[str]]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and last:
                fields[last] += " " + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                last = key.strip().lower()
                fields[last] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
            continue
        for uri in fields.get("uris", "").split():
            yield uri, fields.get("suites", "").split(), fields.get("components", "").split()


def _one_line_entries(text: str) -> Iterator[tuple[str, list[str], list[str]]]:
    for line in text.splitlines():
        matched = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if matched:
            yield matched[1], [matched[2]], matched[3].split()


def apt_proxy_options() -> list[str]:
    """The host's apt proxy settings, for an apt that does not read the host's configuration."""
    options = []
    for key in ("Acquire::http::Proxy", "Acquire::https::Proxy"):
        answer = subprocess.run(
            ["apt-config", "shell", "VALUE", key],
            capture_output=True,
            text=True,
            check=False,
        )
        matched = re.match(r"VALUE='(.+)'", answer.stdout)
        if matched:
            options.append(f'{key} "{matched[1]}"')
    return options


def environment(name: str, requirements: Sequence[str]) -> pathlib.Path:
    """A virtual environment of this interpreter with these packages, in the cache, made once."""
    key = hashlib.sha256(repr((requirements, sys.version)).encode()).hexdigest()[:12]
    target = cache_dir() / f"{name}-{key}"
    with locked(target.with_suffix(".lock"), f"the environment of {name}"):
        if not (target / "complete").exists():
            say(f"making the environment of {name} in {target} (once)")
            pip = [str(target / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
            run_logged([sys.executable, "-m", "venv", "--clear", str(target)], what="venv")
            run_logged([*pip, "install", "--no-input", *requirements], what=f"installing {name}")
            (target / "complete").touch()
    return target
