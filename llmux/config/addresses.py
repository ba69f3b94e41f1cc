"""Parse listen addresses and web pages' origins. Pure.

Never resolves a name, never opens a socket.
"""

from __future__ import annotations

import ipaddress
import re
from types import MappingProxyType
from typing import Final

from llmux.config.files.marks import Kind, Node, Scalar, invalid, quote
from llmux.config.parse import line


def listen_address(node: Node) -> str:
    examples = '"127.0.0.1:3000", "[::1]:3000" or "unix:/run/llmux-gateway/http.sock"'
    expected = f"expected an address such as {examples}"
    if isinstance(node, Scalar) and node.kind is Kind.NUMBER:
        raise invalid(node, f"{expected}, got only the port {node.text} (add the host before it)")
    address = line(node, "an address")
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path.startswith("/"):
            raise invalid(node, f"{expected}, got {quote(address)} (the path must be absolute)")
        if len(path.encode()) > 107:  # sun_path in unix(7), less the final null byte
            raise invalid(node, "cannot listen on a socket path longer than 107 bytes")
        return address
    host, colon, port_text = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port_text):
        raise invalid(node, f"{expected}, got {quote(address)}")
    if not 1 <= int(port_text) <= 65535:
        raise invalid(node, f"expected a port from 1 to 65535 in {quote(address)}")
    if host in ("", "*"):
        raise invalid(
            node, f"{expected}, got {quote(address)} (every address is 0.0.0.0 or [::], in full)"
        )
    if not _is_host(host):
        raise invalid(node, f"{expected}, got {quote(address)} ({quote(host)} is not a host)")
    return address


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port of a parsed listen address; None for a unix socket."""
    if address.startswith("unix:"):
        return None
    host, _, port_text = address.rpartition(":")
    return host.strip("[]"), int(port_text)


def _is_host(host: str) -> bool:
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        return ipaddress.ip_address(host[1:-1] if bracketed else host).version == (
            6 if bracketed else 4
        )
    except ValueError:
        label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        # A name that is all digits and dots is a mistyped address.
        return bool(re.fullmatch(rf"(?=.*[A-Za-z]){label}(\.{label})*", host))


def origin(node: Node) -> str:
    """A web page's origin as browsers send it, or * for all."""
    value = line(node, "an origin")
    if value != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]{1,255}", value):
        raise invalid(
            node,
            f'expected an origin such as "https://chat.example.org" or "*", got {quote(value)}',
        )
    return value.lower()


_NETWORK_WORDS: Final = MappingProxyType(
    {
        "any": ("0.0.0.0/0", "::/0"),
        "localhost": ("127.0.0.0/8", "::1/128"),
        "link-local": ("169.254.0.0/16", "fe80::/64"),
        "multicast": ("224.0.0.0/4", "ff00::/8"),
    }
)


def network(node: Node) -> tuple[str, ...]:
    """The networks that an address, a network or one of systemd's words stands for."""
    text = line(node, "a network")
    if text in _NETWORK_WORDS:
        return _NETWORK_WORDS[text]
    try:
        return (str(ipaddress.ip_network(text, strict=False)),)
    except ValueError:
        words = ", ".join(_NETWORK_WORDS)
        example = f'a network such as "10.0.0.0/8", or one of {words}'
        raise invalid(node, f"expected {example}, got {quote(text)}") from None


def host_name(node: Node) -> str:
    """A name in a Host header, without a port, or * for all."""
    value = line(node, "a host name")
    if value != "*" and not re.fullmatch(r"[A-Za-z0-9.-]{1,253}", value):
        raise invalid(
            node, f'expected a host name such as "llm.example.org" or "*", got {quote(value)}'
        )
    return value.lower()
