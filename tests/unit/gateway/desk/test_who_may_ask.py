"""Who may ask what: over TCP or a unix socket, a page of another site, with a key or without."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from gateway_desk import Desk, in_a_loop

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole
from llmux.errors import Reason, Refused
from llmux.gateway.client.authorize import authorize
from llmux.gateway.http.request import Incoming

# ---- who may ask ---------------------------------------------------------------------------------


class Peer:
    """A client's transport over TCP, or over a unix socket of our own user."""

    def __init__(self, unix: bool) -> None:
        self.pair = socket.socketpair() if unix else (socket.socket(), socket.socket())

    def get_extra_info(self, name: str) -> Any:
        assert name == "socket"
        return self.pair[0]

    def close(self) -> None:
        for one in self.pair:
            one.close()


def allowed(desk: Desk, incoming: Incoming, *, unix: bool = False) -> bool:
    peer = Peer(unix)
    try:
        authorize(incoming, desk.worker, peer)  # type: ignore[arg-type]
    except Refused as problem:
        assert problem.reason in (Reason.FORBIDDEN, Reason.NO_KEY)
        return False
    finally:
        peer.close()
    return True


@pytest.mark.parametrize(
    ("method", "path", "headers", "tcp", "unix"),
    [
        ("POST", "/v1/completions", (), True, True),
        ("POST", "/v1/completions", ("Host: evil.example",), False, True),
        ("POST", "/v1/completions", ("Host: llm.example.org",), True, True),
        ("POST", "/v1/completions", ("Origin: https://evil.example",), False, True),
        ("POST", "/v1/completions", ("Origin: https://x",), True, True),
        ("POST", "/v1/completions", ("Origin: https://a",), True, True),
        ("POST", "/v1/completions", ("Origin: https://X",), True, True),
        ("GET", "/v1/models", ("Origin: https://evil.example",), True, True),
        ("GET", "/v1/models", ("Host: evil.example",), False, True),
        ("OPTIONS", "/control/pin", ("Host: evil.example",), True, True),
        ("GET", "/ui/", ("Host: evil.example",), True, True),
        ("HEAD", "/ui", ("Host: evil.example",), True, True),
        ("GET", "/ui/static/x.js", ("Host: evil.example",), True, True),
        ("POST", "/ui/", ("Host: evil.example",), False, True),
        ("GET", "/control/status", (), True, True),
        ("HEAD", "/metrics", (), True, True),
        ("GET", "/metrics/", (), True, True),
        ("GET", "/logs/", (), False, True),
        ("GET", "/control/status", ("Origin: https://x",), False, False),
        ("GET", "/events", ("Sec-Fetch-Site: cross-site",), False, False),
        ("GET", "/events", ("Sec-Fetch-Site: same-origin",), True, True),
        ("GET", "/events", ("Sec-Fetch-Site: none",), True, True),
        ("POST", "/control/status", (), False, True),
        ("POST", "/control/pin", (), False, True),
        ("GET", "/logs/alpha", (), False, True),
        ("GET", "/unload", (), False, False),
        ("POST", "/unload", (), False, True),
        ("GET", "/nowhere", (), True, True),
    ],
)
@in_a_loop
async def test_without_keys_who_may_what(
    method: str,
    path: str,
    headers: tuple[str, ...],
    tcp: bool,
    unix: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, cors_origins=("https://a",), allowed_hosts=("llm.example.org",))
    incoming = desk.incoming(b"{}", *headers, path=path, method=method)
    assert (allowed(desk, incoming), allowed(desk, incoming, unix=True)) == (tcp, unix)
    assert not incoming.withheld


USE, BOSS = Key("one", hash_key("1")), Key("boss", hash_key("2"), role=KeyRole.ADMIN)


@pytest.mark.parametrize(
    ("method", "path", "none", "use", "admin", "unix"),
    [
        ("POST", "/v1/completions", False, True, True, True),
        ("GET", "/v1/models", False, True, True, True),
        ("GET", "/health", True, True, True, True),
        ("GET", "/health/", True, True, True, True),
        ("GET", "/health/weights", False, True, True, True),
        ("GET", "/upstream/alpha/health", False, True, True, True),
        ("GET", "/control/status", False, False, True, True),
        ("POST", "/control/pin", False, False, True, True),
        ("GET", "/unload", False, False, True, False),
        ("POST", "/unload", False, False, True, True),
        ("GET", "/nowhere", False, False, True, True),
        ("OPTIONS", "/control/pin", True, True, True, True),
        ("GET", "/ui/", True, True, True, True),
        ("GET", "/ui/feed", False, False, True, True),
    ],
)
@in_a_loop
async def test_with_keys_who_may_what(
    method: str,
    path: str,
    none: bool,
    use: bool,
    admin: bool,
    unix: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, keys=lambda: (USE, BOSS))
    for secret, expected in ((b"", none), (b"1", use), (b"2", admin), (b"wrong", none)):
        incoming = desk.incoming(b"{}", path=path, method=method)
        incoming.head.x_api_key = secret
        assert allowed(desk, incoming) is expected, secret
        page = method == "OPTIONS" or path == "/ui/"
        assert incoming.withheld is not page
        if expected and secret in (b"1", b"2") and not page:
            assert incoming.key is not None
            assert incoming.key.key is (USE if secret == b"1" else BOSS)
    assert allowed(desk, desk.incoming(b"{}", path=path, method=method), unix=True) is unix
