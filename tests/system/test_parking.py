"""The whole weights × process matrix on the installed llmux, with the stand-in and its ledger."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from llmux_guest import LlmuxGuest
from parking_lab import ParkingLab, model, small

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

WEIGHTS_MIB = 48


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = ParkingLab(llmux)
    yield lab
    llmux.end()


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        ("offload+keep_running", "discard+keep_running"),
        ("offload+freeze", "discard+freeze"),
        ("retain+cuda_suspend", "offload+cuda_suspend"),
        ("discard+cuda_suspend", "retain+stop"),
        ("retain+checkpoint", "offload+checkpoint"),
        ("discard+checkpoint", "offload+stop"),
        ("discard+stop", "discard+checkpoint"),
    ],
)
def test_every_pair_frees_what_it_promises_and_answers_as_before(
    lab: ParkingLab, alpha: str, beta: str
) -> None:
    lab.begin({"alpha": small(alpha, WEIGHTS_MIB), "beta": small(beta, WEIGHTS_MIB)})
    report = lab.llmux.load(
        "parked", "3", str(WEIGHTS_MIB), f"alpha={alpha}", f"beta={beta}", timeout=60
    )
    print(f"{alpha} / {beta}: {report}")
    assert report["wrong"] == [], lab.llmux.journal()
    assert not lab.said("cannot wake"), lab.llmux.journal()


def test_what_frees_nothing_may_stay_beside_another(lab: ParkingLab) -> None:
    half = {"extra_args": ["--gpu-memory-utilization", "0.4"], "gpu_memory": 0.4}
    ways = {"alpha": "retain+keep_running", "beta": "retain+freeze"}
    lab.begin({name: small(how, **half) for name, how in ways.items()})
    report = lab.llmux.load("parked", "3", "0", *(f"{n}={how}" for n, how in ways.items()))
    print(report)
    assert report["wrong"] == [], lab.llmux.journal()
