"""How a layout is found, kept and found again: by a trial that pays, in a cache that may be broken, in a run of another machine."""

from pathlib import Path

import jax
import pytest

from shoal.simulate.fused import Layout
from shoal.simulate.layout import WORTH, cache, cached, candidates, choose, default, of_run, use_all_cores


def test_a_trial_that_cannot_pay_is_not_begun() -> None:
    def refuse(tried: Layout) -> float:
        raise AssertionError

    rounds = WORTH * len(list(candidates(100)))
    assert choose(100, rounds, refuse).layout == default(100)


def test_the_fastest_is_taken() -> None:
    seconds = {each: 100.0 - number for number, each in enumerate((default(100), *candidates(100)))}
    trial = choose(100, 10_000, seconds.__getitem__, clock=lambda: 0.0)
    assert trial.seconds == seconds and trial.layout == list(seconds)[-1]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b"null", b"\xff", b'{"devices": 0, "together": 1}', b'{"devices": "1", "together": 1}',
     b'{"devices": 1}', b'{"devices": 999, "together": 1}'],
)  # fmt: skip
def test_a_cache_that_is_broken_is_as_none(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    cache("key", Layout(devices=2, together=3))
    assert cached("key") == Layout(devices=2, together=3)
    (path,) = tmp_path.rglob("key.json")
    path.write_bytes(data)
    assert cached("key") is None


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file"))
    cache("key", Layout(devices=2, together=3))
    assert cached("key") is None


def test_a_run_of_a_larger_machine_goes_on_with_what_is_here(caplog: pytest.LogCaptureFixture) -> None:
    assert of_run({"devices": 2, "together": 3}) == Layout(devices=2, together=3) and not caplog.messages
    assert of_run({"devices": 64, "together": 3}) == Layout(devices=8, together=3)
    assert caplog.messages == [
        "the run began on 64 devices, 3 at once, here are 8: it goes on, and last bits may differ"
    ]


def test_how_many_devices_a_cpu_has_may_be_said_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(jax.config), "update", lambda self, name, value: pytest.fail(f"{name} = {value}"))
    use_all_cores()  # tests say eight
