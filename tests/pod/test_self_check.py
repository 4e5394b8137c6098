"""The self-check finds a collective that is wrong, on one machine's virtual devices and between processes."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from shoal.pod.collectives import How, Members
from shoal.pod.layout import Layout
from shoal.pod.mesh import MeshSpec
from shoal.pod.self_check import NoWayAddsUp, choice, keep_way, kept_way, self_check

ROOT = Path(__file__).parents[2]
NONE: dict[How, int] = {"reduce_scatter": 0, "permute": 0, "exchange": 0, "whole": 0}


def layout(text: str, elements: int = 1000, **how: Any) -> tuple[jax.sharding.Mesh, Layout]:
    spec = MeshSpec.parse(text)
    shapes = {"params/a": ((elements // 2, 2), np.dtype("float32")), "params/b": ((3,), np.dtype("float32"))}
    split = {"params/a": PartitionSpec(None, "model")} if "model" in text else {}
    return spec.build(jax.devices()[: spec.num_devices]), Layout.of(shapes, split, Members(spec, **how))


def wrong_for(*hows: How, by: Callable[[Any], Any]) -> Callable[[Members, Any], Any]:
    def scatter(members: Members, values: Any) -> Any:
        piece = members.scatter(values)
        return by(piece) if members.how in hows else piece

    return scatter


@pytest.mark.parametrize(
    ("text", "sum_type"),
    [
        ("slow=2,data=4", "float32"),
        pytest.param("slow=2,data=4", "bfloat16", marks=pytest.mark.slow),
        pytest.param("data=8", "float32", marks=pytest.mark.slow),
        pytest.param("data=2,model=2", "float32", marks=pytest.mark.slow),
        pytest.param("data=2,model=2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_what_is_right_is_taken_as_it_is(text: str, sum_type: str) -> None:
    found = self_check(*layout(text, sum_type=sum_type))
    assert (found.how, found.why, found.wrong) == ("reduce_scatter", "", NONE)
    assert 0 < sum(found.times_s.values()) < found.seconds


@pytest.mark.parametrize(
    "by",
    [
        lambda piece: piece.at[3].add(1.0),
        pytest.param(lambda piece: jnp.roll(piece, 1), marks=pytest.mark.slow),
        pytest.param(
            lambda piece: jnp.where(jax.lax.axis_index("data") == 0, jnp.zeros_like(piece), piece),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_collective_is_found_and_said(by: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = self_check(*layout("data=4"), scatter=wrong_for("reduce_scatter", by=by))
    assert found.how == "permute" and found.wrong["reduce_scatter"] > 0 == found.wrong["permute"]
    assert "permute" in caplog.text and "reduce_scatter gave" in caplog.text


@pytest.mark.slow
def test_a_gather_that_is_wrong_is_no_way() -> None:
    class Turned(Members):
        def gather(self, piece: Any, dim: int = 0) -> Any:
            return jnp.roll(super().gather(piece, dim), 1)

    mesh, found = layout("data=4")
    with pytest.raises(NoWayAddsUp):
        self_check(mesh, replace(found, members=Turned(found.members.mesh)))


def test_the_last_resort_and_none() -> None:
    times = dict.fromkeys(NONE, 0.01)
    assert choice(NONE | {"reduce_scatter": 1, "permute": 1, "exchange": 2}, times, by_time=True)[0] == "whole"
    with pytest.raises(NoWayAddsUp, match="whole: 3 wrong elements"):
        choice(dict.fromkeys(NONE, 3), times, by_time=True)


def test_one_member_has_nothing_to_add() -> None:
    assert self_check(*layout("data=1")).how == "reduce_scatter"


def test_a_way_that_is_known_is_tried_alone_and_the_others_only_where_it_is_wrong(tmp_path: Path) -> None:
    assert kept_way(tmp_path / "new") is None
    keep_way(tmp_path / "new", "exchange")
    found = self_check(*layout("data=4"), prefer=kept_way(tmp_path / "new"))
    assert found.how == "exchange" and found.wrong == {"exchange": 0}
    broken = wrong_for("exchange", by=lambda piece: piece + 1.0)
    assert self_check(*layout("data=4"), prefer="exchange", scatter=broken).how == "reduce_scatter"
    for elsewhere in ("magic cpu", "exchange gpu", ""):
        (tmp_path / "new" / "sums-by").write_text(elsewhere)
        assert kept_way(tmp_path / "new") is None


def test_time_decides_between_processes_only() -> None:
    times: dict[How, float] = {"reduce_scatter": 0.03, "permute": 0.01, "exchange": 0.02, "whole": 0.005}
    assert choice(NONE, times, by_time=False) == ("reduce_scatter", "")
    assert choice(NONE, times, by_time=True)[0] == "whole"
    assert choice(NONE, times | {"whole": 0.009}, by_time=True)[0] == "permute", "only if it is much faster"
    chosen, why = choice(NONE | {"reduce_scatter": 5}, times | {"whole": 0.02}, by_time=True)
    assert chosen == "permute" and "5 wrong" in why


WORKER = """
import json, sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
from tests.pod.test_self_check import layout, wrong_for
from shoal.pod.self_check import self_check
def first_is_wrong(piece):
    return jnp.where(jax.lax.axis_index("data") == 0, piece + 1.0, piece)
found = [self_check(*layout("data=2", 200_000), scatter=wrong_for(*hows, by=first_is_wrong)) for hows in ((), ("reduce_scatter", "permute", "exchange"))]
same, other = (self_check(*layout("data=2", 1000), prefer=way) for way in ("exchange", ("exchange", "whole")[jax.process_index()]))
print(json.dumps([[each.how, dict(each.wrong)] for each in (*found, same, other)]))
"""


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_learn_the_same_though_only_one_saw_it() -> None:
    with socket.socket() as made:
        made.bind(("localhost", 0))
        address = f"localhost:{made.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(rank)], env=env, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [worker.communicate(timeout=25) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], told
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in told)
    assert first == second
    (_, none_wrong), (how, wrong), same, other = first
    assert same == ["exchange", {"exchange": 0}]
    assert list(other[1]) == list(NONE), "they preferred different ones"
    assert none_wrong == NONE
    assert how == "whole" and wrong["exchange"] > 0
