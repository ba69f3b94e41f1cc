"""May an image be given to CRIU? Owners, modes, names, sizes; not the bytes.

An image is executable input for root: it becomes processes with the users and memory that it names.
"""

from __future__ import annotations

import os
import stat

from llmux.drivers.images_manifest import NAME, Manifest, ManifestError, load_manifest


def load_image(path: str) -> Manifest:
    """The manifest of an image that is safe and whole as far as names and sizes tell.

    Raises ManifestError.
    """
    try:
        if not os.path.isdir(path) or os.path.islink(path):
            raise ManifestError(f"{path} is not a directory")
        if reason := unsafe_directory(path):
            raise ManifestError(f"it is not safe: {reason}")
        manifest = load_manifest(path)
        known = {file.name for file in manifest.files} | {NAME}
        for root, _, files in os.walk(path):
            for name in files:
                full = os.path.join(root, name)
                if reason := unsafe_file(full):
                    raise ManifestError(f"it is not safe: {reason}")
                if name.endswith(".img") and os.path.relpath(full, path) not in known:
                    raise ManifestError(f"{full} is not part of it")
        for file in manifest.files:
            if os.path.normpath(file.name) != file.name or file.name.startswith(("/", "..")):
                raise ManifestError(f"the file name {file.name!r} leads out of it")
            size = os.lstat(os.path.join(path, file.name)).st_size
            if size != file.size:
                raise ManifestError(
                    f"{file.name} has {size} bytes and should have {file.size}:"
                    " it was cut or changed"
                )
    except FileNotFoundError as error:
        raise ManifestError(f"{error.filename} is missing") from error
    except OSError as error:
        raise ManifestError(f"it cannot be read: {error}") from error
    return manifest


def unsafe_directory(directory: str) -> str | None:
    """Why root must not trust what is in ``directory``; None when only we could have put it there.

    An image is executable input for root: it becomes processes with the users and memory that it
    names.
    """
    trusted = {0, os.geteuid()}
    for path in (os.path.abspath(directory), os.path.realpath(directory)):
        while True:
            status = os.lstat(path)
            if status.st_uid not in trusted:
                return f"{path} belongs to user {status.st_uid}"
            link = stat.S_ISLNK(status.st_mode)
            # In a sticky directory (/tmp) nobody but the owner can rename or remove an entry.
            if not link and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
                return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
            if path == "/":
                break
            path = os.path.dirname(path)
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    if mode & 0o077:
        return f"{directory} is open to others (mode {mode:o})"
    return None


def unsafe_file(path: str) -> str | None:
    """Why a file of an image must not be given to CRIU; None when it is all right."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a plain file"
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None
