"""Find the root cause of an engine's death in the output of a Python program. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

LONGEST: Final = 300  # characters of a cause

# "(EngineCore_DP0 pid=7) ERROR 11-21 20:41:07 [core.py:700] ", each part optional.
_PREFIX: Final = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s?)*"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL):?\s+"
    r"(?:\d\d-\d\d \d\d:\d\d:\d\d )?(?:\[[^\]]*\] ?)?)?"
)
_TRACEBACK: Final = "Traceback (most recent call last):"
# "torch.OutOfMemoryError: CUDA out of memory. …", "ValueError", "ExceptionGroup: …"
_EXCEPTION: Final = re.compile(
    r"^(?P<name>[A-Za-z_][\w.]*(?:Error|Exception|ExceptionGroup|NotFound|Interrupt|Exit|Timeout))"
    r"(?:: (?P<text>.*))?$"
)
# They say that another process has failed, or that this one was told to end.
_CONSEQUENCES: Final = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineDeadError",
    "Executor failed",
    "SystemExit",
    "KeyboardInterrupt",
    "CancelledError",
)
_IGNORED_LEVELS: Final = frozenset({"DEBUG", "INFO", "WARNING"})  # a traceback that was handled
# Without a traceback: the first line that one of these finds; the first group is the cause.
_LINES: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"((?:torch\.)?(?:cuda\.)?OutOfMemoryError: .*|^.*CUDA out of memory.*)",
        r"^[\w./ -]*: error: (.*)$",  # argparse
        r"^((?:[\w./-]+: )+(?:No such file or directory|Permission denied|command not found).*)$",
        r"^([A-Za-z_][\w.]*(?:Error|Exception): .*)$",
        r"^(terminate called .*|Segmentation fault.*|Fatal Python error: .*|Bus error.*)$",
        r"^(Killed)$",
    )
)


def root_cause(lines: Sequence[str]) -> str | None:
    """The first exception of the first traceback, or another line that names a cause; None when
    there is none. One line."""
    stripped = [_split(line) for line in lines]
    for cause in _tracebacks(stripped):
        if not any(word in cause for word in _CONSEQUENCES):
            return _short(cause)
    for pattern in _LINES:
        for level, text in stripped:
            found = pattern.search(text)
            if found and level not in _IGNORED_LEVELS:
                cause = found.group(1)
                if not any(word in cause for word in _CONSEQUENCES):
                    return _short(cause)
    return None


def _split(line: str) -> tuple[str | None, str]:
    """(level, text) of a line of a log; the text keeps its indentation."""
    match = _PREFIX.match(line)
    assert match is not None  # every part is optional
    return match["level"], line[match.end() :]


def _tracebacks(lines: Sequence[tuple[str | None, str]]) -> Iterator[str]:
    """The exception that ends each traceback, in order."""
    inside = False
    for index, (level, text) in enumerate(lines):
        if text.strip() == _TRACEBACK:
            inside = level not in _IGNORED_LEVELS
        elif inside and (match := _EXCEPTION.match(text)):
            inside = False
            rest = [following for _, following in lines[index + 1 : index + 4]]
            yield _with_details(match, rest)


def _with_details(match: re.Match[str], following: Sequence[str]) -> str:
    """Pydantic and a few others name the cause in the next line."""
    cause = match.group(0)
    text = match["text"] or ""
    if following and ("validation error" in text or not text or text.endswith(":")):
        detail = next((line.strip() for line in following if line.startswith("  ")), "")
        detail = detail.partition("[type=")[0].rstrip().removeprefix("Value error, ")
        cause = f"{cause.rstrip(':')}: {detail}" if detail else cause
    return cause


def _short(cause: str) -> str:
    one_line = " ".join(cause.split())
    return one_line if len(one_line) <= LONGEST else f"{one_line[: LONGEST - 1]}…"
