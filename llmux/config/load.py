"""Load the configuration files into frozen values, or raise ``ConfigError`` with every problem.

The file format is the tables in ``keys``; defaults are in ``schema``; checks that involve several
keys are in ``check``, those of files and programs in ``host``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from llmux.config.advice import advice
from llmux.config.check import Draft, cross_faults
from llmux.config.files.marks import (
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
from llmux.config.files.sources import Candidate, read_sources
from llmux.config.host import file_faults
from llmux.config.keys import HOMES, MODEL, SCALARS, SECTIONS, TOP
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
)
from llmux.config.sections import Section, Spec, read_section
from llmux.engines import DEFAULT_ENGINE, ENGINE_TYPES
from llmux.engines.engine_type import EngineType
from llmux.engines.options import find_option, split_option
from llmux.errors import ConfigError, Problem

MAX_GPUS: Final = 64  # per host; more is a typing error
# Escaped (llmux/names.py) it is part of a unit's name, which systemd bounds to 255 characters.
_PART: Final = "[A-Za-z0-9][A-Za-z0-9._-]*"
MODEL_NAME: Final = re.compile(rf"(?=.{{1,100}}\Z){_PART}(?:/{_PART}){{0,7}}")


@dataclass(frozen=True, slots=True)
class MarkedConfig:
    """A configuration, the places of its values, and notes on keys that have no effect."""

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
    tolerate_files: bool = False,
    candidate: Candidate | None = None,
) -> MarkedConfig:
    """As ``load_config``, with the places of all values, which ``host.check_host`` reports.

    The configuration is read as it would be with the ``candidate`` in its place. With
    ``tolerate_files`` a missing file or GPU is a note: it concerns the models that need it.
    """
    sources = read_sources(Path(path), None if conf_d is None else Path(conf_d), candidate)
    builder = _Builder(sources.root)
    config = builder.config(sources.files)
    marks = Marks(MappingProxyType(builder.places), sources.root.mark)
    damaged = {fault.mark for fault in sources.faults}  # reported already
    faults = [*sources.faults, *(f for f in builder.faults if f.mark not in damaged)]
    if sources.complete:  # half a configuration has false clashes
        draft = Draft(config, marks, frozenset(fault.path for fault in faults))
        faults += cross_faults(draft)
        builder.notes += advice(draft)
        if check_files and tolerate_files:
            builder.notes += file_faults(draft)
        elif check_files:
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
        evictions = policy.pop("eviction", (Eviction(),))
        return Config(
            models=self.models(top, evictions),
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
        """Keep the place of a value and of its items (lists, eviction, environment)."""
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

    def models(self, top: Section, evictions: tuple[Eviction, ...]) -> Mapping[str, ModelConfig]:
        entry = top.entries.get("models")
        if entry is None or "models" not in top.values:
            return MappingProxyType({})
        if not isinstance(entry.value, Table):
            shape = 'a mapping of model names, such as {"qwen": {"model_path": "Qwen/Qwen3-0.6B"}}'
            message = f"expected {shape}, got {describe(entry.value)}"
            self.faults.append(Fault(entry.value.mark, ("models",), message))
            return MappingProxyType({})
        models = {one.key: self.model(one, evictions) for one in entry.value.entries}
        return MappingProxyType(models)

    def model(self, entry: Entry, evictions: tuple[Eviction, ...]) -> ModelConfig:
        path: KeyPath = ("models", entry.key)
        error = _name_error(entry.key)
        if error:
            self.faults.append(Fault(entry.mark, path, error))
        owner = Fault(entry.mark, (), "the settings of a model, at least model_path")
        section = self.read(entry.value, MODEL, path, owner)
        self.places[path] = entry.mark
        values = {"model_path": "", "eviction": evictions, **section.values}
        values["eviction"], *values["ladder"] = values["eviction"]
        values["ladder"] = tuple(values["ladder"])
        values |= self.derived(values, path)
        return ModelConfig(name=entry.key, **values)

    def derived(self, values: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """Values that follow from the model's ``extra_args``; faults in those are collected."""
        engine = ENGINE_TYPES[values.get("engine", DEFAULT_ENGINE)]
        derived: dict[str, Any] = {}
        errors = list(_argument_errors(values.get("extra_args", ()), engine))
        for key, derive in () if errors else _DERIVED.items():
            try:
                value = derive(values, engine)
                if value is not None:
                    derived[key] = value
            except _ArgumentError as error:
                errors.append(error)
        for wrong in errors:
            place: KeyPath = (*path, "extra_args", wrong.index)
            self.faults.append(Fault(self.places[place], place, wrong.message))
        return derived


