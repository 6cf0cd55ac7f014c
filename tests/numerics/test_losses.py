"""Every loss compared with its formula in float64, and the properties that its paper claims."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.config import Loss
from plad_dist.training import losses
from plad_dist.training.batches.micro_batch import Group, single_pair
from plad_dist.training.batches.packing import collate
from plad_dist.training.losses import Pairs, group_losses

LOSSES = ("rank", "margin", "listwise", "dpo", "ipo", "simpo", "cpo", "orpo")
logps = st.floats(-200.0, -0.01)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > -30 else -x


def loss_by_formula(loss: Loss, chosen: dict[str, float], rejected: dict[str, float]) -> float:
    """Return the loss of one pair by the formulas of the papers, in Python floats."""
    plus, minus, anchor = chosen["logp"], rejected["logp"], -chosen["logp"]
    initial_plus, initial_minus = chosen["initial"], rejected["initial"]
    if loss.length_normalize or loss.name in ("simpo", "orpo"):
        plus, initial_plus = plus / chosen["length"], initial_plus / chosen["length"]
        minus, initial_minus = minus / rejected["length"], initial_minus / rejected["length"]
    ratio = (plus - initial_plus) - (minus - initial_minus)
    match loss.name:
        case "rank" | "listwise":  # a list of two is a pair
            value = max(0.0, loss.margin - plus + minus)
        case "margin":
            value = max(0.0, loss.margin * (chosen["score"] - rejected["score"]) - plus + minus)
        case "dpo":
            value = minus_log_sigmoid(loss.strength * ratio)
        case "ipo":
            value = (ratio - 1 / (2 * loss.strength)) ** 2
        case "simpo":
            value = minus_log_sigmoid(loss.strength * plus - loss.strength * minus - loss.margin)
        case "cpo":
            value = minus_log_sigmoid(loss.strength * (plus - minus))
        case "orpo":
            odds = [math.exp(mean) / -math.expm1(mean) for mean in (plus, minus)]
            value = -plus + loss.strength * minus_log_sigmoid(math.log(odds[0]) - math.log(odds[1]))
        case _:
            raise AssertionError(loss.name)
    return value + loss.anchor * anchor


def loss_of_pairs(loss: Loss, rows: list[tuple[dict[str, float], dict[str, float]]]) -> torch.Tensor:
    """Return the losses of groups of one pair each, in float64."""
    flat = [side for row in rows for side in row]
    count = len(rows)
    pairs = Pairs(
        chosen_P=torch.arange(0, 2 * count, 2),
        rejected_P=torch.arange(1, 2 * count, 2),
        group_P=torch.arange(count),
        rank_gap_P=torch.ones(count, dtype=torch.int64),
        score_gap_P=torch.tensor([plus["score"] - minus["score"] for plus, minus in rows], dtype=torch.float64),
        anchored_A=torch.arange(0, 2 * count, 2),
        group_A=torch.arange(count),
        groups=count,
    )
    values = {
        name: torch.tensor([side[name] for side in flat], dtype=torch.float64) for name in ("logp", "length", "initial")
    }
    return group_losses(loss, pairs, values["logp"], values["length"], values["initial"])


side = st.fixed_dictionaries({"logp": logps, "length": st.integers(1, 60), "initial": logps, "score": st.floats(-3, 3)})


@pytest.mark.parametrize("name", LOSSES)
@given(
    rows=st.lists(st.tuples(side, side), min_size=1, max_size=5),
    margin=st.floats(0, 4),
    beta=st.one_of(st.none(), st.floats(0.01, 3)),
    mle_weight=st.one_of(st.none(), st.floats(0, 3)),
    length_normalize=st.booleans(),
)
def test_every_loss_equals_its_formula(
    name: str, rows: list, margin: float, beta: float | None, mle_weight: float | None, length_normalize: bool
) -> None:
    loss = Loss(name=name, margin=margin, beta=beta, mle_weight=mle_weight, length_normalize=length_normalize)
    expected = [loss_by_formula(loss, plus, minus) for plus, minus in rows]
    assert loss_of_pairs(loss, rows).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name: str) -> None:
    loss = Loss(name=name, margin=1.5)
    torch.manual_seed(0)
    logps_S = -torch.rand(8, dtype=torch.float64) * 20 - 1
    lengths_S = torch.randint(1, 9, (8,)).double()
    initial_logps_S = logps_S + torch.randn(8, dtype=torch.float64)
    batch = collate([single_pair([1], [2], [3]) for _ in range(4)], filler=0)
    gaps = torch.tensor([0.3, 2.0, -0.5, 1.0], dtype=torch.float64)
    pairs = Pairs(**{field: getattr(batch.pairs, field) for field in Pairs.__slots__} | {"score_gap_P": gaps})
    logps_S.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: group_losses(loss, pairs, values, lengths_S, initial_logps_S).sum(),
        [logps_S],
        eps=1e-7,
        atol=1e-5,
    )


@given(st.lists(logps, min_size=2, max_size=6), st.floats(0, 2))
def test_listwise_is_the_sum_over_all_pairs_of_the_list(ranked: list[float], margin: float) -> None:
    expected = sum(
        max(0.0, margin * (j - i) - ranked[i] + ranked[j])
        for i in range(len(ranked))
        for j in range(i + 1, len(ranked))
    )
    pairs = [(i, j, j - i) for i in range(len(ranked)) for j in range(i + 1, len(ranked))]
    batch = collate([Group([1], [[2]] * len(ranked), pairs=pairs)], filler=0)
    values = torch.tensor(ranked, dtype=torch.float64)
    terms_P = losses.listwise(
        values[batch.pairs.chosen_P], values[batch.pairs.rejected_P], batch.pairs.rank_gap_P, margin
    )
    assert terms_P.sum().item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    group_loss_B = group_losses(
        Loss(name="listwise", margin=margin, mle_weight=0.0),
        batch.pairs,
        values,
        batch.lengths_S,
        batch.initial_logps_S,
    )
    assert group_loss_B.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_groups_weigh_the_same_whatever_their_number_of_pairs() -> None:
    one_pair = single_pair([1], [2], [3])
    three_pairs = Group([1], [[2], [3], [4], [5]], pairs=[(0, 1, 1), (0, 2, 1), (0, 3, 1)])
    batch = collate([one_pair, three_pairs], filler=0)
    logps_S = torch.tensor([-3.0, -5.0, -4.0, -3.5, -2.0, -9.0])
    values = group_losses(Loss(mle_weight=2.0), batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S)
    assert values.tolist() == pytest.approx([0.0 + 2 * 3.0, (1.5 + 3.0 + 0.0) / 3 + 2 * 4.0])


def test_mle_is_the_mean_over_the_chosen_responses() -> None:
    group = Group([1], [[2, 2], [3]], anchored=(0, 1))
    batch = collate([group], filler=0)
    logps_S = torch.tensor([-4.0, -1.0])
    values = group_losses(Loss(name="mle"), batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S)
    assert values.tolist() == [2.5]
    means = Loss(name="mle", length_normalize=True)
    assert group_losses(means, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S).tolist() == [1.5]


def test_satisfied_pairs_have_no_gradient() -> None:
    logps_S = torch.tensor([-1.0, -9.0, -3.0, -2.0], requires_grad=True)
    batch = collate([single_pair([1], [2], [3]), single_pair([1], [2], [3])], filler=0)
    group_losses(Loss(mle_weight=0.0), batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S).sum().backward()
    assert logps_S.grad.tolist() == [0.0, 0.0, -1.0, 1.0]


def test_the_defaults_of_anchor_and_beta_are_pinned() -> None:
    assert {name: Loss(name=name).anchor for name in LOSSES} == {
        "rank": 1.0, "margin": 1.0, "listwise": 1.0, "dpo": 0.0, "ipo": 0.0, "simpo": 0.0, "cpo": 1.0, "orpo": 0.0,
    }  # fmt: skip
    assert (Loss(name="simpo").strength, Loss(name="dpo").strength) == (2.0, 0.1)


def test_probabilities_that_round_to_one_have_finite_odds() -> None:
    value = losses.orpo(torch.zeros(1), torch.full((1,), -1e-9), 0.1)
    assert torch.isfinite(value).all()


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
def test_rank_is_the_hinge_of_trl_up_to_the_margin(margin: float, trl_hinge: Callable[..., torch.Tensor]) -> None:
    """max(0, m - d) = m * relu(1 - d / m): CPO with loss_type="hinge", beta=1/m, cpo_alpha=0."""
    torch.manual_seed(3)
    chosen_P, rejected_P = -torch.rand(64) * 30, -torch.rand(64) * 30
    trl_losses_P = margin * trl_hinge(chosen_P, rejected_P, beta=1 / margin)
    torch.testing.assert_close(losses.rank(chosen_P, rejected_P, margin), trl_losses_P, rtol=1e-5, atol=1e-5)


@pytest.fixture
def trl_hinge() -> Callable[..., torch.Tensor]:
    """Return TRL's loss function, bound to an object with the attributes that it reads."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer

    def hinge(chosen_P: torch.Tensor, rejected_P: torch.Tensor, beta: float) -> torch.Tensor:
        trainer = SimpleNamespace(
            beta=beta, loss_type="hinge", label_smoothing=0.0, simpo_gamma=0.0, alpha=0.0,
            accelerator=SimpleNamespace(device=torch.device("cpu")),
        )  # fmt: skip
        losses_P: torch.Tensor = CPOTrainer.cpo_loss(trainer, chosen_P, rejected_P)[0]
        return losses_P

    return hinge
