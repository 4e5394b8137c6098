"""Who has to go when too many streams say nothing."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet.strangers import Strangers


def test_the_crowd_goes_and_the_single_one_stays() -> None:
    strangers: Strangers[int] = Strangers(3)
    assert [strangers.come(n, "a") for n in range(2)] == [None, None]
    assert strangers.come(9, "b") is None
    assert strangers.come(2, "a") == 0, "the oldest of the address that has most"
    assert strangers.come(10, "c") == 1
    assert len(strangers) == 3


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.sampled_from("abc"))), st.integers(1, 5))
def test_never_more_than_the_bound_and_nobody_twice(events: list[tuple[bool, int, str]], most: int) -> None:
    strangers: Strangers[tuple[int, str]] = Strangers(most)
    here: set[tuple[int, str]] = set()
    for comes, number, address in events:
        key = (number, address)
        if comes and key not in here:
            here.add(key)
            gone = strangers.come(key, address)
            assert gone is None or gone in here
            here.discard(gone or (-1, ""))
        elif not comes:
            strangers.gone(key, address)
            here.discard(key)
        assert len(strangers) == len(here) <= most
