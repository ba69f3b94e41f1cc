"""The pretended GPUs' memory: its command line, and who waits for whom."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ledger import GIB, Ledger
from standin_engines import STANDIN


def test_ledger_command_prints_json(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.json")
    command = [sys.executable, str(STANDIN / "ledger.py"), "init", path]
    made = subprocess.run(
        [*command, "--capacity-gib", "24", "--gpus", "2"], capture_output=True, check=True
    )
    assert json.loads(made.stdout)["gpus"]["1"] == {
        "capacity": 24 * GIB,
        "used": 0,
        "free": 24 * GIB,
    }
    assert Ledger(path).capacity(1) == 24 * GIB


def test_a_held_lock_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.json")
    with open(f"{path}.lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="perhaps by a frozen engine"):
            Ledger(path, lock_timeout=0.01).init()
        waiting = threading.Thread(target=Ledger(path).init, args=(2,))
        waiting.start()
    waiting.join()
    assert sorted(Ledger(path).show()["gpus"]) == ["0", "1"]
    Ledger(path).init()  # none that gave up has kept it
