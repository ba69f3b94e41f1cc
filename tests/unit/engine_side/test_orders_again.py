"""An order that failed is given again, as often as there are pauses; a refused one is not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llmux.drivers.engine.vllm import VllmEngine
from llmux.errors import EngineUnhealthy
from llmux.protocol import Address

GOOD = 200
CUT = 0  # the connection ends without an answer


@pytest.mark.parametrize(
    ("answers", "failure"),
    [
        ([GOOD], None),
        ([299], None),
        ([CUT, GOOD], None),
        ([500, CUT, GOOD], None),
        ([408, 425, GOOD], None),
        ([429, 503, 204], None),
        ([CUT, CUT, CUT], "POST /collective_rpc: "),
        ([500, 502, 503], "/collective_rpc answered 503"),
        ([500, CUT, 500], "/collective_rpc answered 500"),
        ([300], "/collective_rpc answered 300"),
        ([400], "/collective_rpc answered 400"),
        ([500, 404], "/collective_rpc answered 404"),
        ([CUT, 499], "/collective_rpc answered 499"),
    ],
)
def test_an_order_is_given_until_it_is_taken(
    tmp_path: Path, answers: list[int], failure: str | None
) -> None:
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /collective_rpc ")
        await reader.readuntil(b"}")
        if status := left.pop(0):
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)
        writer.close()

    async def body() -> None:
        server = await asyncio.start_unix_server(serve, str(tmp_path / "s"))
        async with server:
            order = VllmEngine(retry_pauses=(0, 0)).reload_weights(
                Address(uds=str(tmp_path / "s")), 20.0
            )
            if failure is None:
                await order
            else:
                with pytest.raises(EngineUnhealthy) as raised:
                    await order
                assert failure in str(raised.value)
        assert left == []

    asyncio.run(body())


def test_what_no_time_is_left_for_is_not_tried(tmp_path: Path) -> None:
    async def body() -> None:
        order = VllmEngine(retry_pauses=(100.0,)).reload_weights(
            Address(uds=str(tmp_path / "none")), 100.0
        )
        with pytest.raises(EngineUnhealthy, match="No such file"):
            await order

    asyncio.run(body())
