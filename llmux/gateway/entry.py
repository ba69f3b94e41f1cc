"""Whether a request may come in at all; asked before its body is received."""

from __future__ import annotations

import asyncio

from llmux.gateway.incoming import Incoming
from llmux.gateway.keys import Guard, check_page, check_role, secret_of


def let_in(incoming: Incoming, guard: Guard | None, transport: asyncio.Transport | None) -> None:
    """Sets ``incoming.key`` where keys are asked for. Raises Refused."""
    if incoming.method == b"OPTIONS":  # a browser's preflight brings no key, and gets no data
        return
    if guard is None:
        if incoming.match is None:
            check_page(incoming.path, incoming.head.origin, incoming.header(b"sec-fetch-site"))
        return
    secret = secret_of(incoming.head.authorization, incoming.head.x_api_key)
    incoming.withheld = True
    path = b"" if incoming.match else incoming.path  # an engine's /health is not our own
    incoming.key = guard.identify(path, secret, transport)
    if incoming.match is None:
        check_role(incoming.key, incoming.path)
