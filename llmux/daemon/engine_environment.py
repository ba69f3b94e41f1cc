"""Build the environment that engines in systemd scopes start from.

It is built from a fixed list and never inherited: an image made by ``llmux --checkpoint`` from any
shell must fit the engine that the service starts. ``llmux serve`` makes no images; its engines
inherit its environment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Final

from llmux.errors import DriverError

log = logging.getLogger("llmux")

SERVICE: Final = "llmux.service"
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CUDA_HOME: Final = "/usr/local/cuda"


def built_environment(unit: Mapping[str, str], cuda_home: str = CUDA_HOME) -> dict[str, str]:
    """``unit``: what the unit's ``Environment=`` sets, which has the last word."""
    built = {"PATH": PATH, "LANG": "C.UTF-8"}
    if os.path.isdir(cuda_home):  # compilers of kernels look there
        built["CUDA_HOME"] = cuda_home
        built["PATH"] = f"{PATH}:{cuda_home}/bin"
    return built | dict(unit)


def engine_environment() -> dict[str, str]:
    """The environment for engines of the service, also for a command that runs without it."""
    from llmux.drivers.systemd.bus import service_environment  # pystemd is imported late

    try:
        return built_environment(service_environment(SERVICE))
    except DriverError as error:
        log.warning("%s; engines start without the variables of %s", error, SERVICE)
        return built_environment({})
