"""The same package on Debian 12: systemd 252, Python 3.11 and the libraries of its time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from llmux_guest import Guest, LlmuxGuest, model

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a guest with its own PID 1"),
    pytest.mark.timeout(600),  # the first run builds the image
]


@pytest.fixture(scope="module")
def bookworm(package: str) -> Iterator[LlmuxGuest]:
    with Guest.up(suite="bookworm", debs=[package]) as guest:
        yield LlmuxGuest(guest)


def test_turns_and_a_kill_of_each_process(bookworm: LlmuxGuest) -> None:
    assert "12" in bookworm.run(["cat", "/etc/debian_version"]).stdout
    bookworm.begin({"alpha": model("offload+keep_running"), "beta": model("discard+freeze")})
    turns = bookworm.load("turns", "--count=20")
    print(f"turns: {turns}")
    assert turns["wrong"] == []
    storm = bookworm.load(
        "kills/storm", "--seed=12", "kill supervisor", "kill gateway", "kill both"
    )
    print(f"storm: {storm}")
    assert (storm["failed"], storm["wrong"], storm["stuck"]) == ([], [], 0)
    assert storm["refused_connections"] == 0
    assert bookworm.load("lifecycle", "slice")["left"] == []
