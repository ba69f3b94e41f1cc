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
# What those need of a system's own libraries. A bare host may lack them; where it has them, its own
# are used, since others there are built against them.
LIBRARIES = ("libgmp10", "libjansson4", "libmnl0", "libuuid1", "libxtables12")
INSTALL = """#!/bin/sh
# Puts the carried CRIU into /opt/criu and its libraries on the loader's path. Needs root.
set -eu
here=$(dirname "$(readlink -f "$0")")
rm -rf /opt/criu
cp -a "$here/criu" /opt/criu
# The loader takes the first that it finds, in the order of these files' names: CRIU's libraries
# before the system's, what the system may have itself after them.
put() { find "/opt/criu/$1" -name '*.so*' -printf '%h\\n' | sort -u > "/etc/ld.so.conf.d/$2"; }
put usr gpu-proof-criu.conf
put system zz-gpu-proof-criu.conf
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
                own = package.name.partition("_")[0] not in LIBRARIES
                target = tree if own else tree / "system"
                subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot collect CRIU: {error}", file=sys.stderr)
        return 1
    for name in ("doc", "man", "lintian"):
        for place in (tree, tree / "system"):
            subprocess.run(["rm", "-rf", str(place / "usr/share" / name)], check=True)
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
    wanted = ["download", *PACKAGES, *LIBRARIES]
    subprocess.run(["apt-get", "-q", *options, *wanted], check=True, cwd=scratch)
    return sorted(scratch.glob("*.deb"))
