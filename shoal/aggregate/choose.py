"""Which aggregation rule a plan names."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from shoal.aggregate.commit import Aggregator, CallProgram, WeightedMean
from shoal.aggregate.correlated_noise import CorrelatedNoised
from shoal.aggregate.keep import Keep
from shoal.aggregate.noised import Noised, NoisedByDevices
from shoal.aggregate.statistics import Statistics
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
