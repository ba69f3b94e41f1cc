"""The head of an image's stream: what is sent, and what its host must have in common with ours.

An image is executable input for root, and its source is trusted as root of that host is. What is
checked here is that it can work: the same engine, user, files, kernel and processor. What cannot be
the same (boot, inodes, times) is replaced with this host's own before the image is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

from llmux import typed_json
from llmux.drivers.criu.known_files import look
from llmux.drivers.images import manifest as manifests
from llmux.drivers.images.files import SEGMENT
from llmux.drivers.images.identity import content_stamp
from llmux.drivers.images.manifest import KnownFile, Manifest
from llmux.errors import LlmuxError
from llmux.typed_json import BadJson

VERSION: Final = 1
NAME: Final = "llmux-image.json"
MAX_BYTES: Final = 2 * manifests.MAX_BYTES
_FILE_NAME: Final = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)?[A-Za-z0-9_-][A-Za-z0-9._-]*")
_MAX_NAME: Final = 80  # with the segment's number it fits into a tar header's 100 bytes
_ID: Final = re.compile(r"[0-9a-f]{32}")
_SALT: Final = re.compile(r"[0-9a-f]{32,64}")


class BadStream(LlmuxError):
    """What arrives is not an image's stream, or not the one that was begun."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(f"cannot import: {message}", hint=hint)


@dataclass(frozen=True, slots=True)
class PathFacts:
    """A path outside the image that its engine has open. ``state`` of a regular file: its size and
    a checksum; ``device`` of a device file: its number."""

    path: str
    mode: int
    uid: int
    state: str | None = None
    device: int = 0


@dataclass(frozen=True, slots=True)
class Host:
    """What the supervisor says of a model as configured on its host, answering verb image_here.

    ``image``: the path of its image; ``reason``: why there is none that fits. ``identity``: what a
    manifest must have here; ``portable``: what other hosts are compared by.
    """

    model: str
    image: str | None
    reason: str | None
    identity: Mapping[str, str]
    portable: Mapping[str, str]
    runtime_dir: str
    outputs: tuple[str, ...]
    uds: str | None
    port: int | None
    criu: str


