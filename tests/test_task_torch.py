"""PyTorch modules as tasks: first weights, noise, statistics under the mask, the way back, what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.local import model_specs

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

FIELDS: dict[str, tuple[tuple[int, ...], str]] = {"x": ((3,), "float32"), "label": ((), "int32")}
KEY = jax.random.key(1)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def task(module: Any, **settings: Any) -> shoal.Task:
    settings = {"loss": "softmax_cross_entropy", "batch": FIELDS, "name": "torch", **settings}
    return shoal.Task.from_torch(module, **settings)


def examples(size: int = 4, real: int | None = None) -> dict[str, Any]:
    x = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32)
    return {
        "x": jnp.asarray(x),
        "label": jnp.arange(size, dtype=jnp.int32) % 2,
        "mask": jnp.arange(size) < (size if real is None else real),
    }


class Net(nn.Module):
    """Everything that the state_dict can hold: a buffer of whole numbers, one that is not kept, shared and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.first.weight
        self.out = nn.Linear(3, 2)
        self.out.bias.requires_grad_(False)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.out(self.again(self.norm(self.first(x[:, self.order])) * self.scale))


def numbers(task: shoal.Task, params: Any, state: Any, batch: Any) -> Any:
    """Gradients by name, and the state after."""

    def total(params: Any) -> Any:
        made = task.losses(params, state, batch, KEY)
        return jnp.where(batch["mask"], made.per_example, 0.0).sum(), made.state

    gradient, after = jax.jit(jax.grad(total, has_aux=True))(params)
    return gradient, after


def test_names_first_weights_and_rules_are_the_module_s() -> None:
    module = Net()
    made = task(module, leaves={"params/first.*": "private"})
    assert {spec.name.partition("/")[2] for spec in model_specs(made)} == set(module.state_dict()) - {"again.weight"}
    for seed_of_nothing in (0, 1):
        params, _ = made.variables(jax.random.key(seed_of_nothing))
        np.testing.assert_array_equal(params["out.weight"], module.out.weight.detach())
    frozen = {spec.name for spec in model_specs(made) if made.leaf_rule(spec.name) == "frozen"}
    assert frozen == {"params/out.bias", "state/order", "state/norm.num_batches_tracked"}
    assert made.leaf_rule("params/first.weight") == "private" and made.heeds_mask
    module.out.weight.data.zero_()
    assert np.any(made.variables(KEY).params["out.weight"] != 0), "the task has a copy"


def test_gradients_and_statistics_of_the_task_are_torch_s() -> None:
    module, batch = Net(), examples()
    made = task(module, loss=nn.CrossEntropyLoss())
    gradient, after = numbers(made, *made.variables(KEY), batch)
    outputs = module(torch.tensor(np.asarray(batch["x"])))
    nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 0, 1]), reduction="sum").backward()
    for name in ("first.weight", "again.bias", "norm.weight", "out.weight"):
        np.testing.assert_allclose(gradient[name], module.get_parameter(name).grad, atol=1e-5)
    for name in ("norm.running_mean", "norm.running_var"):
        np.testing.assert_allclose(after[name], module.get_buffer(name), atol=1e-6)
    module.eval()
    assert made.predict is not None
    found = made.predict(made.variables(KEY).params, after, batch)
    np.testing.assert_allclose(found, module(torch.tensor(np.asarray(batch["x"]))).detach(), atol=1e-5)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", nn.functional.cross_entropy], ids=["ours", "torch's"])
