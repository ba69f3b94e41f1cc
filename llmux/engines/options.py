"""Options inside a list of arguments, as argparse reads them. Pure.

``--name value`` and ``--name=value`` are the same, and so are a dash and an underscore within a
name; of a repeated option the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Options whose value is a secret.
SECRET_OPTION: Final = re.compile(r"^--?[\w-]*(api-?key|token|secret|password)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Option:
    """An option found in a list of arguments; ``value`` is None when nothing follows it."""

    index: int
    name: str
    value: str | None

    @property
    def number(self) -> int | None:
        """The value as a whole number; None when it is none."""
        return int(self.value) if self.value and self.value.isdecimal() else None


def split_option(argument: str) -> tuple[str, str | None]:
    """``--a_b=VALUE`` as (``--a-b``, value); the value is None when it is not in the same word."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return name, value if equals else None


def find_option(arguments: Sequence[str], names: Sequence[str]) -> Option | None:
    """The option's last occurrence, under any of its ``names``."""
    found: Option | None = None
    for index, argument in enumerate(arguments):
        name, value = split_option(argument)
        if name in names:
            following = arguments[index + 1] if index + 1 < len(arguments) else None
            found = Option(index, name, following if value is None else value)
    return found
