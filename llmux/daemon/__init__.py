"""The composition root: the only package that knows all others. Builds the three ways to run llmux.

``supervise``: llmux.service, root. ``gateway``: llmux-gateway.service. ``serve``: both in one
process on plain child processes, for laptops, demos and tests.
"""

from llmux.daemon.gateway import gateway
from llmux.daemon.process import credentials_directory, run, setup_logging
from llmux.daemon.serve import serve
from llmux.daemon.supervise import look_at_host, order, supervise
from llmux.daemon.supervisor import reload_needs

__all__ = [
    "credentials_directory",
    "gateway",
    "look_at_host",
    "order",
    "reload_needs",
    "run",
    "serve",
    "setup_logging",
    "supervise",
]
