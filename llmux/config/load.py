"""The configuration files to frozen values, or ``ConfigError`` with every problem at once.

The file format itself is the tables in ``keys``; defaults are in ``schema``; what involves more
than one key is in ``check``, what the file system has to say in ``host``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from llmux.config.check import Draft, cross_faults
from llmux.config.host import file_faults
from llmux.config.keys import HOMES, MODEL, SCALARS, SECTIONS, TOP
from llmux.config.marks import (
    Entry,
    Fault,
    Items,
    KeyPath,
    Mark,
    Marks,
    Node,
    Scalar,
    Table,
    describe,
    quote,
)
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
)
from llmux.config.sections import Section, Spec, read_section
from llmux.config.sources import read_sources
from llmux.config.vllm_args import GPU_MEMORY, PIPELINE_PARALLEL, TENSOR_PARALLEL, find_flag
from llmux.errors import ConfigError, Problem

MAX_GPUS: Final = 64  # per host; more is a slip of the keyboard
MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class MarkedConfig:
    """A configuration, the places in the files that its values came from, and the keys in them that
    have no effect."""

    config: Config
    marks: Marks
    notes: tuple[Problem, ...] = ()


def load_config(
    path: str | os.PathLike[str],
    *,
    conf_d: str | os.PathLike[str] | None = None,
    check_files: bool = True,
) -> Config:
    """Read the file and, when it is named config.yaml, the drop-ins in the conf.d beside it.

    ``conf_d`` names another folder of drop-ins. ``check_files=False`` is for a process that cannot
    see the models' files, such as the sandboxed gateway. Raises only ``ConfigError``.
    """
    return load_marked(path, conf_d=conf_d, check_files=check_files).config


def load_marked(
    path: str | os.PathLike[str],
    *,
    conf_d: str | os.PathLike[str] | None = None,
    check_files: bool = True,
) -> MarkedConfig:
    """As ``load_config``, with the places of all values for later problems (``check_host``)."""
    sources = read_sources(Path(path), None if conf_d is None else Path(conf_d))
    builder = _Builder(sources.root)
    config = builder.config(sources.files)
    marks = Marks(MappingProxyType(builder.places), sources.root.mark)
    damaged = {fault.mark for fault in sources.faults}  # what stands in there is named already
    faults = [*sources.faults, *(f for f in builder.faults if f.mark not in damaged)]
    if sources.complete:  # half a configuration has false clashes and gaps
        draft = Draft(config, marks, frozenset(fault.path for fault in faults))
        faults += cross_faults(draft)
        if check_files:
            faults += file_faults(draft)
    if faults:
        raise ConfigError(tuple(fault.problem() for fault in _in_file_order(faults, sources.files)))
    notes = tuple(note.problem() for note in _in_file_order(builder.notes, sources.files))
    return MarkedConfig(config, marks, notes)


def _in_file_order(faults: Iterable[Fault], files: Sequence[str]) -> list[Fault]:
    rank = {file: index for index, file in enumerate(files)}

    def key(fault: Fault) -> tuple[int, Mark, str]:
        return rank.get(fault.mark.file, len(rank)), fault.mark, fault.message

    return sorted(faults, key=key)


# --- building -------------------------------------------------------------------------------------


class _Builder:
    """Collects faults and places while it turns the tree into values."""

    def __init__(self, root: Table) -> None:
        self.root = root
        self.faults: list[Fault] = []
        self.notes: list[Fault] = []
        self.places: dict[KeyPath, Mark] = {}

    def config(self, files: tuple[str, ...]) -> Config:
        owner = Fault(self.root.mark, (), "a mapping")
        top = self.read(self.root, TOP, (), owner)
        policy = self.section(top, "policy")
        eviction = policy.pop("eviction", Eviction())
        return Config(
            models=self.models(top, eviction),
            policy=PolicyConfig(**policy),
            checkpoint=CheckpointConfig(**self.section(top, "checkpoint")),
            gateway=GatewayConfig(**self.section(top, "gateway")),
            sources=files,
            **{key: value for key, value in top.values.items() if key in SCALARS},
        )

    def read(self, node: Node, spec: Spec, path: KeyPath, owner: Fault) -> Section:
        section = read_section(node, spec, owner=owner, homes=HOMES)
        self.faults += (fault.under(*path) for fault in section.faults)
        self.notes += (note.under(*path) for note in section.notes)
        for entry in section.entries.values():
            self.remember((*path, entry.key), entry)
        return section

    def remember(self, path: KeyPath, entry: Entry) -> None:
        """The place of a value, and of the items in it: lists of words, eviction, environment."""
        match entry.value:
            case Table(entries=entries):
                self.places[path] = entry.mark
                self.places |= {(*path, inner.key): inner.value.mark for inner in entries}
            case Items(items=items):
                self.places[path] = entry.value.mark
                self.places |= {(*path, index): item.mark for index, item in enumerate(items)}
            case Scalar():
                self.places[path] = entry.value.mark

    def section(self, top: Section, name: str) -> dict[str, Any]:
        entry = top.entries.get(name)
        if entry is None:
            return {}
        owner = Fault(entry.mark, (), f"a mapping of {name} settings")
        return dict(self.read(entry.value, SECTIONS[name], (name,), owner).values)

    def models(self, top: Section, eviction: Eviction) -> Mapping[str, ModelConfig]:
        entry = top.entries.get("models")
        if entry is None or "models" not in top.values:
            return MappingProxyType({})
        if not isinstance(entry.value, Table):
            shape = 'a mapping of model names, such as {"qwen": {"model_path": "Qwen/Qwen3-0.6B"}}'
            message = f"expected {shape}, got {describe(entry.value)}"
            self.faults.append(Fault(entry.value.mark, ("models",), message))
            return MappingProxyType({})
        models = {one.key: self.model(one, eviction) for one in entry.value.entries}
        return MappingProxyType(models)

    def model(self, entry: Entry, eviction: Eviction) -> ModelConfig:
        path: KeyPath = ("models", entry.key)
        error = _name_error(entry.key)
        if error:
            self.faults.append(Fault(entry.mark, path, error))
        owner = Fault(entry.mark, (), "the settings of a model, at least model_path")
        section = self.read(entry.value, MODEL, path, owner)
        self.places[path] = entry.mark
        values = {"model_path": "", "eviction": eviction, **section.values}
        for key, derive in _DERIVED.items():
            try:
                value = derive(values)
                if value is not None:
                    values[key] = value
            except _ArgumentError as error:
                place: KeyPath = (*path, "extra_args", error.index)
                self.faults.append(Fault(self.places[place], place, error.message))
        return ModelConfig(name=entry.key, **values)


def _name_error(name: str) -> str | None:
    if MODEL_NAME.fullmatch(name) and ".." not in name:
        return None
    fitting = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", name)).strip("-._")
    hint = f", for example {quote(fitting)}" if 0 < len(fitting) <= 60 else ""
    return (
        f"cannot use the model name {quote(name)}: it becomes the name of a unit and of a "
        "directory. Use up to 100 letters, digits, dots, dashes and underscores, first a letter "
        f'or digit, without ".." and "/"{hint}'
    )


# --- values that follow from extra_args -----------------------------------------------------------


class _ArgumentError(Exception):
    """What is wrong with the item of ``extra_args`` at ``index``."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index
        self.message = message


