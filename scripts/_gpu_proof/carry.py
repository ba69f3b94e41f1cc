"""``--carry DIR``: CRIU and its libraries, for a GPU host without network.

Debian's packages, unpacked: its CRIU needs glibc 2.38, which Ubuntu 24.04 has. ``DIR/install`` puts
them into place there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

# CRIU 4.2.1: 4.1.1 of Debian 13 fails on kernels of 6.17 and later.
SUITE = "forky"
MIRROR = "http://deb.debian.org/debian"
PACKAGES = (
    "criu",
    "libbsd0",
    "libcompel1",
    "libmd0",
    "libnet9",
    "libnftables1",
    "libnftnl11",
    "libnl-3-200",
    "libprotobuf-c1",
)
INSTALL = """#!/bin/sh
# Puts the carried CRIU into /opt/criu and its libraries on the loader's path. Needs root.
set -eu
here=$(dirname "$(readlink -f "$0")")
rm -rf /opt/criu
cp -a "$here/criu" /opt/criu
find /opt/criu -name '*.so*' -printf '%h\\n' | sort -u > /etc/ld.so.conf.d/gpu-proof-criu.conf
ldconfig
ln -sf /opt/criu/usr/sbin/criu /usr/local/sbin/criu
criu --version
"""
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def collect(directory: Path) -> int:
    """Returns the exit status. Fetches with apt into ``directory``; changes nothing else here."""
    tree = directory / "criu"
    tree.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-proof-carry-") as scratch:
            for package in _download(Path(scratch)):
                subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot collect CRIU: {error}", file=sys.stderr)
        return 1
    for name in ("usr/share/doc", "usr/share/man", "usr/share/lintian"):
        subprocess.run(["rm", "-rf", str(tree / name)], check=True)
    script = directory / "install"
    script.write_text(INSTALL)
    script.chmod(0o755)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {size / (1 << 20):.1f} MiB; run {script} on the GPU host")
    return 0


def _download(scratch: Path) -> list[Path]:
    (scratch / "lists" / "partial").mkdir(parents=True)
    (scratch / "cache" / "archives" / "partial").mkdir(parents=True)
    sources = scratch / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {MIRROR} {SUITE} main\n")
    options = [
        f"-oDir::Etc::SourceList={sources}",
        "-oDir::Etc::SourceParts=/dev/null",
        f"-oDir::State::Lists={scratch / 'lists'}",
        f"-oDir::Cache={scratch / 'cache'}",
        "-oAPT::Sandbox::User=root",
    ]
    subprocess.run(["apt-get", "-q", *options, "update"], check=True)
    subprocess.run(["apt-get", "-q", *options, "download", *PACKAGES], check=True, cwd=scratch)
    return sorted(scratch.glob("*.deb"))
