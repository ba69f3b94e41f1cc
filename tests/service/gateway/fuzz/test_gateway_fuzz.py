"""Raw HTTP against a gateway process: whatever is sent, only what was clearly asked for arrives.

A number of cases in `scripts/test fast`; $LLMUX_FUZZ_SECS runs each form for so many seconds. Every
case follows from the seed, which is printed; $LLMUX_FUZZ_SEED repeats one.
"""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from fuzz_rig import Rig, fuzz_rig
from gateway_harness import run_in_uvloop

from tests.seeds import seed_of

CASES = 500
WARM_UP = 150  # cases before anything is measured: code is loaded, buffers have their size
SECS = float(os.environ.get("LLMUX_FUZZ_SECS", "0"))
MAX_GROWTH = 16 << 20  # bytes: what a short run still fills; a long one is held to the same


async def fuzz(rig: Rig) -> None:
    await rig.fuzz(cases=WARM_UP)
    await rig.gauges()
    memory, descriptors = rig.resident_bytes(), rig.descriptors()
    began = time.monotonic()
    tricklers = [asyncio.create_task(rig.trickle()) for _ in range(20 if SECS > 90 else 0)]
    await rig.fuzz(cases=0 if SECS else CASES, seconds=SECS)
    seconds = time.monotonic() - began
    assert all(trickler.done() and trickler.result() < 65 for trickler in tricklers)
    gauges = await rig.gauges()
    memory_after, descriptors_after = rig.resident_bytes(), rig.descriptors()
    found = rig.findings
    print(f"seed {rig.seed}: {found.connections} connections in {seconds:.1f} s")
    print(f"{found.sent_bytes >> 20} MiB sent, {found.reached} requests reached engines, "
          f"{found.unclear} got an unclear answer")  # fmt: skip
    print(f"kinds {dict(sorted(found.cases.items()))}")
    print(f"answers by status {dict(sorted(found.statuses.items()))}")
    print(f"memory {memory >> 10} → {memory_after >> 10} KiB, "
          f"descriptors {descriptors} → {descriptors_after}, {gauges}")  # fmt: skip
    assert found.wrong == [], "\n\n".join(found.wrong)
    assert rig.process.poll() is None, "the gateway has ended"
    assert gauges == {
        "llmux_in_flight": 0, "llmux_queue_depth": 0, "llmux_gateway_connections": 1,
    }  # fmt: skip
    assert descriptors_after == descriptors
    assert memory_after - memory < MAX_GROWTH
    said = [line for line in rig.stderr if "Traceback" in line or "rror" in line]
    assert said == [], "\n".join(rig.stderr[-50:])
    assert found.reached > found.connections / 2, "most of it must be worth fuzzing"


@pytest.mark.timeout(SECS + 60)
@pytest.mark.parametrize("keys", [False, True], ids=["open", "keys"])
def test_only_what_was_clearly_asked_for_reaches_an_engine_and_nothing_is_left(keys: bool) -> None:
    seed = seed_of("LLMUX_FUZZ_SEED")

    async def body() -> None:
        async with asyncio.timeout(SECS + 50), fuzz_rig(seed, keys=keys) as rig:
            await fuzz(rig)

    run_in_uvloop(body())
