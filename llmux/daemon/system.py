"""``llmux supervise``: the root daemon under systemd; and single orders while it does not run."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import monotonic
from types import MappingProxyType
from typing import Any

from llmux import __version__
from llmux.config.host import check_host
from llmux.config.lastgood import LastGood
from llmux.config.load import load_config
from llmux.config.schema import Config
from llmux.daemon.process import (
    announce,
    environment,
    gid_of,
    reload_on_hangup,
    run,
    stop_on_signals,
    uids_of,
    until,
)
from llmux.daemon.supervisor import (
    GATEWAY_USER,
    LAST_GOOD,
    RUNTIME,
    SOCKET,
    TAKEOVER_SECS,
    Supervisor,
)
from llmux.drivers.criu import Criu
from llmux.drivers.cuda import CudaDriver
from llmux.drivers.cuda_cli import CudaCheckpointTool
from llmux.drivers.doctor import Check, run_checks
from llmux.drivers.engine import VllmEngine
from llmux.drivers.freezer import CgroupFreezer
from llmux.drivers.gpu import find_gpu_observer
from llmux.drivers.identity import engine_identity
from llmux.drivers.images import ImageStore
from llmux.drivers.notify import SdNotifier, watchdog_interval
from llmux.drivers.output import EngineFiles
from llmux.drivers.store import FileStateStore
from llmux.errors import LlmuxError, Reason, Refused
from llmux.ports import DeviceCheckpointer, UnitManager
from llmux.protocol import Ask, Tell
from llmux.runtime.drivers import Drivers, Places
from llmux.runtime.watchdog import StatusLine, feed_watchdog
from llmux.runtime.words import parse_eviction

log = logging.getLogger("llmux")


async def supervise(path: str) -> None:
    """The root daemon under systemd. Returns on SIGTERM; engines stay for the next one."""
    group = gid_of(GATEWAY_USER)
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
        allowed_uids=uids_of(GATEWAY_USER),
    )
    stop = asyncio.Event()
    stop_on_signals(stop)
    lock = await _alone(patience=TAKEOVER_SECS)
    await supervisor.start()
    try:
        supervisor.loop.listeners.append(StatusLine(notifier))
        await supervisor.hub.listen(SOCKET, group)
        last_good.keep(config.sources)
        reload_on_hangup(supervisor, notifier)
        works = [supervisor.loop.run(), announce(supervisor, notifier, stop)]
        if (interval := watchdog_interval()) is not None:
            works.append(feed_watchdog(supervisor.loop, notifier, interval))
        log.info("llmux %s supervises %d models", __version__, len(config.models))
        await until(stop, *works)
        notifier.stopping()
        last_good.forget()
        await supervisor.thaw_if_ending()
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
        places=Places(RUNTIME, engine_user, config.vllm_command, environment()),
        identity=engine_identity,
        dumper=_dumper(config, units),
        cuda=_cuda(config),
        keep_images=config.checkpoint.keep_images,
    )


async def _alone(*, patience: float) -> int:
    """A lock that only one supervisor of this machine has; the kernel ends it with the process."""
    try:
        fd = os.open(f"{RUNTIME}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
            await asyncio.sleep(0.1)  # no event tells that a lock is free
        else:
            return fd


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
