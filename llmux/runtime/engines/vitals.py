"""Signs of life: does an engine from which no byte comes work, or does it hang?

Judged by what moves, never by a request that would queue behind the work in question:

1. its counters move: it lives, whatever else it says or leaves unsaid.
2. no HTTP answer and no CPU time: it hangs (stopped, deadlocked).
3. an HTTP answer, and no counters to judge by: it lives.
4. it says that nothing runs, and a short completion, which then queues behind nothing, gets any
   answer: it lives.
5. its counters stand still, or a 5xx is all that it answers, and its processes compute (a
   compilation, a long prefill): it lives, but not for longer than STEP_LIMITS times the limit.
6. its counters stand still with requests running, or a 5xx is all that it answers, and nothing
   computes: it hangs. vLLM's API server answers 503 for ever when its engine core is dead.

An engine that was only suspected (a connection broke) lives with any answer but its own 5xx, and
with that when its counters move.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llmux.errors import DriverError, EngineUnhealthy
from llmux.ports import UnitHandle, Vitals
from llmux.protocol import Address
from llmux.runtime.host import Drivers

STEP_LIMITS = 10.0  # one step of an engine may take minutes; 20 of them with the default limit
# Of one processor, over the whole watch. Answering our own questions takes 1 %; an engine that
# waits for its GPU spins (100 %) or, where it blocks, is judged by its counters alone.
COMPUTES = 0.25
MIN_WATCH_SECS = 1.0  # over less, CPU time in ticks of 10 ms says nothing
FIRST_PAUSE_SECS = 0.05
LAST_PAUSE_SECS = 5.0
ANSWER_SECS = 5.0  # a busy API server answers late


@dataclass(frozen=True, slots=True)
class Progress:
    """An engine's counters, and since when (the event loop's time) they have stood there. ``value``
    is None of one that has answered with nothing but 5xx since then."""

    value: float | None
    since: float


@dataclass(frozen=True, slots=True)
class _Sample:
    vitals: Vitals
    cpu: float
    at: float


class Watch:
    """One look at one engine, for up to ``seconds``. ``progress``: where the last one ended."""

    def __init__(
        self,
        drivers: Drivers,
        model: str,
        address: Address,
        handle: UnitHandle | None,
        *,
        stalled: bool,
        progress: Progress | None,
    ) -> None:
        self._drivers = drivers
        self._model = model
        self._address = address
        self._handle = handle
        self._stalled = stalled
        self.progress = progress
        self._baseline: float | None = None
        self._began = self._cpu = 0.0

    async def run(self, seconds: float) -> None:
        """Returns with the first sign of life. Raises EngineUnhealthy when there was none."""
        self._began = _now()
        self._cpu = await self._cpu_seconds()
        latest = await self._sample(seconds)
        # The first question counts, which a stopped engine lets wait for ANSWER_SECS; what moves is
        # seen by those that follow.
        ends = max(self._began + seconds, latest.at + min(seconds, MIN_WATCH_SECS))
        pause = FIRST_PAUSE_SECS
        while not (self._lives(latest, seconds) or await self._idles(latest, ends)):
            left = ends - latest.at
            if left <= 0:
                raise EngineUnhealthy(
                    "trust", f"the engine at {self._address}", self._verdict(latest, seconds)
                )
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, LAST_PAUSE_SECS)
            latest = await self._sample(max(ends - _now(), FIRST_PAUSE_SECS))

    async def _idles(self, latest: _Sample, ends: float) -> bool:
        """Whether it says that it has no request, and answers one."""
        left = ends - latest.at
        if latest.vitals.running != 0 or left <= 0:
            return False
        try:
            await self._drivers.engine.canary(self._address, self._model, left)
        except EngineUnhealthy as error:
            # 404, 500: it answered. Of one whose /health fails so does a dead core's API server.
            return "status" in error.fields and (latest.vitals.status or 0) < 500
        except DriverError:
            return False
        return True

    async def _sample(self, left: float) -> _Sample:
        vitals = await self._drivers.engine.vitals(self._address, min(left, ANSWER_SECS))
        cpu, now = await self._cpu_seconds(), _now()
        self._date(vitals, now)
        return _Sample(vitals, cpu, now)

    def _date(self, vitals: Vitals, now: float) -> None:
        known, value = self.progress, vitals.progress
        if value is not None:
            if known is None or known.value != value:
                self.progress = Progress(value, now)
        elif vitals.status is not None and vitals.status >= 500:
            self.progress = known or Progress(None, now)
        elif vitals.status is not None and known is not None and known.value is None:
            self.progress = None  # it answers again

    async def _cpu_seconds(self) -> float:
        handle = self._handle
        return 0.0 if handle is None else await self._drivers.units.cpu_seconds(handle)

    def _lives(self, latest: _Sample, seconds: float) -> bool:
        vitals = latest.vitals
        if self._baseline is None:
            self._baseline = vitals.progress
        if vitals.progress is not None and vitals.progress != self._baseline:  # 1
            return True
        if vitals.status is None:  # 2
            return self._computes(latest, seconds)
        if not self._stalled or (vitals.progress is None and vitals.status < 500):  # 3
            return vitals.status < 500
        still = latest.at - self.progress.since if self.progress is not None else 0.0
        return still < STEP_LIMITS * 2 * seconds and self._computes(latest, seconds)  # 5, 6

    def _computes(self, latest: _Sample, seconds: float) -> bool:
        elapsed = latest.at - self._began
        if elapsed < min(MIN_WATCH_SECS, seconds):
            return False
        return latest.cpu - self._cpu >= COMPUTES * elapsed

    @staticmethod
    def _verdict(latest: _Sample, seconds: float) -> str:
        status = latest.vitals.status
        if status is None:
            return f"no answer and no computing for {seconds:g} s"
        if status >= 500:
            return f"/health says {status} for {seconds:g} s"
        return f"its counters stand still and it does not compute, for {seconds:g} s"


def _now() -> float:
    return asyncio.get_running_loop().time()
