"""CUDA calls that fail, hang or lie at each step: the room is made, the client answered in time.

The engines are CUDA processes of the fake driver (tests/fake_libcuda), so that the real helper and
the real ctypes calls run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from llmux_guest import LlmuxGuest
from parking_lab import CUDA, ParkingLab, small

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

# A hang is borne for so long: the lock's own limit is 30 s, these are below it.
SHORT: dict[str, Any] = {"sleep_timeout_secs": 1, "wake_timeout_secs": 1}
UNKNOWN, FAILED = "999", "3"  # CUDA_ERROR_UNKNOWN; CU_PROCESS_STATE_FAILED
SUSPENDING = ("restore_tid", "state", "lock", "checkpoint")
RESUMING = ("restore_tid", "state", "restore", "unlock")


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = ParkingLab(llmux)
    yield lab
    lab.heal_cuda()
    lab.end()


def begin(lab: ParkingLab, way: str) -> None:
    lab.heal_cuda()
    lab.begin(
        {"alpha": small(way, **SHORT), "beta": small("retain+stop")},
        # a kept image would be reused, and CUDA not asked again
        checkpoint={"keep_images": False},
    )


def goes_on(lab: ParkingLab) -> None:
    report = lab.llmux.load("turns", "--count=3", "--residue")
    assert report["wrong"] == [], lab.llmux.journal(lines=100)


def in_order(lab: ParkingLab, what: str) -> None:
    """No process is left; the next round begins with the next switches."""
    lab.heal_cuda()
    assert lab.witness("strays", "alpha", "beta") == {"strays": []}, what


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("retain+cuda_suspend", f"fail {UNKNOWN}"),
        ("retain+cuda_suspend", "hang"),
        ("retain+cuda_suspend", "lie"),
        ("retain+cuda_suspend", "die"),
        ("offload+checkpoint", f"fail {UNKNOWN}"),
    ],
)
def test_a_suspend_that_goes_wrong_makes_room_all_the_same(
    lab: ParkingLab, way: str, words: str
) -> None:
    begin(lab, way)
    for call in SUSPENDING:
        if words == "lie" and call in ("restore_tid", "state"):
            continue  # it says nothing wrong: 0 is a thread id, and a state
        if way == "offload+checkpoint" and call == "restore_tid":
            continue  # no GPU is mapped, so after an unclear answer it counts as without CUDA
        lab.good("alpha")
        before = len(lab.said("cannot park alpha"))
        lab.cuda_fault(call, words)
        answer = lab.good("beta", timeout=15)
        lines = lab.said("cannot park alpha")
        print(f"{call} {words}: {answer['ended'] - answer['started']:.2f} s: {lines[before:]}")
        assert len(lines) == before + 1, f"{call} {words}: {lab.llmux.journal()}"
        held = lab.witness("held")
        if way == "offload+checkpoint":  # asleep and unharmed: it stays, without an image
            assert held.pop("alpha").keys() == {"context"}, call
        assert held.keys() == {"beta"}
        in_order(lab, f"{call} {words}")
    goes_on(lab)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("retain+cuda_suspend", f"fail {UNKNOWN}"),
        ("retain+cuda_suspend", f"fail {UNKNOWN} {FAILED}"),
        ("retain+cuda_suspend", "hang"),
        ("retain+cuda_suspend", "lie"),
        ("offload+checkpoint", f"fail {UNKNOWN}"),
    ],
)
def test_a_resume_that_goes_wrong_ends_in_a_cold_start(
    lab: ParkingLab, way: str, words: str
) -> None:
    begin(lab, way)
    for call in RESUMING:
        if call in ("restore_tid", "state") and words != "hang":
            continue
        lab.good("alpha")
        lab.good("beta")
        before = len(lab.said("waking → starting (wake failed"))
        lab.cuda_fault(call, words)
        answer = lab.good("alpha", timeout=15)
        lines = lab.said("waking → starting (wake failed")
        print(f"{call} {words}: {answer['ended'] - answer['started']:.2f} s: {lines[before:]}")
        assert len(lines) == before + 1, f"{call} {words}: {lab.llmux.journal()}"
        in_order(lab, f"{call} {words}")
    goes_on(lab)


def test_the_doctor_sends_a_process_round_and_leaves_nothing(lab: ParkingLab) -> None:
    """Through the product's own CUDA driver and CRIU: `llmux doctor --cuda`."""
    begin(lab, "retain+cuda_suspend")
    library = f"LLMUX_LIBCUDA={CUDA}/libcuda.so.1"
    done = lab.run(
        ["env", library, "llmux", "doctor", "--cuda", "--json"], check=False, timeout=200
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)["checks"]}
    trip = rows["CUDA round trip"]
    print(trip)
    assert trip["level"] == "OK", trip
    assert trip["seen"].startswith("GPU 0: bytes equal: "), trip
    steps = ("start", "suspend", "dump", "restore", "resume", "compare")
    assert set(trip["measured"]) == {f"gpu0_{step}_seconds" for step in steps}
    left = lab.run(["sh", "-c", f"ls -d /var/tmp/llmux-doctor-* {CUDA}/host_hung"], check=False)
    assert left.stdout == ""
    goes_on(lab)
