"""For all tests: Hypothesis does not measure time, since a busy machine is no counterexample; and a
test that sets up the product's logging leaves none of it to the next."""

import gc
import logging
import os
from collections.abc import Iterator

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # in a guest, into which only pytest is carried
else:
    settings.register_profile(
        "llmux",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
        derandomize=bool(os.environ.get("LLMUX_SEED")),  # see seeds.py
        database=None if os.environ.get("LLMUX_SEED") else settings.default.database,
    )
    settings.load_profile("llmux")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("llmux")
    levels = root.level, own.level
    before = set(root.handlers)
    yield
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    for handler in set(root.handlers) - before:
        if not type(handler).__module__.startswith("_pytest."):  # pytest's change with each phase
            root.removeHandler(handler)


@pytest.fixture
def no_descriptor_left_open() -> Iterator[None]:
    """What a test calls has closed what it opened: a supervisor lives for months."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    if len(os.listdir("/proc/self/fd")) > before:
        gc.collect()  # such as an event loop's, of a test that failed
        assert len(os.listdir("/proc/self/fd")) <= before
