"""What llmux takes of psutil, read from /proc: a GPU host without network has Python alone."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace


def fill_in() -> None:
    """Before anything of llmux is imported. Where psutil is installed it is used."""
    if importlib.util.find_spec("psutil") is None:
        module = ModuleType("psutil")
        vars(module).update(
            virtual_memory=lambda: SimpleNamespace(available=_meminfo("MemAvailable")),
            swap_memory=lambda: SimpleNamespace(total=_meminfo("SwapTotal")),
            disk_usage=shutil.disk_usage,
        )
        sys.modules["psutil"] = module


def _meminfo(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
