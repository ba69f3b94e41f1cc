"""As it is installed: the .deb in a real systemd guest, two real vLLM engines on the CPU.

The two claim the whole GPU each, so they have to take turns; parked they are images on disk. The
images outlive the guest: a directory of the cache is bound into it as ``images_dir``. So the first
run starts both engines cold, and the next ones restore them, as a machine does whose supervisor was
restarted. Images last until the host reboots, or until anything changes that they were made for.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from _lab import host, vllm
from _lab.guest import Guest

ROOT = Path(__file__).resolve().parents[2]
IMAGES_IN_GUEST = "/var/lib/llmux/checkpoints"
# A process comes back under the pid it had. A guest numbers its own from 1: engines are kept well
# above, and those of a later guest above the kept ones.
FIRST_PID, PID_STEP = 20_000, 10_000
BOOT_ID = "/proc/sys/kernel/random/boot_id"

MODEL = """\
  {name}:
    model_path: {path}
    eviction: retain+checkpoint
    extra_args: {flags}
    env: {env}
"""


def build_deb() -> str:
    done = subprocess.run(
        [ROOT / "scripts" / "build-deb"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout.decode().split()[-1]


def config(environment: vllm.Environment) -> str:
    env = {k: v for k, v in vllm.SETTINGS.items() if k != "VLLM_SERVER_DEV_MODE"}
    models = "".join(
        MODEL.format(
            name=name, path=path, flags=json.dumps(list(vllm.SERVE_FLAGS)), env=json.dumps(env)
        )
        for name, path in environment.models.items()
    )
    return (
        f'vllm_command: ["{environment.vllm}"]\n'
        # in a container CRIU cannot dump another user's processes; installed, leave this line out
        "engine_user: root\n"
        "metrics_port: 0\n"
        "policy:\n  min_active_secs: 0\n"
        f"models:\n{models}"
    )


class Kept:
    """What stays between two runs: the images, and the machine-id that is part of their identity
    (llmux hashes with it what it must not write down)."""

    def __init__(self, directory: Path) -> None:
        self._machine_id = directory / "machine-id"
        self.images = directory / "images"
        self.images.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def manifests(self) -> list[Path]:
        return sorted(self.images.glob("*/images/manifest.json"))

    def prepare(self, guest: Guest) -> None:
        """The guest counts as the machine of the run before."""
        if self._machine_id.exists():
            guest.write("/etc/machine-id", self._machine_id.read_text(), mode=0o444)
        else:
            self._machine_id.write_bytes(guest.read("/etc/machine-id"))
        # nspawn lays an invented one over it; the kernel, whose boot counts, is the host's
        guest.run(["umount", BOOT_ID])
        threads = [
            tid
            for path in self.manifests
            for process in json.loads(path.read_text())["processes"]
            for tid in process["tids"]
        ]
        lowest = max(threads, default=FIRST_PID - PID_STEP) + PID_STEP
        guest.run(["sh", "-c", f"echo {lowest} > /proc/sys/kernel/ns_last_pid"])


@contextlib.contextmanager
def kept(environment: vllm.Environment) -> Iterator[Kept]:
    """This run's alone; what older environments left is removed."""
    cache = host.cache_dir()
    directory = cache / f"demo-{Path(environment.directory).name}"
    with host.locked(cache / "demo.lock", "another demo"):
        for other in cache.glob("demo-*"):
            if other != directory:
                shutil.rmtree(other)
        yield Kept(directory)


def say_how(journal: str, had_images: bool) -> None:
    """Restored or started: the difference is the point."""
    lines = journal.splitlines()
    restored = sum("criu restore: success" in line for line in lines)
    cold = sum("(no checkpoint available)" in line for line in lines)
    print(f"\n{restored} restores from images, {cold} cold starts")
    if had_images and not cold:
        print("no engine was started in this run: both were restored from images kept by the first")
    elif had_images:
        print("images kept by an earlier run could not be used for all, hence the cold starts:")
        for line in lines:
            if any(word in line for word in ("cannot be used", "does not fit", "cannot wake")):
                print(f"  {line}")
    else:
        print("there were no images yet; this run's are kept, and the next run restores them")


def main() -> int:
    environment = vllm.environment()
    deb = build_deb()
    began = time.monotonic()
    with kept(environment) as kept_images:
        had_images = bool(kept_images.manifests)
        where = f"{kept_images.images}:{IMAGES_IN_GUEST}"
        with Guest.up(with_vllm=True, bind=[where], debs=[deb]) as guest:
            kept_images.prepare(guest)
            text = config(environment)
            guest.write("/etc/llmux/config.yaml", text, mode=0o640)
            print(f"/etc/llmux/config.yaml\n\n{text}")
            if had_images:
                print(f"the images of {kept_images.images}, made by an earlier run, are used again")
            guest.run(["chgrp", "llmux", "/etc/llmux/config.yaml"])
            guest.run(["systemctl", "enable", "--now", "llmux"])
            print(f"guest up, llmux running after {time.monotonic() - began:.1f} s", flush=True)
            first, second = environment.models
            turns = [first, second, first, second, first, second]
            program = "/srv/llmux/scripts/_demo/client.py"
            client = guest.run(
                ["python3", program, "http://127.0.0.1:3000", "any", "24", *turns],
                timeout=600,
                check=False,
            )
            print(client.stdout, client.stderr)
            # by its own name: engines' lines have theirs
            said = ["_SYSTEMD_UNIT=llmux.service", "SYSLOG_IDENTIFIER=llmux"]
            # --merge: the journal was begun under the guest's first machine-id
            journal = guest.run(["journalctl", "--merge", "-o", "cat", *said]).stdout
        print("what the supervisor said:\n" + journal)
        say_how(journal, had_images)
    print(f"all in all {time.monotonic() - began:.1f} s")
    return client.returncode


if __name__ == "__main__":
    sys.exit(main())
