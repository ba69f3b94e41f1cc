"""Formats of a scrape: what Accept chooses, and that a large page comes in portions."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from llmux import metrics as m
from llmux.gateway.exposition import OPENMETRICS, TEXT, encode, negotiate
from llmux.metrics import PORTION, Store

# What Prometheus sends: 2.x, 3.x, and 3.x where only the text format is wanted.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PLAIN = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.5"


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3, "application/openmetrics-text"])
def test_openmetrics_for_those_that_ask(accept: str) -> None:
    form = negotiate(accept)
    assert form is OPENMETRICS
    assert form.content_type.startswith("application/openmetrics-text; version=")


@pytest.mark.parametrize("accept", ["", "*/*", PLAIN, "text/html", ";,;=,", "\xff" * 9])
def test_text_for_everything_else(accept: str) -> None:
    assert negotiate(accept) is TEXT
    assert TEXT.content_type == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("version", ["x.y", "", "1", "9" * 5000, "-1", "1.0.0.0"])
def test_a_version_that_makes_no_sense_is_no_error(version: str) -> None:
    assert negotiate(f"application/openmetrics-text;version={version}") in (TEXT, OPENMETRICS)


def filled(models: int) -> Store:
    store = Store()
    for model in range(models):
        store.add(m.REQUESTS, f"model-{model:03}", "200", amount=model)
        store.observe(m.QUEUE_WAIT, f"model-{model:03}", seconds=0.1)
        store.set(m.IN_FLIGHT, f"model-{model:03}", value=1)
    store.set(m.BUILD_INFO, "1.0", value=1)
    return store


@pytest.mark.parametrize(("form", "parse"), [(TEXT, plain), (OPENMETRICS, openmetrics)])
def test_a_large_page_is_one_in_portions(form: object, parse: object) -> None:
    """Between two portions the loop runs, and no family is taken apart."""
    store = filled(300)
    turns = 0

    async def page() -> bytes:
        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        try:
            return await encode(store.families(), form)  # type: ignore[arg-type]
        finally:
            counting.cancel()

    text = asyncio.run(page()).decode()
    samples = 300 * (1 + 20 + 1) + 1
    assert turns > samples // PORTION
    families = {family.name: family for family in parse(text)}  # type: ignore[operator]
    assert len(families["llmux_requests"].samples) == 300
    assert len(families["llmux_request_queue_wait_seconds"].samples) == 300 * 20
    assert text.count("# HELP llmux_request_queue_wait_seconds ") == 1
    assert text.endswith("# EOF\n") == (form is OPENMETRICS)
    assert max(len(family.samples) for family in store.families()) < PORTION + 20
