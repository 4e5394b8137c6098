"""Faster convolutions give what XLA's own give: every window, group and order of dims, gradients, members, loops."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import shoal
from shoal.forms import column_tiles, convolution_forms, winograd
from shoal.forms.convolutions import faster_convolutions

CASES: dict[str, dict[str, Any]] = {
    "plain": {"channels": 5},
    "few channels": {"padding": ((1, 0), (0, 1))},
    "columns": {"size": (9, 10), "kernel": (5, 5), "outputs": 6, "padding": ((1, 0), (2, -1))},
    "three by three": {"kernel": (3, 3), "channels": 16, "outputs": 17, "padding": ((1, 1), (0, 2)), "examples": 3},
    "nothing": {"kernel": (3, 3), "channels": 16, "outputs": 16, "size": (6, 2)},
    "nothing of few channels": {"kernel": (3, 3), "size": (2, 5)},
    "three by three, cut": {
        "kernel": (3, 3), "channels": 16, "outputs": 16, "padding": ((-1, 1), (0, -1)),
    },
    "stride": {"strides": 2, "padding": ((0, 1), (1, 1))},
    "uneven": {"strides": 3, "kernel": (2, 3), "padding": ((2, 0), (0, 1))},
    "negative padding": {"padding": ((-1, 1), (0, -1))},
    "window dilation": {"rhs_dilation": 2, "padding": ((1, 1), (2, 0))},
    "input dilation": {"lhs_dilation": 2, "padding": ((1, 2), (1, 0))},
    "both dilations": {"lhs_dilation": 2, "rhs_dilation": 2, "strides": 2},
    "groups": {"features": 2, "channels": 4, "outputs": 6},
    "depthwise": {"features": 3, "channels": 3, "outputs": 6, "strides": 2, "padding": ((1, 1), (1, 1))},
    "batch groups": {"batches": 2, "examples": 4, "outputs": 4},
    "one by one": {"kernel": (1, 1), "strides": 2},
    "channels first": {"numbers": ("NCHW", "OIHW", "NCHW")},
    "odd order": {"numbers": ("HCNW", "IWOH", "WNCH")},
    "1-D": {"size": (7,), "kernel": (3,), "numbers": ("NWC", "WIO", "NWC"), "strides": 2, "padding": ((1, 1),)},
    "1-D depthwise": {
        "size": (7,), "kernel": (3,), "numbers": ("NWC", "WIO", "NWC"), "features": 2, "channels": 2, "outputs": 2,
    },
    "3-D": {"size": (4, 5, 3), "kernel": (2, 3, 2), "numbers": ("NDHWC", "DHWIO", "NDHWC"), "strides": 2,
            "padding": ((1, 0), (1, 1), (0, 1))},
    "3-D groups": {"size": (3, 3, 3), "kernel": (2, 2, 2), "numbers": ("NCDHW", "OIDHW", "NCDHW"), "features": 2,
                   "channels": 4, "outputs": 4, "rhs_dilation": 2, "padding": ((1, 1),) * 3},
}  # fmt: skip


def case(
    *, size: tuple[int, ...] = (6, 5), kernel: tuple[int, ...] = (3, 2), numbers: Any = ("NHWC", "HWIO", "NHWC"),
    strides: int = 1, padding: Any = None, lhs_dilation: int = 1, rhs_dilation: int = 1, features: int = 1,
    batches: int = 1, examples: int = 2, channels: int = 3, outputs: int = 4, members: int = 0, dtype: Any = "float32",
) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
    """A convolution and its operands, with a leading dim of members where asked."""
    dims = len(size)
    letters = numbers[0].replace("N", "").replace("C", "")
    by_letter = {"N": examples, "C": channels, **dict(zip(sorted(letters, key="DHW".find), size, strict=True))}
    of_kernel = {
        "O": outputs,
        "I": channels // features,
        **dict(zip(sorted(letters, key="DHW".find), kernel, strict=True)),
    }
    lead = (members,) if members else ()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*lead, *(by_letter[letter] for letter in numbers[0])))
    w = rng.standard_normal((*lead, *(of_kernel[letter] for letter in numbers[1])))
    fn = functools.partial(
        lax.conv_general_dilated, window_strides=(strides,) * dims, padding=padding or ((0, 0),) * dims,
        lhs_dilation=(lhs_dilation,) * dims, rhs_dilation=(rhs_dilation,) * dims, dimension_numbers=numbers,
        feature_group_count=features, batch_group_count=batches,
    )  # fmt: skip
    return fn, jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def reference(fn: Any) -> Any:
    """XLA's own, with negative padding by slices: given to XLA it may read beyond the operand."""
    padding = fn.keywords["padding"]
    if min(itertools.chain(*padding)) >= 0:
        return fn
    amounts = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    valid = functools.partial(fn, padding=((0, 0),) * len(padding))
    return lambda x, w: valid(lax.pad(x, jnp.zeros((), x.dtype), amounts), w)


