"""Who waits. What was found at the last decision is taken again for every model of which nothing
has changed since, so that hundreds that wait cost little."""

from __future__ import annotations

from llmux.core.demand.usage import UNUSED
from llmux.core.demand.workers import NO_DEMAND
from llmux.core.policies.base import Waiting
from llmux.core.records import Serving, Waiter, coming
from llmux.core.transaction import Transaction
from llmux.errors import Reason

MANUAL_RETRY_SECS = 30.0  # an operator acts at some time; OpenAI's SDKs heed up to a minute


def find_waiting(tx: Transaction) -> dict[str, Waiting]:
    """Models that requests or operators wait for, but for those that manual mode refuses."""
    models, demands, usages, wants, former = tx.models, tx.demands, tx.usage, tx.wants, tx.waiters
    wanted = {name for name, demand in demands.items() if demand.waiting} | wants.keys()
    found: dict[str, Waiter] = {}
    for name in sorted(wanted & models.keys()):
        record = models[name]
        if tx.manual and name not in wants and name != tx.pinned:
            if not record.removed and not isinstance(record.phase, Serving):
                _refuse(tx, name)
            continue
        demand, usage = demands.get(name, NO_DEMAND), usages.get(name, UNUSED)
        known = former.get(name)
        if (
            known is not None
            and known.record is record
            and known.demand is demand
            and known.usage is usage
            and known.wanted == wants.get(name)
        ):
            found[name] = known
        elif not record.removed and (oldest := tx.oldest_since(name)) is not None:
            waiting = Waiting(
                name,
                demand.waiting,
                oldest,
                tx.cost(name, coming(tx.way_back(name))),
                usage,
                tx.config.gateway.max_in_flight,
                record.config.priority,
                record.phase.since,
            )
            found[name] = Waiter(record, demand, usage, wants.get(name), waiting)
    tx.waiters = found
    return {name: waiter.waiting for name, waiter in found.items()}


def _refuse(tx: Transaction, name: str) -> None:
    tx.refuse(
        name,
        Reason.MANUAL_MODE,
        f'model "{name}" is not resident and llmux is in manual mode',
        MANUAL_RETRY_SECS,
    )
