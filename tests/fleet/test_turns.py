"""Several runs share the devices that wait: everybody has a turn, nobody has a device in vain."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.fleet.turns import (
    Asks,
    Command,
    Dismiss,
    Entered,
    Event,
    Give,
    Left,
    Opened,
    Over,
    TakeBack,
    Taken,
    Tick,
    Turns,
    WakeAt,
)

PATIENCE_S = 10.0


class Shell:
    """What a front door does, with runs that begin a round as soon as enough devices wait and end it when told to."""

    def __init__(
        self,
        sizes: dict[str, int],
        *,
        weights: dict[str, float] | None = None,
        by_order: bool = False,
        bars: Callable[[str, str], bool] = lambda run, device: False,
    ) -> None:
        self.sizes, self.bars, self.now_s = sizes, bars, 0.0
        self.waiting: dict[str, set[str]] = {run: set() for run in sizes}
        self.training: dict[str, set[str]] = {run: set() for run in sizes}
        self.rounds: dict[str, int] = dict.fromkeys(sizes, 0)
        self.known: dict[str, frozenset[str]] = {}
        self.dismissed: set[str] = set()
        self.machine = Turns(may_take=self.may_take, rng=np.random.default_rng(0), by_order=by_order)
        self.step(*(Opened(run, (weights or {}).get(run, 1.0), PATIENCE_S) for run in sizes))

    def may_take(self, run: str, device: str) -> bool:
        return not self.bars(run, device)

    def asks(self) -> list[Event]:
        made: list[Event] = []
        for run, size in self.sizes.items():
            wants = -len(self.waiting[run]) if self.training[run] else size - len(self.waiting[run])
            made.append(Asks(run, wants, frozenset(self.waiting[run]), rests=not size))
        return made

    def step(self, *events: Event) -> list[Command]:
        commands = self.machine.step([*self.asks(), *events], self.now_s)
        for command in commands:
            match command:
                case Give(run, devices):
                    for device in devices:
                        assert device not in self.dismissed and run in self.known[device]
                        assert not any(device in there for there in self.waiting.values()), "invariant (1)"
                        self.waiting[run].add(device)
                case TakeBack(run, devices):
                    if run in self.waiting:
                        assert set(devices) <= self.waiting[run]
                        self.waiting[run] -= set(devices)
                case Dismiss(devices):
                    self.dismissed |= set(devices)
        self.begin_rounds()
        self.check()
        return commands

    def begin_rounds(self) -> None:
        for run, size in self.sizes.items():
            if size and not self.training[run] and len(self.waiting[run]) >= size:
                self.training[run], self.waiting[run] = self.waiting[run], set()
                self.rounds[run] += 1
                self.step(*map(Taken, sorted(self.training[run])))

    def end_round(self, run: str) -> None:
        back, self.training[run] = sorted(self.training[run]), set()
        self.step(*(Entered(device, self.known[device]) for device in back))

    def come(self, *devices: str, runs: frozenset[str] | None = None) -> None:
        able = frozenset(self.sizes) if runs is None else runs
        self.known |= dict.fromkeys(devices, able)
        self.step(*(Entered(device, able) for device in devices))

    def leave(self, device: str) -> None:
        for there in (*self.waiting.values(), *self.training.values()):
            there.discard(device)
        self.step(Left(device))

    def later(self, seconds: float) -> None:
        self.now_s += seconds
        self.step(Tick())

    def end(self, run: str) -> None:
        del self.sizes[run]
        self.waiting.pop(run)
        training = self.training.pop(run)
        self.step(Over(run), *(Entered(device, self.known[device]) for device in sorted(training)))

    def check(self) -> None:
        now = self.machine.snapshot()
        given = [device for device, _ in now.given]
        assert len(given) == len(set(given)) and not now.idle & set(given), "invariant (1)"
        for run, size in self.sizes.items():
            if not self.training[run] and len(self.waiting[run]) < size:
                able = [d for d in now.idle if run in self.known[d] and self.may_take(run, d)]
                assert not able, f"invariant (2): {able} idle, {run} wants {size - len(self.waiting[run])}"


def devices(number: int) -> list[str]:
    return [f"d{index}" for index in range(number)]


def test_few_devices_go_to_one_run_whole_rather_than_to_both_in_halves() -> None:
    shell = Shell({"a": 8, "b": 8})
    shell.come(*devices(10))
    assert shell.rounds == {"a": 1, "b": 0} and len(shell.waiting["b"]) == 2
    shell.end_round("a")
    assert shell.rounds == {"a": 1, "b": 1}, "its turn lasted until it had what it wanted"


def test_a_run_that_cannot_be_filled_is_passed_over_when_its_window_is_over() -> None:
    shell = Shell({"large": 100, "small": 4})
    shell.come(*devices(10))
    assert len(shell.waiting["large"]) == 10
    shell.later(PATIENCE_S - 1)
    assert shell.rounds["small"] == 0
    shell.later(1)
    assert shell.rounds["small"] == 1 and len(shell.waiting["large"]) == 6
    shell.end_round("small")
    assert shell.rounds["small"] == 1, "it is the other's turn now"
    shell.later(PATIENCE_S)
    assert shell.rounds["small"] == 2


def test_a_turn_goes_on_where_nobody_else_could_use_the_devices() -> None:
    shell = Shell({"a": 8})
    shell.come(*devices(5))
    assert shell.step(Tick()) == []
    shell.later(3 * PATIENCE_S)
    assert len(shell.waiting["a"]) == 5
    shell.come("d5", "d6", "d7")
    assert shell.rounds["a"] == 1


@pytest.mark.parametrize(("heavy", "number"), [(3.0, 8), (3.0, 11), (1.0, 8), (7.0, 9)])
def test_by_weight_runs_that_want_devices_at_all_times_get_their_share(heavy: float, number: int) -> None:
    shell = Shell({"a": 8, "b": 4}, weights={"a": heavy})  # the devices are never enough for both
    shell.come(*devices(number))
    for _ in range(150):
        shell.end_round("a" if shell.training["a"] else "b")
    had = dict(shell.machine.snapshot().had)
    assert had["a"] + had["b"] >= 600
    assert abs(had["a"] / heavy - had["b"]) <= 8 / heavy + 4, "invariant (5)"


def test_one_that_has_rested_has_saved_nothing_up() -> None:
    shell = Shell({"a": 4, "b": 0})
    shell.come(*devices(4))
    for _ in range(50):
        shell.end_round("a")
    shell.sizes["b"] = 4
    begun = dict(shell.rounds)
    for _ in range(20):
        shell.end_round("a" if shell.training["a"] else "b")
    assert shell.rounds["a"] - begun["a"] >= 9


def test_by_order_the_first_run_that_wants_devices_has_them() -> None:
    shell = Shell({"first": 4, "second": 4}, by_order=True)
    shell.come(*devices(4))
    for _ in range(5):
        shell.end_round("first")
    assert shell.rounds == {"first": 6, "second": 0}
    shell.come("more0", "more1", "more2", "more3")
    assert shell.rounds["second"] == 1


def test_devices_that_only_another_run_may_take_do_not_wait_for_the_turns_end() -> None:
    shell = Shell({"a": 100, "b": 2}, bars=lambda run, device: run == "a" and device.startswith("other"))
    shell.come(*devices(3))
    shell.come("other1", "other2")
    assert shell.rounds["b"] == 1 and shell.machine.snapshot().turn == "a"


def test_what_a_run_has_no_use_for_is_taken_back() -> None:
    shell = Shell({"a": 8, "b": 8})
    shell.come(*devices(4))
    waiting = frozenset(shell.waiting["a"])
    shell.sizes["a"] = 0  # it was stopped
    commands = shell.machine.step([Asks("a", -4, waiting)], 0.0)
    assert TakeBack("a", tuple(sorted(waiting))) in commands
    assert Give("b", tuple(sorted(waiting))) in commands


def test_one_that_has_lost_its_assignment_goes_back_to_it() -> None:
    shell = Shell({"a": 1, "b": 1})
    shell.known["x"] = frozenset({"a", "b"})
    assert Give("b", ("x",)) in shell.machine.step([Entered("x", frozenset({"a", "b"}), "b")], 0.0)


def test_devices_are_dismissed_when_all_that_they_serve_is_over() -> None:
    shell = Shell({"a": 8, "b": 8})
    shell.come(*devices(2))
    shell.come("only-a", runs=frozenset({"a"}))
    shell.end("a")
    assert shell.dismissed == {"only-a"}
    shell.end("b")
    assert shell.dismissed == {"only-a", "d0", "d1"}


def test_it_wakes_only_for_somebody_else() -> None:
    shell = Shell({"a": 8, "b": 8})
    shell.known["d"] = frozenset({"a", "b"})
    commands = shell.machine.step([*shell.asks(), Entered("d", frozenset({"a", "b"}))], 3.0)
    assert WakeAt(3.0 + PATIENCE_S) in commands


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_history_keeps_the_invariants_and_starves_nobody(data: st.DataObject) -> None:
    names = ["a", "b", "c"][: data.draw(st.integers(1, 3))]
    sizes = {name: data.draw(st.integers(1, 6)) for name in names}
    barred = data.draw(st.sets(st.tuples(st.sampled_from(names), st.integers(0, 9)), max_size=6))
    by_order = data.draw(st.booleans())
    shell = Shell(
        dict(sizes),
        by_order=by_order,
        bars=lambda run, device: (run, int(device[1:])) in barred,
    )
    for _ in range(data.draw(st.integers(0, 30))):
        move = data.draw(st.sampled_from(["come", "leave", "end", "later", "limit"]))
        device = f"d{data.draw(st.integers(0, 9))}"
        if move == "come" and not any(device in there for there in (*shell.waiting.values(), *shell.training.values())):
            shell.come(device)
        elif move == "leave" and device in shell.known:
            shell.leave(device)
        elif move == "end":
            shell.end_round(data.draw(st.sampled_from(names)))
        elif move == "later":
            shell.later(data.draw(st.floats(0.0, 25.0)))
    # Nobody leaves any more: every run that the devices are enough for has its round, within the windows of the others.
    here = [d for d in shell.known if any(d in there for there in (*shell.waiting.values(), *shell.training.values()))]
    here += [d for d in shell.machine.snapshot().idle if d not in here]
    before = dict(shell.rounds)
    for _ in range(4 * len(names)):
        shell.later(PATIENCE_S)
        for name in names:
            if shell.training[name]:
                shell.end_round(name)
    if not by_order:
        for name in names:
            able = [device for device in here if shell.may_take(name, device)]
            if len(able) >= sizes[name]:
                assert shell.rounds[name] > before[name], f"invariant (4): {name} was starved"
    for name in names:
        if shell.training[name]:
            shell.end_round(name)
        shell.end(name)
    assert shell.dismissed >= set(here), "invariant (6): every device is answered"