def results(fn: Any, *, second: bool = False) -> Any:
    """(x, w) -> the result, both gradients and, if asked, the gradients of the gradients' norm."""

    def value(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(fn(x, w)))

    def norm(x: jax.Array, w: jax.Array) -> jax.Array:
        return sum((jnp.sum(jnp.square(part)) for part in jax.grad(value, (0, 1))(x, w)), jnp.float32(0))

    def run(x: jax.Array, w: jax.Array) -> Any:
        return fn(x, w), jax.grad(value, (0, 1))(x, w), jax.grad(norm, (0, 1))(x, w) if second else ()

    return run


def both(one: Any, other: Any) -> Any:
    """Two functions of the same arguments as one program, compiled in haste."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(lambda *arguments: (one(*arguments), other(*arguments)), compiler_options=options)


def assert_close(got: Any, expected: Any, *, rtol: float = 2e-5) -> None:
    """Each array to `rtol` of its largest element; one that is zero but for rounding, of the largest of all."""
    largest = [float(np.abs(np.asarray(leaf, np.float64)).max(initial=0.0)) for leaf in jax.tree.leaves(expected)]
    for one, other, its in zip(jax.tree.leaves(got), jax.tree.leaves(expected), largest, strict=True):
        assert one.dtype == other.dtype
        scale = max(its, 0.01 * max(largest)) or 1.0
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), atol=rtol * scale, rtol=0
        )


@pytest.fixture(autouse=True)
def small_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "MANY_TILES", 1)
    monkeypatch.setattr(column_tiles, "SMALLEST_RESULT", 1)


SLOW = ("uneven", "both dilations", "one by one", "1-D depthwise", "3-D groups", "channels first")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_result_and_gradients_of_members_are_those_of_xla(name: str) -> None:
    fn, x, w = case(**CASES[name], members=2)
    run = both(jax.vmap(results(faster_convolutions(fn))), jax.vmap(results(reference(fn))))
    assert_close(*run(x, w))


def test_small_images_and_large_windows_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "MANY_TILES", 144)
    for changes in ({**CASES["three by three"], "size": (9, 9)}, {"size": (20, 20), "kernel": (9, 9)}):
        fn, x, w = case(**changes)
        assert "stablehlo.convolution" in jax.jit(faster_convolutions(fn)).lower(x, w).as_text()


@pytest.mark.parametrize("name", ["few channels", "columns", "three by three"])
def test_where_a_form_of_ours_is_faster_xla_convolves_nothing_forwards(name: str) -> None:
    fn, x, w = case(**CASES[name])
    assert "stablehlo.convolution" in jax.jit(fn).lower(x, w).as_text()
    assert "stablehlo.convolution" not in jax.jit(faster_convolutions(fn)).lower(x, w).as_text()
    given = jax.jit(jax.grad(lambda x: jnp.sum(faster_convolutions(fn)(x, w))))
    assert "stablehlo.convolution" not in given.lower(x).as_text()


@pytest.mark.parametrize("name", ["stride", pytest.param("depthwise", marks=pytest.mark.slow)])
def test_gradients_of_gradients_alone_and_of_all_members(name: str) -> None:
    fn, x, w = case(**CASES[name], members=2)
    assert_close(*both(results(faster_convolutions(fn), second=True), results(fn, second=True))(x[0], w[0]))
    assert_close(*both(results(jax.vmap(faster_convolutions(fn))), results(jax.vmap(fn)))(x, w))


@pytest.mark.parametrize("name", ["plain", "groups", "batch groups"])
@pytest.mark.parametrize("dims", [(1, None), (None, 2), (3, 0)], ids=["examples", "weights", "both"])
def test_any_dim_of_any_operand_may_be_mapped(name: str, dims: Any) -> None:
    fn, x, w = case(**CASES[name], members=2)
    x = x[0] if dims[0] is None else jnp.moveaxis(x, 0, dims[0])
    w = w[0] if dims[1] is None else jnp.moveaxis(w, 0, dims[1])
    other_x, other_w = case(**CASES[name], members=3)[1:]

    def twice(conv: Any) -> Any:
        """Mapped over dims, and over members that all have weights of their own."""
        once = jax.vmap(conv, dims)
        return lambda x, w: (
            once(x, w),
            jax.vmap(lambda a, b: jax.vmap(conv, (None, 0))(a, jnp.stack([b, -b])))(other_x, other_w),
        )

    assert_close(*both(twice(faster_convolutions(fn)), twice(fn))(x, w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_16_bits_stay(dtype: str) -> None:
    for name in ("plain", "depthwise"):
        fn, x, w = case(**CASES[name], dtype=dtype)
        got, expected = both(results(faster_convolutions(fn)), results(fn))(x, w)
        assert_close(got, expected, rtol=0.02)


def test_a_wider_result_may_be_asked_for() -> None:
    fn, x, w = case(dtype="bfloat16")
    fn = functools.partial(fn, preferred_element_type=jnp.float32)
    assert_close(*both(faster_convolutions(fn), fn)(x, w))


def primitives(fn: Any, *arguments: Any) -> str:
    return str(jax.make_jaxpr(fn)(*arguments))


def test_what_is_not_of_floating_type_or_empty_is_left_alone() -> None:
    fn, x, w = case()
    whole = (x * 3).astype(jnp.int32), (w * 3).astype(jnp.int32)
    assert "shoal" not in primitives(faster_convolutions(fn), *whole)
    assert "shoal" not in primitives(faster_convolutions(fn), x[:0], w)
    assert "shoal_convolution" in primitives(faster_convolutions(fn), x, w)
    np.testing.assert_array_equal(faster_convolutions(fn)(*whole), fn(*whole))


def test_convolutions_inside_other_programs_are_replaced() -> None:
    fn, x, w = case(padding=((1, 1), (1, 0)), channels=4)
    w = w / 5  # so that a chain of them does not grow, nor its rounding

    @jax.custom_jvp
    def ruled(x: jax.Array) -> jax.Array:
        return fn(x, w)

    ruled.defjvp(lambda primals, tangents: (ruled(*primals), fn(tangents[0], w)))

    @jax.custom_vjp
    def clipped(x: jax.Array) -> jax.Array:
        return fn(x, w)

    clipped.defvjp(lambda x: (clipped(x), None), lambda _, cotangent: (jnp.clip(cotangent, -1, 1),))

    def nested(x: jax.Array, *, scale: jax.Array) -> dict[str, jax.Array]:
        x = jax.jit(lambda x: fn(x, w))(x) * scale
        x = lax.scan(lambda x, w: (fn(x, w), None), x, jnp.stack([w, -w]))[0]
        x = lax.fori_loop(0, 2, lambda _, x: lax.cond(x[0, 0, 0, 0] > 0, lambda x: fn(x, w), lambda x: fn(x, -w), x), x)
        return {"made": clipped(ruled(jax.checkpoint(lambda x: jnp.sin(fn(x, w)))(x)))}

    faster = faster_convolutions(nested)
    scale = jnp.float32(0.5)
    assert "conv_general_dilated" not in primitives(lambda x: faster(x, scale=scale), x)
    run = both(
        jax.value_and_grad(lambda x: jnp.sum(faster(x, scale=scale)["made"])),
        jax.value_and_grad(lambda x: jnp.sum(nested(x, scale=scale)["made"])),
    )
    assert_close(*run(x))


def test_every_convolution_of_a_training_loop_is_in_the_fast_order() -> None:
    fn, x, w = case(**CASES["stride"], members=3)

    def train(fn: Any) -> Any:
        def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            gradient = jax.grad(lambda x, w: jnp.sum(jnp.square(fn(x, w))), 1)(x, w)
            return w - gradient, None

        return jax.jit(jax.vmap(lambda x, w: lax.scan(step, w, jnp.stack([x, x]))[0]))

    orders = set(re.findall(r"dim_numbers = (\S.*?), window", train(faster_convolutions(fn)).lower(x, w).as_text()))
    assert orders == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    assert set(re.findall(r"dim_numbers = (\S.*?), window", train(fn).lower(x, w).as_text())) - orders
    assert "feature_group_count = 3" not in train(faster_convolutions(fn)).lower(x, w).as_text()


@pytest.mark.parametrize(
    "changes",
    [
        CASES["stride"],
        pytest.param(CASES["3-D"], marks=pytest.mark.slow),
        {"size": (8, 8), "kernel": (7, 6)},  # fewer outputs than positions of the window
    ],
    ids=["stride", "3-D", "large window"],
)
def test_the_form_of_accelerators_gives_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x, w = case(**changes, members=2)
    params = jax.make_jaxpr(fn)(x[0], w[0]).eqns[0].params
    form = functools.partial(convolution_forms.elsewhere, **params)
    assert_close(*both(functools.partial(form, members=True), jax.vmap(fn))(x, w))
    assert "conv" not in primitives(lambda x, w: form(x, w, members=True), x, w)
    assert "conv" in primitives(lambda x, w: form(x, w, members=False), x[0], w[0])
    monkeypatch.setattr(convolution_forms, "_MOST_PATCH_BYTES", 1)
    assert "conv" in primitives(lambda x, w: form(x, w, members=True), x, w)


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), ((0, 0), (0, 0))),
        ((2, 3), (2, 3), ((1, 0), (0, 2))),
        ((3, 3), (2, 2), ((0, 1), (1, 1))),
        ((2, 2), (1, 1), ((0, 0), (0, 0))),
        ((1, 2), (2, 3), ((0, 0), (0, 0))),
    ],
)
def test_max_pooling_and_its_gradient_are_those_of_xla(window: Any, strides: Any, padding: Any) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 4, (3, 2, 7, 8, 2)), jnp.float32)  # many ties: the first one counts
    pads = ((0, 0), *padding, (0, 0))

    def pool(x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), pads)

    def run(pool: Any) -> Any:
        def value(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            made = pool(x)
            return jnp.sum(jnp.square(made) + made), made

        return jax.vmap(jax.grad(value, has_aux=True))

    assert "shoal_max_pool" in primitives(faster_convolutions(pool), x[0])
    got, expected = both(run(faster_convolutions(pool)), run(pool))(x)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


def test_what_is_not_a_number_is_not_hidden_by_pooling() -> None:
    pool = faster_convolutions(functools.partial(linen.max_pool, window_shape=(2, 2), strides=(2, 2)))
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan)
    np.testing.assert_array_equal(jnp.isnan(jax.jit(pool)(x))[0, ..., 0], [[True, False], [False, False]])


def test_large_windows_and_whole_numbers_are_pooled_by_xla() -> None:
    pool = functools.partial(linen.max_pool, window_shape=(6, 6))
    assert "shoal" not in primitives(faster_convolutions(pool), jnp.zeros((1, 6, 6, 1)))
    small = faster_convolutions(
        lambda x: lax.reduce_window(x, jnp.iinfo(jnp.int32).min, lax.max, (2, 2), (2, 2), "VALID")
    )
    assert "shoal" not in primitives(small, jnp.zeros((4, 4), jnp.int32))


class Nnx(nnx.Module):
    """A convolution, statistics of the batch, pooling, dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(27, 2, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        hidden = nnx.max_pool(nnx.relu(self.norm(self.conv(image))), (2, 2), (2, 2))
        return self.out(self.drop(hidden).reshape(len(hidden), -1))


class Linen(linen.Module):
    """The same."""

    @linen.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        hidden = linen.relu(linen.Conv(3, (3, 3))(image))
        hidden = linen.max_pool(linen.BatchNorm(use_running_average=not train)(hidden), (2, 2), (2, 2))
        return linen.Dense(2)(linen.Dropout(0.5, deterministic=not train)(hidden).reshape(len(hidden), -1))


@pytest.mark.parametrize("module", [Nnx, Linen()], ids=["nnx", "linen"])
def test_a_flax_model_keeps_its_randomness_statistics_and_gradient(module: Any) -> None:
    batch = {"image": ((6, 6, 1), "float32"), "label": ((), "int32")}
    task = shoal.Task.from_flax(module, name="net", loss="softmax_cross_entropy", batch=batch)
    made = task.variables(jax.random.key(0))
    rng = np.random.default_rng(0)
    data = {
        "image": jnp.asarray(rng.standard_normal((4, 6, 6, 1)), jnp.float32), "label": jnp.array([0, 1, 1, 0]),
        "mask": jnp.ones(4, bool),
    }  # fmt: skip

    def mean(loss: Any) -> Any:
        def run(params: Any) -> Any:
            whole = loss(params, made.state, data, jax.random.key(1))
            return jnp.mean(whole.per_example), (whole.state, whole.metrics)

        return jax.value_and_grad(run, has_aux=True)

    assert "shoal_convolution" in primitives(mean(faster_convolutions(task.losses)), made.params)
    assert_close(*both(mean(faster_convolutions(task.losses)), mean(task.losses))(made.params))


def test_members_may_be_laid_out_over_a_mesh() -> None:
    fn, x, w = case(**CASES["stride"], members=4)
    mesh = jax.make_mesh((2,), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("members")
    pool = functools.partial(linen.max_pool, window_shape=(2, 2), strides=(2, 2))

    def steps(fn: Any) -> Any:
        def train(x: jax.Array, w: jax.Array) -> jax.Array:
            def step(w: jax.Array, _: None) -> tuple[jax.Array, None]:
                return w - jax.grad(lambda w: jnp.sum(jnp.square(fn(x, w))))(w), None

            return lax.scan(step, w, None, length=2)[0]

        def cohort(x: jax.Array, w: jax.Array) -> jax.Array:
            return lax.psum(jnp.sum(jax.vmap(train, (0, None))(x, w), 0), "members")

        return jax.shard_map(
            cohort, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=jax.sharding.PartitionSpec()
        )

    pooled = lambda x, w: pool(fn(x, w))  # noqa: E731
    assert "conv_general_dilated" not in primitives(steps(faster_convolutions(pooled)), x, w[0])
    assert_close(*both(steps(faster_convolutions(pooled)), steps(pooled))(x * 0.1, w[0]))
