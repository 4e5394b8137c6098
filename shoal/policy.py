"""How a task is run, as plain data: the round policy, the server rule, what a task is about.

These are the parts of a `Task` that travel in a plan's server half, so that a Coordinator can start again without
the task's source. No JAX here. What they *do* is written in `fleet/round.py` and `aggregate/`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import ceil, sqrt
from typing import Any, Final, Literal, Self

from shoal import validate
from shoal.clip_norm import AdaptiveClip, ClipNorm, check_clip_norm, clip_norm_from_json, clip_norm_to_json, norm_bound

MINIMUM_GROUP: Final = 8
"""Updates that must be added together before anybody sees the sum, unless a task asks for less."""


_NAME_CHARACTERS: Final = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def check_task_name(name: str) -> None:
    """Raises ValueError unless it is a task's name: safe in a path, a URL and a table."""
    if not 0 < len(name) <= 100 or set(name) - _NAME_CHARACTERS or name.startswith("."):
        raise ValueError(
            f"Expected a task name of 1 to 100 letters, digits, '.', '-', '_', not starting with '.', got name={name[:120]!r}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Late:
    """What happens to an update whose round has closed."""

    kind: Literal["discard", "discount", "patch"] = "discard"
    """`discard`: refused; `discount`: counted in a later round at `factor` per version of age; `patch`: as if in time."""
    factor: float = 1.0
    """Discount per version of age, in (0, 1]."""
    max_staleness: int = 0
    """Most versions of age that are still taken; more than 0 unless late updates are discarded."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.one_of(("discard", "discount", "patch"), kind=self.kind)
        if not 0.0 < self.factor <= 1.0:
            raise ValueError(f"Expected 0 < factor <= 1, got factor={self.factor!r}.")
        validate.not_negative(max_staleness=self.max_staleness)
        if self.kind != "discard" and not self.max_staleness:
            raise ValueError(
                f"Expected max_staleness >= 1 with {self.kind!r}, got max_staleness=0: no late update would be taken. "
                "To take none, discard them."
            )
        if self.kind == "discard" and self.max_staleness:
            raise ValueError(
                f"Expected max_staleness=0 where late updates are discarded, got max_staleness={self.max_staleness}. To use "
                "late updates, discount or patch them."
            )
        if self.kind != "discount" and self.factor != 1.0:
            raise ValueError(
                f"Expected factor=1 for kind={self.kind!r}, got factor={self.factor!r}: only `discount` has one."
            )

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def discount(cls, factor: float, *, max_staleness: int) -> Self:
        """Late updates count in a later round, at `factor` for each version of age."""
        return cls(kind="discount", factor=factor, max_staleness=max_staleness)

    @classmethod
    def patch(cls, *, max_staleness: int) -> Self:
        """Late updates change the commit of their own round as if they had come in time; what followed is replayed."""
        return cls(kind="patch", max_staleness=max_staleness)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which of the devices that checked in are taken."""

    kind: Literal["uniform", "exact", "by_size", "poisson"] = "uniform"
    """`uniform`: drawn at random among those waiting; `exact`: just the devices of `ids`, each once in every round. In
    simulation also `by_size`: by their numbers of examples, and `poisson`: each on its own, by chance."""
    ids: tuple[str, ...] = ()
    """Device ids, for `exact`."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.one_of(("uniform", "exact", "by_size", "poisson"), kind=self.kind)
        if (self.kind == "exact") != bool(self.ids) or len(set(self.ids)) != len(self.ids):
            raise ValueError(
                f"Expected distinct ids if and only if kind is exact, got kind={self.kind!r} ids={self.ids[:5]}."
            )

    @classmethod
    def exact(cls, ids: tuple[str, ...] | list[str]) -> Self:
        """Takes just these devices in every round: for tests and for cross-silo runs."""
        return cls(kind="exact", ids=tuple(ids))

    @classmethod
    def by_size(cls) -> Self:
        """Devices are drawn by their numbers of examples, with replacement; every draw counts alike. In simulation only."""
        return cls(kind="by_size")

    @classmethod
    def poisson(cls) -> Self:
        """Each device takes part on its own with chance goal / devices. In simulation only."""
        return cls(kind="poisson")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPolicy:
    """Selection, configuration, reporting (Bonawitz et al. 2019, section 2.2) as settings of one machine."""

    goal: int = 20
    """Updates that close a round."""
    over_selection: float = 1.3
    """Devices selected for each update wanted; the surplus covers those that drop out."""
    minimum_fraction: float = 0.8
    """Least share of the goal with which a round may still commit when its window ends."""
    minimum_group: int = MINIMUM_GROUP
    """Fewest updates in a sum that anybody sees."""
    selection_window_s: float = 10.0
    """Longest wait for enough devices before a round starts with fewer (if they can reach the minimum)."""
    reporting_window_s: float = 300.0
    """Longest wait for updates after the last device was selected."""
    selection: Selection = field(default_factory=Selection)
    """Which devices are taken."""
    late: Late = field(default_factory=Late)
    """What happens to updates whose round has closed."""
    adaptive: bool = True
    """Where late work is used: close reporting once waiting costs more than it brings, by the report times seen."""
    group_size: int = 0
    """Updates after which a group is written to the record while the round goes on; 0: when it ends."""
    buffer: int = 0
    """Updates per commit in asynchronous mode (Nguyen et al. 2022, "FedBuff"); 0 is synchronous."""
    concurrency: int = 0
    """Devices that train at once in asynchronous mode; 0: `goal` times `over_selection`."""
    token_life_s: float = 86_400.0
    """How long an assignment may be reported on."""
    min_separation: int = 1
    """A device that was in a version is in none of the next ones until that many later; 1: it may be in each."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(goal=self.goal, selection_window_s=self.selection_window_s, minimum_group=self.minimum_group)
        validate.positive(reporting_window_s=self.reporting_window_s, token_life_s=self.token_life_s)
        validate.between(1.0, 10.0, over_selection=self.over_selection)
        validate.between(0.0, 1.0, minimum_fraction=self.minimum_fraction)
        validate.not_negative(concurrency=self.concurrency, buffer=self.buffer, group_size=self.group_size)
        if self.group_size and self.group_size < self.minimum_group:
            raise ValueError(
                f"Expected group_size=0 or group_size >= minimum_group={self.minimum_group}, got {self.group_size}."
            )
        if self.buffer != 0 and self.buffer < self.minimum_group:
            raise ValueError(
                f"Expected buffer=0 or buffer >= minimum_group={self.minimum_group}, got buffer={self.buffer}."
            )
        self._check_asynchronous()
        self._check_separation()
        if self.goal < self.minimum_group:
            raise ValueError(
                f"Expected goal >= minimum_group, got goal={self.goal} minimum_group={self.minimum_group}. A group below the "
                f"minimum is never opened; ask for a smaller one with minimum_group={self.goal} if the members agree to it."
            )
        if self.selection.kind == "exact" and len(self.selection.ids) != self.goal:
            raise ValueError(f"Expected goal={len(self.selection.ids)}, the number of exact ids, got goal={self.goal}.")

    def _check_asynchronous(self) -> None:
        if not self.buffer:
            if self.concurrency:
                raise ValueError(
                    f"Expected concurrency=0 with buffer=0, got {self.concurrency}: rounds take `num_selected`."
                )
            return
        if self.late.kind != "discount":
            raise ValueError(
                f"Expected late=Late.discount(…) with buffer={self.buffer}, got {self.late.kind}: in asynchronous mode nearly "
                "every update is late. Late.discount(1.0, max_staleness=10) weighs them by 1/sqrt(1 + age) alone."
            )
        if self.selection.kind != "uniform":
            raise ValueError(
                f"Expected uniform selection with a buffer, got {self.selection.kind!r}: asynchronous rounds take who comes."
            )
        if 0 < self.concurrency < self.buffer:
            raise ValueError(
                f"Expected concurrency >= buffer={self.buffer}, got {self.concurrency}: a version would wait for devices "
                "that nobody has assigned."
            )

    def _check_separation(self) -> None:
        validate.positive(min_separation=self.min_separation)
        if self.min_separation == 1:
            return
        if self.buffer or self.group_size or self.late.kind != "discard":
            raise ValueError(
                f"Expected late=Late(), buffer=0 and group_size=0 with min_separation={self.min_separation}: which version an update is in "
                "has to be known when its device is taken."
            )
        if self.selection.kind != "uniform":
            raise ValueError(
                f"Expected uniform selection with min_separation={self.min_separation}, got {self.selection.kind!r}: devices that rest cannot "
                "be taken."
            )

    def check_on_fleet(self) -> None:
        """Raises ValueError for a selection that only a simulation can make."""
        kind = self.selection.kind
        if kind in ("by_size", "poisson"):
            unknown = "how many examples devices hold" if kind == "by_size" else "how many devices there are"
            raise ValueError(
                f"Selection {kind!r} is for simulation: a host does not know {unknown}, and only sees those that come. Take "
                "uniform selection, whose updates weigh as their examples do."
            )

    @property
    def max_staleness(self) -> int:
        """Most versions that an update may be behind when it is added."""
        return self.late.max_staleness

    def discount(self, staleness: int) -> float:
        """What an update so many versions late counts, in (0, 1].

        With a buffer: `factor`^age / sqrt(1 + age), the latter as in FedBuff. Patched updates count whole.
        """
        age = self.late.factor**staleness
        return age / sqrt(1.0 + staleness) if self.buffer else age

    @property
    def commit_at(self) -> int:
        """Updates that close a round."""
        return self.buffer or self.goal

    @property
    def at_once(self) -> int:
        """Devices that may train at once in asynchronous mode."""
        return max(self.concurrency or ceil(self.goal * self.over_selection - 1e-9), self.buffer)

    @property
    def most_at_once(self) -> int:
        """Devices that train at once, at most."""
        return self.at_once if self.buffer else self.num_selected

    @property
    def most_resting(self) -> int:
        """Devices that rest at a time, but for what crashes do."""
        return (self.min_separation - 1) * self.most_at_once

    @property
    def max_members(self) -> int:
        """Most updates that the sum of one version holds: what the fixed points are made for."""
        return (2 + self.max_staleness) * self.most_at_once

    @property
    def num_selected(self) -> int:
        """Devices taken at the start of a round."""
        return self.goal if self.selection.kind == "exact" else ceil(self.goal * self.over_selection - 1e-9)

    @property
    def minimum(self) -> int:
        """Fewest updates with which a round commits."""
        if self.selection.kind == "exact":
            return self.goal
        return max(self.minimum_group, ceil(self.commit_at * self.minimum_fraction - 1e-9))

    def to_json(self) -> dict[str, Any]:
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.min_separation == 1:  # so that plans which ask for none stay as they were
            del flat["min_separation"]
        return flat | {
            "selection": {"kind": self.selection.kind, "ids": list(self.selection.ids)},
            "late": self.late.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` would not have written."""
        chosen = data["selection"]
        selection = Selection(kind=chosen["kind"], ids=tuple(chosen["ids"]))
        return cls(**{**data, "selection": selection, "late": Late(**data["late"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerRule:
    """What the server does with the mean update (Reddi et al. 2021, "Adaptive federated optimization", algorithm 2).

    Made by `shoal.server.sgd` and its siblings; the arithmetic is in `aggregate/server_rule.py`. Kind `program` is an
    optax transformation that travels as one of the plan's programs.
    """

    kind: Literal["sgd", "adagrad", "adam", "yogi", "program"] = "sgd"
    """The rule."""
    learning_rate: float = 1.0
    """Step along the mean update."""
    momentum: float = 0.0
    """For sgd: heavy-ball momentum."""
    b1: float = 0.9
    """For adagrad, adam and yogi: decay of the first moment."""
    b2: float = 0.99
    """For adam and yogi: decay of the second moment."""
    eps: float = 1e-3
    """For adagrad, adam and yogi: the degree of adaptivity (tau in the paper)."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.one_of(("sgd", "adagrad", "adam", "yogi", "program"), kind=self.kind)
        validate.positive(learning_rate=self.learning_rate, eps=self.eps)
        for name, value in (("momentum", self.momentum), ("b1", self.b1), ("b2", self.b2)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Expected 0 <= {name} < 1, got {name}={value!r}.")

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Secure:
    """Updates are added up in *secure groups*, of which the server learns the sum and no part (docs/trust.md, "Secure groups").

    Whatever it learns is over at least `RoundPolicy.minimum_group` honest members.
    """

    members: int = 32
    """Of a group, at most; fewer make one where the round needs no more. The widest sum is made for so many."""
    colluders: float = 0.1
    """Share of a group's members, at most, that tell the server all they know."""
    dropouts: float = 0.3
    """Share of a group's members, at most, that stop while it is at work."""
    bits: Literal[8, 16, 32] = 32
    """Width of a sum's integers, of which a member sends one for each element. Fewer bits are fewer bytes, and coarser."""
    authority: str = ""
    """Ed25519 public key, in hexadecimal, of who certifies members, for a server that may lie. Empty: nobody does, and the server is
    held to follow the protocol."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.between(2, 1000, members=self.members)
        validate.one_of((8, 16, 32), bits=self.bits)
        for name in ("colluders", "dropouts"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"Expected 0 <= {name} < 1, a share of the members, got {name}={getattr(self, name)!r}."
                )
        if self.colluders + self.dropouts >= 1.0:
            raise ValueError(
                f"Expected colluders + dropouts < 1, got {self.colluders} + {self.dropouts}: nobody honest would remain."
            )
        if self.authority and (len(self.authority) != 64 or set(self.authority) - set("0123456789abcdef")):
            raise ValueError(
                f"Expected authority to be 64 hexadecimal digits of an Ed25519 public key, got {self.authority[:80]!r}."
            )

    @property
    def is_certified(self) -> bool:
        """Whether members show that they are known to somebody other than the server."""
        return bool(self.authority)


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlated:
    """Noise that cancels from version to version (DP-FTRL): all rounds of a run are one release, and what is learned of all of them has
    far less noise than rounds with noise of their own. `RoundPolicy.min_separation` says how often a device is in them."""

    rounds: int
    """That the noise is made for; a run has no more."""
    kind: Literal["blt", "tree"] = "blt"
    """`blt`: buffered linear Toeplitz, the least noise (McMahan et al. 2024); `tree`: binary tree (Kairouz et al. 2021)."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.between(1, 100_000, rounds=self.rounds)
        validate.one_of(("blt", "tree"), kind=self.kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamplePrivacy:
    """Each local step hides single examples in noise of the device's own (Abadi et al. 2016, algorithm 1, "DP-SGD"; docs/privacy.md,
    "Examples of one device").
    """

    clip_norm: float
    """Largest L2 norm of one example's gradient, over all learned tensors; a longer one is scaled down. From 1e-6 to 1e6."""
    noise_multiplier: float
    """Standard deviation of the noise on each step's sum of gradients, over the clip norm."""
    delta: float = 1e-6
    """What epsilon is stated at; well below one in the number of a device's examples."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.between(1e-6, 1e6, clip_norm=self.clip_norm)
        validate.positive(noise_multiplier=self.noise_multiplier)
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"Expected 0 < delta < 1, got delta={self.delta!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Privacy:
    """What a task promises its members: bounds, noise on the sums, and in what groups updates are added up."""

    delta_bound: float = 256.0
    """Largest absolute value of one element of an update; beyond it the update is refused as diverged."""
    clip_norm: ClipNorm | None = None
    """Largest L2 norm of an update, over all its tensors and before its weight; devices scale a longer one down to it. Or pattern of tensor
    names (`params/*/bias`) -> largest norm of those tensors together, the first that matches; each group is scaled on its own. Or an
    `AdaptiveClip`, which follows a quantile of the norms. None: not clipped. It bounds what one device can do to the model; alone it is no differential privacy."""
    noise_multiplier: float = 0.0
    """Standard deviation of the noise on a round's sum, over the clip norm; 0: none. With noise the mean is over the round's goal, updates
    count alike, and no metrics of training are collected (docs/privacy.md)."""
    correlated: Correlated | None = None
    """Noise that cancels over the rounds. None: each round's is its own."""
    distributed: bool = False
    """Whether devices add the noise, each a share of it, so that the server sees no sum without it; in secure groups only. Else the server
    adds it."""
    epsilon: float | None = None
    """Most that the population may spend, over all runs of one record; a round that would spend more is not opened. None: no limit."""
    delta: float = 1e-6
    """What epsilon is stated at; well below one in the number of devices."""
    secure: Secure | None = None
    """Secure groups. None: the Edge sees each update on its way into the sum."""
    examples: ExamplePrivacy | None = None
    """Noise of the device's own in each local step, for its single examples. None: its update may give them away to who sees it."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(delta_bound=self.delta_bound)
        validate.not_negative(noise_multiplier=self.noise_multiplier)
        if self.clip_norm is not None:
            check_clip_norm(self.clip_norm)
        if self.noise_multiplier and self.clip_norm is None:
            raise ValueError(
                f"Expected a clip_norm with noise_multiplier={self.noise_multiplier:g}, got None: noise hides what one device can change, "
                "which has to be bounded. Privacy(clip_norm=0.1, noise_multiplier=1.0), say."
            )
        if self.correlated is not None and not self.noise_multiplier:
            raise ValueError("Expected noise_multiplier > 0 with correlated noise, got 0: there is none to correlate.")
        if self.distributed and (not self.noise_multiplier or self.secure is None):
            raise ValueError(
                "Expected noise_multiplier > 0 and secure=Secure(…) with distributed=True: outside of secure groups a device's share of the noise "
                "would not hide it."
            )
        if self.adaptive_clip is not None and (self.distributed or self.correlated is not None):
            raise ValueError(
                "Expected a clip_norm that stays with correlated or distributed noise, got AdaptiveClip: its bit would need noise of its own there. "
                "Find the norm by a run without noise on data that is not private, or take the server's independent noise."
            )
        if self.distributed and self.correlated is not None:
            raise ValueError(
                "Expected correlated=None with distributed=True: noise that cancels has to be drawn by one who keeps it."
            )
        self._check_bit()
        if self.epsilon is not None:
            validate.positive(epsilon=self.epsilon)
            if not self.noise_multiplier:
                raise ValueError(
                    f"Expected noise_multiplier > 0 with epsilon={self.epsilon:g}: without noise nothing is private."
                )
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"Expected 0 < delta < 1, got delta={self.delta!r}.")
        if self.secure is not None and self.clip_norm is None:
            raise ValueError(
                "Expected a clip_norm with secure groups, got None: their sums have few bits, which are to be made for updates of a known "
                "size. Privacy(clip_norm=1.0, secure=Secure()), say; a task's updates have the norms that `shoal simulate` prints."
            )

    def _check_bit(self) -> None:
        clip = self.adaptive_clip
        least = 0.0 if clip is None else self.noise_multiplier * clip.largest_bit
        if clip is not None and clip.bit_stddev is not None and clip.bit_stddev <= least:
            raise ValueError(
                f"Expected bit_stddev > {least:g} with noise_multiplier={self.noise_multiplier:g}, got bit_stddev={clip.bit_stddev:g}: the bit "
                "alone would spend all of a release. Raise it, or leave it out."
            )

    @property
    def adaptive_clip(self) -> AdaptiveClip | None:
        """What the clip norm follows; None where it stays, or where nothing is clipped."""
        return self.clip_norm if isinstance(self.clip_norm, AdaptiveClip) else None

    @property
    def binds_to_version(self) -> bool:
        """Whether an update counts for the version after its own or not at all: with noise a device is in a version's sum once, and what an
        adaptive clip norm has scaled can be multiplied by that version's norm alone."""
        return bool(self.noise_multiplier) or self.adaptive_clip is not None

    @property
    def norm_bound(self) -> float | None:
        """What the norm of an update is at most as it is sent, over all its tensors: what noise and sums go by. None: nothing is clipped."""
        return None if self.clip_norm is None else norm_bound(self.clip_norm)

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"delta_bound": self.delta_bound, "noise_multiplier": self.noise_multiplier}
        made["clip_norm"] = None if self.clip_norm is None else clip_norm_to_json(self.clip_norm)
        # Plans without noise or secure groups stay as they were; a device that does not know of these refuses those that have them.
        made |= {"epsilon": self.epsilon, "delta": self.delta} if self.noise_multiplier else {}
        made |= {"distributed": True} if self.distributed else {}
        made |= {"correlated": asdict(self.correlated)} if self.correlated is not None else {}
        made |= {"secure": asdict(self.secure)} if self.secure is not None else {}
        return made | ({"examples": asdict(self.examples)} if self.examples is not None else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        parts = {"secure": Secure, "correlated": Correlated, "examples": ExamplePrivacy}
        made = {name: parts[name](**value) if name in parts else value for name, value in data.items()}
        return cls(**{**made, "clip_norm": clip_norm_from_json(data.get("clip_norm"))})

    @property
    def key_words(self) -> int:
        """Words of 32 bits in the key that a device feeds its programs: two, of the round's seed; with noise on examples these are followed by
        four for the noise, and all are the device's own."""
        return 2 if self.examples is None else 6


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What people are told of a task, on its card."""

    purpose: str = ""
    """What the model is for."""
    data: str = ""
    """Where the examples come from and who they are about."""
    licence: str = ""
    """Under what terms data and model may be used."""
    limits: str = ""
    """Where it should not be used."""

    def __post_init__(self) -> None:
        validate.types(self)

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)
