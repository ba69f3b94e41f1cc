"""Waiting honestly: places at an engine, Retry-After, what was waited for, patience."""

from __future__ import annotations

import asyncio

from gateway_harness import EngineRequest, a_config, in_loop, stage, until

from llmux.protocol import Catalog, Demand, ModelInfo


@in_loop
async def test_an_engine_gets_no_more_than_it_has_places_for() -> None:
    release = asyncio.Event()

    async def hold(request: EngineRequest) -> None:
        await release.wait()
        request.json({"ok": True})

    async with stage(a_config(max_in_flight=2, max_waiting=3)) as s:
        engine = await s.engine(hold)
        s.supervisor.grant(engine)
        clients = [await s.client() for _ in range(5)]
        for client in clients:
            client.chat()
        await until(lambda: len(engine.requests) == 2 and s.in_flight() == 5)
        # who waits for a place only is no demand for a switch
        await s.supervisor.hear(Demand, lambda d: d.in_flight == 5 and d.waiting == 0)
        refused = await s.client()
        refused.chat()
        answer = await refused.answer()
        assert (answer.status, answer.code) == (429, "model_overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        release.set()
        for client in clients:
            assert (await client.answer()).status == 200
        await until(lambda: s.in_flight() == 0)
        assert len(engine.requests) == 5


@in_loop
async def test_a_client_that_leaves_its_place_gives_it_to_the_next() -> None:
    async def hold(request: EngineRequest) -> None:
        await request.reader.read(1)

    async with stage(a_config(max_in_flight=1)) as s:
        engine = await s.engine(hold)
        s.supervisor.grant(engine)
        first, second, third = [await s.client() for _ in range(3)]
        for client in (first, second, third):
            client.chat()
            await until(lambda: len(engine.requests) == 1)
        await until(lambda: s.in_flight() == 3)
        second.leave()
        await until(lambda: s.in_flight() == 2)
        first.leave()
        await engine.next_request(2)
        assert s.in_flight() == 1


@in_loop
async def test_retry_after_follows_from_measured_switches() -> None:
    async with stage(a_config(max_waiting=1)) as s:
        s.supervisor.say(
            Catalog.of([ModelInfo("alpha", "parked", switch_secs=40.0), ModelInfo("beta", "x")])
        )
        await until(lambda: s.gateway.models["alpha"].switch_secs == 40.0)
        waiting, refused = await s.client(), await s.client()
        waiting.chat()
        await until(lambda: s.waiting() == 1)
        refused.chat()
        answer = await refused.answer()
        assert (answer.status, answer.code) == (503, "queue_full")
        assert answer.headers["retry-after"] == "40"
        refused.chat("beta")
        await until(lambda: s.waiting("beta") == 1)
        other = await s.client()
        other.chat("beta")
        # its own is unknown and taken to be like the others', then alpha's and alpha's time
        assert (await other.answer()).headers["retry-after"] == str(40 + 40 + 5)


@in_loop
async def test_what_was_waited_for_is_told() -> None:
    async with stage() as s:
        engine = await s.engine()
        client = await s.client()
        for state, how in (("starting", "cold"), ("waking", "woken")):
            client.chat()
            await until(lambda: s.waiting() == 1)
            s.supervisor.say(Catalog.of([ModelInfo("alpha", state), ModelInfo("beta", "x")]))
            s.supervisor.grant(engine, epoch=state)
            assert (await client.answer()).headers["x-llmux-switch"] == how
            client.chat()
            answer = await client.answer()
            assert answer.headers["x-llmux-switch"] == "none"
            assert answer.headers["x-llmux-wait-ms"].isdigit()
            s.supervisor.revoke(state)
            await until(lambda: s.gateway.admission.held("alpha") is None)


@in_loop
async def test_a_reload_of_the_supervisor_changes_how_long_the_next_ones_wait() -> None:
    async with stage(a_config(wait_secs=20)) as s:
        first, second = await s.client(), await s.client()
        first.chat()
        await until(lambda: s.waiting() == 1)
        infos = [ModelInfo("alpha", "parked", switch_secs=40.0), ModelInfo("beta", "x")]
        s.supervisor.say(
            Catalog.of(infos, request_timeout_secs=0.05, min_active_secs=7, startup_timeout_secs=9)
        )
        await until(lambda: s.gateway.startup_secs == 9)
        second.chat("beta")
        answer = await second.answer()
        assert (answer.status, answer.code) == (504, "wait_expired")
        assert answer.headers["retry-after"] == str(40 + 7 + 40), "beta's is like alpha's"
        assert s.waiting() == 1, "it came when there was more patience"


@in_loop
async def test_the_sooner_of_both_patiences_counts() -> None:
    async with stage(a_config(wait_secs=20)) as s:
        client = await s.client()
        for headers in (
            ("X-Request-Timeout: 0.05",),
            ("X-Stainless-Timeout: 600", "X-Request-Timeout: 0.05"),
            ("X-Stainless-Timeout: 0.05", "X-Request-Timeout: soon"),
        ):
            client.send(payload={"model": "alpha"}, headers=headers)
            answer = await client.answer()
            assert (answer.status, answer.code) == (504, "wait_expired")
            assert int(answer.headers["retry-after"]) >= 1


@in_loop
async def test_a_crowd_that_left_is_no_demand_and_reaches_no_engine() -> None:
    async with stage(a_config(max_waiting=300)) as s:
        clients = [await s.client() for _ in range(250)]
        for client in clients:
            client.chat()
        await until(lambda: s.waiting() == 250)
        for client in clients:
            client.leave()
        await s.supervisor.hear(Demand, lambda d: d.model == "alpha" and d.waiting == 0)
        engine = await s.engine()
        s.supervisor.grant(engine)
        await until(lambda: s.gateway.admission.held("alpha") is not None)
        last = await s.client()
        last.chat()
        assert (await last.answer()).status == 200
        assert len(engine.requests) == 1
        assert s.in_flight() == s.waiting() == 0


@in_loop
async def test_several_who_will_not_wait_at_all_are_all_told_so() -> None:
    async with stage() as s:
        clients = [await s.client() for _ in range(4)]
        for client in clients:  # read in one turn of the loop, before the first has expired
            client.send(payload={"model": "alpha"}, headers=("X-Request-Timeout: 0.0001",))
        for client in clients:
            assert (await client.answer()).status == 504


@in_loop
async def test_waits_in_vain_are_measured_too_and_refusals_at_once_are_not() -> None:
    async with stage(a_config(max_waiting=2)) as s:
        late, gone, full, served = [await s.client() for _ in range(4)]
        late.send(payload={"model": "alpha"}, headers=("X-Request-Timeout: 0.05",))
        assert (await late.answer()).status == 504
        gone.chat()
        served.chat()
        await until(lambda: s.waiting() == 2)
        full.chat()
        assert (await full.answer()).status == 503
        gone.leave()
        await until(lambda: s.waiting() == 1)
        s.supervisor.grant(await s.engine())
        assert (await served.answer()).status == 200
        waits = s.gateway.observer.times["alpha"].waits
        assert sum(waits.counts) == 3
        assert waits.sum >= 0.05 - 1e-6  # a difference of two readings of the clock is rounded
