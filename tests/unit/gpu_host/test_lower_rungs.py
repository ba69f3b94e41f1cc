"""What only a lower rung of a ladder needs is looked for all the same."""

from __future__ import annotations

from llmux.config.host import check_embedded, check_host
from llmux.config.schema import CheckpointConfig, Config, Eviction, ModelConfig, Process, Weights
from llmux.drivers.doctor.facts import Needs

LADDER = ModelConfig(
    "m",
    "/m",
    eviction=Eviction(Weights.RETAIN, Process.KEEP_RUNNING),
    ladder=(Eviction(Weights.OFFLOAD, Process.CHECKPOINT), Eviction()),
)


def test_the_doctor_knows_what_all_rungs_need() -> None:
    needs = Needs.of(Config(models={"m": LADDER}))
    assert (needs.cuda, needs.criu, needs.sleep, needs.ram) == (True, True, True, True)


def test_a_host_without_criu_is_refused() -> None:
    config = Config(
        models={"m": LADDER},
        vllm_command=("/bin/true",),
        engine_user="root",
        checkpoint=CheckpointConfig(criu_path="/nonexistent/criu"),
    )
    assert "checkpoint.criu_path" in [problem.path for problem in check_host(config)]


def test_one_process_refuses_what_needs_the_service() -> None:
    (problem,) = check_embedded(Config(models={"m": LADDER}))
    assert (problem.path, "it needs root and CRIU" in problem.message) == (
        "models.m.eviction",
        True,
    )
