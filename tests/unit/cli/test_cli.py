"""The command line: what it asks, what it prints, with what status it ends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmux import __version__
from llmux.cli.main import EXIT_CODES, exit_code, main
from llmux.config.advice import WITHOUT_KEYS
from llmux.errors import ConfigError, LlmuxError, Reason
from llmux.protocol import Answer, Ask, Catalog, Hello, decode

Reply = Callable[[Ask], Answer]

MODEL: dict[str, Any] = {
    "state": "parked",
    "since_secs": 300.0,
    "pid": 42,
    "parked_as": "offload+keep_running",
    "queue_depth": 1,
    "in_flight": 2,
    "gpus": [0, 1],
    "message": None,
}


class Supervisor:
    """Answers one question as it is told to."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.asked: list[Ask] = []
        self.reply: Reply = lambda ask: Answer(ask.id, True, {"message": "done"})
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer, peer.makefile("rb") as lines:
                for line in lines:
                    match decode(line):
                        case Hello(role="cli"):
                            peer.sendall(Catalog.of([]).encode())  # news in between are no answer
                        case Ask() as ask:
                            self.asked.append(ask)
                            peer.sendall(self.reply(ask).encode())
                            break

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(str(tmp_path / "s.sock"))
    yield made
    made.close()


def run(supervisor: Supervisor, *words: str) -> int:
    return main([*words, "--socket", supervisor.path])


@pytest.mark.parametrize(
    ("words", "verb", "args"),
    [
        (["load", "a"], "load", {"model": "a"}),
        (["unload", "a"], "unload", {"model": "a"}),
        (["sleep", "a"], "sleep", {"model": "a"}),
        (["sleep", "a", "--eviction", "retain+stop"], "sleep",
         {"model": "a", "eviction": "retain+stop"}),
        (["pin", "a"], "pin", {"models": ["a"]}),
        (["pin", "a", "--for", "60"], "pin", {"models": ["a"], "seconds": 60}),
        (["unpin", "a", "b"], "unpin", {"models": ["a", "b"]}),
        (["mode", "manual"], "mode", {"mode": "manual"}),
        (["cancel", "3", "4"], "cancel", {"orders": [3, 4]}),
        (["cancel", "--all"], "cancel", {}),
        (["unpin"], "unpin", {}),
        (["reload"], "reload", {}),
    ],
)  # fmt: skip
def test_an_order_is_asked_and_its_answer_printed(
    supervisor: Supervisor,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    verb: str,
    args: dict[str, str],
) -> None:
    assert run(supervisor, *words) == 0
    assert (supervisor.asked[0].verb, supervisor.asked[0].args) == (verb, args)
    assert capsys.readouterr().out == "done\n"


