"""What the checksums of an image take: ``python3 checksums.py IMAGE COUNT``, seconds, one a line.

Runs in the guest as root, with llmux installed.
"""

import pathlib
import sys
import time
from threading import Event

sys.path.insert(0, "/usr/lib/llmux")
sys.dont_write_bytecode = True

from llmux.drivers.images.files import digest_files  # noqa: E402
from llmux.drivers.images.manifest import load_manifest  # noqa: E402

image, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
names = [file.name for file in load_manifest(str(image)).files]
for _ in range(count):
    began = time.monotonic()
    digest_files(str(image), names, punch=False, stop=Event(), count=lambda _: None)
    print(time.monotonic() - began, flush=True)
