"""A model's card: what it is for, what it learned from and how, what it can and cannot do, what was promised to whom.

After Mitchell et al. 2019, "Model cards for model reporting", https://arxiv.org/abs/1810.03993, in short: `Task.about`
says what no machine can know, the record the rest. What neither says, the card says is unknown; it makes nothing up.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shoal.clip_norm import described
from shoal.metric_names import LEFT_OUT, is_tail
from shoal.plan.manifest import Manifest
from shoal.policy import Secure
from shoal.report.examples_spent import statement_of_examples
from shoal.report.facts import Facts
from shoal.report.over_users import over_users
from shoal.report.privacy_spent import statement

FILE_NAME: Final = "CARD.md"
_UNSAID: Final = "The task does not say."
_KINDS: Final = {
    "host": "a fleet of devices over gRPC",
    "simulate": "simulated devices in one process",
    "train": "a mesh of accelerators",
}


def write_card(
    facts: Facts,
    path: Path,
    *,
    results: Sequence[tuple[str, str]] = (),
    told: Collection[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Writes a run's card; an older one is replaced.

    Args:
        facts: of the run.
        path: the file, or the folder to put `CARD.md` into.
        results: (what, value) above the record's own metrics: comparisons, times.
        told: metrics of the record that are among the results.
        notes: sentences on how the results were measured.
    """
    file = path / FILE_NAME if path.is_dir() else path
    file.write_text(card_text(facts, results=results, told=told, notes=notes), encoding="utf-8")
    return file


