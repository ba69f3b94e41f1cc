"""Host memory: what a parked engine takes reaches the core, and so does the kernel's pressure."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from runtime_harness import begin_life, config_of, in_loop, model

from llmux.core.events import LoadAsked, ParkAsked
from llmux.drivers.memory import Pressure
from llmux.runtime.pressure import watch_pressure
from tests.twins.disk import MemoryStore
from tests.twins.world import World


class Observer:
    def __init__(self) -> None:
        self.percent: float | None = 0.0

    def stalled_percent(self) -> float | None:
        return self.percent


@in_loop
async def test_pressure_begins_above_one_threshold_and_ends_below_another() -> None:
    observer = Observer()
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a")), World(), runtime, MemoryStore())
        watching = asyncio.create_task(watch_pressure(life.loop, observer, interval=0.001))
        for percent, short in ((6.0, True), (2.0, True), (0.5, False), (9.0, True), (None, False)):
            observer.percent = percent
            await life.loop.wait_for(lambda state, short=short: state.memory_short is short, 5)  # type: ignore[misc]  # a default binds it
        watching.cancel()
        await life.drop()


@in_loop
async def test_the_core_knows_what_a_parked_engine_takes() -> None:
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a")), World(), runtime, MemoryStore())
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        life.loop.post(ParkAsked("a"))
        await life.until_state("a", "parked")
        assert life.loop.state.models["a"].parked_bytes > 0
        await life.drop()


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("some avg10=9.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=7.25 avg60=0 total=1\n", 7.25),
        ("some avg10=9.00 avg60=0.00 avg300=0.00 total=1\n", None),
        ("", None),
    ],
)
def test_the_kernels_file_is_read(tmp_path: Path, text: str, percent: float | None) -> None:
    file = tmp_path / "memory"
    file.write_text(text)
    assert Pressure(str(file)).stalled_percent() == percent


def test_a_kernel_without_it_says_nothing(tmp_path: Path) -> None:
    assert Pressure(str(tmp_path / "none")).stalled_percent() is None
