"""A port of a guest's loopback on the host's: for clients that cannot run in the guest.

    with forwarded(guest.pid1, 3000) as port:
        urlopen(f"http://127.0.0.1:{port}/health")

The work is done by this same file as a program in the guest's network namespace, with the host's
listening socket as its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

PIECE = 64 * 1024


@contextlib.contextmanager
def forwarded(pid1: int, port: int) -> Iterator[int]:
    """A port on this host that leads to 127.0.0.1:``port`` in the guest of that PID 1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        program = [sys.executable, "-I", os.path.abspath(__file__), str(port)]
        # only the network is the guest's: its mounts have no such interpreter
        process = subprocess.Popen(
            ["nsenter", "-t", str(pid1), "-n", "--", *program], stdin=listener.fileno()
        )
        try:
            yield listener.getsockname()[1]
        finally:
            process.kill()
            process.wait()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(PIECE):
            writer.write(data)
            await writer.drain()


async def _serve(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until either side has ended: that a client hangs up is to be seen inside."""
    writers = [writer]
    try:
        answers, inside = await asyncio.open_connection("127.0.0.1", port)
        writers.append(inside)
        copies = [
            asyncio.create_task(_copy(reader, inside)),
            asyncio.create_task(_copy(answers, writer)),
        ]
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for copy in copies:
            copy.cancel()
    except OSError as error:
        print(f"forward: 127.0.0.1:{port} in the guest: {error}", file=sys.stderr)
    finally:
        for one in writers:
            one.close()


async def main(port: int) -> None:
    with socket.socket(fileno=0) as listener:
        server = await asyncio.start_server(
            lambda reader, writer: _serve(port, reader, writer), sock=listener
        )
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
