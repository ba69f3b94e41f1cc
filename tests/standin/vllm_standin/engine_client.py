"""The API server's end of the socket to the engine core."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

# One message can carry a whole prompt or many outputs.
_LINE_LIMIT = 1 << 26


class EngineDeadError(Exception):
    """The core is gone; nothing will be answered any more."""

    def __init__(self) -> None:
        super().__init__(
            "EngineCore encountered an issue. See stack trace (above) for the root cause."
        )


class EngineFailedError(Exception):
    """The core could not start."""


class CallFailedError(Exception):
    """A control call failed; the text is the core's."""


class EngineClient:
    """Sends requests and calls, hands each output to the task that waits for it."""

    def __init__(self) -> None:
        self.dead = asyncio.Event()
        self.running = 0
        self.waiting = 0
        self.worker_pids: list[int] = []
        self.kv_bytes = 0
        self._outputs: dict[str, asyncio.Queue[dict[str, Any] | None]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self, sock: socket.socket) -> None:
        """Wait until the core is ready."""
        reader, self._writer = await asyncio.open_connection(sock=sock, limit=_LINE_LIMIT)
        line = await reader.readline()
        message: dict[str, Any] = {"failed": "the core died"}
        if line.endswith(b"\n"):
            message = json.loads(line)
        if "failed" in message:
            raise EngineFailedError(message["failed"])
        self.worker_pids = message["worker_pids"]
        self.kv_bytes = message["kv_bytes"]
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Outputs of one sequence, the last with its finish reason; left early, it is aborted."""
        self._raise_if_dead()
        request_id: str = request["id"]
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._outputs[request_id] = queue
        self._send({"op": "add", **request})
        finished = False
        try:
            while not finished:
                output = await queue.get()
                if output is None:
                    finished = True
                    raise EngineDeadError
                finished = "f" in output
                yield output
        finally:
            self._outputs.pop(request_id, None)
            if not finished:
                self._send({"op": "abort", "ids": [request_id]})

    async def call(self, method: str, **arguments: Any) -> Any:
        self._raise_if_dead()
        call_id = next(self._call_ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._send({"op": "call", "id": call_id, "method": method, **arguments})
        return await future

    def _raise_if_dead(self) -> None:
        if self.dead.is_set():
            raise EngineDeadError

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self.dead.is_set():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                self._dispatch(json.loads(line))
        except ConnectionError:
            pass  # the same news as the end of the stream
        self.dead.set()
        for queue in self._outputs.values():
            queue.put_nowait(None)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError())

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "out" in message:
            self.running = message["running"]
            self.waiting = message["waiting"]
            for output in message["out"]:
                queue = self._outputs.get(output["id"])
                if queue is not None:
                    queue.put_nowait(output)
            return
        future = self._calls.pop(message["result"])
        if future.done():
            return  # the caller has gone
        if "error" in message:
            future.set_exception(CallFailedError(message["error"]))
        else:
            future.set_result(message["value"])
