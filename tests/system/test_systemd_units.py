"""Scopes, freezer and journal for real: the contracts and the guest_*.py tests, inside guests.

pytest itself is carried into the guest from here; everything else there is what the distribution
ships, so the drivers meet the library versions of Debian 12 and of Debian 13.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from _lab.guest import Guest  # noqa: E402 (the path first)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a guest with its own PID 1"),
    pytest.mark.timeout(600),  # the first run builds the image
]

# Pure Python all of them: they run under the guest's interpreter, whatever its version.
CARRIED = (
    "pytest",
    "_pytest",
    "py",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
    "pytest_timeout",
)
PROJECT = "/mnt/project"
TOOLS = "/mnt/tools"


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    tools = tmp_path_factory.mktemp("tools")
    for name in CARRIED:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed here"
        assert spec.origin is not None
        origin = Path(spec.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        _copy(source, tools / source.name)
    tools.chmod(0o755)
    shares = [f"{ROOT}:{PROJECT}", f"{tools}:{TOOLS}"]
    with Guest.up(suite=request.param, bind_ro=shares) as started:
        yield started


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


@pytest.mark.parametrize("where", ["contracts", "system/guest_units.py", "system/guest_output.py"])
def test_in_the_guest(guest: Guest, where: str) -> None:
    done = guest.run(
        [
            "env",
            "LLMUX_IN_GUEST=1",
            "PYTHONDONTWRITEBYTECODE=1",
            f"PYTHONPATH={TOOLS}:{PROJECT}:{PROJECT}/tests/contracts",
            "python3",
            "-m",
            "pytest",
            "-q",
            "-rP",
            "-p",
            "pytest_timeout",
            "-p",
            "no:cacheprovider",
            "-c",
            f"{PROJECT}/pyproject.toml",
            "--rootdir",
            PROJECT,
            # Guests have no compiler for the fake NVML, and observers no part in a distribution.
            f"--ignore={PROJECT}/tests/contracts/test_contract_gpu.py",
            f"{PROJECT}/tests/{where}",
        ],
        check=False,
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
