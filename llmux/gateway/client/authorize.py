"""Authorization of a request, before its body is received.

With keys, decided in this order:

1. OPTIONS: allowed, a browser's preflight carries no key and gets no data; the files of the page
2. no valid key: refused, but for liveness, and for root or our own user on a unix socket
3. inference and lists of models: any key
4. all else: an admin key; a change of state by GET needs it even on a unix socket

Without keys:

1. OPTIONS and the files of the page: allowed
2. over TCP, a Host that a web page's owner could have registered: refused (DNS rebinding)
3. over TCP, a POST of a web page whose origin is neither ours nor in gateway.cors_origins: refused
4. inference, lists of models and ``READ_PATHS``: allowed, the latter for no web page
5. orders and engines' output: root or our own user on a unix socket only
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

from llmux.errors import Reason, Refused
from llmux.gateway.admission.keys import (
    USE_PATHS,
    Guard,
    check_page,
    check_role,
    is_trusted_peer,
    secret_of,
)
from llmux.gateway.http import openapi
from llmux.gateway.http.request import Incoming
from llmux.gateway.worker import Worker

# Harmless to every local user: states, numbers, nothing that a client or an engine wrote.
READ_PATHS: Final = frozenset(
    {
        b"/control/eviction",
        b"/control/status",
        b"/events",
        b"/metrics",
        b"/openapi.json",
        b"/running",
        b"/ui/feed",
        b"/ui/history",
    }
)
PAGE_PATHS: Final = frozenset({b"/ui", b"/ui/"})
PAGE_FILES: Final = b"/ui/static/"
CHANGING_GETS: Final = frozenset({b"/unload"})


def authorize(incoming: Incoming, worker: Worker[Any], transport: asyncio.Transport | None) -> None:
    """Sets ``incoming.key`` when keys are configured. Raises Refused."""
    match = incoming.match
    # No route to an engine is OPTIONS or a file of the page.
    if match is None and (incoming.method == b"OPTIONS" or _is_of_the_page(incoming)):
        return
    if worker.guard is not None:
        _authorize_with_keys(incoming, worker.guard, transport)
        return
    head = incoming.head
    # What the transport is, is looked up last: it costs more than all else here.
    if head.host is not None and not worker.hosts[head.host] and not _is_unix(transport):
        raise Refused(
            Reason.FORBIDDEN,
            "cannot serve a request for this Host: the name is not known to be this server's",
            hint="use an IP address or localhost, set gateway.allowed_hosts, or use keys",
        )
    if (
        head.origin
        and incoming.method == b"POST"
        and _is_foreign(incoming, worker)
        and not _is_unix(transport)
    ):
        raise Refused(
            Reason.FORBIDDEN,
            "cannot serve a web page of this origin",
            hint="gateway.cors_origins lists the allowed ones",
        )
    if match is None:
        _authorize_own_path(incoming, transport)


def _authorize_with_keys(
    incoming: Incoming, guard: Guard, transport: asyncio.Transport | None
) -> None:
    secret = secret_of(incoming.head.authorization, incoming.head.x_api_key)
    incoming.withheld = True
    # an engine's /health is not our own; ours with a slash too many is only redirected
    path = b"" if incoming.match else incoming.path.rstrip(b"/")
    incoming.key = guard.identify(path, secret, transport)
    if incoming.match is None:
        check_role(incoming.key, incoming.path)
        if not secret:
            _check_changing_get(incoming)


def _authorize_own_path(incoming: Incoming, transport: asyncio.Transport | None) -> None:
    """Without keys, what llmux itself answers."""
    path = incoming.path
    if path.startswith(USE_PATHS):
        return
    check_page(path, incoming.head.origin, incoming.header(b"sec-fetch-site"))
    _check_changing_get(incoming)
    if incoming.method in (b"GET", b"HEAD") and path.rstrip(b"/") in READ_PATHS:
        return
    # Also what is not described: a route that was forgotten there must not be open to all.
    if openapi.is_ours(path) and not is_trusted_peer(transport):
        raise Refused(
            Reason.FORBIDDEN,
            "cannot control llmux over this connection without an admin key",
            hint="use the llmux command as root, or set gateway.keys_file",
        )


def _is_of_the_page(incoming: Incoming) -> bool:
    """The page's own files: the same for everyone, whatever they may do with it."""
    path = incoming.path
    own = path in PAGE_PATHS or path.startswith(PAGE_FILES)
    return own and incoming.method in (b"GET", b"HEAD")


def _check_changing_get(incoming: Incoming) -> None:
    if incoming.method == b"GET" and incoming.path in CHANGING_GETS:
        raise Refused(
            Reason.FORBIDDEN, "cannot change state by GET without an admin key", hint="use POST"
        )


def _is_foreign(incoming: Incoming, worker: Worker[Any]) -> bool:
    origin = incoming.head.origin
    if worker.cors is not None and worker.cors.allows(origin):
        return False
    return origin.partition(b"://")[2].lower() != (incoming.head.host or b"").lower()


def _is_unix(transport: asyncio.Transport | None) -> bool:
    sock = None if transport is None else transport.get_extra_info("socket")
    return sock is not None and sock.family == socket.AF_UNIX
