"""What is seldom met in admission: what drains, who was blamed, a full cache of keys."""

from __future__ import annotations

import hashlib
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key
from llmux.errors import Refused
from llmux.gateway.admission import keys as keys_module
from llmux.gateway.admission.admission import Admission
from llmux.gateway.admission.key_limits import KeyUse
from llmux.gateway.admission.keys import Guard, check_page, is_trusted_peer
from llmux.gateway.admission.queue import ModelQueue, Stage, Ticket
from llmux.gateway.admission.suspects import LAST_TRIAL_SECS, MAX_DEATHS, TRIAL_SECS, choose
from llmux.protocol import Address

ADDRESS = Address(port=1)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def an_admission(clock: Clock, **more: Any) -> Admission[Ticket]:
    given: dict[str, Any] = {"max_waiting": 10, "wait_secs": 30.0, "models": ("a", "b", "c")} | more
    return Admission(clock=clock, **given)


def asks(admission: Admission[Ticket], model: str = "a") -> Ticket:
    ticket = Ticket(model, 100.0, 1000.0)
    admission.submit(ticket)
    return ticket


def test_what_is_held_is_what_is_used_or_else_what_drains() -> None:
    admission = an_admission(Clock())
    for model in "abc":
        for epoch in ("e1", "e2"):
            admission.grant(model, f"{model}{epoch}", ADDRESS)
            asks(admission, model)
    asks(admission, "a")
    assert admission.holds() == {"a": "ae2", "b": "be2", "c": "ce2"}
    admission.revoke("b", "be2")
    admission.revoke("c", "ce1")
    assert admission.holds() == {"a": "ae2", "b": "be2", "c": "ce2"}, "its streams go on"
    lease = admission.revoke("c", "ce2")
    assert lease is not None
    for ticket in list(lease.in_flight):
        admission.leave(ticket)
    assert admission.forget(lease)
    assert admission.holds()["c"] == "ce1"


def dies(admission: Admission[Ticket], epoch: str, tickets: list[Ticket]) -> list[Ticket]:
    """Returns who is not repeated."""
    admission.revoke("a", epoch)
    gone = [one for one in tickets if one.in_flight and not admission.wait_again(one)]
    for one in gone:
        admission.leave(one)
    return gone


def test_who_was_in_flight_with_the_one_is_not_blamed_for_it() -> None:
    clock = Clock()
    admission = an_admission(clock)
    admission.grant("a", "e1", ADDRESS)
    tickets = [asks(admission) for _ in range(2)]
    assert dies(admission, "e1", tickets) == []
    assert [one.deaths for one in tickets] == [1, 1]
    admission.grant("a", "e2", ADDRESS)
    bad = next(one for one in tickets if one.in_flight)
    fresh = asks(admission)
    assert not fresh.in_flight
    assert dies(admission, "e2", [*tickets, fresh]) == [bad]
    assert (bad.deaths, fresh.deaths) == (2, 0)
    assert admission.demand("a").repeated == 1, "it was alone"


def test_an_engine_that_dies_again_and_again_is_not_asked_for_ever() -> None:
    clock = Clock()
    admission = an_admission(clock, alone=1000)
    ticket = asks(admission)
    for number in range(MAX_DEATHS + 1):
        admission.grant("a", f"e{number}", ADDRESS)
        clock.now += 1.0
        gone = dies(admission, f"e{number}", [ticket])
        assert gone == ([ticket] if number == MAX_DEATHS else [])


@pytest.mark.parametrize(
    ("deaths", "lived", "secs"),
    [
        (1, 0.5, 2.0),
        (1, 2.0, 4.0),
        (1, 9.0, 10.0),
        (2, 0.5, 5.0),
        (2, 10.0, 20.0),
        (2, 99.0, 60.0),
        (3, 99.0, 198.0),
    ],
)
def test_a_trial_lasts_twice_as_long_as_the_engine_did_within_bounds(
    deaths: int, lived: float, secs: float
) -> None:
    queue: ModelQueue[Ticket] = ModelQueue("a")
    tickets = [Ticket("a", float(number), 9.0) for number in range(17)]
    for number, ticket in enumerate(tickets):
        ticket.deaths, ticket.lived = deaths, lived + number
        ticket.stage = Stage.WAITING
        queue.waiting[ticket] = None
    newer = Ticket("a", 99.0, 9.0)
    queue.waiting[newer] = None
    queue.tried = tickets[::-1]
    assert choose(queue, 0, 100.0) == []
    assert choose(queue, 3, 100.0) == tickets[:3], "an eighth of them"
    least, most = TRIAL_SECS.get(deaths, LAST_TRIAL_SECS)
    assert queue.trial_ends == pytest.approx(100.0 + min(max(2 * (lived + 2), least), most))
    assert choose(queue, 9, 200.0) == [], "one group at a time"
    queue.trial.clear()
    tickets[4].stage = Stage.ENDED
    assert choose(queue, 9, 200.0) == [tickets[3], tickets[5]]
    queue.trial.clear()
    assert choose(queue, 2, 200.0) == tickets[6:8], "no more than there is room for"
    queue.trial.clear()
    assert choose(queue, 9, 200.0) == tickets[8:9]
    only: ModelQueue[Ticket] = ModelQueue("a")
    only.waiting[tickets[0]] = None
    only.others = [tickets[0]]
    assert choose(only, 1, 100.0) == [tickets[0]]
    assert only.trial_ends == pytest.approx(100.0 + secs)


