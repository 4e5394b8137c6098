"""Who has which shard, whatever takers do and whenever the server dies."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.fleet.dispatch import PAST_KEPT, Dispatch

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def test_a_shard_is_claimed_held_and_stays_so() -> None:
    made = Dispatch([10, 10], patience_s=60.0, now_s=0.0)
    assert made.claim(A, "x", room_bytes=10, now_s=1.0) == 0
    assert made.claim(A, "x", room_bytes=10, now_s=2.0) == 0, "the same one again"
    assert made.claim(B, "x", room_bytes=10, now_s=3.0) == 1
    assert made.claim(C, "x", room_bytes=10, now_s=3.0) == "wait"
    assert made.hold(0, A) == "held" and made.hold(0, A) == "held"
    assert made.hold(1, C) == "stranger", "who never claimed it cannot hold it"
    assert made.hold(1, B) == "held" and made.is_done


def test_one_who_does_not_come_back_loses_its_claim_and_is_told_when_it_does() -> None:
    made = Dispatch([10], patience_s=60.0, now_s=0.0)
    assert made.claim(A, "x", room_bytes=10, now_s=0.0) == 0
    assert made.touch(0, A, now_s=50.0)
    assert made.claim(B, "y", room_bytes=10, now_s=109.0) == "wait"
    assert made.claim(B, "y", room_bytes=10, now_s=110.0) == 0
    assert not made.touch(0, A, now_s=111.0)
    assert made.hold(0, B) == "held" and made.hold(0, A) == "other"


def test_who_has_it_goes_before_who_still_fetches_it() -> None:
    made = Dispatch([10], patience_s=60.0, now_s=0.0)
    made.claim(A, "x", room_bytes=10, now_s=0.0)
    assert made.claim(B, "y", room_bytes=10, now_s=100.0) == 0
    assert made.hold(0, A) == "held"
    assert not made.touch(0, B, now_s=101.0) and made.hold(0, B) == "other"


def test_only_what_fits_is_given_and_a_shard_begun_before_comes_first() -> None:
    made = Dispatch([30, 20, 10], patience_s=60.0, now_s=0.0)
    assert made.claim(A, "x", room_bytes=9, now_s=0.0) == "too large"
    assert made.claim(A, "x", room_bytes=20, now_s=0.0) == 1
    assert made.claim(B, "x", room_bytes=10, now_s=100.0) == 2
    assert made.claim(A, "x", room_bytes=99, now_s=100.0) == 1, "its part of it is still there"
    assert made.claim(A, "x", room_bytes=15, now_s=101.0) == "wait", "it has less room by now"


def test_claims_without_end_from_one_address_leave_some_for_others() -> None:
    made = Dispatch([1] * 100, patience_s=60.0, now_s=0.0)
    answers = [made.claim(bytes([n]) * 16, "evil", room_bytes=1, now_s=0.0) for n in range(100)]
    assert sum(answer != "wait" for answer in answers) == 16
    assert made.claim(A, "good", room_bytes=1, now_s=0.0) != "wait"
    for time_s in range(60, 3_000, 60):
        for n in range(20):
            made.claim(bytes([n, time_s % 251]) * 8, "evil", room_bytes=1, now_s=float(time_s))
    assert all(len(takers) <= PAST_KEPT for takers in made._past.values()) and len(made._claims) <= 16


STEPS = st.lists(
    st.tuples(st.sampled_from(["claim", "hold", "touch", "wait", "restart"]), st.integers(0, 3), st.integers(0, 2)),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_the_invariants_hold_after_any_history(steps: list[tuple[str, int, int]]) -> None:
    now_s, sizes = 0.0, [1, 2, 3]
    made, past, held = Dispatch(sizes, patience_s=10.0, now_s=0.0), list[tuple[int, bytes]](), dict[int, bytes]()
    for kind, who, shard in steps:
        taker = bytes([who]) * 16
        match kind:
            case "claim":
                found = made.claim(taker, str(who), room_bytes=shard + 1, now_s=now_s)
                if isinstance(found, int):
                    assert sizes[found] <= shard + 1 and found not in held
                    past.append((found, taker))
            case "hold":
                outcome = made.hold(shard, taker)
                assert (outcome == "held") == (made.snapshot().get(shard) == ("held", taker))
                if outcome == "held":
                    held.setdefault(shard, taker)
            case "touch":
                assert made.touch(shard, taker, now_s=now_s) == (made.snapshot().get(shard) == ("claimed", taker))
            case "wait":
                now_s += 4.0 * (1 + who)
            case "restart":
                made = Dispatch(sizes, patience_s=10.0, now_s=now_s, held=held, past=past)
        now = made.snapshot()
        assert {shard: taker for shard, (state, taker) in now.items() if state == "held"} == held
        claimers = [taker for state, taker in now.values() if state == "claimed"]
        assert len(claimers) == len(set(claimers))
        assert made.is_done == (len(held) == len(sizes))
