"""Images to and from other hosts, in the command line's process. The supervisor is asked for the
host's facts and puts in place what arrived; ``ask`` is one of its verbs."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

from llmux import typed_json
from llmux.config.load import load_config
from llmux.drivers.images.budget import check_disk
from llmux.drivers.images.files import Counter
from llmux.drivers.images.manifest import MAX_BYTES, NAME, Manifest, ManifestError
from llmux.drivers.images.store import ImageStore
from llmux.drivers.transfer.file import open_file, write_file
from llmux.drivers.transfer.header import (
    Header,
    Host,
    localize,
    make_header,
    obstacles,
    taken_pids,
)
from llmux.drivers.transfer.remote import import_there, received_there
from llmux.drivers.transfer.stream import Import, receive_header, send
from llmux.errors import LlmuxError, Reason, Refused
from llmux.small_files import read_small

AskVerb = Callable[[str, dict[str, Any]], Any]
# gets the bytes in all, returns what counts those done
Meter = Callable[[int], Counter]


class ExportedImage:
    """A model's image that fits its host, ready to be sent."""

    def __init__(self, model: str, ask: AskVerb, meter: Meter) -> None:
        salt = secrets.token_hex(16)
        here = typed_json.read(Host, ask("image_here", {"model": model, "salt": salt}))
        if here.image is None:
            raise Refused(
                Reason.NOT_FOUND,
                f"cannot export the image of {model}: {here.reason}",
                hint=f"llmux checkpoint {model} makes one",
            )
        self._model, self._directory, self._meter = model, here.image, meter
        manifest, text = _load(here.image)
        self._header = make_header(manifest, text, here.portable, salt)

    def to_stream(self, out: IO[bytes], resume: str = "") -> None:
        self._send(replace(self._header, first=self._first(resume)), out)

    def to_directory(self, directory: str) -> str:
        def write(file: IO[bytes], first: int, headed: bool) -> None:
            self._send(replace(self._header, first=first), file, headed=headed)

        return write_file(directory, self._header, write)

    def to_host(self, host: str) -> None:
        first = self._first(received_there(host, self._model))
        import_there(host, lambda out: self._send(replace(self._header, first=first), out))

    def _send(self, header: Header, out: IO[bytes], *, headed: bool = True) -> None:
        total = sum(file.size for file in header.manifest.files)
        send(header, self._directory, out, self._meter(total), headed=headed)

    def _first(self, resume: str) -> int:
        """``resume`` is what `images received` printed; after another image, or none, all is sent,
        and the import begins again, too."""
        image, _, number = resume.partition(":")
        return int(number) if image == self._header.id and number.isdecimal() else 0


def _load(directory: str) -> tuple[Manifest, bytes]:
    try:
        manifest = ImageStore(os.path.dirname(directory)).load(directory)
        return manifest, read_small(os.path.join(directory, NAME), MAX_BYTES, links=False)
    except (ManifestError, OSError) as error:
        raise LlmuxError(f"cannot export {directory}: {error}") from error


def received(config: str, model: str) -> str:
    """How much of an image has arrived, for ``export --resume``; ``-`` when none has."""
    found = Import(_store(config).directory(model)).received()
    return "-" if found is None else f"{found[0]}:{found[1]}"


def import_image(
    config: str, source: IO[bytes] | str, ask: AskVerb, meter: Meter
) -> Mapping[str, Any]:
    """Take an image in, from a stream or a file; the result of ``image_adopt`` and ``warnings``."""
    if isinstance(source, str):
        with open_file(source) as file:
            return import_image(config, file, ask, meter)
    header = receive_header(source)
    model = header.manifest.model
    here = typed_json.read(Host, ask("image_here", {"model": model, "salt": header.salt}))
    if problems := obstacles(header, here):
        raise Refused(
            Reason.CANNOT_FIT,
            f"cannot import the image of {model}: it would not work here: {'; '.join(problems)}",
            hint="make both hosts equal in this, or make an image here: llmux checkpoint " + model,
        )
    store = _store(config)
    check_disk(store, model, header.manifest.disk_bytes)
    home = store.receive(model)
    with _alone(home, model):
        arriving = Import(home)
        total = sum(file.size for file in header.manifest.files)
        arriving.run(header, source, meter(total))
        arriving.complete(localize(header, here))
        result = ask("image_adopt", {"model": model})
        arriving.forget_notes()
    taken = taken_pids(header.manifest)
    warning = (
        "the image can be used once processes of this host that have its ids have ended:"
        f" {', '.join(taken[:5])}"
    )
    return {**result, "warnings": [warning] if taken else []}


def _store(config: str) -> ImageStore:
    checkpoint = load_config(config, check_files=False).checkpoint
    return ImageStore(checkpoint.images_dir, max_bytes=checkpoint.max_bytes)


@contextmanager
def _alone(home: str, model: str) -> Iterator[None]:
    fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                Reason.ALREADY_RUNNING, f"cannot import the image of {model}: another import runs"
            ) from None
        yield
    finally:
        os.close(fd)
