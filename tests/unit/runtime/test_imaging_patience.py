"""How long a dump or a restore may take: by its size, and never longer than configured."""

from __future__ import annotations

import pytest

from llmux.runtime.engines.images import patience


@pytest.mark.parametrize(
    ("deadline", "size", "seconds"),
    [
        (900.0, 0, 60.0),
        (900.0, 5_000_000_000, 160.0),
        (900.0, 500_000_000_000, 900.0),
        (30.0, 5_000_000_000, 30.0),
    ],
)
def test_the_deadline_grows_with_the_size(deadline: float, size: int, seconds: float) -> None:
    assert patience(deadline, size) == seconds
