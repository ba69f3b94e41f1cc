"""``llmux run MODEL PROMPT``: one prompt to the gateway, the answer as it comes."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final
from urllib.parse import urlsplit

from llmux import typed_json
from llmux.cli.arguments import KEY_VARIABLE
from llmux.cli.output import print_json
from llmux.config.addresses import split_address
from llmux.config.load import load_config
from llmux.errors import LlmuxError
from llmux.printable import printable

CONNECT_SECS: Final = 10.0
MAX_LINE: Final = 1 << 20
NO_REASON: Final = "no reason given"
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_END: Final = "-----END CERTIFICATE-----"


def run(args: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    body: dict[str, Any] = {
        "model": args.model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
    }
    if args.max_tokens is not None:
        body["max_tokens"] = args.max_tokens
    headers = {"Content-Type": "application/json"}
    if key := _key(args.key_file):
        headers["Authorization"] = f"Bearer {key}"
    began = monotonic()
    first: float | None = None
    parts: list[str] = []
    with closing(_connection(args)) as connection:
        for text in _answer(connection, body, headers, args.timeout):
            first = monotonic() if first is None else first
            parts.append(text)
            if not args.json:
                print(printable(text), end="", flush=True)
    ended = monotonic()
    if args.json:
        waited = None if first is None else round(first - began, 3)
        print_json(
            {
                "model": args.model,
                "text": "".join(parts),
                "first_token_secs": waited,
                "total_secs": round(ended - began, 3),
            }
        )
        return
    print()
    if first is not None and sys.stderr.isatty():
        print(f"({first - began:.2f} s to the first token, {ended - began:.2f} s)", file=sys.stderr)


def _key(path: str | None) -> str:
    if path is None:
        return os.environ.get(KEY_VARIABLE, "")
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise LlmuxError(f"cannot read the API key from {path}: {cause}") from error
    if not text.isprintable() or len(text.split()) != 1:
        raise LlmuxError(f"cannot use the API key in {path}: expected one word")
    return text


@dataclass(frozen=True, slots=True)
class _Delta:
    content: str | None = None


@dataclass(frozen=True, slots=True)
class _Choice:
    delta: _Delta | None = None


@dataclass(frozen=True, slots=True)
class _Event:
    """What is used of one event; other servers leave out what does not concern it."""

    choices: tuple[_Choice, ...] | None = None
    error: Any = None


def _answer(
    connection: http.client.HTTPConnection,
    body: dict[str, Any],
    headers: dict[str, str],
    timeout: float,
) -> Iterator[str]:
    """The pieces of the answer as the model wrote them. Raises LlmuxError with the server's own
    message, after ``timeout`` seconds without a byte as well."""
    try:
        connection.timeout = min(timeout, CONNECT_SECS)
        connection.connect()
        connection.sock.settimeout(timeout)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        with connection.getresponse() as response:
            yield from _pieces(response, body["model"])
    except typed_json.BadJson as error:
        cause = printable(str(error))
        raise LlmuxError(f"cannot run {body['model']}: odd event in the answer: {cause}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise LlmuxError(
            f"cannot talk to the gateway: {str(error) or type(error).__name__}",
            hint="systemctl status llmux-gateway; --url names another",
        ) from error


def _pieces(response: http.client.HTTPResponse, model: str) -> Iterator[str]:
    if response.status != 200:
        raise LlmuxError(f"cannot run {model}: {_refusal(response.read(MAX_LINE))}")
    for data in _data_lines(response, model):
        event = typed_json.read(_Event, typed_json.parse(data))
        if event.error is not None:
            raise LlmuxError(f"cannot run {model}: {_message(event.error)}")
        for choice in event.choices or ():
            if choice.delta is not None and choice.delta.content:
                yield choice.delta.content


def _data_lines(response: http.client.HTTPResponse, model: str) -> Iterator[bytes]:
    while line := response.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise LlmuxError(f"cannot run {model}: a line of more than {MAX_LINE} bytes came")
        if line.startswith(b"data: ") and (data := line[6:].strip()) != b"[DONE]":
            yield data


def _refusal(body: bytes) -> str:
    try:
        answer = typed_json.parse(body)
    except typed_json.BadJson:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        return _message(answer["error"])
    return printable(body.decode(errors="replace"))[:200] or NO_REASON


def _message(error: Any) -> str:
    """Of OpenAI's error object; some servers write a string in its place."""
    text = error.get("message") if isinstance(error, dict) else error
    return printable(text)[:2000] if isinstance(text, str) and text else NO_REASON


# ---- the connection -----------------------------------------------------------------------------


def _connection(args: argparse.Namespace) -> http.client.HTTPConnection:
    if args.url is not None:
        return _connection_to(args.url, args.ca_file)
    config = load_config(args.config, check_files=False)
    addresses = config.listen_addresses()
    local = next((one for one in addresses if one.startswith("unix:")), addresses[0])
    address = split_address(local)
    if address is None:
        return _UnixConnection(local.removeprefix("unix:"))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])  # noqa: S104  # not bound
    certificate = config.gateway.tls_certificate
    if certificate is None:
        return http.client.HTTPConnection(host, address[1])
    context = _trusting_only(certificate) if args.ca_file is None else _trusting(args.ca_file)
    context.check_hostname = False  # by this host's own address, which no certificate names
    return http.client.HTTPSConnection(host, address[1], context=context)


def _connection_to(url: str, ca_file: str | None) -> http.client.HTTPConnection:
    problem = LlmuxError(f"cannot use {url}: not an http or https URL")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:  # a port that is no number
        raise problem from error
    if parts.scheme not in ("http", "https") or not host:
        raise problem
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port)
    return http.client.HTTPSConnection(host, port, context=_trusting(ca_file))


def _trusting(ca_file: str | None) -> ssl.SSLContext:
    """The authorities in ``ca_file``, or the system's."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError included
        raise LlmuxError(f"cannot read certificates from {ca_file}: {error}") from error


def _trusting_only(path: str) -> ssl.SSLContext:
    """The gateway's own certificate, and no other that its authority may have made."""
    try:
        text = Path(path).read_text(encoding="ascii")
        own = text[text.index(_BEGIN) : text.index(_END) + len(_END)]
        context = ssl.create_default_context(cadata=own + "\n")
    except (OSError, ValueError) as error:
        raise LlmuxError(
            f"cannot read gateway.tls_certificate {path} to verify the gateway: {error}",
            hint="--ca-file FILE",
        ) from error
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
