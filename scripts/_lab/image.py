"""Root file systems for the guests, built once by mmdebstrap into the cache.

The cache key is a hash of the recipe, so changing a package list here builds a new image and leaves
the old one to the guests that still run from it. An image is complete or absent: it is built under
another name and renamed.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from . import host

# What the llmux package depends on, so that its .deb installs in a guest without any network.
LLMUX_DEPENDENCIES = (
    "adduser",
    "python3",
    "python3-aiofiles",
    "python3-httptools",
    "python3-multidict",
    "python3-prometheus-client",
    "python3-psutil",
    "python3-pystemd",
    "python3-sdnotify",
    "python3-typing-extensions",
    "python3-ujson",
    "python3-uvloop",
    "python3-websockets",
    "python3-yaml",
)
# What tests and people want in a guest.
TOOLS = (
    "ca-certificates",
    "curl",
    "dbus",
    "iproute2",
    "iptables",
    "kmod",
    "less",
    "libnuma1",  # the CPU build of vLLM loads it
    "nftables",
    "openssl",
    "polkitd",
    "procps",
    "psmisc",
    "python3-aiohttp",  # load clients
    "socat",
    "strace",
    "systemd",
    "systemd-sysv",
    "util-linux",
)
UBUNTU = ("noble", "resolute")  # 24.04 and 26.04
VM_PACKAGES = ("linux-image-cloud-amd64", "criu", "openssh-server", "systemd-timesyncd")

# Timers and consoles that only make a short-lived guest slower and its journal longer.
MASKED_UNITS = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-networkd-wait-online.service",
)

# Debian 13's CRIU 4.1.1 fails on kernels of 6.17 and later (SO_PASSSEC on every unix socket); 4.2.1
# does not. A low pin, so that nothing else comes from there.
FORKY_PREFERENCES = "Package: *\nPin: release n=forky\nPin-Priority: 50\n"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides what an image contains; its hash is the cache key."""

    suite: str
    packages: tuple[str, ...]
    criu_from_forky: bool
    bootable: bool
    masked_units: tuple[str, ...] = MASKED_UNITS
    revision: int = 3  # raise it when the code below changes what an image contains

    @property
    def key(self) -> str:
        return host.recipe_key(dataclasses.asdict(self))


def container_recipe(suite: str) -> Recipe:
    packages = tuple(sorted(LLMUX_DEPENDENCIES + TOOLS))
    return Recipe(suite, packages, criu_from_forky=suite == "trixie", bootable=False)


def machine_recipe(suite: str) -> Recipe:
    """The whole machine has the distribution's own kernel and its own CRIU, as a customer has."""
    packages = tuple(sorted(LLMUX_DEPENDENCIES + TOOLS + VM_PACKAGES))
    return Recipe(suite, packages, criu_from_forky=False, bootable=True, revision=4)


def container_root(suite: str) -> pathlib.Path:
    """The root directory for nspawn guests, built when it is not there."""
    recipe = container_recipe(suite)
    target = host.cache_dir() / f"root-{suite}-{recipe.key}"
    if target.is_dir():
        return target
    host.need_root(f"build the {suite} guest image")
    host.need_tools(host.NSPAWN_TOOLS)
    with host.locked(host.cache_dir() / f"{target.name}.lock", f"building {target.name}"):
        if not target.is_dir():
            with _Scratch() as scratch:
                root = scratch / "root"
                _bootstrap(recipe, root)
                root.rename(target)
    return target


@dataclasses.dataclass(frozen=True)
class MachineImage:
    """A disk image with what qemu needs to boot it and ssh needs to enter it."""

    directory: pathlib.Path

    @property
    def disk(self) -> pathlib.Path:
        return self.directory / "disk.img"

    @property
    def kernel(self) -> pathlib.Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> pathlib.Path:
        return self.directory / "initrd.img"

    @property
    def ssh_key(self) -> pathlib.Path:
        return self.directory / "id_ed25519"


def machine_image(suite: str) -> MachineImage:
    """The disk image for virtual machines, built when it is not there."""
    recipe = machine_recipe(suite)
    target = host.cache_dir() / f"vm-{suite}-{recipe.key}"
    if target.is_dir():
        return MachineImage(target)
    host.need_root(f"build the {suite} virtual machine")
    host.need_tools(host.VM_TOOLS)
    with host.locked(host.cache_dir() / f"{target.name}.lock", f"building {target.name}"):
        if not target.is_dir():
            with _Scratch() as scratch:
                _build_machine(recipe, scratch)
                (scratch / "image").rename(target)
    return MachineImage(target)


