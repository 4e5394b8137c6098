import asyncio

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shaped_link import BURST_BYTES, Bucket, Relay

BYTES_PER_S = 1e6
sent = st.lists(st.tuples(st.integers(1, 1 << 16), st.floats(0, 0.2)), min_size=1, max_size=30)


@given(sent)
def test_no_more_goes_on_than_the_rate_and_a_burst(sent: list[tuple[int, float]]) -> None:
    bucket, now_s, through = Bucket(), 0.0, list[tuple[float, int]]()
    bucket.bytes_per_s = BYTES_PER_S
    for size, later_s in sent:
        now_s += later_s
        through.append((now_s + bucket.wait_s(size, now_s), size))
    for first, (begun_s, _) in enumerate(through):
        for last in range(first, len(through)):
            size = sum(size for _, size in through[first : last + 1])
            assert size <= BURST_BYTES + BYTES_PER_S * (through[last][0] - begun_s) + through[first][1] + 1


@given(sent)
def test_nobody_waits_longer_than_the_rate_asks_for(sent: list[tuple[int, float]]) -> None:
    bucket, now_s, busy_until_s = Bucket(), 0.0, 0.0
    bucket.bytes_per_s = BYTES_PER_S
    for size, later_s in sent:
        now_s += later_s
        busy_until_s = max(busy_until_s, now_s) + size / BYTES_PER_S
        assert now_s + bucket.wait_s(size, now_s) <= busy_until_s + 1e-6


def test_a_relay_passes_on_what_comes_in_both_directions_at_any_rate() -> None:
    asked, answered = bytes(range(256)) * 2000, bytes(reversed(range(256))) * 3000

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(-1) == asked  # until the other side has said that it is through
        writer.write(answered)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def ask(host: str, port: int) -> bytes:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(asked)
        writer.write_eof()
        heard = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        return heard

    async def main() -> None:
        server = await asyncio.start_server(answer, Relay.address, 0)
        with Relay("it is tested") as relay:
            host, port = await asyncio.to_thread(relay.over, server.sockets[0].getsockname()[1])
            for rate in (None, 2e7):
                relay.shape(rate)
                assert await asyncio.gather(*(ask(host, port) for _ in range(3))) == [answered] * 3
        server.close()

    asyncio.run(main())
