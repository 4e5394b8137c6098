"""`shoal.testing.check`: each line fails for a task that breaks what it looks at, and for no other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from examples.one_task import population as one_population
from examples.one_task import task as one_task
from shoal.local import sgd_rule
from shoal.testing import check


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shoal.testing, "SPEED_S", 0.02)


def members(num: int = 5, *, size: int = 9) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    xs = [rng.uniform(-2, 2, size + i).astype(np.float32) for i in range(num)]
    return {f"m{i}": {"x": x, "y": 3 * x + 1} for i, x in enumerate(xs)}


def outputs(params: Any, batch: Any) -> Any:
    return params["w"] * batch["x"] + params["b"]


def line_task(**changes: Any) -> shoal.Task:
    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return jnp.square(outputs(params, batch) - batch["y"])

    settings: dict[str, Any] = {
        "name": "line", "init": lambda key: {"w": jnp.zeros(()), "b": jnp.zeros(())}, "loss": loss,
        "batch": {"x": ((), "float32"), "y": ((), "float32")},
        "local": shoal.Local(optimizer=optax.sgd(0.05), batch_size=4),
    }  # fmt: skip
    return shoal.Task(**{**settings, **changes})


def failed(report: shoal.testing.Report) -> list[str]:
    return [line.name for line in report.lines if line.status == "fail"]


def test_a_good_task_passes_every_line() -> None:
    told: list[str] = []
    report = check(line_task(), members(), on_line=lambda line: told.append(line.name))
    assert report.ok, report
    assert all(line.status == "pass" for line in report.lines) and told == [line.name for line in report.lines]
    assert "bytes" in str(report) and report["learns"].detail.startswith("loss ")
    with pytest.raises(KeyError, match="learns"):
        report["nothing"]


def test_a_clip_norm_that_moves_is_followed_and_noise_leaves_no_loss_to_look_at() -> None:
    clip = shoal.AdaptiveClip(initial=0.5, learning_rate=1.0)
    seen: list[set[str]] = []

    def look(model: Any, metrics: Any) -> bool:
        seen.append(set(model.tensors))
        return True

    followed = check(line_task(privacy=shoal.Privacy(clip_norm=clip)), members(), predicates={"looked": look})
    assert followed.ok and followed["learns"].detail.startswith("loss ") and seen == [{"params/w", "params/b"}], (
        followed
    )
    local = shoal.Local(optimizer=optax.sgd(0.05), batch_size=4, weighting="uniform")
    noisy = check(line_task(privacy=shoal.Privacy(clip_norm=clip, noise_multiplier=1.0), local=local), members())
    assert noisy.ok and noisy["learns"].status == "skip" and "noise" in noisy["learns"].detail, noisy


@pytest.mark.slow
def test_the_task_with_one_of_each_passes() -> None:
    report = check(one_task, one_population())
    assert report.ok, report
    assert "params/head/bias" in report["private leaves"].detail


def test_a_loss_that_is_a_scalar_fails_with_what_to_do_and_the_rest_is_skipped() -> None:
    report = check(line_task(loss=lambda params, state, batch, key: jnp.mean(outputs(params, batch))), members())
    assert failed(report) == ["functions"] and "one loss per example" in report["functions"].detail
    assert {line.status for line in report.lines[1:]} == {"skip"}


def test_an_error_in_the_task_is_a_line() -> None:
    def broken(params: Any, state: Any, batch: Any, key: Any) -> Any:
        raise KeyError("nothing")

    report = check(line_task(loss=broken), members())
    assert failed(report) == ["functions"] and "KeyError" in report["functions"].detail


def test_data_that_do_not_fit() -> None:
    odd = {"m": {"x": np.zeros((3, 2), np.float32), "y": np.zeros(3, np.float32)}}
    assert failed(check(line_task(), odd)) == ["data"]
    nan = members()
    nan["m3"]["x"][2] = np.nan
    report = check(line_task(), nan)
    assert "data" in failed(report) and "'m3'" in report["data"].detail


def test_a_loss_that_looks_at_padding_fails() -> None:
    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return jnp.square(outputs(params, batch) - batch["y"]) + jnp.mean(outputs(params, batch))

    report = check(line_task(loss=loss), members())
    assert "padding" in failed(report) and "mask" in report["padding"].hint


def test_a_model_that_mixes_examples_is_told_apart() -> None:
    report = check(line_task(heeds_mask=False), {f"m{i}": members(1, size=8)["m0"] for i in range(3)})
    assert report.ok and report["padding"].status == "skip" and report["learns"].status == "pass", report


def test_partial_batches_that_a_model_cannot_take_fail_with_who_has_them() -> None:
    report = check(line_task(heeds_mask=False), members(8))
    assert failed(report) == ["batches"], report
    assert "6 of 8 users have a partial batch (of 4)" in report["batches"].detail
    assert "m0, m1, m2 and 3 more" in report["batches"].detail and "`mask`" in report["batches"].hint


def test_users_with_less_than_a_batch_fail_where_the_remainder_is_dropped() -> None:
    local = shoal.Local(optimizer=optax.sgd(0.05), batch_size=10, drop_remainder=True)
    report = check(line_task(local=local), members())
    assert failed(report) == ["batches"] and "1 of 5 users have fewer examples than a batch of 10: m0." in str(report)


def test_users_without_examples_are_named() -> None:
    report = check(line_task(), members() | {"nobody": {"x": np.zeros(0, np.float32), "y": np.zeros(0, np.float32)}})
    assert report.ok and "beware: nobody is left out: no examples" in report["data"].detail


def test_a_local_rule_that_steps_on_nothing_fails() -> None:
    def rule(task: shoal.Task) -> shoal.LocalRule:
        good = sgd_rule(task)

        def block(carry: Any, batches: Any, mask: Any, key: Any) -> Any:
            made = good.block(carry, batches, mask, key)
            return {**made, "step": made["step"] + 1}

        return shoal.LocalRule(
            begin=good.begin, block=block, finish=good.finish, broadcast=good.broadcast,
            device_state=good.device_state, sums=good.sums,
        )  # fmt: skip

    report = check(line_task(rule=rule), members())
    assert failed(report) == ["masked step"] and "step" in report["masked step"].detail


def test_a_private_leaf_that_is_sent_fails_and_so_does_a_pattern_that_matches_nothing() -> None:
    def leaking(task: shoal.Task) -> shoal.LocalRule:
        return sgd_rule(line_task())

    report = check(line_task(leaves={"params/b": "private"}, rule=leaking), members())
    assert "private leaves" in failed(report) and "params/b" in report["private leaves"].detail
    report = check(line_task(leaves={"params/c": "frozen"}), members())
    assert failed(report) == ["functions"] and "params/c" in report["functions"].detail


def test_a_task_that_does_not_learn_fails() -> None:
    report = check(line_task(local=shoal.Local(optimizer=optax.sgd(-0.05), batch_size=4)), members())
    assert "learns" in failed(report) and "learning rate" in report["learns"].hint


def test_predicates_get_lines_of_their_own() -> None:
    predict = lambda params, state, batch: outputs(params, batch)  # noqa: E731
    report = check(
        line_task(predict=predict),
        members(),
        predicates={
            "small loss": lambda model, metrics: metrics["loss"] < 5.0,
            "at zero": lambda model, metrics: bool(model.predict({"x": np.zeros(1, np.float32)})[0] > 100),
            "wrong": lambda model, metrics: metrics["nothing"] > 0,
        },
    )
    assert [report[name].status for name in ("small loss", "at zero", "wrong")] == ["pass", "fail", "fail"]
    assert "KeyError" in report["wrong"].detail and "loss" in report["at zero"].detail


def test_without_data_random_examples_take_their_place() -> None:
    report = check(line_task(), predicates={"any": lambda model, metrics: True})
    assert report.ok and [line.name for line in report.lines if line.status == "skip"] == [
        "data",
        "batches",
        "learns",
        "any",
    ]


def test_an_update_that_is_not_the_same_twice_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import shoal.testing as module

    real, count = module.train, iter(range(1000))

    def unsteady(*args: Any, **kwargs: Any) -> Any:
        update = real(*args, **kwargs)
        name = next(iter(update.sums))
        update.sums[name] = update.sums[name] + np.float32(next(count))
        return update

    monkeypatch.setattr(module, "train", unsteady)
    assert "deterministic" in failed(check(line_task(), members()))


def test_jax_is_not_left_changed() -> None:
    before = jax.config.jax_numpy_dtype_promotion
    check(line_task(), members())
    assert jax.config.jax_numpy_dtype_promotion == before
