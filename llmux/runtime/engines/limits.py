"""A model's ``limits`` as properties of its engine's unit, in systemd's names and types."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from llmux.config.schema import LOCALHOST, Limits

_WHOLE: Final = 2**32 - 1  # of the host's memory, in MemoryMaxScale
ANY: Final = ("0.0.0.0/0", "::/0")

Address = tuple[int, list[int], int]  # family, bytes, length of the prefix


def unit_properties(limits: Limits) -> Mapping[str, Any]:
    properties: dict[str, Any] = {"TasksMax": limits.tasks_max}
    if limits.memory_max is None:
        properties["MemoryMaxScale"] = int(limits.memory_max_share * _WHOLE)
    else:
        properties["MemoryMax"] = limits.memory_max
    deny = limits.ip_address_deny or (ANY if limits.ip_address_allow else ())
    if deny:
        properties["IPAddressDeny"] = list(_addresses(deny))
        # An engine's processes talk to each other over the loopback.
        properties["IPAddressAllow"] = list(_addresses((*LOCALHOST, *limits.ip_address_allow)))
    return properties


def _addresses(networks: Iterable[str]) -> Iterator[Address]:
    for text in networks:
        network = ipaddress.ip_network(text)
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        yield int(family), list(network.network_address.packed), network.prefixlen
