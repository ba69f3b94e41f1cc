"""Report a failed suspend or resume: cause, advice, and what became of the processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from llmux.drivers.cuda.calls import ADVICE, Code, CudaCallError, CudaCallTimeout, names
from llmux.errors import Blame, CheckpointFailed, DriverTimeout, TreeState

Failure = CudaCallError | CudaCallTimeout


def raise_failure(
    verb: str,
    operation: str,
    pids: Sequence[int],
    errors: Sequence[Failure],
    lines: Sequence[str],
    tree: TreeState = TreeState.BROKEN,
) -> NoReturn:
    text = "; ".join([*(str(error) for error in errors), *lines])
    late = [error.pid for error in errors if isinstance(error, CudaCallTimeout)]
    if late:
        raise DriverTimeout(
            verb,
            names(pids),
            f"{text}; the outcome of {operation} for {names(late)} is unknown",
            hint="the call must not be interrupted: kill the model, not the helper",
            pids=late,
        )
    codes = [error.code or 0 for error in errors if isinstance(error, CudaCallError)]
    advice = next((ADVICE[code] for code in codes if code in ADVICE), None)
    if any("died in the call" in line for line in lines):
        advice = "see `journalctl -k` for the crash; a newer NVIDIA driver may not have it"
    raise CheckpointFailed(
        verb,
        names(pids),
        text,
        hint=advice,
        tree=tree,
        blame=Blame.HOST if Code.OUT_OF_MEMORY in codes else Blame.ENGINE,
        pids=[error.pid for error in errors],
    )
