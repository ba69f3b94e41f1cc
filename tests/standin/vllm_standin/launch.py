"""Start-up of the tree: bind, make the kernel objects, fork tracker and core, then serve.

The core is forked before asyncio is imported: it needs none of it, and loads its weights while the
API server imports.
"""

from __future__ import annotations

import os
import socket
import sys

from .core import run_core
from .faults import Faults, UnknownFaultError
from .kernel_objects import KernelObjects, fork_resource_tracker
from .options import Options, UsageError, parse
from .process import log, set_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


class Tree:
    """The children of the API server and what ties them to it."""

    def __init__(
        self,
        core_pid: int,
        core: socket.socket,
        tracker_pid: int,
        tracker: int,
        objects: KernelObjects,
    ) -> None:
        self.core_pid = core_pid
        self.core = core
        self.tracker_pid = tracker_pid
        self.tracker = tracker
        self.objects = objects  # held, or this process would unmap them


def main(argv: list[str]) -> NoReturn:
    try:
        options = parse(argv)
        faults = Faults(options.faults, options.fault)
    except (UsageError, UnknownFaultError) as error:
        print(f"standin: error: {error}", file=sys.stderr)
        sys.exit(2)
    log("APIServer", f"vLLM API server version 0.32.0+standin, model {options.model}")
    try:
        listener = _bind(options)
    except OSError:
        # before the engine, as vLLM: a port in use costs no load
        _print_traceback()
        sys.exit(1)
    tree = _fork_tree(options, faults, listener)
    # asyncio serves without ssl when there is none, and importing it costs a tenth of the start-up
    sys.modules["ssl"] = None  # type: ignore[assignment]  # the documented way to forbid an import
    from .api.server import serve

    sys.exit(serve(options, faults, listener, tree))


def _bind(options: Options) -> socket.socket:
    """Bound, not yet listening: until the engine is ready, connecting is refused."""
    if options.uds is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # a stale socket file is an error, as it is for vLLM: the starter removes it
        listener.bind(options.uds)
        return listener
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((options.host, options.port))
    return listener


def _fork_tree(options: Options, faults: Faults, listener: socket.socket) -> Tree:
    objects = KernelObjects()
    tracker_pid, tracker = fork_resource_tracker(objects, [listener.fileno()])
    ours, theirs = socket.socketpair()
    core_pid = os.fork()
    if core_pid == 0:
        # an inherited listener would keep the port, and an inherited pipe the tracker, alive
        listener.close()
        ours.close()
        os.close(tracker)
        try:
            run_core(options, faults, objects, theirs)
        except BaseException:  # noqa: BLE001  # a forked child must never return into its parent's code
            _print_traceback()
        os._exit(1)
    theirs.close()
    set_name("vllm")
    return Tree(core_pid, ours, tracker_pid, tracker, objects)


def _print_traceback() -> None:
    import traceback  # ten milliseconds that only the unlucky pay

    traceback.print_exc()
