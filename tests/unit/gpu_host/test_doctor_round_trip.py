"""The doctor sends a throw-away CUDA process round: here with the fake driver, and without CRIU,
which tests/system/parking/test_cuda_faults.py has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmux.config.schema import CheckpointConfig, Config, Eviction, ModelConfig, Process
from llmux.drivers.doctor import round_trip
from llmux.drivers.doctor.facts import Check, Host, Level, Ran

sys.path[:0] = [str(Path(__file__).parents[2] / "fake_libcuda")]

# ruff: noqa: E402  # the folder has to be on the path first
from fake_cuda import COMPILER, FakeCuda

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(COMPILER is None, reason="no C compiler for the fake libcuda"),
    pytest.mark.timeout(300),
]
NO_CRIU = CheckpointConfig(criu_path="/nothing/criu")
SUSPENDS = ModelConfig("m", "/m", eviction=Eviction(process=Process.CUDA_SUSPEND))
DUMPS = ModelConfig("m", "/m", eviction=Eviction(process=Process.CHECKPOINT))
Look = Callable[..., Check]


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(tmp_path / "cuda")
    monkeypatch.setenv("LLMUX_LIBCUDA", str(fake.library))
    monkeypatch.setenv("LLMUX_LIBNVML", "libnothing.so.1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(round_trip, "SIZE", 1 << 20)
    return fake


def look(*models: ModelConfig) -> Check:
    config = Config(models={model.name: model for model in models}, checkpoint=NO_CRIU)
    return round_trip.check_round_trip(Host(user_exists=lambda _: False), config)


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.glob("llmux-doctor-*")]


def test_the_bytes_come_back(cuda: FakeCuda, tmp_path: Path) -> None:
    check = look(SUSPENDS)
    assert check.seen.startswith("GPU 0: bytes equal: start "), check
    assert "only suspend and resume were tried: " in check.seen
    assert check.level is Level.WARN, "no configured model needs CRIU"
    steps = ("start", "suspend", "resume", "compare")
    assert set(check.measured) == {f"gpu0_{step}_seconds" for step in steps}
    # Locked and copied away twice: the second time so that it can be ended.
    calls = [call for call, _ in cuda.log() if call != "context" and call != "alloc"]
    assert calls == ["lock", "checkpoint", "restore", "unlock", "lock", "checkpoint"]
    assert cuda.hung_hosts() == []
    assert left(tmp_path) == []
    assert look(DUMPS).level is Level.FAIL, "a configured model needs CRIU"


def test_each_gpu_has_its_own(cuda: FakeCuda) -> None:
    cuda.set_gpus(2)
    check = look()
    assert "GPU 0: bytes equal: " in check.seen
    assert "GPU 1: bytes equal: " in check.seen


def test_bytes_that_are_others_fail(cuda: FakeCuda, tmp_path: Path) -> None:
    cuda.mode("forgets")
    check = look()
    assert check.level is Level.FAIL
    assert "GPU 0: compare failed (after start " in check.seen
    assert "its bytes on the GPU are others" in check.seen
    assert cuda.hung_hosts() == []
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "words", "seen"),
    [
        ("context", "fail 2", "cannot use GPU 0: cuDevicePrimaryCtxRetain: out of memory (2)"),
        ("checkpoint", "fail 801", "suspend failed"),
        ("restore", "fail 304", "resume failed"),
        ("cuInit", "fail 999", "cuInit: CUDA error 999"),
    ],
)
def test_what_fails_is_named(
    cuda: FakeCuda, tmp_path: Path, call: str, words: str, seen: str
) -> None:
    cuda.fault(call, words)
    check = look(SUSPENDS)
    assert check.level is Level.FAIL
    assert seen in check.seen
    assert cuda.hung_hosts() == []
    assert left(tmp_path) == []


def test_a_process_without_cuda_state_is_no_success(cuda: FakeCuda) -> None:
    cuda.mode("cuinit_only")
    check = look()
    assert check.level is Level.FAIL
    assert "the driver sees no CUDA state in it" in check.seen


def test_no_gpu_is_said_and_nothing_measured(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.set_gpus(0)
    check = look()
    assert (check.level, check.seen) == (Level.OK, "not measured: no GPU")
    assert look(SUSPENDS).level is Level.FAIL
    monkeypatch.setenv("LLMUX_LIBCUDA", "libnothing.so.1")
    check = look()
    assert (check.level, check.seen, check.measured) == (Level.OK, "not measured: no GPU", {})


def test_a_trip_that_says_nothing_fails(cuda: FakeCuda) -> None:
    answers = iter([Ran(0, "1"), Ran(None, "")])
    host = Host(run=lambda *_: next(answers))
    check = round_trip.check_round_trip(host, None)
    assert (check.level, check.seen) == (Level.FAIL, "no answer within 540 s")
