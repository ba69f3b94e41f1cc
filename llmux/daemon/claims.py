"""What a configuration may take of host memory and disk, by what the supervisor itself asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmux.config.schema import Config, Eviction, ModelConfig, Process, Weights
from llmux.core.records import parked_share
from llmux.drivers.cuda.host_memory import required_host_bytes
from llmux.drivers.doctor.facts import Claim
from llmux.drivers.images.identity import model_identity
from llmux.engines.parking import SUSPENDING
from llmux.ports import LaunchSpec
from llmux.runtime.engines.other_plans import offload_bytes, weights_bytes


def planned_claims(
    config: Config, starts: Sequence[LaunchSpec], totals: Mapping[int, int]
) -> Sequence[Claim]:
    """Of each rung of each model. ``totals``: each GPU's memory."""
    claims = []
    for spec in starts:
        model = config.models[spec.model]
        identity = model_identity(model.model_path, spec.env)
        claims += [_claim(model, rung, identity, totals) for rung in model.rungs]
    return claims


def _claim(
    model: ModelConfig, rung: Eviction, identity: Mapping[str, str], totals: Mapping[int, int]
) -> Claim:
    weights: int | None = 0
    host: int | None = 0
    if rung.weights is Weights.OFFLOAD:
        weights = weights_bytes(identity) or None
        host = offload_bytes(identity) or None
    if rung.process not in SUSPENDING:
        return Claim(model.name, rung, host, None)
    moved = _bytes_on_gpus(model, rung, totals)  # into host memory, behind offloaded weights
    if moved is None or weights is None:
        return Claim(model.name, rung, None, None)
    image = weights + moved if rung.process is Process.CHECKPOINT else None
    return Claim(model.name, rung, weights + required_host_bytes(moved), image)


def _bytes_on_gpus(model: ModelConfig, rung: Eviction, totals: Mapping[int, int]) -> int | None:
    """What is on the GPUs after the sleep; None where the GPUs are not known."""
    asleep = Eviction(rung.weights, Process.KEEP_RUNNING)
    if isinstance(model.gpus, int):  # whichever are free: the largest, at the most
        sizes = sorted(totals.values(), reverse=True)[: model.gpus]
    else:
        sizes = [totals[gpu] for gpu in model.gpus if gpu in totals]
    count = model.gpus if isinstance(model.gpus, int) else len(model.gpus)
    return int(sum(sizes) * parked_share(model, asleep)) if len(sizes) == count else None
