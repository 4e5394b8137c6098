"""What noise on examples promises in one run: in numbers, and in a statement that can stand alone."""

from dataclasses import dataclass
from typing import Any

from shoal.policy import ExamplePrivacy
from shoal.privacy import examples


@dataclass(frozen=True, kw_only=True)
class ExamplesSpent:
    """Of a device's examples, by the number of rounds that it was in."""

    privacy: ExamplePrivacy
    epochs: int
    """Passes over a device's examples in a round."""
    rounds: int
    """Of the run, so far."""
    is_simulated: bool
    """Its noise follows from the run's seed."""

    def epsilon(self, rounds: int) -> float:
        """For a device that was in so many rounds."""
        return examples.epsilon(self.privacy, epochs=self.epochs, rounds=rounds)

    def to_json(self) -> dict[str, Any]:
        return {
            "epsilon_of_one_round": self.epsilon(1), "epsilon_of_all_rounds": self.epsilon(self.rounds), "rounds": self.rounds,
            "delta": self.privacy.delta,
        }  # fmt: skip


def statement_of_examples(spent: ExamplesSpent) -> str:
    """Mechanism, unit, assumptions, epsilon at delta, accountant: what somebody needs to judge the claim."""
    privacy = spent.privacy
    lines = [
        f"A device's updates are differentially private for each of its examples: **epsilon {spent.epsilon(1):.3g} at delta {privacy.delta:g}** "
        f"for a device that was in one round, {spent.epsilon(spent.rounds):.3g} for one that was in all {spent.rounds}.",
        "Unit: one example of one device, against everybody who sees its updates, the server among them. Neighbours differ in one example, which is "
        "there or whose gradients are zero; how many examples a device holds is public.",
        f"Mechanism: in each local step each example's gradient was clipped to a norm of {privacy.clip_norm:g}; their sum had Gaussian noise of "
        f"{privacy.noise_multiplier:g} times that norm and was divided by the size of a batch; an example was in {spent.epochs} "
        f"{'step' if spent.epochs == 1 else 'steps'} of a round at most; no metrics of training were collected.",
        "Accountant: Rényi divergences of all steps added up (adaptive composition), converted at the best order; no amplification by sampling is "
        "claimed. A device that trained more than once for a version, or for other tasks on the same examples, has spent more: its own ledger says "
        "how much.",
        "Assumptions: devices run the signed program, and draw its noise from randomness of their own, by threefry in float32, of which nothing is "
        "proved (Mironov 2012)."
        + (" This was a simulation: its noise follows from its seed." if spent.is_simulated else ""),
    ]
    return "\n\n".join(lines)
