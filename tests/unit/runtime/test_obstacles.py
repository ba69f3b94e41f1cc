"""What would prevent an image is avoided at the start, and said right after it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_harness import OFFLOAD, Shop, drivers_on, in_loop, model

from llmux.config.schema import Eviction, Limits, Process, Weights
from llmux.core.plans import Outcome, start_plan
from llmux.drivers.images.identity import model_files_are_here
from llmux.ports import EngineUser
from llmux.protocol import Address
from llmux.runtime.engines.launch import launch_digest, launch_spec
from tests.twins.world import World

CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
COMMIT = "1" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache with the files of owner/name."""
    folder = tmp_path / "hub/models--owner--name"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "blobs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    shards = {"layer.0": "model-1.safetensors", "layer.1": "model-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in ("config.json", *shards.values()):
        (snapshot / name).write_text("{}")
    return folder


def are_here(hub: Path) -> bool:
    return model_files_are_here("owner/name", {"HF_HUB_CACHE": str(hub.parent)})


def test_a_whole_snapshot_is_here(hub: Path) -> None:
    assert are_here(hub)
    assert not model_files_are_here("owner/other", {"HF_HUB_CACHE": str(hub.parent)})


def test_a_broken_download_is_not(hub: Path) -> None:
    (hub / "blobs/abc.incomplete").write_text("")
    assert not are_here(hub)


@pytest.mark.parametrize("name", ["model-2.safetensors", "config.json"])
def test_a_snapshot_that_lacks_a_file_is_not(hub: Path, name: str) -> None:
    (hub / "snapshots" / COMMIT / name).unlink()
    assert not are_here(hub)


@pytest.mark.parametrize("damage", ["{", "[]", '{"weight_map": 5}'])
def test_a_damaged_index_is_not(hub: Path, damage: str) -> None:
    (hub / "snapshots" / COMMIT / "model.safetensors.index.json").write_text(damage)
    assert not are_here(hub)


def test_a_directory_is_here(tmp_path: Path) -> None:
    assert model_files_are_here(str(tmp_path), {})


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("eviction", [CHECKPOINT, OFFLOAD], ids=str)
def test_a_model_for_images_does_not_ask_the_hub(
    tmp_path: Path, eviction: Eviction, here: bool
) -> None:
    drivers = replace(drivers_on(World(), str(tmp_path)), files_are_here=lambda *_: here)
    config = model("a", eviction=eviction)
    spec = launch_spec(config, Address(uds="/x"), (0,), drivers)
    assert ("HF_HUB_OFFLINE" in spec.env) is (here and eviction is CHECKPOINT)
    other = replace(drivers, files_are_here=lambda *_: not here)
    assert launch_digest(config, (0,), drivers.places) == launch_digest(config, (0,), other.places)


def test_each_field_of_a_launch_is_of_the_model_and_its_places(tmp_path: Path) -> None:
    drivers = drivers_on(World(), str(tmp_path))
    config = model("a", limits=Limits(tasks_max=77))
    spec = launch_spec(config, Address(uds="/x"), (3,), drivers)
    assert (spec.model, spec.user, spec.argv[1:3]) == ("a", None, ("serve", "models/a"))
    assert (spec.stdout, spec.stderr) == ("/images/a/stdout.log", "/images/a/stderr.log")
    assert spec.runtime_dir == f"{tmp_path}/engines/a"
    assert (spec.properties["TasksMax"], spec.env["CUDA_VISIBLE_DEVICES"]) == (77, "3")
    whose = EngineUser("a-user", 5, 6, "/home/a")
    users: Any = SimpleNamespace(find={"a": whose}.__getitem__)
    others = replace(drivers, places=replace(drivers.places, users=users))
    assert launch_spec(config, Address(uds="/x"), (3,), others).user is whose


def test_a_model_whose_ladder_ends_in_an_image_does_not_either(tmp_path: Path) -> None:
    drivers = replace(drivers_on(World(), str(tmp_path)), files_are_here=lambda *_: True)
    config = model("a", eviction=OFFLOAD, ladder=(replace(CHECKPOINT, weights=Weights.OFFLOAD),))
    assert launch_spec(config, Address(uds="/x"), (0,), drivers).env["HF_HUB_OFFLINE"] == "1"


def test_what_the_model_s_own_environment_says_counts(tmp_path: Path) -> None:
    drivers = replace(drivers_on(World(), str(tmp_path)), files_are_here=lambda *_: True)
    config = model("a", eviction=CHECKPOINT, env={"HF_HUB_OFFLINE": "0"})
    assert launch_spec(config, Address(uds="/x"), (0,), drivers).env["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("eviction", [CHECKPOINT, OFFLOAD], ids=str)
@in_loop
async def test_an_obstacle_is_said_right_after_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, eviction: Eviction
) -> None:
    world = World()
    world.obstacles["a"] = (
        "process 7 has a TCP connection that leaves the engine; set HF_HUB_OFFLINE"
    )
    config = model("a", eviction=eviction)
    with caplog.at_level(logging.WARNING):
        ended = await Shop(world, str(tmp_path)).run(config, start_plan(config, 60.0))
    assert ended.outcome is Outcome.UP
    said = [r.getMessage() for r in caplog.records if "cannot be checkpointed" in r.getMessage()]
    assert bool(said) is (eviction is CHECKPOINT)
    assert all("set HF_HUB_OFFLINE" in line for line in said)


@in_loop
async def test_devices_are_judged_by_what_the_driver_can_suspend(tmp_path: Path) -> None:
    world = World()
    config = model("a", eviction=CHECKPOINT)
    await Shop(world, str(tmp_path)).run(config, start_plan(config, 60.0))
    (look,) = [call for call in world.calls if call.operation == "checkpointer.obstacle"]
    assert look.args == ([world.engines["a"].handle.pid],)


@in_loop
async def test_a_driver_that_does_not_say_leaves_them_to_the_dump(tmp_path: Path) -> None:
    world = World()
    world.fail("cuda.suspendable")
    config = model("a", eviction=CHECKPOINT)
    ended = await Shop(world, str(tmp_path)).run(config, start_plan(config, 60.0))
    assert ended.outcome is Outcome.UP
    (look,) = [call for call in world.calls if call.operation == "checkpointer.obstacle"]
    assert look.args == (None,)
