"""The composition root: the only module that knows all others. Builds the three ways to run llmux.

``supervise``: llmux.service, root. ``gateway``: llmux-gateway.service. ``serve``: both in one
process on plain child processes, for laptops, demos and tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import grp
import logging
import os
import pwd
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from time import monotonic, time
from types import MappingProxyType
from typing import Any

from llmux import __version__
from llmux.config.check import check_embedded, check_host
from llmux.config.diff import diff_config
from llmux.config.keyfile import load_keys, resolve_secret
from llmux.config.lastgood import LastGood
from llmux.config.load import load_config, load_marked
from llmux.config.schema import Config, Key
from llmux.core.effects import SwitchFinished
from llmux.core.events import ConfigChanged
from llmux.core.records import State
from llmux.drivers import journald
from llmux.drivers.criu import Criu
from llmux.drivers.cuda import CudaDriver
from llmux.drivers.cuda_cli import CudaCheckpointTool
from llmux.drivers.direct import DirectUnits
from llmux.drivers.doctor import Check, run_checks
from llmux.drivers.engine import VllmEngine
from llmux.drivers.freezer import CgroupFreezer
from llmux.drivers.gpu import find_gpu_observer
from llmux.drivers.identity import engine_identity
from llmux.drivers.images import ImageStore
from llmux.drivers.notify import SdNotifier, listen_fds, watchdog_interval
from llmux.drivers.output import EngineFiles
from llmux.drivers.store import FileStateStore
from llmux.errors import ConfigError, LlmuxError, Reason, Refused, StateFileError
from llmux.gateway.server import bind_all, serve_gateway
from llmux.gateway.tls import Tls
from llmux.gateway.workers import BEAT_SECS, Parent
from llmux.ports import DeviceCheckpointer, Notifier, StateStore, UnitManager
from llmux.protocol import Ask, Catalog, Collect, Tell
from llmux.runtime.drivers import Drivers, Places
from llmux.runtime.events import EventFeed, Feeds
from llmux.runtime.executor import Executor
from llmux.runtime.hub import Hub
from llmux.runtime.loop import Loop
from llmux.runtime.reconcile import adopt_engines, first_state
from llmux.runtime.status import catalog
from llmux.runtime.telemetry import Telemetry
from llmux.runtime.verbs import Verbs
from llmux.runtime.warmup import warm_up
from llmux.runtime.watchdog import StatusLine, feed_watchdog, tell_ready
from llmux.runtime.words import parse_eviction

__all__ = [
    "gateway",
    "look_at_host",
    "order",
    "run",
    "serve",
    "setup_logging",
    "supervise",
]

log = logging.getLogger("llmux")

RUNTIME = "/run/llmux"
SOCKET = f"{RUNTIME}/supervisor.sock"
LAST_GOOD = f"{RUNTIME}/last-good"
GATEWAY_USER = "llmux"
TAKEOVER_SECS = 60.0  # for an order that works without a supervisor to come to its end


class Supervisor:
    """Loop, executor, hub and verbs around a set of drivers; the same in all modes."""

    def __init__(
        self,
        config: Config,
        drivers: Drivers,
        store: StateStore,
        reload: Callable[[], Config],
        allowed_uids: frozenset[int] = frozenset(),
    ) -> None:
        self.drivers = drivers
        self.feeds = Feeds()
        self.events = EventFeed(self.feeds)
        self.telemetry = Telemetry(__version__, drivers.gpu, drivers.dumper)
        if isinstance(drivers.output, EngineFiles):
            drivers.output.on_line = self.feeds.line
        self._config = config
        self._store = store
        self._load = reload
        self._uids = allowed_uids
        self._began = time()
        self.loop: Loop
        self.hub: Hub
        self.verbs: Verbs

    async def start(self) -> None:
        """Adopt what lives. After this the state is true and the hub may be connected."""
        await self.prepare()
        try:
            notes = self._store.load()
        except StateFileError as error:
            log.warning("%s; going by what is observed", error)
            notes = {}
        state = self.loop.state
        adopted, effects = await adopt_engines(state, self.loop.executor, self.drivers, notes)
        self.loop.enter(adopted, effects)

    async def prepare(self) -> None:
        """All there, and nothing looked at or touched yet: enough to list images."""
        state = await first_state(self._config, self.drivers)
        self.loop = Loop(state, executor=self._executor, store=self._store, send=self._send)
        self.verbs = Verbs(self.loop, self.drivers.output, self.reload)
        self.hub = Hub(
            post=self.loop.post,
            ask=self._answer,
            catalog=lambda: self.catalog(self.loop.state),
            allowed_uids=self._uids,
            feeds=self.feeds,
        )
        self.loop.listeners += [_Catalogue(self), self.telemetry, self.events]

    def catalog(self, state: State) -> Catalog:
        return catalog(state, self.loop.executor, self.loop.last_switches, self._began)

    def _executor(self, post: Callable[[Any], None]) -> Executor:
        return Executor(self.drivers, post, self.telemetry.stepped)

    async def _answer(self, ask: Ask, tell: Tell) -> object:
        if ask.verb == "events":
            return {"events": list(self.events.recent)}
        if ask.verb == "metrics":
            hub = self.hub
            return await self.telemetry.answer(
                ask.args, self.feeds, hub.workers(), lambda w, n: hub.send(w, Collect(n))
            )
        return await self.verbs.answer(ask, tell)

    def _send(self, worker: str, message: Any) -> None:
        self.hub.send(worker, message)

    async def reload(self) -> dict[str, Any]:
        """Read the configuration anew; with a mistake in it the present one stays in force."""
        old = self.loop.state.config
        try:
            new = self._load()
        except ConfigError as error:
            log.error("configuration not reloaded, the former one stays in force: %s", error)
            raise Refused(Reason.BAD_REQUEST, str(error)) from error
        difference = diff_config(old, new)
        self.loop.post(ConfigChanged(new))
        log.info(
            "configuration reloaded: %d added, %d removed, %d changed",
            len(difference.added),
            len(difference.removed),
            len(difference.changed),
        )
        return {
            "message": "configuration reloaded",
            "added": list(difference.added),
            "removed": list(difference.removed),
            "changed": [change.name for change in difference.changed],
            "restart_gateway_for": list(difference.gateway_restart),
            "restart_supervisor_for": list(difference.supervisor_restart),
        }

    async def close(self) -> None:
        await self.hub.close()
        await self.loop.executor.close()
        if self.drivers.cuda is not None:
            await self.drivers.cuda.close()
        await self.drivers.units.close()


class _Catalogue:
    """Tells the workers when a model's state changed."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._last: object = None

    def published(self, old: State, new: State) -> None:
        supervisor = self._supervisor
        now = supervisor.catalog(new)
        if now != self._last:
            self._last = now
            supervisor.hub.broadcast(now)

    def switched(self, switch: SwitchFinished) -> None:
        victims = ", ".join(switch.victims)
        total = switch.serving_at - switch.decided_at
        log.info(
            "%s serves after %.3f s (%s%s; drain %.3f s, park %.3f s, %s %.3f s)",
            switch.model,
            total,
            "cold" if switch.cold else "woken",
            f", in place of {victims}" if victims else "",
            switch.drained_at - switch.decided_at,
            switch.room_at - switch.drained_at,
            "start" if switch.cold else "wake",
            switch.serving_at - switch.room_at,
            extra={"model": switch.model, "duration_ms": round(total * 1000, 1)},
        )


