"""The weights of a model that is next, read into the page cache by a process of their own."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.engine import weights, weights_reader
from llmux.drivers.engine.weights import PageCache

Test = Callable[..., Coroutine[Any, Any, None]]


def in_loop(test: Test) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


PAGE = mmap.PAGESIZE
SIZE = 4 << 20


def in_cache(path: Path) -> int:
    """Bytes of the file that lie in the page cache: mincore(2)."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * (size // PAGE))()
        first = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(ctypes.addressof(first))
        code = libc.mincore(address, ctypes.c_size_t(size), pages)
        del first
        assert code == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) * PAGE


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(weights, "LEAST", 2 * SIZE)
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(os.urandom(SIZE))
        drop(tmp_path / name)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / weights_reader.INDEX).write_text(json.dumps(index))
    yield tmp_path


@in_loop
async def test_the_files_of_the_index_lie_in_the_cache(model: Path) -> None:
    if in_cache(model / "model-1.safetensors"):
        pytest.skip("this file system keeps what it is told to drop (tmpfs)")
    await PageCache().read("m", str(model), {}, None)
    assert in_cache(model / "model-1.safetensors") == SIZE
    assert in_cache(model / "model-2.safetensors") == SIZE
    assert in_cache(model / "consolidated.safetensors") == 0, "the same weights once more"


def test_without_an_index_all_files_of_one_kind_are_read(model: Path) -> None:
    (model / weights_reader.INDEX).write_text("{")
    (model / "pytorch_model.bin").write_bytes(b"old")
    names = [os.path.basename(path) for path in weights_reader.weights_of(str(model))]
    assert names == ["consolidated.safetensors", "model-1.safetensors", "model-2.safetensors"]
    assert weights_reader.weights_of(str(model / "m.gguf")) == [str(model / "m.gguf")]


def test_memory_bounds_what_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights_reader, "WINDOW", 1 << 20)
    monkeypatch.setattr(weights_reader, "available_bytes", lambda: 12 << 20)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    weights_reader.main(["0", "0", "", str(model)])
    assert capsys.readouterr().out == f"{6 << 20}\n", "half of it: one file and a half"


@pytest.mark.parametrize(("budget", "windows"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (10, 3)])
def test_a_file_is_read_from_its_beginning_as_far_as_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, windows: int
) -> None:
    """Not its last, shorter part where the one before has no room: an engine reads in order."""
    monkeypatch.setattr(weights_reader, "WINDOW", 4 * PAGE)
    path = tmp_path / "m.safetensors"
    path.write_bytes(bytes(10 * PAGE))
    assert weights_reader.read(str(path), budget * PAGE) == min(4 * windows, 10) * PAGE


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert weights_reader.read(str(tmp_path / "model.safetensors"), SIZE) == 0


@in_loop
async def test_what_is_not_here_is_no_error(tmp_path: Path) -> None:
    await PageCache().read("m", "some/repository", {"HOME": str(tmp_path)}, None)
    await PageCache().read("m", str(tmp_path / "gone"), {}, None)


@in_loop
async def test_small_weights_start_no_process(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LEAST", 2 * SIZE + 1)
    monkeypatch.setattr(weights, "READER", model / "none.py")
    monkeypatch.setattr(weights, "run", None)  # would be called
    await PageCache().read("m", str(model), {}, None)


@in_loop
async def test_cancelled_it_reads_no_further(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is gone when the cancelled task has ended."""
    script = tmp_path / "reader.py"
    started = tmp_path / "started"
    script.write_text(
        "import os, signal\n"
        f"open({str(started)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(started)!r} + '.new', {str(started)!r})\n"
        "signal.pause()\n"
    )
    monkeypatch.setattr("llmux.drivers.engine.weights.READER", script)
    reading = asyncio.create_task(PageCache().read("m", str(model), {}, None))
    async with asyncio.timeout(30):
        while not started.exists():  # noqa: ASYNC110  # a process of others: no event
            await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_every_byte_is_read_and_not_only_asked_for(tmp_path: Path) -> None:
    """Of what POSIX_FADV_WILLNEED names Linux reads no more than one request of the disk takes."""
    size = 9 << 20
    path = tmp_path / "m.safetensors"
    path.write_bytes(bytes(size))

    def read_by_us() -> int:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["rchar"])

    before = read_by_us()
    assert weights_reader.read(str(path), size) == size
    assert read_by_us() - before >= size


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_it_reads_as_the_engines_user_and_nothing_that_this_one_may_not() -> None:
    with tempfile.TemporaryDirectory(prefix="llmux-weights-") as name:
        place = Path(name)
        place.chmod(0o755)
        for file, mode in (("open", 0o644), ("group", 0o640), ("closed", 0o600)):
            (place / file).write_bytes(b"w" * 1000)
            os.chown(place / file, 0, 64009)
            (place / file).chmod(mode)
        (place / "roots").write_bytes(b"w" * 1000)  # of root's group as well
        (place / "roots").chmod(0o640)
        names = ("closed", "group", "roots", "missing", "open")
        paths = [str(place / file) for file in names]

        def read_by(uid: int, groups: str) -> int:
            argv = [sys.executable, "-I", weights_reader.__file__, str(uid), str(uid), groups]
            done = subprocess.run([*argv, *paths], capture_output=True, text=True, check=True)
            return int(done.stdout)

        assert read_by(64008, "") == 1000
        assert read_by(64008, "64009,64010") == 2000
        assert read_by(0, "") == 4000
