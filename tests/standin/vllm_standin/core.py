"""The engine core: schedules requests and steps them, and passes control calls to the workers.

It talks to the API server over one unix socket and to each worker over another. Nothing here
polls: an idle core waits without a time limit. While it waits for its workers (sleep, wake, reload)
it generates nothing, as vLLM's core does.

From the API server: {"op":"add",…} {"op":"abort","ids":[…]} {"op":"call","id":…,"method":…,…}
To the API server: {"out":[…],"running":n,"waiting":m} {"result":id,…} {"ready":…} {"failed":…}
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress

from ledger import find_start_time

from . import text
from .faults import Faults
from .kernel_objects import KernelObjects
from .options import Options
from .process import Channel, exit_on_sigterm, log, set_name
from .sampler import Sampler
from .worker import run_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Tokens of one request per step when there is no speed limit: small enough for an abort to be
# seen soon, large enough that the socket is not the limit.
BURST_TOKENS = 16

# How soon a hanging core looks whether the order to hang has been lifted.
HANG_CHECK_SECS = 0.05

SLEEP_TAGS = ("weights", "kv_cache")


class CallFailedError(Exception):
    """A control call failed; the engine lives on."""


class Job:
    """One sequence being generated."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.id: str = message["id"]
        self.message = message
        self.answer: text.Answer | None = None
        self.produced = 0
        self.due = 0.0
        self.limit = 0


