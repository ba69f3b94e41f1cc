"""Text that another program wrote, made safe for a terminal, a journal and JSON.

Engines' output, their answers and names in them may hold escape sequences. What a terminal would
obey is removed: control characters of both sets, and characters that turn the direction of what
follows. Imports nothing of llmux.
"""

from __future__ import annotations

import re
from typing import Any, Final

# CSI and OSC sequences, begun by ESC or by their own control character; other escapes of two
# characters; control characters but tab; surrogates; directions of the Unicode bidi algorithm. An
# OSC sequence ends where another begins: else many without an end cost quadratic time.
_ESCAPES: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[@-Z\\-_]"
    r"|[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def clean(line: str) -> str:
    """One line: no escape sequences, and only the last state of a progress bar."""
    shown = line.rstrip("\r").rpartition("\r")[2]
    return _ESCAPES.sub("", shown).rstrip()


def printable(text: str) -> str:
    """Any text; its line breaks stay."""
    return "\n".join(_ESCAPES.sub("", line) for line in text.split("\n"))


def printable_tree(value: Any) -> Any:
    """A parsed JSON value, with every string in it printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): printable_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable_tree(item) for item in value]
    return value