def test_padding_changes_no_gradient_and_no_statistic(loss: Any) -> None:
    made = task(Net(), loss=loss)
    params, state = made.variables(KEY)
    padded, whole = examples(6, real=4), examples(6)
    smaller = {name: value[:4] for name, value in whole.items()}
    for one, two in zip(numbers(made, params, state, padded), numbers(made, params, state, smaller), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


class Over(nn.Module):
    """Normalises over something else than the batch."""

    def __init__(self, takes_mask: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        if takes_mask:
            self.forward = self.masked  # type: ignore[method-assign]

    def forward(self, x: Any) -> Any:
        return self.norm(x[None].transpose(1, 2))[0].T

    def masked(self, x: Any, mask: Any) -> Any:
        return torch.where(mask[:, None], x, x.mean(0))


def test_a_module_whose_batch_is_somewhere_else_wants_whole_batches() -> None:
    assert not task(Over(takes_mask=False)).heeds_mask
    made = task(Over(takes_mask=True))
    assert made.heeds_mask and made.predict is not None
    batch = examples(4, real=2)
    found = made.predict(*made.variables(KEY), batch)
    np.testing.assert_allclose(found[2:], jnp.broadcast_to(batch["x"].mean(0), (2, 3)), atol=1e-6)


def test_dropout_draws_from_the_key_and_keeps_the_mean() -> None:
    made = task(nn.Sequential(nn.Dropout(0.25), nn.Dropout(0.0)), loss=lambda outputs, labels: outputs)
    batch = {**examples(1000), "x": jnp.ones((1000, 3))}
    one, same, other = (made.losses({}, {}, batch, jax.random.key(k)).per_example for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert float(one.mean()) == pytest.approx(1.0, abs=0.05)
    assert set(np.round(np.asarray(one * 3 * 0.75)).astype(int)) == {0, 1, 2, 3}
    assert made.predict is not None
    np.testing.assert_array_equal(made.predict({}, {}, batch), batch["x"])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 2)

    def forward(self, tokens: Any, x: Any) -> dict[str, Any]:
        return {"out": self.embedding(tokens).sum(1) + x[:, :2]}


def test_several_inputs_whole_numbers_and_outputs_by_name() -> None:
    fields = {**FIELDS, "tokens": ((4,), "int32")}
    settings = {"inputs": ["tokens", "x"], "outputs": lambda found: found["out"]}
    made = task(Two(), batch=fields, loss=lambda outputs, labels: outputs[:, 0], **settings)
    batch = {**examples(), "tokens": jnp.ones((4, 4), jnp.int32)}
    params, state = made.variables(KEY)
    found = made.losses(params, state, batch, KEY).per_example
    np.testing.assert_allclose(found, 4 * params["embedding.weight"][1, 0] + batch["x"][:, 0], rtol=1e-5)


class Switch(nn.Module):
    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.scale, self.returned = nn.Parameter(torch.ones(3)), returned

    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            doubled = self.scale * 2
        return doubled if self.returned else doubled * self.scale * x


def test_what_is_computed_without_gradient_has_none() -> None:
    made, batch = task(Switch(returned=False), loss=lambda outputs, labels: outputs), examples()
    gradient, _ = numbers(made, *made.variables(KEY), batch)
    np.testing.assert_allclose(gradient["scale"], 2 * batch["x"].sum(0) / 3, rtol=1e-5)


class Branch(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


class Places(nn.Module):
    def forward(self, x: Any) -> Any:
        return nn.functional.max_pool1d(x[:, None], 2, return_indices=True)[1][:, 0]


class Spectral(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.fft.fft(x).real


def test_what_cannot_be_taken_apart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a torch\.nn\.Module, got type\. Call the class"):
        task(Net, loss="squared_error")
    with pytest.raises(ValueError, match=r"return nothing that it computes under torch\.no_grad"):
        task(Switch(returned=True))
    with pytest.raises(
        ValueError, match=r"Expected Branch to be a module that torch\.export takes, called with float32 \(61, 3\)"
    ):
        task(Branch())
    with pytest.raises(ValueError, match=r"Expected Spectral to be made of .* it uses aten\._fft_r2c"):
        task(Spectral())
    with pytest.raises(ValueError, match=r"that does not use output 1 of aten\.max_pool.*places of max pooling"):
        task(Places()).losses({}, {}, examples(), KEY)
    with pytest.raises(ValueError, match="to change nothing but its persistent buffers"):
        task(nn.Embedding(5, 2, max_norm=1.0), batch={"x": ((3,), "int32"), "label": ((), "int32")})

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("big", torch.tensor(1 << 40))

    with pytest.raises(ValueError, match="Expected the whole numbers of big to fit 32 bits, got up to 1099511627776"):
        task(Large())


@pytest.mark.slow
def test_a_plan_trains_without_torch_and_its_weights_go_back(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
    rounds = shoal.RoundPolicy(goal=2, minimum_group=2, over_selection=1.0)
    made = task(module, local=shoal.Local(batch_size=8, optimizer=optax.sgd(0.2)), rounds=rounds)
    x = np.random.default_rng(3).normal(size=(4, 44, 3)).astype(np.float32)
    members = {f"m{i}": {"x": x[i], "label": (x[i, :, 0] > 0).astype(np.int32)} for i in range(4)}
    shoal.simulate(made, members, rounds=10, held_out=members["m0"], folder=tmp_path / "run")
    np.save(tmp_path / "x.npy", x[0])
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np, shoal
model = shoal.load({str(tmp_path / "run")!r})
np.save({str(tmp_path / "found.npy")!r}, model.predict(np.load({str(tmp_path / "x.npy")!r})))
model.save({str(tmp_path / "model.safetensors")!r}, bare=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    from safetensors.torch import load_file

    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not torch.equal(before["0.weight"], module.state_dict()["0.weight"])
    module.eval()
    found = np.load(tmp_path / "found.npy")
    np.testing.assert_allclose(found, module(torch.tensor(x[0])).detach(), atol=1e-5)
    assert (found.argmax(-1) == (x[0, :, 0] > 0)).mean() > 0.8
    again = made.replace(init=shoal.from_safetensors(tmp_path / "model.safetensors", made.init))
    np.testing.assert_array_equal(again.variables(KEY).params["0.weight"], module.state_dict()["0.weight"])
