"""The composition root: the only package that knows all others. Builds the three ways to run llmux.

``supervise``: llmux.service, root. ``gateway``: llmux-gateway.service. ``serve``: both in one
process on plain child processes, for laptops, demos and tests.
"""

from llmux.daemon.embedded import serve
from llmux.daemon.front import gateway
from llmux.daemon.process import run, setup_logging
from llmux.daemon.system import look_at_host, order, supervise

__all__ = [
    "gateway",
    "look_at_host",
    "order",
    "run",
    "serve",
    "setup_logging",
    "supervise",
]
