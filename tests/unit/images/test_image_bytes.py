"""The bytes of an image: read, compared, copied and made to last, whatever fails on the way."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import pathlib
import re
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from llmux.drivers.images import files
from llmux.drivers.images.checksums import ImageCheck
from llmux.drivers.images.files import PAGE, PIECE, SEGMENT, FileSums
from llmux.drivers.images.manifest import Manifest
from llmux.image_ports import DumpPhase


def digest(directory: pathlib.Path, *names: str, **options: Any) -> tuple[FileSums, ...]:
    values = {"punch": False, "stop": Event(), "count": lambda _: None, "workers": 1, **options}
    return files.digest_files(str(directory), names, **values)


def test_each_segment_has_its_own_checksum_and_is_counted(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(2 * SEGMENT + 5)
        for place, data in ((0, b"first"), (2 * SEGMENT, b"last")):
            file.seek(place)
            file.write(data)
    (tmp_path / "empty").touch()
    counted: list[int] = []
    one, none = digest(tmp_path, "f", "empty", count=counted.append)
    assert counted == [SEGMENT, SEGMENT, 5]
    assert (one.name, one.size, len(one.sums)) == ("f", 2 * SEGMENT + 5, 3)
    assert one.sums[1] == 0
    assert len({*one.sums}) == 3
    assert none == FileSums("empty", 0, ())


@pytest.mark.parametrize(
    "layout",
    [
        (b"x", 0),
        (b"\0" * PAGE, b"x" * PAGE, b"\0" * (3 * PAGE), b"y"),
        (b"x" * PIECE, b"\0" * (2 * PIECE), b"y" * 10, b"\0" * 100),
        (b"\0" * (PIECE - PAGE), b"x", b"\0" * (PIECE + PAGE - 1)),
        (b"x" * 7, b"\0" * (PAGE - 7), b"\0" * PAGE * 2, b"z" * PAGE),
    ],
)
def test_a_hole_is_as_good_as_zeros_and_only_zeros_become_one(
    tmp_path: pathlib.Path, layout: tuple[Any, ...]
) -> None:
    data = b"".join(part for part in layout if part)
    path = tmp_path / "f"
    path.write_bytes(data)
    before = digest(tmp_path, "f")
    assert digest(tmp_path, "f", punch=True) == before
    assert path.read_bytes() == data
    zero_pages = sum(not any(data[at : at + PAGE]) for at in range(0, len(data) - PAGE + 1, PAGE))
    pages = -(-len(data) // PAGE)
    assert path.stat().st_blocks * 512 <= (pages - zero_pages) * PAGE
    for place in range(0, len(data), PAGE):  # any page that is another one is seen
        changed = bytearray(data)
        changed[place] ^= 255
        path.write_bytes(changed)
        assert digest(tmp_path, "f") != before


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_holes_keeps_its_zeros(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "f").write_bytes(b"x" * PAGE + bytes(PAGE) + b"x" * PAGE + bytes(PAGE))
    before = digest(tmp_path, "f")
    asked: list[tuple[int, ...]] = []

    def fails(fd: int, *words: int) -> int:
        asked.append(words)
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(files, "_fallocate", fails)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output") as raised:
            digest(tmp_path, "f", punch=True)
        assert raised.value.filename == str(tmp_path / "f")
    else:
        assert digest(tmp_path, "f", punch=True) == before
    assert asked == [(3, PAGE, PAGE)], "asked once, for the zeros alone, and its size is kept"


@pytest.mark.parametrize(
    ("want", "have", "said"),
    [
        ([("a", 5, 1)], [("a", 5, 1)], None),
        ([("a", 5, 1)], [("b", 5, 1)], "a is missing"),
        ([("a", 5, 1)], [("a", 6, 1)], "a has 6 bytes instead of 5"),
        ([("a", 5, 1), ("b", 7, 2)], [("b", 7, 3), ("a", 5, 1)],
         "b is damaged between bytes 0 and 7"),
        ([("a", SEGMENT + 9, 1, 2)], [("a", SEGMENT + 9, 1, 3)],
         f"a is damaged between bytes {SEGMENT} and {SEGMENT + 9}"),
        ([("a", SEGMENT + 9, 1, 2)], [("a", SEGMENT + 9, 4, 3)],
         f"a is damaged between bytes 0 and {SEGMENT}"),
        ([], [("a", 5, 1)], None),
    ],
)  # fmt: skip
def test_what_differs_first_is_named(want: Any, have: Any, said: str | None) -> None:
    def made(rows: Any) -> list[FileSums]:
        return [FileSums(name, size, tuple(sums)) for name, size, *sums in rows]

    assert files.first_difference(made(want), made(have)) == said


def test_a_file_that_is_cut_meanwhile_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    with path.open("rb") as file:
        buffer = bytearray(60)
        files.read_exactly(file.fileno(), memoryview(buffer), 40)
        assert buffer == b"x" * 60
        with pytest.raises(OSError, match="shorter than it was") as raised:
            files.read_exactly(file.fileno(), memoryview(buffer), 41)
        assert raised.value.errno == errno.EIO
        real = os.preadv

        def a_little(fd: int, buffers: Any, offset: int) -> int:
            return real(fd, [buffers[0][:7]], offset)

        monkeypatch.setattr(os, "preadv", a_little)
        path.write_bytes(bytes(range(100)))
        files.read_exactly(file.fileno(), memoryview(buffer), 40)
        assert buffer == bytes(range(40, 100))
    stop = Event()
    with pytest.raises(FileNotFoundError):
        digest(tmp_path, "f", "gone", stop=stop)
    assert not stop.is_set()
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match="shorter than it was") as raised:
        digest(tmp_path, "f", stop=stop)
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(tmp_path / "f"))
    assert stop.is_set(), "all other segments are given up"
    (tmp_path / "link").symlink_to("f")
    with pytest.raises(OSError, match="symbolic"):
        digest(tmp_path, "link")


@pytest.mark.parametrize(
    ("parts", "size"),
    [
        ([(0, b"x")], 1),
        ([], 50_000),
        ([(8192, b"middle"), (1 << 20, b"end")], (1 << 20) + 3),
        ([(8192, b"middle")], 1 << 20),
        ([(0, b"begin" * 1000)], 3000),
    ],
)
def test_a_copy_has_the_same_bytes_and_the_same_holes(
    tmp_path: pathlib.Path, parts: list[tuple[int, bytes]], size: int
) -> None:
    with (tmp_path / "from").open("wb") as file:
        for place, data in parts:
            file.seek(place)
            file.write(data)
        if not parts or size > file.tell():
            file.truncate(size)
    with (tmp_path / "from").open("rb") as source, (tmp_path / "to").open("wb") as target:
        files.copy_sparse(source.fileno(), target.fileno(), size)
    assert (tmp_path / "to").read_bytes() == (tmp_path / "from").read_bytes()[:size]
    assert (tmp_path / "to").stat().st_blocks <= (tmp_path / "from").stat().st_blocks


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"1" * 5000)
    (tmp_path / "a" / "two").write_bytes(b"2" * 10)
    with (tmp_path / "a" / "b" / "three").open("wb") as file:
        file.truncate(1 << 20)
    return tmp_path


def test_sizes_are_of_all_files_holes_left_out(tree: pathlib.Path) -> None:
    blocks = sum(path.stat().st_blocks for path in tree.rglob("*") if path.is_file())
    assert files.sizes_on_disk(str(tree)) == (5010 + (1 << 20), blocks * 512)
    assert files.sizes_on_disk(str(tree / "gone")) == (0, 0)


def test_everything_is_synced_files_before_their_directory(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), os.path.realpath(tree)))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    before = len(os.listdir("/proc/self/fd"))
    files.sync_tree(str(tree))
    assert sorted(synced) == [".", "a", "a/b", "a/b/three", "a/two", "one"]
    assert synced.index("one") < synced.index(".")
    assert synced.index("a/two") < synced.index("a")
    synced.clear()
    files.sync_directory(str(tree / "a"))
    assert synced == ["a"]
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(NotADirectoryError):
        files.sync_directory(str(tree / "one"))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        files.sync_tree(str(tree))
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_file_is_read_ahead(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int, int]] = []

    def note(fd: int, *words: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        asked.append((name, *words))  # type: ignore[arg-type]

    monkeypatch.setattr(os, "posix_fadvise", note)
    before = len(os.listdir("/proc/self/fd"))
    files.fetch(str(tree))
    whole = (0, 0, os.POSIX_FADV_WILLNEED)
    assert sorted(asked) == sorted((name, *whole) for name in ("one", "two", "three"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_there_are_four_threads_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (3, 3), (4, 4), (96, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert files.threads() == threads


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: None, None),
        (lambda path: path.write_bytes(b"y" * 100),
         "the image is damaged: f is damaged between bytes 0 and 100"),
        (lambda path: path.unlink(), "the image cannot be read: .*No such file.*/f'"),
    ],
)  # fmt: skip
def test_an_image_is_checked_beside_its_restore(
    tmp_path: pathlib.Path, spoil: Callable[[pathlib.Path], None], said: str | None
) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)
    (tmp_path / "g").write_bytes(b"x" * 23)
    manifest = object.__new__(Manifest)
    object.__setattr__(manifest, "files", digest(tmp_path, "f", "g"))
    spoil(tmp_path / "f")
    reports: list[tuple[DumpPhase, int, int]] = []

    async def body() -> str | None:
        check = ImageCheck(manifest, str(tmp_path), lambda *words: reports.append(words))
        assert check.users == 0
        result = await check.task
        await asyncio.sleep(0)
        return result

    found = asyncio.run(body())
    if said is None:
        assert found is None
        assert reports[-1] == (DumpPhase.PACK, 123, 123)
    else:
        assert found is not None and re.fullmatch(said, found)


def test_a_hole_at_the_end_is_zeros_as_well(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    os.truncate(tmp_path / "f", 2 * SEGMENT + 1)
    (one,) = digest(tmp_path, "f")
    assert one.sums[0] != 0
    assert one.sums[1:] == (0, 0)
    with (tmp_path / "f").open("rb") as source, (tmp_path / "to").open("wb") as target:
        files.copy_sparse(source.fileno(), target.fileno(), 2 * SEGMENT + 1)
    copy = (tmp_path / "to").stat()
    assert (copy.st_size, copy.st_blocks * 512 <= PIECE) == (2 * SEGMENT + 1, True)
    assert digest(tmp_path, "to")[0].sums == one.sums


def test_a_disk_that_fails_is_not_taken_for_a_hole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"x")

    def fails(*_: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "lseek", fails)
        with pytest.raises(OSError, match="Input/output error"):
            digest(tmp_path, "f")
        with (
            (tmp_path / "f").open("r+b") as file,
            pytest.raises(OSError, match="Input/output error"),
        ):
            files.copy_sparse(0, file.fileno(), 1)
    with (tmp_path / "f").open("r+b") as file, pytest.raises(OSError, match="shorter than it was"):
        monkeypatch.setattr(os, "sendfile", lambda *_: 0)
        files.copy_sparse(file.fileno(), file.fileno(), 1)
