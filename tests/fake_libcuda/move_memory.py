#!/usr/bin/env python3
"""The fake driver's memory: out of the GPU ledger at a checkpoint, back into it at a restore.

    move_memory.py LEDGER checkpoint|restore PID

What was taken lies in <LEDGER>.saved/PID meanwhile: the host memory of a real checkpoint, which
outlives the process when CRIU dumps it. Fails when it does not fit back onto the GPU.
"""

from __future__ import annotations

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "standin"))

from ledger import Ledger, find_start_time


def main(path: str, call: str, pid: int) -> None:
    ledger = Ledger(path)
    saved = pathlib.Path(f"{path}.saved") / str(pid)
    saved.parent.mkdir(exist_ok=True)
    if call == "checkpoint":
        rows = [row.to_json() for row in ledger.rows() if row.pid == pid]
        saved.write_text(json.dumps(rows))
        ledger.release(pid)
        return
    start = find_start_time(pid)
    if start is None:
        sys.exit(f"process {pid} is gone")
    rows = json.loads(saved.read_text())
    for gpu in {row["gpu"] for row in rows}:
        held = {row["kind"]: row["bytes"] for row in rows if row["gpu"] == gpu}
        ledger.allocate(gpu, pid, start, rows[0]["model"], held)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
