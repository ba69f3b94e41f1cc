"""Hypothesis drives the core with a small world of workers and engines that follow the protocol.

What must hold after every step: no GPU over its capacity; nothing is parked, stopped or woken under
a request in flight (unless the cut deadline passed); one operation at a time per model; nothing is
restored ahead but of a model that waits for room, and only a restore finds it. And at the end, when
faults stop: everyone who waits is served or refused, nothing is left that was restored ahead, and
nothing moves any more.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from llmux.config.schema import (
    Config,
    Eviction,
    ModelConfig,
    PolicyConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.core.demand.workers import demand_by_model
from llmux.core.effects import (
    DropAhead,
    Effect,
    Probe,
    RestoreAhead,
    RunPlan,
    SendCut,
    SendGrant,
    SendRefuse,
    SendRevoke,
)
from llmux.core.events import (
    ConfigChanged,
    DemandChanged,
    EngineExited,
    Event,
    GpuReleased,
    ImageKnown,
    KeepAliveSet,
    LoadAsked,
    MemoryPressure,
    ModeSet,
    OperationFinished,
    ParkAsked,
    PinSet,
    ProbeFinished,
    ResidueSeen,
    Tick,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.core.plans import Outcome
from llmux.core.records import (
    ROUNDING,
    Draining,
    Failed,
    Parked,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    is_resident,
    keeps_gpu,
    share_now,
)
from llmux.core.reducer import initial, reduce
from llmux.core.states import MOVING

MODELS = ("a", "b", "c", "d")
EVICTIONS = [
    Eviction(Weights.RETAIN, Process.STOP),
    Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING),
    Eviction(Weights.DISCARD, Process.KEEP_RUNNING),
    Eviction(Weights.RETAIN, Process.FREEZE),
    Eviction(Weights.OFFLOAD, Process.FREEZE),
    Eviction(Weights.RETAIN, Process.KEEP_RUNNING),
    Eviction(Weights.OFFLOAD, Process.CHECKPOINT),
    Eviction(Weights.DISCARD, Process.CHECKPOINT),
    Eviction(Weights.DISCARD, Process.CUDA_SUSPEND),
]
EXAMPLES = int(os.environ.get("LLMUX_CORE_EXAMPLES", "60"))  # raise it for a long search


LADDERS = [
    (),
    (),
    (Eviction(Weights.RETAIN, Process.STOP),),
    (
        Eviction(Weights.OFFLOAD, Process.FREEZE),
        Eviction(Weights.DISCARD, Process.CHECKPOINT),
        Eviction(Weights.RETAIN, Process.STOP),
    ),
    (Eviction(Weights.OFFLOAD, Process.CHECKPOINT),),
]


@dataclass
class Line:
    waiting: int = 0
    oldest: float | None = None
    in_flight: dict[str, int] = field(default_factory=dict)  # epoch → requests
    held: str | None = None
    progress: int = 0


@dataclass
class World:
    """One gateway worker's side of the protocol, as the gateway implements it."""

    lines: dict[str, Line] = field(default_factory=dict)

    def line(self, model: str) -> Line:
        return self.lines.setdefault(model, Line())


def moves(effect: RunPlan) -> bool:
    """Does the operation change what is on the GPU? Thaw and freeze do not."""
    eviction = effect.plan.eviction
    return effect.plan.kind in ("start", "stop") or eviction is None or not keeps_gpu(eviction)


