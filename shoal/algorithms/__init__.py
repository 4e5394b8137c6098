"""Algorithms of federated learning, each a function from a task to a task: `shoal.fedprox(task, mu=0.01)`.

A task stays what it was, a loss and settings; an algorithm changes one of the four places that a round has::

    Selection -> who is drawn          begin -> block (batch -> gradient -> optimizer) … -> finish -> sums -> server's step
    by_size, poisson                                  |            |                         |              |
                                                 per_fedavg     fedprox                  compressed      reptile
                                                     scaffold, ditto: device state, tensors of their own in the model

    * the optimizer: an optax transformation before the task's own (`fedprox`);
    * the gradient: how it is taken of a batch (`per_fedavg`);
    * the local rule as a whole (`scaffold`, `ditto`), or a wrapper around any (`compressed`): it keeps what it needs in the
      carry and in the device's state, and may add tensors of its own to the model, which begin as zeros. The sum of an
      update that is not weighted is *added* to its tensor, that of a weighted one is averaged: see `aggregate/commit.py`;
    * the server's rule (`reptile`).

Nothing here runs a round. What comes out is a task like any other: its plan runs in simulation and on a fleet unchanged (a
virtual fleet takes those whose devices keep nothing). What goes together with what is in `compose.py`; `docs/algorithms.md` has the table.
"""
