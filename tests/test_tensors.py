"""Named tensors, indexes and frames: what goes in comes out, and nothing else is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.errors import ProtocolError
from shoal.tensors import DTYPES, Index, TensorSpec, canonical_json, check, from_bytes, pack, specs_of, to_bytes, unpack

plain = [np.dtype(name) for name in DTYPES if name != "bfloat16"]
arrays = st.sampled_from(plain).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
names = st.text("abc/", min_size=1, max_size=8)
some = st.dictionaries(names, arrays, max_size=4)


@given(some)
def test_a_frame_gives_back_what_was_packed(tensors: dict[str, np.ndarray]) -> None:
    read, header = unpack(pack(tensors, {"a": 1}))
    assert header == {"a": 1} and list(read) == list(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and to_bytes(read[name]) == to_bytes(value)


@given(some)
def test_an_index_gives_back_itself(tensors: dict[str, np.ndarray]) -> None:
    index = Index.of(tensors)
    assert Index.parse(index.data) == index and Index.parse(index.data).root == index.root


@settings(max_examples=300)
@given(st.data())
def test_changed_bytes_are_refused_with_one_error_or_mean_the_same(data: st.DataObject) -> None:
    whole = bytearray(pack({"w": np.arange(3.0), "b": np.array([True])}, {"x": "y"}))
    for _ in range(3):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack(bytes(whole))
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "field",
    [
        {"shape": [True]}, {"shape": [1.5]}, {"shape": [-1]}, {"shape": [0, 2**63]}, {"shape": [float("inf")]},
        {"kind": 7}, {"kind": "evil"}, {"table": []}, {"first_use": -1}, {"first_use": float("nan")},
        {"last_ready": 10**300}, {"name": ""}, {"name": "x" * 600}, {"dtype": "object"}, {"hash": "../../etc"}, {"extra": 1},
        {"shape": [2**40, 2**40]},
    ],
)  # fmt: skip
def test_a_field_of_an_index_that_is_no_such_thing_is_refused(field: dict[str, object]) -> None:
    import json

    value = json.loads(Index.of({"w": np.zeros(2)}).data)
    value["tensors"][0].update(field)
    with pytest.raises(ProtocolError):
        Index.parse(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[1]", b"{}", b"[Infinity]", b"[1e999]", b"[" * 100_000, b"\xff\xfe", b'{"shoal":"index/2"}'],
)
def test_what_is_no_index_or_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Index.parse(data)
    with pytest.raises(ProtocolError):
        unpack(len(data).to_bytes(8, "little") + data)


def test_an_index_out_of_canonical_form_is_refused() -> None:
    data = Index.of({"w": np.zeros(2)}).data
    with pytest.raises(ProtocolError, match="canonical"):
        Index.parse(data.replace(b":", b": ", 1))


def test_a_bool_is_zero_or_one() -> None:
    with pytest.raises(ProtocolError, match="bool"):
        from_bytes(b"\x02", TensorSpec(name="on", shape=(1,), dtype="bool"))


def test_byte_order_is_the_same_everywhere() -> None:
    assert to_bytes(np.array([1], ">i4")) == b"\x01\0\0\0"


def test_wrong_tensors_are_named() -> None:
    specs = specs_of({"w": np.zeros((2, 3), np.float32)})
    check({"w": np.zeros((2, 3), np.float32)}, specs, what="the model")
    with pytest.raises(ValueError, match=r"w to be float32\[2, 3\], got float64\[2, 3\]"):
        check({"w": np.zeros((2, 3))}, specs, what="the model")
    with pytest.raises(ValueError, match="missing"):
        check({"v": np.zeros((2, 3), np.float32)}, specs, what="the model")


def test_canonical_json_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})
