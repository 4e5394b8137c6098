"""A host is the one who says in the record how its run goes."""

import asyncio

import pytest

from shoal.errors import StoreError
from shoal.fleet.host import Host
from tests.fleet import toy


@toy.in_loop
async def test_a_run_is_stopped_until_it_runs_and_finished_at_its_end() -> None:
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet:
        status = lambda: fleet.store.run(fleet.host.run_id).status  # noqa: E731
        assert status() == "stopped", "begun, and nobody runs it yet"
        await asyncio.sleep(0)
        assert status() == "running"
        fleet.start(toy.device("a", fleet.link))
        await asyncio.gather(*fleet.tasks)
        assert status() == "finished"


@toy.in_loop
async def test_a_run_whose_host_breaks_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet:
        fleet.tasks[0].cancel()
        await asyncio.gather(fleet.tasks[0], return_exceptions=True)
        second = Host(fleet.store, fleet.host.run_id, toy.KEYS)

        def broken(run_id: str) -> None:
            raise StoreError("it cannot be read")

        monkeypatch.setattr(fleet.store, "last_commit", broken)
        with pytest.raises(StoreError, match="cannot be read"):
            await second.run()
        assert fleet.store.run(fleet.host.run_id).status == "failed"
