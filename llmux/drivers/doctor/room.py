"""The doctor on room: host memory for what the supervisor will ask for, and disk for all images.

Sizes are those that the supervisor itself asks for before it acts (``Host.claims``). What is not
known before a first look at GPUs or weights is said to be unknown, not guessed.
"""

from __future__ import annotations

import json
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from llmux.config.schema import CheckpointConfig, Config, Eviction, Process, Weights
from llmux.drivers.doctor.facts import GIB, Check, Claim, Host, Level, Needs, bad
from llmux.drivers.doctor.gpus import look_at
from llmux.drivers.images.budget import FREE_RESERVE
from llmux.drivers.processes.spawn import unit_name
from llmux.trusted import USE_OWN_DIRECTORY, untrusted

IMAGES: Final = "images directory"
MEMORY: Final = "memory"
RAM_SPARE: Final = 8 * GIB  # where the claims are not known
DISK_SPARE: Final = 20 * GIB  # about one image of an 8B model with its weights, and room to write
SWAPPED: Final = GIB // 2  # of engines' memory; less is pages that nobody needs
SHOWN: Final = 3
SWAP_REMEDY: Final = (
    "a wake reads it back from the disk: add RAM, or keep less in it (policy.parked_max_bytes with"
    " a ladder, weights: discard)"
)


def check_memory(host: Host, config: Config | None) -> Check:
    """Against the largest claim of one model, and what of the parked engines is swapped out."""
    available, swap = host.memory()
    seen = f"{available / GIB:.1f} GiB available, {swap / GIB:.1f} GiB of swap"
    if (host.read("/proc/sys/vm/overcommit_memory") or "").strip() == "2":
        remedy = "sysctl vm.overcommit_memory=0: CUDA reserves addresses for each GPU's memory"
        return Check(MEMORY, Level.WARN, f"{seen}; vm.overcommit_memory is 2", remedy)
    swapped = int(host.read("/sys/fs/cgroup/llmux.slice/memory.swap.current") or 0)
    if swapped > SWAPPED:
        more = f"{seen}; {swapped / GIB:.1f} GiB of the engines' memory are swapped out"
        return Check(MEMORY, Level.WARN, more, SWAP_REMEDY)
    found = claims_of(host, config)
    claims = [claim for claim in found if claim.host_bytes]
    if config is not None:
        directory = host.path(config.checkpoint.images_dir)
        claims += [
            Claim(model, None, size, None)
            for model, size in sizes(directory, "apparent_bytes")
            if model in config.models
        ]
    room = {claim.model: available + _held_by(host, claim.model) for claim in claims}
    # Of those that find no room first: the largest may be parked, and have what it asks for.
    claims.sort(key=lambda one: (_size(one) > room[one.model], _size(one)), reverse=True)
    short = dict.fromkeys(claim.model for claim in claims if _size(claim) > room[claim.model])
    if claims:
        seen += _asked(host, claims[0], [*short])
    unknown = list(dict.fromkeys(claim.model for claim in found if claim.host_bytes is None))
    if unknown:
        seen += f"; what else {_listed(unknown)} may ask for is not known here"
    measured = {"available_bytes": float(available)}
    if claims:
        measured["largest_claim_bytes"] = float(max(map(_size, claims)))
    if short:
        return Check(MEMORY, Level.WARN, seen, _remedy(claims[0].eviction), measured)
    if (unknown or not claims) and Needs.of(config).ram and available < RAM_SPARE:
        remedy = "cuda_suspend and offload keep what leaves the GPU in RAM: use discard, or add RAM"
        return Check(MEMORY, Level.WARN, seen, remedy, measured)
    return Check(MEMORY, Level.OK, seen, measured=measured)


def _size(claim: Claim) -> int:
    return claim.host_bytes or 0


def _held_by(host: Host, model: str) -> int:
    """Memory of the model's engine: one that is parked holds what it asked for already."""
    group = f"/sys/fs/cgroup/llmux.slice/{unit_name(model)}"
    text = host.read(f"{group}/memory.stat") or ""
    return sum(int(size) for size in re.findall(r"^(?:anon|shmem) (\d+)$", text, re.MULTILINE))


def _asked(host: Host, claim: Claim, short: list[str]) -> str:
    """``short``: models that find no room, the claim's first."""
    what = claim.eviction or "the restore of its image"
    text = f"; {claim.model} asks for {_size(claim) / GIB:.1f} GiB ({what})"
    if not short:
        return f"{text}, the most of all"
    total = _total_memory(host)
    if total is not None and _size(claim) > total:
        text += f", of {total / GIB:.1f} that this host has"
    return f"{text}; too much also for {_listed(short[1:])}" if len(short) > 1 else text


