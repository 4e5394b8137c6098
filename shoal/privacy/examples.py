"""What noise on examples promises: one example of one device, against everybody who sees that device's updates.

Neighbours differ in one example, which is there or whose gradients are zero; how many examples a device holds is public. (Where they differ in one
that is *replaced* by another, twice the norm is between them: epsilon is that of half the noise multiplier.) An example is in at most `epochs`
steps of a round, each a release with Gaussian noise, chosen adaptively: a round is (epochs / (2 noise_multiplier^2))-zCDP, as is any
curve of Rényi divergences that is a line. No amplification by sampling is counted: batches are parts of shuffled epochs, in an order that the server
knows.

References:
    * Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.
    * Bun, Steinke 2016, "Concentrated Differential Privacy", proposition 1.6 and lemma 1.7.
"""

from shoal import validate
from shoal.policy import ExamplePrivacy
from shoal.privacy.zcdp import epsilon_of_zcdp, gaussian_zcdp


def rho(privacy: ExamplePrivacy, *, epochs: int, rounds: int = 1) -> float:
    """The zCDP of so many rounds in which a device takes part. Those of several tasks add up.

    Args:
        privacy: of the task.
        epochs: passes over the examples in a round.
        rounds: that the device takes part in.
    """
    validate.positive(epochs=epochs)
    validate.not_negative(rounds=rounds)
    return rounds * epochs * gaussian_zcdp(privacy.noise_multiplier)


def epsilon(privacy: ExamplePrivacy, *, epochs: int, rounds: int = 1) -> float:
    """The epsilon of so many rounds at the task's delta."""
    return epsilon_of_zcdp(rho(privacy, epochs=epochs, rounds=rounds), privacy.delta)
