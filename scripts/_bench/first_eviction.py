"""What the next model waits for when one leaves its GPU for the first time.

No image is there to be reused, so one is made. The engines are vLLM on the CPU, and processes of a
fake CUDA driver that moves nothing: the suspend costs nothing, the dump what it costs.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from typing import Any

from _bench.engines import MODELS, Engines, configuration

CUDA = "/var/tmp/cuda"
DROP_IN = "/etc/systemd/system/llmux.service.d/bench-cuda.conf"
MARK = """
for pid in $(cat /sys/fs/cgroup/llmux.slice/llmux-$1.scope/engine/cgroup.procs); do
    echo 0 > $2/procs/$pid
done
"""

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests/fake_libcuda"))


def measure(engines: Engines) -> dict[str, float]:
    install_driver(engines)
    try:
        return _measure(engines)
    finally:
        engines.end()
        engines.guest.run(["rm", DROP_IN])
        engines.guest.run(["systemctl", "daemon-reload"])


def install_driver(engines: Engines) -> None:
    from fake_cuda import FakeCuda  # needs a compiler

    guest = engines.guest
    guest.run(["install", "-d", "-m", "0777", f"{CUDA}/procs", f"{CUDA}/faults"])
    with tempfile.TemporaryDirectory() as directory:
        library = FakeCuda(pathlib.Path(directory)).library.read_bytes()
    guest.write(f"{CUDA}/libcuda.so.1", library, mode=0o755)
    guest.write(DROP_IN, f"[Service]\nEnvironment=LLMUX_LIBCUDA={CUDA}/libcuda.so.1\n")
    guest.run(["systemctl", "daemon-reload"])


def _measure(engines: Engines) -> dict[str, float]:
    leaving, coming = MODELS[:2]
    engines.start(configuration("retain+checkpoint"))
    engines.turns([leaving])
    engines.guest.run(["sh", "-c", MARK, "mark", leaving, CUDA])
    (turn,) = engines.turns([coming])
    engines.guest.run(["llmux", "sleep", leaving], timeout=300)  # returns when it is parked
    image: dict[str, Any] = engines.image(leaving)
    return {
        "next_model_waits_s": turn.switch["drain_secs"] + turn.switch["park_secs"],
        "dump_s": image["dump_seconds"],
        "image_bytes_apparent": image["apparent_bytes"],
        "next_model_first_token_s": turn.first_token_s,
    }
