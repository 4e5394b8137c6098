"""How much comes in from one address, and how fast one stream may talk."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet import entrance, streams
from shoal.fleet.entrance import Allowance, Crowds, Entrance, neighbourhood
from shoal.fleet.wire import fleet_pb2 as pb
from tests.fleet import toy
from tests.fleet.test_fleet import until
from tests.fleet.test_grpc import linked, served


def test_an_allowance_is_so_much_at_once_and_so_much_a_second() -> None:
    made = Allowance(3, 0.5, now_s=0.0)
    assert [made.take(0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]
    assert made.take(4.0) == 0.0
    assert not made.is_full(8.0) and made.is_full(100.0)


@given(st.lists(st.floats(0.0, 5.0), max_size=60), st.integers(1, 5))
def test_never_more_in_a_while_than_the_bound_says(pauses: list[float], most: int) -> None:
    made, now_s, taken = Allowance(most, 0.25, now_s=0.0), 0.0, list[float]()
    for pause in pauses:
        now_s += pause
        if made.take(now_s):
            made.give_back()
        else:
            taken.append(now_s)
    for i, since_s in enumerate(taken):
        assert len([t for t in taken[i:] if t <= since_s + 20.0]) <= most + 20.0 * 0.25 + 1e-6


def test_an_address_has_so_many_sessions_and_others_theirs() -> None:
    crowds = Crowds(2)
    assert [crowds.come("a", 0.0), crowds.come("a", 0.0)] == ["", ""]
    assert "2 sessions of your network address are here" in crowds.come("a", 0.0)
    assert crowds.come("b", 0.0) == ""
    for _ in range(3):
        crowds.gone("a")
    assert "begun within a minute" in crowds.come("a", 1.0)
    crowds.gone("a")
    assert crowds.come("a", 31.0) == "", "half a minute is worth one of two"


def test_addresses_that_nothing_comes_from_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrance, "FORGET_AT", 10)
    crowds = Crowds(2)
    for i in range(1_000):
        crowds.come(f"address {i}", 100.0 * i)
        if i:
            crowds.gone(f"address {i}")
    assert len(crowds) <= 20
    crowds.gone("address 0")


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:192.0.2.1:5678", "ipv4:192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5678", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::1]:9", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:5678", "ipv4:192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5678", "ipv6:fe80::/64"),
        ("unix:", "unix"),
    ],
)
def test_a_peers_neighbourhood(peer: str, expected: str) -> None:
    assert neighbourhood(peer) == expected


def test_an_entrance_lets_somebody_in() -> None:
    with pytest.raises(ValueError, match="per_address"):
        Entrance(per_address=0)


@pytest.mark.integration
@toy.in_loop
async def test_who_checks_in_under_many_names_takes_the_sessions_of_one_address() -> None:
    made = toy.plan(toy.exact("honest", "other"))
    async with (
        toy.fleet(made, entrance=Entrance(per_address=5)) as fleet,
        served(fleet) as server,
        linked(server.port) as link,
    ):
        flood = [link.session() for _ in range(12)]
        peers = [toy.Peer(await stream.__aenter__(), f"name {i}") for i, stream in enumerate(flood)]
        for peer in peers:
            await peer.check_in()
        hearing = [asyncio.create_task(peer.hear()) for peer in peers]
        await until(lambda: sum(task.done() for task in hearing) == 7)
        for kind, message in (task.result() for task in hearing if task.done()):
            assert kind == "later" and "5 sessions of your network address" in message.why
        await until(lambda: fleet.host.edge.statistics().sessions_now == 5)
        # Where others come from there is room (this process's own devices stand for them).
        fleet.start(toy.device("honest", fleet.link), toy.device("other", fleet.link))
        await asyncio.gather(*fleet.tasks)
        for task in hearing:
            task.cancel()
        await asyncio.gather(*hearing, return_exceptions=True)
        for stream in flood:
            await stream.__aexit__(None, None, None)


@toy.in_loop
async def test_who_talks_without_end_is_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MESSAGES_AT_ONCE", 10.0)
    monkeypatch.setattr(streams, "MESSAGES_PER_S", 100.0)
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, toy.peer(fleet.link) as peer:
        await peer.check_in()
        heard = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                for _ in range(1_000):
                    await peer.say(ping=pb.Ping())
                while True:
                    heard += (await peer.hear())[0] == "ping"
        assert 20 <= heard <= 70, "ten at once and fifty in half a second"
