"""CRIU's image files and command line, on what CRIU 4.2.1 wrote."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from llmux.drivers.criu import command, image_format

RECORDED = pathlib.Path(__file__).parent / "recorded"


def read(name: str) -> bytes:
    return (RECORDED / name).read_bytes()


def test_links_get_names_that_no_other_image_has() -> None:
    data, renamed = image_format.rename_links(read("files.img"), "abcd1234")
    assert renamed == {
        f"/dev/shm/link_remap.{number}": f"/dev/shm/link_remap.{number}.abcd1234"
        for number in (10, 12, 14, 27)
    }
    for old, new in renamed.items():
        assert new[1:].encode() in data or new.encode() in data
        assert data.count(old.encode() + b"@") == 0
    # What is not a link is passed through byte by byte, and a second pass finds nothing to do.
    before, after = list(image_format.entries(read("files.img"))), list(image_format.entries(data))
    assert len(before) == len(after)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 4
    assert image_format.rename_links(data, "ffff") == (data, {})


def test_leftovers_name_what_a_killed_restore_leaves() -> None:
    remapped = image_format.remapped_names(read("files.img"), read("remap-fpath.img"))
    leftovers = list(remapped.values())
    assert list(remapped) == leftovers, "linked under their own names"
    assert len(leftovers) == 4
    assert all(path.startswith("/dev/shm/sem.") for path in leftovers)


def test_ghosts_are_leftovers_too() -> None:
    def entry(*fields: bytes) -> bytes:
        body = b"".join(fields)
        return len(body).to_bytes(4, "little") + body

    name = b"/tmp/x"
    reg = b"\x08\x05\x32" + bytes([len(name)]) + name
    files = bytes(8) + entry(b"\x08\x01", b"\x10\x1f", b"\x1a" + bytes([len(reg)]) + reg)
    remaps = bytes(8) + entry(b"\x08\x1f\x10\x1a\x18\x01")
    assert image_format.remapped_names(files, remaps) == {"/tmp/x": "/tmp/x.cr.1a.ghost"}


def test_processes_and_threads_are_read_as_they_were_dumped() -> None:
    assert image_format.dumped_processes(read("pstree.img")) == {
        114: (114, 121),
        118: (118,),
        119: (119, 120, 122, 123),
    }
    assert image_format.dumped_name(read("core-118.img")) == "python3"
    assert image_format.stored_pages(read("pagemap-118.img")) == (2, 5869568)


@pytest.mark.parametrize("name", ["files.img", "pstree.img", "pagemap-118.img", "core-118.img"])
def test_a_file_cut_anywhere_is_an_error_or_a_shorter_list_never_a_crash(name: str) -> None:
    data = read(name)
    whole = len(list(image_format.entries(data)))
    for length in range(0, len(data), 7):
        try:
            assert len(list(image_format.entries(data[:length]))) <= whole
            image_format.rename_links(data[:length], "x")
        except image_format.BadImage:
            continue


@pytest.mark.parametrize("parse", [image_format.anonymous_memory, image_format.dumped_name])
def test_a_file_without_entries_is_a_bad_image(parse: Callable[[bytes], object]) -> None:
    with pytest.raises(image_format.BadImage, match="no entry"):
        parse(bytes(8))


def test_the_excerpt_has_the_cause_first_and_leaves_out_the_harmless() -> None:
    log = read("dump-link-exists.log").decode()
    text = command.excerpt(log)
    assert text.startswith("Can't link remap to /dev/shm/sem.")
    assert text.endswith("Dumping FAILED.")
    assert "RLIMIT_NOFILE" in log
    assert "RLIMIT_NOFILE" not in text
    assert "a link_remap.N in /dev/shm is in the way" in (command.hint_for(text) or "")
    assert not command.succeeded(log, "dump")


def test_a_good_restore_is_recognised_by_its_last_word() -> None:
    log = read("restore.log").decode()
    assert command.excerpt(log) == ""
    assert command.succeeded(log, "restore")
    assert not command.succeeded(log, "dump")


@pytest.mark.parametrize(
    ("text", "host", "hint"),
    [
        ("2025 killed by signal 9: Killed; Restoring FAILED.", True, None),
        ("Can't create ghost regfile: File exists", True, None),
        ("Can't map 0x7f00: Cannot allocate memory", True, "not enough memory"),
        ("Can't write page: No space left on device", True, "free some space"),
        ("Can't bind inet socket: Address already in use", True, "another process listens"),
        ("Can't fork for 114: File exists", True, "one of the image's pids"),
        ("Can't fork for 114: Resource temporarily unavailable", True, "one of the image's pids"),
        ("Image file pages-1.img is corrupted", False, None),
        ("2025 killed by signal 11: Segmentation fault", False, None),
        ("Can't dump half of stream unix connection.", False, "unix stream connection"),
        ("Can't dump file 7 of anon_inode:[io_uring]", False, "filter against io_uring"),
        ("Can't write page: Disk quota exceeded", False, "raise the quota"),
        ("File srv/model has bad size 7 (expect 8)", False, "changed since the dump"),
        ("File lib/libc.so has bad build-ID", False, "was replaced since the dump"),
        ("File srv/model has bad mode 0100600", False, "the permissions of a file"),
        ("Can't open file srv/model on restore: No such file", False, "was removed since"),
        ("Can't get socket option SO_PASSSEC", False, "CRIU 4.2.1 or later"),
        ("Can't find symbols in rt-vdso", False, "a newer CRIU"),
        ("Can't get rlimit 7 of 114", False, "CAP_SYS_RESOURCE"),
        ("suspending seccomp failed: Operation not permitted", False, "denies ptrace"),
    ],
)
def test_each_known_error_has_its_remedy_and_is_blamed_on_host_or_image(
    text: str, host: bool, hint: str | None
) -> None:
    assert command.blames_host(text) is host
    said = command.hint_for(text)
    assert said is None if hint is None else hint in (said or "")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version: 4.2.1\nGitID: v4.2.1\n", (4, 2, 1)),
        ("Version: 4.3\n", (4, 3)),
        ("Version: 3.17.1\n", (3, 17, 1)),
        ("criu: command not found", ()),
    ],
)
def test_versions_are_parsed(text: str, version: tuple[int, ...]) -> None:
    assert command.parse_version(text) == version


def test_the_command_lines_never_touch_cgroups_firewall_or_default_configuration() -> None:
    dump = command.dump_arguments("/usr/sbin/criu", 7, "/i", "/empty", "/sys/fs/cgroup/x/engine")
    restore = command.restore_arguments("/usr/sbin/criu", "/i", "/w", "/empty")
    for argv in (dump, restore):
        assert "--manage-cgroups=ignore" in argv
        assert "--no-default-config" in argv
        assert argv[argv.index("--libdir") + 1] == "/empty"
    assert dump[dump.index("--network-lock") + 1] == "skip"
    assert dump[dump.index("--freeze-cgroup") + 1] == "/sys/fs/cgroup/x/engine"
    assert "--restore-detached" in restore
    assert restore[restore.index("--work-dir") + 1] == "/w"
