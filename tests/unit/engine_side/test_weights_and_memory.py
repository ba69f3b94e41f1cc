"""Weights that are read ahead by another process, and the host's memory and disks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers import memory
from llmux.drivers.engine import weights
from llmux.drivers.processes.run import Completed
from llmux.errors import DriverError, DriverTimeout
from llmux.ports import EngineUser


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (Completed(("x",), 0, "2147483648\n", ""), "2.00 GiB of weights of m are in the page"),
        (Completed(("x",), 1, "7", "no luck"), "weights of m: no luck"),
        (Completed(("x",), 0, "what", ""), "weights of m: what"),
        (DriverTimeout("run", "x", "late"), "weights of m: cannot run x: late"),
    ],
)
def test_weights_are_read_by_another_and_its_failure_is_no_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    done: Completed | DriverError,
    said: str,
) -> None:
    caplog.set_level("DEBUG", "llmux")
    weight = tmp_path / "model.safetensors"
    weight.touch()
    os.truncate(weight, weights.LEAST)
    asked: list[list[str]] = []

    async def run(argv: list[str], seconds: float) -> Completed:
        asked.append([*argv[2:], str(seconds)])
        if isinstance(done, DriverError):
            raise done
        return done

    monkeypatch.setattr(weights, "run", run)
    user = EngineUser("u", 70, 71, "/h", (5, 9))
    cache = weights.PageCache()
    asyncio.run(cache.read("m", str(tmp_path), {}, user))
    asyncio.run(cache.read("m", str(weight), {}, None))
    reader = str(weights.READER)
    assert asked == [
        [reader, "70", "71", "5,9", str(tmp_path), "600.0"],
        [reader, "0", "0", "", str(weight), "600.0"],
    ]
    assert said in caplog.text
    os.truncate(weight, weights.LEAST - 1)
    for path in (str(tmp_path), str(weight), "/no/such"):
        asyncio.run(cache.read("m", path, {}, None))
    assert len(asked) == 2


def test_what_is_no_failure_of_the_reader_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(argv: list[str], seconds: float) -> Completed:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(weights, "run", run)
    monkeypatch.setattr(weights, "LEAST", 0)
    with pytest.raises(RuntimeError):
        asyncio.run(weights.PageCache().read("m", str(tmp_path), {}, None))


def test_the_hosts_memory_and_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    assert 0 < memory.available_bytes() <= fields["MemTotal"]
    assert memory.swap_bytes() == fields["SwapTotal"]
    found = os.statvfs(tmp_path)
    total, free = memory.disk_space(tmp_path)
    assert total == found.f_blocks * found.f_frsize
    assert 0 < free <= found.f_bfree * found.f_frsize + (1 << 30)
    pressure = tmp_path / "memory"
    for text, percent in (
        ("some avg10=1.00 avg60=0.0\nfull avg10=12.34 avg60=0 avg300=0 total=5\n", 12.34),
        ("some avg10=1.00 avg60=0.0\n", None), ("full avg10=x \n", None), ("", None),
    ):  # fmt: skip
        pressure.write_text(text)
        assert memory.Pressure(str(pressure)).stalled_percent() == percent
    pressure.write_bytes(b"\xff")
    assert memory.Pressure(str(pressure)).stalled_percent() is None
    assert memory.Pressure(str(tmp_path / "none")).stalled_percent() is None
