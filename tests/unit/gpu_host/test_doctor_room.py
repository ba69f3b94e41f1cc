"""Host memory against the largest claim, and the disk against all images, on a made-up host."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmux.config.schema import CheckpointConfig, Config, Eviction, ModelConfig, Process, Weights
from llmux.daemon.claims import planned_claims
from llmux.daemon.engine_users import planned_starts
from llmux.drivers.doctor import room
from llmux.drivers.doctor.facts import GIB, Check, Claim, Host, Level, Ran, Space
from llmux.drivers.doctor.run import run_checks
from llmux.errors import LlmuxError
from llmux.ports import LaunchSpec

SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
IMAGE = Eviction(Weights.DISCARD, Process.CHECKPOINT)
NVML = json.dumps([{"0": 80 * GIB, "1": 80 * GIB}, {"0": 0, "1": 0}, [], True, 0.1])


def config_of(*models: ModelConfig, **checkpoint: Any) -> Config:
    return Config(
        models={model.name: model for model in models},
        checkpoint=CheckpointConfig(images_dir="/images", **checkpoint),
        engine_user="root",
    )


def a_host(tmp_path: Path, claims: Sequence[Claim] = (), **options: Any) -> Host:
    base = Host(
        root=tmp_path,
        run=lambda argv, seconds: Ran(0, NVML),
        space=lambda path: Space(1000 * GIB, 100 * GIB),
        memory=lambda: (64 * GIB, 0),
        starts=lambda config: (),
        claims=lambda config, starts, totals: claims,
        euid=0,
    )
    return replace(base, **options)


def write(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def an_image(tmp_path: Path, model: str, disk: int, apparent: int = 0) -> None:
    document = {"model": model, "disk_bytes": disk, "apparent_bytes": apparent}
    write(tmp_path, f"/images/{model}/images/manifest.json", json.dumps(document))
    (tmp_path / "images").chmod(0o700)


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "untrusted", lambda path: None)  # /tmp is everyone's


# ---- what is claimed, by the supervisor's own functions ------------------------------------------


def claims_of(model: ModelConfig, totals: Mapping[int, int]) -> dict[str, Claim]:
    config = config_of(model)
    found = planned_claims(config, planned_starts(config), totals)
    return {str(claim.eviction): claim for claim in found}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    directory = tmp_path / "weights"
    directory.mkdir()
    with open(directory / "model.safetensors", "wb") as file:
        os.truncate(file.fileno(), 16 * GIB)
    return str(directory)


def test_each_rung_claims_what_the_supervisor_asks_for(weights: str) -> None:
    ladder = (Eviction(Weights.OFFLOAD, Process.CHECKPOINT), SUSPEND, IMAGE, Eviction())
    model = ModelConfig("m", weights, eviction=OFFLOAD, ladder=ladder, gpu_memory=0.5)
    found = claims_of(model, {0: 80 * GIB})
    assert found["offload+keep_running"] == Claim("m", OFFLOAD, 17 * GIB, None)
    residue = int(80 * GIB * 0.03)
    both = found["offload+checkpoint"]
    assert both.host_bytes == 16 * GIB + residue + int(residue * 0.02) + GIB
    assert both.image_bytes == 16 * GIB + residue
    retained = found["retain+cuda_suspend"]
    assert retained.host_bytes == 40 * GIB + int(40 * GIB * 0.02) + GIB
    assert retained.image_bytes is None
    assert found["discard+checkpoint"].image_bytes == residue
    assert found["retain+stop"] == Claim("m", Eviction(), 0, None)


def test_what_is_not_known_is_not_guessed(weights: str) -> None:
    model = ModelConfig("m", weights, eviction=SUSPEND, ladder=(IMAGE,))
    assert {claim.host_bytes for claim in claims_of(model, {}).values()} == {None}
    several = replace(model, gpus=(0, 1), gpu_memory=1.0)
    assert claims_of(several, {0: 80 * GIB})["retain+cuda_suspend"].host_bytes is None
    assert claims_of(several, {0: GIB, 1: GIB})["retain+cuda_suspend"].host_bytes is not None
    any_two = claims_of(replace(several, gpus=2), {0: GIB, 1: 4 * GIB, 2: 4 * GIB})
    assert any_two["discard+checkpoint"].image_bytes == int(8 * GIB * 0.03)
    absent = ModelConfig("m", "/nowhere", eviction=OFFLOAD)
    assert claims_of(absent, {0: GIB})["offload+keep_running"].host_bytes is None


# ---- memory --------------------------------------------------------------------------------------


def memory(tmp_path: Path, *claims: Claim, **options: Any) -> Check:
    config = config_of(*(ModelConfig(claim.model, "/m", eviction=SUSPEND) for claim in claims))
    return room.check_memory(a_host(tmp_path, claims, **options), config)


def test_the_largest_claim_is_named_and_fits(tmp_path: Path) -> None:
    check = memory(tmp_path, Claim("a", SUSPEND, 20 * GIB, None), Claim("b", OFFLOAD, GIB, None))
    assert check.level is Level.OK
    assert check.seen.endswith("; a asks for 20.0 GiB (retain+cuda_suspend), the most of all")
    assert check.measured["largest_claim_bytes"] == 20 * GIB


def test_claims_that_do_not_fit_are_named_with_what_happens(tmp_path: Path) -> None:
    write(tmp_path, "/proc/meminfo", f"MemTotal:  {70 << 20} kB\nMemFree: 1 kB\n")
    claims = [Claim(name, SUSPEND, 72 * GIB, None) for name in "abcdef"]
    check = memory(tmp_path, *claims)
    assert check.level is Level.WARN
    assert "a asks for 72.0 GiB" in check.seen
    assert ", of 70.0 that this host has; too much also for b, c, d and 2 more" in check.seen
    assert "parked by the next rung of its ladder, or stopped" in check.remedy
    check = memory(tmp_path, Claim("a", OFFLOAD, 65 * GIB, None))
    assert check.level is Level.WARN
    assert "that this host has" not in check.seen, "it is only taken now"
    assert "which llmux does by itself" in check.remedy


def test_a_parked_engine_has_what_it_asked_for(tmp_path: Path) -> None:
    group = "/sys/fs/cgroup/llmux.slice/llmux-a.scope/memory.stat"
    write(tmp_path, group, f"anon {60 * GIB}\nfile {90 * GIB}\nshmem {2 * GIB}\n")
    parked, other = Claim("a", SUSPEND, 61 * GIB, None), Claim("b", SUSPEND, 20 * GIB, None)
    check = memory(tmp_path, parked, other, memory=lambda: (30 * GIB, 0))
    assert check.level is Level.OK
    check = memory(tmp_path, parked, other, memory=lambda: (10 * GIB, 0))
    assert (check.level, "b asks for 20.0 GiB" in check.seen) == (Level.WARN, True)
    assert "too much also" not in check.seen


def test_an_image_asks_for_memory_when_it_is_restored(tmp_path: Path) -> None:
    an_image(tmp_path, "a", GIB, 90 * GIB)
    an_image(tmp_path, "of-another-configuration", GIB, 900 * GIB)
    check = memory(tmp_path, Claim("a", SUSPEND, 20 * GIB, None))
    assert check.level is Level.WARN
    assert "a asks for 90.0 GiB (the restore of its image)" in check.seen


def test_a_file_that_nobody_can_read_hides_no_other_check(tmp_path: Path) -> None:
    write(tmp_path, "/sys/fs/cgroup/llmux.slice/memory.swap.current", "max\n")
    host = a_host(tmp_path, run=lambda argv, seconds: Ran(None, "it is not here"))
    found = {check.name: check for check in run_checks(None, host)}
    assert found[room.MEMORY].level is Level.WARN
    assert found[room.MEMORY].seen.startswith("could not be checked: ")
    assert "vLLM" in found, "what comes after it"


def test_engines_that_are_swapped_out_are_said(tmp_path: Path) -> None:
    swap = "/sys/fs/cgroup/llmux.slice/memory.swap.current"
    write(tmp_path, swap, f"{3 * GIB}\n")
    check = memory(tmp_path, memory=lambda: (64 * GIB, 8 * GIB))
    assert (check.level, "3.0 GiB of the engines' memory" in check.seen) == (Level.WARN, True)
    write(tmp_path, swap, "4096\n")
    assert memory(tmp_path, memory=lambda: (64 * GIB, 8 * GIB)).level is Level.OK


def test_what_is_unknown_is_named(tmp_path: Path) -> None:
    claims = [Claim("a", SUSPEND, None, None), Claim("b", OFFLOAD, 2 * GIB, None)]
    check = memory(tmp_path, *claims)
    assert (check.level, "; what else a may ask for is not known here" in check.seen) == (
        Level.OK,
        True,
    )
    check = memory(tmp_path, *claims, memory=lambda: (4 * GIB, 0))
    assert (check.level, "add RAM" in check.remedy) == (Level.WARN, True)


def test_how_engines_start_is_asked_once(tmp_path: Path) -> None:
    asked: list[Config] = []

    def starts(config: Config) -> Sequence[LaunchSpec]:
        asked.append(config)
        raise LlmuxError("there is no user x")

    config = config_of(ModelConfig("a", "/m", eviction=SUSPEND))
    host = replace(a_host(tmp_path), starts=starts)
    assert [host.planned(config), host.planned(config)] == [(), ()]
    assert asked == [config]


# ---- images --------------------------------------------------------------------------------------


def images(tmp_path: Path, claims: dict[str, int | None], **options: Any) -> Check:
    checkpoint = {key: options.pop(key) for key in ("max_bytes",) if key in options}
    models = [ModelConfig(name, "/m", eviction=OFFLOAD, ladder=(IMAGE,)) for name in claims]
    listed = [Claim(name, IMAGE, None, size) for name, size in claims.items()]
    return room.check_images(a_host(tmp_path, listed, **options), config_of(*models, **checkpoint))


def test_all_images_that_may_be_made_fit(tmp_path: Path) -> None:
    an_image(tmp_path, "b", 30 * GIB)
    check = images(tmp_path, {"a": 40 * GIB, "b": 500 * GIB})  # b's is made: it has its size
    assert check.level is Level.OK
    assert check.seen.endswith("; images take about 70.0 GiB (a, b; 1 is made)")
    assert check.measured == {"images_bytes": 70 * GIB, "free_bytes": 100 * GIB}


def test_images_without_room_on_the_disk_are_said(tmp_path: Path) -> None:
    check = images(tmp_path, {"a": 40 * GIB, "b": 59 * GIB})  # and 5 % for what else grows there
    assert (check.level, "larger disk" in check.remedy) == (Level.WARN, True)
    assert images(tmp_path, {"a": 40 * GIB, "b": 50 * GIB}).level is Level.OK


def test_a_budget_below_all_images_is_said(tmp_path: Path) -> None:
    an_image(tmp_path, "b", 30 * GIB)
    check = images(tmp_path, {"a": 40 * GIB, "b": None}, max_bytes=69 * GIB)
    assert check.level is Level.WARN
    assert check.seen.endswith("; max_bytes is 69.0 GiB")
    assert "raise checkpoint.max_bytes" in check.remedy
    assert "those models start cold" in check.remedy
    assert images(tmp_path, {"a": 40 * GIB, "b": None}, max_bytes=70 * GIB).level is Level.OK


def test_an_image_of_unknown_size_is_named(tmp_path: Path) -> None:
    check = images(tmp_path, {"a": None, "b": 40 * GIB})
    assert check.level is Level.OK
    assert check.seen.endswith("; no image yet of a, and no size known before it is made")
    few = images(tmp_path, {"a": None}, space=lambda path: Space(1000 * GIB, GIB))
    assert (few.level, "free space" in few.remedy) == (Level.WARN, True)