def test_a_place_that_becomes_free_is_for_who_waits_and_each_leaves_once() -> None:
    clock = Clock()
    room: list[Ticket] = []
    admission = an_admission(clock, max_in_flight=1, on_room=room.extend)
    admission.grant("a", "e1", ADDRESS)
    first, second, third = (asks(admission) for _ in range(3))
    assert admission.wake_at == 1000.0
    admission.leave(second)
    admission.leave(second, completed=True)
    admission.leave(first, completed=True)
    assert room == [third]
    assert (third.stage, second.stage, admission.demand("a").completed) == (
        Stage.IN_FLIGHT, Stage.ENDED, 1,
    )  # fmt: skip
    never = Ticket("a", 0.0, 1.0)
    admission.leave(never)
    assert never.stage is Stage.ENDED


# ---- keys ----------------------------------------------------------------------------------------


def test_a_key_that_refills_faster_than_one_a_second() -> None:
    clock = Clock()
    use = KeyUse(Key("k", b"", requests_per_minute=240), 2, clock)
    for _ in range(120):
        use.begin()
    with pytest.raises(Refused) as refused:
        use.begin()
    assert refused.value.retry_after == pytest.approx(0.5)
    clock.now += 2.0
    for _ in range(4):
        use.begin()
    with pytest.raises(Refused):
        use.begin()
    clock.now += 0.25
    use.set_limits(Key("k", b"", requests_per_minute=60), 2)
    with pytest.raises(Refused) as refused:
        use.begin()
    assert refused.value.retry_after == pytest.approx((1 - 0.25 * 0.5) / 0.5)
    use.set_limits(Key("k", b""), 2)
    for _ in range(1000):
        use.begin()
    use.set_limits(Key("k", b"", requests_per_minute=4), 2)
    for _ in range(2):
        use.begin()
    with pytest.raises(Refused):
        use.begin()


def test_a_first_rate_lets_the_first_request_pass() -> None:
    use = KeyUse(Key("k", b""), 1, Clock())
    use.set_limits(Key("k", b"", requests_per_minute=1), 1)
    use.begin()
    with pytest.raises(Refused) as refused:
        use.begin()
    assert refused.value.retry_after == pytest.approx(60.0)


def test_keys_that_were_verified_are_remembered_and_not_without_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keys_module, "MAX_VERIFIED", 3)
    secrets = [f"s{number}" for number in range(5)]
    keys = tuple(Key(secret, hash_key(secret)) for secret in secrets)
    guard = Guard(lambda: keys, workers=1, clock=Clock())
    hashed: list[bytes] = []

    def sha256(data: bytes) -> Any:
        hashed.append(data)
        return taken(data)

    taken = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", sha256)
    for secret in ["s0", "s1", "s2", "s2", "s0", "s3", "s3", "s0"]:
        use = guard.identify(b"/v1/models", secret.encode(), None)
        assert use is not None and use.key.name == secret
    assert hashed == [b"s0", b"s1", b"s2", b"s3", b"s0"]


class Peer:
    family = socket.AF_UNIX

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_who_is_at_the_other_end_is_known_or_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmux.gateway.admission.keys.os.getuid", lambda: 7)

    def trusted(sock: Any) -> bool:
        return is_trusted_peer(SimpleNamespace(get_extra_info=lambda _name: sock))

    def ids(*numbers: int) -> bytes:
        return b"".join(number.to_bytes(4, "little") for number in numbers)

    assert [trusted(Peer(ids(0, uid, 0))) for uid in (0, 7, 8)] == [True, True, False]
    assert not trusted(Peer(ids(7, 8, 7)))
    assert not trusted(Peer(OSError("gone")))
    assert not trusted(None)
    assert not trusted(SimpleNamespace(family=socket.AF_INET))
    assert not is_trusted_peer(None)
    with pytest.raises(ValueError, match="ours"):
        trusted(Peer(ValueError("ours")))


@pytest.mark.parametrize(
    ("path", "origin", "site", "may"),
    [
        (b"/control/pin", b"", b"", True),
        (b"/control/pin", b"", b"none", True),
        (b"/control/pin", b"", b"same-origin", True),
        (b"/control/pin", b"", b"same-site", False),
        (b"/control/pin", b"", b"cross-site", False),
        (b"/control/pin", b"http://x", b"same-origin", False),
        (b"/v1/models", b"http://x", b"cross-site", True),
    ],
)
def test_a_page_of_another_site_gives_no_orders(
    path: bytes, origin: bytes, site: bytes, may: bool
) -> None:
    if may:
        check_page(path, origin, site)
    else:
        with pytest.raises(Refused, match="web pages may not control"):
            check_page(path, origin, site)
