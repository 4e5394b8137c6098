"""Does telemetry betray a routine, and are its totals right?

T1: devices of which half work at night. An attacker knows of half of them who does, has numbers about each device, and is to say it of the other half:

* `raw log`: how often the device was there in each hour of the day.
* `as claimed`: all that the server stores and every report that it receives, which name nobody: the attacker can only guess which report is whose.
* `linked`: the same, and somebody has told the attacker which device sent which report: by hour of arrival, each number in it, and by what the stored sums
  of those days on which it told differ from those of the days on which it did not.
* `linked, off asleep` (one population): the same where devices are off while their owners sleep. Not claimed: whoever links reports learns when a device is off.
* `randomized, linked`: reports that devices randomize on their own (each tells of one hour, drawn at random, by randomized response of epsilon 1 a day).

Everything but the last goes through shoal's own diaries, seals, collector and helper. Totals are of all devices and days, scaled by the reports that are
missing. The interval of AUC is Student's over five populations.
"""

from collections.abc import Sequence
from math import exp, tanh
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, run, table
from benchmarks.telemetry_attack import ATTACKERS, attack, interval
from benchmarks.telemetry_population import OFF, Lives, Seen, live, places, tell, truth
from shoal.privacy.accounting import epsilon_of_zcdp
from shoal.privacy.telemetry import HOURS, NOISE, rho

SEEDS: Final = (1, 2, 3, 4, 5)
DEVICES, DAYS = 2_000, 30
DELTA: Final = 1e-6
EPSILON: Final = 1.0
"""Of a randomized report: a day costs about as much as ours."""
TIMES: Final = 3
"""Each population tells so many times, with other secrets, masks and noise: the mean says what an attacker has, not what luck it had."""


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    seeds, devices, days, times = (SEEDS[:1], 200, 4, 1) if quick else (SEEDS, DEVICES, DAYS, TIMES)
    areas: dict[tuple[str, str], list[float]] = {}
    errors: list[dict[str, float]] = []
    rival: list[float] = []
    for seed in seeds:
        lives = live(devices, days, np.random.default_rng(seed))
        told = [_told(lives, seed, time) for time in range(times)]
        errors += [_off(lives, each) for each in told]
        rival.append(_off_randomized(lives, np.random.default_rng([seed, 8])))
        for view, several in _views(lives, told, seed).items():
            for attacker in ATTACKERS if several else ():
                each = [attack(one, lives.works_at_night, attacker, seed=seed) for one in several]
                areas.setdefault((view, attacker), []).append(float(np.mean(each)))
        print(
            f"population {seed}: " + ", ".join(f"{view} {found[-1]:.3f}" for (view, _), found in areas.items()),
            flush=True,
        )
    found = {case: interval(each) for case, each in areas.items()}
    worst = {name: max(each[name] for each in errors) for name in errors[0]}
    _print(found, worst, rival)
    reach = {view: max(found[view, attacker][2] for attacker in ATTACKERS) for view in ("as claimed", "linked")}
    raw = min(found["raw log", attacker][0] for attacker in ATTACKERS)
    goals = [
        Goal("T1a", "upper end of the 95 % interval of AUC, worse of two attackers, linked or not", None if quick else max(reach.values()), "<= 0.52"),
        Goal("T1b", "AUC on the raw log, weaker of two attackers", None if quick else raw, ">= 0.9"),
        Goal("T1c", "totals by hour and of sessions, trained, interrupted: off by, the worst", None if quick else max(worst.values()), "<= 0.02"),
    ]  # fmt: skip
    day, month = (epsilon_of_zcdp(rho(NOISE, reports=number), DELTA) for number in (1, DAYS))
    return goals, {
        "auc": {f"{view}; {attacker}": each for (view, attacker), each in found.items()}, "upper": reach, "totals_off": worst,
        "epsilon_of_a_day": day, "epsilon_of_all": month, "delta": DELTA, "devices": devices, "days": days, "randomized_off": max(rival),
    }  # fmt: skip


def _print(
    found: dict[tuple[str, str], tuple[float, float, float]], worst: dict[str, float], rival: Sequence[float]
) -> None:
    table(
        ["the attacker has", "attacker", "AUC", "from", "to"],
        [[*case, *map(_three, each)] for case, each in found.items()],
    )
    table(["total", "at most off"], [[name, f"{100 * off:.2f} %"] for name, off in worst.items()])
    print(f"of an hour's total by randomized reports, the worst: {100 * max(rival):.1f} % off")
    day, month = (epsilon_of_zcdp(rho(NOISE, reports=number), DELTA) for number in (1, DAYS))
    print(f"one device's day: epsilon {day:.3g}; its {DAYS} days: {month:.3g}; at delta {DELTA:g}")


