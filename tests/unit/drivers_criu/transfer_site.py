"""Two hosts with stores of images, without supervisors: what streams go between in tests."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

from llmux.daemon.images import ExportedImage, import_image
from llmux.drivers.criu.known_files import look
from llmux.drivers.images.files import SEGMENT, digest_files, sizes_on_disk
from llmux.drivers.images.manifest import KeptPath, Manifest, ShmGroup, TreeProcess
from llmux.drivers.images.store import ImageStore

PORTABLE = {"kernel": "6.12", "processor": "Xeon", "uid": str(os.geteuid()), "version.vllm": "0.32"}


class Site:
    """A host: a store of images, and what its supervisor would say."""

    def __init__(self, directory: pathlib.Path, library: pathlib.Path) -> None:
        directory.mkdir()
        self.store = ImageStore(str(directory / "images"))
        self.config = str(directory / "config.yaml")
        pathlib.Path(self.config).write_text(
            f"checkpoint: {{images_dir: {directory}/images}}\nmodels: {{}}\n"
        )
        self.library = library
        self.identity = {"boot_id": str(directory), "kernel": "6.12"}
        self.portable = dict(PORTABLE)
        self.asked: list[str] = []

    def publish(self, model: str = "m", **fields: Any) -> None:
        temporary = pathlib.Path(self.store.begin(model))
        (temporary / "shm").mkdir()
        for name, parts in (
            ("pages-1.img", {0: b"a" * 5000, 3 * SEGMENT: b"b" * 100}),
            ("core-7.img", {0: b"core"}),
            ("empty.img", {}),
            ("shm/0", {0: b"s" * 4096}),
        ):
            with open(temporary / name, "xb") as file:
                for offset, data in parts.items():
                    file.seek(offset)
                    file.write(data)
            (temporary / name).chmod(0o600)
        names = ["core-7.img", "empty.img", "pages-1.img", "shm/0"]
        files = digest_files(
            str(temporary), names, punch=True, stop=Event(), count=lambda _: None, workers=1
        )
        apparent, on_disk = sizes_on_disk(str(temporary))
        manifest = Manifest(
            model=model,
            created=1e9,
            dump_seconds=1.0,
            cold_seconds=60.0,
            criu="4.1.1",
            identity=self.identity,
            recipe={"eviction": "discard+checkpoint", "uds": "/run/x/api.sock", "port": None},
            root_pid=4194000,
            processes=(TreeProcess(4194000, "vllm", (4194000, 4194001)),),
            runtime_dir=KeptPath("/run/x", os.geteuid(), 0, 0o700),
            append_files=(KeptPath("/var/x/stdout", 0, 0, 0o640),),
            unix_paths=("/run/x/api.sock",),
            tcp_ports=(),
            shm=(ShmGroup(("psm_1",), "shm/0", 4096, 0o600, 0, 0),),
            known=(look(str(self.library)),),
            files=files,
            apparent_bytes=apparent,
            disk_bytes=on_disk,
        )
        self.store.publish(str(temporary), replace(manifest, **fields))

    def ask(self, verb: str, values: dict[str, Any]) -> Any:
        self.asked.append(verb)
        model = values["model"]
        if verb == "image_adopt":
            image = self.store.adopt(model, self.identity)
            return {
                "message": f"Model {model} has an image in {image.path}",
                "model": model,
                "path": image.path,
                "eviction": str(image.recipe["eviction"]),
                "apparent_bytes": image.apparent_bytes,
                "disk_bytes": image.disk_bytes,
            }
        assert 32 <= len(bytes.fromhex(values["salt"]).hex()) <= 64, "the verb takes no other"
        found = self.store.find(model, self.identity)
        path = getattr(found, "path", None)
        return {
            "model": model,
            "image": path,
            "reason": getattr(found, "reason", None),
            "identity": self.identity,
            "portable": self.portable,
            "runtime_dir": "/run/x",
            "outputs": ["/var/x/stdout"],
            "uds": "/run/x/api.sock",
            "port": None,
            "criu": "4.2",
        }

    def export(self) -> bytes:
        out = io.BytesIO()
        ExportedImage("m", self.ask, quiet).to_stream(out)
        return out.getvalue()

    def take(self, stream: bytes) -> Any:
        return import_image(self.config, io.BytesIO(stream), self.ask, quiet)

    def left(self) -> list[str]:
        """What lies in the model's directory."""
        return sorted(os.listdir(self.store.directory("m")))


def quiet(_total: int) -> Callable[[int], None]:
    return lambda _: None
