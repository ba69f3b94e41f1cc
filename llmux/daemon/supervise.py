"""``llmux supervise``, the root daemon under systemd, and single orders while it does not run."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

from llmux import __version__
from llmux.config.files.last_good import LastGood
from llmux.config.host import check_directories, check_gateway_reads, check_host
from llmux.config.load import MarkedConfig, load_marked
from llmux.config.schema import AfterReboot, Config, Eviction
from llmux.core.events import TrialSet
from llmux.daemon import gpu_driver
from llmux.daemon.duties import (
    Notes,
    announce,
    gid_of,
    reload_on_hangup,
    stop_on_signals,
    uids_of,
    until,
)
from llmux.daemon.engine_environment import engine_environment
from llmux.daemon.engine_users import engine_users
from llmux.daemon.places import FILES, RUNTIME, Files
from llmux.daemon.process import run
from llmux.daemon.supervisor import GATEWAY_USER, TAKEOVER_SECS, Supervisor
from llmux.drivers.criu.driver import Criu
from llmux.drivers.cuda.driver import LIBRARY, CudaDriver
from llmux.drivers.cuda.tool import CudaCheckpointTool
from llmux.drivers.engine.identity import engine_identity, portable_identity
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.engine.vllm import VllmEngine
from llmux.drivers.engine.weights import PageCache
from llmux.drivers.event_file import EventFile
from llmux.drivers.gpu import find_gpu_observer
from llmux.drivers.images.identity import model_files_are_here
from llmux.drivers.images.store import ImageStore
from llmux.drivers.memory import Pressure, available_bytes
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.drivers.store import FileStateStore
from llmux.drivers.systemd.notify import SdNotifier, watchdog_interval
from llmux.drivers.systemd.own_unit import OwnUnit
from llmux.errors import ConfigError, LlmuxError, Reason, Refused
from llmux.peers import ADMINS
from llmux.ports import DeviceCheckpointer, UnitManager
from llmux.protocol import Ask, ProgressCallback
from llmux.runtime.host import Drivers, Places
from llmux.runtime.pressure import watch_pressure
from llmux.runtime.watchdog import StatusLine, feed_watchdog
from llmux.trusted import make_private

log = logging.getLogger("llmux")

LOGS = "/var/log/llmux"  # engines' output: on a disk of its own when images fill theirs


async def supervise(
    path: str,
    *,
    files: Files = FILES,
    drivers: Callable[[Config], Drivers] | None = None,
    unit: OwnUnit | None = None,
    restart_for_driver: Callable[..., Coroutine[Any, Any, None]] = gpu_driver.restart_for_driver,
) -> None:
    """Run the root daemon under systemd until SIGTERM; engines stay for the next one. ``drivers``
    makes others than those for engines in systemd scopes."""
    group = gid_of(GATEWAY_USER)
    last_good = LastGood(files.last_good, group)
    marked = last_good.load(path)
    config = marked.config
    _require_own_directories(marked)
    notes = Notes()
    notes.say(marked)
    for problem in (
        *check_host(config, marked.marks),
        *check_gateway_reads(config, marked.marks),
    ):
        log.warning("%s", problem)
    notifier = SdNotifier()
    unit = unit or OwnUnit()
    made = (drivers or system_drivers)(config)
    supervisor = Supervisor(
        config,
        made,
        FileStateStore(files.notes),
        reload=lambda dry_run: _load(path) if dry_run else _reload(path, last_good, notes),
        allowed_uids=uids_of(GATEWAY_USER),
        admins=gid_of(ADMINS),
        events=EventFile(files.events),
        learned=FileStateStore(files.learned),
    )
    stop = asyncio.Event()
    stop_on_signals(stop)
    lock = await _alone(files, patience=TAKEOVER_SECS)
    await supervisor.start()
    # Beside everything else: only the start of an engine waits for it.
    cuda = asyncio.ensure_future(made.cuda_started()) if made.cuda_started else None
    try:
        supervisor.loop.listeners.append(StatusLine(notifier))
        await supervisor.control_socket.listen(files.socket, group, ours=True)
        last_good.keep(config.sources)
        reload_on_hangup(supervisor, notifier)
        works = [
            supervisor.loop.run(),
            announce(supervisor, notifier, stop),
            watch_pressure(supervisor.loop, Pressure()),
        ]
        if (interval := watchdog_interval()) is not None:
            works.append(feed_watchdog(supervisor.loop, notifier, interval))
        if not made.gpu.available:
            loaded = made.cuda_started is not None
            works.append(restart_for_driver(unit.restart, files.driver_mark, loaded=loaded))
        log.info("llmux %s supervises %d models", __version__, len(config.models))
        await until(stop, *works)
        notifier.stopping()
        if not await asyncio.to_thread(unit.is_restarting):
            last_good.forget()
            await supervisor.tell_what_goes_on()
        await supervisor.thaw_if_ending()
    finally:
        if cuda is not None:
            cuda.cancel()
        await supervisor.close()
        notifier.close()
        os.close(lock)


def _load(path: str) -> Config:
    return _load_marked(path).config


def _load_marked(path: str) -> MarkedConfig:
    """For a root that opens files where it says: ConfigError when other users could redirect it."""
    marked = load_marked(path)
    _require_own_directories(marked)
    return marked


def _reload(path: str, last_good: LastGood, notes: Notes) -> Config:
    marked = _load_marked(path)
    notes.say(marked)
    last_good.keep(marked.config.sources)
    return marked.config


def _require_own_directories(marked: MarkedConfig) -> None:
    """Made at once, exclusively: in /tmp another user could make it before the first engine."""
    with suppress(OSError):
        make_private(marked.config.checkpoint.images_dir)
    if problems := check_directories(marked.config, marked.marks):
        raise ConfigError(problems)


def system_drivers(config: Config) -> Drivers:
    """The drivers for engines in systemd scopes."""
    from llmux.drivers.systemd.units import (
        SystemdUnits,  # needs pystemd, which embedded mode does not
    )

    units = SystemdUnits()
    cuda = cuda_driver(config)
    start = cuda_start(cuda)
    return Drivers(
        units=units,
        freezer=CgroupFreezer(),
        engine=VllmEngine(),
        output=EngineFiles(LOGS),
        gpu=find_gpu_observer(),
        places=Places(RUNTIME, engine_users(config), config.vllm_command, engine_environment()),
        identity=engine_identity,
        portable_identity=portable_identity,
        checkpointer=_checkpointer(config, units),
        cuda=cuda,
        cuda_started=start.wait if start is not None else None,
        keep_images=config.checkpoint.keep_images,
        available_memory=available_bytes,
        files_are_here=model_files_are_here,
        weights=PageCache(),
    )


async def _alone(files: Files, *, patience: float) -> int:
    """Take the lock of this machine's one supervisor; the kernel releases it with the process."""
    try:
        fd = os.open(files.lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LlmuxError(
            f"cannot supervise engines: {error.filename}: {error.strerror}",
            hint="`systemd-tmpfiles --create llmux.conf` makes /run/llmux; without systemd there is"
            " only `llmux serve`",
        ) from error
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
            await asyncio.sleep(0.1)  # a lock that becomes free gives no event
        else:
            return fd


def order(
    path: str,
    verb: str,
    args: dict[str, Any],
    report: ProgressCallback,
    *,
    files: Files = FILES,
    drivers: Callable[[Config], Drivers] | None = None,
) -> Any:
    """Run one of the supervisor's verbs here, while no supervisor runs; engines stay."""
    answers: list[Any] = []

    async def body() -> None:
        config = _load(path)
        if os.geteuid() != 0:
            raise LlmuxError("cannot work without the supervisor: not root", hint="use sudo")
        made = (drivers or system_drivers)(config)
        answers.append(await _order(config, made, files, Ask(1, verb, args), report))

    run(body())
    return answers[0]


async def _order(
    config: Config, drivers: Drivers, files: Files, ask: Ask, report: ProgressCallback
) -> Any:
    supervisor = Supervisor(
        config,
        drivers,
        FileStateStore(files.notes),
        lambda _: config,
        events=EventFile(files.events),
    )
    if ask.verb in ("images", "image_here"):
        await supervisor.prepare()
        return await supervisor.verbs.answer(ask)
    lock = await _alone(files, patience=0.0)
    try:
        return await carry_out(supervisor, ask, report)
    finally:
        os.close(lock)


async def carry_out(supervisor: Supervisor, ask: Ask, report: ProgressCallback) -> Any:
    """Adopt what runs, answer this one ask, and leave the engines as they are then."""
    await supervisor.start()
    try:
        if ask.verb == "checkpoint" and (trial := _trial(ask.args)) is not None:
            supervisor.loop.post(trial)
        turning = asyncio.create_task(supervisor.loop.run())
        answering = asyncio.ensure_future(supervisor.verbs.answer(ask, report))
        try:
            await asyncio.wait([turning, answering], return_when=asyncio.FIRST_COMPLETED)
            if turning.done():
                turning.result()
            return await answering
        finally:
            for task in (turning, answering):
                task.cancel()
            await asyncio.gather(turning, answering, return_exceptions=True)
    finally:
        await supervisor.close()


def _trial(args: Mapping[str, Any]) -> TrialSet | None:
    """The engine is started for the eviction that was asked for, whatever is configured."""
    try:
        return TrialSet(str(args.get("model")), Eviction.parse(str(args["eviction"])))
    except (ValueError, KeyError):
        return None  # the verb reports what is wrong with it


def _checkpointer(config: Config, units: UnitManager) -> Criu:
    """CRIU, with its own CUDA plugin only where that is configured and installed."""
    checkpoint = config.checkpoint
    store = ImageStore(
        checkpoint.images_dir,
        max_bytes=checkpoint.max_bytes,
        across_reboot=checkpoint.after_reboot is AfterReboot.TRY,
    )
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


def cuda_driver(config: Config) -> DeviceCheckpointer | None:
    """None without an NVIDIA driver, or where CRIU's plugin does the work: never both."""
    library = _libcuda()
    if library is None or _plugin_dir(config) is not None:
        return None
    tool = config.checkpoint.cuda_checkpoint_path
    if tool is not None and os.path.exists(tool):
        return CudaCheckpointTool(tool)
    return CudaDriver(library)


def cuda_start(cuda: DeviceCheckpointer | None) -> gpu_driver.CudaStart | None:
    """None without an NVIDIA driver. Also where a tool or CRIU's plugin saves CUDA state."""
    library = _libcuda()
    if library is None:
        return None
    own = cuda if isinstance(cuda, CudaDriver) else CudaDriver(library)
    return gpu_driver.CudaStart(own)


def _libcuda() -> str | None:
    """The driver's library, which may have another name or place; None without a driver."""
    named = os.environ.get("LLMUX_LIBCUDA")
    return LIBRARY if named is None and os.path.exists(gpu_driver.VERSION) else named
