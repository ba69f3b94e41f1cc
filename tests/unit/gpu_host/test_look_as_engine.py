"""The look that the doctor takes as the engine's user, as the program that it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmux.drivers.doctor import look_as_engine


def test_tools_are_found_where_the_search_path_has_them(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("ninja", "nvcc"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "nvcc").chmod(0o644)  # not to be run
    program = shutil.which("true")
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    asked: dict[str, Any] = {
        "program": program, "interpreter": None, "modules": [], "import_secs": 1.0,
        "models": {"a": str(weights)}, "directories": {"HF_HOME": str(tmp_path)},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", look_as_engine.__file__, json.dumps(asked)],
        capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}/bin", "HOME": os.fspath(tmp_path)},
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["problems"] == []
    assert (said["imports"], said["closed"], said["files"]) == (None, {}, 1)
    tools = {name: said["found"][name] for name in ("ninja", "cc", "nvcc")}
    assert tools == {"ninja": True, "cc": False, "nvcc": False}
