"""Settings as data: they travel as JSON, and wrong ones are refused with name, value and what is allowed."""

import pytest

import shoal
from shoal.clip_norm import AdaptiveClip
from shoal.policy import About, Correlated, Late, Privacy, RoundPolicy, Secure, Selection, ServerRule
from shoal.tensors import canonical_json, parse_json


@pytest.mark.parametrize(
    "setting",
    [
        RoundPolicy(goal=12, min_separation=7),
        RoundPolicy(goal=12, selection=Selection.exact([f"d{i}" for i in range(12)]), late=Late(kind="patch", max_staleness=3)),
        ServerRule(kind="yogi", learning_rate=0.1),
        Privacy(delta_bound=8),
        Privacy(clip_norm=1.0, noise_multiplier=1.5, epsilon=8.0, delta=1e-7),
        Privacy(clip_norm=1.0, secure=Secure(members=20, colluders=0.2)),
        Privacy(clip_norm=1.0, noise_multiplier=1.5, correlated=Correlated(rounds=9, kind="tree")),
        Privacy(clip_norm=1.0, noise_multiplier=1.5, distributed=True, secure=Secure()),
        Privacy(clip_norm={"params/*bias": 0.1, "*": 1.0}),
        Privacy(clip_norm=AdaptiveClip(initial=0.1, quantile=0.7, bit_stddev=3.0), noise_multiplier=1.0),
        About(purpose="p", data="d"),
    ],
)  # fmt: skip
def test_they_travel(setting: RoundPolicy | ServerRule | Privacy | About) -> None:
    assert type(setting).from_json(setting.to_json()) == setting


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RoundPolicy(goal=4), "goal >= minimum_group, got goal=4 minimum_group=8"),
        (lambda: RoundPolicy(goal=0), "goal > 0"),
        (lambda: RoundPolicy(over_selection=0.5), "1.0 <= over_selection"),
        (lambda: RoundPolicy(buffer=2), "buffer=0 or buffer >= minimum_group=8"),
        (lambda: RoundPolicy(goal=9, selection=Selection.exact(["a"])), "goal=1"),
        (lambda: Selection(kind="exact"), "ids if and only if"),
        (lambda: RoundPolicy(buffer=8), "late=Late.discount"),
        (
            lambda: RoundPolicy(buffer=8, concurrency=4, late=Late.discount(1.0, max_staleness=4)),
            "concurrency >= buffer=8",
        ),
        (lambda: RoundPolicy(concurrency=4), "concurrency=0 with buffer=0"),
        (lambda: RoundPolicy(group_size=4), "group_size >= minimum_group=8"),
        (lambda: Late(factor=0.0), "0 < factor <= 1"),
        (lambda: Late(kind="patch"), "max_staleness >= 1 with 'patch', got max_staleness=0"),
        (lambda: Late(max_staleness=3), "max_staleness=0 where late updates are discarded, got max_staleness=3"),
        (lambda: Late(kind="patch", factor=0.5, max_staleness=2), "factor=1 for kind='patch'"),
        (lambda: ServerRule(kind="sgd", learning_rate=-1.0), "learning_rate > 0"),
        (lambda: ServerRule(kind="sgd", momentum=1.0), "momentum < 1"),
        (lambda: RoundPolicy(min_separation=0), "min_separation > 0"),
        (lambda: RoundPolicy(min_separation=3, group_size=12), "group_size=0 with min_separation=3"),
        (
            lambda: RoundPolicy(min_separation=3, selection=Selection.poisson()),
            "uniform selection with min_separation=3, got 'poisson'",
        ),
        (lambda: Privacy(noise_multiplier=1.0), "a clip_norm with noise_multiplier=1, got None"),
        (lambda: Privacy(clip_norm=1.0, epsilon=1.0), "noise_multiplier > 0 with epsilon=1"),
        (lambda: Privacy(clip_norm=1.0, noise_multiplier=1.0, delta=0.0), "0 < delta < 1"),
        (lambda: Privacy(clip_norm=1.0, correlated=Correlated(rounds=2)), "there is none to correlate"),
        (
            lambda: Privacy(clip_norm=1.0, noise_multiplier=1.0, distributed=True),
            "with distributed=True: outside of secure groups",
        ),
        (
            lambda: Privacy(
                clip_norm=1.0, noise_multiplier=1.0, distributed=True, secure=Secure(), correlated=Correlated(rounds=2)
            ),
            "drawn by one who keeps it",
        ),
        (
            lambda: Privacy(clip_norm=AdaptiveClip(initial=0.1), noise_multiplier=1.0, correlated=Correlated(rounds=2)),
            "a clip_norm that stays with correlated or distributed noise",
        ),
        (lambda: Correlated(rounds=0), "1 <= rounds"),
        (lambda: Privacy(delta_bound=float("nan")), "delta_bound"),
        (lambda: Privacy(clip_norm=-1.0), "clip_norm > 0, got clip_norm=-1.0"),
        (lambda: AdaptiveClip(initial=0.0), "initial > 0"),
        (lambda: AdaptiveClip(initial=1.0, quantile=1.0), "0 < quantile < 1, got quantile=1.0"),
        (lambda: AdaptiveClip(initial=1.0, highest=0.5), "<= initial <= 0.5, got initial=1.0"),
        (lambda: AdaptiveClip(initial=1e-6, lowest=1e-30), "within a factor of 2.60 of initial=1e-06"),
        (lambda: AdaptiveClip(initial=1.0, bit_stddev=0.0), "bit_stddev > 0"),
        (lambda: Privacy(clip_norm={}), "clip_norm to name tensors"),
        (lambda: Privacy(clip_norm={"*": 0.0}), r"clip_norm\['\*'\] > 0"),
        (lambda: Privacy(secure=Secure()), "a clip_norm with secure groups, got None"),
        (lambda: Secure(members=1), "2 <= members <= 1000, got members=1"),
        (lambda: Secure(colluders=1.0), "0 <= colluders < 1"),
        (lambda: Secure(colluders=0.5, dropouts=0.5), "nobody honest would remain"),
        (lambda: Secure(authority="me"), "64 hexadecimal digits"),
    ],
)
def test_wrong_ones_are_refused(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises((ValueError, TypeError), match=text.replace("(", r"\(")):
        make()


def test_the_order_of_clip_norms_travels_and_their_bound_is_over_all() -> None:
    by_tensor = Privacy(clip_norm={"z": 0.3, "a": 0.4})
    read = Privacy.from_json(parse_json(canonical_json(by_tensor.to_json())))
    assert list(dict(read.clip_norm or {})) == ["z", "a"]  # type: ignore[call-overload]
    assert (by_tensor.norm_bound, Privacy(clip_norm=2.0).norm_bound, Privacy().norm_bound) == (0.5, 2.0, None)
    assert Privacy(clip_norm=AdaptiveClip(initial=0.3)).norm_bound == 0.3


def test_what_binds_an_update_to_its_version() -> None:
    settings = (
        Privacy(clip_norm=1.0), Privacy(clip_norm=1.0, noise_multiplier=1.0), Privacy(clip_norm=AdaptiveClip(initial=1.0)),
    )  # fmt: skip
    assert [privacy.binds_to_version for privacy in settings] == [False, True, True]


@pytest.mark.parametrize("value", [None, "x", 1.5, True, [], float("inf")])
def test_a_peer_s_nonsense_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        RoundPolicy.from_json({**RoundPolicy().to_json(), "goal": value})


def test_what_a_late_update_counts() -> None:
    discounted = RoundPolicy(late=Late.discount(0.5, max_staleness=3))
    assert [discounted.discount(age) for age in range(3)] == [1.0, 0.5, 0.25]
    buffered = RoundPolicy(buffer=8, late=Late.discount(1.0, max_staleness=10))
    assert buffered.discount(3) == 0.5, "1/sqrt(1 + age), as in FedBuff"
    assert RoundPolicy(late=Late.patch(max_staleness=3)).discount(3) == 1.0


def test_the_numbers_of_the_paper() -> None:
    """Bonawitz et al. 2019: "select 1.3 K, wait for K"."""
    policy = RoundPolicy(goal=20)
    assert (policy.num_selected, policy.minimum) == (26, 16)


def test_server_rules_are_data() -> None:
    assert shoal.server.adam(0.1).kind == "adam" and shoal.server.sgd(momentum=0.9).momentum == 0.9
