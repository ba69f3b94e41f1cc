"""An image as a stream and as a file: what is sent, what arrives, and what goes on where it was."""

from __future__ import annotations

import io
import os
import pathlib
import re
import stat
import tarfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_image_bytes import digest
from test_store_lives import GOOD

from llmux.drivers.images import files, manifest
from llmux.drivers.transfer import file as transfer_file
from llmux.drivers.transfer import header, stream
from llmux.drivers.transfer.header import BadStream, Header
from llmux.drivers.transfer.stream import Import, receive_header, segments, skip_entries
from llmux.errors import LlmuxError

ID = "0" * 32
SEGMENT = 1 << 16  # in these tests


class Sent:
    """An image in a directory: a whole segment, one of zeros, a short one, an empty file."""

    def __init__(self, home: pathlib.Path) -> None:
        self.directory = home / "image"
        self.directory.mkdir()
        self.counted: list[int] = []
        with (self.directory / "a").open("wb") as file:
            file.truncate(2 * SEGMENT + 3)
            file.write(b"begin")
            file.seek(2 * SEGMENT)
            file.write(b"end")
        (self.directory / "b").touch()
        sums = digest(self.directory, "a", "b")
        self.header = Header(ID, 0, "ab" * 16, {"k": "v"}, (), replace(GOOD, files=sums))

    def stream(self, first: int = 0, *, headed: bool = True) -> bytes:
        out = io.BytesIO()
        self.counted.clear()
        head = replace(self.header, first=first)
        stream.send(head, str(self.directory), out, self.counted.append, headed=headed)
        return out.getvalue()


@pytest.fixture
def sent(home: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Sent:
    for module in (files, manifest, header, stream):
        monkeypatch.setattr(module, "SEGMENT", SEGMENT)
    return Sent(home)


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        assert {(one.mode, one.type) for one in members} <= {(0o600, tarfile.REGTYPE)}
        return [one.name for one in members]


def test_segments_are_numbered_over_all_files(sent: Sent) -> None:
    found = [(one.number, one.name, one.start, one.end) for one in segments(sent.header.manifest)]
    assert found == [
        (0, "a/00000000", 0, SEGMENT), (1, "a/00000001", SEGMENT, 2 * SEGMENT),
        (2, "a/00000002", 2 * SEGMENT, 2 * SEGMENT + 3),
    ]  # fmt: skip


def test_a_stream_leaves_out_zeros_and_what_is_there_and_counts_all(sent: Sent) -> None:
    head = "llmux-image.json"
    assert names(sent.stream()) == [head, "a/00000000", "a/00000002"]
    assert sent.counted == [SEGMENT, SEGMENT, 3]
    assert names(sent.stream(1)) == [head, "a/00000002"]
    assert sent.counted == [SEGMENT, SEGMENT, 3]
    assert names(sent.stream(2, headed=False)) == ["a/00000002"]
    before = len(os.listdir("/proc/self/fd"))
    (sent.directory / "b").write_text("x")
    with pytest.raises(LlmuxError, match="b has 1 bytes, not 0"):
        sent.stream()
    (sent.directory / "b").unlink()
    with pytest.raises(FileNotFoundError):
        sent.stream()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_arrives_is_kept_and_completed(sent: Sent, home: pathlib.Path) -> None:
    own = home / "own"
    own.mkdir(mode=0o700)
    arriving = Import(str(own))
    assert arriving.received() is None
    data = sent.stream()
    source = io.BytesIO(data)
    head = receive_header(source)
    counted: list[int] = []
    cut = io.BytesIO(data[: source.tell() + SEGMENT + 512])
    cut.seek(source.tell())
    with pytest.raises(BadStream, match="ended too early"):
        arriving.run(head, cut, counted.append)
    assert (arriving.received(), counted) == ((ID, 1), [SEGMENT])
    with pytest.raises(BadStream, match="begins with segment 2, and 1 have arrived") as raised:
        arriving.run(replace(head, first=2), io.BytesIO(), counted.append)
    assert "--resume" in (raised.value.hint or "")
    rest = io.BytesIO(sent.stream(1))
    arriving.run(receive_header(rest), rest, counted.append)
    assert counted == [SEGMENT, 3]
    assert arriving.received() == (ID, 3)
    assert (own / ".import" / "a").read_bytes() == (sent.directory / "a").read_bytes()
    assert (own / ".import" / "a").stat().st_blocks * 512 < SEGMENT
    assert {stat.S_IMODE(p.stat().st_mode) for p in (own / ".import").iterdir()} == {0o600}
    for _ in range(2):
        arriving.complete(head.manifest)
        assert (own / ".import" / "manifest.json").read_text() == head.manifest.to_json()
    (own / ".import" / "link").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        arriving.complete(head.manifest)  # its manifest says that all else lasts
    assert sorted(os.listdir(own / ".import")) == ["a", "b", "link"]
    for _ in range(2):
        arriving.forget_notes()
        assert os.listdir(own) == [".import"]
    arriving.forget()
    assert os.listdir(own) == []


def test_another_image_begins_anew_and_damage_ends_what_has_arrived(
    sent: Sent, home: pathlib.Path
) -> None:
    own = home / "own"
    own.mkdir(mode=0o700)
    arriving = Import(str(own))

    def take(data: bytes, **fields: Any) -> None:
        source = io.BytesIO(data)
        arriving.run(replace(receive_header(source), **fields), source, lambda size: None)

    take(sent.stream())
    with pytest.raises(BadStream, match="a/00000000 is missing in the stream"):
        take(sent.stream(1), first=0, id="1" * 32)
    assert arriving.received() == ("1" * 32, 0)
    take(sent.stream(), id="1" * 32)
    with (own / ".import" / "a").open("r+b") as file:
        file.write(b"B")
    with pytest.raises(BadStream, match="a is damaged between bytes 0 and"):
        take(sent.stream(2), id="1" * 32)
    assert os.listdir(own) == []
    last = sent.stream()
    short = io.BytesIO(last[: -2 * 512 - 512 - 512] + bytes(1024))
    with pytest.raises(BadStream, match="a/00000002 is missing in the stream"):
        take(short.getvalue())
    for name in (".import.done", ".import.json"):
        (own / name).write_text("damaged")
        assert arriving.received() is None
    (own / ".import.json").write_bytes(sent.header.to_json())
    (own / ".import.done").write_text("")
    assert arriving.received() == (ID, 0)
    arriving.forget()


def entry(name: str, size: int, **fields: Any) -> bytes:
    made = tarfile.TarInfo(name)
    made.size = size
    for key, value in fields.items():
        setattr(made, key, value)
    return made.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "ended too early"),
        (bytes(512), "is not a stream"),
        (entry("x", 0), "is not a stream"),
        (entry(header.NAME, header.MAX_BYTES), "ended too early"),
        (entry(header.NAME, header.MAX_BYTES + 1), "at most"),
        (entry(header.NAME, 0, type=tarfile.SYMTYPE, linkname="y"), "is not a plain file"),
        (entry(header.NAME, 0, linkname="y"), "is not a plain file"),
        (b"x" * 512, "is damaged"),
        (entry(header.NAME, 2) + b"{}", "ended too early"),
        (entry(header.NAME, 2) + b"{}" + bytes(510), "cannot be read"),
    ],
)
def test_what_is_no_head_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadStream, match=said):
        receive_header(io.BytesIO(data))


