"""pytest plugin of `scripts/test`: which worker of pytest-xdist runs what, and what begins first.

One test at a time to each worker, so that none is left with the long ones. Tests of a folder that
read the whole tree go to one worker, which then parses it once; what takes longest begins first.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ONE_WORKER = "tests/repo/"
# The one worker's tests, and those that wait for seconds, whatever else runs.
FIRST = (ONE_WORKER, "tests/service/fuzz/")

# What a worker collects stays until the end: no search for garbage need look at it.
if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)  # after the shuffling
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


class Spread(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    def _split_scope(self, nodeid: str) -> str:
        return ONE_WORKER if nodeid.startswith(ONE_WORKER) else nodeid

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        super().mark_test_complete(node, item_index, duration)
        # Else it goes through all that is done, after each test.
        scope = self._split_scope(self.registered_collections[node][item_index])
        if all(self.assigned_work[node][scope].values()):
            del self.assigned_work[node][scope]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Spread:
    return Spread(config, log)
