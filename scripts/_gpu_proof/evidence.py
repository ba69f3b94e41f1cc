"""Everything a run saw, in a directory that survives it: written as it goes, never at the end.

``DIR/steps.jsonl`` has a line per step; ``DIR/NN-step/`` holds maps, status and open files of every
process of the engine at that moment; ``DIR/logs/`` the logs of CRIU and of the engines.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FILES = ("maps", "status", "smaps_rollup", "cmdline", "wchan")


class Evidence:
    """``directory`` None: nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._number = 0
        self._begun = time.monotonic()
        if directory is not None:
            (directory / "logs").mkdir(parents=True, exist_ok=True)

    def step(self, name: str, pids: Sequence[int], facts: dict[str, object]) -> None:
        if self._directory is None:
            return
        self._number += 1
        place = self._directory / f"{self._number:02d}-{name}"
        place.mkdir(exist_ok=True)
        for pid in pids:
            for file in FILES:
                with suppress(OSError):
                    (place / f"{pid}.{file}").write_bytes(Path(f"/proc/{pid}/{file}").read_bytes())
            (place / f"{pid}.fd").write_text("\n".join(_open_files(pid)) + "\n")
        at = round(time.monotonic() - self._begun, 3)
        self._append({"at": at, "step": name, "pids": list(pids), **facts})

    def _append(self, line: dict[str, Any]) -> None:
        assert self._directory is not None
        with (self._directory / "steps.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_logs(self, name: str, sources: Sequence[Path]) -> None:
        """Copy CRIU's logs: ``sources`` are directories to look through."""
        if self._directory is None:
            return
        for source in sources:
            for path in (*source.rglob("*.log"), *source.rglob("*.log.gz"), *source.rglob("*.out")):
                target = f"{name}-{path.parent.name}-{path.name}"
                with suppress(OSError):
                    shutil.copyfile(path, self._directory / "logs" / target)

    def results(self, document: dict[str, Any]) -> None:
        if self._directory is not None:
            path = self._directory / "results.json"
            path.with_suffix(".new").write_text(json.dumps(document, indent=2) + "\n")
            path.with_suffix(".new").rename(path)


def _open_files(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for name in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
            with suppress(OSError):
                found.append(f"{name} {os.readlink(f'/proc/{pid}/fd/{name}')}")
    return found
