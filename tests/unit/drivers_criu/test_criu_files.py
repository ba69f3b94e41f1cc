"""CRIU's image files and command line, on what CRIU 4.2.1 wrote."""

from __future__ import annotations

import pathlib

import pytest

from llmux.drivers import criu_cli, criu_img

RECORDED = pathlib.Path(__file__).parent / "recorded"


def read(name: str) -> bytes:
    return (RECORDED / name).read_bytes()


def test_links_get_names_that_no_other_image_has() -> None:
    data, renamed = criu_img.rename_links(read("files.img"), "abcd1234")
    assert renamed == {
        f"/dev/shm/link_remap.{number}": f"/dev/shm/link_remap.{number}.abcd1234"
        for number in (10, 12, 14, 27)
    }
    for old, new in renamed.items():
        assert new[1:].encode() in data or new.encode() in data
        assert data.count(old.encode() + b"@") == 0
    # What is not a link is passed through byte by byte, and a second pass finds nothing to do.
    before, after = list(criu_img.entries(read("files.img"))), list(criu_img.entries(data))
    assert len(before) == len(after)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 4
    assert criu_img.rename_links(data, "ffff") == (data, {})


def test_litter_names_what_a_killed_restore_leaves() -> None:
    litter = criu_img.litter(read("files.img"), read("remap-fpath.img"))
    assert len(litter) == 4
    assert all(path.startswith("/dev/shm/sem.") for path in litter)


def test_ghosts_are_litter_too() -> None:
    def entry(*fields: bytes) -> bytes:
        body = b"".join(fields)
        return len(body).to_bytes(4, "little") + body

    name = b"/tmp/x"
    reg = b"\x08\x05\x32" + bytes([len(name)]) + name
    files = bytes(8) + entry(b"\x08\x01", b"\x10\x1f", b"\x1a" + bytes([len(reg)]) + reg)
    remaps = bytes(8) + entry(b"\x08\x1f\x10\x1a\x18\x01")
    assert criu_img.litter(files, remaps) == ["/tmp/x.cr.1a.ghost"]


def test_processes_and_threads_are_read_as_they_were_dumped() -> None:
    assert criu_img.dumped_processes(read("pstree.img")) == {
        114: (114, 121),
        118: (118,),
        119: (119, 120, 122, 123),
    }
    assert criu_img.dumped_name(read("core-118.img")) == "python3"
    assert criu_img.stored_pages(read("pagemap-118.img")) == (2, 5869568)


@pytest.mark.parametrize("name", ["files.img", "pstree.img", "pagemap-118.img", "core-118.img"])
def test_a_file_cut_anywhere_is_an_error_or_a_shorter_list_never_a_crash(name: str) -> None:
    data = read(name)
    whole = len(list(criu_img.entries(data)))
    for length in range(0, len(data), 7):
        try:
            assert len(list(criu_img.entries(data[:length]))) <= whole
            criu_img.rename_links(data[:length], "x")
        except criu_img.BadImage:
            continue


def test_the_excerpt_has_the_cause_first_and_leaves_out_the_harmless() -> None:
    log = read("dump-link-exists.log").decode()
    text = criu_cli.excerpt(log)
    assert text.startswith("Can't link remap to /dev/shm/sem.")
    assert text.endswith("Dumping FAILED.")
    assert "RLIMIT_NOFILE" in log
    assert "RLIMIT_NOFILE" not in text
    assert "a file of that name is in the way" in (criu_cli.hint_for("link_remap.5") or "")
    assert not criu_cli.succeeded(log, "dump")


def test_a_good_restore_is_recognised_by_its_last_word() -> None:
    log = read("restore.log").decode()
    assert criu_cli.excerpt(log) == ""
    assert criu_cli.succeeded(log, "restore")
    assert not criu_cli.succeeded(log, "dump")


def test_the_host_is_blamed_for_what_the_image_cannot_help() -> None:
    assert criu_cli.blames_host("2025 killed by signal 9: Killed; Restoring FAILED.")
    assert criu_cli.blames_host("Can't create ghost regfile: File exists")
    assert not criu_cli.blames_host("Image file pages-1.img is corrupted")


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
    assert criu_cli.parse_version(text) == version


def test_the_command_lines_never_touch_cgroups_firewall_or_default_configuration() -> None:
    dump = criu_cli.dump_arguments("/usr/sbin/criu", 7, "/i", "/empty", "/sys/fs/cgroup/x/engine")
    restore = criu_cli.restore_arguments("/usr/sbin/criu", "/i", "/w", "/empty")
    for argv in (dump, restore):
        assert "--manage-cgroups=ignore" in argv
        assert "--no-default-config" in argv
        assert argv[argv.index("--libdir") + 1] == "/empty"
    assert dump[dump.index("--network-lock") + 1] == "skip"
    assert dump[dump.index("--freeze-cgroup") + 1] == "/sys/fs/cgroup/x/engine"
    assert "--restore-detached" in restore
    assert restore[restore.index("--work-dir") + 1] == "/w"
