"""What parking a real engine in a CRIU image costs, and what a wake from it saves.

vLLM on the CPU with two tiny models, in a guest with the package installed. All figures come from
one run: cold starts, dumps, restores through llmux as a client sees them, and `criu restore` of the
same image without llmux. A time "to first token" begins when the model's place is free, for a cold
start and for a restore alike; "switch" is the client's whole wait, the other model's parking
included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
from statistics import median
from typing import Any

from _lab import host
from _lab.guest import Guest

from _bench import first_eviction
from _bench.engines import IMAGES, MODELS, NO_RELEASE, PROGRAMS, Engines, configuration
from _bench.switch import machine
from _bench.turns import Turn

HELP = "cold start, dump, restore and image of the real vLLM on the CPU (root: runs in a guest)"
# An image is measured with KV caches of these sizes as well: next to none, and four times as much.
KV_CACHES = {"16 MiB": 16 << 20, "4 GiB": 4 << 30}
SECONDS = (  # figures that are several times, by name
    "wake_steps_s", "first_eviction", "bare_criu_restore_by_huge_pages_s",
    "bare_criu_restore_lazily_s",
)  # fmt: skip
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--cycles", type=int, default=10, help="restores of each of two models")
    parser.add_argument(
        "--large-image",
        type=int,
        metavar="GIB",
        help="measure only the restores of an image of this size (three times as much memory)",
    )
    parser.add_argument(
        "--first-eviction", action="store_true", help="measure only what the next model waits for"
    )


def run(arguments: argparse.Namespace) -> int:
    from llmux_guest import build_package  # from tests/system; _bench.switch knows the way

    if os.geteuid() != 0:
        print("bench: needs root, to start a guest; next step: sudo scripts/bench park")
        return 2
    with Guest.up(debs=[build_package()], with_vllm=True) as guest:
        engines = Engines(guest)
        load = os.getloadavg()[0]
        if arguments.first_eviction:
            return write(
                {"first_eviction": first_eviction.measure(engines), **about(load)}, arguments
            )
        if arguments.large_image:
            large = with_large_image(engines, arguments.large_image << 30, arguments.cycles)
            return write({**large, **about(load)}, arguments)
        engines.begin("retain+checkpoint")
        turns, bare = engines.cycles(arguments.cycles)
        images = {model: engines.image(model) for model in MODELS}
        by_pages = with_huge_pages(engines, len(bare))
        lazily = with_lazy_pages(engines, len(bare))
        solid = without_holes(engines, len(bare))
        by_cache = {
            name: with_kv_cache(engines, size, len(bare)) for name, size in KV_CACHES.items()
        }
        first = first_eviction.measure(engines)
    document = {
        **figures(turns, bare, solid, images),
        "first_eviction": first,
        "bare_criu_restore_by_huge_pages_s": by_pages,
        "bare_criu_restore_lazily_s": lazily,
        "cycles": arguments.cycles,
        "images_by_kv_cache": by_cache,
        "images_by_kv_cache_note": NO_RELEASE,
        **about(load),
    }
    return write(document, arguments)


def about(load: float) -> dict[str, Any]:
    return {
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "method": " ".join((__doc__ or "").split()),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(document: dict[str, Any], arguments: argparse.Namespace) -> int:
    print_table(document)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0


def with_huge_pages(engines: Engines, count: int) -> dict[str, float]:
    """The same restores with the kernel's setting for transparent huge pages changed, in turns:
    with `madvise`, which distributions have, CRIU faults pages of 4 KiB."""
    before = HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    seconds: dict[str, list[float]] = {"madvise": [], "always": []}
    try:
        for _ in range(max(1, count)):
            for setting, found in seconds.items():
                HUGE_PAGES.write_text(setting)
                found += (one["criu_s"] for one in engines.bare_restores(1))
    finally:
        HUGE_PAGES.write_text(before)
    return {setting: median(found) for setting, found in seconds.items()}


def with_lazy_pages(engines: Engines, count: int) -> dict[str, float]:
    """The same restores, in turns: all pages at once, and each when it is touched."""
    names = {"restored": "criu_s", "first token": "first_token_s", "last page": "last_page_s"}
    found: dict[str, list[float]] = {}
    for _ in range(count):
        for lazy in (False, True):
            (one,) = engines.bare_restores(1, lazy=lazy)
            for name, key in names.items():
                kind = "lazily" if lazy else "at once"
                found.setdefault(f"{kind}, {name}", []).append(one[key])
    return {name: median(seconds) for name, seconds in found.items()}


def with_large_image(engines: Engines, size: int, count: int) -> dict[str, Any]:
    """Restores of an engine with ``size`` bytes that no answer touches, and what else takes its
    time while they run: the checksums of the image."""
    engines.start(configuration("retain+checkpoint", ballast_bytes=size))
    engines.turns(MODELS)
    engines.guest.run(["llmux", "sleep", MODELS[-1]], timeout=600)
    image = engines.image(MODELS[0])
    program, path = f"{PROGRAMS}/large_image/checksums.py", f"{IMAGES}/{MODELS[0]}/images"
    checked = engines.guest.run(["python3", program, path, str(count)], timeout=60 + 60 * count)
    engines.bare_restores(1)  # not counted: the pages that the dump left to the disk are read
    return {
        "image_bytes_apparent": image["apparent_bytes"],
        "image_bytes_on_disk": image["disk_bytes"],
        "dump_s": image["dump_seconds"],
        "checksums_s": median(float(line) for line in checked.stdout.split()),
        "bare_criu_restore_by_huge_pages_s": with_huge_pages(engines, count),
        "bare_criu_restore_lazily_s": with_lazy_pages(engines, count),
    }


def without_holes(engines: Engines, count: int) -> list[dict[str, Any]]:
    """Restores of the same image with the zero pages that are left in it stored."""
    image = f"{IMAGES}/{MODELS[0]}/images"
    solid = f"{image}.solid"
    script = f"cp -a --sparse=never {image} {solid} && rm -r {image} && mv {solid} {image}"
    engines.guest.run(["sh", "-c", script], timeout=300)
    return engines.bare_restores(count)


def with_kv_cache(engines: Engines, size: int, count: int) -> dict[str, float]:
    """The image of an engine whose KV cache has ``size`` bytes, next to none of them used."""
    engines.start(configuration("retain+checkpoint", kv_cache_bytes=size))
    engines.turns(MODELS)
    engines.guest.run(["llmux", "sleep", MODELS[-1]], timeout=120)
    image = engines.image(MODELS[0])
    return {
        "image_bytes_apparent": image["apparent_bytes"],
        "image_bytes_on_disk": image["disk_bytes"],
        "dump_s": image["dump_seconds"],
        "bare_criu_restore_s": median(one["criu_s"] for one in engines.bare_restores(count)),
    }


def figures(
    turns: list[Turn],
    bare: list[dict[str, Any]],
    solid: list[dict[str, Any]],
    images: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    cold = [turn for turn in turns if turn.switch["cold"]]
    woken = [turn for turn in turns if not turn.switch["cold"]]
    if len(cold) != len(MODELS):
        raise host.LabError(f"{len(cold)} cold starts instead of {len(MODELS)}: see the journal")
    equal = all(
        len({tuple(turn.logprobs) for turn in turns if turn.model == model}) == 1
        for model in MODELS
    )
    start = median(turn.wake_to_first_token_s for turn in cold)
    wake = median(turn.wake_to_first_token_s for turn in woken)
    alone = median(one["criu_s"] for one in bare)
    steps = {key: median(turn.phases[key] for turn in woken) for key in woken[0].phases}
    return {
        "cold_to_first_token_s": start,
        "dump_s": median(image["dump_seconds"] for image in images.values()),
        "restore_s": steps["restore"],
        "restore_to_first_token_s": wake,
        "switch_s": median(turn.first_token_s for turn in woken),
        "wake_steps_s": steps,
        "ratio_cold_to_restore": start / wake,
        "bare_criu_restore_s": alone,
        "bare_criu_restore_to_first_token_s": median(one["first_token_s"] for one in bare),
        "bare_criu_restore_without_holes_s": median(one["criu_s"] for one in solid),
        "ratio_restore_to_bare": wake / alone,
        "image_bytes_apparent": max(image["apparent_bytes"] for image in images.values()),
        "image_bytes_on_disk": max(image["disk_bytes"] for image in images.values()),
        "answers_equal": equal,
    }


def print_table(document: dict[str, Any]) -> None:
    """The figures for people; how they were made is in the JSON."""
    for key, value in document.items():
        if key in SECONDS:
            shown = ", ".join(f"{name} {seconds:.3f}" for name, seconds in value.items())
        elif key == "images_by_kv_cache":
            shown = "; ".join(
                f"{name}: on disk {image['image_bytes_on_disk']}, criu"
                f" {image['bare_criu_restore_s']:.3f}"
                for name, image in value.items()
            )
        elif key == "machine":
            shown = ", ".join(f"{name} {fact}" for name, fact in value.items())
        elif key == "method":
            continue
        else:
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        print(f"{key:38} {shown}")
