"""What cannot be parked by suspending: NCCL's connections do not survive it."""

from __future__ import annotations

import pytest

from llmux.engines.parking import SUSPENDING, Eviction, Process, Weights, parking_obstacle


@pytest.mark.parametrize("process", list(Process))
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("allow", [False, True])
def test_only_several_ranks_without_leave_cannot_be_suspended(
    process: Process, ranks: int, allow: bool
) -> None:
    found = parking_obstacle(
        Eviction(Weights.OFFLOAD, process), engine="vLLM", ranks=ranks, allow_parallel=allow
    )
    assert (found is not None) is (process in SUSPENDING and ranks > 1 and not allow)
    if found is not None:
        assert f"{process} with a model on {ranks} GPUs" in found.message
        assert "allow_tensor_parallel_parking: true" in found.hint


def test_what_suspends() -> None:
    assert {Process.CUDA_SUSPEND, Process.CHECKPOINT} == SUSPENDING
