"""Keys: the file, the lookup, the limits; and what they cost."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from llmux.cli.main import main
from llmux.config.keyfile import hash_key, load_keys, make_key
from llmux.config.schema import Key, KeyRole
from llmux.daemon.places import resolve_secret
from llmux.errors import ConfigError, Reason, Refused
from llmux.gateway.admission.key_limits import KeyUse, share
from llmux.gateway.admission.keys import Guard, begin_use, check_role, may_use, secret_of


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Transport:
    def __init__(self, sock: socket.socket | None = None) -> None:
        self.sock = sock

    def get_extra_info(self, name: str) -> Any:
        assert name == "socket"
        return self.sock


TCP = Transport()


def guard(*keys: Key, workers: int = 1) -> Guard:
    return Guard(lambda: keys, workers=workers, clock=Clock())


def a_key(secret: str = "s", **more: Any) -> Key:
    return Key(more.pop("name", secret), hash_key(secret), **more)


# ---- the file ------------------------------------------------------------------------------------


def test_a_made_key_is_found_again_by_what_was_shown_once(tmp_path: Path) -> None:
    secret, line = make_key("ci", role=KeyRole.ADMIN, models=("a",), max_in_flight=3, max_waiting=2)
    assert secret not in line
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\n{line}\n")
    expected = Key("ci", hash_key(secret), KeyRole.ADMIN, frozenset({"a"}), 3, None, 2)
    assert load_keys(str(file)) == (expected,)


def test_yaml_will_do_as_well(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    digest = hash_key("x").hex()
    file.write_text(f"- name: a\n  sha256: {digest}\n  requests_per_minute: 1.5\n")
    assert load_keys(str(file))[0].requests_per_minute == 1.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"name": "a"}', "sha256: expected 64"),
        ('{"name": "a", "sha256": "' + "g" * 64 + '"}', "sha256: expected 64"),
        ('{"sha256": "' + "0" * 64 + '"}', "name: expected"),
        ('{"name": "a", "sha256": "' + "0" * 64 + '", "rol": "x"}', "unknown: rol"),
        ('{"name": "a", "sha256": "' + "0" * 64 + '", "role": "x"}', "role: expected"),
        ('{"name": "a", "sha256": "' + "0" * 64 + '", "models": "x"}', "models: expected"),
        ('{"name": "a", "sha256": "' + "0" * 64 + '", "max_in_flight": 1.5}', "max_in_flight"),
        ('{"name": "a", "sha256": "' + "0" * 64 + '", "requests_per_minute": 0}', "from 0.001"),
        ("{", "not a JSON object"),
        ("- [", "neither YAML nor"),
        ("a: 1", "expected a list"),
        ("- 7", "a key is a mapping"),
    ],
)
def test_a_bad_file_is_refused_without_quoting_it(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_keys(str(file))
    assert message in str(caught.value)
    assert "0" * 64 not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('\n# x\n{"name": "a"}\n', 3),
        ('{"name": "a", "sha256": "x"}\n', 1),
        ("{\n", 1),
        ("- name: a\n- *nothing\n", 2),
        ("# x\n- name: 'a\n", 3),
        ("- 2026-02-31\n", 1),
    ],
)
def test_the_line_is_named(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_keys(str(file))
    assert [problem.line for problem in caught.value.problems] == [line]


def test_two_keys_of_one_name_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot read the keys: No such file"):
        load_keys(str(file))
    file.write_text(make_key("a")[1] + "\n" + make_key("a")[1] + "\n")
    with pytest.raises(ConfigError, match="another key called a"):
        load_keys(str(file))


def test_a_credential_is_where_systemd_put_it() -> None:
    assert resolve_secret("credential:keys", "/run/credentials/x") == "/run/credentials/x/keys"
    assert resolve_secret("/etc/llmux/keys", "/run/credentials/x") == "/etc/llmux/keys"


def test_key_new_prints_it_once_and_keeps_the_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    assert main(["key", "new", "first", "--file", str(file)]) == 0
    secret = capsys.readouterr().out.strip()
    words = ["key", "new", "b", "--file", str(file), "--role", "admin", "--model", "m", "--json"]
    assert main(words) == 0
    second = json.loads(capsys.readouterr().out)
    assert secret not in file.read_text() and second["key"] not in file.read_text()
    assert file.stat().st_mode & 0o007 == 0
    first, other = load_keys(str(file))
    assert first.sha256 == hash_key(secret) and first.role is KeyRole.USE
    assert other == Key("b", hash_key(second["key"]), KeyRole.ADMIN, frozenset({"m"}))
    assert main(["key", "new", "first", "--file", str(file)]) == 1, "the name is taken"
    assert "has one called first" in capsys.readouterr().err


def test_key_new_goes_on_in_the_form_that_the_file_has(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- name: a\n  sha256: {hash_key('x').hex()}")
    assert main(["key", "new", "b", "--file", str(file)]) == 0
    assert [key.name for key in load_keys(str(file))] == ["a", "b"]


def test_keys_are_listed_without_their_hashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    for words in (["a", "--max-in-flight", "3"], ["b", "--role", "admin", "--model", "m"]):
        assert main(["key", "new", *words, "--file", str(file)]) == 0
    capsys.readouterr()
    assert main(["key", "list", "--file", str(file)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "ROLE", "MODELS", "IN", "FLIGHT", "WAITING", "PER", "MINUTE"]
    assert first.split() == ["a", "use", "all", "3", "-", "-"]
    assert second.split() == ["b", "admin", "m", "-", "-", "-"]
    assert main(["key", "list", "--file", str(file), "--json"]) == 0
    shown = capsys.readouterr().out
    assert [one["name"] for one in json.loads(shown)] == ["a", "b"]
    assert "sha256" not in shown


@pytest.mark.parametrize("form", ["lines", "yaml"])
def test_a_revoked_key_is_gone_and_everything_else_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    file = tmp_path / "keys"
    if form == "yaml":
        entries = (f"- name: {name}\n  sha256: {hash_key(name).hex()}\n" for name in "abc")
        file.write_text("".join(entries))
    else:
        file.write_text("# ours\n")
        for name in "abc":
            assert main(["key", "new", name, "--file", str(file)]) == 0
    file.chmod(0o640)
    assert main(["key", "revoke", "b", "--file", str(file)]) == 0
    assert "systemctl reload llmux-gateway" in capsys.readouterr().out
    assert [key.name for key in load_keys(str(file))] == ["a", "c"]
    assert file.stat().st_mode & 0o777 == 0o640
    assert ("# ours" in file.read_text()) == (form == "lines")
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
    assert main(["key", "revoke", "b", "--file", str(file)]) == 1
    assert "cannot revoke b" in capsys.readouterr().err
    assert main(["key", "revoke", "--file", str(file)]) == 1
    assert "cannot revoke a key: no name is given" in capsys.readouterr().err


# ---- who it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "secret"),
    [
        (b"Bearer abc", b"", b"abc"),
        (b"bearer  abc ", b"other", b"abc"),
        (b"", b" abc ", b"abc"),
        (b"Basic abc", b"", b""),
        (b"Basic abc", b"k", b"k"),
        (b"Bearer", b"", b""),
    ],
)
def test_where_a_key_is_looked_for(authorization: bytes, x_api_key: bytes, secret: bytes) -> None:
    assert secret_of(authorization, x_api_key) == secret


def test_a_right_key_is_known_and_a_wrong_one_refused() -> None:
    keys = guard(a_key("s"), a_key("t"))
    use = keys.identify(b"/v1/models", b"s", TCP)
    assert use is not None and use.key.name == "s"
    assert keys.identify(b"/v1/models", b"s", TCP) is use, "from the cache"
    for secret in (b"", b"S", b"s ", hash_key("s"), b"\xff" * 100):
        with pytest.raises(Refused) as caught:
            keys.identify(b"/v1/chat/completions", secret, TCP)
        assert caught.value.reason is Reason.NO_KEY
    assert keys.identify(b"/health", b"", TCP) is None, "needs no key"


def test_root_and_our_own_user_need_no_key_on_a_unix_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        use = guard().identify(b"/control/status", b"", Transport(ours))
        assert use is not None and use.key.role is KeyRole.ADMIN
        with pytest.raises(Refused):
            guard().identify(b"/control/status", b"wrong", Transport(ours))


def test_another_user_does_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    own = os.getuid()
    monkeypatch.setattr("llmux.gateway.admission.keys.os.getuid", lambda: own + 1)
    monkeypatch.setattr("llmux.gateway.admission.keys.TRUSTED_UIDS", frozenset())
    with ours, theirs, pytest.raises(Refused):
        guard().identify(b"/control/status", b"", Transport(ours))


def test_a_key_for_use_reaches_models_and_nothing_else() -> None:
    keys = guard(a_key("u"), a_key("a", role=KeyRole.ADMIN))
    user = keys.identify(b"/", b"u", TCP)
    admin = keys.identify(b"/", b"a", TCP)
    for path in (b"/v1/models", b"/v1/models/x", b"/health"):
        check_role(user, path)
    for path in (b"/control/status", b"/control", b"/unload", b"/metrics", b"/logs/x", b"/",
                 b"//v1/models", b"/new"):  # fmt: skip
        check_role(admin, path)
        with pytest.raises(Refused) as caught:
            check_role(user, path)
        assert caught.value.reason is Reason.FORBIDDEN


def test_models_of_a_key() -> None:
    use = KeyUse(a_key(models=frozenset({"m"})), 1, Clock())
    assert may_use(use, "m") and not may_use(use, "n") and may_use(None, "n")
    with pytest.raises(Refused) as caught:
        begin_use(use, "n")
    assert caught.value.reason is Reason.UNKNOWN_MODEL
    assert use.in_flight == 0


def test_a_key_is_for_models_under_any_of_their_names_and_for_one_that_is_gone() -> None:
    use = KeyUse(a_key(models=frozenset({"alias", "gone"})), 1, Clock())
    use.allow({"alias": "m", "m": "m", "n": "n"})
    assert [name for name in ("alias", "gone", "m", "n") if may_use(use, name)] == ["gone", "m"]
    use.allow({"gone": "gone", "m": "m", "n": "n"})
    assert may_use(use, "gone"), "it came back"


def test_a_reload_keeps_what_runs_and_a_broken_file_changes_nothing() -> None:
    answers: list[Any] = [(a_key("s", name="k", max_in_flight=1),)]

    def load() -> tuple[Key, ...]:
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        return answers[-1]  # type: ignore[no-any-return]

    keys = Guard(load, workers=1, clock=Clock())
    use = keys.identify(b"/", b"s", TCP)
    assert use is not None
    begin_use(use, "m")
    answers.append(ConfigError(()))
    keys.reload()
    assert keys.identify(b"/", b"s", TCP) is use
    answers.append((a_key("new", name="k", max_in_flight=1),))
    keys.reload()
    with pytest.raises(Refused):
        keys.identify(b"/", b"s", TCP)
    again = keys.identify(b"/", b"new", TCP)
    assert again is use and use.in_flight == 1
    with pytest.raises(Refused):
        begin_use(use, "m")
    answers.append(())
    keys.reload()
    with pytest.raises(Refused):
        keys.identify(b"/", b"new", TCP)


def test_what_a_key_may_use_is_known_before_and_after_a_reload() -> None:
    answers = [a_key("s", models=frozenset({"alias"})), a_key("t", models=frozenset({"alias"}))]
    keys = Guard(lambda: answers, workers=1, clock=Clock())
    for names in ({"alias": "m"}, {"alias": "n"}):
        keys.know(names)
        for _ in range(2):
            for secret in (b"s", b"t"):
                use = keys.identify(b"/", secret, TCP)
                assert use is not None
                assert use.models == frozenset(names.values())
            answers[1] = a_key("t", name="new", models=frozenset({"alias"}))
            keys.reload()


def test_a_reload_that_fails_of_itself_is_not_taken_for_a_broken_file() -> None:
    answers: list[Any] = [(a_key("s"),), ValueError("ours")]

    def load() -> tuple[Key, ...]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    keys = Guard(load, workers=1, clock=Clock())
    use = keys.identify(b"/", b"s", TCP)
    with pytest.raises(ValueError, match="ours"):
        keys.reload()
    assert keys.identify(b"/", b"s", TCP) is use


# ---- limits --------------------------------------------------------------------------------------


def test_requests_in_flight_are_limited_and_given_back() -> None:
    use = KeyUse(a_key(max_in_flight=2), 1, Clock())
    use.begin()
    use.begin()
    with pytest.raises(Refused) as caught:
        use.begin()
    assert caught.value.reason is Reason.RATE_LIMITED
    assert caught.value.retry_after is None, "the gateway knows better"
    use.end()
    use.begin()


def test_requests_that_wait_are_limited_and_given_back() -> None:
    use = KeyUse(a_key(max_waiting=2), 1, Clock())
    for _ in range(3):
        use.begin()
    use.wait()
    use.wait()
    with pytest.raises(Refused) as caught:
        use.wait()
    assert caught.value.reason is Reason.RATE_LIMITED and "2 waiting requests" in str(caught.value)
    use.end()  # the one that could not wait
    use.served()
    use.wait_again()  # an engine's death refuses no request
    use.served()
    use.end(waited=True)
    assert (use.in_flight, use.waiting) == (1, 0)


def test_requests_per_minute_refill_with_time() -> None:
    clock = Clock()
    use = KeyUse(a_key(requests_per_minute=60), 1, clock)
    for _ in range(60):
        use.begin()
    with pytest.raises(Refused) as caught:
        use.begin()
    assert caught.value.retry_after == pytest.approx(1.0)
    clock.now += caught.value.retry_after or 0
    use.begin()
    clock.now += 3600
    for _ in range(60):
        use.begin()
    with pytest.raises(Refused):
        use.begin()


def test_workers_share_a_limit() -> None:
    assert [share(10, n) for n in (1, 3, 4, 100)] == [10, 4, 3, 1]
    assert KeyUse(a_key(max_in_flight=10), 4, Clock()).most == 3
    assert KeyUse(a_key(max_waiting=2), 4, Clock()).most_waiting == 1
    use = KeyUse(a_key(requests_per_minute=60), 4, Clock())
    for _ in range(15):
        use.begin()
    with pytest.raises(Refused):
        use.begin()
