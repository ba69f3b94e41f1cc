"""What the services use: memory, descriptors, journal, disk. In the guest, as root."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from collections import Counter
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "load"))

import witness

PLACES = ("/run/llmux", "/var/lib/llmux", "/var/log/llmux", "/var/log/journal", "/run/log/journal")
JOURNAL = ("journalctl", "--no-pager", "--quiet")


def _run(*argv: str) -> str:
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def process(pid: int) -> dict[str, int]:
    """Resident and proportional memory in KiB, and open descriptors."""
    root = pathlib.Path(f"/proc/{pid}")
    lines = (root / "smaps_rollup").read_text().splitlines()[1:]
    fields = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
    return {
        "rss_kib": fields["Rss"],
        "pss_kib": fields["Pss"],
        "descriptors": len(list((root / "fd").iterdir())),
    }


def parent(pid: int) -> int:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0  # it ended meanwhile
    return int(stat.rpartition(")")[2].split()[1])


def services() -> dict[str, int]:
    """name → pid of what serves all the time: supervisor, gateway and its workers, by their age."""
    supervisor, gateway = (witness.main_pid(u) for u in (witness.SUPERVISOR, witness.GATEWAY))
    workers = sorted(  # a command of systemd's in the same unit is no worker
        pid for pid in witness.processes(witness.SLICE / witness.GATEWAY) if parent(pid) == gateway
    )
    return {
        "supervisor": supervisor,
        "gateway": gateway,
        **{f"worker {number}": pid for number, pid in enumerate(workers, 1)},
    }


class Journal:
    """Lines of the two services since the last look, and of which kinds they are."""

    def __init__(self) -> None:
        self.said: dict[str, Counter[str]] = {"supervisor": Counter(), "gateway": Counter()}
        self.worth_a_look: list[str] = []  # warnings and worse
        self._cursor = ""
        self.cursor_now()

    def cursor_now(self) -> None:
        shown = _run(*JOURNAL, "-n", "0", "--show-cursor")
        self._cursor = shown.partition("-- cursor: ")[2].strip()

    def count(self) -> dict[str, int]:
        units = {witness.SUPERVISOR: "supervisor", witness.GATEWAY: "gateway"}
        found = Counter({"supervisor": 0, "gateway": 0, "engines": 0})
        lines = _run(*JOURNAL, "-o", "json", f"--after-cursor={self._cursor}").splitlines()
        for line in lines:
            entry: dict[str, Any] = json.loads(line)
            self._cursor = entry["__CURSOR"]
            unit = str(entry.get("UNIT") or entry.get("_SYSTEMD_UNIT") or "")
            if who := units.get(unit):
                text = str(entry.get("MESSAGE"))
                found[who] += 1
                self.said[who][kind(text)] += 1
                if int(entry.get("PRIORITY", 6)) <= 4:
                    self.worth_a_look.append(f"{who}: {text[:300]}")
            elif unit.endswith(".scope"):
                found["engines"] += 1
        return dict(found)


def kind(text: str) -> str:
    """The line without what differs from one to the next."""
    text = re.sub(r"\b(alpha|beta|gamma|delta|omega)\b", "M", text)
    return re.sub(r"\d[\d.,]*", "N", text)[:100]


def disk() -> dict[str, int]:
    """place → KiB, of those that exist."""
    found = {}
    for place in PLACES:
        if pathlib.Path(place).is_dir():
            shown = subprocess.run(
                ["du", "-sk", place], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
            found[place] = int(shown.stdout.split()[0])  # a file that went meanwhile is no fault
    return found
