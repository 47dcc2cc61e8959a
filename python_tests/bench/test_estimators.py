"""The probe of the estimators: its truth against models run by hand, its statistics against scipy."""

import pytest
import torch
from models.tiny import make_inputs, make_model, run_by_hand
from scipy import stats

from shiva_ext.bench.estimators import compare, probe
from shiva_ext.bench.score_gradients import agreement, cost, score_gradients
from shiva_ext.bench.trial import _config
from shiva_ext.selection import ESTIMATORS, get_estimator


@pytest.fixture(scope="module")
def probed():
    model, inputs = make_model().requires_grad_(False), make_inputs()
    inputs.pop("return_dict")
    return model, inputs, probe(model, inputs, batch_size=5)


def test_the_true_value_of_a_token_is_the_loss_change_of_flipping_it(probed):
    model, inputs, result = probed
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
    masks = result["kept_mask"]

    def loss(masks, row):
        kept = {layer: mask.nonzero()[:, 1].view(len(mask), -1) for layer, mask in masks.items()}
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        output, _ = run_by_hand(model, {layer: index[row : row + 1] for layer, index in kept.items()}, one)
        return (output - dense[row : row + 1]).square().mean()

    for layer, row, token in ((1, 0, 0), (1, 1, 7), (2, 0, 15), (max(masks), 1, 3)):
        values = []
        for processed in (True, False):
            flipped = {k: v.clone() for k, v in masks.items()}
            # Every row flips alike, so that the rows keep equally many tokens.
            flipped[layer] = flipped[layer][row : row + 1].repeat(len(dense), 1)
            flipped[layer][:, token] = processed
            values.append(loss(flipped, row))
        assert result["truth"][layer][row, token] == pytest.approx(float(values[0] - values[1]), rel=2e-2, abs=1e-7)


def test_every_layer_but_the_first_is_probed_and_keeps_the_asked_share(probed):
    _, _, result = probed
    layers = sorted(result["truth"])
    assert layers == list(range(1, len(layers) + 1))
    for mask in result["kept_mask"].values():
        assert (mask.sum(1) == int(mask.shape[1] * 0.6)).all()


def test_the_table_holds_cosine_and_spearman_of_each_group(probed):
    _, _, result = probed
    table = compare({k: {1: v[1][:1]} for k, v in result.items()})
    truth, mask = result["truth"][1][0], result["kept_mask"][1][0]
    for name, row in table.items():
        estimate = result[name][1][0]
        if "spearman rejected" in row:
            wanted = stats.spearmanr(estimate[~mask], truth[~mask]).statistic
            assert row["spearman rejected"] == pytest.approx(wanted, abs=1e-6)
        wanted = torch.dot(estimate, truth) / (estimate.norm() * truth.norm())
        assert row["cosine all"] == pytest.approx(wanted.item(), abs=1e-5)


def test_probing_leaves_the_model_as_it_was(probed):
    model, _, _ = probed
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())


def test_the_trials_settings_train_the_router_alone():
    config = _config("residual", 300, 0)
    assert (config.policy_steps, config.joint_steps, config.share) == (0, 0, 1)
    assert (config.diffusion_weight, config.output_weight, config.feature_weight) == (0, 1, 0)


def test_the_scores_of_the_probe_are_those_of_its_choice(probed):
    _, _, result = probed
    for layer, scores in result["scores"].items():
        k = int(scores.shape[1] * 0.6)
        assert torch.equal(scores.topk(k).indices.sort().values, result["kept_mask"][layer].nonzero()[:, 1].view(-1, k))


def test_a_gradient_of_scores_is_that_of_the_inclusion_through_the_ranks(probed):
    """The probe's gradient of the inclusion, times the derivative of the inclusion by the scores."""
    model, inputs, result = probed
    gradient = score_gradients(model, inputs, result["scores"], 0.6, get_estimator("residual", noise_fraction=0.0))
    layer = max(result["scores"])
    scores = result["scores"][layer].clone().requires_grad_()
    N = scores.shape[1]
    pi = get_estimator("residual").inclusion(scores, N * 0.6, int(N * 0.6))
    pi.backward(result["eq. 7 (residual)"][layer])
    torch.testing.assert_close(gradient[layer], scores.grad, rtol=1e-3, atol=1e-7)


def test_agreement_has_a_row_of_each_estimator(probed):
    model, inputs, result = probed
    table = agreement(model, inputs, result, 0.6)
    assert set(table) == set(ESTIMATORS)
    for row in table.values():
        assert -1 <= row["pearson"] <= 1 and -1 <= row["spearman"] <= 1 and row["variance"] >= 0


def test_cost_is_measured_where_it_is_in_proportion():
    assert cost("subset", 4096) is None
    small, large = (cost("neuralsort", N, repeats=1) for N in (64, 256))
    # What is kept grows with the square of the length.
    assert large["saved_megabytes"] > 6 * small["saved_megabytes"] > 0 < small["milliseconds"]