def test_entries_are_skipped_when_they_are_whole() -> None:
    data = entry("a", 0) + entry("b", 513) + bytes(1024) + entry("c", 512) + bytes(512) + bytes(512)
    source = io.BytesIO(data)
    found = [(one.name, source.tell()) for one in skip_entries(source)]
    assert found == [("a", 512), ("b", 2048), ("c", 3072)]
    for cut in (2047, 3071, 1500):
        with pytest.raises(BadStream, match="ended too early"):
            list(skip_entries(io.BytesIO(data[:cut])))


# ---- a file --------------------------------------------------------------------------------------


def test_a_file_is_complete_under_its_name_alone(sent: Sent, home: pathlib.Path) -> None:
    place = home / "out"
    place.mkdir(mode=0o700)
    head = replace(sent.header, manifest=replace(sent.header.manifest, model="org/m"))
    asked: list[tuple[int, bool]] = []

    def write(data: bytes) -> Callable[[Any, int, bool], None]:
        def to(out: Any, first: int, headed: bool) -> None:
            asked.append((first, headed))
            out.write(data)

        return to

    path = transfer_file.write_file(str(place), head, write(sent.stream()))
    assert os.listdir(place) == [os.path.basename(path)]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    part = pathlib.Path(f"{path}.part")
    whole = sent.stream()
    start = len(sent.stream(2)) - 512 - 512 - 1024  # behind the header
    for data, first, headed in (
        (whole, 3, False),
        (whole[: start + 100], 0, False),
        (whole[: start + 512 + SEGMENT], 1, False),
        (whole[: start + 512 + SEGMENT + 3], 1, False),
        (whole[: start + 512 + SEGMENT] + entry("x", 0) + whole[start:], 1, False),
        (whole[: start - 1], 0, True),
        (b"", 0, True),
        (entry("x", 0), 0, True),
    ):
        asked.clear()
        part.write_bytes(data)
        transfer_file.write_file(str(place), head, write(b"rest"))
        assert asked == [(first, headed)]
        kept = pathlib.Path(path).read_bytes()
        assert kept.endswith(b"rest")
        assert headed is (kept == b"rest")
    part.write_bytes(whole)
    asked.clear()
    transfer_file.write_file(str(place), replace(head, id="1" * 32), write(b"other"))
    assert (asked, pathlib.Path(path).read_bytes()) == ([(0, True)], b"other")
    part.symlink_to("elsewhere")
    with pytest.raises(LlmuxError, match=re.escape(f"cannot write {part}: ")):
        transfer_file.write_file(str(place), head, write(b""))
