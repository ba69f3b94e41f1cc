"""``llmux run``: a prompt to a gateway that says what the test wants."""

from __future__ import annotations

import io
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmux.cli.main import main


class Gateway(ThreadingHTTPServer):
    status = 200
    events: tuple[Any, ...] = ()
    raw: bytes | None = None  # the body, in place of events

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has read enough, or trusts another certificate."""

    def config(self, directory: Path) -> str:
        file = directory / "config.yaml"
        file.write_text(f"port: {self.server_port}\nmodels: {{a: {{model_path: m}}}}\n")
        return str(file)


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        self.server.keys.append(self.headers["authorization"])
        self.send_response(self.server.status)
        self.end_headers()
        if self.server.raw is not None:
            self.wfile.write(self.server.raw)
            return
        if self.server.status != 200:
            self.wfile.write(json.dumps({"error": {"message": "no such model"}}).encode())
            return
        self.wfile.write(b": llmux: waiting\n\n")
        for event in self.server.events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:  # its own name
        """Say nothing."""


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_the_answer_is_printed_as_it_comes(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.events = ({"choices": [{"delta": {"role": "assistant"}}]}, piece("Hel"), piece("lo"))
    config = gateway.config(tmp_path)
    assert main(["run", "a", "Say hello", "--max-tokens", "9", "-c", config]) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert gateway.bodies == [
        {
            "model": "a",
            "messages": [{"role": "user", "content": "Say hello"}],
            "stream": True,
            "max_tokens": 9,
        }
    ]
    assert gateway.keys == [None]


def test_the_prompt_may_come_on_standard_input_and_the_key_from_the_environment(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.events = (piece("yes"),)
    monkeypatch.setattr("sys.stdin", io.StringIO("one two"))
    monkeypatch.setenv("LLMUX_API_KEY", "sk-1")
    url = f"http://127.0.0.1:{gateway.server_port}"
    assert main(["run", "a", "--url", url, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["model"], answer["text"]) == ("a", "yes")
    assert 0 <= answer["first_token_secs"] <= answer["total_secs"]
    assert gateway.bodies[0]["messages"][0]["content"] == "one two"
    assert gateway.keys == ["Bearer sk-1"]


def test_a_key_comes_from_a_file_and_never_from_the_arguments(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, key = gateway.config(tmp_path), tmp_path / "key"
    key.write_text("sk-2\n")
    assert main(["run", "a", "x", "-c", config, "--key-file", str(key)]) == 0
    assert gateway.keys == ["Bearer sk-2"]
    key.write_text("sk-2\nHost: other\n")
    assert main(["run", "a", "x", "-c", config, "--key-file", str(key)]) == 1
    assert main(["run", "a", "x", "-c", config, "--key-file", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert "expected one word" in said and "no such file" in said.lower()
    with pytest.raises(SystemExit):
        main(["run", "a", "x", "-c", config, "--key", "sk-3"])


def test_a_refusal_and_an_error_in_the_stream_are_in_the_gateways_own_words(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = gateway.config(tmp_path)
    gateway.status = 404
    assert main(["run", "b", "x", "-c", config]) == 1
    assert capsys.readouterr().err == "llmux: cannot run b: no such model\n"
    gateway.status = 200
    gateway.events = (piece("a"), {"error": {"message": "it died"}})
    assert main(["run", "a", "x", "-c", config]) == 1
    assert "cannot run a: it died" in capsys.readouterr().err


def test_a_gateway_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"gateway: {{listen: ['unix:{tmp_path}/none']}}\nmodels: {{a: {{model_path: m}}}}"
    )
    assert main(["run", "a", "x", "-c", str(file)]) == 1
    assert "systemctl status llmux-gateway" in capsys.readouterr().err
    assert main(["run", "a", "x", "--url", "ftp://x"]) == 1
    assert "not an http or https URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        b'data: {"choices": [{"text": "x"}]}\n\ndata: {"choices": null}\n\ndata: [DONE]\n\n',
        b'data: {"choices": [{"delta": null}]}\n\n',
        b"data: {}\n\n",
        b"",
    ],
)
def test_events_without_text_are_no_fault(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: bytes
) -> None:
    gateway.raw = body
    assert main(["run", "a", "x", "-c", gateway.config(tmp_path)]) == 0
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"data: [1]\n\n", "expected an object"),
        (b"data: null\n\n", "expected an object"),
        (b"data: hello\n\n", "Expecting value"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "nested too deeply"),
        (b"data: \xff\xfe\n\n", "cannot run a"),
        (b'data: {"choices": {"a": 1}}\n\n', "choices: expected a list"),
        (b'data: {"choices": ["a"]}\n\n', "choices[0]: expected an object"),
        (b'data: {"choices": [{"delta": []}]}\n\n', "choices[0].delta: expected an object"),
        (b'data: {"choices": [{"delta": {"content": 7}}]}\n\n', "content: expected a string"),
        (b'data: {"error": {}}\n\n', "no reason given"),
        (b'data: {"error": {"message": {"a": 1}}}\n\n', "no reason given"),
        (b'data: {"error": "it died"}\n\n', "it died"),
        (b"data: " + b"x" * (2 << 20), "a line of more than"),
    ],
)
def test_an_odd_answer_is_an_error_that_names_the_place(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: bytes, said: str
) -> None:
    gateway.raw = body
    assert main(["run", "a", "x", "-c", gateway.config(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmux: cannot run a: ") and said in error, error


@pytest.mark.parametrize(
    ("body", "said"),
    [(b'{"error": "\xc2\x9bno"}', "no"), (b"[]", "[]"), (b"", "no reason"), (b"[" * 90_000, "[[")],
)
def test_an_odd_refusal_is_an_error(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: bytes, said: str
) -> None:
    gateway.status, gateway.raw = 500, body
    assert main(["run", "a", "x", "-c", gateway.config(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmux: cannot run a: ") and said in error and "\x9b" not in error
    assert len(error) < 400


def test_nothing_that_a_model_says_is_obeyed_by_the_terminal(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ("a\x1b]0;PWNED\x07b\n", "\tc\x1b", "[2Jd\x9b31me\u202ef\ud800g\r\n")
    gateway.events = tuple(piece(text) for text in said)
    config = gateway.config(tmp_path)
    assert main(["run", "a", "x", "-c", config]) == 0
    assert capsys.readouterr().out == "ab\n\tc[2Jdefg\n\n"
    assert main(["run", "a", "x", "-c", config, "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.isascii() and "\x1b" not in shown
    gateway.events = ({"error": {"message": "x\x1b[2Jy"}},)
    assert main(["run", "a", "x", "-c", config]) == 1
    assert capsys.readouterr().err == "llmux: cannot run a: xy\n"


# ---- TLS ----------------------------------------------------------------------------------------


def certificate(directory: Path, name: str) -> tuple[str, str]:
    """A certificate that no other one vouches for, and its key."""
    made, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(made)],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(made), str(key)


def over_tls(gateway: Gateway, pair: tuple[str, str]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    gateway.socket = context.wrap_socket(
        gateway.socket, server_side=True, do_handshake_on_connect=False
    )


def test_a_key_goes_only_to_the_configured_certificate(
    gateway: Gateway,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The certificate was not looked at, for any address: the key went to any listener."""
    ours, other = certificate(tmp_path, "ours"), certificate(tmp_path, "other")
    monkeypatch.setenv("LLMUX_API_KEY", "sk-1")
    over_tls(gateway, ours)
    gateway.events = (piece("yes"),)

    def configured(pair: tuple[str, str]) -> str:
        file = tmp_path / "tls.yaml"
        file.write_text(
            f"port: {gateway.server_port}\n"
            f"gateway: {{tls_certificate: {pair[0]}, tls_key: {pair[1]}}}\n"
            "models: {a: {model_path: m}}\n"
        )
        return str(file)

    assert main(["run", "a", "x", "-c", configured(ours)]) == 0
    assert capsys.readouterr().out == "yes\n"
    assert main(["run", "a", "x", "-c", configured(other)]) == 1
    assert "certificate" in capsys.readouterr().err
    assert gateway.keys == ["Bearer sk-1"]
    file = configured((str(tmp_path / "none.pem"), ours[1]))
    assert main(["run", "a", "x", "-c", file]) == 1
    assert "--ca-file" in capsys.readouterr().err


def test_a_url_is_verified_with_the_systems_authorities_or_a_given_one(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = certificate(tmp_path, "ours")
    over_tls(gateway, pair)
    gateway.events = (piece("yes"),)
    url = f"https://127.0.0.1:{gateway.server_port}"
    assert main(["run", "a", "x", "--url", url]) == 1
    assert "certificate" in capsys.readouterr().err
    assert main(["run", "a", "x", "--url", url, "--ca-file", pair[0]]) == 0
    assert main(["run", "a", "x", "--url", url, "--ca-file", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    assert len(gateway.keys) == 1


def test_a_server_that_says_nothing_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["run", "a", "x", "--url", url, "--timeout", "0.2"]) == 1
    assert "timed out" in capsys.readouterr().err