class _Scratch:
    """A build directory in the cache (same file system, so rename works), removed afterwards.

    What a killed build left is removed by the next one: the name carries the builder's pid.
    """

    def __init__(self) -> None:
        base = host.cache_dir()
        base.mkdir(parents=True, exist_ok=True)
        for left in base.glob("build-*"):
            pid = left.name.split("-")[1]
            if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                shutil.rmtree(left, ignore_errors=True)
        self.path = pathlib.Path(tempfile.mkdtemp(prefix=f"build-{os.getpid()}-", dir=base))
        self.path.chmod(0o755)  # mkdtemp's 0700 would stay on nothing, but apt's sandbox user reads

    def __enter__(self) -> pathlib.Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _bootstrap(recipe: Recipe, root: pathlib.Path) -> None:
    keyring = None
    if recipe.suite in UBUNTU:
        mirror, keyring = host.ubuntu_archive()
    else:
        mirror = host.debian_mirror()
    host.say(f"building the {recipe.suite} root from {mirror} (half a minute, once)")
    began = time.monotonic()
    argv = [
        "mmdebstrap",
        "--mode=root",
        "--variant=apt",
        "--format=directory",
        f"--include={','.join(recipe.packages)}",
        # A mirror that stands still (a snapshot) has release files past their date.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
    ]
    argv += [f"--aptopt={option}" for option in host.apt_proxy_options()]
    if recipe.criu_from_forky:
        source = f"deb [check-valid-until=no] {mirror} forky main"
        preferences = FORKY_PREFERENCES.replace("\n", "\\n")
        lists = '"$1/etc/apt/sources.list.d/forky.list"'
        install = 'chroot "$1" apt-get -q -y install -t n=forky --no-install-recommends criu'
        argv += [
            f"--customize-hook=echo '{source}' > {lists}",
            f"--customize-hook=printf '{preferences}' > \"$1/etc/apt/preferences.d/forky\"",
            '--customize-hook=chroot "$1" apt-get -q update',
            f"--customize-hook={install}",
            # Without its lists this source is only a trap for the next apt-get update.
            f"--customize-hook=rm {lists}",
        ]
    argv += [f"--keyring={keyring}"] if keyring else []
    # Half of what llmux depends on is in Ubuntu's universe.
    components = "main universe" if keyring else "main"
    argv += [recipe.suite, str(root), f"deb {mirror} {recipe.suite} {components}"]
    log = host.cache_dir() / f"{root.parent.name}.log"
    host.run_logged(argv, what=f"building the {recipe.suite} root", log=log)
    log.unlink(missing_ok=True)
    # The excludes above must not apply to what is installed later, such as llmux's man pages.
    (root / "etc/dpkg/dpkg.cfg.d/99mmdebstrap").unlink(missing_ok=True)
    # Empty, not absent: each boot gets an id of its own, and it is not a "first boot", which would
    # apply presets to every unit.
    (root / "etc/machine-id").write_bytes(b"")
    (root / "etc/hostname").unlink(missing_ok=True)
    # /etc and /var are up to date with /usr: spares each boot ldconfig and three more services.
    for part in ("etc", "var"):
        (root / part / ".updated").touch()
    for unit in recipe.masked_units:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    host.say(f"built the {recipe.suite} root in {time.monotonic() - began:.0f} s")


# The address that qemu's user network gives to its first machine, without waiting for DHCP.
_VM_NETWORK = """\
[Match]
Type=ether
[Network]
Address=10.0.2.15/24
"""


def _build_machine(recipe: Recipe, scratch: pathlib.Path) -> None:
    root, image = scratch / "root", scratch / "image"
    image.mkdir()
    _bootstrap(recipe, root)
    key = image / "id_ed25519"
    host.run_logged(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "llmux-lab", "-f", str(key)],
        what="making the ssh key of the virtual machine",
    )
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    (ssh / "authorized_keys").write_bytes((image / "id_ed25519.pub").read_bytes())
    network = root / "etc/systemd/network/80-lab.network"
    network.write_text(_VM_NETWORK)
    _enable(root, "multi-user.target", "systemd-networkd.service")
    for kind in ("vmlinuz", "initrd.img"):
        newest = sorted((root / "boot").glob(f"{kind}-*"))[-1]
        shutil.copyfile(newest, image / kind)
    disk = image / "disk.img"
    with open(disk, "wb") as handle:
        handle.truncate(12 << 30)  # sparse: room for CRIU images, costs what is written
    host.run_logged(
        # -m 0: no blocks reserved for root, who is everybody here.
        ["mkfs.ext4", "-q", "-F", "-m", "0", "-d", str(root), str(disk)],
        what="making the disk image",
    )


def _enable(root: pathlib.Path, target: str, unit: str) -> None:
    wants = root / f"etc/systemd/system/{target}.wants"
    wants.mkdir(parents=True, exist_ok=True)
    link = wants / unit
    link.unlink(missing_ok=True)
    link.symlink_to(f"/usr/lib/systemd/system/{unit}")


def pack_directory(source: str, disk: pathlib.Path) -> None:
    """A read-only copy of a directory as a disk: the cloud kernel has neither 9p nor virtiofs."""
    counted = subprocess.run(
        ["du", "--summarize", "--apparent-size", "--block-size=1M", source],
        capture_output=True,
        text=True,
        check=True,
    )
    mebibytes = int(counted.stdout.split()[0])
    with open(disk, "wb") as handle:
        handle.truncate((mebibytes * 2 + 64) << 20)  # sparse; small files round up to a block
    host.run_logged(
        ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-d", source, str(disk)],
        what=f"packing {source} for the virtual machine",
        environment=host.clean_environment(),
    )