def setup_logging(verbose: bool) -> None:
    journald.setup_logging(verbose)
    for name in ("sanic", "sanic.root", "sanic.server"):  # its banner says nothing to an operator
        logging.getLogger(name).setLevel(logging.WARNING)


# ---- shared -------------------------------------------------------------------------------------


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _until(stop: asyncio.Event, *works: Coroutine[Any, Any, None]) -> None:
    """Run the works until ``stop``; one that ends before it is an error and ends everything."""
    tasks = [asyncio.create_task(work) for work in works]
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
    finally:
        for task in (stopping, *tasks):
            task.cancel()
        await asyncio.gather(stopping, *tasks, return_exceptions=True)


def run(main: Awaitable[None]) -> None:
    """asyncio.run on uvloop."""
    import uvloop  # imported late: the CLI's other verbs start faster without it

    async def body() -> None:
        await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


def _environment() -> dict[str, str]:
    return dict(os.environ)


# ---- llmux supervise ----------------------------------------------------------------------------


async def supervise(path: str) -> None:
    """The root daemon under systemd. Returns on SIGTERM; engines stay for the next one."""
    group = _gid_of(GATEWAY_USER)
    last_good = LastGood(LAST_GOOD, group)
    marked = last_good.load(path)
    config = marked.config
    for problem in check_host(config, marked.marks):
        log.warning("%s", problem)
    notifier = SdNotifier()
    drivers = _system_drivers(config)
    supervisor = Supervisor(
        config,
        drivers,
        FileStateStore(f"{RUNTIME}/state.json"),
        reload=lambda: _keep(last_good, load_config(path)),
        allowed_uids=_uids_of(GATEWAY_USER),
    )
    stop = asyncio.Event()
    _stop_on_signals(stop)
    lock = await _alone(patience=TAKEOVER_SECS)
    await supervisor.start()
    try:
        supervisor.loop.listeners.append(StatusLine(notifier))
        await supervisor.hub.listen(SOCKET, group)
        last_good.keep(config.sources)
        _reload_on_hangup(supervisor, notifier)
        works = [supervisor.loop.run(), _announce(supervisor, notifier, stop)]
        if (interval := watchdog_interval()) is not None:
            works.append(feed_watchdog(supervisor.loop, notifier, interval))
        log.info("llmux %s supervises %d models", __version__, len(config.models))
        await _until(stop, *works)
        notifier.stopping()
        last_good.forget()
    finally:
        await supervisor.close()
        os.close(lock)


