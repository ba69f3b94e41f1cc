"""What is used of pystemd: its connection to sd-bus and its table of properties.

Its packages import lxml, 4 MB, to read descriptions of interfaces, for which nothing here asks. So
they are made known without being run; their modules are complete without them.
"""

from __future__ import annotations

import importlib.util
import sys


def _know(package: str) -> None:
    if package not in sys.modules and (spec := importlib.util.find_spec(package)) is not None:
        sys.modules[package] = importlib.util.module_from_spec(spec)


_know("pystemd")
_know("pystemd.systemd1")

from pystemd.dbusexc import DBusBaseError  # noqa: E402
from pystemd.dbuslib import DBus, apply_signature  # noqa: E402
from pystemd.systemd1.unit_signatures import (  # noqa: E402
    KNOWN_UNIT_SIGNATURES,
    signature_array,
)

__all__ = [
    "KNOWN_UNIT_SIGNATURES",
    "DBus",
    "DBusBaseError",
    "apply_signature",
    "signature_array",
]
