#!/usr/bin/env python3
"""Start the stand-in engine: `standin.py serve MODEL [vLLM's flags] [--standin-… flags]`.

Kept tiny because Python never caches the byte code of the script itself.
"""

import os
import sys


def _cache_byte_code() -> None:
    """Compiling the package costs more than the whole start-up budget, and in a guest the source
    is mounted read-only: then the byte code goes to a private folder of this user."""
    here = os.path.dirname(os.path.abspath(__file__))
    if os.access(os.path.join(here, "vllm_standin"), os.W_OK):
        return
    folder = f"/tmp/standin-pycache-{os.geteuid()}"
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except OSError:
        return
    # anybody may make names in /tmp: use the folder only if it is ours alone
    status = os.lstat(folder)
    if status.st_uid == os.geteuid() and status.st_mode & 0o170077 == 0o040000:
        sys.pycache_prefix = folder


if __name__ == "__main__":
    _cache_byte_code()
    from vllm_standin.launch import main

    main(sys.argv[1:])