def _system_drivers(config: Config) -> Drivers:
    """The real ones, for engines in systemd scopes."""
    from llmux.drivers.systemd import SystemdUnits  # needs pystemd, which embedded mode does not

    units = SystemdUnits()
    engine_user = None if config.engine_user == "root" else config.engine_user
    return Drivers(
        units=units,
        freezer=CgroupFreezer(),
        engine=VllmEngine(),
        output=EngineFiles(config.checkpoint.images_dir),
        gpu=find_gpu_observer(),
        places=Places(RUNTIME, engine_user, config.vllm_command, _environment()),
        identity=engine_identity,
        dumper=_dumper(config, units),
        cuda=_cuda(config),
        keep_images=config.checkpoint.keep_images,
    )


async def _alone(*, patience: float) -> int:
    """A lock that only one supervisor of this machine has; the kernel ends it with the process."""
    fd = os.open(f"{RUNTIME}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    ends = monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() >= ends:
                os.close(fd)
                raise Refused(
                    Reason.ALREADY_RUNNING,
                    "cannot supervise engines: another llmux does so on this machine",
                    hint="systemctl status llmux; or wait for the `llmux` command that runs",
                ) from None
            await asyncio.sleep(0.1)  # no event tells that a lock is free
        else:
            return fd


# ---- one order without a supervisor -------------------------------------------------------------


def order(path: str, verb: str, args: dict[str, Any], tell: Tell) -> Any:
    """Do one of the supervisor's verbs here, while no supervisor runs; engines outlive us."""
    answers: list[Any] = []

    async def body() -> None:
        answers.append(await _order(load_config(path), Ask(1, verb, args), tell))

    run(body())
    return answers[0]


async def _order(config: Config, ask: Ask, tell: Tell) -> Any:
    if os.geteuid() != 0:
        raise LlmuxError("cannot work without the supervisor: not root", hint="use sudo")
    if ask.verb == "checkpoint" and ask.args.get("eviction"):
        config = _with_eviction(config, ask.args)
    supervisor = Supervisor(
        config, _system_drivers(config), FileStateStore(f"{RUNTIME}/state.json"), lambda: config
    )
    if ask.verb == "images":
        await supervisor.prepare()
        return await supervisor.verbs.answer(ask)
    lock = await _alone(patience=0.0)
    try:
        await supervisor.start()
        try:
            turning = asyncio.create_task(supervisor.loop.run())
            answering = asyncio.ensure_future(supervisor.verbs.answer(ask, tell))
            await asyncio.wait([turning, answering], return_when=asyncio.FIRST_COMPLETED)
            if turning.done():
                turning.result()
            answer = await answering
            turning.cancel()
            await asyncio.gather(turning, return_exceptions=True)
        finally:
            await supervisor.close()
    finally:
        os.close(lock)
    return answer


def _with_eviction(config: Config, args: Mapping[str, Any]) -> Config:
    """The engine started for the eviction that was asked for, which is not yet configured."""
    name = str(args.get("model"))
    try:
        eviction = parse_eviction(str(args["eviction"]))
        model = replace(config.models[name], eviction=eviction)
    except (ValueError, KeyError):
        return config  # the verb says what is wrong with it
    return replace(config, models=MappingProxyType({**config.models, name: model}))


def look_at_host(config: Config | None) -> Sequence[Check]:
    """What ``llmux doctor`` prints."""
    return run_checks(config)


def _keep(last_good: LastGood, config: Config) -> Config:
    last_good.keep(config.sources)
    return config


def _dumper(config: Config, units: UnitManager) -> Criu:
    """CRIU; with its own CUDA plugin only where that is configured and there."""
    checkpoint = config.checkpoint
    store = ImageStore(checkpoint.images_dir, max_bytes=checkpoint.max_bytes)
    return Criu(
        units,
        store,
        checkpoint.images_dir,
        criu_path=checkpoint.criu_path,
        cuda_plugin_dir=_plugin_dir(config),
    )


def _plugin_dir(config: Config) -> str | None:
    directory = config.checkpoint.cuda_plugin_dir
    if directory is not None and not os.path.exists(os.path.join(directory, "cuda_plugin.so")):
        log.info("%s has no cuda_plugin.so: CUDA state is saved by llmux itself", directory)
        return None
    return directory


def _cuda(config: Config) -> DeviceCheckpointer | None:
    """None where there is no NVIDIA driver, or CRIU's plugin does the work: never both."""
    if _plugin_dir(config) is not None:
        return None
    tool = config.checkpoint.cuda_checkpoint_path
    library = os.environ.get("LLMUX_LIBCUDA")  # a library of another name or place
    if not os.path.exists("/proc/driver/nvidia/version") and library is None:
        return None
    if tool is not None and os.path.exists(tool):
        return CudaCheckpointTool(tool)
    return CudaDriver(library) if library else CudaDriver()


async def _announce(supervisor: Supervisor, notifier: Notifier, stop: asyncio.Event) -> None:
    await tell_ready(supervisor.loop, notifier)
    await _warm(supervisor, stop)


async def _warm(supervisor: Supervisor, stop: asyncio.Event) -> None:
    if supervisor.loop.state.config.warmup:
        await warm_up(supervisor.loop)
    await stop.wait()


def _reload_on_hangup(
    supervisor: Supervisor, notifier: Notifier, also: Sequence[Callable[[], None]] = ()
) -> None:
    pending: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        notifier.reloading()
        for part in also:
            part()
        try:
            await supervisor.reload()
        except LlmuxError:
            notifier.status("configuration not reloaded: see the journal")
        finally:
            notifier.ready()

    def hangup() -> None:
        task = asyncio.create_task(reload())
        pending.add(task)
        task.add_done_callback(pending.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup)


def _uids_of(user: str) -> frozenset[int]:
    try:
        return frozenset({pwd.getpwnam(user).pw_uid})
    except KeyError:
        log.warning("there is no user %s: only root may use the control socket", user)
        return frozenset()


def _gid_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


# ---- llmux gateway ------------------------------------------------------------------------------


def gateway(path: str, *, link: str = SOCKET, last_good: str = LAST_GOOD) -> None:
    """The front end as a service of its own. Its sockets live in systemd's fd store."""
    config = LastGood(last_good).load(path, check_files=False).config
    notifier = SdNotifier()
    secrets = _Secrets(config)
    secrets.check()
    sockets, metrics_sockets = _kept_sockets(config, notifier)

    def work(told: Notifier, watchdog_secs: float | None, life: socket.socket | None) -> None:
        serving = functools.partial(
            serve_gateway,
            config,
            link=link,
            sockets=sockets,
            metrics_sockets=metrics_sockets,
            notifier=told,
            watchdog_secs=watchdog_secs,
            keys=secrets.keys,
            tls=secrets.tls,
        )
        run(_gateway_worker(serving, life))

    count = config.gateway.workers
    if count == 1:
        work(notifier, watchdog_interval(), None)
    else:
        Parent(count, lambda told: work(told, 3 * BEAT_SECS, told.life), notifier).run()


async def _gateway_worker(
    serving: Callable[..., Awaitable[None]], life: socket.socket | None
) -> None:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    loop = asyncio.get_running_loop()
    reload: list[Callable[[], None]] = []
    loop.add_signal_handler(signal.SIGHUP, lambda: [part() for part in reload])
    if life is not None:

        def orphaned() -> None:
            loop.remove_reader(life)
            stop.set()

        loop.add_reader(life, orphaned)
    await serving(stop=stop, reload=reload)


class _Secrets:
    """Where keys and certificate are, credentials resolved."""

    def __init__(self, config: Config) -> None:
        settings = config.gateway
        self.keys: Callable[[], tuple[Key, ...]] | None = None
        if settings.keys_file is not None:
            self.keys = functools.partial(load_keys, resolve_secret(settings.keys_file))
        self.tls: tuple[str, str] | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.tls = (resolve_secret(settings.tls_certificate), resolve_secret(settings.tls_key))

    def check(self) -> None:
        """Raises what is wrong with them before anything listens."""
        if self.keys is not None:
            self.keys()
        if self.tls is not None:
            Tls(*self.tls)


def _kept_sockets(
    config: Config, notifier: SdNotifier
) -> tuple[list[socket.socket], list[socket.socket]]:
    """One listening socket per configured address, for clients and for metrics: from the fd store
    when it is there, else bound and stored. What is stored and configured no longer is dropped."""
    kept = listen_fds()

    def sockets_for(addresses: Sequence[str], purpose: str) -> list[socket.socket]:
        sockets = []
        for address in addresses:
            name = f"{purpose}-" + address.replace(":", "_").replace("/", "-")
            stored = kept.pop(name, [])
            if not stored:
                stored = bind_all([address])
                notifier.store_fds(name, stored)
            sockets += stored
        return sockets

    clients = sockets_for(config.listen_addresses(), "listen")
    metrics = _metrics_sockets(config, lambda addresses: sockets_for(addresses, "metrics"))
    for name, leftover in kept.items():
        notifier.drop_fds(name)
        for sock in leftover:
            sock.close()
    return clients, metrics


def _metrics_sockets(
    config: Config, bind: Callable[[Sequence[str]], list[socket.socket]]
) -> list[socket.socket]:
    """Their port may be taken (9090 is Prometheus' own): no reason to serve no models."""
    try:
        return bind(config.metrics_addresses())
    except OSError as error:
        log.error("no metrics port: %s (set metrics_port, or 0 for none)", error)
        return []


# ---- llmux serve --------------------------------------------------------------------------------


async def serve(path: str, *, port: int | None = None) -> None:
    """Supervisor and gateway in one process, engines as children that end with it."""
    marked = load_marked(path)
    config = marked.config
    problems = check_embedded(config, marked.marks)
    if problems:
        raise ConfigError(problems)
    listen = [f"127.0.0.1:{port}"] if port is not None else list(config.listen_addresses())
    _Secrets(config).check()
    sockets = bind_all(listen)
    stop = asyncio.Event()
    _stop_on_signals(stop)
    runtime = tempfile.mkdtemp(prefix="llmux-", dir=os.environ.get("XDG_RUNTIME_DIR"))
    try:
        await _serve_in(runtime, path, config, sockets, stop)
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


async def _serve_in(
    runtime: str, path: str, config: Config, sockets: list[socket.socket], stop: asyncio.Event
) -> None:
    notifier = SdNotifier()
    drivers = Drivers(
        units=DirectUnits(),
        freezer=CgroupFreezer(),
        engine=VllmEngine(),
        output=EngineFiles(f"{runtime}/logs"),
        gpu=find_gpu_observer(),
        places=Places(runtime, None, config.vllm_command, _environment()),
        identity=engine_identity,
    )
    supervisor = Supervisor(
        config, drivers, FileStateStore(f"{runtime}/state.json"), reload=lambda: load_config(path)
    )
    await supervisor.start()
    ours, theirs = socket.socketpair()
    try:
        await supervisor.hub.join(ours)
        supervisor.loop.listeners.append(StatusLine(notifier))
        secrets = _Secrets(config)
        reload: list[Callable[[], None]] = []
        _reload_on_hangup(supervisor, notifier, reload)
        gateway_stop = asyncio.Event()
        front = asyncio.create_task(
            serve_gateway(
                config,
                link=theirs,
                sockets=sockets,
                metrics_sockets=_metrics_sockets(config, bind_all),
                notifier=notifier,
                stop=gateway_stop,
                keys=secrets.keys,
                tls=secrets.tls,
                reload=reload,
            )
        )
        try:
            await _until(stop, supervisor.loop.run(), _ended_early(front), _warm(supervisor, stop))
        finally:
            gateway_stop.set()
            with contextlib.suppress(asyncio.CancelledError):
                await front
    finally:
        await supervisor.close()


async def _ended_early(task: asyncio.Task[None]) -> None:
    await asyncio.shield(task)
