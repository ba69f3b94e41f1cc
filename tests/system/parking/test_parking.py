"""The whole weights × process matrix on the installed llmux, with the stand-in and its ledger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llmux_guest import LlmuxGuest
from parking_lab import AS_ROOT, ParkingLab, model, small

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

WEIGHTS_MIB = 48


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = ParkingLab(llmux)
    yield lab
    lab.end()


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
    half: dict[str, Any] = {"extra_args": ["--gpu-memory-utilization", "0.4"], "gpu_memory": 0.4}
    ways = {"alpha": "retain+keep_running", "beta": "retain+freeze"}
    lab.begin({name: small(how, **half) for name, how in ways.items()})
    report = lab.llmux.load("parked", "3", "0", *(f"{n}={how}" for n, how in ways.items()))
    print(report)
    assert report["wrong"] == [], lab.llmux.journal()


def test_everything_on_the_gpu_must_fit_into_memory_to_be_suspended(lab: ParkingLab) -> None:
    """80 GiB do not: refused with the figures, and the room is made all the same."""
    lab.begin({"alpha": model("retain+cuda_suspend"), "beta": model("retain+stop")})
    lab.good("alpha")
    lab.good("beta")
    assert lab.said("weights that were retained *and* the KV cache), but MemAvailable")
    assert lab.witness("held").keys() == {"beta"}
    lab.good("alpha")


def test_two_images_are_restored_in_turns_fifty_times(lab: ParkingLab) -> None:
    """Made once each; 24 restores of either, with one supervisor killed in the middle."""
    lab.begin({name: small("retain+checkpoint", 16) for name in ("alpha", "beta")})
    first = lab.llmux.load("turns", "--count=4", "--residue")
    made = lab.images()
    report = lab.llmux.load("turns", "--count=24", "--residue")
    lab.run(["systemctl", "kill", "--signal=SIGKILL", "--kill-whom=main", "llmux.service"])
    rest = lab.llmux.load("turns", "--count=24", "--residue")
    print(f"first {first}\nthen  {report}\nafter {rest}")
    assert [*first["wrong"], *report["wrong"], *rest["wrong"]] == [], lab.llmux.journal()
    assert len(lab.said("criu restore: success")) >= 49
    images = lab.images()
    assert {name: images[name]["created"] for name in made} == {
        name: image["created"] for name, image in made.items()
    }
    for name in images:
        lab.cli("unload", name)
    assert lab.witness("shm")["names"] == [], "left by 50 restores"


def test_an_image_that_is_not_kept_is_made_anew_each_time(lab: ParkingLab) -> None:
    """So every dump but the first is one of a restored engine."""
    lab.begin(
        {name: small("discard+checkpoint", 16) for name in ("alpha", "beta")},
        checkpoint={"keep_images": False},
    )
    report = lab.llmux.load("turns", "--count=12", "--residue")
    assert report["wrong"] == [], lab.llmux.journal()
    made = lab.said("GiB on disk) made in")
    assert len(made) == 11, made
    assert not lab.said("its image is reused")
    assert lab.images().keys() == {"alpha"}  # beta serves: its image served its turn


def test_a_discarded_image_is_smaller_by_the_weights(lab: ParkingLab) -> None:
    mib = 256
    ways = {"alpha": "retain+checkpoint", "beta": "discard+checkpoint"}
    lab.begin({name: small(how, mib) for name, how in ways.items()})
    for name in ("alpha", "beta", "alpha"):
        lab.good(name)
    sizes = {name: image["disk_bytes"] / 2**20 for name, image in lab.images().items()}
    print(f"retained {sizes['alpha']:.1f} MiB, discarded {sizes['beta']:.1f} MiB")
    assert 0.9 * mib < sizes["alpha"] - sizes["beta"] < 1.1 * mib


def test_several_gpus_are_not_checkpointed_unless_the_model_opts_in(lab: ParkingLab) -> None:
    two: dict[str, Any] = {"gpus": 2, "extra_args": ["--tensor-parallel-size", "2"]}
    for process in ("cuda_suspend", "checkpoint"):
        lab.llmux.configure({"alpha": small(f"offload+{process}", **two)}, **AS_ROOT)
        told = lab.run(["llmux", "check"], check=False)
        assert told.returncode == 78
        assert f"cannot use {process} with a model on 2 GPUs" in told.stderr
    lab.llmux.configure(
        {"alpha": small("offload+checkpoint", allow_tensor_parallel_parking=True, **two)}, **AS_ROOT
    )
    lab.run(["llmux", "check"])


def test_nor_when_an_operator_asks_for_it(lab: ParkingLab) -> None:
    two: dict[str, Any] = {"gpus": 2, "extra_args": ["--tensor-parallel-size", "2"]}
    lab.begin({"alpha": small("offload+keep_running", **two)}, gpu_count=2)
    lab.good("alpha")
    words = ("sleep", "alpha", "--eviction", "offload+cuda_suspend")
    refused = lab.run(["llmux", *words], check=False)
    assert refused.returncode == 3
    assert "cannot use cuda_suspend with a model on 2 GPUs" in refused.stderr
    lab.good("alpha")
