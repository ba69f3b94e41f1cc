"""Run a program as an engine would run: through the launcher, with its user and its environment.

User, groups, capabilities, system call filter, limits and umask are then the engine's own. Its home
is used where there is one; for a model that never ran a throw-away one is made beside it. No
systemd unit is made: a guardian sees to it that nothing outlives the look.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from llmux.drivers.processes.spawn import spawn_launcher
from llmux.errors import DriverError
from llmux.ports import LaunchSpec

START_SECS: Final = 15.0
END_SECS: Final = 10.0
OUTPUT_CAP: Final = 256 * 1024


def run_as_engine(spec: LaunchSpec, seconds: float) -> tuple[int | None, str]:
    """Run ``spec.argv`` to its end, or for ``seconds``: its status, None without one, and what it
    said. Not inside a loop."""
    try:
        with tempfile.TemporaryDirectory(prefix="llmux-doctor-") as directory, _home(spec) as own:
            output = f"{directory}/output"  # root's directory; the engine gets the open file
            done = asyncio.run(_run(replace(own, stdout=output, stderr=output), seconds))
            said = Path(output).read_bytes()[-OUTPUT_CAP:].decode(errors="replace").strip()
    except DriverError as error:
        return None, error.message
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}"
    return done, said


async def _run(spec: LaunchSpec, seconds: float) -> int | None:
    launch = spawn_launcher()
    guardian = launch.process
    try:
        await launch.open(spec, START_SECS, cgroup_root=None, guardian=True)
        await guardian.wait(seconds)
        return guardian.code
    finally:
        launch.close()  # end of file at the gate: the guardian kills what there is
        if not await asyncio.shield(guardian.wait(END_SECS)):
            guardian.signal(signal.SIGKILL)
        guardian.close()


@contextmanager
def _home(spec: LaunchSpec) -> Iterator[LaunchSpec]:
    """``spec`` with a home that is there, wherever it names the home."""
    user = spec.user
    if user is None or user.temporary is None or os.path.lexists(user.home):
        yield spec
        return
    above = os.path.dirname(user.home)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    made = tempfile.mkdtemp(prefix=".llmux-doctor-", dir=above)
    try:
        os.chown(made, user.uid, user.gid)
        own = replace(user, home=made, temporary=user.temporary.replace(user.home, made))
        argv = tuple(argument.replace(user.home, made) for argument in spec.argv)
        env = {name: value.replace(user.home, made) for name, value in spec.env.items()}
        yield replace(spec, argv=argv, env=env, user=own)
    finally:
        shutil.rmtree(made, ignore_errors=True)  # follows no link
