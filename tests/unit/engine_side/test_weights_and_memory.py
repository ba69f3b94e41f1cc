"""Weights that are read ahead by another process, and the host's memory and disks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers import memory
from llmux.drivers.engine import weights, weights_reader
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


@pytest.mark.parametrize(
    ("names", "index", "read"),
    [
        (["b.safetensors", "a.safetensors", "c.bin"], None, ["a.safetensors", "b.safetensors"]),
        (["a.bin", "b.pt"], None, ["a.bin"]),
        (["a.pt", "b.gguf"], None, ["a.pt"]),
        (["b.gguf", "a.txt"], None, ["b.gguf"]),
        (["a.txt"], None, []),
        (["a.bin", "b.safetensors"], '{"weight_map": {"x": "a.bin", "y": "gone"}}', ["a.bin"]),
        (["a.bin", "b.safetensors"], '{"weight_map": []}', ["b.safetensors"]),
        (["a.bin", "b.safetensors"], "{", ["b.safetensors"]),
        (["a.bin", "b.safetensors"], "[]", ["b.safetensors"]),
        (["a.bin", "b.safetensors"], "{}", ["b.safetensors"]),
        (["a.bin", "b.safetensors"], '{"weight_map": {"x": []}}', ["b.safetensors"]),
    ],
)
def test_which_files_a_start_reads(
    tmp_path: Path, names: list[str], index: str | None, read: list[str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    if index is not None:
        (tmp_path / weights_reader.INDEX).write_text(index)
    assert weights_reader.weights_of(str(tmp_path)) == [str(tmp_path / name) for name in read]
    assert weights_reader.weights_of(str(tmp_path / "x.gguf")) == [str(tmp_path / "x.gguf")]


@pytest.mark.parametrize(
    ("budget", "done"), [(0, 0), (9, 0), (10, 10), (19, 10), (20, 20), (24, 20), (25, 25), (99, 25)]
)
def test_so_much_is_read_as_there_is_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, done: int
) -> None:
    monkeypatch.setattr(weights_reader, "WINDOW", 10)
    (tmp_path / "a.bin").write_bytes(b"x" * 25)
    before = len(os.listdir("/proc/self/fd"))
    assert weights_reader.read(str(tmp_path / "a.bin"), budget) == done
    assert weights_reader.read(os.devnull, budget) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_reader_says_what_lies_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    became: list[object] = []
    monkeypatch.setattr(weights_reader, "become", lambda *words: became.append(words))
    monkeypatch.setattr(os, "nice", became.append)
    monkeypatch.setattr(weights_reader, "available_bytes", lambda: 60)
    for name, size in (("a.bin", 20), ("b.bin", 15), ("c.bin", 10)):
        (tmp_path / name).write_bytes(b"x" * size)
    weights_reader.main(["7", "8", "5,9", "/no/such", str(tmp_path)])
    assert became == [(7, 8, [5, 9]), 19]
    assert capsys.readouterr().out == "30\n", "half of the memory"
    weights_reader.main(["0", "0", "", str(tmp_path / "b.bin"), str(tmp_path / "c.bin")])
    assert capsys.readouterr().out == "25\n"
    assert became[2] == (0, 0, [])
    monkeypatch.undo()
    assert 0 < weights_reader.available_bytes() < 1 << 60
