"""The gateway's own description against what it does: nothing undocumented, and no crash."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from standin_front import StandinFront

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.long

# Streams without an end, and what the stand-in would generate at length.
ENDLESS = ("/events", "/logs/stream/{model}")


def test_every_operation_answers_as_described(standin: StandinFront) -> None:
    results: dict[str, Any] = {
        "status": {"models": {}},
        "logs": {"lines": []},
        "events": {"events": [], "more": False},
    }
    standin.stage.supervisor.answer = lambda ask: {"ok": True, "result": results.get(ask.verb, {})}
    key = {"Authorization": f"Bearer {standin.keys.admin}"}
    answer = requests.get(f"{standin.url}/openapi.json", headers=key, timeout=30)
    assert answer.status_code == 200, answer.text
    schema = schemathesis.openapi.from_dict(answer.json())
    schema.config.update(base_url=standin.url)
    operations = [
        found.ok() for found in schema.get_all_operations() if found.ok().path not in ENDLESS
    ]
    assert len(operations) > 60
    for operation in operations:
        strategy = operation.as_strategy()

        @settings(
            max_examples=4, deadline=None, database=None, derandomize=True,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=strategy, timeout=st.just("0.05"))
        def check(case: Any, timeout: str) -> None:
            headers = {**key, "X-Request-Timeout": timeout}
            response = case.call(headers=headers, timeout=10)
            case.validate_response(
                response,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    schemathesis.checks.status_code_conformance,
                    schemathesis.checks.content_type_conformance,
                    schemathesis.checks.response_schema_conformance,
                ],
            )

        check()
    standin.until(lambda: standin.metric("llmux_in_flight") == 0)