def _told(lives: Lives, seed: int, time: int, *, off_asleep: bool = False) -> Seen:
    off = np.random.default_rng([seed, time, 9]).random(lives.there.shape) < OFF
    return tell(lives, off=off | lives.asleep if off_asleep else off, seed=1000 * seed + 2 * time + int(off_asleep))


def _views(lives: Lives, told: Sequence[Seen], seed: int) -> dict[str, list[np.ndarray]]:
    """What attackers have of each device, (D, F), several times where it is drawn anew."""
    rng = np.random.default_rng([seed, 10])
    return {
        "raw log": [lives.there.mean(1)],
        "as claimed": [_features(_unlinked(each, rng)) for each in told for _ in range(2)],
        "linked": [_features(each) for each in told],
        "linked, off asleep": [_features(_told(lives, seed, 0, off_asleep=True))] if seed == SEEDS[0] else [],
        "randomized, linked": [_randomized(lives, rng)],
    }


def _off(lives: Lives, seen: Seen) -> dict[str, float]:
    """How far totals are off, relative to the truth."""
    scale = lives.there.shape[0] * lives.there.shape[1] / seen.reports
    wanted = truth(lives)
    told = seen.sums.sum(0)[places(list(wanted))]
    return {name: abs(scale * got / right - 1.0) for (name, right), got in zip(wanted.items(), told, strict=True)}


# What the attacker has of each device: (D, F).


def _features(seen: Seen) -> np.ndarray:
    told = ~np.isnan(seen.hour)
    hours = np.stack([np.nansum(np.floor(seen.hour) == hour, 1) for hour in range(HOURS)], 1)
    shares = np.nan_to_num(seen.share).sum(1) / np.maximum(1, told.sum(1, keepdims=True))
    sums = seen.sums[:, :HOURS] - seen.sums[:, :HOURS].mean(0)
    here, gone = told.astype(float), 1.0 - told
    beside = here @ sums / np.maximum(1.0, here.sum(1, keepdims=True)) - gone @ sums / np.maximum(
        1.0, gone.sum(1, keepdims=True)
    )
    return np.concatenate([hours, shares, beside, told.sum(1, keepdims=True)], 1)


def _unlinked(seen: Seen, rng: np.random.Generator) -> Seen:
    """Each day's reports, dealt out to the devices anew."""
    orders = np.stack([rng.permutation(len(seen.hour)) for _ in range(seen.hour.shape[1])], 1)
    days = np.arange(seen.hour.shape[1])
    return Seen(seen.hour[orders, days], seen.share[orders, days], seen.sums, seen.noise, seen.reports)


# Randomized response, for comparison.


def _randomized(lives: Lives, rng: np.random.Generator) -> np.ndarray:
    """What linked reports say of each hour: how often yes, less how often no, (D, H)."""
    answer, asked = _answers(lives, rng)
    return np.stack([np.where(asked == hour, answer, 0.0).sum(1) for hour in range(HOURS)], 1)


def _off_randomized(lives: Lives, rng: np.random.Generator) -> float:
    """How far the worst hour's total is off."""
    answer, asked = _answers(lives, rng)
    right = lives.there.sum((0, 1))
    unbiased = np.array(
        [HOURS * (0.5 + answer[asked == hour] / (2.0 * tanh(EPSILON / 2.0))).sum() for hour in range(HOURS)]
    )
    return float(np.abs(unbiased / right - 1.0).max())


def _answers(lives: Lives, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(D, T) each: 1 for yes and -1 for no, and the hour that was asked about."""
    asked = rng.integers(0, HOURS, lives.there.shape[:2])
    answer = np.take_along_axis(lives.there, asked[..., None], 2)[..., 0]
    lies = rng.random(answer.shape) < 1.0 / (1.0 + exp(EPSILON))
    return np.where(answer ^ lies, 1.0, -1.0), asked


def _three(value: float) -> str:
    return f"{value:.3f}"


if __name__ == "__main__":
    run("telemetry", measure, "Whether telemetry betrays a routine, and whether its totals are right.")
