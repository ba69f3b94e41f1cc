"""What another program wrote is read in linear time, whatever is in it: a pattern that looks anew
from each place would not end within the time that any test has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmux.engines import ENGINE_TYPES
from llmux.engines.failures import root_cause
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.request_head import HeadReader
from llmux.printable import clean

SIZE = 500_000


def read_target(text: str) -> None:
    request = Incoming()
    request.target, request.headers = b"http://" + text.encode(), [(b"host", b"h")]
    request.read_head("1.1", HeadReader())


def read_cause(line: str) -> None:
    root_cause([line, "Traceback (most recent call last):", f"ValueError: {line}:", f"  {line}"])


READERS: dict[str, Callable[[str], object]] = {
    "shown": clean,
    "stage": ENGINE_TYPES["vllm"].stage,
    "cause": read_cause,
}
# Each begins one of the patterns again and again, and ends none.
PIECES = [
    "\x9d", "\x1b]", "\x1b[", "\x90a", "a", "9", " ", "- ", "a: ", "\\", "Error", "[type", "(pid=1",
    "oading x checkpoint shards:1", "oading x checkpoint shards: 5% Completed | ",
    "Capturing CUDA graph", "Capturing CUDA graph:|", "CUDA out of memor",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("reader", READERS)
def test_a_line_of_an_engine(reader: str, piece: str) -> None:
    READERS[reader]((piece * (SIZE // len(piece)))[:SIZE])


@pytest.mark.parametrize("piece", ["a", "a:", "%40"])
@pytest.mark.parametrize("end", ["", "@", "@h/", "/?@"])
def test_a_target_in_absolute_form(piece: str, end: str) -> None:
    read_target((piece * (SIZE // len(piece))) + end)
