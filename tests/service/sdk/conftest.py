"""One set of tests, two sorts of engines: ``front`` is the gateway with the stand-in behind it, and
at the level ``engine`` the real vLLM. ``standin`` is for what the stand-in alone can show."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from sdk_front import Front
from standin_front import StandinFront, standin_front

REAL = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def standin() -> Iterator[StandinFront]:
    with standin_front() as made:
        yield made


@pytest.fixture(scope="session")
def vllm() -> Iterator[Front]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a guest with its own PID 1")
    from vllm_front import vllm_front

    with vllm_front() as made:
        yield made


@pytest.fixture(scope="session", params=["standin", pytest.param("vllm", marks=REAL)])
def front(request: pytest.FixtureRequest) -> Front:
    made: Front = request.getfixturevalue(request.param)
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on vLLM last: its guest lives to the session's end, and others measure."""

    def is_real(item: pytest.Item) -> bool:
        spec = getattr(item, "callspec", None)
        return spec is not None and spec.params.get("front") == "vllm"

    items.sort(key=is_real)
