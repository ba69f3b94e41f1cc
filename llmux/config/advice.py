"""Notes on settings that are valid and will probably not work. Part of loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from llmux.config.check import Draft
from llmux.config.files.marks import Fault, KeyPath
from llmux.config.schema import GPU_RESIDUE, ModelConfig
from llmux.engines.options import SECRET_OPTION, split_option

WITHOUT_KEYS: Final = (
    "gateway.keys_file is not set: without a key every client that can connect may use the models"
    " and read their state; orders and /logs need the llmux command (root, group llmux-admin) or an"
    " admin key"
)
FAST: Final = 100.0  # tokens per second of one stream; most engines give less
_STEPS: Final = 1000  # shares of a GPU are compared in thousandths


def advice(draft: Draft) -> list[Fault]:
    return [*_full_gpus(draft), *_secrets(draft), *_cuts(draft)]


def _full_gpus(draft: Draft) -> Iterator[Fault]:
    """Claims that fit together on paper: engines need room beyond their share (CUDA contexts,
    graphs), so that the last one to start finds less than it was told to take."""
    by_gpu: dict[int, list[ModelConfig]] = {}
    for name, model in draft.config.models.items():
        if draft.sound(("models", name)):
            for gpu in _gpus(model):
                by_gpu.setdefault(gpu, []).append(model)
    seen: set[frozenset[str]] = set()
    for gpu, models in sorted(by_gpu.items()):
        full = _full_set(models)
        names = frozenset(model.name for model in full)
        if full and names not in seen:
            seen.add(names)
            total = sum(model.gpu_memory for model in full)
            path: KeyPath = ("models", full[-1].name)
            yield draft.marks.fault(
                (*path, "gpu_memory") if draft.is_set((*path, "gpu_memory")) else path,
                f"{', '.join(sorted(names))} fit together on GPU {gpu} and claim {total:g} of it: "
                "CUDA contexts and graphs come on top, so the last to start may find too little "
                f"memory; keep the sum below {1 - GPU_RESIDUE:g}",
            )


def _full_set(models: list[ModelConfig]) -> tuple[ModelConfig, ...]:
    """Several models whose claims fit on one GPU and leave no room for contexts; else nothing."""
    sums: dict[int, tuple[ModelConfig, ...]] = {0: ()}
    for model in models:
        claim = round(model.gpu_memory * _STEPS)
        for total, members in list(sums.items()):
            if total + claim <= _STEPS:
                sums.setdefault(total + claim, (*members, model))
    limit = round((1 - GPU_RESIDUE) * _STEPS)
    full = [members for total, members in sums.items() if total > limit and len(members) > 1]
    return max(full, key=len, default=())


def _secrets(draft: Draft) -> Iterator[Fault]:
    for name, model in draft.config.models.items():
        for index, argument in enumerate(model.extra_args):
            option, _ = split_option(argument)
            path: KeyPath = ("models", name, "extra_args", index)
            if SECRET_OPTION.match(option) and draft.sound(("models", name)):
                yield draft.marks.fault(
                    path,
                    f"the value of {option} shows in the process list to every user; use a "
                    "variable in `env` or a file",
                )


def _cuts(draft: Draft) -> Iterator[Fault]:
    """Answers that the models' own limits allow and the drain does not, even at a good speed."""
    path: KeyPath = ("policy", "drain_timeout_secs")
    policy = draft.config.policy
    if draft.is_set(path) or not policy.drain_before_switch or not draft.sound(path, ("models",)):
        return
    longest = {
        name: model.max_model_len / FAST
        for name, model in draft.config.models.items()
        if model.max_model_len is not None and not model.never_evict and _leaves(draft, model)
    }
    cut = sorted(name for name, secs in longest.items() if secs > policy.drain_timeout_secs)
    if cut:
        most = max(cut, key=longest.__getitem__)
        tokens = draft.config.models[most].max_model_len
        yield draft.marks.fault(
            ("models", cut[0]),
            f"answers of {', '.join(cut)} may be cut when another model is waited for:"
            f" {most} may answer for {longest[most]:.0f} s ({tokens} tokens, {FAST:g} a second),"
            f" policy.drain_timeout_secs is"
            f" {policy.drain_timeout_secs:g} by default; set it to what they may take, or to a"
            " limit that you mean",
        )


def _leaves(draft: Draft, model: ModelConfig) -> bool:
    """Is there another model that it cannot be resident with?"""
    return any(
        other is not model
        and (
            any({model.name, other.name} <= set(group) for group in draft.config.exclusive)
            or (bool(_gpus(model) & _gpus(other)) and model.gpu_memory + other.gpu_memory > 1)
        )
        for other in draft.config.models.values()
    )


def _gpus(model: ModelConfig) -> set[int]:
    return set(range(model.gpus) if isinstance(model.gpus, int) else model.gpus)