class Core:
    """Queue, running set, and what is asleep."""

    def __init__(
        self,
        options: Options,
        faults: Faults,
        objects: KernelObjects,
        api: Channel,
        workers: list[Channel],
    ) -> None:
        self._options = options
        self._faults = faults
        self._objects = objects
        self._api = api
        self._workers = workers
        self._waiting: dict[str, Job] = {}
        self._running: dict[str, Job] = {}
        self._content = text.GOOD
        self._sleeping: set[str] = set()
        # the prefix cache knows blocks of prompts; they lost their data; no block has memory
        self._remembers = self._stale = self._unmapped = False
        self._paused = False
        self._sampler = Sampler(options.sampler_compiles)
        self._keep = False  # sleep?mode=keep: running requests stand still and go on after waking
        self._draining: list[tuple[int, int]] = []  # sleep?mode=wait: (call id, level)
        self._start = find_start_time("self")

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._api, select.POLLIN)
        for worker in self._workers:
            poll.register(worker, select.POLLIN)
        api_fd = self._api.fileno()
        held_back: list[dict[str, Any]] = []
        while True:
            hanging = self._faults.get("hang", False)
            for fd, _events in poll.poll(self._timeout_ms(hanging, bool(held_back))):
                if fd != api_fd:
                    # workers speak only when asked, and are then read in _ask
                    self._die("Worker proc died unexpectedly, shutting down executor.")
                messages = self._api.receive_all()
                if messages is None:
                    os._exit(0)
                held_back += messages
            # looked at anew: the order may have come while we waited
            hanging = self._faults.get("hang", False)
            if hanging is True:
                continue
            if held_back and find_start_time("self") != self._start:
                # restored: the GPU memory must be taken again before anything is computed
                self._start = find_start_time("self")
                self._ask({"op": "check"})
            messages, held_back = held_back, []
            for message in messages:
                self._handle(message)
            if not hanging:
                self._step()

    def _timeout_ms(self, hanging: object, held_back: bool) -> float | None:
        if hanging:
            # only while something waits for the hang to end
            waiting = held_back or self._running or self._waiting
            return HANG_CHECK_SECS * 1000 if waiting else None
        if self._keep or not self._running:
            return None
        wait = min(job.due for job in self._running.values()) - time.monotonic()
        return max(wait * 1000, 0)

    # requests

    def _handle(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "add":
                self._waiting[message["id"]] = Job(message)
                self._admit()
                self._send([])
            case "abort":
                for job_id in message["ids"]:
                    self._waiting.pop(job_id, None)
                    self._running.pop(job_id, None)
                self._admit()
                self._send([])
                self._finish_draining()
            case "call":
                self._call(message)

    def _admit(self) -> None:
        """Move waiting requests to running, as far as state and room allow."""
        if self._paused or self._sleeping or self._draining:
            return
        options = self._options
        while self._waiting and len(self._running) < options.max_num_seqs:
            job_id = next(iter(self._waiting))
            job = self._waiting.pop(job_id)
            message = job.message
            job.answer = text.Answer(
                options.name,
                message["prompt"],
                natural_tokens=options.answer_tokens,
                temperature=message.get("temperature", 0.0),
                seed=message.get("seed"),
                content=text.GARBAGE if self._stale else self._content,
            )
            if complaint := self._sampler.complaint(message.get("temperature", 0.0)):
                self._die(complaint)
            job.limit = message["max_tokens"]
            job.due = time.monotonic() + self._faults.secs("ttft_secs", options.ttft_secs)
            self._running[job_id] = job

    def _step(self) -> None:
        if not self._running or self._keep:
            return
        if self._unmapped:
            self._die("CUDA error: an illegal memory access was encountered")
        self._remembers = True
        speed = self._faults.secs("tokens_per_sec", self._options.tokens_per_sec)
        now = time.monotonic()
        outputs = []
        for job in [job for job in self._running.values() if job.due <= now]:
            outputs.append(self._generate(job, 1 if speed > 0 else BURST_TOKENS))
            if speed > 0:
                # a core that was stopped for a while does not make up for it in a burst
                job.due = max(job.due + 1 / speed, now - 1 / speed)
        if outputs:
            self._objects.count_step()
            self._admit()
            self._send(outputs)
            self._finish_draining()

    def _generate(self, job: Job, count: int) -> dict[str, Any]:
        message = job.message
        output: dict[str, Any] = {"id": job.id, "t": []}
        if message.get("embed"):
            del self._running[job.id]
            return {**output, "f": "stop", "content": self._content}
        answer = job.answer
        assert answer is not None
        logprobs: list[float] = []
        for _ in range(count):
            output["t"].append(answer.token(job.produced))
            logprobs.append(answer.logprob(job.produced))
            job.produced += 1
            if job.produced >= job.limit:
                output["f"] = "length"
            elif job.produced >= answer.natural_length and not message.get("ignore_eos"):
                if job.produced < message.get("min_tokens", 0):
                    continue
                output["f"] = "stop" if answer.ends_by_itself else "length"
            if "f" in output:
                del self._running[job.id]
                break
        if message.get("logprobs"):
            output["lp"] = logprobs
        return output

    def _send(self, outputs: list[dict[str, Any]]) -> None:
        self._api.send(
            {"out": outputs, "running": len(self._running), "waiting": len(self._waiting)}
        )

    def _abort_all(self) -> None:
        jobs = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._send([{"id": job_id, "t": [], "f": "abort"} for job_id in jobs])

    # control calls

    def _call(self, message: dict[str, Any]) -> None:
        call_id: int = message["id"]
        method: str = message["method"]
        try:
            match method:
                case "sleep":
                    self._begin_sleep(call_id, message["level"], message["mode"])
                    return  # answered when it is done
                case "wake_up":
                    result: Any = self._wake(message["tags"])
                case "is_sleeping":
                    result = self._paused or bool(self._sleeping)
                case "reset_prefix_cache":
                    result = not self._running
                    if result:
                        self._remembers = self._stale = False
                case "collective_rpc":
                    result = self._collective_rpc(message["rpc"], message["kwargs"])
                case _:
                    raise CallFailedError(f"unknown method {method}")
        except CallFailedError as error:
            log("EngineCore", f"Invocation of {method} method failed: {error}", "ERROR")
            self._api.send({"result": call_id, "error": f"Call to {method} method failed: {error}"})
        else:
            self._api.send({"result": call_id, "value": result})

    def _begin_sleep(self, call_id: int, level: int, mode: str) -> None:
        match mode:
            case "wait" if self._running:
                log("EngineCore", "Waiting for in-flight requests to complete before sleeping...")
                self._draining.append((call_id, level))
                return
            case "abort":
                self._abort_all()
            case "keep":
                self._keep = True
        self._sleep(call_id, level)

    def _finish_draining(self) -> None:
        if not self._running:
            draining, self._draining = self._draining, []
            for call_id, level in draining:
                self._sleep(call_id, level)

    def _sleep(self, call_id: int, level: int) -> None:
        try:
            if self._faults.take("sleep_error"):
                raise CallFailedError("CUDA error: an illegal memory access was encountered")
            self._paused = True
            if level >= 1 and "weights" not in self._sleeping:
                started = time.monotonic()
                self._ask({"op": "sleep", "level": level})
                self._sleeping = set(SLEEP_TAGS)
                took = time.monotonic() - started
                log("EngineCore", f"It took {took:.6f} seconds to fall asleep.")
        except CallFailedError as error:
            self._paused = self._keep = False
            self._admit()
            log("EngineCore", f"Invocation of sleep method failed: {error}", "ERROR")
            self._api.send({"result": call_id, "error": f"Call to sleep method failed: {error}"})
        else:
            self._api.send({"result": call_id, "value": None})

    def _wake(self, tags: list[str] | None) -> bool:
        if self._faults.take("wake_error"):
            raise CallFailedError("CUDA Error: unspecified launch failure")
        wanted = list(SLEEP_TAGS) if tags is None else [tag for tag in tags if tag != "scheduling"]
        known = [tag for tag in wanted if tag in self._sleeping]
        if self._sleeping and wanted and (known == wanted or tags is None):
            started = time.monotonic()
            try:
                self._ask({"op": "wake", "tags": known})
            except CallFailedError:
                self._ask_quietly({"op": "sleep_again", "tags": known})
                raise
            self._sleeping -= set(known)
            took = time.monotonic() - started
            log("EngineCore", f"It took {took:.6f} seconds to wake up tags {known}.")
        elif wanted and tags is not None:
            log("EngineCore", f"Tag {wanted} is not in sleeping tags {self._sleeping}", "WARNING")
        if not self._sleeping:
            self._paused = self._keep = False
            self._admit()
        return not self._sleeping

    def _collective_rpc(self, rpc: str, kwargs: dict[str, Any]) -> list[None]:
        match rpc:
            case "reload_weights":
                if self._faults.take("reload_error"):
                    raise CallFailedError("CUDA error: an illegal memory access was encountered")
                self._ask({"op": "reload"})
            case "discard" | "wake_up":
                # past the executor, which does not count them as asleep: /wake_up does nothing then
                self._call_workers(rpc, list(kwargs["tags"]))
            case _:
                raise CallFailedError(f"Method {rpc!r} is not implemented.")
        return [None] * len(self._workers)

    def _call_workers(self, rpc: str, tags: list[str]) -> None:
        if rpc == "discard" and self._faults.take("discard_error"):
            raise CallFailedError("CUDA Error: unspecified launch failure")
        self._ask({"op": "discard" if rpc == "discard" else "map", "tags": tags})
        if "kv_cache" in tags:
            self._unmapped = rpc == "discard" and self._options.sleep_mode
            self._stale = self._stale or (self._unmapped and self._remembers)

    # workers

    def _ask(self, message: dict[str, Any]) -> None:
        """All workers at once, as a collective does; any failure is the call's."""
        for worker in self._workers:
            worker.send(message)
        errors = []
        for worker in self._workers:
            reply = worker.receive()
            if reply is None:
                self._die("Worker proc died unexpectedly, shutting down executor.")
            elif "error" in reply:
                errors.append(reply["error"])
            else:
                self._content = reply["content"]
        if errors:
            raise CallFailedError(errors[0])

    def _ask_quietly(self, message: dict[str, Any]) -> None:
        with suppress(CallFailedError):  # the first failure is the one to report
            self._ask(message)

    def _die(self, reason: str) -> None:
        for line in f"EngineCore encountered a fatal error. {reason}".splitlines():
            log("EngineCore", line, "ERROR")
        os._exit(1)


def run_core(options: Options, faults: Faults, objects: KernelObjects, sock: socket.socket) -> None:
    """Body of the forked process; does not return."""
    set_name("VLLM::EngineCore")
    workers: list[Channel] = []
    pids: list[int] = []
    for rank in range(options.tensor_parallel_size):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            sock.close()
            ours.close()
            for other in workers:
                other.close()
            run_worker(options, faults, rank, theirs)
            os._exit(0)
        theirs.close()
        workers.append(Channel(ours))
        pids.append(pid)
    exit_on_sigterm(faults, lambda: _end_workers(pids))
    api = Channel(sock)
    kv_bytes = 0
    for worker in workers:
        reply = worker.receive()
        if reply is None or "error" in reply:
            failure = "a worker died while starting" if reply is None else reply["error"]
            api.send({"failed": failure})
            _end_workers(pids, signal.SIGKILL)
            os._exit(1)
        kv_bytes = reply["kv_bytes"]
    api.send({"ready": True, "worker_pids": pids, "kv_bytes": kv_bytes})
    Core(options, faults, objects, api, workers).run()


def _end_workers(pids: list[int], number: int = signal.SIGTERM) -> None:
    for pid in pids:
        os.kill(pid, number)
    for pid in pids:
        os.waitpid(pid, 0)