class Core(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.models: dict[str, ModelConfig] = {}  # as first configured
        self.workers: dict[str, World] = {}
        self.outbox: list[Event] = []  # events the world owes the core
        self.running: dict[str, RunPlan] = {}
        self.released: set[int] = set()  # operations whose model is off its GPUs already
        self.probes: list[Probe] = []
        self.died = ""  # the model whose engine's end is being handled
        self.ahead: set[str] = set()  # models with an engine restored ahead
        self.state: State = initial(Config(), gpu_count=1, epoch_prefix="t")
        self.former = self.state

    @initialize(
        gpu_count=st.integers(1, 3),
        shares=st.lists(st.sampled_from([0.2, 0.45, 0.5, 0.9, 1.0]), min_size=4, max_size=4),
        gpus=st.lists(st.sampled_from([(0,), (0,), (0, 1), 1, 2, (1,)]), min_size=4, max_size=4),
        evictions=st.lists(st.sampled_from(EVICTIONS), min_size=4, max_size=4),
        min_active=st.sampled_from([0.0, 5.0]),
        drain=st.booleans(),
        kind=st.sampled_from(PolicyType),
        idle=st.sampled_from([0.0, 0.0, 20.0]),
        kept=st.sets(st.sampled_from(MODELS), max_size=1),
        priorities=st.lists(st.integers(0, 2), min_size=4, max_size=4),
        ladders=st.lists(st.sampled_from(LADDERS), min_size=4, max_size=4),
        budget=st.sampled_from([None, 2, 5]),
        exclusive=st.sampled_from([(), (), (("a", "b"),), (("a", "c"), ("b", "c", "d"))]),
    )
    def configure(
        self,
        gpu_count: int,
        shares: list[float],
        gpus: list[tuple[int, ...] | int],
        evictions: list[Eviction],
        min_active: float,
        drain: bool,
        kind: PolicyType,
        idle: float,
        kept: set[str],
        priorities: list[int],
        ladders: list[tuple[Eviction, ...]],
        budget: int | None,
        exclusive: tuple[tuple[str, ...], ...],
    ) -> None:
        models = {
            name: ModelConfig(
                name,
                "m",
                gpu_memory=share,
                gpus=where,
                eviction=eviction,
                canary=False,
                priority=priority,
                never_evict=name in kept,
                ladder=ladder,
            )
            for name, share, where, eviction, priority, ladder in zip(
                MODELS, shares, gpus, evictions, priorities, ladders, strict=True
            )
        }
        policy = PolicyConfig(
            policy_type=kind,
            min_active_secs=min_active,
            drain_before_switch=drain,
            idle_timeout_secs=idle,
            parked_max_bytes=budget,
        )
        self.models = models
        config = Config(models=MappingProxyType(models), policy=policy, exclusive=exclusive)
        self.state = initial(config, gpu_count=gpu_count, epoch_prefix="t")
        self.join("w0")

    # ---- the machinery --------------------------------------------------------------------------

    def happen(self, event: Event) -> None:
        self.former = self.state
        self.state, effects = reduce(self.former, event, self.now)
        # What the core keeps from one decision to the next decides nothing.
        assert self.state.demands == demand_by_model(self.state.workers)
        afresh = reduce(replace(self.former, waiters={}), event, self.now)
        assert (self.state, effects) == afresh
        for model in [m for m in self.running if self.is_given_up(m)]:
            del self.running[model]  # the executor cancels it, should it still run
        for effect in effects:
            self.perform(effect)

    def is_given_up(self, model: str) -> bool:
        """Has the core ended the operation under way, as one that hangs or a start in the way?"""
        before, after = self.former.models[model], self.state.models.get(model)
        op = getattr(before.phase, "op", None)
        if op is None or after is None or getattr(after.phase, "op", None) == op:
            return False
        start_ended = isinstance(before.phase, Starting) and isinstance(after.phase, Stopping)
        return start_ended or self.now >= before.overdue_at

    def perform(self, effect: Effect) -> None:
        match effect:
            case RunPlan():
                assert effect.model not in self.running, "two operations at once"
                self.assert_its_gpus_are_quiet(effect)
                self.running[effect.model] = effect
                if effect.plan.restores:
                    self.ahead.discard(effect.model)
                assert effect.model not in self.ahead, "an operation on an engine restored ahead"
                if effect.plan.kind == "park":
                    self.assert_idle(effect.model)
                    self.assert_nothing_else_moves(effect.model)
            case Probe():
                self.probes.append(effect)
            case RestoreAhead(model):
                assert model not in self.ahead, "restored ahead twice"
                assert model not in self.running
                self.ahead.add(model)
            case DropAhead(model):
                self.ahead.remove(model)
            case SendGrant(worker, model, epoch):
                line = self.workers[worker].line(model)
                line.held = epoch
                line.in_flight[epoch] = line.in_flight.get(epoch, 0) + line.waiting
                line.waiting, line.oldest = 0, None
                self.report(worker, model)
            case SendRevoke(worker, model, epoch, dead):
                line = self.workers[worker].line(model)
                if line.held == epoch:
                    line.held = None
                if dead:
                    line.in_flight.pop(epoch, None)
                self.drained(worker, model, epoch)
            case SendCut(worker, model):
                line = self.workers[worker].line(model)
                epochs = list(line.in_flight)
                line.in_flight.clear()
                for epoch in epochs:
                    self.drained(worker, model, epoch)
            case SendRefuse(worker, model):
                line = self.workers[worker].line(model)
                line.waiting, line.oldest = 0, None
                self.report(worker, model)
            case _:
                pass

    def assert_its_gpus_are_quiet(self, effect: RunPlan) -> None:
        """One memory transition per GPU at a time; only the end of an engine that died or could
        not be killed does not wait, nor the end of a start that is under way already."""
        if not moves(effect):
            return
        phase = self.former.models[effect.model].phase
        died = effect.model == self.died or isinstance(phase, (Failed, Starting))
        if effect.plan.kind == "stop" and died:
            return
        for name, other in self.running.items():
            if other.op in self.released:
                continue
            shared = set(other.gpus) & set(effect.gpus)
            assert not (shared and moves(other)), f"{effect.model} moves beside {name} on {shared}"

    def assert_nothing_else_moves(self, model: str) -> None:
        """A parked engine goes down its ladder only while no model moves: a switch comes first."""
        if not isinstance(self.former.models[model].phase, Parked):
            return
        record = self.state.models[model]
        assert record.phase.state in MOVING
        others = {name: r.state for name, r in self.state.models.items() if name != model}
        assert not MOVING & set(others.values()), (model, others)
        assert not self.state.waiting(model), f"{model} is waited for"

    def assert_idle(self, model: str) -> None:
        record = self.state.models[model]
        for world in self.workers.values():
            line = world.line(model)
            assert not sum(line.in_flight.values()), f"{model} is parked under a request"
            assert line.held is None, f"{model} is parked while {line.held} is held"
        assert record.state in MOVING

    def drained(self, worker: str, model: str, epoch: str) -> None:
        line = self.workers[worker].line(model)
        if line.held != epoch and not line.in_flight.get(epoch):
            line.in_flight.pop(epoch, None)
            self.report(worker, model)
            self.outbox.append(WorkerDrained(worker, model, epoch))

    def report(self, worker: str, model: str) -> None:
        line = self.workers[worker].line(model)
        self.outbox.append(
            DemandChanged(
                worker,
                model,
                line.waiting,
                line.oldest,
                sum(line.in_flight.values()),
                line.progress,
            )
        )

    def deliver(self) -> None:
        while self.outbox:
            self.happen(self.outbox.pop(0))

    def join(self, worker: str) -> None:
        world = self.workers.setdefault(worker, World())
        holds = {m: line.held for m, line in world.lines.items() if line.held is not None}
        self.happen(WorkerJoined(worker, holds))
        for model in list(world.lines):
            self.report(worker, model)

    # ---- what may happen ------------------------------------------------------------------------

    @rule(
        model=st.sampled_from(MODELS), count=st.integers(1, 3), worker=st.sampled_from(["w0", "w1"])
    )
    def request(self, model: str, count: int, worker: str) -> None:
        if worker not in self.workers:
            self.join(worker)
        line = self.workers[worker].line(model)
        if line.held is not None:
            line.in_flight[line.held] = line.in_flight.get(line.held, 0) + count
        else:
            line.waiting += count
            line.oldest = self.now if line.oldest is None else line.oldest
        self.report(worker, model)
        self.deliver()

    @rule(model=st.sampled_from(MODELS))
    def request_ends(self, model: str) -> None:
        for worker, world in self.workers.items():
            line = world.line(model)
            for epoch, count in list(line.in_flight.items()):
                if count:
                    line.in_flight[epoch] = count - 1
                    line.progress += 1
                    self.report(worker, model)
                    self.drained(worker, model, epoch)
                    break
        self.deliver()

    @rule(model=st.sampled_from(MODELS))
    def waiters_leave(self, model: str) -> None:
        for worker, world in self.workers.items():
            line = world.line(model)
            line.waiting, line.oldest = 0, None
            self.report(worker, model)
        self.deliver()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 30.0, 130.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.state.wakeup is not None and self.now >= self.state.wakeup:
            self.happen(Tick())
        self.deliver()

    @rule(data=st.data(), outcome=st.sampled_from(["success", "success", "down", "stuck"]))
    @precondition(lambda self: bool(self.running))
    def operation_ends(self, data: st.DataObject, outcome: str) -> None:
        model = data.draw(st.sampled_from(sorted(self.running)))
        effect = self.running.pop(model)
        result = {"success": effect.plan.success, "down": Outcome.DOWN, "stuck": Outcome.STUCK}
        self.tell_of_an_image(effect, result[outcome])
        used = 2 if result[outcome] is Outcome.PARKED else None
        self.happen(
            OperationFinished(model, effect.op, result[outcome], "because", host_bytes=used)
        )
        self.deliver()

    @rule(data=st.data())
    @precondition(lambda self: any(plan.plan.dumps for plan in self.running.values()))
    def gpu_is_released(self, data: st.DataObject) -> None:
        """Its CUDA state is in host memory; the image is still being written."""
        dumping = sorted(name for name, effect in self.running.items() if effect.plan.dumps)
        model = data.draw(st.sampled_from(dumping))
        self.released.add(self.running[model].op)
        self.happen(GpuReleased(model, self.running[model].op))
        self.deliver()

    @rule(data=st.data(), share=st.sampled_from([0.01, 0.1, 0.5, 1.0]))
    @precondition(lambda self: any(e.plan.kind == "park" for e in self.running.values()))
    def a_residue_is_seen(self, data: st.DataObject, share: float) -> None:
        """Of a model that sleeps now: more than was assumed, or less."""
        parking = sorted(n for n, effect in self.running.items() if effect.plan.kind == "park")
        model = data.draw(st.sampled_from(parking))
        if self.running[model].op not in self.released:
            self.happen(ResidueSeen(model, self.running[model].op, share))
            self.deliver()

    def tell_of_an_image(self, effect: RunPlan, outcome: Outcome) -> None:
        eviction = effect.plan.eviction
        if eviction is not None and eviction.process is Process.CHECKPOINT:
            if outcome is Outcome.PARKED:
                self.happen(ImageKnown(effect.model, eviction))
            elif effect.plan.restores and outcome is Outcome.DOWN:
                self.happen(ImageKnown(effect.model, None))  # distrusted

    @rule(model=st.sampled_from(MODELS))
    def image_is_lost(self, model: str) -> None:
        self.happen(ImageKnown(model, None))
        self.deliver()

    @rule(model=st.sampled_from(MODELS))
    def engine_dies(self, model: str) -> None:
        if model in self.running or model not in self.state.models:
            return  # the operation sees it
        phase = self.state.models[model].phase
        if isinstance(phase, (Stopped, Failed)):
            return
        if isinstance(phase, Parked) and phase.eviction.process is Process.CHECKPOINT:
            return  # it has no process; the end of one restored ahead is not looked at here
        self.died = model
        self.happen(EngineExited(model, "exit status 1"))
        self.died = ""
        self.deliver()

    @rule(ok=st.booleans())
    @precondition(lambda self: bool(self.probes))
    def probe_ends(self, ok: bool) -> None:
        probe = self.probes.pop()
        self.died = probe.model
        self.happen(ProbeFinished(probe.model, probe.epoch, None if ok else "silence"))
        self.died = ""
        self.deliver()

    @rule(worker=st.sampled_from(["w0", "w1"]))
    def worker_reconnects(self, worker: str) -> None:
        if worker in self.workers:
            self.join(worker)
            self.deliver()

    @rule(worker=st.sampled_from(["w0", "w1"]))
    def worker_dies(self, worker: str) -> None:
        if self.workers.pop(worker, None) is not None:
            self.happen(WorkerLeft(worker))
            self.deliver()

    @rule(model=st.sampled_from(MODELS), eviction=st.sampled_from([None, *EVICTIONS]))
    def operator_parks(self, model: str, eviction: Eviction | None) -> None:
        self.happen(ParkAsked(model, eviction))
        self.deliver()

    @rule(model=st.sampled_from(MODELS))
    def operator_loads(self, model: str) -> None:
        self.happen(LoadAsked(model))
        self.deliver()

    @rule(manual=st.booleans(), pinned=st.sampled_from([None, *MODELS]))
    def operator_sets_mode(self, manual: bool, pinned: str | None) -> None:
        self.happen(ModeSet(manual, pinned if manual else None))
        self.deliver()

    @rule(model=st.sampled_from(MODELS), seconds=st.sampled_from([None, 20.0, math.inf]))
    def operator_pins(self, model: str, seconds: float | None) -> None:
        self.happen(PinSet(model, None if seconds is None else self.now + seconds))
        self.deliver()

    @rule(model=st.sampled_from(MODELS), seconds=st.sampled_from([0.0, 10.0, math.inf]))
    def request_says_keep_alive(self, model: str, seconds: float) -> None:
        self.happen(KeepAliveSet(model, seconds))
        self.deliver()

    @rule(short=st.booleans())
    def memory_runs_short(self, short: bool) -> None:
        self.happen(MemoryPressure(short))
        self.deliver()

    @rule(gone=st.sampled_from([None, *MODELS]))
    def configuration_is_reloaded(self, gone: str | None) -> None:
        """Perhaps without one of the models, which then comes back by the next reload."""
        models = {m: c for m, c in self.models.items() if m != gone}
        config = replace(self.state.config, models=MappingProxyType(models))
        self.happen(ConfigChanged(config))
        self.deliver()

    # ---- what must hold -------------------------------------------------------------------------

    @invariant()
    def no_gpu_is_over_its_capacity(self) -> None:
        for gpu in range(self.state.gpu_count):
            load = sum(
                share_now(record) for record in self.state.models.values() if gpu in record.gpus
            )
            assert load <= 1.0 + 10 * ROUNDING, f"GPU {gpu} holds {load}"

    @invariant()
    def of_an_exclusive_group_one_is_resident(self) -> None:
        for group in self.state.config.exclusive:
            records = [self.state.models[name] for name in group if name in self.state.models]
            # one that cannot be killed stays where it is, also when it was parked
            held = [r.config.name for r in records if isinstance(r.phase, Failed)]
            here = [r.config.name for r in records if is_resident(r)]
            here = [name for name in here if name not in held]
            assert len(here) <= 1, here

    @invariant()
    def a_kept_model_is_drained_for_no_other(self) -> None:
        for name, record in self.state.models.items():
            phase, before = record.phase, self.former.models.get(name)
            if not isinstance(phase, Draining) or phase.wanted_by is None or before is None:
                continue
            if isinstance(before.phase, Serving) and before.config.never_evict:
                raise AssertionError(f"{name} is never to be evicted")
            if isinstance(before.phase, Serving):
                assert self.former.pins.get(name, 0.0) <= self.now, f"{name} is pinned"

    @invariant()
    def only_what_waits_for_room_is_restored_ahead(self) -> None:
        orders = {name for name, r in self.state.reservations.items() if r.ahead}
        assert self.ahead == orders
        for name in orders:
            assert isinstance(self.state.models[name].phase, (Stopped, Parked, Failed))

    @invariant()
    def operations_and_states_agree(self) -> None:
        for name, record in self.state.models.items():
            op = getattr(record.phase, "op", None)
            running = self.running.get(name)
            assert op == (running.op if running else None), (name, record.phase, running)

    @invariant()
    def only_serving_epochs_are_held(self) -> None:
        for world in self.workers.values():
            for name, line in world.lines.items():
                if line.held is not None:
                    assert name in self.state.models, f"{name} was forgotten while it is held"
                    assert self.state.models[name].epoch == line.held

    def teardown(self) -> None:
        """When nothing goes wrong any more everyone who waits is answered and all comes to rest."""
        self.happen(ModeSet(False, None))
        for model in MODELS:
            self.happen(PinSet(model, None))
        free = {m: replace(c, never_evict=False) for m, c in self.state.config.models.items()}
        self.happen(ConfigChanged(replace(self.state.config, models=MappingProxyType(free))))
        self.deliver()
        for _ in range(200):
            for model in sorted(self.running):
                effect = self.running.pop(model)
                self.tell_of_an_image(effect, effect.plan.success)
                self.happen(OperationFinished(model, effect.op, effect.plan.success, ""))
                self.deliver()
            while self.probes:
                self.probe_ends(ok=True)
            for model in MODELS:
                self.request_ends(model)
            self.time_passes(10.0)
            waiting = sum(w.line(m).waiting for w in self.workers.values() for m in MODELS)
            flying = sum(
                sum(w.line(m).in_flight.values()) for w in self.workers.values() for m in MODELS
            )
            if not waiting and not flying and not self.running and not self.state.wants:
                break
        else:
            raise AssertionError(f"does not come to rest: {self.state}")
        for record in self.state.models.values():
            assert isinstance(record.phase, (Stopped, Parked, Serving, Failed)), record.phase
        assert not self.ahead


TestCore = Core.TestCase
TestCore.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None)
