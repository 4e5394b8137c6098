"""Weights from files: names are translated, what does not fit is named, pickles are refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shoal
from shoal.errors import DataError

KEY = jax.random.key(0)


def init(key: Any) -> shoal.Variables:
    return shoal.Variables(
        {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.ones((2,))}}, {"norm": {"mean": jnp.zeros((3,))}}
    )


TENSORS = {
    "params/dense/kernel": np.arange(6, dtype=np.float32).reshape(3, 2),
    "params/dense/bias": np.full(2, 7, np.float32),
    "state/norm/mean": np.full(3, 5, np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    shoal.to_safetensors(TENSORS, path)
    made = shoal.from_safetensors(path, init)(KEY)
    np.testing.assert_array_equal(made.params["dense"]["kernel"], TENSORS["params/dense/kernel"])
    np.testing.assert_array_equal(made.state["norm"]["mean"], TENSORS["state/norm/mean"])


def test_bare_names_find_their_place(path: Path) -> None:
    shoal.to_safetensors(TENSORS, path, bare=True)
    assert sorted(load_file(path)) == ["dense/bias", "dense/kernel", "norm/mean"]
    assert shoal.from_safetensors(path, init)(KEY).params["dense"]["bias"][0] == 7
    with pytest.raises(ValueError, match="got w twice"):
        shoal.to_safetensors({"params/w": np.zeros(1), "state/w": np.zeros(1)}, path, bare=True)


def test_names_and_layouts_of_others(path: Path) -> None:
    theirs = {
        "encoder.dense.weight": TENSORS["params/dense/kernel"].T.copy(),
        "encoder.dense.bias": np.zeros(2, ml_dtypes.bfloat16),
    }
    save_file(theirs, path)
    made = shoal.from_safetensors(
        path, init, rename={r"encoder\.(.*)\.weight": r"params/\1/kernel", r"encoder\.(.*)\.bias": r"params/\1/bias"},
        convert=lambda name, value: value.T if name.endswith("/kernel") else value, fresh=["state/*"],
    )(KEY)  # fmt: skip
    np.testing.assert_array_equal(made.params["dense"]["kernel"], TENSORS["params/dense/kernel"])
    assert made.params["dense"]["bias"].dtype == jnp.float32 and not made.state["norm"]["mean"].any()


def test_all_that_is_wrong_is_said_at_once(path: Path) -> None:
    save_file({"params/dense/kernel": np.zeros((2, 3), np.float32), "classifier.weight": np.zeros(1)}, path)
    with pytest.raises(DataError) as caught:
        shoal.from_safetensors(path, init)(KEY)
    assert str(caught.value) == (
        f"{path} does not fit the model: of another shape: params/dense/kernel is (2, 3), the model has (3, 2) (convert=… "
        "can turn one); missing: params/dense/bias, state/norm/mean (fresh=… leaves some to init); not expected: "
        "classifier.weight (rename=… translates names)."
    )
    save_file({"params/dense/bias": np.zeros(2, np.float32), "other": np.zeros(1)}, path)
    with pytest.raises(DataError, match=r"not expected: other .*; strict=False takes what fits"):
        shoal.from_safetensors(path, init, fresh=["*"])(KEY)
    assert not shoal.from_safetensors(path, init, strict=False)(KEY).params["dense"]["bias"].any()


def test_two_tensors_of_one_name_are_refused(path: Path) -> None:
    save_file({"a": np.zeros(1), "b": np.zeros(1)}, path)
    with pytest.raises(DataError, match="two of its tensors are named params/x; the second is b"):
        shoal.from_safetensors(path, init, rename={"a|b": "params/x"})(KEY)


def test_shards_and_folders_are_read(tmp_path: Path) -> None:
    names = sorted(TENSORS)
    shards = {"one.safetensors": names[:1], "two.safetensors": names[1:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: shard for shard, held in shards.items() for n in held}}))
    for path in (tmp_path, index):
        assert shoal.from_safetensors(path, init)(KEY).state["norm"]["mean"][0] == 5
    for outside in ("../one.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"x": outside}}))
        with pytest.raises(DataError, match="to name files of its own folder"):
            shoal.from_safetensors(tmp_path, init)
    index.write_text("[]")
    with pytest.raises(DataError, match=r"Cannot read .* as an index"):
        shoal.from_safetensors(tmp_path, init)


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_refused_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=f"{name} is a pickle: .* safetensors.torch.save_file"):
        shoal.from_safetensors(tmp_path / name, init)


def test_a_folder_of_pickles_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither model\.safetensors nor"):
        shoal.from_safetensors(tmp_path, init)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"pytorch_model\.bin is a pickle"):
        shoal.from_safetensors(tmp_path, init)


def test_what_is_no_safetensors_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .* as safetensors"):
        shoal.from_safetensors(path, init)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match=r"Cannot read .* as safetensors"):
        shoal.from_safetensors(path, init)
