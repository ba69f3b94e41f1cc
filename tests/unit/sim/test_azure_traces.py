"""Azure's public traces, as `bench policy --azure` reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from _bench.policies.azure import DECODE, PREFILL, AzureError, azure

HEADING = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_each_file_is_a_model_and_each_window_a_trace(tmp_path: Path) -> None:
    code = written(
        tmp_path,
        "code.csv",
        HEADING + "2023-11-16 18:15:46.6805900,4808,10\n2023-11-16 18:45:50.0000000,80,400\n",
    )
    chat = written(tmp_path, "conv.csv", HEADING + "2023-11-16 18:15:56.6805900+00:00,8000,0\n")
    workload = azure([code, chat])
    assert workload.models == 2
    first, second = workload.trace()
    assert (first.at, first.model, first.service) == (0.0, "m0", 4808 / PREFILL + 10 / DECODE)
    assert (round(second.at, 3), second.model, second.service) == (10.0, "m1", 1.0)
    (later,) = workload.trace(1)
    assert (round(later.at, 1), later.model) == (603.3, "m0")
    with pytest.raises(
        AzureError, match="no window 3: the files have 1803 s; next step: --seeds 2"
    ):
        workload.trace(2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        (HEADING, "no request in it"),
        (HEADING + "yesterday,1,1\n", ":2: Invalid isoformat string"),
        (HEADING + "2023-11-16 18:15:46,1,-1\n", ":2: 1 and -1 are no numbers of tokens"),
        (HEADING + "2023-11-16 18:15:46,nan,1\n", ":2: nan and 1 are no numbers of tokens"),
        (HEADING + "2023-11-16 18:15:46,1\n", ":2: float"),
    ],
)
def test_what_is_no_such_trace_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, "odd.csv", text)
    with pytest.raises(AzureError, match=r"odd\.csv") as caught:
        azure([path])
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AzureError, match=r"none\.csv: cannot be read: "):
        azure([tmp_path / "none.csv"])
