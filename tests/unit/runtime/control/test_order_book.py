"""Orders under way: listed, cancelled by number and with their client, signed in the events."""

from __future__ import annotations

import asyncio
import gc
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from runtime_harness import Life, begin_life, config_of, in_loop, model

from llmux.errors import Reason, Refused
from llmux.protocol import Ask
from llmux.runtime.control.event_log import EventLog
from llmux.runtime.control.order_book import Order, OrderBook
from llmux.runtime.control.orders import followed
from llmux.runtime.control.verbs import Verbs
from llmux.runtime.control.watchers import Watchers
from tests.twins.disk import MemoryStore
from tests.twins.world import World


class Desk:
    def __init__(self, life: Life, world: World) -> None:
        self.life, self.world = life, world
        self.events = EventLog(Watchers())
        self.verbs: Verbs = life.verbs()
        self.verbs.orders.tell = self._tell
        self.given: asyncio.Queue[Order] = asyncio.Queue()

    def _tell(self, order: Order, what: str) -> None:
        self.events.ordered(order, what)
        if what == "given":
            self.given.put_nowait(order)

    async def ask(self, verb: str, **args: Any) -> Any:
        return await self.verbs.answer(Ask(1, verb, args))

    def give(self, verb: str, **args: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.ask(verb, **args))

    async def listed(self) -> list[dict[str, Any]]:
        found = (await self.ask("orders"))["orders"]
        assert isinstance(found, list)
        return found

    def said(self) -> list[tuple[str, str, str]]:
        events = [event for event in self.events.recent if event["type"] == "order"]
        return [(event["verb"], event["by"], event["result"]) for event in events]

    async def wanted(self, name: str, *, wanted: bool = True) -> None:
        await self.life.until(lambda state: (name in state.wants) == wanted)


@asynccontextmanager
async def desk(*, in_flight: int = 1) -> AsyncIterator[Desk]:
    """``a`` serves and has requests in flight, so that ``b`` has to wait for its room."""
    world = World()
    with tempfile.TemporaryDirectory() as runtime:
        config = config_of(model("a"), model("b"), min_active_secs=60.0)
        life = await begin_life(config, world, runtime, MemoryStore())
        made = Desk(life, world)
        try:
            await made.ask("load", model="a", by="alice")
            made.given.get_nowait()
            life.demand("a", in_flight=in_flight)
            await life.until(lambda state: state.in_flight("a") == in_flight)
            yield made
        finally:
            await made.verbs.orders.close()
            await life.drop()


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@in_loop
async def test_an_order_that_waits_is_listed_with_who_gave_it() -> None:
    async with desk() as d:
        load = d.give("load", model="b", by="bob (carol)")
        await d.wanted("b")
        (one,) = await d.listed()
        assert (one["verb"], one["models"], one["by"]) == ("load", ["b"], "bob (carol)")
        assert one["since_secs"] >= 0 and one["cancellable"]
        assert (await d.ask("status"))["orders"][0]["id"] == one["id"]
        await cancelled(load)
        assert await d.listed() == []


@in_loop
async def test_an_order_ends_with_its_client_and_the_model_is_not_wanted_any_more() -> None:
    async with desk() as d:
        load = d.give("load", model="b", by="bob")
        await d.wanted("b")
        await cancelled(load)
        await d.wanted("b", wanted=False)
        d.life.demand("a")
        await d.life.settled()
        assert d.life.state_of("a") == "serving", "nothing displaces it minutes later"
        assert d.said()[-2:] == [
            ("load", "bob", "given"),
            ("load", "bob", "cancelled: its client left"),
        ]


@in_loop
async def test_another_order_for_the_same_model_keeps_it_wanted() -> None:
    async with desk() as d:
        first, second = d.give("load", model="b"), d.give("load", model="b")
        for _ in (first, second):
            await (await d.given.get()).accepted.wait()
        await cancelled(first)
        await d.life.until(lambda _: not d.life.loop.pending)
        assert "b" in d.life.loop.state.wants
        await cancelled(second)
        await d.wanted("b", wanted=False)


@in_loop
async def test_an_order_is_cancelled_by_its_number_and_answers_who_did_it() -> None:
    async with desk() as d:
        load = d.give("load", model="b", by="bob")
        await d.wanted("b")
        (one,) = await d.listed()
        assert await d.ask("cancel", orders=[one["id"]], by="alice") == {
            "message": f"cancelled: {one['id']}"
        }
        with pytest.raises(Refused, match="was cancelled: by alice") as refused:
            await load
        assert refused.value.reason is Reason.CANCELLED
        await d.wanted("b", wanted=False)
        with pytest.raises(Refused, match="it has ended or was never given"):
            await d.ask("cancel", orders=[one["id"]])


@in_loop
async def test_a_park_that_waits_for_requests_is_taken_back_and_the_model_serves_on() -> None:
    async with desk() as d:
        park = d.give("sleep", model="a")
        await d.life.until_state("a", "draining")
        await d.ask("cancel", by="alice")
        with pytest.raises(Refused, match="by alice"):
            await park
        await d.life.until_state("a", "serving")


