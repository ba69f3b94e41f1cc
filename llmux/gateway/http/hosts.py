"""Names of this server in a Host header: those that no stranger can have registered.

Against DNS rebinding: a web page whose owner lets its own name point to 127.0.0.1 is of the same
origin as the gateway to the browser, which then sends that name as the Host.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Final

# Reserved for local use (RFC 6761, ICANN 2024).
LOCAL_SUFFIXES: Final = (b".localhost", b".internal")
MAX_CACHED: Final = 256


class Hosts(dict[bytes, bool]):
    """Host, as in the header with or without a port → whether it is allowed. Judged when first
    looked up; a dict, since a call costs each request three times what a lookup does.

    ``allowed``: further names, ``*`` among them allows all.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        super().__init__()
        names = {name.lower().encode() for name in allowed}
        self._any = b"*" in names
        self._names = names | {socket.gethostname().lower().encode()}

    def __missing__(self, host: bytes) -> bool:
        known = self._any or self._is_known(host.lower())
        if len(self) < MAX_CACHED:
            self[host] = known
        return known

    def _is_known(self, host: bytes) -> bool:
        if host.startswith(b"["):
            return _is_address(host[1:].partition(b"]")[0])
        name, _, port = host.partition(b":")
        if not name or (port and not port.isdigit()):
            return False
        if name in self._names or name.endswith(LOCAL_SUFFIXES) or b"." not in name:
            return True
        return _is_address(name)


def _is_address(text: bytes) -> bool:
    try:
        ipaddress.ip_address(text.decode("ascii"))
    except ValueError:
        return False
    return True
