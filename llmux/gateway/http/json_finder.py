"""Find the model's name in a JSON body that is fed piece by piece, without building its tree.

A body of 60 MiB as Python objects takes a gigabyte and stops the event loop for seconds. Here each
piece costs about a millisecond per 256 KiB as it is received, and no more than a key or the model's
name is held.

Only the top-level keys are parsed; what is nested is skipped by its brackets and quotes. Invalid
JSON may pass: the engine refuses it. The engine's parser (json.loads) takes the last of two equal
keys, and so does this one.
"""

from __future__ import annotations

import json
import re
from typing import Final

MAX_KEY: Final = 128  # bytes of "previous_response_id" with every letter escaped, and quotes
MAX_DEPTH: Final = 1000  # where the engine's parser gives up too
MAX_VALUE: Final = 4096  # bytes of a model's name as it is written

PREVIOUS: Final = b"previous_response_id"
_WANTED: Final = (b"model", b"stream", PREVIOUS)
_READ: Final = (None, *_WANTED)  # strings: the keys themselves, and the values of these
_SPACE: Final = b" \t\r\n"
_STRING_REST: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_TOP: Final = re.compile(rb'["{}\[\],:]')
_LEVELS: Final = 6  # of brackets that are skipped in C; a message with an image has four
# Texts that vLLM takes for true: it reads a request as pydantic does.
_TRUE_TEXTS: Final = frozenset(("1", "on", "t", "true", "y", "yes"))


def _filler(levels: int) -> bytes:
    """Skips strings, and brackets around no more than ``levels`` of them, in C."""
    string = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    filler = rb'(?:[^"{}\[\]]++|' + string + rb")*+"
    for _ in range(levels):
        filler = rb'(?:[^"{}\[\]]++|' + string + rb"|[\[{]" + filler + rb"[\]}])*+"
    return filler


# Then a run of the brackets that are left, or the quote of a string that is not complete.
_NESTED: Final = re.compile(_filler(_LEVELS) + rb'(?:([\[{]++)|([\]}]++)|(")|\Z)', re.DOTALL)
# Whole members that nobody looks for, each with its comma: a few turns of Python for each of half a
# million of them took seconds.
_OTHERS: Final = re.compile(
    rb'(?:[ \t\r\n]*+"(?!(?:' + b"|".join(_WANTED) + rb')")[^"\\]*+"[ \t\r\n]*+:'
    rb'(?:[^"{}\[\],:]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    rb"|[\[{]" + _filler(_LEVELS - 1) + rb"[\]}])*+,)*+",
    re.DOTALL,
)  # fmt: skip


def is_true(value: object) -> bool:
    """Of a member's parsed value, as vLLM reads a yes or no: true, 1, 1.0, "yes", "On", …"""
    if isinstance(value, str):
        return value.lower() in _TRUE_TEXTS
    return isinstance(value, (bool, int, float)) and value == 1


class JsonError(Exception):
    """The body is no JSON object; the text says why."""


