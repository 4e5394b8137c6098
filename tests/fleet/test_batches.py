"""Small messages that go out together."""

from shoal.fleet.batches import MOST_AT_ONCE, Batches
from tests.fleet import toy


@toy.in_loop
async def test_what_gathers_goes_out_in_order_and_not_all_at_once() -> None:
    batches: Batches[int] = Batches()
    for number in range(MOST_AT_ONCE + 5):
        batches.put(number)
    batches.end()
    batches.put(-1)
    taken = [batch async for batch in batches]
    assert [len(batch) for batch in taken] == [MOST_AT_ONCE, 5]
    assert [number for batch in taken for number in batch] == list(range(MOST_AT_ONCE + 5))