def test_json_is_the_answer_itself(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(supervisor, "load", "a", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"message": "done"}


def test_status_sums_up(supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {
        "state": "active:a",
        "mode": {"mode": "manual", "pinned": "a", "pins": ["b"]},
        "workers": 1,
        "orders": [{"id": 3, "verb": "load", "models": ["c"], "by": "root"}],
        "models": {"a": {**MODEL, "state": "serving"}, "b": MODEL, "c": MODEL},
    }
    supervisor.reply = lambda ask: Answer(ask.id, True, whole)
    assert run(supervisor, "status") == 0
    assert capsys.readouterr().out.splitlines() == [
        "state     active:a",
        "mode      manual, pinned to a, b",
        "models    2 parked, 1 serving",
        "requests  3 waiting, 6 in flight",
        "gateway   1 worker",
        "order 3   load c, by root",
    ]
    assert run(supervisor, "status", "--json") == 0
    assert json.loads(capsys.readouterr().out) == whole


def test_status_says_that_no_client_is_served(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"state": "idle", "mode": {"mode": "auto"}, "workers": 0, "models": {}}
    supervisor.reply = lambda ask: Answer(ask.id, True, whole)
    assert run(supervisor, "status") == 0
    assert "no client is served: `systemctl status llmux-gateway`" in capsys.readouterr().out


def test_a_reload_says_what_changed_and_what_waits_for_a_restart(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {
        "message": "configuration reloaded",
        "added": ["a", "b"],
        "removed": [],
        "changed": ["c"],
        "restart_gateway_for": ["gateway.listen"],
        "restart_supervisor_for": ["engine_user"],
    }
    supervisor.reply = lambda ask: Answer(ask.id, True, result)
    assert run(supervisor, "reload") == 0
    assert capsys.readouterr().out.splitlines() == [
        "configuration reloaded",
        "added: a, b",
        "changed: c",
        "not in force before `systemctl restart llmux-gateway`: gateway.listen",
        "not in force before `systemctl restart llmux`: engine_user",
    ]


def test_logs_are_printed_as_they_are(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.reply = lambda ask: Answer(ask.id, True, {"lines": ["one", "two"]})
    assert run(supervisor, "logs", "a", "-n", "2") == 0
    assert supervisor.asked[0].args == {"model": "a", "lines": 2}
    assert capsys.readouterr().out == "one\ntwo\n"


def test_an_engine_that_never_was_is_not_an_empty_answer(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.reply = lambda ask: Answer(ask.id, True, {"lines": []})
    assert run(supervisor, "logs", "a", "--previous") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "a: nothing is kept of an engine before this one\n")


def test_a_refusal_ends_with_3_and_says_why_on_stderr(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.reply = lambda ask: Answer(
        ask.id, False, None, Reason.UNKNOWN_MODEL.value, "Model not found: a"
    )
    assert run(supervisor, "load", "a") == 3
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "llmux: Model not found: a\n")


def test_a_failure_inside_the_supervisor_ends_with_1(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.reply = lambda ask: Answer(ask.id, False, None, "internal_error", "cannot do it")
    assert run(supervisor, "load", "a") == 1
    assert capsys.readouterr().err == "llmux: cannot do it\n"


def test_no_supervisor_ends_with_4_and_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ps", "--socket", str(tmp_path / "none.sock")]) == 4
    assert "systemctl status llmux" in capsys.readouterr().err


def test_check_names_what_is_wrong_and_ends_with_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("models:\n  a:\n    model_path: m\n    gpu_memory: 3\n")
    assert main(["check", "-c", str(file)]) == 78
    assert f"{file}:4:17: models.a.gpu_memory: " in capsys.readouterr().err
    assert main(["check", "--json", "-c", str(file)]) == 78
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["line"], problem["column"]) == (4, 17)
    file.write_text("models:\n  a:\n    model_path: m\n")
    assert main(["check", "-c", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: good, 1 model\n"


def test_check_takes_a_file_in_place_of_one_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf.d").mkdir()
    main_file, drop_in = tmp_path / "config.yaml", tmp_path / "conf.d" / "b.yaml"
    main_file.write_text("port: 3001\nmodels:\n  a: {model_path: m, port: 3002}\n")
    new = tmp_path / "x.tmp"

    def check(target: Path) -> tuple[int, str]:
        status = main(["check", str(new), "--in-place-of", str(target), "-c", str(main_file)])
        said = capsys.readouterr()
        return status, said.out + said.err

    # a drop-in that is not there yet clashes with the main file, and is called by its own name
    new.write_text("models:\n  b: {model_path: m, port: 3002}\n")
    status, said = check(drop_in)
    assert status == 78
    assert f"{drop_in}:2:28: models.b.port: port 3002 is taken" in said
    new.write_text("models:\n  b: {model_path: m}\n")
    assert check(drop_in) == (0, f"{new}: good, 2 models\nnote: {WITHOUT_KEYS}\n")
    # the main file is read with the drop-ins that are there
    drop_in.write_text("models:\n  b: {model_path: m}\n")
    new.write_text("models:\n  b: {model_path: other}\n")
    status, said = check(main_file)
    assert status == 78
    assert f'the model "b" is already in {main_file}:2' in said
    # what the configuration would not read is not called good
    status, said = check(tmp_path / "conf.d" / "b.yml")
    assert status == 78
    assert "not a file of this configuration" in said
    # without the option it is a configuration of its own
    new.write_text("port: 3005\n")
    assert main(["check", str(new)]) == 0
    assert capsys.readouterr().out == f"{new}: good, 0 models\n"


def test_check_names_keys_that_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("policy:\n  min_quantum_ms: 300\nmodels:\n  a: {model_path: m}\n")
    assert main(["check", "-c", str(file)]) == 0
    note = "policy.min_quantum_ms: this key has no effect: min_active_secs is the least time"
    assert f"note: {file}:2:3: {note}" in capsys.readouterr().out
    assert main(["check", "--json", "-c", str(file)]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["notes"]
    assert (shown["line"], shown["path"]) == (2, "policy.min_quantum_ms")


def test_a_quiet_check_prints_problems_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("policy:\n  min_quantum_ms: 300\nmodels:\n  a: {model_path: m}\n")
    assert main(["check", "--quiet", "-c", str(file)]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    file.write_text("models:\n  a: {model_path: m, x: 1}\n")
    assert main(["check", "--quiet", "-c", str(file)]) == 78
    assert "models.a.x: " in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"llmux {__version__}\n"


@pytest.mark.parametrize("verb", ["serve", "gateway"])
def test_what_the_system_refuses_is_said_without_a_number(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        file.write_text(f"gateway: {{listen: ['{address}']}}\nmodels: {{a: {{model_path: m}}}}\n")
        assert main([verb, "-c", str(file)]) == 1
    refused = f"llmux: cannot run: cannot listen on {address}: Address already in use"
    assert f"{refused} (who has it: ss -ltnp " in capsys.readouterr().err


def test_a_misspelt_verb_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["laod", "a"])
    assert ended.value.code == 2
    assert "invalid choice: 'laod'" in capsys.readouterr().err


def test_every_failure_of_ours_has_an_exit_status() -> None:
    def below(kind: type[LlmuxError]) -> set[type[LlmuxError]]:
        return {kind}.union(*(below(sub) for sub in kind.__subclasses__()))

    for kind in below(LlmuxError):
        assert any(issubclass(kind, listed) for listed, _ in EXIT_CODES), kind
    assert exit_code(ConfigError(())) == 78


@pytest.mark.parametrize("order", [["pin", "a", "--for"], ["load", "a", "--timeout"]])
@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "soon"])
def test_seconds_of_orders_are_checked_where_they_are_typed(
    order: list[str], seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*order, seconds])
    said = capsys.readouterr().err
    assert f'{order[-1]}: must be a number of seconds above 0, not "{seconds}"' in said
