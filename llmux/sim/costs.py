"""What operations take in the simulator: directional, as each model has its own park and wake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llmux.core.plans import PlanKind
from llmux.errors import LlmuxError


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Seconds, and the share of starts and wakes that fail."""

    start: float = 60.0
    wake: float = 5.0
    park: float = 1.0
    stop: float = 1.0
    failures: float = 0.0

    def of(self, kind: PlanKind) -> float:
        match kind:
            case PlanKind.START:
                return self.start
            case PlanKind.WAKE:
                return self.wake
            case PlanKind.PARK:
                return self.park
            case PlanKind.STOP:
                return self.stop


@dataclass(frozen=True, slots=True)
class Costs:
    default: ModelCosts = ModelCosts()
    models: Mapping[str, ModelCosts] = field(default_factory=dict)

    def of(self, model: str) -> ModelCosts:
        return self.models.get(model, self.default)


def costs_from(document: Any) -> Costs:
    """``{"default": {"start": 60, "wake": 5, …}, "models": {"NAME": {"wake": 2}}}``"""
    if not isinstance(document, dict) or set(document) - {"default", "models"}:
        raise LlmuxError('cannot read the costs: expected {"default": {…}, "models": {NAME: {…}}}')
    default = _model_costs(ModelCosts(), document.get("default", {}), "default")
    models = document.get("models", {})
    if not isinstance(models, dict):
        raise LlmuxError("cannot read the costs: models: expected {NAME: {…}}")
    return Costs(default, {name: _model_costs(default, own, name) for name, own in models.items()})


def _model_costs(base: ModelCosts, document: Any, name: str) -> ModelCosts:
    known = {one.name for one in fields(ModelCosts)}
    if not isinstance(document, dict) or set(document) - known:
        raise LlmuxError(f"cannot read the costs of {name}: keys are {', '.join(sorted(known))}")
    for key, value in document.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
            raise LlmuxError(f"cannot read the costs of {name}: {key} must be a number, 0 or more")
    return replace(base, **{key: float(value) for key, value in document.items()})
