"""The arithmetic of room on the GPUs, asked directly: what each model holds now and later, what
fits, who would have to leave, and where a model is placed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from core_harness import CHECKPOINT, DISCARD, FREEZE, OFFLOAD, STOP, model

from llmux.config.schema import GPU_RESIDUE, Eviction, Process, Weights
from llmux.core.records import (
    ROUNDING,
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Serving,
    Starting,
    Stopped,
    Stopping,
    Waking,
    goes_into_ram,
    is_resident,
    moves_memory,
    stays_resident,
)
from llmux.core.room import Room

UP = Serving("e", 1.0)
RETAIN = Eviction(Weights.RETAIN, Process.KEEP_RUNNING)
SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)


def draining(eviction: Eviction = OFFLOAD) -> Draining:
    return Draining("e", 1.0, 2.0, 3.0, eviction, None)


def parking(eviction: Eviction = OFFLOAD, **facts: Any) -> Parking:
    return Parking(1, 2.0, eviction, **facts)


def stopping(share: float, **facts: Any) -> Stopping:
    return Stopping(1, 2.0, "", share, **facts)


def failed(**facts: Any) -> Failed:
    return Failed(1.0, 2.0, "it died", **facts)


def record(
    name: str, phase: Phase, share: float = 0.4, gpus: tuple[int, ...] = (0,), **settings: Any
) -> ModelRecord:
    return ModelRecord(model(name, gpu_memory=share, **settings), phase, gpus)


def anywhere(name: str, share: float, count: int = 1) -> ModelRecord:
    """At rest."""
    return ModelRecord(model(name, gpu_memory=share, gpus=count))


def room_of(
    *records: ModelRecord, gpu_count: int = 1, exclusive: tuple[tuple[str, ...], ...] = ()
) -> Room:
    models = {one.config.name: one for one in records}
    return Room(MappingProxyType(models), gpu_count, exclusive)


def takes(room: Room, gpu: int = 0) -> tuple[float, float]:
    """What is taken of the GPU now and after, to a percent, by what still fits."""
    percents = [n / 100 for n in range(101)]
    now = max(free for free in percents if room.fits_now("new", (gpu,), free))
    after = max(free for free in percents if room.fits_after("new", (gpu,), free))
    assert room.free(gpu) == pytest.approx(after)
    return round(1 - now, 2), round(1 - after, 2)


# ---- what a model holds -------------------------------------------------------------------------

RESIDUE = GPU_RESIDUE
PHASES: list[tuple[Phase, tuple[float, float], str]] = [
    # phase, share now and after, and of: r(esident), s(tays so), m(oves memory), h(ost memory next)
    (Stopped(), (0, 0), ""),
    (Starting(1, 2.0), (0.4, 0.4), "rsm"),
    (UP, (0.4, 0.4), "rs"),
    (draining(), (0.4, RESIDUE), "rh"),
    (draining(STOP), (0.4, 0), "r"),
    (draining(FREEZE), (0.4, 0.4), "r"),
    (draining(DISCARD), (0.4, RESIDUE), "r"),
    (draining(CHECKPOINT), (0.4, 0), "r"),
    (draining(SUSPEND), (0.4, 0), "rh"),
    (draining(Eviction(Weights.RETAIN, Process.CHECKPOINT)), (0.4, 0), "rh"),
    (parking(), (0.4, RESIDUE), "rmh"),
    (parking(FREEZE), (0.4, 0.4), "r"),
    (parking(RETAIN), (0.4, 0.4), "r"),
    (parking(SUSPEND), (0.4, 0), "rmh"),
    (parking(SUSPEND, released_at=3.0), (0, 0), ""),
    (parking(released_at=3.0), (RESIDUE, RESIDUE), ""),
    (parking(Eviction(Weights.OFFLOAD, Process.CHECKPOINT), share=0.1), (0.1, 0), "mh"),
    (Parked(OFFLOAD, 2.0), (RESIDUE, RESIDUE), ""),
    (Parked(FREEZE, 2.0), (0.4, 0.4), ""),
    (Parked(STOP, 2.0), (0, 0), ""),
    (Waking(1, 2.0, OFFLOAD), (0.4, 0.4), "rsm"),
    (Waking(1, 2.0, FREEZE), (0.4, 0.4), "rs"),
    (stopping(0.3), (0.3, 0), "rm"),
    (stopping(0.1, was_parked=True), (0.1, 0), "m"),
    (failed(), (0, 0), ""),
    (failed(share=0.4), (0, 0), ""),
    (failed(held=True, share=0.4), (0.4, 0.4), "rs"),
    (failed(held=True, share=0.1, was_parked=True), (0.1, 0.1), ""),
]


@pytest.mark.parametrize(("phase", "share", "facts"), PHASES, ids=str)
def test_what_a_model_holds_and_what_it_is_about(
    phase: Phase, share: tuple[float, float], facts: str
) -> None:
    one = record("one", phase)
    room = room_of(one)
    assert takes(room) == share
    assert set(room.on(0)) == ({"one"} if share[0] else set())
    seen = {
        "r": is_resident(one), "s": stays_resident(one), "m": moves_memory(one),
        "h": goes_into_ram(one),
    }  # fmt: skip
    assert "".join(letter for letter, holds in seen.items() if holds) == facts
    assert room.may_come((0,)) is not ("m" in facts)


def test_an_operation_that_changes_is_counted_anew() -> None:
    models = {"a": record("a", UP), "b": record("b", UP, 0.2, (0, 1))}
    room = Room(models, 2)
    assert (takes(room, 0), takes(room, 1)) == ((0.6, 0.6), (0.2, 0.2))
    models["a"] = record("a", parking())
    room.refresh("a")
    assert takes(room, 0) == (0.6, 0.23)
    assert (room.may_leave("a"), room.may_leave("b"), room.may_come((1,))) == (True, False, True)
    models["b"] = record("b", Stopped(), 0.2, (0, 1))
    room.refresh("b")
    room.refresh("b")
    assert (takes(room, 0), takes(room, 1)) == ((0.4, 0.03), (0.0, 0.0))
    assert (set(room.on(0)), set(room.on(1)), set(room.on(7))) == ({"a"}, set(), set())
    models["b"] = record("b", Starting(1, 2.0), 0.2, (1,))
    room.refresh("b")
    assert (takes(room, 0), takes(room, 1)) == ((0.4, 0.03), (0.2, 0.2))
    assert (room.may_come((0,)), room.may_come((1,)), room.may_leave("a")) == (False, False, True)


def test_a_gpu_on_which_a_model_comes_next_is_not_given_to_another() -> None:
    room = room_of(gpu_count=3)
    room.comes_next((1, 2))
    assert [room.may_come((gpu,)) for gpu in range(3)] == [True, False, False]
    assert not room.may_come((0, 2))


# ---- does it fit --------------------------------------------------------------------------------


def test_what_is_reserved_is_taken_as_what_is_held() -> None:
    room = room_of(record("a", UP, 0.3), gpu_count=2)
    room.reserve("first", (0, 1), 0.2)
    room.reserve("second", (1,), 0.4)
    assert (takes(room, 0), takes(room, 1)) == ((0.5, 0.5), (0.6, 0.6))
    assert [room.could_fit("new", (0,), share) for share in (0.8, 0.81)] == [True, False]
    assert [room.could_fit("new", (0, 1), share) for share in (0.4, 0.41)] == [True, False]


def test_a_model_is_not_in_its_own_way() -> None:
    room = room_of(record("a", Parked(FREEZE, 1.0), 0.6), record("b", UP, 0.3, (0, 1)), gpu_count=2)
    assert room.fits_now("a", (0,), 0.7) and room.fits_after("a", (0,), 0.7)
    assert not room.fits_now("a", (0,), 0.71) and not room.fits_after("a", (0,), 0.71)
    assert not room.fits_now("a", (1,), 0.71), "it holds nothing there"
    assert room.fits_now("a", (0, 1), 0.7)


def test_shares_that_add_up_to_one_fit_whatever_was_rounded() -> None:
    room = room_of()
    for share, fits in ((1.0 + ROUNDING, True), (1.0 + 2 * ROUNDING, False)):
        for ask in (room.fits_now, room.fits_after, room.could_fit):
            assert ask("new", (0,), share) is fits


@pytest.mark.parametrize("least", [0.2, 0.5, 1.0])
def test_everything_is_reserved_when_not_even_the_smallest_could_fit(least: float) -> None:
    for free in (least - 0.1, least, least + ROUNDING / 2):
        room = room_of(gpu_count=2)
        room.reserve("a", (0,), 1.0)
        assert not room.is_reserved(least), "nothing on the other"
        room.reserve("b", (1,), 1.0 - free)
        assert room.is_reserved(least) is not room.could_fit("new", (1,), least)
        assert room.is_reserved(least) is (free < least)


# ---- exclusive groups ---------------------------------------------------------------------------

GROUPS = (("a", "b", "unknown"), ("b", "c"))


def rivals(phase: Phase, reserved: Collection[str] = ()) -> Room:
    """a is in this phase on GPU 0, b and c are stopped; b goes with neither of them."""
    others = (record("b", Stopped()), record("c", Stopped()))
    room = room_of(record("a", phase, 0.1), *others, gpu_count=2, exclusive=GROUPS)
    for name in reserved:
        room.reserve(name, (0,), 0.1)
    return room


@pytest.mark.parametrize(
    ("phase", "now", "after"),
    [
        (UP, False, False), (draining(), False, True), (parking(), False, True),
        (Parked(OFFLOAD, 1.0), True, True), (Stopped(), True, True), (stopping(0.1), False, True),
    ],
)  # fmt: skip
def test_of_an_exclusive_group_none_fits_beside_one_that_is_there(
    phase: Phase, now: bool, after: bool
) -> None:
    room = rivals(phase)
    assert (room.fits_now("b", (1,), 0.1), room.fits_after("b", (1,), 0.1)) == (now, after)
    assert room.fits_now("c", (1,), 0.1) and room.fits_after("c", (1,), 0.1), "another group"
    assert room.fits_now("a", (1,), 0.1) and room.fits_after("a", (1,), 0.1), "itself"
    assert room.neighbours("b", (1,)) == (set() if after else {"a"})
    assert room.neighbours("c", (1,)) == set()


def test_a_place_that_is_reserved_for_one_of_a_group_is_not_given_to_another() -> None:
    room = rivals(Stopped(), reserved=["a"])
    for fits in (room.fits_now, room.fits_after, room.could_fit):
        assert [fits(name, (1,), 0.1) for name in "abc"] == [True, False, True]
    assert room.neighbours("b", (1,)) == {"a"}


# ---- who would have to leave --------------------------------------------------------------------


def test_neighbours_are_all_that_hold_something_there() -> None:
    room = room_of(
        record("a", UP), record("b", Parked(OFFLOAD, 1.0), gpus=(0, 1)), record("c", Stopped()),
        record("d", Parked(STOP, 1.0)), gpu_count=3,
    )  # fmt: skip
    assert room.neighbours("new", (0, 2)) == {"a", "b"}
    assert room.neighbours("new", (1,)) == {"b"}
    assert room.neighbours("new", (2,)) == set()


def leave(
    room: Room, share: float, serving: str = "", residues: str = "", name: str = "new"
) -> dict[str, str]:
    """Who leaves for a model of this share on GPU 0, and by which process axis; residues end."""
    found = room.victims(name, (0,), share, serving, residues)
    return {v: "end" if v in residues else how.process.value for v, how in found.items()}


def crowd(**settings: Any) -> Room:
    """a, b and c serve with 0.2, 0.3 and 0.4 of the GPU; p is parked and holds 0.1."""
    return room_of(
        record("a", UP, 0.2, **settings), record("b", UP, 0.3, **settings),
        record("c", UP, 0.4, **settings), record("p", Parked(OFFLOAD, 1.0), gpu_memory_parked=0.1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("share", "serving", "residues", "leaves"),
    [
        (0.1, "abc", "p", {"a": "keep_running"}),
        (0.17, "abc", "p", {"a": "keep_running"}),
        (0.2, "abc", "p", {"b": "keep_running"}),  # a's residue is in the way: b alone will do
        (0.4, "abc", "p", {"a": "keep_running", "b": "keep_running"}),
        (0.4, "cba", "p", {"c": "keep_running", "b": "keep_running"}),
        (0.37, "cba", "p", {"c": "keep_running"}),
        (0.9, "abc", "p", {**dict.fromkeys("abc", "keep_running"), "p": "end"}),
        (0.92, "abc", "p", {**dict.fromkeys("abc", "stop"), "p": "end"}),
        (0.9, "abc", "", dict.fromkeys("abc", "stop")),
        (1.0, "abc", "", {}),  # the residue stays, and with it there is no room
        (0.3, "a", "", {}),
        (0.1, "", "p", {"p": "end"}),
        (0.11, "", "p", {}),
        (0.01, "", "", {}),
    ],
)
def test_the_fewest_leave_in_the_order_given_as_gently_as_will_do(
    share: float, serving: str, residues: str, leaves: dict[str, str]
) -> None:
    assert leave(crowd(), share, serving, residues) == leaves


def test_one_whose_own_way_frees_nothing_is_stopped() -> None:
    room = room_of(record("a", UP, 0.9, eviction=FREEZE))
    assert room.victims("new", (0,), 0.9, ["a"], []) == {
        "a": Eviction(FREEZE.weights, STOP.process)
    }
    override = ModelRecord(model("a", eviction=FREEZE), UP, (0,), eviction_override=DISCARD)
    assert room_of(override).victims("new", (0,), 0.9, ["a"], []) == {"a": DISCARD}


def test_what_a_sleep_was_seen_to_leave_counts_for_the_next_one() -> None:
    seen = ModelRecord(model("a"), UP, (0,), residue=0.2)
    assert leave(room_of(seen), 0.8, "a") == {"a": "keep_running"}
    assert leave(room_of(seen), 0.81, "a") == {"a": "stop"}


def test_one_of_its_group_leaves_although_there_is_room_and_before_all_others() -> None:
    a, b, c = record("a", UP, 0.1, (1,)), record("b", Stopped()), record("c", UP, 0.5)
    room = room_of(a, b, c, gpu_count=2, exclusive=(("a", "b"),))
    assert leave(room, 0.3, "ca", name="b") == {"a": "keep_running"}
    assert leave(room, 0.6, "ca", name="b") == {"a": "keep_running", "c": "keep_running"}
    assert leave(room, 0.3, "c", name="b") == {}, "one that may not leave is in the way"
    assert leave(room, 0.6, "ca", name="new") == {"c": "keep_running"}


# ---- where --------------------------------------------------------------------------------------


class Prices:
    """Of each GPU: what it costs to empty it, whose place is lost there, when it was used last."""

    def __init__(self, room: str = "0000", lost: str = "0000", used: str = "0000") -> None:
        self.room, self.lost, self.used = room, lost, used
        self.asked: set[tuple[str, int, float]] = set()

    def making_room(self, gpu: int) -> float:
        return float(self.room[gpu])

    def displaced(self, record: ModelRecord, gpu: int, free: float) -> float:
        self.asked.add((record.config.name, gpu, round(free, 6)))
        return float(self.lost[gpu])

    def last_used(self, gpu: int) -> float:
        return float(self.used[gpu])


def loads(*shares: float) -> Room:
    """A model on each GPU that takes so much of it; none where it is 0."""
    there = [record(f"m{gpu}", UP, share, (gpu,)) for gpu, share in enumerate(shares) if share]
    return room_of(*there, gpu_count=len(shares))


@pytest.mark.parametrize(
    ("shares", "prices", "count", "placed"),
    [
        # without prices: those with room, the emptiest first
        ((0.5, 0.2, 0.3), None, 1, (1,)),
        ((0.5, 0.2, 0.3), None, 2, (1, 2)),
        ((0.9, 0.8, 0.3), None, 2, (1, 2)),
        ((0.3, 0.3, 0.3), None, 2, (0, 1)),
        # with room: nobody in use loses a place, then the emptiest, then what was used last
        ((0.5, 0.2, 0.3), Prices(lost="010"), 1, (2,)),
        ((0.5, 0.2, 0.3), Prices(used="900"), 1, (1,)),
        ((0.3, 0.3, 0.3), Prices(used="132"), 1, (1,)),
        ((0.3, 0.3 + 1e-9, 0.3), Prices(used="132"), 1, (1,)),
        ((0.3, 0.3 + 1e-5, 0.3), Prices(used="132"), 1, (2,)),
        # room there goes before all prices, though none be left
        ((0.6, 0.6), Prices(room="10", lost="01"), 1, (0,)),
        ((0.9, 0.9, 0.6), Prices(room="000", lost="009"), 1, (2,)),
        # else what costs the least to empty, then what was used longest ago, then the emptiest
        ((0.9, 0.8, 0.7), Prices(room="213"), 1, (1,)),
        ((0.9, 0.8, 0.7), Prices(used="213"), 1, (1,)),
        ((0.9, 0.8, 0.7), Prices(), 1, (2,)),
        ((0.9, 0.9, 0.9), Prices(), 1, (0,)),
        ((0.9, 0.8, 0.7, 0.1), Prices(room="2130"), 2, (1, 3)),
    ],
)
def test_where_a_model_is_placed(
    shares: tuple[float, ...], prices: Prices | None, count: int, placed: tuple[int, ...]
) -> None:
    assert loads(*shares).place(anywhere("new", 0.4, count), prices) == placed


def test_what_is_reserved_counts_where_a_model_is_placed_and_what_it_holds_itself_does_not() -> (
    None
):
    prices = Prices(lost="11")
    room = loads(0.2, 0.1)
    room.reserve("first", (1,), 0.3)
    assert room.place(anywhere("new", 0.4), prices) == (0,)
    assert prices.asked == {("new", 0, 0.8), ("new", 1, 0.6)}
    held = replace(anywhere("stuck", 0.5), phase=failed(held=True, share=0.4), gpus=(1,))
    room = room_of(held, record("other", UP, 0.2, (0,)), gpu_count=2)
    assert room.place(held) == (1,)
    assert room.place(anywhere("next", 0.5)) == (0,)


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [((1, 0), (1, 0)), ((1,), (1,)), ((2,), None), ((0, 2), None), (2, (0, 1)), (3, None)],
)
def test_gpus_that_are_named_or_all_of_them(
    wanted: tuple[int, ...] | int, placed: tuple[int, ...] | None
) -> None:
    room = room_of(gpu_count=2)
    one = ModelRecord(model("new", gpus=wanted))
    assert room.place(one) == placed
    assert ("wants" in room.cannot_fit(one)) and "this host has 2" in room.cannot_fit(one)
    parked = ModelRecord(model("new", gpus=wanted), Parked(OFFLOAD, 1.0), (0,))
    assert room.place(parked) == (0,), "a parked engine cannot move"
