"""A model's name as part of a unit's name and as the name of a directory, and back.

What is no letter, digit, ``:``, ``_``, ``.`` or ``-`` becomes ``\\xNN`` for each byte, as
systemd-escape does, so that a name with slashes is one directory; unlike there a dash stays a dash.
Different names stay different. Imports nothing of llmux.
"""

from __future__ import annotations

import os
import re
from typing import Final

_PLAIN: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.-")
_ESCAPED: Final = re.compile(rb"\\x([0-9a-f]{2})")


def escape(name: str) -> str:
    """``Qwen\\x2fQwen3-8B`` for ``Qwen/Qwen3-8B``; never hidden, nor ``.`` or ``..``."""
    return "".join(
        chr(byte) if byte in _PLAIN and (place or byte != 0x2E) else f"\\x{byte:02x}"
        for place, byte in enumerate(os.fsencode(name))
    )


def unescape(text: str) -> str:
    """The inverse of ``escape``; what ``escape`` did not write is taken as it is."""
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), os.fsencode(text)))


def identifier(model: str) -> str:
    """Under which the journal has the output of the model's engine."""
    return f"vllm:{model}"
