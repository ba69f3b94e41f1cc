"""What becomes due as time passes: operations that hang, kills to repeat, models that are idle or
whose engine is silent."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace

from llmux.core.ladder import may_choose, rung_for
from llmux.core.operations import drain, fail, stop
from llmux.core.records import (
    Draining,
    Failed,
    Parking,
    Serving,
    Starting,
    Stopping,
    Waking,
    frees_memory,
)
from llmux.core.transaction import Transaction


def end_overdue(tx: Transaction) -> None:
    """An operation always ends: by its own deadlines, and else by this one. Its engine is presumed
    to hold its GPU until a kill was seen to work."""
    for name, record in tx.at(Starting, Parking, Waking, Stopping):
        if tx.now < record.overdue_at:
            tx.wake_at(record.overdue_at)
            continue
        seconds = tx.now - record.phase.since
        tx.put(replace(record, failures=record.failures + 1))
        fail(tx, name, f"its operation has not ended after {seconds:.0f} s", held=True)


def retry_kills(tx: Transaction) -> None:
    """An engine that could not be killed keeps its GPU: try again."""
    for name, record in tx.at(Failed):
        phase = record.phase
        assert isinstance(phase, Failed)
        if phase.held:
            if tx.now >= phase.until:
                stop(tx, name, f"ended at a further try, after: {phase.message}", grace=False)
            else:
                tx.wake_at(phase.until)


def park_idle(tx: Transaction, waiting: Container[str]) -> None:
    """Models that were not used for their idle timeout leave although no model needs the room."""
    if tx.manual:
        return
    unused: dict[str, float] = {}
    for name, record in tx.at(Serving):
        limit = record.keep_alive
        if limit is None:
            limit = tx.config.idle_timeout(record.config) or math.inf
        if limit == math.inf:
            continue
        if tx.demand(name).in_flight or tx.is_kept(name) or name in waiting:
            continue
        if not frees_memory(record.config, record.eviction):
            continue
        due = max(record.last_active, record.phase.since) + limit
        if tx.now >= due:
            unused[name] = limit
        else:
            tx.wake_at(due)
    for name in sorted(unused, key=lambda one: may_choose(tx, one)):
        eviction = rung_for(tx, name, tx.models[name].eviction)
        drain(tx, name, eviction, None, reason=f"not used for {unused[name]:g} s")


def watch_for_stalls(tx: Transaction) -> None:
    """Look for signs of life of a busy engine that sent no byte for half its stall timeout."""
    for name, record in tx.at(Serving, Draining):
        if record.probing or not tx.demand(name).in_flight:
            continue
        limit = record.config.stall_timeout_secs
        if not limit:
            continue
        due = record.progress_at + limit / 2
        if tx.now >= due:
            tx.suspect(name, stalled=True)
        else:
            tx.wake_at(due)
