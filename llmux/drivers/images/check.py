"""May an image be given to CRIU? Owners, modes, names, sizes; not the bytes.

An image is executable input for root: it becomes processes with the users and memory that it names.
"""

from __future__ import annotations

import os

from llmux.drivers.images.manifest import NAME, Manifest, ManifestError, load_manifest
from llmux.trusted import unsafe_directory, unsafe_file


def load_image(path: str) -> Manifest:
    """The manifest of an image whose owners, modes, names and sizes are right; bytes are not read.

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
                    raise ManifestError(f"{full} is not in the manifest")
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
