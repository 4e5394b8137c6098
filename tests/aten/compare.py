"""Compares a module in torch with what it becomes in JAX: outputs, gradients, buffers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from shoal.aten.exported import export, module_weights
from shoal.aten.run import KNOWN, run, unknown_operations

TOLERANCE = 1e-5
"""Of outputs and gradients, as a share of the largest where that is above 1."""


def in_torch(module: Any, inputs: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """Outputs, gradients of parameters by name, gradients of inputs."""
    module.zero_grad()
    own = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = floats(torch.utils._pytree.tree_leaves(module(*own)))
    sum(torch.sum(torch.sin(y + i)) for i, y in enumerate(outputs)).backward()
    of_params = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in module.named_parameters()}
    return outputs, of_params, [x.grad for x in own if x.is_floating_point()]


def floats(values: list[Any]) -> list[Any]:
    return [v for v in values if torch.is_tensor(v) and v.is_floating_point()]


def in_jax(
    module: Any, inputs: tuple[Any, ...], training: bool
) -> tuple[list[Any], dict[str, Any], list[Any], dict[str, Any]]:
    """The same, and the buffers that were changed."""
    weights = module_weights(module)
    specs = [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs]
    graph = export(module, specs, {}, training=training, known=KNOWN, shared=weights.shared)
    assert unknown_operations(graph) == []
    arrays = [x.numpy() if x.is_floating_point() else x.numpy().astype(np.int32) for x in inputs]

    @jax.jit
    def both(params: Any, given: Any) -> Any:
        def total(params: Any, given: Any) -> Any:
            outputs, changed = run(graph, params, weights.buffers, given, jax.random.key(0), None)
            found = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.floating)]
            return sum(jnp.sum(jnp.sin(y + i)) for i, y in enumerate(found)), (found, changed)

        return jax.grad(total, argnums=(0, 1), has_aux=True, allow_int=True)(params, given)

    (of_params, of_inputs), (outputs, changed) = both(weights.params, arrays)
    return outputs, of_params, [g for g in of_inputs if g.dtype != jax.dtypes.float0], changed


def agree(module: Any, *inputs: Any, training: bool = True) -> None:
    """Raises AssertionError unless both are the same."""
    outputs, of_params, of_inputs, changed = in_jax(module, inputs, training)
    module.train(training)
    expected, grads, input_grads = in_torch(module, inputs)
    assert len(outputs) == len(expected) and len(of_inputs) == len(input_grads)
    for one, two in zip([*outputs, *of_inputs], [*expected, *input_grads], strict=True):
        close(one, two)
    for name, gradient in grads.items():
        close(of_params[name], gradient, name)
    for name, buffer in module.named_buffers():
        if name in changed:
            close(changed[name], buffer, name)


def close(found: Any, expected: Any, what: str = "") -> None:
    other = np.zeros_like(found) if expected is None else expected.detach().numpy()
    scale = max(1.0, float(np.abs(other).max(initial=0.0)))
    np.testing.assert_allclose(found, other, rtol=0, atol=TOLERANCE * scale, err_msg=what)
