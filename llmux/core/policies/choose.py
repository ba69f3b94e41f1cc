"""The policies by name. A new one is a module beside this, a ``PolicyType`` and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from llmux.config.choices import PolicyType
from llmux.config.schema import PolicyConfig
from llmux.core.policies.base import Policy, PolicyOf
from llmux.core.policies.cost_aware import CostAware
from llmux.core.policies.fair import Fair
from llmux.core.policies.fifo import Fifo
from llmux.core.policies.time_slice import TimeSlice

POLICIES: Final[Mapping[PolicyType, PolicyOf]] = MappingProxyType(
    {
        PolicyType.FAIR: Fair,
        PolicyType.FIFO: Fifo,
        PolicyType.COST_AWARE: CostAware,
        PolicyType.TIME_SLICE: TimeSlice,
    }
)


def policy_for(config: PolicyConfig) -> Policy:
    return POLICIES[config.policy_type](config)
