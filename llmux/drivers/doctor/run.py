"""What ``llmux doctor`` looks at. Only looks: nothing on the host is changed, and what a
measurement makes (a file, a CUDA context) is gone at its end.

Each check is a function (Host, Config or None) → Check. What the configuration does not use is a
WARN when it is missing, what it uses a FAIL. Printing is llmux/cli/doctor.py's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import stat
from collections.abc import Callable

from llmux.config.schema import ENGINES, Config
from llmux.drivers.doctor import access, cuda, gpus, parking, room, round_trip
from llmux.drivers.doctor import deep as throughput
from llmux.drivers.doctor.facts import GIB, Check, Host, Level, bad, dotted, version
from llmux.drivers.processes.listeners import find_on_port
from llmux.errors import LlmuxError

OLDEST_KERNEL = (5, 14)  # cgroup.kill; pidfds and cgroup.freeze are older
OLDEST_SYSTEMD = 252  # Debian 12; the oldest that llmux's units are tested with
HUGE_PAGES = "transparent huge pages"
# `bench park`, see README, *Measured*.
HUGE_PAGES_MEAN = {
    "madvise": "restores fill pages of 4 KiB: slow for large images, fast for small ones (README)",
    "never": "restores fill pages of 4 KiB, and engines that ask for huge pages get none",
    "always": "restores fill huge pages: fast for large images, slow for small ones (README)",
}
SHM = "/dev/shm"  # noqa: S108  # the mount itself, no file of ours
SHM_SPARE = 1 * GIB  # vLLM's shared-memory rings and CRIU's link_remap copies


def check_root(host: Host, config: Config | None) -> Check:
    if host.euid == 0:
        return Check("privilege", Level.OK, "root")
    remedy = (
        "run llmux.service (root), or use `llmux serve`, which can neither freeze nor checkpoint"
    )
    return Check("privilege", Level.WARN, f"uid {host.euid}", remedy)


def check_kernel(host: Host, config: Config | None) -> Check:
    if host.kernel < OLDEST_KERNEL:
        remedy = f"boot a kernel >= {dotted(OLDEST_KERNEL)}"
        return Check("kernel", Level.FAIL, f"{host.release}: no cgroup.kill", remedy)
    return Check("kernel", Level.OK, host.release)


def check_cgroup(host: Host, config: Config | None) -> Check:
    top = host.path("/sys/fs/cgroup")
    remedy = "boot with systemd.unified_cgroup_hierarchy=1"
    if not (top / "cgroup.controllers").exists():
        return Check("cgroup v2", Level.FAIL, "/sys/fs/cgroup is not the unified one", remedy)
    # The root cgroup itself has neither file (Documentation/admin-guide/cgroup-v2.rst).
    groups = [entry for entry in sorted(top.iterdir()) if entry.is_dir()]
    for name in ("cgroup.freeze", "cgroup.kill"):
        if not any((group / name).exists() for group in groups):
            return Check("cgroup v2", Level.FAIL, f"no {name}", "boot a kernel >= 5.14")
    names = (host.read("/sys/fs/cgroup/cgroup.controllers") or "").split()
    if "memory" not in names:
        seen = f"no memory controller ({' '.join(names) or 'none'}): MemoryMax has no effect"
        return Check("cgroup v2", Level.WARN, seen, "boot with cgroup_enable=memory")
    return Check("cgroup v2", Level.OK, f"unified, freezer and kill, {' '.join(names)}")


def check_systemd(host: Host, config: Config | None) -> Check:
    if not host.path("/run/systemd/system").is_dir():
        remedy = "only `llmux serve` works without systemd"
        return Check("systemd", Level.FAIL, "systemd is not PID 1 here", remedy)
    ran = host.run(["systemctl", "--version"], 10.0)
    numbers = version(ran.output)
    if ran.status != 0 or not numbers:
        return Check("systemd", Level.FAIL, ran.output.strip()[:100], "is systemctl on the PATH?")
    if numbers[0] < OLDEST_SYSTEMD:
        remedy = f"systemd >= {OLDEST_SYSTEMD}: Debian 12, Ubuntu 24.04 or later"
        return Check("systemd", Level.FAIL, str(numbers[0]), remedy)
    return Check("systemd", Level.OK, str(numbers[0]))


def check_pystemd(host: Host, config: Config | None) -> Check:
    try:
        importlib.import_module("pystemd")
        seen = importlib.metadata.version("pystemd")
    except ImportError as error:  # PackageNotFoundError is one
        remedy = "apt install python3-pystemd, or pip install pystemd (needs libsystemd-dev)"
        return Check("pystemd", Level.FAIL, f"cannot be imported: {error}", remedy)
    return Check("pystemd", Level.OK, seen)


def check_journal(host: Host, config: Config | None) -> Check:
    path = host.path("/run/systemd/journal/socket")
    try:
        there = stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        there = False
    if there:
        return Check("journal", Level.OK, "/run/systemd/journal/socket")
    remedy = "start systemd-journald.socket; without it logs go to stderr"
    return Check("journal", Level.WARN, "no /run/systemd/journal/socket", remedy)


def check_user(host: Host, config: Config | None) -> Check:
    own = None if config is None else config.engine_user
    name = own or ENGINES
    if not host.user_exists(name):
        remedy = "run systemd-sysusers, or set engine_user to a user that exists"
        return Check("engine user", bad(config is not None), f"no user {name}", remedy)
    if name == "root":
        remedy = "set engine_user to an unprivileged user: engines run code that comes with models"
        return Check("engine user", Level.WARN, "engines run as root", remedy)
    seen = name if own else f"one for each model, with the groups of {name}"
    return Check("engine user", Level.OK, seen)


def check_io_uring(host: Host, config: Config | None) -> Check:
    """Never a problem by itself; shown because it explains a failed dump of a foreign process."""
    value = (host.read("/proc/sys/kernel/io_uring_disabled") or "").strip()
    if value == "2":
        return Check("io_uring", Level.OK, "disabled for everyone (kernel.io_uring_disabled=2)")
    return Check("io_uring", Level.OK, "available; llmux denies it to each engine, CRIU needs that")


def check_huge_pages(host: Host, config: Config | None) -> Check:
    """Never a problem by itself; shown because it explains how long restores take."""
    text = host.read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    mode = re.search(r"\[(\w+)\]", text)
    if mode is None:
        return Check(HUGE_PAGES, Level.OK, "this kernel has none: restores fill pages of 4 KiB")
    seen = HUGE_PAGES_MEAN.get(mode[1], "not known to llmux")
    return Check(HUGE_PAGES, Level.OK, f"{mode[1]}: {seen}")


def check_shm(host: Host, config: Config | None) -> Check:
    path = host.path(SHM)
    if not path.is_dir():
        return Check(SHM, Level.FAIL, "not there", "mount a tmpfs on /dev/shm: vLLM needs it")
    left = host.space(path)
    seen = f"{left.free / GIB:.1f} GiB free of {left.total / GIB:.1f} GiB"
    if left.free < SHM_SPARE:
        full = left.total > 2 * SHM_SPARE
        remedy = (
            "see what fills it: `ls -lS /dev/shm`" if full else "mount -o remount,size=50% /dev/shm"
        )
        return Check(SHM, Level.WARN, seen, remedy)
    return Check(SHM, Level.OK, seen)


def check_ports(host: Host, config: Config | None) -> Check:
    """Ports that the gateway listens at, and another process has."""
    ours = host.read("/sys/fs/cgroup/llmux.slice/llmux-gateway.service/cgroup.procs") or ""
    pids = [1, *map(int, ours.split())]  # systemd keeps the gateway's sockets
    ports = _gateway_ports(config or Config())
    for port in ports:
        if (taker := find_on_port(port, pids, str(host.path("/proc")))) is not None:
            remedy = f"stop it, or set another port (ss -ltnp 'sport = :{port}')"
            return Check("ports", Level.FAIL, f"{taker} has port {port}", remedy)
    seen = f"{', '.join(map(str, ports)) or 'none'}: the gateway's, or free"
    return Check("ports", Level.OK, seen)


def _gateway_ports(config: Config) -> list[int]:
    addresses = [*config.gateway.listen, *config.gateway.metrics_listen]
    ports = [int(one.rpartition(":")[2]) for one in addresses if not one.startswith("unix:")]
    if not config.gateway.listen:
        ports.append(config.port)
    if not config.gateway.metrics_listen and config.metrics_port:
        ports.append(config.metrics_port)
    return sorted(set(ports))


CHECKS: tuple[tuple[str, Callable[[Host, Config | None], Check | list[Check]]], ...] = (
    ("privilege", check_root),
    ("kernel", check_kernel),
    ("systemd", check_systemd),
    ("pystemd", check_pystemd),
    ("cgroup v2", check_cgroup),
    ("journal", check_journal),
    ("ports", check_ports),
    ("engine user", check_user),
    ("NVIDIA driver", parking.check_driver),
    ("GPUs", parking.check_gpus),
    (gpus.DEVICES, gpus.check_devices),
    ("GPU memory", gpus.check_memory),
    (gpus.SERVICES, gpus.check_services),
    ("libcuda", parking.check_libcuda),
    ("cuda-checkpoint", parking.check_cuda_checkpoint),
    ("CRIU", parking.check_criu),
    ("criu check", parking.check_criu_works),
    (parking.CAPABILITIES, parking.check_capabilities),
    ("network lock", parking.check_network_lock),
    ("io_uring", check_io_uring),
    (HUGE_PAGES, check_huge_pages),
    (room.IMAGES, room.check_images),
    (SHM, check_shm),
    (room.MEMORY, room.check_memory),
    ("engines", parking.check_engines),
    (access.NAME, access.check_access),
)


DEEP_CHECKS = (
    (throughput.NAME, throughput.check_throughput),
    (cuda.NAME, cuda.check_cuda),
)
CUDA_CHECKS = ((round_trip.NAME, round_trip.check_round_trip),)


def run_checks(
    config: Config | None,
    host: Host | None = None,
    *,
    deep: bool = False,
    cuda_round_trip: bool = False,
) -> list[Check]:
    """All of them, in the order of the table; one that cannot be made is a WARN of its own.
    ``deep``: those that take seconds, too. ``cuda_round_trip``: the one that uses the GPUs."""
    host = host or Host()
    results: list[Check] = []
    asked = (*(DEEP_CHECKS if deep else ()), *(CUDA_CHECKS if cuda_round_trip else ()))
    for name, check in (*CHECKS, *asked):
        host.tell(f"looking at {name}")
        try:
            found = check(host, config)
        except (OSError, ValueError, LlmuxError) as error:
            seen = f"could not be checked: {error}"
            found = Check(name, Level.WARN, seen, "run doctor as root")
        results += found if isinstance(found, list) else [found]
    return results


__all__ = ["Check", "Host", "Level", "run_checks"]
