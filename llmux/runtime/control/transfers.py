"""What `llmux images export` and `import` ask of the supervisor: facts of this host, and to take
over an image that arrived. The bytes pass through the command line's process, not through this."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from llmux.core.events import ImageKnown
from llmux.core.records import Draining, Parking, Starting, Waking
from llmux.errors import LlmuxError, Reason, Refused
from llmux.image_ports import Checkpointer, Image
from llmux.runtime.control.orders import record_of
from llmux.runtime.engines.facts import eviction_of
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.launch import engine_address
from llmux.runtime.host import Drivers
from llmux.runtime.loop import Loop

_SALT = re.compile(r"[0-9a-f]{32,64}")


class Transfers:
    def __init__(self, loop: Loop, images: ImageLifecycle, drivers: Drivers) -> None:
        self._loop = loop
        self._images = images
        self._drivers = drivers

    async def here(self, name: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """The model as configured here: what an image of it must fit, and the image that does."""
        salt = args.get("salt")
        if not isinstance(salt, str) or not _SALT.fullmatch(salt) or len(salt) % 2:
            raise Refused(Reason.BAD_REQUEST, '"salt" must be 32 to 64 hexadecimal digits')
        checkpointer = self._checkpointer()
        config, gpus = self._engine(name)
        spec = self._images.spec(config, gpus)
        portable = await asyncio.to_thread(self._drivers.portable_identity, config, spec, salt)
        found = await self._images.find(config, gpus)
        address = engine_address(config, self._drivers.places)
        return {
            "model": name,
            "image": found.path if isinstance(found, Image) else None,
            "reason": None if isinstance(found, Image) else found.reason,
            "identity": dict(await asyncio.to_thread(self._images.identity, config, gpus)),
            "portable": dict(portable),
            "runtime_dir": spec.runtime_dir,
            "outputs": [path for path in (spec.stdout, spec.stderr) if path is not None],
            "uds": address.uds,
            "port": address.port,
            "criu": (await checkpointer.check()).version,
        }

    async def adopt(self, name: str) -> dict[str, Any]:
        """Take over the image that arrived in the model's directory."""
        phase = record_of(self._loop, name).phase
        if isinstance(phase, (Draining, Parking, Starting, Waking)):
            raise Refused(
                Reason.ALREADY_RUNNING,
                f"cannot take over the image of {name}: the model is"
                f" {record_of(self._loop, name).state}",
                hint="run the same command again when the model serves or is parked",
            )
        config, gpus = self._engine(name)
        identity = await asyncio.to_thread(self._images.identity, config, gpus)
        image = await self._checkpointer().adopt(name, identity)
        self._loop.post(ImageKnown(name, eviction_of(image.recipe), image.disk_bytes))
        return {
            "message": f"Model {name} has an image in {image.path}",
            "model": name,
            "path": image.path,
            "eviction": str(image.recipe.get("eviction") or "unknown"),
            "apparent_bytes": image.apparent_bytes,
            "disk_bytes": image.disk_bytes,
        }

    def _checkpointer(self) -> Checkpointer:
        if self._drivers.checkpointer is None:
            raise LlmuxError("cannot use images: engines are not in systemd scopes here")
        return self._drivers.checkpointer

    def _engine(self, name: str) -> tuple[Any, tuple[int, ...]]:
        record = record_of(self._loop, name)
        config = record.engine
        gpus = record.gpus
        if not gpus:
            gpus = config.gpus if isinstance(config.gpus, tuple) else tuple(range(config.gpus))
        return config, gpus
