"""Ask alpha while another process has the pid of its image's root; prints what became of it.

take_pid.py MANIFEST
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import sys

import client

LAST = pathlib.Path("/proc/sys/kernel/ns_last_pid")
TRIES = 5000  # another process may be quicker, or have it for a moment


def take(pid: int) -> None:
    """A child of that pid: the kernel gives the next one after the last."""
    for _ in range(TRIES):
        LAST.write_text(str(pid - 1))
        child = os.fork()
        if child == 0:
            signal.pause()
        if child == pid:
            LAST.write_text(str(pid + 1000))
            return
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sys.exit(f"pid {pid} could not be had")


def main(manifest: str) -> None:
    pid = json.loads(manifest)["root_pid"]
    take(pid)
    try:
        answer = asyncio.run(client.ask("alpha", "in its place", timeout=30))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(json.dumps({"pid": pid, "error": answer.error}))


if __name__ == "__main__":
    main(sys.argv[1])
