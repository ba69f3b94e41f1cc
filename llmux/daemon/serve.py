"""``llmux serve``: supervisor and gateway in one process, with engines as its children."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable

from llmux.config.host import check_embedded
from llmux.config.load import load_config, load_marked
from llmux.config.schema import Config
from llmux.daemon.duties import environment, reload_on_hangup, stop_on_signals, until, warm
from llmux.daemon.gateway import Secrets, metrics_sockets
from llmux.daemon.supervisor import Supervisor
from llmux.drivers.engine.identity import engine_identity, portable_identity
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.engine.vllm import VllmEngine
from llmux.drivers.engine.weights import PageCache
from llmux.drivers.gpu import find_gpu_observer
from llmux.drivers.images.identity import model_files_are_here
from llmux.drivers.memory import available_bytes
from llmux.drivers.processes.children import DirectUnits
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.drivers.store import FileStateStore
from llmux.drivers.systemd.notify import SdNotifier
from llmux.errors import ConfigError, LlmuxError
from llmux.gateway.client.listeners import access_of, bind_all
from llmux.gateway.server import serve_gateway
from llmux.gateway.stopping import DrainLimits
from llmux.runtime.host import Drivers, Places
from llmux.runtime.watchdog import StatusLine

log = logging.getLogger("llmux")


async def serve(
    path: str,
    *,
    port: int | None = None,
    control: str | None = None,
    drivers: Callable[[Config, str], Drivers] | None = None,
) -> None:
    """Run supervisor and gateway in one process; the engines are children and end with it.

    ``port``: listen on 127.0.0.1 instead of the configured addresses. ``control``: path of the
    control socket, by default a new one. ``drivers`` makes others than those for children, from
    the configuration and the runtime directory; then every eviction is allowed.
    """
    marked = load_marked(path)
    config = marked.config
    problems = check_embedded(config, marked.marks) if drivers is None else ()
    if problems:
        raise ConfigError(problems)
    listen = [f"127.0.0.1:{port}"] if port is not None else list(config.listen_addresses())
    Secrets(config).check()
    sockets = bind_all(listen, access_of(config))
    stop = asyncio.Event()
    stop_on_signals(stop)
    runtime = tempfile.mkdtemp(prefix="llmux-", dir=os.environ.get("XDG_RUNTIME_DIR"))
    try:
        made = (drivers or embedded_drivers)(config, runtime)
        await _serve_in(runtime, path, config, made, sockets, stop, control)
    finally:
        for listener in sockets:
            listener.close()
        shutil.rmtree(runtime, ignore_errors=True)


async def _serve_in(
    runtime: str,
    path: str,
    config: Config,
    drivers: Drivers,
    sockets: list[socket.socket],
    stop: asyncio.Event,
    control: str | None,
) -> None:
    notifier = SdNotifier()
    supervisor = Supervisor(
        config,
        drivers,
        FileStateStore(f"{runtime}/state.json"),
        reload=lambda _: load_config(path),
    )
    await supervisor.start()
    try:
        await _open_control(supervisor, control, f"{runtime}/control.sock")
        ours, theirs = socket.socketpair()
        await supervisor.control_socket.join(ours)
        supervisor.loop.listeners.append(StatusLine(notifier))
        secrets = Secrets(config)
        reload: list[Callable[[], None]] = []
        reload_on_hangup(supervisor, notifier, reload)
        gateway_stop = asyncio.Event()
        front = asyncio.create_task(
            serve_gateway(
                config,
                link=theirs,
                sockets=sockets,
                metrics_sockets=metrics_sockets(config, bind_all),
                notifier=notifier,
                stop=gateway_stop,
                keys=secrets.keys,
                tls=secrets.tls,
                reload=reload,
                drain_limits=DrainLimits(waiters=False),  # the supervisor ends first
            )
        )
        try:
            await until(stop, supervisor.loop.run(), _ended_early(front), warm(supervisor, stop))
        finally:
            gateway_stop.set()
            await front
    finally:
        await supervisor.close()
        notifier.close()


def embedded_drivers(config: Config, runtime: str) -> Drivers:
    """The drivers for engines that are children of this process: none that needs systemd."""
    return Drivers(
        units=DirectUnits(),
        freezer=CgroupFreezer(),
        engine=VllmEngine(),
        output=EngineFiles(f"{runtime}/logs"),
        gpu=find_gpu_observer(),
        places=Places(runtime, None, config.vllm_command, environment()),
        identity=engine_identity,
        portable_identity=portable_identity,
        available_memory=available_bytes,
        files_are_here=model_files_are_here,
        weights=PageCache(),
    )


async def _open_control(supervisor: Supervisor, asked: str | None, usual: str) -> None:
    """Listen at ``asked``, else at ``usual``, which may fail without harm (a long $TMPDIR)."""
    path = asked or usual
    if asked is not None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(asked)
            raise LlmuxError(
                f"cannot listen at {asked}: another llmux does", hint="choose another --socket"
            )
    try:
        await supervisor.control_socket.listen(path, None)
    except OSError as error:
        if asked is not None:
            raise LlmuxError(f"cannot listen at {asked}: {error.strerror or error}") from error
        log.warning("no socket for other verbs at %s: %s (say --socket PATH)", path, error)
    else:
        log.info("other verbs reach this process with --socket %s", path)


async def _ended_early(task: asyncio.Task[None]) -> None:
    await asyncio.shield(task)
