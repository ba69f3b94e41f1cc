"""The configuration that was last in force, kept for a service that crashes while the file is bad.

``systemctl reload`` with a mistake in the file leaves the running configuration in force. Should a
service then be killed, it must come back with that same configuration, not stay down. A clean stop
forgets the copy: a start by an operator reads the file, and says what is wrong with it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llmux.config.load import MarkedConfig, load_marked
from llmux.errors import ConfigError

log = logging.getLogger("llmux")


class LastGood:
    """Below ``directory``; ``group`` (the gateway's) may read it, as it may read the file."""

    def __init__(self, directory: str, group: int | None = None) -> None:
        self._directory = Path(directory)
        self._group = group

    def load(self, path: str, *, check_files: bool = True) -> MarkedConfig:
        """The file at ``path``; the last good copy of it when it is bad and there is one."""
        try:
            return load_marked(path, check_files=check_files)
        except ConfigError as error:
            copy = self._directory / Path(path).name
            if not copy.exists():
                raise
            log.error("%s; going on with the configuration that was in force", error)
            return load_marked(copy, conf_d=self._directory / "conf.d", check_files=False)

    def keep(self, sources: Sequence[str]) -> None:
        """Copy the files of the configuration now in force. Failing is no reason not to serve."""
        if not sources or Path(sources[0]).parent == self._directory:
            return
        fresh = self._directory.with_name(self._directory.name + ".new")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            (fresh / "conf.d").mkdir(parents=True)
            main, *drop_ins = map(Path, sources)
            shutil.copyfile(main, fresh / main.name)
            for drop_in in drop_ins:
                shutil.copyfile(drop_in, fresh / "conf.d" / drop_in.name)
            self._open_to_group(fresh)
            self.forget()
            fresh.rename(self._directory)
        except OSError as error:
            log.warning("cannot keep a copy of the configuration in %s: %s", fresh, error)

    def _open_to_group(self, top: Path) -> None:
        for path in (top, *top.rglob("*")):
            if self._group is not None:
                os.chown(path, -1, self._group)
            path.chmod(0o750 if path.is_dir() else 0o640)

    def forget(self) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self._directory)
