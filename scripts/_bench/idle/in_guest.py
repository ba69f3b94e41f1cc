"""The measuring half of `bench idle`, inside the guest, on its Python alone."""

from __future__ import annotations

import json
import pathlib
import sys
import time

UNITS = ("llmux.service", "llmux-gateway.service")
SLICE = pathlib.Path("/sys/fs/cgroup/llmux.slice")


def memory(unit: str) -> dict[str, float]:
    """MiB of all its processes together."""
    sizes = {"Rss": 0, "Pss": 0}
    pids = (SLICE / unit / "cgroup.procs").read_text().split()
    for pid in pids:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in sizes:
                sizes[name] += int(rest.split()[0])
    found = {f"{name.lower()}_mib": round(kib / 1024, 1) for name, kib in sizes.items()}
    return {**found, "processes": len(pids)}


def cpu_seconds(unit: str) -> float:
    usage = (SLICE / unit / "cpu.stat").read_text().split()
    return int(usage[usage.index("usage_usec") + 1]) / 1e6


def main(seconds: float) -> None:
    time.sleep(5.0)  # what followed the last request is over
    before = {unit: cpu_seconds(unit) for unit in UNITS}
    began = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    used = {unit: cpu_seconds(unit) - before[unit] for unit in UNITS}
    report = {
        "memory": {unit: memory(unit) for unit in UNITS},
        "cpu_percent": {unit: round(100 * one / passed, 4) for unit, one in used.items()},
        "idle_cpu_percent": round(100 * sum(used.values()) / passed, 4),
        "seconds": round(passed, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(float(sys.argv[1]))