def _name_error(name: str) -> str | None:
    if MODEL_NAME.fullmatch(name) and ".." not in name:
        return None
    fitting = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._/-]+", "-", name))
    fitting = re.sub(r"[-._]*/[-._/]*", "/", fitting).strip("-._/")
    usable = len(fitting) <= 60 and MODEL_NAME.fullmatch(fitting)
    hint = f", for example {quote(fitting)}" if usable else ""
    return (
        f"cannot use the model name {quote(name)}: it becomes the name of a unit and of a "
        "directory. Use up to 100 letters, digits, dots, dashes and underscores, in up to 8 parts "
        f'with "/" between them, each first a letter or digit, without ".."{hint}'
    )


# --- values that follow from extra_args -----------------------------------------------------------


class _ArgumentError(Exception):
    """A problem with the item of ``extra_args`` at ``index``."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index
        self.message = message


def _argument_errors(args: Sequence[str], engine: EngineType) -> Iterator[_ArgumentError]:
    """Find words that are not allowed in ``extra_args``."""
    for index, argument in enumerate(args):
        name, _ = split_option(argument)
        option = re.match(r"(--?[A-Za-z][\w.-]*)\s+(.*)", argument, re.DOTALL)
        if name in engine.owned_options:
            remedy = engine.owned_options[name]
            yield _ArgumentError(index, f"cannot pass {name} to {engine.title}: {remedy}")
        elif option:
            yield _ArgumentError(
                index,
                "option and value are in one text; there is no shell to split them, write two "
                f"items: {quote(option[1])}, {quote(option[2])}",
            )
    for index, message in engine.argument_faults(args):
        yield _ArgumentError(index, message)


def _option_number(args: Sequence[str], names: Sequence[str], shape: str) -> tuple[int, str] | None:
    """Return (index, value) of an option whose value must match ``shape``; None without it."""
    flag = find_option(args, names)
    if flag is None:
        return None
    if flag.value is None or not re.fullmatch(shape, flag.value):
        got = "nothing" if flag.value is None else quote(flag.value)
        raise _ArgumentError(flag.index, f"{flag.name} needs a number, got {got}")
    return flag.index, flag.value


def _derive_gpu_memory(values: Mapping[str, Any], engine: EngineType) -> float | None:
    """A model claims the share that its engine is told to take."""
    shape = r"[0-9]{1,3}(\.[0-9]{0,9})?|\.[0-9]{1,9}"
    found = _option_number(values.get("extra_args", ()), engine.gpu_memory_option, shape)
    if found is None:
        return None
    index, text = found
    own, name = values.get("gpu_memory"), engine.gpu_memory_option[0]
    if not 0 < float(text) <= 1:
        raise _ArgumentError(index, f"{name} must be above 0 and up to 1, got {text}")
    if own is not None and own != float(text):
        message = (
            f"{name} is {text} here, but gpu_memory is {own:g}; "
            "keep gpu_memory alone, or make them equal"
        )
        raise _ArgumentError(index, message)
    return float(text)


def _derive_gpus(values: Mapping[str, Any], engine: EngineType) -> tuple[int, ...] | None:
    """A model spread over N GPUs gets the first N unless ``gpus`` is set."""
    size = 1
    for names in engine.rank_options:
        found = _option_number(values.get("extra_args", ()), names, r"0*[1-9][0-9]{0,3}")
        size *= int(found[1]) if found else 1
    return tuple(range(size)) if 1 < size <= MAX_GPUS and "gpus" not in values else None


_DERIVED: Final[Mapping[str, Callable[[Mapping[str, Any], EngineType], Any]]] = MappingProxyType(
    {"gpu_memory": _derive_gpu_memory, "gpus": _derive_gpus}
)