def _remedy(eviction: Eviction | None) -> str:
    if eviction is None:
        return "add RAM, or use weights: discard, which makes a smaller image"
    if eviction.process in (Process.CUDA_SUSPEND, Process.CHECKPOINT):
        instead = (
            "use weights: discard, which gives the KV cache and the weights back first"
            if eviction.weights is not Weights.DISCARD
            else "lower gpu_memory"
        )
        return (
            f"add RAM, or {instead}: an engine whose CUDA state finds no room is parked by the next"
            " rung of its ladder, or stopped"
        )
    return "add RAM, or use weights: discard, which llmux does by itself when they find no room"


def _total_memory(host: Host) -> int | None:
    found = re.search(r"^MemTotal: +(\d+) kB$", host.read("/proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def claims_of(host: Host, config: Config | None) -> list[Claim]:
    """Of every model and rung; nothing where that cannot be said."""
    if config is None or host.claims is None:
        return []
    return list(host.claims(config, host.planned(config), look_at(host).totals))


def check_images(host: Host, config: Config | None) -> Check:
    needed = Needs.of(config).criu
    name = (config.checkpoint if config else CheckpointConfig()).images_dir
    path = host.path(name)
    if reason := untrusted(str(path)):
        return Check(IMAGES, Level.FAIL, reason, USE_OWN_DIRECTORY)
    if path.is_dir():
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            remedy = f"chmod 0700 {name}: images hold keys, prompts and weights"
            return Check(IMAGES, bad(needed), f"{name} has mode {mode:04o}", remedy)
    above = path
    while not above.exists() and above != above.parent:
        above = above.parent
    room = host.space(above)
    most = config.checkpoint.max_bytes if config else None
    seen = f"{name}: {room.free / GIB:.0f} GiB free of {room.total / GIB:.0f} GiB"
    if most and most > room.total:
        remedy = "lower checkpoint.max_bytes to what the disk can hold"
        return Check(IMAGES, Level.WARN, f"{seen}; max_bytes is more", remedy)
    if config is None or not needed:
        return Check(IMAGES, Level.OK, seen)
    return _judge_images(host, config, seen, room.free, sizes(path))


def _judge_images(
    host: Host, config: Config, seen: str, free: int, made: list[tuple[str, int]]
) -> Check:
    """All images that the configuration may make: those on disk as they are, others by claim."""
    there, expected = dict(made), dict[str, int]()
    models = [model.name for model in config.models.values() if model.makes_images]
    for claim in claims_of(host, config):
        if claim.image_bytes is not None and claim.model not in there:
            expected[claim.model] = max(claim.image_bytes, expected.get(claim.model, 0))
    unknown = [name for name in models if name not in there and name not in expected]
    new = sum(expected.values())
    total = new + sum(there.get(name, 0) for name in models)
    known = [name for name in models if name not in unknown]
    if known:
        count = sum(name in there for name in models)
        state = f"{count or 'none'} {'are' if count > 1 else 'is'} made"
        seen += f"; images take about {total / GIB:.1f} GiB ({_listed(known)}; {state})"
    if unknown:
        seen += f"; no image yet of {_listed(unknown)}, and no size known before it is made"
    measured = {"images_bytes": float(total), "free_bytes": float(free)}
    most = config.checkpoint.max_bytes
    remedy = "set checkpoint.images_dir to a larger disk, or use weights: discard"
    less = "until then images of less value go for new ones, and those models start cold"
    if most is not None and total > most:
        more = f"{seen}; max_bytes is {most / GIB:.1f} GiB"
        raised = f"raise checkpoint.max_bytes, or use weights: discard; {less}"
        return Check(IMAGES, Level.WARN, more, raised, measured)
    if new * FREE_RESERVE > free:
        return Check(IMAGES, Level.WARN, seen, f"free space, {remedy}; {less}", measured)
    if unknown and free < min(DISK_SPARE, most or DISK_SPARE):
        return Check(IMAGES, Level.WARN, seen, f"free space, {remedy}", measured)
    return Check(IMAGES, Level.OK, seen, measured=measured)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def sizes(directory: Path, of: str = "disk_bytes") -> list[tuple[str, int]]:
    """(model, bytes) of its images, the largest first. ``of``: a field of the manifest."""
    found = []
    for manifest in directory.glob("*/images/manifest.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):
            document = json.loads(manifest.read_text())
            found.append((str(document["model"]), int(document[of])))
    return sorted(found, key=lambda pair: -pair[1])
