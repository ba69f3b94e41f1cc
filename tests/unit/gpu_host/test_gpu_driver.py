"""CUDA is initialised as root before the first engine starts; a driver that comes later is seen."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmux.core.plans import SPAWN_SECS
from llmux.daemon.gpu_driver import INITIALISE_SECS, CudaStart, restart_for_driver
from llmux.drivers.cuda.driver import CudaDriver
from llmux.drivers.gpu import nvml_is_here
from llmux.errors import DriverError
from llmux.runtime.engines.gpu_memory import ROOM_SECS

sys.path[:0] = [str(Path(__file__).parents[2] / "fake_libcuda")]

# ruff: noqa: E402  # the folder has to be on the path first
from fake_cuda import COMPILER, FakeCuda

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the fake libcuda")


def initialised(fake: FakeCuda) -> int:
    path = fake.directory / "log"
    return path.read_text().count("cuInit ") if path.exists() else 0


@needs_compiler
def test_cuda_is_initialised_once(tmp_path: Path) -> None:
    fake = FakeCuda(tmp_path)

    async def body() -> None:
        driver = CudaDriver(str(fake.library))
        start = CudaStart(driver)
        await asyncio.gather(start.wait(), start.wait())
        assert initialised(fake) == 1
        await start.wait()
        # The helper that did it stays, and makes the calls.
        await driver.suspended([], 10.0)
        assert initialised(fake) == 1
        await driver.close()

    asyncio.run(body())


@needs_compiler
def test_a_driver_that_fails_is_said_and_holds_up_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeCuda(tmp_path)
    fake.fault("cuInit", "fail 999")

    async def body() -> None:
        driver = CudaDriver(str(fake.library))
        await CudaStart(driver).wait()
        await driver.close()

    asyncio.run(body())
    assert "CUDA cannot be initialised, engines may fail: " in caplog.text
    assert "CUDA_ERROR_UNKNOWN" in caplog.text


@needs_compiler
def test_what_failed_is_tried_again_by_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeCuda(tmp_path)
    fake.fault("cuInit", "fail 999")  # as while the fabric manager still starts

    async def body() -> None:
        driver = CudaDriver(str(fake.library))
        start = CudaStart(driver)
        await start.wait()
        assert "CUDA cannot be initialised" in caplog.text
        caplog.clear()
        fake.heal()
        before = initialised(fake)
        await start.wait()
        await start.wait()
        assert initialised(fake) == before + 1, "it worked, and once is enough"
        await driver.close()

    asyncio.run(body())
    assert "CUDA cannot be initialised" not in caplog.text


def test_what_was_initialised_is_not_begun_again_and_what_failed_is() -> None:
    class Driver:
        asked = 0

        async def initialise(self) -> None:
            self.asked += 1
            if self.asked == 1:
                raise DriverError("initialise", "CUDA", "the fabric manager still starts")

    driver = Driver()
    start = CudaStart(driver)  # type: ignore[arg-type]  # all of it that is called

    async def body() -> None:
        for asked in (1, 2, 2, 2):
            await start.wait()
            assert driver.asked == asked

    asyncio.run(body())


def test_an_engine_waits_for_less_than_its_spawn_may_take() -> None:
    assert INITIALISE_SECS + ROOM_SECS + 1 < SPAWN_SECS


@needs_compiler
def test_a_driver_that_hangs_holds_up_a_start_for_so_long_only(tmp_path: Path) -> None:
    fake = FakeCuda(tmp_path)
    fifo = fake.fault("cuInit", "hang")

    async def body() -> None:
        driver = CudaDriver(str(fake.library))
        start = CudaStart(driver, seconds=0.05)
        await start.wait()
        fake.release(fifo)  # blocks until it hangs there
        await CudaStart(driver).wait()
        await driver.close()

    asyncio.run(body())


class Host:
    """A driver that comes, and NVML behind it. ``loaded``: it was there at the start."""

    def __init__(self, directory: Path, *, loaded: bool = False) -> None:
        self.version = directory / "version"
        self.mark = directory / "mark"
        self.loaded = loaded
        if loaded:
            self.version.touch()
        self.answers: Iterator[bool] = iter(())
        self.restarts = 0
        self.works = True

    def restart(self) -> bool:
        self.restarts += 1
        return self.works

    def has_nvml(self) -> bool:
        return next(self.answers)

    async def watched(self, until: Callable[[], bool]) -> None:
        work = asyncio.create_task(
            restart_for_driver(
                self.restart,
                str(self.mark),
                loaded=self.loaded,
                version=str(self.version),
                has_nvml=self.has_nvml,
                every=0.001,
            )
        )
        async with asyncio.timeout(30):
            while not until():
                assert not work.done(), work
                await asyncio.sleep(0.001)
        work.cancel()


def test_a_driver_that_comes_restarts_llmux(tmp_path: Path) -> None:
    host = Host(tmp_path)

    async def body() -> None:
        asyncio.get_running_loop().call_later(0.05, host.version.touch)
        await host.watched(lambda: host.restarts > 0)

    asyncio.run(body())
    assert host.restarts == 1


def test_a_driver_whose_nvml_comes_later_restarts_llmux_then(tmp_path: Path) -> None:
    host = Host(tmp_path, loaded=True)
    host.answers = iter((False, False, True))
    asyncio.run(host.watched(lambda: host.restarts > 0))
    assert list(host.answers) == [], "asked until it was there"


def test_a_driver_that_comes_and_goes_does_not_restart_llmux_all_the_time(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.version.touch()
    asyncio.run(host.watched(lambda: host.restarts > 0))
    asked: list[bool] = []

    def ask() -> bool:
        asked.append(True)
        return True

    host.has_nvml, host.loaded = ask, True  # type: ignore[method-assign]
    asyncio.run(host.watched(lambda: len(asked) > 5))  # the next supervisor, which saw none either
    assert host.restarts == 1
    hour_ago = time.time() - 3600
    os.utime(host.mark, (hour_ago, hour_ago))
    asyncio.run(host.watched(lambda: host.restarts > 1))


def test_without_a_place_for_its_mark_it_does_not_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(tmp_path)
    host.version.touch()
    host.mark = tmp_path / "gone" / "mark"
    asyncio.run(host.watched(lambda: "`systemctl restart llmux` uses it" in caplog.text))
    assert host.restarts == 0


def test_where_it_cannot_restart_it_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(tmp_path, loaded=True)
    host.works = False
    host.answers = iter((True,))
    told = "`systemctl restart llmux` makes it use GPUs"
    asyncio.run(host.watched(lambda: told in caplog.text))


def test_a_restart_that_systemd_refused_is_tried_again(tmp_path: Path) -> None:
    """Not at once: its mark says when the last one was."""
    host = Host(tmp_path)
    host.version.touch()
    host.works = False

    hour_ago = time.time() - 3600
    looks: list[bool] = []

    def has_nvml() -> bool:
        looks.append(True)
        if len(looks) == 5:
            assert host.restarts == 1
            os.utime(host.mark, (hour_ago, hour_ago))
        return True

    host.has_nvml, host.loaded = has_nvml, True  # type: ignore[method-assign]
    asyncio.run(host.watched(lambda: len(looks) > 10))
    assert host.restarts == 2


def test_looking_for_nvml_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver without a working NVML, as after an upgrade without a reboot, is asked for days."""
    monkeypatch.delenv("LLMUX_GPU_LEDGER", raising=False)
    monkeypatch.setenv("LLMUX_LIBNVML", "libc.so.6")  # is one, and has none of its functions
    before = set(threading.enumerate())
    assert not nvml_is_here()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()