def _flag_number(args: Sequence[str], names: Sequence[str], shape: str) -> tuple[int, str] | None:
    """Index and value of an option whose value must match ``shape``; None without the option."""
    flag = find_flag(args, names)
    if flag is None:
        return None
    if flag.value is None or not re.fullmatch(shape, flag.value):
        got = "nothing" if flag.value is None else quote(flag.value)
        raise _ArgumentError(flag.index, f"{flag.name} needs a number, got {got}")
    return flag.index, flag.value


def _derive_gpu_memory(values: Mapping[str, Any]) -> float | None:
    """The share that vLLM is told to take is the share the model claims."""
    shape = r"[0-9]{1,3}(\.[0-9]{0,9})?|\.[0-9]{1,9}"
    found = _flag_number(values.get("extra_args", ()), GPU_MEMORY, shape)
    if found is None:
        return None
    index, text = found
    own = values.get("gpu_memory")
    if not 0 < float(text) <= 1:
        raise _ArgumentError(index, f"{GPU_MEMORY[0]} must be above 0 and up to 1, got {text}")
    if own is not None and own != float(text):
        message = (
            f"{GPU_MEMORY[0]} is {text} here, but gpu_memory is {own:g}; "
            "keep gpu_memory alone, or make them equal"
        )
        raise _ArgumentError(index, message)
    return float(text)


def _derive_gpus(values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """A model spread over N GPUs has the first N of them unless it says which, as under vLLM."""
    size = 1
    for names in (TENSOR_PARALLEL, PIPELINE_PARALLEL):
        found = _flag_number(values.get("extra_args", ()), names, r"0*[1-9][0-9]{0,3}")
        size *= int(found[1]) if found else 1
    return tuple(range(size)) if 1 < size <= MAX_GPUS and "gpus" not in values else None


_DERIVED: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = MappingProxyType(
    {"gpu_memory": _derive_gpu_memory, "gpus": _derive_gpus}
)