@dataclass(frozen=True, slots=True)
class Header:
    """``id`` names the image; ``first`` is the number of the first segment in this stream."""

    id: str
    first: int
    salt: str
    portable: Mapping[str, str]
    paths: tuple[PathFacts, ...]
    manifest: Manifest

    def to_json(self) -> bytes:
        body = {**asdict(self), "version": VERSION, "manifest_version": manifests.VERSION}
        return json.dumps(body, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises BadStream. Everything in it is of its type and within its bounds."""
        try:
            body = typed_json.parse(data)
            if not isinstance(body, dict):
                raise BadJson("it is not a JSON object")
            for key, ours in ("version", VERSION), ("manifest_version", manifests.VERSION):
                if body.get(key) != ours:
                    raise BadJson(f"its {key} is {body.get(key)!r}, this llmux writes {ours}")
            header = typed_json.read(cls, body)
        except BadJson as error:
            raise BadStream(f"the head of the stream cannot be read: {error}") from error
        if problem := next(_bounds(header), None):
            raise BadStream(f"the head of the stream is wrong: {problem}")
        return header


def _bounds(header: Header) -> Iterator[str]:
    if not _ID.fullmatch(header.id) or not _SALT.fullmatch(header.salt) or header.first < 0:
        yield "its id, salt or first segment"
    manifest = header.manifest
    names = [file.name for file in manifest.files]
    if len(set(names)) != len(names) or not names:
        yield "a file is listed twice, or none is"
    directories = {os.path.dirname(name) for name in names}
    for file in manifest.files:
        if len(file.name) > _MAX_NAME or not _FILE_NAME.fullmatch(file.name):
            yield f"{file.name[:100]!r} is not the name of an image's file"
        if file.name in (manifests.NAME, *directories):
            yield f"{file.name} cannot be an image's file"
        if file.size < 0 or len(file.sums) != -(-file.size // SEGMENT):
            yield f"{file.name} has {len(file.sums)} checksums for {file.size} bytes"
    sizes = {file.name: file.size for file in manifest.files}
    for group in manifest.shm:
        if sizes.get(group.file) != group.size or group.mode & ~0o777:
            yield f"{group.file} of /dev/shm is not in it as it says"
        for name in group.names:
            if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
                yield f"{name[:100]!r} is not the name of a file in /dev/shm"
        if not group.names:
            yield f"{group.file} has no name in /dev/shm"
    tids = [tid for process in manifest.processes for tid in process.tids]
    if not tids or min(tids) < 2 or manifest.root_pid not in tids:
        yield "its process ids"
    for path in (*(facts.path for facts in header.paths), *manifest.unix_paths):
        if not path.startswith("/") or os.path.normpath(path) != path or "\0" in path:
            yield f"{path[:100]!r} is not an absolute path"
    if {facts.path for facts in header.paths} != {file.path for file in manifest.known}:
        yield "the paths of its manifest differ from those described"
    yield from manifests.out_of_range(manifest)


def make_header(manifest: Manifest, text: bytes, portable: Mapping[str, str], salt: str) -> Header:
    """Describe an image that fits this host; ``text`` is its manifest's. Reads the files that its
    engine has open. Raises LlmuxError when one is not there as the image needs it."""
    paths = []
    for known in manifest.known:
        try:
            found = _facts(known.path)
        except OSError as error:
            raise LlmuxError(
                f"cannot export the image of {manifest.model}: {known.path}: {error.strerror}"
            ) from error
        paths.append(found)
    digest = hashlib.sha256(text).hexdigest()[:32]
    return Header(digest, 0, salt, dict(portable), tuple(paths), manifest)


def _facts(path: str) -> PathFacts:
    known = look(path)
    state = content_stamp(path) if stat.S_ISREG(known.mode) else None
    special = stat.S_ISCHR(known.mode) or stat.S_ISBLK(known.mode)
    return PathFacts(path, known.mode, known.uid, state, os.stat(path).st_rdev if special else 0)


def obstacles(header: Header, here: Host) -> list[str]:
    """Why the image cannot serve on this host, by name; empty when it can."""
    manifest = header.manifest
    found = list(_differences(header.portable, here.portable, _ignored(manifest)))
    if _version(here.criu) < _version(manifest.criu):
        found.append(f"criu made it in version {manifest.criu} and is {here.criu or 'absent'} here")
    own = []
    if (kept := manifest.runtime_dir) is not None:
        own.append(kept.path)
        if kept.path != here.runtime_dir:
            found.append(f"runtime directory: {kept.path} there, {here.runtime_dir} here")
        if kept.uid != int(here.portable.get("uid", -1)):
            found.append(f"uid: {kept.path} belongs to user {kept.uid}, which the engine is not")
    for kept in manifest.append_files:
        own.append(kept.path)
        if kept.path not in here.outputs:
            found.append(f"output: {kept.path} is not a file of this model's output here")
    recipe = manifest.recipe
    if (recipe.get("uds"), recipe.get("port")) != (here.uds, here.port if not here.uds else None):
        found.append("address: the engine listens elsewhere here")
    found += _path_obstacles(header.paths, frozenset(own))
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _ignored(manifest: Manifest) -> frozenset[str]:
    """Without CUDA state an image fits every GPU of its kind; with it, only the one it was on."""
    if manifest.recipe.get("cuda_pids"):
        return frozenset()
    return frozenset(key for key in manifest.identity if key.endswith(".GPU UUID"))


def _differences(
    there: Mapping[str, str], here: Mapping[str, str], ignore: frozenset[str]
) -> Iterator[str]:
    for key in sorted({*there, *here} - ignore):
        theirs, ours = there.get(key, "not known"), here.get(key, "not known")
        if theirs != ours:
            yield f"{key}: {theirs[:200]} there, {ours[:200]} here"


def _path_obstacles(paths: Sequence[PathFacts], ours: frozenset[str]) -> Iterator[str]:
    for there in paths:
        if there.path in ours:
            continue  # llmux makes it again
        try:
            here = _facts(there.path)
        except OSError as error:
            yield f"path {there.path}: {error.strerror}"
            continue
        for name in ("uid", "mode", "device", "state"):
            old, new = getattr(there, name), getattr(here, name)
            if old != new:
                text = (f"{old:o}", f"{new:o}") if name == "mode" else (old, new)
                yield f"path {there.path}: its {name} is {text[0]} there and {text[1]} here"
                break


def localize(header: Header, here: Host) -> Manifest:
    """The manifest for this host. Raises LlmuxError when a path went away since the check."""
    manifest = header.manifest
    known = []
    for facts in header.paths:
        try:
            known.append(look(facts.path))
        except OSError:
            # llmux's own, made before the restore: see criu/host.put_right
            known.append(KnownFile(facts.path, 0, 0, facts.uid, facts.mode))
    recipe: dict[str, Any] = {**manifest.recipe, "identity": dict(here.identity)}
    return replace(manifest, identity=dict(here.identity), recipe=recipe, known=tuple(known))


def taken_pids(manifest: Manifest, proc: str = "/proc") -> list[str]:
    """Ids of the image that processes of this host have now."""
    taken = []
    for process in manifest.processes:
        for tid in process.tids:
            with suppress(OSError), open(f"{proc}/{tid}/comm") as file:
                taken.append(f"{tid} ({file.read().strip()})")
    return taken
