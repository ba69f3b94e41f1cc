"""A uid of its own for every model, kept in a file of root's."""

from __future__ import annotations

import grp
import json
import logging
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.processes.users import FIRST, LAST, ModelUsers, SharedUser
from llmux.errors import LlmuxError

ME = pwd.getpwuid(os.geteuid()).pw_name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("lib", "cache"):
        (tmp_path / name).mkdir(mode=0o700)
    return tmp_path


def users(place: Path, **settings: Any) -> ModelUsers:
    path = str(place / "lib" / "engine-users.json")
    return ModelUsers(path, lambda model: f"{place}/cache/{model}", groups_of=ME, **settings)


def written(place: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((place / "lib" / "engine-users.json").read_text())
    return document


def test_every_model_has_its_own_and_keeps_it(place: Path) -> None:
    first = users(place)
    uids = {name: first.find(name).uid for name in ("poet", "critic", "poet")}
    assert len(set(uids.values())) == 2
    assert all(FIRST <= uid <= LAST for uid in uids.values())
    later = users(place)  # a new supervisor; the models come in another order
    assert {name: later.find(name).uid for name in ("new", "critic", "poet")} | uids == {
        **uids,
        "new": later.find("new").uid,
    }
    assert written(place)["users"] == uids | {"new": later.find("new").uid}
    assert (place / "lib" / "engine-users.json").stat().st_mode & 0o777 == 0o600


def test_who_only_looks_is_told_the_same_and_nothing_is_kept(place: Path) -> None:
    known = users(place)
    uid = known.find("poet").uid
    before = written(place)
    assert users(place).plan("poet") == known.find("poet")
    planned = users(place).plan("critic")
    assert planned.uid not in (uid, os.geteuid())
    assert written(place) == before
    assert known.find("critic") == planned, "the supervisor gives out the same"


def test_a_users_group_home_and_temporary_directory_are_its_own(place: Path) -> None:
    user = users(place).find("poet")
    assert user.gid == user.uid
    assert user.home == f"{place}/cache/poet"
    assert user.temporary == f"{user.home}/tmp"
    assert set(user.groups) == set(os.getgrouplist(ME, pwd.getpwnam(ME).pw_gid))


@pytest.mark.parametrize(
    "users_in_it",
    [{"poet": 0}, {"poet": 33}, {"poet": LAST + 1}, {"other": FIRST, "poet": FIRST}],
    ids=["root", "a service", "beyond the range", "twice"],
)
def test_an_entry_that_is_none_of_ours_alone_is_not_used(
    place: Path, users_in_it: dict[str, int]
) -> None:
    path = place / "lib" / "engine-users.json"
    path.write_text(json.dumps({"version": 1, "users": users_in_it}))
    found = users(place)
    assert FIRST <= found.find("poet").uid <= LAST
    assert found.find("poet").uid != found.find("other").uid


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1, "users": {"poet": "60706"}}', "\0" * 100, "\udcff"]
)
def test_a_damaged_file_ends_nothing(
    place: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = place / "lib" / "engine-users.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING, "llmux"):
        assert FIRST <= users(place).find("poet").uid <= LAST
    assert "cannot read the models' users" in caplog.text
    assert set(written(place)["users"]) == {"poet"}


@as_root
def test_a_file_of_another_user_is_not_believed(place: Path) -> None:
    path = place / "lib" / "engine-users.json"
    path.write_text(json.dumps({"version": 1, "users": {"poet": LAST}}))
    os.chown(path, 65534, 65534)
    assert users(place).find("poet").uid != LAST


def test_a_link_is_not_followed(place: Path) -> None:
    elsewhere = place / "elsewhere"
    elsewhere.write_text(json.dumps({"version": 1, "users": {"poet": LAST}}))
    (place / "lib" / "engine-users.json").symlink_to(elsewhere)
    assert users(place).find("poet").uid != LAST
    assert json.loads(elsewhere.read_text())["users"] == {"poet": LAST}


@as_root
def test_without_the_file_the_owner_of_the_home_says_it(place: Path) -> None:
    home = place / "cache" / "poet"
    home.mkdir()
    os.chown(home, FIRST + 7, FIRST + 7)
    found = users(place)
    assert found.find("poet").uid == FIRST + 7


def test_hosts_of_a_fleet_give_a_model_the_same(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "lib").mkdir(parents=True, mode=0o700)
    one, other = users(place), users(tmp_path / "other")
    names = ["poet", "critic", "org/alpha"]
    assert [one.find(name).uid for name in names] == [
        other.find(name).uid for name in reversed(names)
    ][::-1]


def test_a_uid_that_a_process_has_is_not_given_out(place: Path) -> None:
    mine = os.geteuid()
    found = users(place, uids=(mine, mine))  # this process has it
    with pytest.raises(LlmuxError, match=r'cannot give model "poet" a user: all 1 are in use'):
        found.find("poet")


def test_the_last_ones_come_from_models_that_left_nothing(place: Path) -> None:
    found = users(place, uids=(FIRST, FIRST + 1))
    (place / "cache" / "first").mkdir()
    uids = [found.find(name).uid for name in ("first", "second")]
    assert found.find("third").uid == uids[1]
    assert written(place)["users"] == {"first": uids[0], "third": uids[1]}
    (place / "cache" / "third").mkdir()
    with pytest.raises(LlmuxError, match=f"remove the directories.*{place}/cache"):
        found.find("fourth")


@as_root
def test_a_model_that_is_gone_keeps_its_uid_while_a_process_has_it(place: Path) -> None:
    proc = place / "proc"
    proc.mkdir()
    found = users(place, uids=(FIRST, FIRST), proc=str(proc))
    assert found.find("first").uid == FIRST
    (proc / "8").mkdir()
    os.chown(proc / "8", FIRST, FIRST)
    with pytest.raises(LlmuxError, match="all 1 are in use"):
        found.find("second")
    (proc / "8").rmdir()
    assert found.find("second").uid == FIRST


def test_a_user_that_cannot_be_kept_is_not_used(place: Path) -> None:
    (place / "lib" / "engine-users.json").mkdir()
    with pytest.raises(LlmuxError, match="cannot keep the models' users"):
        users(place).find("poet")


@pytest.mark.parametrize("shared", [True, False])
def test_a_user_that_is_not_there_is_named_with_the_remedy(place: Path, shared: bool) -> None:
    missing: ModelUsers | SharedUser = SharedUser("no-such-user", "/var/cache/llmux")
    if not shared:
        missing = ModelUsers(str(place / "lib" / "x"), str, groups_of="no-such-user")
    with pytest.raises(LlmuxError, match=r'no user "no-such-user".*systemd-sysusers'):
        missing.find("poet")


def test_one_user_for_all_has_its_own_home() -> None:
    entry = pwd.getpwnam(ME)
    user = SharedUser(ME, "/var/cache/llmux").find("poet")
    assert (user.name, user.uid, user.gid) == (ME, entry.pw_uid, entry.pw_gid)
    assert (user.home, user.temporary) == (entry.pw_dir, None)
    assert SharedUser(ME, entry.pw_dir).find("poet").home == f"{entry.pw_dir}/{ME}"


def test_a_uid_or_gid_that_has_a_name_is_not_given_out(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another program's, from a directory service."""
    free = FIRST + 2

    def known(*numbers: int) -> Callable[[int], object]:
        def look(number: int) -> object:
            if number not in numbers:
                raise KeyError(number)
            return object()

        return look

    monkeypatch.setattr(pwd, "getpwuid", known(FIRST))
    monkeypatch.setattr(grp, "getgrgid", known(FIRST + 1))
    proc = place / "proc"
    proc.mkdir()
    few = users(place, uids=(FIRST, free), proc=str(proc))
    assert few.find("poet").uid == free
    (place / "cache" / "poet").mkdir()
    with pytest.raises(LlmuxError, match="all 3 are in use"):
        few.find("critic")
