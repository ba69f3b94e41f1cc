"""How long an order waits and for what, what it answers, and what it takes back when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, cast

import pytest
from runtime_harness import DISCARD, OFFLOAD, STOP, in_loop, in_virtual_time

from llmux.config.schema import Config, Eviction, ModelConfig, PolicyConfig, Process, Weights
from llmux.core.effects import OrderAnswered, Verdict
from llmux.core.events import Event, LoadAsked, LoadWithdrawn, ParkAsked, ParkWithdrawn
from llmux.core.plans import park_plan
from llmux.core.records import (
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Reservation,
    Serving,
    Starting,
    State,
    Stopped,
)
from llmux.errors import LlmuxError, Reason, Refused
from llmux.runtime.control import orders
from llmux.runtime.control.order_book import CANCELLABLE, Order, OrderBook
from llmux.runtime.control.orders import BEHIND_OTHERS_SECS, bring_down, bring_up, followed
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.instance import Instance
from llmux.runtime.loop import Loop

A = ModelConfig(
    "a", "models/a", eviction=OFFLOAD, sleep_timeout_secs=3.0, wake_timeout_secs=5.0,
    startup_timeout_secs=11.0, stop_grace_secs=0.0, checkpoint_timeout_secs=4000.0,
)  # fmt: skip
POLICY = PolicyConfig(min_active_secs=100.0, drain_timeout_secs=1000.0)
CONFIG = Config(models=MappingProxyType({"a": A}), policy=POLICY)
SERVING = Serving("e", 0.0)


def state_of(phase: Phase | None, **facts: Any) -> State:
    record = {k: facts.pop(k) for k in ("park_request", "removed") if k in facts}
    models = {} if phase is None else {"a": ModelRecord(A, phase, **record)}
    return State(CONFIG, 1, "e", models=MappingProxyType(models), **facts)


class Core:
    """A loop whose core gives ``answer``; an order waits for states that a test enters."""

    def __init__(self, phase: Phase, answer: OrderAnswered) -> None:
        self.loop = Loop(
            state_of(phase), executor=lambda _: cast(Executor, None), store=cast(Any, None),
            send=lambda _worker, _message: None,
        )  # fmt: skip
        self.posted: list[Event] = []
        self.asked: list[Event] = []
        self.patience: list[float] = []
        self.accepted = 0
        self._answer = answer
        wait_for = self.loop.wait_for

        async def order(order: Event) -> OrderAnswered:
            self.asked.append(order)
            return self._answer

        async def waiting(predicate: Callable[[State], bool], seconds: float) -> State:
            self.patience.append(seconds)
            return await wait_for(predicate, seconds)

        self.loop.order = order  # type: ignore[method-assign]
        self.loop.wait_for = waiting  # type: ignore[method-assign]
        self.loop.post = self.posted.append  # type: ignore[assignment,method-assign]

    def accept(self) -> None:
        self.accepted += 1

    async def enter(self, state: State) -> None:
        self.loop.state = state
        for predicate, future in list(self.loop._waiters):
            if predicate(state):
                future.set_result(state)
        for _ in range(5):
            await asyncio.sleep(0)

    def up(self) -> asyncio.Task[None]:
        return asyncio.create_task(bring_up(self.loop, "a", self.accept))

    def down(self, eviction: Eviction | None = None) -> asyncio.Task[ModelRecord | None]:
        return asyncio.create_task(bring_down(self.loop, "a", eviction, self.accept))


ACCEPTED = OrderAnswered(1, Verdict.ACCEPTED)
ALREADY = OrderAnswered(1, Verdict.ALREADY)


@pytest.mark.parametrize("reason", [Reason.PINNED, None])
@in_loop
async def test_what_the_core_refuses_is_refused_with_its_reason(reason: Reason | None) -> None:
    core = Core(Stopped(), OrderAnswered(1, Verdict.REFUSED, reason, "b is pinned"))
    for begin, text in ((core.up, "load"), (core.down, "park")):
        with pytest.raises(Refused, match=f"^cannot {text} a: b is pinned$") as refused:
            await begin()
        assert refused.value.reason is (reason or Reason.START_FAILED)
    assert (core.accepted, core.patience) == (0, [])


@in_loop
async def test_what_is_so_already_is_not_waited_for() -> None:
    core = Core(Stopped(), ALREADY)
    await core.up()
    record = await core.down(STOP)
    assert record is core.loop.state.models["a"]
    assert core.asked == [LoadAsked("a"), ParkAsked("a", STOP)]
    assert (core.accepted, core.patience, core.posted) == (2, [], [])


@pytest.mark.parametrize(
    ("first", "then", "why"),
    [
        (state_of(Starting(1, 0.0)), state_of(SERVING), None),
        (state_of(Stopped(), wants=MappingProxyType({"a": 1.0})), state_of(SERVING), None),
        (state_of(Stopped(), reservations=MappingProxyType({"a": Reservation(0.0, 0.0)})),
         state_of(SERVING), None),
        (state_of(Draining("e", 0.0, 0.0, 1.0, OFFLOAD, None)), state_of(None),
         "it was removed from the configuration"),
        (state_of(Parking(1, 0.0, OFFLOAD)), state_of(Failed(0.0, 1.0, "no memory")), "no memory"),
        (state_of(Starting(1, 0.0)), state_of(Stopped(), removed=True),
         "it was removed from the configuration"),
        (state_of(Starting(1, 0.0)), state_of(Parked(OFFLOAD, 0.0)),
         r"another order left it parked \(`llmux events` says whose\)"),
    ],
)  # fmt: skip
@in_loop
async def test_a_load_waits_until_the_model_serves_or_is_not_on_its_way(
    first: State, then: State, why: str | None
) -> None:
    core = Core(Stopped(), ACCEPTED)
    core.loop.state = first
    loading = core.up()
    await core.enter(first)
    assert not loading.done() and core.accepted == 1
    assert core.loop.wanting["a"] == 1
    if why is None:
        await core.enter(then)
        await loading
    else:
        await core.enter(then)
        with pytest.raises(Refused, match=f"^cannot load a: {why}$") as refused:
            await loading
        assert refused.value.reason is Reason.START_FAILED
    assert (core.loop.wanting["a"], core.posted) == (0, [])


@in_virtual_time
async def test_a_load_is_not_waited_for_longer_than_all_of_it_may_take() -> None:
    core = Core(Starting(1, 0.0), ACCEPTED)
    loading = core.up()
    with pytest.raises(Refused, match=r"^cannot load a: not serving after 1119 s$") as refused:
        await loading
    assert (refused.value.reason, core.patience) == (Reason.WAIT_EXPIRED, [1119.0])
    assert core.posted == []


@in_loop
async def test_the_last_load_of_a_model_that_is_cancelled_withdraws_it() -> None:
    core = Core(Starting(1, 0.0), ACCEPTED)
    loads = [core.up() for _ in range(3)]
    await core.enter(core.loop.state)
    for load, posted in zip(loads, (0, 0, 1), strict=True):
        load.cancel()
        await asyncio.wait([load])
        assert load.cancelled()
        assert core.posted == [LoadWithdrawn("a")] * posted
    assert core.loop.wanting["a"] == 0


@pytest.mark.parametrize("then", [Stopped(), Parked(OFFLOAD, 0.0), Failed(0.0, 1.0, "x"), None])
@in_loop
async def test_a_park_waits_until_the_model_rests_and_nothing_is_asked_of_it(
    then: Phase | None,
) -> None:
    core = Core(SERVING, ACCEPTED)
    parking = core.down()
    for phase in (SERVING, Parking(1, 0.0, OFFLOAD), Draining("e", 0.0, 0.0, 1.0, OFFLOAD, None)):
        await core.enter(state_of(phase))
    if then is not None:
        await core.enter(state_of(then, park_request=OFFLOAD))
    assert not parking.done() and core.accepted == 1
    await core.enter(state_of(then))
    assert await parking == core.loop.state.models.get("a")
    assert core.asked == [ParkAsked("a", None)]


CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)


@pytest.mark.parametrize(
    ("phase", "eviction", "patience"),
    [
        (SERVING, None, 1000.0 + 3.0 + BEHIND_OTHERS_SECS),
        (Starting(1, 0.0), None, 1000.0 + 3.0 + BEHIND_OTHERS_SECS + 11.0),
        (SERVING, CHECKPOINT, 1000.0 + park_plan(A, CHECKPOINT).deadline),
        (SERVING, DISCARD, 1000.0 + 3.0 + BEHIND_OTHERS_SECS),
    ],
)
@in_virtual_time
async def test_a_park_is_not_waited_for_longer_than_all_of_it_may_take(
    phase: Phase, eviction: Eviction | None, patience: float
) -> None:
    core = Core(phase, ACCEPTED)
    with pytest.raises(Refused, match=f"^cannot park a: not parked after {patience:g} s$") as no:
        await core.down(eviction)
    assert (no.value.reason, core.patience, core.posted) == (Reason.WAIT_EXPIRED, [patience], [])


@in_loop
async def test_a_park_that_is_cancelled_is_withdrawn() -> None:
    core = Core(SERVING, ACCEPTED)
    parking = core.down()
    await core.enter(core.loop.state)
    parking.cancel()
    await asyncio.wait([parking])
    assert (parking.cancelled(), core.posted) == (True, [ParkWithdrawn("a")])


@in_loop
async def test_a_fault_of_ours_while_an_order_waits_is_no_expired_wait() -> None:
    core = Core(SERVING, ACCEPTED)

    async def broken(*_: Any) -> State:
        raise RuntimeError("a fault")

    core.loop.wait_for = broken  # type: ignore[assignment,method-assign]
    core.loop.state = state_of(Starting(1, 0.0))
    for begin in (core.up, core.down):
        with pytest.raises(RuntimeError):
            await begin()
    assert core.posted == []


@in_virtual_time
async def test_progress_is_told_at_each_step_and_every_second_with_the_time_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = asyncio.get_running_loop().time
    monkeypatch.setattr(orders, "monotonic", lambda: round(now()))
    monkeypatch.setattr(orders, "HEARTBEAT_SECS", 1000.0)
    core = Core(SERVING, ACCEPTED)
    instance = Instance(A)
    executor = cast(Executor, type("", (), {"instance": lambda _self, _config: instance})())
    told: list[Any] = []
    async with followed(core.loop, executor, "a", lambda *facts: told.append(facts)):
        await asyncio.sleep(1500.0)
        instance.report("dump", 3, 7)
        await asyncio.sleep(1000.0)
    await asyncio.sleep(3000.0)
    phases = [(phase, done, total) for phase, _, done, total in told]
    assert phases == [("wait", 0, 0), ("wait", 0, 0), ("dump", 3, 7), ("dump", 3, 7)]
    assert [seconds for _, seconds, _, _ in told] == sorted(seconds for _, seconds, _, _ in told)
    assert told[0][1] == 0 and told[-1][1] >= 2000
    assert instance.follower is None


# ---- the book ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    ["load", "wake", "switch", "unload", "restart", "sleep", "pin", "checkpoint", "validate"],
)
@in_loop
async def test_orders_are_numbered_listed_and_cancelled_if_they_can_be(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, told, able = OrderBook(), list[str](), verb not in ("checkpoint", "validate")
    assert (verb in CANCELLABLE) is able
    book.tell = lambda order, what: told.append(f"{order.id} {order.by} {what}")

    async def work(order: Order) -> str:
        order.accepted.set()
        await asyncio.sleep(3600)
        return "never"

    given = [
        await book.carry_out(verb, models, "bob", work, wait=False) for models in (["a", "b"], [])
    ]
    assert [one["message"] for one in given] == [
        f"order 1 was accepted: {verb} a b", f"order 2 was accepted: {verb}"
    ]  # fmt: skip
    rows = book.listing()
    assert [row.pop("since_secs") >= 0 for row in rows] == [True, True]
    assert rows[0] == {
        "id": 1, "verb": verb, "models": ["a", "b"], "by": "bob", "cancellable": able
    }  # fmt: skip
    with pytest.raises(Refused, match="cannot cancel order 3: it has ended") as refused:
        book.cancel([3, 1], "alice")
    assert (refused.value.reason, refused.value.hint) == (Reason.NOT_FOUND, "llmux orders")
    assert book.cancel_all("alice") == ([1, 2] if able else [])
    if not able:
        with pytest.raises(
            Refused, match=f"order 1: a {verb} ends by its own deadlines"
        ) as refused:
            book.cancel([1], "alice")
        assert refused.value.reason is Reason.BAD_REQUEST
    await book.close()
    how = "cancelled: by alice" if able else "cancelled: llmux stops"
    assert told == ["1 bob given", "2 bob given", f"1 bob {how}", f"2 bob {how}"]
    assert book.listing() == []


@in_loop
async def test_what_an_order_ends_with_is_its_answer_and_is_told() -> None:
    book, told = OrderBook(), list[str]()
    book.tell = lambda _order, what: told.append(what)

    async def works(order: Order) -> str:
        return f"{order.verb} is done"

    async def fails(order: Order) -> None:
        raise LlmuxError("the disk is full")

    assert await book.carry_out("load", ["a"], "bob", works, wait=True) == "load is done"
    assert await book.carry_out("load", ["a"], "bob", works, wait=False) == "load is done"
    for wait in (True, False):
        with pytest.raises(LlmuxError, match="the disk is full"):
            await book.carry_out("load", ["a"], "bob", fails, wait=wait)
    assert told == ["given", "done"] * 2 + ["given", "the disk is full"] * 2
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing waits for what has ended"


@in_loop
async def test_a_fault_of_ours_in_an_order_that_none_waits_for_is_logged_and_told_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book, go_on = OrderBook(), asyncio.Event()

    async def work(order: Order) -> None:
        order.accepted.set()
        await go_on.wait()
        raise ValueError("a fault")

    await book.carry_out("load", ["a"], "bob", work, wait=False)
    (order,) = book._orders.values()
    go_on.set()
    assert order.task is not None
    await asyncio.wait([order.task])
    await asyncio.sleep(0)
    assert caplog.messages == ["order load a failed"]
