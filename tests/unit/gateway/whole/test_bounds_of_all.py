"""Bounds and times that a stranger meets: a digit too many makes none of a bound."""

from __future__ import annotations

from types import ModuleType

import pytest

from llmux.gateway import (
    dispatch,
    engine_samples,
    engine_series,
    journal,
    link,
    metrics,
    server,
    stopping,
    subscriptions,
    supervisor,
    workers,
)
from llmux.gateway.admission import admission, keys, retry_after, suspects
from llmux.gateway.client import body, connection, half_closed, listeners, turns
from llmux.gateway.control import app, observation
from llmux.gateway.engine import answer_head, health, pool
from llmux.gateway.engine import connection as engine_connection
from llmux.gateway.exchange import held_error, keep_alive, loading_text, response_id
from llmux.gateway.http import (
    budget,
    hosts,
    json_finder,
    multipart,
    problems,
    replies,
    request_head,
    routes,
)
from llmux.gateway.ui import board, rows

KIB, MIB = 1 << 10, 1 << 20
DAY = 24 * 3600


@pytest.mark.parametrize(
    ("module", "name", "least", "most"),
    [
        # What one request, one connection or one engine may make a worker hold.
        (connection, "MAX_HEAD", 8 * KIB, 16 * KIB - 1),  # Sanic's own is 16 KiB
        (connection, "MAX_QUEUED", 8, 32),
        (connection, "MAX_QUEUED_BYTES", 512 * KIB, 2 * MIB),
        (body, "MAX_SKIPPED_BODY", 8 * KIB, 64 * KIB),
        (body, "MAX_CONTROL_BODY", 512 * KIB, 2 * MIB),
        (body, "MAX_PIECES_BYTES", 32 * KIB, 128 * KIB),
        (budget, "SHORT_BODY", 32 * KIB, 128 * KIB),
        (multipart, "MEMORY_BYTES", 64 * KIB, 256 * KIB),
        (multipart, "MAX_PART_HEAD", 8 * KIB, 32 * KIB),
        (multipart, "MAX_PARTS", 1000, 1000),  # as vLLM's server
        (multipart, "MAX_MODEL", 512, 4 * KIB),
        (multipart, "MAX_YES", 5, 16),  # "false" is the longest word
        (json_finder, "MAX_KEY", 6 * len("previous_response_id") + 2, 256),
        (json_finder, "MAX_DEPTH", 900, 1000),
        (json_finder, "MAX_VALUE", 1 * KIB, 8 * KIB),
        (request_head, "MAX_REQUEST_ID", 128, 128),
        (request_head, "MAX_KEPT", 1 * KIB, 4 * KIB),
        (routes, "_LONGEST_NAME", 600, 600),
        (hosts, "MAX_CACHED", 64, 512),
        (keys, "MAX_VERIFIED", 1024, 8192),
        (response_id, "SEARCHED_BYTES", 1 * KIB, 8 * KIB),
        (answer_head, "MAX_LENGTH_DIGITS", 18, 18),  # 2**63 has 19
        (engine_connection, "MAX_HEAD", 64 * KIB, 64 * KIB),  # as h11
        (engine_connection, "MAX_INTERIM", 8, 32),
        (engine_connection, "COPY_BYTES", 16 * KIB, 256 * KIB),
        (held_error, "MAX_HELD", 32 * KIB, 128 * KIB),
        (keep_alive, "MAX_ERROR", 32 * KIB, 128 * KIB),
        (loading_text, "MAX_WORDS", 100, 400),
        (engine_samples, "MAX_LINES", 5_000, 50_000),
        (engine_samples, "MAX_LINE", 4 * KIB, 16 * KIB),
        (engine_samples, "MAX_SAMPLES", 2_000, 10_000),
        (engine_series, "MAX_BYTES", 1 * MIB, 4 * MIB),
        (metrics, "MAX_HEAD", 8 * KIB, 32 * KIB),
        (subscriptions, "MAX_UNREAD", 500, 2_000),
        (board, "MAX_UNREAD", 1 * MIB, 1 * MIB),
        (board, "KEEP_EVENTS", 5_000, 20_000),
        (board, "KEEP_FRAMES", 60, 240),
        (rows, "STEP_BYTES", 16 * MIB, 256 * MIB),
        (pool, "MAX_IDLE", 128, 512),
        (listeners, "BACKLOG", 1024, 8192),
        (turns, "SLICE", 4 * KIB, 16 * KIB),
        (turns, "AT_ONCE", 2, 8),
        (turns, "SLICES_SECS", 0.001, 0.005),
        (observation, "TAIL_LINES", 100, 100),
        (observation, "MAX_TAIL_LINES", 10_000, 10_000),
        (observation, "MAX_DIGITS", 5, 18),
        (journal, "BURST", 2, 10),
        (journal, "BURST_SECS", 5.0, 30.0),
        (journal, "MAX_TEXT", 100, 600),
        (suspects, "MAX_DEATHS", 10, 40),
        (retry_after, "RECENT", 100, 1000),
        # How long a client that does nothing is borne …
        (connection, "RECEIVE_SECS", 60.0, 60.0),
        (connection, "RECEIVE_RATE", 1 * KIB, 16 * KIB),
        (connection, "KEEP_ALIVE_SECS", 75.0, 300.0),  # longer than nginx's 60 s of an idle one
        (connection, "FIRST_SECS", 0.5, 5.0),
        (connection, "FLUSH_SECS", 10.0, 60.0),
        (connection, "LINGER_SECS", 1.0, 5.0),
        (half_closed, "WAITED_SECS", 1.0, 5.0),
        (metrics, "HEAD_SECS", 5.0, 30.0),
        # … and hears nothing: proxies give up after 60 s, some after 30.
        (observation, "KEEP_ALIVE_SECS", 5.0, 25.0),
        (board, "KEEP_ALIVE_SECS", 5.0, 25.0),
        (board, "REFRESH_SECS", 1.0, 1.0),
        (board, "KEEP_SECS", 3600.0, 3600.0),
        (replies, "MAX_AGE_SECS", 600, 7200),
        (problems, "DEFAULT_RETRY_AFTER", 1.0, 1.0),
        (problems, "AWAY_RETRY_SECS", 5.0, 30.0),
        (problems, "MAX_RETRY_AFTER", DAY, DAY),
        (budget, "RETRY_SECS", 1.0, 5.0),
        (retry_after, "UNKNOWN_SWITCH_SECS", 5.0, 30.0),
        (loading_text, "LOOK_SECS", 1.0, 5.0),
        (loading_text, "OLD_SECS", 5.0, 30.0),
        # How long an engine or the supervisor is waited for.
        (pool, "CONNECT_SECS", 2.0, 10.0),
        (health, "PATIENCE_SECS", 1.0, 5.0),
        (admission, "SUSPECT_SECS", 0.5, 2.0),
        (engine_series, "ENGINE_SECS", 0.25, 1.0),
        (engine_series, "ENGINE_CACHE_SECS", 1.0, 5.0),
        (metrics, "SUPERVISOR_SECS", 0.5, 2.0),
        (dispatch, "OWNER_SECS", 2.0, 10.0),
        (dispatch, "REPORT_SECS", 0.05, 0.5),
        (app, "ASK_SECS", 5.0, 30.0),
        (observation, "ASK_SECS", 5.0, 30.0),
        (board, "ASK_SECS", 5.0, 30.0),
        (loading_text, "ASK_SECS", 5.0, 30.0),
        (link, "COALESCE_SECS", 0.001, 0.01),
        (link, "PROGRESS_SECS", 0.5, 2.0),
        (link, "ALIVE_SECS", 2.0, 10.0),
        (link, "RECONNECT_FIRST_SECS", 0.01, 0.1),
        (link, "RECONNECT_MAX_SECS", 0.5, 2.0),
        (supervisor, "AWAY_SECS", 10.0, 60.0),
        (server, "READY_SECS", 5.0, 30.0),
        (server, "SWEEP_SECS", 0.5, 2.0),
        (stopping, "ABORT_SECS", 0.5, 2.0),
        # A worker that stands still, ends or does not end.
        (workers, "HANG_SECS", 10.0, 30.0),
        (workers, "START_SECS", 30.0, 120.0),
        (workers, "BEAT_SECS", 1.0, 5.0),
        (workers, "STOP_BEAT_SECS", 0.1, 1.0),
        (workers, "FIRST_DELAY_SECS", 0.05, 0.5),
        (workers, "MAX_DELAY_SECS", 2.0, 10.0),
        (workers, "YOUNG_SECS", 1.0, 10.0),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else str(value),
)
def test_a_bound_is_of_its_size(module: ModuleType, name: str, least: float, most: float) -> None:
    assert least <= getattr(module, name) <= most


def test_times_fit_each_other() -> None:
    assert stopping.DrainLimits().away_secs < stopping.DrainLimits().secs < workers.STOP_SECS
    assert 2 * link.ALIVE_SECS < supervisor.AWAY_SECS
    beat = workers.HANG_SECS / workers.BEATS
    assert beat >= server.SWEEP_SECS
    assert 2.0 <= workers.HANG_SECS / (beat * server.IDLE_SWEEPS) <= 10.0, "while it is idle"
    assert 2 <= server.WATCHDOG_BEATS <= 4
    assert 1.0 <= workers.HANG_SECS / workers.HANG_LOOKS <= workers.BEAT_SECS
    assert connection.LINGER_SECS < connection.FLUSH_SECS < connection.RECEIVE_SECS
    assert metrics.SUPERVISOR_SECS + engine_series.ENGINE_SECS < 10.0, "Prometheus gives up"
