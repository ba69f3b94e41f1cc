"""What processes hold, in a /proc of ours: what is recorded, kept and compared of it again."""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Callable
from dataclasses import replace
from pwd import getpwuid

import pytest

from llmux.drivers.criu import known_files, small_files
from llmux.drivers.criu.known_files import FileChanged
from llmux.drivers.images.manifest import KnownFile, ManifestError, SmallFile, load_manifest
from llmux.drivers.processes.users import ModelUsers
from llmux.small_files import read_small

ME, MINE = os.geteuid(), os.getegid()
NOBODY = 2**22 + 1


class Held:
    """Process 7 in a directory, with files beside it."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = pathlib.Path(os.path.realpath(root))
        self.proc = self.root / "p"
        self.own = self.proc / "7"
        (self.own / "fd").mkdir(parents=True)
        (self.own / "map_files").mkdir()
        (self.own / "maps").write_text("")
        self.shm = self.root / "shm"
        self.shm.mkdir()
        for name in ("work", "exe", "data", "lib"):
            (self.root / name).write_text(name)
        self.link("cwd", self.root)
        self.link("root", "/")
        self.link("exe", self.root / "exe")

    def link(self, name: str, target: object) -> None:
        (self.own / name).symlink_to(str(target))

    def held(self) -> list[str]:
        return [path for path, _ in known_files.held_by(7, str(self.proc))]


@pytest.fixture
def held(tmp_path: pathlib.Path) -> Held:
    return Held(tmp_path)


def test_everything_that_is_open_mapped_or_stood_in_is_named_once(held: Held) -> None:
    for number, target in enumerate(
        ("socket:[5]", "/proc/7/x", "/sys/x", "/memfd:a (deleted)", "/dev/zero", "/SYSV0 (deleted)",
         "/[aio] (deleted)", "/anon_hugepage (deleted)", held.root / "gone", held.root / "data",
         held.root / "data", held.root / "exe")
    ):  # fmt: skip
        held.link(f"fd/{number}", target)
    (held.own / "maps").write_bytes(
        b"00001000-00002000 r--p 0 08:01 6 /\xff\n"
        b"0000a000-0000b000 r--p 0 08:01 5 /lib\n0000b000-0000c000 r-xp 0 08:01 5 /lib\n"
        b"0000c000-0000d000 rw-p 0 00:00 0 \n0000d000-0000e000 rw-p 0 00:00 0 [heap]\n"
        b"0000e000-0000f000 rw-p 0 08:02 5 /a name\n"
    )
    held.link("map_files/a000-b000", held.root / "lib")
    held.link("map_files/b000-c000", held.root / "work")  # the same file: asked once
    held.link("map_files/e000-f000", held.root / "work")
    held.link("map_files/c000-d000", held.root / "shm")
    names = [held.root, "/", held.root / "exe", held.root / "lib", held.root / "work"]
    assert held.held() == [*map(str, names), str(held.root / "data")]
    found = dict(known_files.held_by(7, str(held.proc)))
    assert found[str(held.root / "data")].st_ino == (held.root / "data").stat().st_ino


@pytest.mark.parametrize("gone", ["fd", "maps", "all"])
def test_who_ends_meanwhile_hides_nothing_else(held: Held, gone: str) -> None:
    held.link("fd/0", held.root / "data")
    held.link("map_files/a000-b000", held.root / "lib")
    (held.own / "maps").write_text("0000a000-0000b000 r--p 0 08:01 5 /lib\n")
    if gone == "fd":
        (held.own / "fd" / "0").unlink()
        (held.own / "fd").rmdir()
    elif gone == "maps":
        (held.own / "maps").unlink()
    else:
        held.own.rename(held.proc / "8")
    paths = {pathlib.Path(path).name for path in held.held()}
    assert ("data" in paths, "lib" in paths) == (gone == "maps", gone == "fd")
    assert list(known_files.held_by(NOBODY)) == []


def test_a_record_leaves_out_what_is_kept_otherwise(held: Held) -> None:
    (held.shm / "a").write_text("")
    for number, target in enumerate((held.shm / "a", held.root / "data", f"{held.shm}x")):
        held.link(f"fd/{number}", target)
    (held.root / "x (deleted)").write_text("")
    held.link("fd/9", held.root / "x (deleted)")
    (held.root / "shmx").write_text("")
    found = known_files.record([7, 8], str(held.proc), str(held.shm))
    data = held.root / "data"
    assert set(found) == {"/", *(str(held.root / n) for n in ("exe", "data", "shmx")),
                          str(held.root)}  # fmt: skip
    status = data.stat()
    assert found[str(data)] == KnownFile(
        str(data), status.st_dev, status.st_ino, status.st_uid, status.st_mode
    )
    assert known_files.look(str(data)) == found[str(data)]


def test_names_of_an_image_complete_it_and_of_deleted_files_the_directory(held: Held) -> None:
    (held.root / "d").mkdir()
    (held.root / "e").mkdir()
    strange = KnownFile(str(held.root / "e"), 1, 2, 3, 4)
    names = ["/proc/x", "/sys/x", f"{held.shm}/s", str(held.root / "data"),
             str(held.root / "d/gone"), str(held.root / "lib"), str(held.root / "lib")]  # fmt: skip
    deleted = [str(held.root / "d/gone"), f"{held.shm}/gone", str(held.root / "e/gone")]
    known = known_files.complete({strange.path: strange}, names, deleted, shm=str(held.shm))
    assert [file.path for file in known] == sorted(
        str(held.root / name) for name in ("d", "data", "e", "lib")
    )
    assert strange in known, "what was held is what counts"
    with pytest.raises(FileNotFoundError) as raised:
        known_files.complete({}, [str(held.root / "none")], [])
    assert raised.value.filename == str(held.root / "none")
    before = len(os.listdir("/proc/self/fd"))
    known_files.look(str(held.root / "data"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file, None),
        (lambda file: replace(file, device=file.device + 1), "is another file than the one"),
        (lambda file: replace(file, inode=file.inode + 1), "is another file than the one"),
        (lambda file: replace(file, uid=4242), f"belongs to user {ME} now, and did to 4242"),
        (lambda file: replace(file, mode=stat.S_IFREG | 0o4755),
         "has mode 600 now, and had 4755"),
        (lambda file: replace(file, mode=stat.S_IFDIR | 0o755), None),
        (lambda file: replace(file, path=file.path + "x"),
         "cannot be reached as it was: No such file or directory"),
    ],
)  # fmt: skip
def test_each_kind_of_change_is_named_for_the_last_file_too(
    held: Held, change: Callable[[KnownFile], KnownFile], said: str | None
) -> None:
    (held.root / "data").chmod(0o600)
    good, first = known_files.look(str(held.root / "data")), known_files.look(str(held.root))
    changed = change(good)
    ours = str(held.root / "mine")
    known = [first, KnownFile(ours, 0, 0, 0, 0), changed]
    if said is None:
        known_files.check(known, [ours])
        return
    with pytest.raises(FileChanged) as raised:
        known_files.check(known, [ours])
    assert str(raised.value) == f"{changed.path} {said}" or said.startswith("is another")
    assert said in str(raised.value)
    known_files.check(known, [ours, changed.path])


def test_what_a_stopped_process_holds_is_compared_to_the_last_file(held: Held) -> None:
    (held.shm / "s").write_text("")
    for name in ("x (deleted)", "mine"):
        (held.root / name).write_text(name)
    for number, target in enumerate((held.shm / "s", f"{held.shm}/t (deleted)", held.root / "mine",
                                     held.root / "x (deleted)", held.root / "data")):  # fmt: skip
        held.link(f"fd/{number}", target)
    (held.shm / "t (deleted)").write_text("")
    known = [known_files.look(str(held.root / name)) for name in ("", "exe", "data")]
    known.append(known_files.look("/"))
    mine, deleted = str(held.root / "mine"), str(held.root / "x")

    def check(known: list[KnownFile], ours: list[str], gone: list[str]) -> None:
        places = {"proc": str(held.proc), "shm": str(held.shm)}
        known_files.check_restored([8, 7], known, ours, gone, **places)

    check(known, [mine, str(held.root / "not there")], [deleted])
    with pytest.raises(FileChanged) as raised:
        check(known, [], [deleted])
    assert str(raised.value) == f"process 7 holds {mine}, which it did not when dumped"
    with pytest.raises(FileChanged, match=r"x \(deleted\), which it did not"):
        check(known, [mine], [])
    with pytest.raises(FileChanged, match="data, which it did not"):
        check([file for file in known if not file.path.endswith("data")], [mine], [deleted])
    with pytest.raises(FileChanged, match="data belongs to user"):
        check([replace(file, uid=9) if file.path.endswith("data") else file for file in known],
              [mine], [deleted])  # fmt: skip


# ---- small files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "places"),
    [
        ({"HOME": "/h/", "TMPDIR": "/h/../t"}, ("/h", "/t")),
        ({"HOME": "/", "TMPDIR": "/t"}, ("/t",)),
        ({"HOME": "/h", "TMPDIR": ""}, ("/h",)),
        ({"PATH": "/p"}, ()),
    ],
)
def test_an_engines_own_places_are_its_home_and_its_temporary_directory(
    env: dict[str, str], places: tuple[str, ...]
) -> None:
    assert small_files.own_directories(env) == places


def test_open_files_of_the_home_are_found_up_to_a_mebibyte(held: Held) -> None:
    home = held.root / "home"
    (home / "d").mkdir(parents=True)
    sizes = {"a": 0, "b": small_files.MOST_BYTES, "c": small_files.MOST_BYTES + 1}
    for name, size in sizes.items():
        (home / name).touch()
        os.truncate(home / name, size)
    os.mkfifo(home / "fifo")
    targets = [*(home / name for name in (*sizes, "fifo", "d", "gone")), held.root / "data",
               f"{home}/../home/a", f"{home}x", home]  # fmt: skip
    for number, target in enumerate(targets):
        held.link(f"fd/{number}", target)
    found = small_files.find([8, 7], [str(held.root / "o"), str(home)], str(held.proc))
    assert set(found) == {str(home / "a"), str(home / "b")}
    status = (home / "a").stat()
    assert found[str(home / "a")] == (status.st_dev, status.st_ino)
    deleted = home / "e"
    with deleted.open("w") as file:
        deleted.unlink()
        held.link("fd/20", f"/proc/self/fd/{file.fileno()}")
        assert small_files.find([8, 7], [str(home), "/proc"], str(held.proc)) == found


def test_so_many_are_kept_each_with_what_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_files, "MOST_FILES", 3)
    root = pathlib.Path(os.path.realpath(tmp_path))
    image = root / "image"
    image.mkdir()
    found = {}
    for name in ("d", "b", "c", "a"):
        (root / name).write_text(f"in {name}")
        (root / name).chmod(0o614)
        status = (root / name).stat()
        found[str(root / name)] = status.st_dev, status.st_ino
    umask = os.umask(0)
    try:
        kept = small_files.keep(found, str(image))
    finally:
        os.umask(umask)
    assert kept == tuple(
        SmallFile(str(root / name), f"files/{n}", 4, 0o614, ME, MINE)
        for n, name in enumerate("abc")
    )
    assert [(image / file.file).read_text() for file in kept] == ["in a", "in b", "in c"]
    assert stat.S_IMODE((image / "files").stat().st_mode) == 0o700
    (root / "b").unlink()
    (root / "b").mkdir()
    found[str(root / "b")] = (root / "b").stat().st_dev, (root / "b").stat().st_ino
    again = root / "again"
    again.mkdir()
    assert [file.path for file in small_files.keep(found, str(again))] == [
        str(root / "a"), str(root / "c"),
    ]  # fmt: skip
    assert small_files.keep({}, str(root / "none")) == ()


def fifo(path: pathlib.Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda path: None, True),
        (lambda path: path.unlink(), True),
        (lambda path: path.write_text("other"), False),
        (lambda path: path.write_text("longer content"), False),
        (lambda path: path.chmod(0o600), False),
        (lambda path: (path.unlink(), path.mkdir()), False),
        (fifo, False),
        (lambda path: (path.unlink(), path.parent.rmdir()), False),
    ],
)
def test_only_what_is_as_it_was_or_could_be_made_again_is_vouched_for(
    tmp_path: pathlib.Path, change: Callable[[pathlib.Path], object], right: bool
) -> None:
    root = pathlib.Path(os.path.realpath(tmp_path))
    (root / "files").mkdir()
    (root / "files" / "0").write_text("12345")
    (root / "home").mkdir()
    last = root / "last"
    last.mkdir()
    path = root / "home" / "f"
    path.write_text("12345")
    path.chmod(0o640)
    change(path)
    kept = [
        SmallFile(str(root / "outside"), "files/0", 5, 0o640, ME, MINE),
        SmallFile(str(path), "files/0", 5, 0o640, ME, MINE),
        SmallFile(str(last / "f"), "files/0", 5, 0o604, ME, MINE),
    ]
    before = len(os.listdir("/proc/self/fd"))
    made = small_files.put_back(kept, str(root), [str(root / "home"), str(last)])
    assert made == (*([str(path)] if right else []), str(last / "f"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert stat.S_IMODE((last / "f").stat().st_mode) == 0o604
    assert not (root / "outside").exists()
    others = [replace(file, uid=ME + 1) for file in kept]
    assert small_files.put_back(others, str(root), [str(root / "home"), str(last)]) == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: needs root")
def test_a_file_is_its_users_again_in_a_directory_of_that_users(tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(os.path.realpath(tmp_path))
    (root / "files").mkdir()
    (root / "files" / "0").write_text("12345")
    home = root / "home"
    home.mkdir()
    kept = [SmallFile(str(home / "f"), "files/0", 5, 0o640, 4242, 4243)]
    assert small_files.put_back(kept, str(root), [str(home)]) == ()
    assert not (home / "f").exists()
    os.chown(home, 4242, 4242)
    assert small_files.put_back(kept, str(root), [str(home)]) == (str(home / "f"),)
    status = (home / "f").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (4242, 4243, 0o640)


def test_a_directory_in_the_place_of_a_file_costs_no_descriptor(
    home: pathlib.Path,
) -> None:
    """open(fd) of a directory raises, and leaves the descriptor open."""
    place = home / "manifest.json"
    place.mkdir(mode=0o700)
    status = place.stat()
    users = ModelUsers(str(place), lambda model: f"{home}/{model}", groups_of=getpwuid(ME).pw_name)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError):
        read_small(str(place), 10)
    with pytest.raises(ManifestError, match=r"cannot be read: .*Is a directory"):
        load_manifest(str(home))
    assert users._read() == {}
    assert small_files.keep({str(place): (status.st_dev, status.st_ino)}, str(home)) == ()
    assert not small_files._is_same(SmallFile(str(place), "x", 0, 0o700, ME, MINE), b"")
    assert len(os.listdir("/proc/self/fd")) == before
