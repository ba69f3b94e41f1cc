"""Neither what is said on the control socket nor what engines answer ends or wedges a daemon.

Some seconds in `scripts/test fast`; $LLMUX_FUZZ_SECS for each form. The seed, which is printed,
gives every line and order ($LLMUX_FUZZ_SEED); what engines answer is at random.
"""

from __future__ import annotations

import os
import time

import pytest
from control_rig import Rig, control_rig

from tests.seeds import seed_of

pytestmark = pytest.mark.long

SECS = float(os.environ.get("LLMUX_FUZZ_SECS", "0"))
SHORT_SECS = 4.0
WARM_UP_SECS = 3.0 if SECS == 0 else min(20.0, SECS)
MAX_GROWTH = 16 << 20  # bytes, in a long run
MAX_MEMORY = 96 << 20  # bytes: a short run still fills what is kept for the last orders and lines


def fuzz(rig: Rig, share: float, **counts: int) -> None:
    rig.odd(share)
    rig.run(WARM_UP_SECS, **counts)
    rig.come_to_rest()
    memory, descriptors = rig.resident_bytes(), rig.descriptors()
    began = time.monotonic()
    rig.odd(share)
    rig.run(SECS or SHORT_SECS, **counts)
    seconds = time.monotonic() - began
    rest = rig.come_to_rest()
    memory_after, descriptors_after = rig.resident_bytes(), rig.descriptors()
    print(f"seed {rig.seed}: {seconds:.1f} s; {rig.lines} lines on {rig.connections} connections")
    print(f"answers {dict(sorted(rig.statuses.items()))}, the slowest {rig.slowest:.1f} s")
    odd = rig.odd_answers()
    routes = {word.split()[0] for word in odd}
    print(f"{odd.total()} odd answers on {len(routes)} routes: {dict(sorted(odd.items()))}")
    print(f"at rest after {rest:.1f} s; memory {memory >> 10} → {memory_after >> 10} KiB, "
          f"descriptors {descriptors.total()} → {descriptors_after.total()}")  # fmt: skip
    assert rig.wrong == []
    assert rig.daemon.alive
    # A connection that is kept, or just closed, is on one side or the other.
    assert descriptors_after.total() <= descriptors.total() + 2, (descriptors, descriptors_after)
    assert memory_after < MAX_MEMORY
    assert not SECS or memory_after - memory < MAX_GROWTH
    said = rig.daemon.log.since(0)
    for at, line in enumerate(said):
        assert "Traceback" not in line, "\n".join(said[max(0, at - 20) : at + 60])


@pytest.mark.timeout(SECS + 300)
@pytest.mark.parametrize("form", ["lines", "engines"])
def test_nothing_that_is_said_ends_or_wedges_the_daemon(form: str) -> None:
    seed = seed_of("LLMUX_FUZZ_SEED")
    with control_rig(seed) as rig:
        if form == "lines":
            fuzz(rig, 0.0, users=2, operators=1, peers=4)
        else:
            fuzz(rig, 0.12, users=3, operators=2, peers=0)
