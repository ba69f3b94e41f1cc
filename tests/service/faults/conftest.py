"""After every fault another model works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemon_harness import AT_ONCE, Daemon


@pytest.fixture(autouse=True)
def another_model_works_afterwards(daemon: Daemon) -> Iterator[None]:
    yield
    answer = daemon.chat("other")
    assert answer.status == 200, answer.body
    assert answer.text.startswith("other:")
    assert answer.seconds < AT_ONCE
    assert set(daemon.memory()) <= {"other", *daemon.models}
