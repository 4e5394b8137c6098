"""Meshes and rules as people write them; what is wrong with one is said."""

import pytest
from jax.sharding import PartitionSpec as P

from shoal.pod.mesh import MeshSpec
from shoal.pod.rules import specs

SHAPES = {"params/a/kernel": (8, 6), "params/a/bias": (6,), "params/b/kernel": (4, 12)}
MESH = MeshSpec.parse("data=2,model=2,space=2")


def test_a_mesh_names_members_first_the_slow_ones_before() -> None:
    spec = MeshSpec.parse(" model=2, data=4,slow=3")
    assert list(spec.sizes.items()) == [("slow", 3), ("data", 4), ("model", 2)] and str(spec) == "slow=3,data=4,model=2"
    assert (spec.num_members, spec.num_devices, spec.member_axes) == (12, 24, ("slow", "data"))
    assert MeshSpec.parse("model=2").num_members == 1


@pytest.mark.parametrize(
    "text", ["", "data", "data=", "data=0", "data=-1", "data=2,data=2", "4", "da ta=2", "data=1.5", "data=２"]
)
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--mesh"):
        MeshSpec.parse(text)


def test_a_mesh_of_another_size_than_there_are_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got data=3,model=5, which has 15"):
        MeshSpec.parse("data=3,model=5").build()


def test_the_first_rule_that_matches_counts() -> None:
    made = specs({"*/a/*kernel": "-,model", "*kernel": "space+model"}, SHAPES, MESH, what="rules")
    assert made == {"params/a/kernel": P(None, "model"), "params/a/bias": P(), "params/b/kernel": P(("space", "model"))}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"*/c/*": "model"}, "matches none of params/a/bias"),
        ({"*": "-", "*/bias": "model"}, "rules before it match the same tensors"),
        ({"*/bias": "-,model"}, "at most 1 words for params/a/bias"),
        ({"*/bias": "modle"}, r"model \| space, got 'modle'"),
        ({"*/bias": "data"}, "splits the batch"),
        ({"*/b/kernel": "-,model+space", "*/a/kernel": "-,model+space"}, "6 is no multiple of model\\+space=4"),
        ({"*/a/kernel": "model,model"}, "name an axis once"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_in_words(rules: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        specs(rules, SHAPES, MESH, what="rules")
