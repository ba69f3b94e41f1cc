"""An images directory that another user made first, as anyone can in /tmp: nothing in it is opened.

The three attacks of the guide's ``/tmp/llmux-checkpoints``: a link in place of a log to read a
secret, in place of the offset to overwrite a file, in place of a log to append to one.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from llmux.config.host import check_directories, check_host
from llmux.config.load import load_marked
from llmux.daemon.supervise import supervise
from llmux.drivers.doctor.run import Level, run_checks
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.images.budget import look_for_room
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.children import DirectUnits
from llmux.errors import CheckpointFailed, ConfigError, DriverError, UnitFailed
from llmux.ports import LaunchSpec, UnitHandle
from llmux.trusted import UntrustedPath, make_private, unsafe_directory

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: needs root")
pytestmark = needs_root


def handle_of(model: str) -> UnitHandle:
    return UnitHandle(model, f"llmux-{model}.scope", os.getpid(), 1)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """``images/poet``, both made by another user, with a link to a file of root's as each log."""
    secret = tmp_path / "secret"
    secret.write_text("root-only-secret\n")
    secret.chmod(0o600)
    directory = tmp_path / "images"
    (directory / "poet").mkdir(parents=True)
    for name in ("stdout.log", "stderr.log"):
        (directory / "poet" / name).symlink_to(secret)
        (directory / "poet" / f"{name}.offset").write_text("0 0 -\n")
    for path in (directory, directory / "poet"):
        path.chmod(0o700)
        os.chown(path, NOBODY, NOBODY)
    return directory


def attach(directory: Path) -> list[str]:
    async def main() -> list[str]:
        output = EngineFiles(str(directory))
        try:
            output.attach(handle_of("poet"))
            return output.tail("poet")
        finally:
            await output.close()

    return asyncio.run(main())


def test_a_link_in_place_of_a_log_is_not_read(foreign: Path) -> None:
    with pytest.raises(DriverError, match=f"{foreign} belongs to user {NOBODY}"):
        attach(foreign)


def test_nor_where_only_the_models_directory_is_foreign(foreign: Path) -> None:
    os.chown(foreign, 0, 0)
    with pytest.raises(DriverError, match=f"{foreign}/poet belongs to user {NOBODY}"):
        attach(foreign)


def test_nor_where_only_the_log_is_a_link(foreign: Path) -> None:
    for path in (foreign, foreign / "poet"):
        os.chown(path, 0, 0)
    assert attach(foreign) == []


def test_a_link_in_place_of_the_offset_is_not_written_through(
    foreign: Path, tmp_path: Path
) -> None:
    for path in (foreign, foreign / "poet"):
        os.chown(path, 0, 0)
    victim = tmp_path / "victim"
    victim.write_text("untouched\n")
    for name in ("stdout.log", "stderr.log"):
        (foreign / "poet" / name).unlink()
        (foreign / "poet" / f"{name}.offset").unlink()
        (foreign / "poet" / f"{name}.offset").symlink_to(victim)
    assert attach(foreign) == []
    assert victim.read_text() == "untouched\n"


@pytest.mark.parametrize("foreign_file", [False, True])
def test_an_engines_output_goes_into_no_link_and_no_file_of_others(
    tmp_path: Path, foreign_file: bool
) -> None:
    victim = tmp_path / "ld.so.preload"
    victim.write_text("")
    log = tmp_path / "stderr.log"
    if foreign_file:
        log.write_text("")
        os.chown(log, NOBODY, NOBODY)
    else:
        log.symlink_to(victim)

    async def main() -> None:
        units = DirectUnits()
        spec = LaunchSpec(
            model="poet",
            argv=(sys.executable, "-c", "import sys; sys.stderr.write('/tmp/evil.so')"),
            env={},
            user=None,
            stdout=str(tmp_path / "stdout.log"),
            stderr=str(log),
            runtime_dir=str(tmp_path / "run"),
        )
        try:
            with pytest.raises(UnitFailed, match=r"stderr\.log"):
                await units.start(spec, 10.0)
        finally:
            await units.close()

    asyncio.run(main())
    assert victim.read_text() == ""
    assert log.read_text() == ""


def test_no_image_is_made_found_or_swept_there(foreign: Path) -> None:
    (foreign / "poet" / ".old-1").mkdir()
    store = ImageStore(str(foreign))
    with pytest.raises(CheckpointFailed, match=f"{foreign} belongs to user {NOBODY}"):
        store.begin("poet")
    with pytest.raises(CheckpointFailed, match=f"{foreign} belongs to user {NOBODY}"):
        look_for_room(store, "poet", 1)
    with pytest.raises(CheckpointFailed, match=f"{foreign} belongs to user {NOBODY}"):
        store.restore_directory("poet")
    assert store.images() == []
    assert store.sweep() == []
    assert (foreign / "poet" / ".old-1").is_dir(), "nothing there was touched"


def test_the_file_checker_the_doctor_and_the_start_refuse_it_with_the_remedy(
    foreign: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"checkpoint: {{images_dir: {foreign}}}\nmodels: {{m: {{model_path: x/y}}}}\n")
    reason = f"{foreign} belongs to user {NOBODY}"
    marked = load_marked(path)
    (problem,) = check_directories(marked.config, marked.marks)
    assert (problem.line, problem.path) == (1, "checkpoint.images_dir")
    assert reason in problem.message
    assert "/var/lib/llmux/checkpoints" in problem.message
    assert problem in check_host(marked.config, marked.marks)
    checks = {check.name: check for check in run_checks(marked.config)}
    assert checks["images directory"].level is Level.FAIL
    assert reason in checks["images directory"].seen
    with pytest.raises(ConfigError, match=reason):  # exit status 78: see cli/main.py
        asyncio.run(supervise(str(path)))


def test_the_guides_directory_in_a_sticky_one_is_made_roots_own(tmp_path: Path) -> None:
    sticky = tmp_path / "tmp"
    sticky.mkdir()
    sticky.chmod(0o1777)
    make_private(str(sticky / "llmux-checkpoints"))
    status = (sticky / "llmux-checkpoints").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o700)
    assert unsafe_directory(str(sticky / "llmux-checkpoints")) is None
    sticky.chmod(0o777)
    with pytest.raises(UntrustedPath, match="can be written by others"):
        make_private(str(sticky / "llmux-checkpoints"))
