"""The throw-away process of ``llmux doctor --cuda``: a CUDA context with known bytes on a GPU.

Started by ``trip.py`` as ``python3 -I -c SOURCE LIBRARY DIRECTORY BYTES``, on the GPU that
CUDA_VISIBLE_DEVICES names; imports nothing of llmux. It opens no socket and no pipe, so that CRIU
can dump it: it answers by files in DIRECTORY. ``ready`` or ``failed`` after the start; ``equal`` or
``differ`` after each SIGUSR1, when it has read its bytes back. SIGTERM ends it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys

LIFE_SECS = 900.0  # it ends by itself when whoever started it is gone
COMMANDS = {signal.SIGUSR1, signal.SIGTERM}


def answer(directory: str, name: str, text: str = "") -> None:
    """By rename: whoever finds the file finds all of it."""
    path = os.path.join(directory, name)
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


class Gpu:
    """The first GPU that this process sees, with a context and ``size`` bytes of known content."""

    def __init__(self, library: str, size: int) -> None:
        self._cuda = ctypes.CDLL(library)
        self._device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._address = ctypes.c_uint64()
        self._size = ctypes.c_size_t(size)
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(self._device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.call("cuCtxSetCurrent", self._context)
        self.call("cuMemAlloc_v2", ctypes.byref(self._address), self._size)
        content = os.urandom(size)
        self._digest = hashlib.sha256(content).digest()
        self.call("cuMemcpyHtoD_v2", self._address, content, self._size)

    def is_equal(self) -> bool:
        back = ctypes.create_string_buffer(self._size.value)
        self.call("cuMemcpyDtoH_v2", back, self._address, self._size)
        return hashlib.sha256(back.raw).digest() == self._digest

    def release(self) -> None:
        self.call("cuMemFree_v2", self._address)
        self.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def call(self, function: str, *arguments: object) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(words))
            text = (words.value or b"unknown error").decode(errors="replace")
            raise RuntimeError(f"{function}: {text} ({code})")


def main(library: str, directory: str, size: int) -> None:
    # Before the driver makes its threads, which inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, COMMANDS)
    try:
        gpu = Gpu(library, size)
    except (OSError, RuntimeError, AttributeError) as error:
        answer(directory, "failed", str(error))
        return
    answer(directory, "ready")
    while (command := signal.sigtimedwait(COMMANDS, LIFE_SECS)) is not None:
        if command.si_signo == signal.SIGTERM:
            break
        try:
            answer(directory, "equal" if gpu.is_equal() else "differ")
        except RuntimeError as error:
            answer(directory, "differ", str(error))
    gpu.release()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
