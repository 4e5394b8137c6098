"""The card: everything that About and the record say, and nothing that they do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.clip_norm import AdaptiveClip
from shoal.plan.manifest import Promises
from shoal.policy import Privacy, Secure
from shoal.report.card import card_text, write_card
from shoal.report.facts import Facts


def _section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_card_says_what_the_task_says(facts: Facts) -> None:
    text = card_text(facts)
    assert text.startswith("# line, version 3\n")
    assert "Fit a line." in _section(text, "Purpose")
    assert "Good for nothing else." in _section(text, "Limits")
    assert "The task does not say." in _section(text, "Licence")


def test_the_card_says_how_it_was_trained(facts: Facts) -> None:
    text = _section(card_text(facts), "How it was trained")
    assert "simulated devices" in text and "3 rounds were committed, with 6 updates" in text
    assert "batches of 4, one pass" in text and "2 updates of" in text


def test_privacy_is_not_made_up(facts: Facts) -> None:
    text = _section(card_text(facts), "Privacy")
    assert "No differential privacy was used." in text
    assert "fewer than 2 updates" in text
    fleet = replace(facts, run=replace(facts.run, kind="host"))
    assert "The examples stayed on the devices." in card_text(fleet)
    assert "stayed" not in text
    pods = _section(
        card_text(replace(facts, run=replace(facts.run, kind="host", config={"pods": {"pods": 2}}))), "Privacy"
    )
    assert "pods of one machine" in pods and "stayed" not in pods


@pytest.mark.parametrize(
    ("authority", "text"), [("", "it **followed the protocol**"), ("ab" * 32, "even if it did not follow the protocol")]
)
def test_secure_groups_are_told_with_their_trust(facts: Facts, authority: str, text: str) -> None:
    assert facts.manifest is not None
    privacy = Privacy(clip_norm=1.0, secure=Secure(colluders=0.2, authority=authority))
    manifest = replace(facts.manifest, promises=Promises.of(privacy, minimum_group=8))
    told = _section(card_text(replace(facts, manifest=manifest, run=replace(facts.run, kind="host"))), "Privacy")
    assert "sums over at least 8 honest devices" in told and "at most 20%" in told and text in told
    assert "in the clear" not in told and "clipped to a norm of 1" in told


@pytest.mark.parametrize(
    ("clip_norm", "text"),
    [
        ({"params/b": 0.3, "*": 0.4}, "clipped to norms by tensor (0.3 for params/b, 0.4 for *), 0.5 together by"),
        (
            AdaptiveClip(initial=0.1, quantile=0.6),
            "clipped to a norm that followed their quantile 0.6, 0.1 at first by",
        ),
    ],
)
def test_the_clip_norm_is_told(facts: Facts, clip_norm: Any, text: str) -> None:
    assert facts.manifest is not None
    promises = [Promises.of(Privacy(clip_norm=clip_norm, noise_multiplier=n), minimum_group=8) for n in (0.0, 1.0)]
    bare, noisy = (replace(facts, manifest=replace(facts.manifest, promises=made)) for made in promises)
    assert text in _section(card_text(bare), "Privacy")
    told = _section(card_text(noisy), "Privacy")
    assert text.removesuffix(" by") in told
    assert ("both together are one release" in told) is isinstance(clip_norm, AdaptiveClip)


def test_results_and_notes_come_first(facts: Facts) -> None:
    text = _section(card_text(facts, results=[("central", "90 %")], notes=["On all of it."]), "Results")
    assert text.index("central") < text.index("accuracy (version 3)")
    assert "On all of it." in text


def test_what_the_results_tell_is_not_told_twice(facts: Facts) -> None:
    text = _section(card_text(facts, results=[("federated", "90 %")], told=["accuracy"]), "Results")
    assert "| accuracy" not in text and "train/loss (version" in text


def test_a_run_without_a_plan_has_a_card(facts: Facts) -> None:
    bare = replace(facts, manifest=None, run=replace(facts.run, kind="train"), metrics={}, commits=(), version=None)
    text = card_text(bare)
    assert "Nothing was measured." in text and "No differential privacy" in text
    assert "The task does not say." in _section(text, "Data")


def test_provenance_names_versions(facts: Facts) -> None:
    text = _section(card_text(facts), "Provenance")
    assert "jax " in text and "seed: 0" in text and "None" not in text


def test_it_is_written_into_a_folder_or_a_file(facts: Facts, tmp_path: Path) -> None:
    assert write_card(facts, tmp_path) == tmp_path / "CARD.md"
    assert write_card(facts, tmp_path / "other.md").read_text() == (tmp_path / "CARD.md").read_text()
