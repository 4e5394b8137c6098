"""Which aggregation rule a plan names, and with what noise."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from shoal.aggregate.commit import Aggregator, CallProgram, WeightedMean
from shoal.aggregate.correlated_noise import CorrelatedNoised, schedule_of, strategy_of, streams
from shoal.aggregate.keep import Keep
from shoal.aggregate.noised import Noised, NoisedByDevices, noise_stddevs
from shoal.aggregate.statistics import Statistics
from shoal.fixed import FixedPoint, SumSpec
from shoal.policy import Privacy, RoundPolicy, ServerRule
from shoal.privacy.device_noise import DeviceNoise
from shoal.privacy.masks import derive
from shoal.privacy.neighbours import Assumptions, Graph, find


def noised(
    aggregator: Aggregator,
    privacy: Privacy,
    rounds: RoundPolicy,
    *,
    secret: bytes,
    run: str,
    last_version: int,
    simulated: DeviceNoise | None = None,
) -> Aggregator:
    """The rule, with the noise that the task's privacy asks for.

    Args:
        aggregator: sees the sums with their noise.
        privacy, rounds: of the task.
        secret: 32 bytes that the noise follows from.
        run: that the sums are of: noise that goes on from version to version is its own.
        last_version: of the run.
        simulated: what devices add, where there are none to do so.

    Raises:
        ValueError: the noise is for fewer rounds than the run is to have.
    """
    if not privacy.noise_multiplier:
        return aggregator
    if privacy.distributed:
        return NoisedByDevices(aggregator, rounds.goal, simulated, partial(_groups_of, privacy, rounds), secret)
    if privacy.correlated is not None:
        if last_version > privacy.correlated.rounds:
            raise ValueError(
                f"Expected a run of at most {privacy.correlated.rounds} rounds, for which its noise is correlated, got {last_version}. Begin "
                "another run with Correlated(rounds=…) of what it is to have."
            )
        own = derive(secret, b"shoal correlated noise v1\0" + run.encode())
        return CorrelatedNoised(aggregator, privacy, rounds.min_separation, rounds.goal, own)
    return Noised(aggregator, privacy, rounds.goal, secret)


def check_noise(
    privacy: Privacy, rounds: RoundPolicy, specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint]
) -> None:
    """Looks, before anybody trains, whether the server can draw a task's noise; nothing to do where devices draw it.

    Args:
        privacy, rounds: of the task.
        specs, fixed: what is added up, and on what grid.

    Raises:
        ValueError: there is a sum that is not clipped, or a grid that the noise cannot be drawn on.
    """
    if privacy.distributed:
        return
    if privacy.correlated is None:
        noise_stddevs(privacy, specs, fixed, goal=rounds.goal)
        return
    schedule = schedule_of(privacy.correlated, rounds.min_separation)
    blt = strategy_of(privacy.correlated, schedule)
    streams(privacy, schedule, specs, fixed, blt=blt, secret=bytes(32))  # nothing is drawn from them


def aggregator_of(
    name: str, rule: ServerRule, options: Mapping[str, Any], *, call: CallProgram | None = None
) -> Aggregator:
    """The rule of that name.

    Args:
        name: as the server half of the plan says.
        rule: the server's step, for a weighted mean.
        options: of the rule, as JSON.
        call: runs the plan's server programs.

    Raises:
        ValueError: this version has no rule of that name, or the options are not its.
    """
    match name:
        case "weighted_mean":
            return WeightedMean(rule, call=call)
        case "evaluation":
            return Keep()
        case "statistics":
            return Statistics(options)
    raise ValueError(f"Expected an aggregation rule that this version has, got {name!r}.")


def _groups_of(privacy: Privacy, rounds: RoundPolicy, members: int) -> Graph:
    """The secure groups, of one size, that so many would have been in."""
    secure = privacy.secure
    assert secure is not None
    assumptions = Assumptions(colluders=secure.colluders, dropouts=secure.dropouts)
    return find(min(members, secure.members), assumptions, rounds.minimum_group, secure.is_certified)
