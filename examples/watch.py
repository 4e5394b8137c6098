"""Exercises told apart by a smart watch, on a wrist that the model has never seen: one subject is left out.

    python examples/watch.py                      # subject-10 is left out; --subject all leaves out each in turn
    shoal simulate examples/watch.py --data name:watch --rounds 30          # the test part is subject-10

Ten people do seven shoulder exercises with a watch that measures acceleration and rotation 50 times a second. Each of them is
a device; what it sends are updates, never a measurement. The number at the end is the share of the left-out subject's windows
of two seconds whose exercise is told right; guessing is right for about one in seven.

Reference: Burns et al., 2018, Shoulder physiotherapy exercise recognition, Physiological Measurement 39(7). The data are read
from the Python package seglearn (BSD), which pip downloads on the first run.
"""

import argparse

import jax
import optax
from flax import nnx

import shoal

EXERCISES = 7


class Net(nnx.Module):
    """Window (B, 100, 6) in, a score for each exercise out: two convolutions over time, then what is strongest anywhere."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(6, 24, (9,), strides=(2,), rngs=rngs)
        self.second = nnx.Conv(24, 32, (9,), strides=(2,), rngs=rngs)
        self.head = nnx.Linear(32, EXERCISES, rngs=rngs)

    def __call__(self, window: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.second(nnx.relu(self.first(window))))
        return self.head(hidden.max(axis=1))


task = shoal.Task.from_flax(
    Net,
    name="watch",
    loss="softmax_cross_entropy",
    batch={"window": ((100, 6), "float32"), "label": ((), "int32")},
    local=shoal.Local(optimizer=optax.sgd(0.03, momentum=0.9), batch_size=32),
    rounds=shoal.RoundPolicy(goal=9, over_selection=1.0),
    about=shoal.About(
        purpose="Tell which shoulder exercise is being done.",
        data="Smart-watch recordings of ten subjects, seven exercises each (seglearn).",
        licence="Apache-2.0, like shoal; the data: BSD.",
        limits="Ten subjects, one kind of watch: it says nothing of people who move otherwise.",
    ),
)


def everybody() -> shoal.data.Population:
    """All ten subjects."""
    found = shoal.data.load_federated("watch")
    subjects = [*found.train.items(), *found.test.items()]
    return shoal.data.Population.from_arrays(dict(subjects))


def without(subject: str, *, rounds: int = 25) -> float:
    """Trains on the others; the share of the subject's windows that is told right."""
    made = shoal.simulate(task, everybody(), rounds=rounds, leave_out=subject, evaluate_every=rounds)
    return made.history[-1].metrics["left_out/accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--subject", default="subject-10", help="Whom to leave out, or all.")
    parser.add_argument("--rounds", type=int, default=25)
    chosen = parser.parse_args()
    subjects = everybody().ids if chosen.subject == "all" else (chosen.subject,)
    found = {subject: without(subject, rounds=chosen.rounds) for subject in subjects}
    for subject, accuracy in found.items():
        print(f"{subject}: {accuracy:.3f} of the windows told right by a model that never saw it")
    if len(found) > 1:
        print(f"mean over subjects: {sum(found.values()) / len(found):.3f}")
