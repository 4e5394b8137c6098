"""Every layer and operation of the table against torch: outputs, gradients and buffers within 1e-5.

The networks that people write first are in the fast tests; the sweep over operations is slow.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tests.aten.compare import agree  # noqa: E402

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings(
        "ignore:LSTM with projections is not supported with oneDNN"
    ),  # of torch, of its own speed
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def vector() -> Any:
    return torch.randn(4, 6)


def image() -> Any:
    return torch.randn(4, 3, 9, 9)


def sequence() -> Any:
    return torch.randn(4, 7, 6)


class Classifier(nn.Module):
    """Tokens to classes by an LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, tokens: Any) -> Any:
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.out(self.gru(hidden)[0][:, -1])


def cifar_cnn() -> Any:
    """The CNN of McMahan et al. 2017 in the form that simulators are compared by, with dropout off and fewer channels."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.0), nn.Flatten(),
        nn.Linear(8 * 2 * 2, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), vector),
    "cnn": (cifar_cnn, image),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()), image),
    "recurrent": (Classifier, lambda: torch.randint(0, 10, (4, 7))),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), sequence),
    "group and layer norm": (
        lambda: nn.Sequential(nn.GroupNorm(7, 7), nn.LayerNorm((7, 6)), nn.LayerNorm(6)),
        sequence,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    make, inputs = NETWORKS[name]
    agree(make(), inputs())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_outside_of_training(name: str) -> None:
    make, inputs = NETWORKS[name]
    module = make()
    module(inputs())  # batch norm has seen something
    agree(module, inputs(), training=False)


LAYERS: dict[Callable[[], Any], list[Any]] = {
    vector: [
        nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.SELU(), nn.Softplus(), nn.PReLU(),
        nn.PReLU(6), nn.GLU(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.ReLU6(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(),
        nn.CELU(2.0), nn.ELU(), nn.Threshold(0.1, 0.2), nn.LeakyReLU(), nn.Hardtanh(), nn.Softshrink(), nn.BatchNorm1d(6),
        nn.RMSNorm(6), nn.LSTMCell(6, 5), nn.GRUCell(6, 5), nn.Unflatten(1, (2, 3)),
    ],
    sequence: [
        nn.RNN(6, 5), nn.RNN(6, 5, nonlinearity="relu"), nn.LSTM(6, 5, bias=False), nn.GRU(6, 5, 2, bias=False, bidirectional=True),
        nn.LSTM(6, 5, 2, proj_size=3), nn.BatchNorm1d(7), nn.Conv1d(7, 4, 3, padding=1), nn.ConvTranspose1d(7, 4, 3, 2),
        nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(4),
    ],
    image: [
        nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2, groups=3), nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular"), nn.Conv2d(3, 4, 2, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, groups=3), nn.ConvTranspose2d(3, 4, 3, 2, dilation=2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, padding=1, dilation=2), nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3), nn.AdaptiveAvgPool2d(4), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(3),
        nn.Upsample(scale_factor=2), nn.Upsample(size=(5, 13)), nn.Upsample(scale_factor=1.5, mode="bilinear"),
        nn.Upsample(size=(5, 13), mode="bilinear", align_corners=True), nn.PixelUnshuffle(3), nn.ZeroPad2d((1, 2, 3, 4)),
        nn.ReplicationPad2d(2), nn.ReflectionPad2d(1), nn.LocalResponseNorm(2), nn.Unfold(2), nn.InstanceNorm2d(3, affine=True),
        nn.BatchNorm2d(3, track_running_stats=False), nn.Conv3d(4, 2, 2),
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(layer, inputs) for inputs, layers in LAYERS.items() for layer in layers],
    ids=lambda value: str(value)[:60] if isinstance(value, nn.Module) else "",
)
def test_layers(layer: Any, inputs: Callable[[], Any]) -> None:
    given = inputs()
    if inputs is vector:
        given = torch.cat([given * 30, torch.zeros(1, 6), given])  # where functions overflow and where they have a kink
    agree(layer, given)


@pytest.mark.slow
def test_layers_of_several_inputs() -> None:
    x = sequence()
    agree(nn.MultiheadAttention(6, 2, batch_first=True), x, x + 1, x - 1)
    agree(nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, batch_first=True), x, x + 1)
    agree(nn.Bilinear(6, 6, 3), vector(), vector())
    agree(nn.LSTM(6, 5), x[0])


class Of(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "normalize": lambda x: F.normalize(x, dim=1),
    "one hot": lambda x: F.one_hot(x.argmax(1), 6) * x,
    "einsum": lambda x: torch.einsum("bi,cj->bij", x, x),
    "moments": lambda x: (x.std(), x.var(0), x.mean((0, 1), keepdim=True), x.norm(dim=1), torch.linalg.norm(x)),
    "cumulative": lambda x: (x.cumsum(1), x.cumprod(1)),
    "chosen": lambda x: (x[:, [0, 2]], x.index_select(1, torch.tensor([2, 2])), x[1:, ::2], x[..., -1]),
    "gathered": lambda x: (x.gather(1, torch.tensor([[0, 1], [1, 1]])), torch.take_along_dim(x, x.argsort(1), 1)),
    "scattered": lambda x: (
        torch.zeros(4, 6).scatter_add(1, torch.zeros(4, 6, dtype=torch.long), x),
        torch.zeros(4, 6).index_put((torch.tensor([0, 1]),), x[:2]),
    ),
    "masked": lambda x: (x.masked_fill(x > 0, 0), x.tril(), x.triu(1), torch.where(x > 0, x, -x)),
    "ordered": lambda x: (x.sort(1)[0], x.topk(2)[0], x.max(1)[0], x.min(1)[0], x.amax(1), x.flip(0), x.roll(1, 0)),
    "divided": lambda x: (torch.div(x, 0.3, rounding_mode="floor") + x / 3, x % 0.7, torch.fmod(x, 0.7)),
    "powers": lambda x: x**2 + x**3.0 + (x.abs() + 1) ** 0.5 + 2**x,
    "joined": lambda x: (torch.stack([x, x], 1).unbind(1)[0], torch.cat([x, x.T.reshape(4, 6)]), x.chunk(4, 1)[1]),
    "repeated": lambda x: (x.repeat(2, 3), x.repeat_interleave(2, 1), x[:, None].expand(-1, 3, -1), torch.outer(x[0], x[1])),
    "products": lambda x: (x @ x.T, torch.bmm(x[None], x.T[None]), x.prod(1), torch.diagonal(x @ x.T), torch.cdist(x, x + 1)),
    "logarithms": lambda x: (torch.logsumexp(x * 100, 1), F.logsigmoid(x * 100), torch.log1p(x.abs())),
    "kinks": lambda x: (x.clamp(-0.5, 0.5), x.clamp_min(0), x.abs(), torch.maximum(x, x.flip(0) + 1), x.round() + x),
    "in place": lambda x: (x * 1).add_(1).mul_(x),
    "no gradient": lambda x: x.detach() * x + (x.round() - x).detach() + x,
    "attention": lambda x: (
        F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.eye(4).bool(), scale=0.3),
    ),
    "made": lambda x: torch.arange(6) + x + torch.linspace(0, 1, 6) + torch.ones_like(x) + torch.eye(4, 6) + x.new_full((6,), 2.0),
    "windows": lambda x: (x.unfold(1, 3, 2), F.pad(x, (1, -1)), x.movedim(0, 1), x.view(2, 12).flatten()),
    "whole numbers": lambda x: (torch.arange(4) // 3 + (x > 0).any(1)) * x.sum(1),
    "losses": lambda x: (
        F.smooth_l1_loss(x, x.flip(0)), F.huber_loss(x, x.flip(0)), F.binary_cross_entropy_with_logits(x, (x > 0).float()),
        F.cross_entropy(x, torch.tensor([0, 1, 2, 3]), reduction="none", label_smoothing=0.1),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    agree(Of(OPERATIONS[name]), vector())


def test_types_are_torch_s() -> None:
    from shoal.aten.exported import export
    from shoal.aten.run import KNOWN, run

    def function(x: Any) -> Any:
        half = x.bfloat16()
        return half * 2.5, x > 0, x.argmax(1), half + torch.tensor(1.0), x.sum(dtype=torch.float16), x.double() * 2

    graph = export(Of(function), [((4, 6), "float32")], {}, training=True, known=KNOWN, shared={})
    outputs, _ = run(graph, {}, {}, [jax.numpy.ones((4, 6))], None, None)
    assert [str(y.dtype) for y in outputs] == ["bfloat16", "bool", "int32", "bfloat16", "float16", "float32"]
    np.testing.assert_array_equal(outputs[0].astype("float32"), 2.5)
