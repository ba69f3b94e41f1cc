"""Rows stay equal while nothing happens."""

from __future__ import annotations

from typing import Any

from llmux.gateway.ui.rows import changed_rows, changes, head, row

STATUS: dict[str, Any] = {
    "state": "failed", "since_secs": 10.0, "retry_in_secs": 5.0, "oldest_wait_secs": None,
    "idle_secs": 0, "gpu_bytes": 10 * 2**30, "queue_depth": 2, "usual_secs": 3.25,
}  # fmt: skip


def test_ages_and_remaining_times_become_points_in_time() -> None:
    made = row(STATUS, 1000.0, None)
    assert made == {
        "state": "failed", "since": 990.0, "retry_at": 1005.0, "oldest_since": None,
        "idle_since": None, "gpu_bytes": 10 * 2**30, "queue_depth": 2, "usual_secs": 3.25,
    }  # fmt: skip


def test_a_later_look_at_the_same_is_the_same() -> None:
    first = row(STATUS, 1000.0, None)
    later = STATUS | {"since_secs": 17.3, "retry_in_secs": 0.0 - 2.1, "gpu_bytes": 10 * 2**30 + 99}
    assert row(later, 1007.2, first) == first
    moved = row(later | {"since_secs": 0.0, "gpu_bytes": 0}, 1007.2, first)
    assert changes(first, moved) == {"since": 1007.2, "gpu_bytes": 0}


def test_a_number_that_is_no_time_is_never_held_back() -> None:
    first = row({"queue_depth": 2, "failures": 1}, 1000.0, None)
    assert row({"queue_depth": 3, "failures": 1}, 1001.0, first)["queue_depth"] == 3


def test_what_went_is_said() -> None:
    assert changes({"a": 1, "b": 2}, {"a": 1}) == {"b": None}
    assert changed_rows({"x": {"a": 1}, "y": {}}, {"x": {"a": 1}}) == {"y": None}
    assert changed_rows({}, {"x": {"a": None}}) == {"x": {"a": None}}


def test_lists_of_the_head_are_rows_too() -> None:
    first = head({"models": {}, "orders": [{"id": 4, "since_secs": 1.0}]}, 50.0, {})
    assert first == {"orders": [{"id": 4, "since": 49.0}]}
    again = head({"models": {}, "orders": [{"id": 4, "since_secs": 3.1}]}, 52.0, first)
    assert again == first
