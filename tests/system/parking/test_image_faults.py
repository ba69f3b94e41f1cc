"""Whatever happens to an image, to CRIU or to the supervisor in between: the client is answered,
nothing half-made is ever used, nothing is left, the next switch works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llmux_guest import LlmuxGuest
from parking_lab import AS_ROOT, IMAGES, ParkingLab, small

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

ORDERS = "/var/tmp/criu"
WRAPPER = "/srv/llmux/tests/system/parking/criu-that-stops"
STOPPABLE: dict[str, Any] = {"checkpoint": {"criu_path": WRAPPER}}
IMAGE = f"{IMAGES}/alpha/images"


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = ParkingLab(llmux)
    lab.run(["mkdir", "-p", ORDERS])
    lab.run(["mkfifo", f"{ORDERS}/go"])
    yield lab
    lab.end()


def begin(lab: ParkingLab, way: str = "retain+checkpoint", **top: Any) -> None:
    lab.begin({"alpha": small(way, 32), "beta": small("retain+stop")}, **top)
    lab.run(["rm", "-f", f"{ORDERS}/order", f"{ORDERS}/reached"])


def park(lab: ParkingLab) -> None:
    lab.good("alpha")
    lab.good("beta")


def goes_on(lab: ParkingLab) -> None:
    """Both models answer in turns, on memory that only the one that serves holds."""
    report = lab.llmux.load("turns", "--count=3", "--residue")
    assert report["wrong"] == [], lab.llmux.journal()
    assert lab.witness("strays", "alpha", "beta") == {"strays": []}


@pytest.mark.parametrize("options", ["size=16m", "size=2g,nr_inodes=30"], ids=["bytes", "inodes"])
def test_a_full_disk_costs_the_image_and_nothing_else(lab: ParkingLab, options: str) -> None:
    """Too small for certain: not begun. Full half-way (CRIU itself meets ENOSPC): given up."""
    directory = "/var/tmp/small"
    lab.run(["mkdir", "-p", directory])
    lab.run(["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "tmpfs", directory])
    try:
        begin(lab, checkpoint={"images_dir": directory})
        park(lab)
        (line,) = [line for line in lab.said("cannot park alpha") if "checkpoint" in line]
        print(line)
        assert not lab.run(["ls", f"{directory}/alpha/images"], check=False).stdout
        lab.good("alpha")
        assert not lab.said("Restoring")
        goes_on(lab)
    finally:
        lab.end()
        lab.run(["umount", "--lazy", directory])


DAMAGES = {
    "truncated": ("truncate -s -4096 pages-1.img", "pages-1.img"),
    "one byte flipped": ("printf X | dd of=pages-1.img bs=1 seek=9000 conv=notrunc", "pages-1.img"),
    "a file removed": ("rm core-$(ls core-* | head -1 | tr -dc 0-9).img", "core-"),
    "another's": ("chown 65534 pages-1.img", "pages-1.img belongs to user 65534"),
    "writable": ("chmod 0622 inventory.img", "inventory.img"),
    "in an open directory": ("chmod 0777 .", "images"),
    "without a manifest": ("echo '{' > manifest.json", "manifest"),
}


def test_a_damaged_image_is_not_used_and_the_client_not_failed(lab: ParkingLab) -> None:
    begin(lab)
    for kind, (damage, words) in DAMAGES.items():
        park(lab)
        seen = len(lab.said("waking → starting (wake failed"))
        lab.run(["sh", "-ec", f"cd {IMAGE}; {damage}"])
        lab.good("alpha")
        lines = lab.said("waking → starting (wake failed")
        print(kind, lines[-1])
        assert len(lines) == seen + 1, kind
        assert words in lines[-1]
    assert len(lab.said("Starting alpha cold")) == len(DAMAGES) + 1
    goes_on(lab)
    assert lab.images()["alpha"]["state"] == "valid", "made anew"


def test_an_image_of_other_arguments_is_named_and_not_used(lab: ParkingLab) -> None:
    begin(lab)
    park(lab)
    changed = small("retain+checkpoint", 32, extra_args=["--max-num-seqs", "7"])
    lab.llmux.configure({"alpha": changed, "beta": small("retain+stop")}, **AS_ROOT)
    lab.run(["systemctl", "reload", "llmux"])
    lab.good("alpha")
    line = lab.said("does not fit")[-1]
    print(line)
    assert "--max-num-seqs" in line
    assert not lab.said("criu restore: success")
    goes_on(lab)


def test_a_taken_pid_is_named_and_the_image_kept(lab: ParkingLab) -> None:
    begin(lab)
    park(lab)
    manifest = lab.llmux.guest.read(f"{IMAGE}/manifest.json").decode()
    report = lab.llmux.load("take_pid", manifest)
    print(report)
    assert report["error"] == ""
    assert lab.said(f"pid {report['pid']} of the image is taken by process")
    assert lab.images()["alpha"]["state"] == "valid"
    goes_on(lab)
    assert lab.said("criu restore: success"), "it serves later"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("dump", "cannot park alpha"),
        ("restore", "cannot wake alpha"),
        ("restore", "alpha is not restored ahead"),
    ],
    ids=["dump", "restore", "restore-ahead"],
)
def test_criu_killed_in_its_work(lab: ParkingLab, verb: str, words: str) -> None:
    begin(lab, checkpoint={"criu_path": WRAPPER, "keep_images": False})
    for count, when in enumerate(("before", "inside", "after"), 1):
        park(lab)
        if verb == "dump":
            lab.good("alpha")
        if "wake" in words:  # where there is room already, nothing is done ahead
            lab.cli("unload", "beta")
        lab.llmux.guest.write(f"{ORDERS}/order", f"{verb} {when} kill\n")
        lab.good("beta" if verb == "dump" else "alpha")
        lines = lab.said(words)
        assert len(lines) == count, when
        print(when, lines[-1])
        assert "killed" in lines[-1]
    if "ahead" in words:
        assert len(lab.said("criu restore: success")) == 3, "the wake restores it itself"
    goes_on(lab)


# Everything that the supervisor tells of; "wait" and "canary" steps are the start's.
MAKING = (
    "spawn", "wait_healthy", "canary_record", "canary_sample", "inference", "sleep",
    "cuda_suspend", "check", "dump", "criu:before", "criu:inside", "criu:after", "released",
    "pack", "sync", "done",
    "verify_release",
)  # fmt: skip
RESTORING = (
    "restore", "criu:before", "criu:inside", "criu:after", "cuda_resume", "wake_up",
    "reload_weights", "wait_healthy", "canary_check", "inference",
)  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "points"), [("checkpoint", MAKING), ("restore", RESTORING)], ids=["dump", "restore"]
)
def test_the_supervisor_killed_at_every_step(
    lab: ParkingLab, verb: str, points: tuple[str, ...]
) -> None:
    begin(lab, "discard+checkpoint", **STOPPABLE)
    lab.good("beta")
    report = lab.llmux.load("killed_at", verb, *points, timeout=200)
    print(report)
    assert report["wrong"] == [], lab.llmux.journal(lines=200)
