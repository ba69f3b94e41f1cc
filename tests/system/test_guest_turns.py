"""Two models take turns behind one endpoint: right answers, whole streams, memory given back."""

from __future__ import annotations

import pytest
from llmux_guest import LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("alpha", "beta", "count", "residue"),
    [
        ("offload+keep_running", "discard+keep_running", 200, ["context"]),
        ("offload+freeze", "discard+freeze", 200, ["context"]),
        ("retain+stop", "retain+stop", 24, []),
    ],
)
def test_alternating_requests(
    llmux: LlmuxGuest, alpha: str, beta: str, count: int, residue: list[str]
) -> None:
    llmux.begin({"alpha": model(alpha), "beta": model(beta)})
    report = llmux.load("turns", f"--count={count}", "--residue", *residue)
    print(f"{alpha} / {beta}: {report}")
    assert report["answers"] == count
    assert report["streams"] == count // 2
    assert report["wrong"] == []