@in_loop
async def test_an_order_without_waiting_is_answered_when_it_is_accepted_and_goes_on() -> None:
    async with desk() as d:
        answer = await d.ask("load", model="b", wait=False, by="bob")
        (one,) = await d.listed()
        assert answer == {"message": f"order {one['id']} was accepted: load b", "order": one["id"]}
        d.life.demand("a")
        await d.life.until_state("b", "serving")
        await d.life.settled()
        assert await d.listed() == []
        assert d.said()[-1] == ("load", "bob", "done")


@in_loop
async def test_without_waiting_a_refusal_is_still_an_answer() -> None:
    async with desk() as d:
        with pytest.raises(Refused, match="Model not found"):
            await d.ask("load", model="c", wait=False)
        with pytest.raises(Refused, match='"wait" must be true or false'):
            await d.ask("load", model="b", wait="no")


@in_loop
async def test_the_first_who_cancels_an_order_is_the_one_who_did() -> None:
    async with desk() as d:
        load = d.give("load", model="b", by="bob")
        order = await d.given.get()
        await d.wanted("b")
        assert d.verbs.orders.cancel([order.id], "alice") == [order.id]
        d.verbs.orders.cancel_all("carol")
        with pytest.raises(Refused, match="was cancelled: by alice"):
            await load
        assert d.said()[-1] == ("load", "bob", "cancelled: by alice")


@in_loop
async def test_everything_is_cancelled_at_once() -> None:
    async with desk() as d:
        assert await d.ask("cancel") == {"message": "nothing to cancel"}
        load = d.give("load", model="b")
        await d.wanted("b")
        assert (await d.ask("cancel"))["message"].startswith("cancelled: ")
        with pytest.raises(Refused, match="was cancelled: by an operator"):
            await load


@pytest.mark.parametrize("orders", ["all", [1, "2"], 3])
@in_loop
async def test_orders_to_cancel_are_numbers(orders: Any) -> None:
    async with desk() as d:
        with pytest.raises(Refused, match="must be a list of numbers"):
            await d.ask("cancel", orders=orders)


@pytest.mark.parametrize("leaves", [True, False])
@in_loop
async def test_an_order_that_is_refused_when_nobody_waits_leaves_no_traceback(
    leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An order that cannot be cancelled outlives its client, and was told why it failed."""
    book, reached, go_on = OrderBook(), asyncio.Event(), asyncio.Event()
    told: list[str] = []
    book.tell = lambda _order, what: told.append(what)

    begun: list[Order] = []

    async def work(order: Order) -> None:
        begun.append(order)
        reached.set()
        order.accepted.set()
        await go_on.wait()
        raise Refused(Reason.BAD_REQUEST, "cannot checkpoint a")

    given = book.carry_out("checkpoint", ["a"], "root", work, wait=leaves)
    asked = asyncio.create_task(given)
    await reached.wait()
    if leaves:
        asked.cancel()
    await asyncio.wait([asked])
    go_on.set()
    task = begun.pop().task
    assert task is not None
    await asyncio.wait([task])
    del asked, given, task
    gc.collect()
    assert told == ["given", "cannot checkpoint a"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@in_loop
async def test_closing_ends_all_orders_and_is_no_error_itself() -> None:
    async with desk() as d:
        loading = [d.give("load", model="b") for _ in range(2)]
        for _ in loading:
            await d.given.get()
        await d.wanted("b")
        await d.verbs.orders.close()
        for task in loading:
            with pytest.raises((asyncio.CancelledError, Refused)):
                await task
        assert await d.listed() == []


@in_loop
async def test_an_order_that_llmux_ends_with_itself_says_so() -> None:
    """Before, its giver was told "was cancelled: None"."""
    async with desk() as d:
        load = d.give("load", model="b", by="bob")
        await d.wanted("b")
        await d.verbs.orders.close()
        with pytest.raises(Refused, match="order 2 was cancelled: llmux stops") as refused:
            await load
        assert refused.value.reason is Reason.CANCELLED
        assert d.said()[-1] == ("load", "bob", "cancelled: llmux stops")


@in_loop
async def test_a_client_that_leaves_is_told_nothing_whatever_its_order_ended_with() -> None:
    book, reached = OrderBook(), asyncio.Event()

    async def work(_order: Order) -> None:
        reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Refused(Reason.BAD_REQUEST, "it cannot be taken back") from None

    asked = asyncio.create_task(book.carry_out("load", ["a"], "root", work, wait=True))
    await reached.wait()
    asked.cancel()
    await asyncio.wait([asked])
    assert asked.cancelled()
    assert book.listing() == []


@in_loop
async def test_who_follows_an_operation_is_told_no_more_after_its_end() -> None:
    async with desk() as d:
        told: list[str] = []

        def report(phase: str, _seconds: float, _done: int, _total: int) -> None:
            told.append(phase)

        loop, executor = d.life.loop, d.life.executor
        instance = executor.instance(loop.state.models["a"].config)
        async with followed(loop, executor, "a", report):
            instance.report("inference")
            assert told == ["inference"]
        assert instance.follower is None
        async with followed(loop, executor, "a", report):
            later = instance.follower = lambda _phase, _done, _total: None
        assert instance.follower is later, "another's, which came in between"
