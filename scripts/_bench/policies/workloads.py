"""The built-in workloads of ``bench policy``: seeded traces for one GPU, one model at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmux.sim.trace import Arrival

PLACES = 32


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    models: int
    make: Callable[[random.Random], Iterator[Arrival]]

    def trace(self, seed: int = 0) -> list[Arrival]:
        """The same for the same seed."""
        name = f"{self.name}#{seed}" if seed else self.name
        return sorted(self.make(random.Random(name)))


def name_of(index: int) -> str:
    return f"m{index}"


def poisson(
    rng: random.Random, model: int, rate: float, service: float, until: float, since: float = 0.0
) -> Iterator[Arrival]:
    at = since
    while rate > 0 and (at := at + rng.expovariate(rate)) < until:
        yield Arrival(at, name_of(model), rng.expovariate(1 / service))


def steady(*rates: float, service: float = 3.0, secs: float = 1200.0) -> Workload:
    def make(rng: random.Random) -> Iterator[Arrival]:
        for model, rate in enumerate(rates):
            yield from poisson(rng, model, rate, service, secs)

    return Workload("", len(rates), make)


def named(name: str, workload: Workload) -> Workload:
    return Workload(name, workload.models, workload.make)


def bursty(rng: random.Random) -> Iterator[Arrival]:
    at = 0.0
    while (at := at + rng.expovariate(1 / 40)) < 1800:
        model = rng.randrange(2)
        for _ in range(rng.randint(5, 40)):
            yield Arrival(at + rng.uniform(0, 5), name_of(model), rng.expovariate(1 / 3))


def interleaved(rng: random.Random) -> Iterator[Arrival]:
    for index in range(240):
        yield Arrival(5.0 * index, name_of(index % 2), rng.expovariate(1 / 3))


def surge(rng: random.Random) -> Iterator[Arrival]:
    yield from poisson(rng, 0, 1.0, 3.0, 1800)
    for began in (200.0, 700.0, 1300.0):
        yield from poisson(rng, 1, 5.0, 3.0, began + 60, began)


def diurnal(rng: random.Random) -> Iterator[Arrival]:
    for model in range(3):
        for arrival in poisson(rng, model, 3.0, 3.0, 1800):
            phase = 2 * math.pi * (arrival.at / 1200 + model / 3)
            if rng.random() < 0.5 * (1 + math.sin(phase)):
                yield arrival


def anything(rng: random.Random) -> Iterator[Arrival]:
    """Random rates and lengths; a third of the load that one model alone could take."""
    models = rng.randint(2, 6)
    rates = [rng.expovariate(1) + 0.05 for _ in range(models)]
    lengths = [rng.uniform(0.5, 20) for _ in range(models)]
    offered = sum(rate * length for rate, length in zip(rates, lengths, strict=True))
    scale = rng.uniform(0.1, 0.6) * PLACES / offered
    for model, (rate, length) in enumerate(zip(rates, lengths, strict=True)):
        for arrival in poisson(rng, model, rate * scale, length, 600):
            yield Arrival(arrival.at, arrival.model, rng.lognormvariate(math.log(length), 0.8))


def zipf(count: int, rate: float) -> tuple[float, ...]:
    weights = [1 / rank for rank in range(1, count + 1)]
    return tuple(rate * weight / sum(weights) for weight in weights)


WORKLOADS = (
    named("single", steady(2.0, secs=300)),
    named("balanced", steady(0.5, 0.5)),
    Workload("bursty", 2, bursty),
    named("dominant 80/20", steady(1.6, 0.4)),
    named("dominant 95/5", steady(1.9, 0.1)),
    Workload("interleaved", 2, interleaved),
    Workload("surge", 2, surge),
    named("heavy 75 %", steady(4.0, 4.0)),
    named("heavy 95 %", steady(5.07, 5.07, secs=600)),
    named("three models", steady(0.5, 0.5, 0.5)),
    named("Zipf over 12", steady(*zipf(12, 4.0), secs=1500)),
    Workload("diurnal", 3, diurnal),
    named("saturated", steady(8.0, 8.0, secs=300)),
    named("long answers", steady(0.15, 0.15, service=60.0, secs=2400)),
    named("long prompts", steady(1.5, 1.5, service=6.0)),
    *(Workload(f"random {seed}", 6, anything) for seed in range(1, 5)),
)


def two_phases(rng: random.Random) -> Iterator[Arrival]:
    for model in range(2):
        for began in (0.0, 600.0):
            rate = 3.0 if (began > 0) == (model > 0) else 0.2
            yield from poisson(rng, model, rate, 3.0, began + 600, began)


def one_long_answer(rng: random.Random) -> Iterator[Arrival]:
    for model in range(2):
        yield from poisson(rng, model, 1.0, 2.0, 1200)
    for at in (100.0, 500.0, 900.0):
        yield Arrival(at + rng.uniform(0, 50), name_of(0), 300.0)


def on_and_off(rng: random.Random) -> Iterator[Arrival]:
    for model in range(3):
        at = 0.0
        while at < 1500:
            until = at + rng.expovariate(1 / 40)
            yield from poisson(rng, model, 2.0, 3.0, min(until, 1500.0), at)
            at = until + rng.expovariate(1 / 120)


def pairs(rng: random.Random) -> Iterator[Arrival]:
    """A request for one of two models is followed by one for its companion."""
    at = 0.0
    while (at := at + rng.expovariate(0.1)) < 1500:
        first = 2 * rng.randrange(2)
        yield Arrival(at, name_of(first), rng.expovariate(1 / 3))
        yield Arrival(at + rng.uniform(0.5, 3), name_of(first + 1), rng.expovariate(1 / 3))


def an_overload(rng: random.Random) -> Iterator[Arrival]:
    for model in range(2):
        yield from poisson(rng, model, 0.4, 3.0, 1500)
        yield from poisson(rng, model, 12.0, 3.0, 360, 300)


def chains(rng: random.Random) -> Iterator[Arrival]:
    """Each request of a chain follows the answer of the one before, of the other model."""
    for _ in range(25):
        at = rng.uniform(0, 900)
        for link in range(rng.randint(5, 15)):
            service = rng.expovariate(1 / 4)
            yield Arrival(at, name_of(link % 2), service)
            at += service + rng.uniform(5, 30)


def short_and_long(rng: random.Random) -> Iterator[Arrival]:
    yield from poisson(rng, 0, 2.0, 1.0, 1200)
    yield from poisson(rng, 1, 0.2, 30.0, 1200)


def regular(_: random.Random) -> Iterator[Arrival]:
    for model, every in enumerate((1.0, 7.0, 31.0)):
        for number in range(int(1200 / every)):
            yield Arrival(number * every + 0.3 * model, name_of(model), 3.0)


FURTHER = (  # not looked at while the policies were made
    Workload("two phases", 2, two_phases),
    named("24 tiny", steady(*[0.05] * 24, service=1.0, secs=900)),
    Workload("one long answer", 2, one_long_answer),
    Workload("on and off", 3, on_and_off),
    Workload("pairs", 4, pairs),
    Workload("an overload", 2, an_overload),
    Workload("short and long", 2, short_and_long),
    Workload("chains", 2, chains),
    Workload("regular", 3, regular),
)