def card_text(
    facts: Facts,
    *,
    results: Sequence[tuple[str, str]] = (),
    told: Collection[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """The card as Markdown; see `write_card`."""
    about = facts.manifest.server.about if facts.manifest is not None and facts.manifest.half is not None else None
    sections = (
        ("Purpose", about.purpose if about else ""),
        ("Data", about.data if about else ""),
        ("How it was trained", _training(facts)),
        ("Results", _results(facts, results, told, notes)),
        ("Limits", about.limits if about else ""),
        ("Privacy", _privacy(facts)),
        ("Licence", about.licence if about else ""),
        ("Provenance", _provenance(facts.run.provenance, facts)),
    )
    head = f"# {facts.run.name}, version {facts.version if facts.version is not None else '–'}\n"
    return "\n".join([head, *(f"## {title}\n\n{text.strip() or _UNSAID}\n" for title, text in sections)])


def _training(facts: Facts) -> str:
    rows = [
        f"Trained by shoal on {_KINDS[facts.run.kind]}; run `{facts.run.id}`, which is {facts.run.status}.",
        f"The model has {facts.parameters:,} numbers.",
    ]
    if facts.commits:
        rows.append(_rounds(facts))
    if facts.stopped_early:
        rows.append(f"It ended before its last round: {facts.stopped_early}.")
    if abandoned := sum(row.state == "abandoned" for row in facts.rounds):
        rows.append(f"{abandoned} rounds were abandoned; what they had counted went into the next one.")
    if facts.run.kind == "train":
        rows += _mesh(facts.run.config.get("pod", {}))
    elif facts.manifest is not None:
        rows += _settings(facts.manifest)
    return " ".join(rows[:2]) + "".join(f"\n- {row}" for row in rows[2:])


def _rounds(facts: Facts) -> str:
    uses = f"{facts.num_examples_used:,} uses of an example"
    if facts.run.kind == "train":
        return f"{len(facts.commits)} versions were committed, made from {uses}."
    members = sum(count for count, _ in facts.commits)
    made = f", made from {uses}" if facts.num_examples_used != members else ""  # devices that count alike do not say
    return f"{len(facts.commits)} rounds were committed, with {members:,} updates in all{made}."


def _mesh(settings: Mapping[str, Any]) -> list[str]:
    """How a pod was laid out, by `Trainer.settings`."""
    if not settings:
        return []
    return [
        f"The mesh: {settings['mesh']}; batches of {settings['batch_size']:,} over all members.",
        f"The update: {settings['update'].replace('_', ' ')}, gradients summed in {settings['sums']}.",
    ]


def _settings(manifest: Manifest) -> list[str]:
    training = manifest.training
    told = [
        f"On a device: batches of {training.batch_size}, {_times(training.epochs)} over its examples in a round, at most "
        f"{training.max_examples:,} uses of an example."
    ]
    if manifest.half is not None:
        policy, rule = manifest.half.rounds, manifest.half.rule
        settings = ", ".join(f"{name} {value:g}" for name, value in _used(rule.kind, rule.to_json()).items())
        told.append(
            f"A round: {policy.goal} updates of {policy.num_selected} devices selected; it may close with {policy.minimum}."
            + (f" Who was in one rested for the next {policy.min_separation - 1}." if policy.min_separation > 1 else "")
        )
        told.append(f"The server's rule: {rule.kind}{f' ({settings})' if settings else ''}.")
    return told


def _used(kind: str, rule: Mapping[str, Any]) -> dict[str, float]:
    """The settings that a rule of this kind reads."""
    names = {"sgd": ("learning_rate", "momentum"), "adagrad": ("learning_rate", "b1", "eps"), "program": ()}
    chosen = names.get(kind, ("learning_rate", "b1", "b2", "eps"))
    return {name: float(rule[name]) for name in chosen}


def _times(count: int) -> str:
    return "one pass" if count == 1 else f"{count} passes"


def _results(facts: Facts, results: Sequence[tuple[str, str]], told: Collection[str], notes: Sequence[str]) -> str:
    own = [
        (f"{name} (version {points[-1].version})", f"{points[-1].value:.4g}")
        for name, points in facts.metrics.items()
        if points and name not in told and not is_tail(name)
    ]
    if not results and not own:
        return "Nothing was measured."
    rows = [f"| {what} | {value} |" for what, value in (*results, *own)]
    table = "\n".join(["| measure | value |", "|---|---|", *rows])
    is_pod = facts.run.kind == "train"
    over = (
        "the examples of the steps after that version" if is_pod else "the devices of a round, on the version before it"
    )
    words = [f"`train/…` is over {over}."]
    if any(name.startswith(LEFT_OUT) for name in facts.metrics):
        words.append("`left_out/…` is over users who took no part in training.")
    return "\n\n".join([table, *_over_users(facts), *notes, " ".join(words)])


def _over_users(facts: Facts) -> list[str]:
    """How metrics are distributed over users, where they were measured one by one."""
    found = over_users(facts.distributions)
    if not found:
        return []
    rows = [
        f"| {each.metric} (version {each.version}) | {each.users} | {each.worst:.4g} | {each.median:.4g} | {each.best:.4g} | "
        f"{each.least:.4g} {each.bars} {each.most:.4g} |"
        for each in found
    ]
    head = "| measure, user by user | users | worst tenth | median | best tenth | users at each value |\n|---|---|---|---|---|---|"
    return ["\n".join([head, *rows])]


def _privacy(facts: Facts) -> str:
    if facts.run.kind == "train":
        return "The examples were in the hands of whoever trained. **No differential privacy was used.**"
    privacy = facts.manifest.promises.privacy if facts.manifest is not None else None
    secure = privacy.secure if privacy is not None else None
    promised = [statement(facts.spent)] if facts.spent is not None else []
    promised += [statement_of_examples(facts.of_examples)] if facts.of_examples is not None else []
    text = promised or [
        "**No differential privacy was used.** Nothing bounds what the model, or one update, gives away about a single example; treat the "
        "model as if it could remember its examples."
    ]
    if facts.run.kind == "simulate":
        text.append("The devices were simulated: all examples were in one process.")
    elif facts.run.config.get("pods"):
        text.append("The devices were pods of one machine, which had all examples.")
    elif secure is None:
        text.append(
            "**No secure aggregation was used.** The examples stayed on the devices. The server saw each update on its way into a sum, in "
            "the clear, and kept none; only versions made of the sum over a round reached its disk."
        )
    else:
        text.append(
            "**Updates were added up in secure groups**: the examples stayed on the devices, and the server learned sums over at least "
            f"{facts.manifest.promises.minimum_group if facts.manifest else 0} honest devices, none singly, {_trust(secure)}."
        )
    if facts.manifest is not None and privacy is not None:
        bound = (
            f"an update with an element beyond ±{privacy.delta_bound:g} was refused."
            if privacy.clip_norm is None
            else f"updates were clipped to {described(privacy.clip_norm)} by the devices."
        )
        text.append(
            f"No sum of fewer than {facts.manifest.promises.minimum_group} updates was made into a version; {bound}"
        )
    return "\n\n".join(text)


def _trust(secure: Secure) -> str:
    """What that assumes."""
    within = f"as long as of a group at most {secure.colluders:.0%} told it all they knew"
    if secure.is_certified:
        return (
            f"{within}, even if it did not follow the protocol, provided that who certified the devices ({secure.authority[:16]}…) and who signed "
            "the plan did not help it"
        )
    return f"{within} and it **followed the protocol** (nobody but the server vouched for the devices)"


def _provenance(provenance: Mapping[str, Any], facts: Facts) -> str:
    libraries = provenance.get("libraries") or {}
    rows = [
        ("plan", facts.run.plan_hash[:16] + "…" if facts.run.plan_hash else ""),
        ("shoal", provenance.get("shoal")),
        ("commit", _commit(provenance)),
        ("Python", provenance.get("python")),
        ("libraries", ", ".join(f"{name} {version}" for name, version in libraries.items())),
        ("machine", f"{provenance.get('processor') or provenance.get('machine', '')}, {provenance.get('cores')} cores"),
        ("system", provenance.get("platform")),
        ("seed", facts.run.config.get("seed")),
    ]
    return "\n".join(f"- {name}: {value}" for name, value in rows if value not in (None, ""))


def _commit(provenance: Mapping[str, Any]) -> str:
    commit = str(provenance.get("commit") or "")
    return f"{commit[:12]}{' (with changes)' if provenance.get('dirty') else ''}"
