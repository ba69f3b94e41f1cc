"""What `criu restore` alone takes for an image that llmux made: nothing checked, no canary.

Runs in the guest as root, with llmux installed and the model parked:
``python3 bare.py IMAGE COUNT MODEL SOCKET [lazy]``. What an image needs around it is put back first
and is not counted. Prints one JSON object per restore. ``lazy``: with CRIU's page daemon, which
brings a page when it is touched, and the others meanwhile.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

sys.path.insert(0, "/usr/lib/llmux")
sys.path.insert(1, str(pathlib.Path(__file__).parents[1]))
sys.dont_write_bytecode = True

from _bench import turns  # noqa: E402
from llmux.drivers.criu import amx, command, host, shm  # noqa: E402
from llmux.drivers.criu.held_names import HeldNames  # noqa: E402
from llmux.drivers.criu.tree import SHM  # noqa: E402
from llmux.drivers.images.manifest import load_manifest  # noqa: E402
from llmux.drivers.images.store import ImageStore  # noqa: E402

UNIT = "bare-restore.scope"
WORK = "/var/tmp/bare-restore"


def restore(image: str, model: str, socket: str, *, lazy: bool) -> dict[str, object]:
    manifest = load_manifest(image)
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(f"{WORK}/no-plugins", mode=0o700)
    host.put_right(manifest)
    host.clear_sockets(manifest)
    held = HeldNames(ImageStore(str(pathlib.Path(image).parents[1])), SHM)
    made = shm.put_back(manifest.shm, image, held)
    held.begin(model)
    criu = shutil.which("criu") or "criu"
    argv = command.restore_arguments(criu, image, WORK, f"{WORK}/no-plugins")
    argv.remove("--leave-stopped")  # for a comparison that a bare restore does not make
    if lazy:
        argv.append("--lazy-pages")
    if amx.is_needed():
        argv = amx.wrapped(argv)
    daemon = None
    try:
        began = time.monotonic()
        daemon = page_daemon(criu, image) if lazy else None
        subprocess.run(["systemd-run", "--quiet", "--scope", f"--unit={UNIT}", *argv], check=True)
        restored = time.monotonic() - began
        with turns.UnixConnection(socket) as connection:
            turn = turns.complete(connection, model)
        if daemon is not None:
            daemon.wait()
        return {
            "last_page_s": time.monotonic() - began if lazy else restored,
            "criu_s": restored,
            "first_token_s": restored + turn.first_token_s,
            "text": turn.text,
            "logprobs": turn.logprobs,
            "problem": turn.problem,
        }
    finally:
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        # returns when the unit is gone, all its processes with it
        subprocess.run(["systemctl", "kill", "--signal=KILL", UNIT], check=False)
        subprocess.run(["systemctl", "stop", UNIT], check=False)
        for process in manifest.processes:
            while os.path.exists(f"/proc/{process.pid}"):
                time.sleep(0.001)  # init reaps it, without telling us
        held.end(model, made)


def page_daemon(criu: str, image: str) -> subprocess.Popen[bytes]:
    """It listens in the work directory; it ends when it has brought all pages."""
    argv = [criu, "lazy-pages", "--images-dir", image, "--work-dir", WORK, "-o", "lazy.log"]
    daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    while not os.path.exists(f"{WORK}/lazy-pages.socket"):
        if daemon.poll() is not None:
            raise RuntimeError(pathlib.Path(WORK, "lazy.log").read_text()[-2000:])
        time.sleep(0.001)
    return daemon


def main(image: str, count: str, model: str, socket: str, lazy: str = "") -> int:
    for _ in range(int(count)):
        done = restore(image, model, socket, lazy=bool(lazy))
        print(json.dumps(done), flush=True)
        if done["problem"]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
