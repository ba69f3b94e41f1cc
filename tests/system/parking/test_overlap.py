"""What needs no GPU is done while the outgoing model drains or parks, the GPU part never: with real
CRIU and the fake CUDA driver, and with everything that can come in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llmux_guest import GPU, LlmuxGuest
from parking_lab import ParkingLab, model, small

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

ORDERS = "/var/tmp/criu"
WRAPPER = "/srv/llmux/tests/system/parking/criu-that-stops"
# The fake driver's states are outside of the processes: only a new image has the present ones.
ANEW = {"keep_images": False}
AT_FAULT = {"STANDIN_FAULTS": f"{GPU}/beta.faults"}
MIB = 64
MOMENTS = ("criu:before", "criu:inside", "criu:after", "prepared")


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = ParkingLab(llmux)
    lab.run(["mkdir", "-p", ORDERS])
    lab.run(["mkfifo", f"{ORDERS}/go"])
    yield lab
    lab.heal_cuda()
    lab.end()


def begin(lab: ParkingLab, beta: str = "retain+stop") -> None:
    lab.heal_cuda()
    ways = {"alpha": "discard+checkpoint", "beta": beta}
    lab.begin(
        {name: small(how, MIB, AT_FAULT) for name, how in ways.items()},
        checkpoint={"criu_path": WRAPPER, **ANEW},
    )


def overlap(lab: ParkingLab, *words: str, timeout: float = 240) -> dict[str, Any]:
    report = lab.llmux.load("overlap", *words, timeout=timeout)
    print(f"{' '.join(words)}: {report}")
    assert report["wrong"] == [], lab.llmux.journal(lines=200)
    return report


def goes_on(lab: ParkingLab) -> None:
    report = lab.llmux.load("turns", "--count=4", "--residue")
    assert [line for line in report["wrong"] if "context" not in line] == [], lab.llmux.journal()


def test_the_host_part_comes_before_the_victim_has_left_and_the_gpu_part_after(
    lab: ParkingLab,
) -> None:
    begin(lab, "retain+cuda_suspend")
    overlap(lab, "order")
    goes_on(lab)


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_stays_when_the_client_leaves(lab: ParkingLab, moment: str) -> None:
    begin(lab)
    overlap(lab, "leaves", moment)
    goes_on(lab)


@pytest.mark.parametrize("blow", ["kill", "restart"])
def test_the_next_supervisor_ends_what_was_restored_ahead(lab: ParkingLab, blow: str) -> None:
    begin(lab)
    overlap(lab, "ends", blow, *MOMENTS, "resuming")
    goes_on(lab)


def test_everything_can_be_stopped_meanwhile(lab: ParkingLab) -> None:
    begin(lab)
    overlap(lab, "ends", "stop", "prepared", "criu:inside")


@pytest.mark.parametrize("scenario", ["serves", "fails", "unload", "ends"])
def test_the_next_model_serves_while_the_image_is_written(lab: ParkingLab, scenario: str) -> None:
    begin(lab, "discard+checkpoint")
    report = lab.llmux.load("kills/behind", scenario)
    assert report["wrong"] == [], lab.llmux.journal(lines=200)
    goes_on(lab)


def test_without_the_memory_for_both_the_restore_waits(lab: ParkingLab) -> None:
    """beta's 72 GiB may go into host memory, which has less."""
    lab.heal_cuda()
    lab.begin(
        {
            "alpha": model("discard+checkpoint", env={"STANDIN_HOST_WEIGHTS_MIB": str(MIB)}),
            "beta": model("offload+keep_running", env=AT_FAULT),
        },
        checkpoint=ANEW,
    )
    overlap(lab, "short")
    line = lab.said("alpha is not restored ahead")[-1]
    print(line)
    assert "must be left" in line


def test_what_it_gains(lab: ParkingLab) -> None:
    """beta's parking takes a second, alpha's image is half a GiB. With a GPU so large that beta may
    need all host memory nothing is done ahead: the same switch otherwise."""
    found = {}
    for name, capacity in {"ahead": "4", "in turn": "80"}.items():
        size = {"STANDIN_CAPACITY_GIB": capacity}
        lab.heal_cuda()
        lab.begin(
            {
                "alpha": small("offload+checkpoint", 0, {**size, "STANDIN_RAM_MIB": "512"}),
                "beta": small("offload+keep_running", 0, {**size, "STANDIN_SLEEP_SECS": "1"}),
            },
            checkpoint=ANEW,
        )
        found[name] = overlap(lab, "gain", "6")
    print({name: report["median_secs"] for name, report in found.items()})
    assert found["ahead"]["ahead"] == 6
    for report in found.values():
        assert report["restored"] == report["ahead"] + report["waited"] == 6
