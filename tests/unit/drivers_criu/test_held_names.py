"""Names in /dev/shm that images need are nobody else's while their model is parked."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import stat

import pytest
from transfer_site import Site

from llmux.drivers.criu import held_names, shm
from llmux.drivers.criu.held_names import MOST, HeldNames, needed_names
from llmux.drivers.images.manifest import ShmGroup

RECORDED = pathlib.Path(__file__).with_name("recorded")
LINK = "link_remap.5.tok"
GROUP = ShmGroup(("psm_1", LINK), "shm/0", 4096, 0o640, os.geteuid(), os.getegid())


class Host:
    """A store with one image of model m, its /dev/shm, and who holds the names there."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.site = Site(directory / "host", directory)
        self.site.publish(shm=(GROUP,))
        self.shm = directory / "shm"
        self.shm.mkdir(mode=0o1777)
        self.held = self.again()
        self.image = f"{self.site.store.directory('m')}/images"

    def again(self) -> HeldNames:
        return HeldNames(self.site.store, str(self.shm))

    def names(self) -> list[str]:
        return sorted(os.listdir(self.shm))

    def put_back(self) -> tuple[str, ...]:
        return shm.put_back((GROUP,), self.image, self.held, str(self.shm))

    def is_held(self, name: str) -> bool:
        status = (self.shm / name).lstat()
        ours = stat.S_IMODE(status.st_mode) == 0o400 and status.st_uid == os.geteuid()
        return ours and (self.shm / name).read_text().startswith("held by llmux for an image in")


@pytest.fixture
def host(home: pathlib.Path) -> Host:
    return Host(home)


def test_names_are_taken_from_the_end_of_the_dump_to_the_restore(host: Host) -> None:
    (host.shm / "psm_1").write_bytes(b"the engine's")
    (host.shm / "psm_2").write_bytes(b"another's")
    host.held.dumped("m", GROUP.names, ["psm_1"])
    assert host.is_held("psm_1"), "in one step, before the image is whole"
    host.held.settle()
    host.held.published("m", whole=True)
    assert host.is_held("psm_1")
    assert host.is_held(LINK)
    assert host.put_back() == GROUP.names
    assert host.names() == [LINK, "psm_1", "psm_2"]
    assert (host.shm / "psm_1").read_bytes() == b"s" * 4096
    assert (host.shm / "psm_1").samefile(host.shm / LINK)
    assert (host.shm / "psm_2").read_bytes() == b"another's"


def test_what_a_failed_dump_would_have_needed_is_free_again(host: Host) -> None:
    host.held.dumped("n", ["psm_9"], ())
    host.held.settle()
    assert host.is_held("psm_9")
    host.held.published("n", whole=False)
    assert host.names() == [LINK, "psm_1"]


def test_names_of_a_killed_engine_with_an_image_are_held_again(host: Host) -> None:
    host.held.settle()
    host.put_back()
    host.held.begin("m")
    host.held.settle()
    assert (host.shm / "psm_1").read_bytes() == b"s" * 4096, "the engine's, while it lives"
    host.held.give_up([LINK])
    assert host.is_held(LINK), "nobody else may make CRIU's link in the meantime"
    host.held.end("m", ["psm_1"])
    assert host.is_held("psm_1")
    assert host.put_back() == GROUP.names


def test_an_engine_that_starts_cold_may_use_the_names_itself(host: Host) -> None:
    host.held.settle()
    host.held.begin("m")
    assert host.names() == [LINK]
    (host.shm / "psm_1").write_bytes(b"new")
    host.held.settle()
    assert (host.shm / "psm_1").read_bytes() == b"new"


def test_names_go_with_the_image(host: Host) -> None:
    host.held.settle()
    (host.shm / "psm_2").write_bytes(b"another's")
    host.site.store.discard("m")
    host.held.settle()
    assert host.names() == ["psm_2"]


def test_the_next_supervisor_holds_what_is_needed_then(host: Host) -> None:
    """Also after a reboot, which empties /dev/shm, and after images were removed by hand."""
    host.again().recover(())
    assert host.is_held("psm_1")
    shutil.rmtree(host.image)
    host.again().recover(())
    assert host.names() == []


def test_of_engines_that_live_on_it_takes_nothing(host: Host) -> None:
    host.again().recover(["m"])
    assert host.names() == [LINK]


def test_a_file_of_others_is_neither_replaced_nor_removed(host: Host) -> None:
    with (host.shm / "psm_1").open("w") as file:
        file.write("in use")
        file.flush()
        host.held.settle()
        with pytest.raises(shm.ShmTaken, match="is used by process"):
            host.put_back()
        host.site.store.discard("m")
        host.held.settle()
        assert (host.shm / "psm_1").read_text() == "in use"
        assert host.names() == ["psm_1"]


def test_what_only_looks_like_ours_is_not(host: Host) -> None:
    host.held.settle()
    text = (host.shm / "psm_1").read_text()
    for name, content, mode in (("a", text, 0o644), ("b", text[:-1] + "!", 0o400), ("c", "", 0)):
        (host.shm / name).write_text(content)
        (host.shm / name).chmod(mode)
        assert not host.held.is_ours(name), name
    (host.shm / "d").symlink_to("psm_1")
    assert not host.held.is_ours("d")
    assert host.held.is_ours("psm_1")


def test_names_that_criu_makes_for_a_moment_are_held_too(tmp_path: pathlib.Path) -> None:
    """Of semaphores, whose names are removed as soon as they are made."""
    for name in ("files.img", "remap-fpath.img"):
        shutil.copy(RECORDED / name, tmp_path)
    names = needed_names((), str(tmp_path), "/dev/shm")
    semaphores = {name for name in names if name.startswith("sem.") and name.count(".") == 1}
    assert len(semaphores) == 4
    assert {f"{name}.cr_link" for name in semaphores} <= names
    kept = [ShmGroup(("psm_1",), "shm/0", 4096, 0o600, 0, 0)]
    assert needed_names(kept, str(tmp_path), "/dev/shm") == {*names, "psm_1"}
    (tmp_path / "files.img").write_bytes(b"damaged")
    assert needed_names(kept, str(tmp_path), "/dev/shm") == {"psm_1"}
    (tmp_path / "files.img").unlink()
    assert needed_names(kept, str(tmp_path), "/dev/shm") == {"psm_1"}


def test_one_that_could_not_be_written_leaves_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is held by an empty file would be taken for somebody else's for ever."""

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        host.held.settle()
    assert host.names() == []
    host.held.settle()
    assert host.is_held("psm_1")


def test_a_kill_before_a_name_is_taken_over_leaves_nothing_for_long(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.held.settle()
    (host.shm / ".llmux-another").touch()

    def killed(_source: str, _target: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            host.put_back()
    assert len(host.names()) == 4
    host.again().recover(())
    assert host.names() == [".llmux-another", LINK, "psm_1"]
    assert host.is_held("psm_1")


def test_what_an_image_needs_is_read_again_only_when_it_is_another(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.held.settle()
    with monkeypatch.context() as patched:
        patched.setattr(held_names, "needed_names", None)
        host.held.settle()
    host.site.publish(shm=(ShmGroup(("psm_7",), "shm/0", 4096, 0o600, 0, 0),))
    host.held.settle()
    assert host.names() == ["psm_7"]


def test_an_engine_does_not_decide_how_much_is_held(tmp_path: pathlib.Path) -> None:
    many = ShmGroup(tuple(f"x{n}" for n in range(3 * MOST)), "shm/0", 0, 0o600, 0, 0)
    assert len(needed_names([many], str(tmp_path), "/dev/shm")) == MOST
