"""Keep a copy of the configuration in force, for a service that crashes while the file is bad.

``systemctl reload`` with a mistake in the file leaves the running configuration in force. A service
that is killed or restarted then, by an upgrade for instance, must come back with that
configuration. A stop that is no restart removes the copy: when an operator starts the service, the
file counts and its mistakes are reported.
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
    """The copy below ``directory``, readable by ``group`` (the gateway's) like the file itself."""

    def __init__(self, directory: str, group: int | None = None) -> None:
        self._directory = Path(directory)
        self._group = group

    def load(self, path: str, *, check_files: bool = True) -> MarkedConfig:
        """Load the file at ``path``; when it is bad, its last good copy if there is one. A file
        that one model lacks does not make it bad: the others can be served. A copy that is bad
        as well is named in the log; the ConfigError raised is that of the file."""
        try:
            return load_marked(path, check_files=check_files, tolerate_files=True)
        except ConfigError as error:
            copy = self._directory / Path(path).name
            if not os.path.lexists(copy):
                raise
            try:
                kept = load_marked(copy, conf_d=self._directory / "conf.d", check_files=False)
            except ConfigError as damaged:
                log.error("cannot continue with the last good configuration: %s", damaged)
                raise error from None
            log.error("%s; continuing with the last good configuration", error)
            return kept

    def keep(self, sources: Sequence[str]) -> None:
        """Copy the files of the configuration in force. A failure is logged and ignored."""
        if not sources or Path(sources[0]).parent == self._directory:
            return
        fresh = self._directory.with_name(self._directory.name + ".new")
        try:
            _remove(fresh)
            (fresh / "conf.d").mkdir(parents=True)
            main, *drop_ins = map(Path, sources)
            shutil.copyfile(main, fresh / main.name)
            for drop_in in drop_ins:
                shutil.copyfile(drop_in, fresh / "conf.d" / drop_in.name)
            self._open_to_group(fresh)
            _remove(self._directory)
            fresh.rename(self._directory)
        except OSError as error:
            log.warning("cannot keep a copy of the configuration in %s: %s", fresh, error)

    def _open_to_group(self, top: Path) -> None:
        for path in (top, *top.rglob("*")):
            if self._group is not None:
                os.chown(path, -1, self._group)
            path.chmod(0o750 if path.is_dir() else 0o640)

    def forget(self) -> None:
        """A failure is logged and ignored."""
        try:
            _remove(self._directory)
        except OSError as error:
            log.warning("cannot remove the copy of the configuration: %s", error)


def _remove(path: Path) -> None:
    """Whatever is there, a file in place of the directory too."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