class JsonFinder:
    """``model``: the value of the last top-level "model", None if it is absent or no string;
    ``span``: that value's offsets, quotes included. ``stream``: whether vLLM takes
    "stream" for true.
    ``previous``: the response that this one continues.

    ``wrong``: what a "model" that is no string is, for the error message.
    """

    def __init__(self) -> None:
        self.model: str | None = None
        self.wrong = "missing"
        self.span = (0, 0)
        self.stream = False
        self.previous: str | None = None
        self._at = 0  # offset of the piece being read
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the piece before ended in a backslash
        self._begun = False
        self._ended = False
        self._end = 0  # offset of the object's closing bracket
        self._has_members = False
        self._key: bytes | None = None  # the current member's key, once its colon was read
        self._capture: bytearray | None = None  # the string or literal being read at the top level
        self._began = 0  # offset of that string
        self._string: bytes | None = None  # the last complete top-level string, with its quotes

    def feed(self, data: bytes) -> None:
        """Raises JsonError."""
        at = 0
        if not self._begun:
            at = self._begin(data)
        end = len(data)
        while at < end:
            if self._in_string:
                at = self._read_string(data, at)
            elif self._depth > 1:
                at = self._skip_nested(data, at)
            elif self._depth == 1:
                at = self._read_top(data, at)
            else:
                if data[at:].strip(_SPACE):
                    raise JsonError("extra data after the object")
                at = end
        self._at += end

    def close(self) -> None:
        """Call after the last piece. Raises JsonError."""
        if not self._ended:
            raise JsonError("the object is not complete")

    def naming(self, model: str) -> tuple[int, int, bytes]:
        """(start, end, replacement): the change after which ``model`` is the one named. Where no
        string is, as the last member: it counts. Call after ``close``."""
        name = json.dumps(model).encode()
        if self.model is not None:
            return *self.span, name
        comma = b", " if self._has_members else b""
        return self._end, self._end, b'%b"model": %b' % (comma, name)

    def _begin(self, data: bytes) -> int:
        start = len(data) - len(data.lstrip(_SPACE))
        if start == len(data):
            return start
        if data[start] != 0x7B or data[start + 1 : start + 2] == b"\0":
            raise JsonError("expected a JSON object in UTF-8")
        self._begun = True
        self._depth = 1
        return _after_others(data, start + 1)

    # ---- strings --------------------------------------------------------------------------------

    def _read_string(self, data: bytes, at: int) -> int:
        start = at
        if self._escaped:
            self._escaped = False
            at += 1
        found = _STRING_REST.match(data, at)
        assert found is not None, "the pattern matches the empty string"
        at = found.end()
        if at == len(data):
            self._take(data, start, at)
            return at
        if data[at] == 0x5C:  # a backslash that ends the piece
            self._escaped = True
            self._take(data, start, at + 1)
            return at + 1
        self._in_string = False
        self._take(data, start, at + 1)
        if self._depth == 1 and self._capture is not None:
            self._string = bytes(self._capture)
            self._capture = None
            if self._key is not None:
                self._end_string(self._at + at + 1)
        return at + 1

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._capture is not None:
            room = MAX_VALUE + 1 - len(self._capture)
            self._capture += data[start : min(end, start + room)]

    def _end_string(self, end: int) -> None:
        """A top-level member's value is a string."""
        text, self._string = self._string or b"", None
        if self._key == b"model":
            if len(text) > MAX_VALUE:
                raise JsonError('"model" is too long')
            value = _decode(text)
            self.model, self.wrong = (value, "") if value else (None, "empty")
            self.span = (self._began, end)
        elif self._key == b"stream":
            self.stream = is_true(_decode(text) if len(text) <= MAX_KEY else None)
        elif self._key == PREVIOUS:
            self.previous = _decode(text) if len(text) <= MAX_VALUE else "too long"

    # ---- members --------------------------------------------------------------------------------

    def _read_top(self, data: bytes, at: int) -> int:
        found = _TOP.search(data, at)
        if found is None:
            self._take(data, at, len(data))
            return len(data)
        stop = found.start()
        self._take(data, at, stop)
        token = data[stop]
        if token == 0x22:  # a quote
            self._in_string = True
            self._began = self._at + stop
            self._capture = bytearray(b'"') if self._key in _READ else None
        elif token == 0x3A:  # a colon
            self._key = self._end_key()
            self._has_members = True
            self._capture = bytearray() if self._key in _WANTED else None
        elif token == 0x2C:  # a comma
            self._end_member()
            return _after_others(data, stop + 1)
        elif token in (0x7B, 0x5B):
            self._end_literal(nested=True)
            self._depth = 2
        else:  # a closing bracket
            self._end_member()
            self._depth = 0
            self._ended = True
            self._end = self._at + stop
        return stop + 1

    def _end_key(self) -> bytes:
        """The key's name if it is one that is looked for, else another that is not."""
        text, self._string = self._string, None
        if text is None or len(text) > MAX_KEY:
            return b""
        return (_decode(text) or "").encode("utf-8", "surrogatepass")

    def _end_member(self) -> None:
        self._end_literal()
        self._key = self._string = self._capture = None

    def _end_literal(self, *, nested: bool = False) -> None:
        """A member's value is no string: a literal, a number, or an array or object."""
        text, self._capture = self._capture, None
        if text is None or (not nested and not text.strip(_SPACE)):
            return
        if self._key == b"model":
            null = not nested and bytes(text).strip(_SPACE) == b"null"
            self.model, self.wrong = None, "missing" if null else "not a string"
        elif self._key == PREVIOUS:
            self.previous = None  # the last of two equal keys counts
        elif self._key == b"stream":
            self.stream = not nested and is_true(_literal(bytes(text)))

    def _skip_nested(self, data: bytes, at: int) -> int:
        """Up to the end of the nested value, of this piece, or of the next string's beginning."""
        while at < len(data):
            found = _NESTED.match(data, at)
            assert found is not None, "the pattern matches at every offset"
            at = found.end()
            if found[1]:
                self._depth += len(found[1])
                if self._depth > MAX_DEPTH:
                    raise JsonError("nested too deeply")
            elif found[2]:
                closed = min(len(found[2]), self._depth - 1)
                self._depth -= closed
                if self._depth == 1:
                    return found.start(2) + closed
            elif found[3]:
                self._in_string = True
                return at
        return at


def _after_others(data: bytes, at: int) -> int:
    found = _OTHERS.match(data, at)
    assert found is not None, "the pattern matches the empty string"
    return found.end()


def _literal(text: bytes) -> object:
    """What a number or a word stands for; None for what is neither, or as long as no yes or no."""
    try:
        return json.loads(text) if len(text) <= MAX_KEY else None
    except ValueError:
        return None


def _decode(text: bytes) -> str | None:
    """The value of a JSON string; None if it is not valid."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
