"""API keys: find the key of a request by its hash, and check what it allows.

A presented key is hashed and the hash looked up; the one entry found is compared in constant time.
Nothing about a wrong key is logged, and no key is passed on to an engine.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmux.config.choices import KeyRole
from llmux.config.schema import Key
from llmux.errors import LlmuxError, Reason, Refused
from llmux.gateway.admission.key_limits import KeyUse

logger = logging.getLogger(__name__)

LoadKeys = Callable[[], Sequence[Key]]

TRUSTED_UIDS = frozenset({0})  # of a unix socket's peer, besides our own
MAX_VERIFIED = 4096  # presented keys cached by their text, which saves hashing

# Answered without a key: liveness says nothing about the models.
OPEN_PATHS = frozenset({b"/health", b"/health/live", b"/health/ready"})
# Everything a key of role `use` reaches besides inference. All other routes need an admin key, so
# a new route is closed until it is listed here.
USE_PATHS = (b"/v1/", b"/health", b"/models")

PEER = Key("peer", b"", KeyRole.ADMIN)  # root or our own user on a unix socket


class Guard:
    """The keys in force. ``load`` re-reads the file; ``workers`` share every key's limits."""

    def __init__(self, load: LoadKeys, *, workers: int, clock: Callable[[], float]) -> None:
        self._load = load
        self._workers = workers
        self._clock = clock
        self._by_hash: dict[bytes, KeyUse] = {}
        self._verified: dict[bytes, KeyUse] = {}
        self._peer = KeyUse(PEER, 1, clock)
        self._names: Mapping[str, str] = {}
        self._take(load())

    def reload(self) -> None:
        """Re-read the keys. An invalid file leaves the current keys in force."""
        try:
            keys = self._load()
        except LlmuxError as error:
            logger.error("cannot reload the keys, the current ones stay in force: %s", error)
            return
        self._take(keys)
        logger.info("%d keys in force", len(keys))

    def know(self, names: Mapping[str, str]) -> None:
        """Set the names (name or alias → model) that keys may be bound to."""
        self._names = names
        for use in self._by_hash.values():
            use.allow(names)

    def _take(self, keys: Sequence[Key]) -> None:
        former = {use.key.name: use for use in self._by_hash.values()}
        self._by_hash = {}
        self._verified = {}
        for key in keys:
            use = former.get(key.name)
            if use is None:
                use = KeyUse(key, self._workers, self._clock)
            else:
                use.set_limits(key, self._workers)
            use.allow(self._names)
            self._by_hash[key.sha256] = use

    # ---- one request ----------------------------------------------------------------------------

    def identify(self, path: bytes, secret: bytes, transport: Any) -> KeyUse | None:
        """The key of a request; None for a path that needs none. Raises Refused."""
        use = self._verified.get(secret) or self._verify(secret)
        if use is None:
            if path in OPEN_PATHS:
                return None
            if not secret and is_trusted_peer(transport):
                return self._peer
            raise Refused(
                Reason.NO_KEY,
                "this API key is not valid" if secret else "an API key is required",
                hint="send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            )
        return use

    def _verify(self, secret: bytes) -> KeyUse | None:
        if not secret:
            return None
        digest = hashlib.sha256(secret).digest()
        use = self._by_hash.get(digest)
        if use is None or not hmac.compare_digest(use.key.sha256, digest):
            return None
        if len(self._verified) >= MAX_VERIFIED:
            self._verified.clear()
        self._verified[secret] = use
        return use


def check_role(use: KeyUse | None, path: bytes) -> None:
    """Check a request that is not for inference. Raises Refused."""
    if use is not None and use.key.role is not KeyRole.ADMIN and not path.startswith(USE_PATHS):
        raise Refused(Reason.FORBIDDEN, "this API key may only use models, not control llmux")


def check_page(path: bytes, origin: bytes, site: bytes) -> None:
    """Without keys: refuse orders that a browser sends for a web page of another site, which Origin
    or Sec-Fetch-Site reveals. Raises Refused."""
    foreign = origin or site not in (b"", b"none", b"same-origin")
    if foreign and not path.startswith(USE_PATHS):
        raise Refused(
            Reason.FORBIDDEN, "web pages may not control llmux while no keys are configured"
        )


def begin_use(use: KeyUse, model: str) -> None:
    """Count a request for ``model``; ``use.end`` must follow. Raises Refused."""
    if not may_use(use, model):
        raise Refused(
            Reason.UNKNOWN_MODEL,
            f'the model "{model[:200]}" does not exist or this API key may not use it',
            hint="GET /v1/models lists the models",
            param="model",
        )
    use.begin()


def may_use(use: KeyUse | None, model: str) -> bool:
    return use is None or use.models is None or model in use.models


def secret_of(authorization: bytes, x_api_key: bytes) -> bytes:
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip()
    return x_api_key.strip()


def is_trusted_peer(transport: Any) -> bool:
    """Whether root or our own user is at the other end of a unix socket."""
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return False
    size = struct.calcsize("3i")
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        return False
    uid = struct.unpack("3i", raw)[1]
    return uid in TRUSTED_UIDS or uid == os.getuid()
