"""Normalised feature distillation against eq. 31."""

import pytest
import torch

from shiva_ext.training import distillation_loss, distilled_layers, feature_distance


def test_the_distance_is_the_mean_square_of_normalised_differences():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), 3 * torch.randn(2, 3, 5) + 1
    total = 0.0
    for b in range(2):
        for i in range(3):
            a, t = (
                (v - v.mean()) / (v.var(correction=0) + 1e-6).sqrt()
                for v in (student[b, i].double(), teacher[b, i].double())
            )
            total += (a - t).square().sum().item()
    assert feature_distance(student, teacher).item() == pytest.approx(total / 30, rel=1e-5)


def test_the_distance_ignores_scale_and_offset_of_a_token():
    x = torch.randn(2, 3, 64)
    assert feature_distance(x * 100 + 7, x).item() == pytest.approx(0, abs=1e-5)
    assert feature_distance(-x, x).item() == pytest.approx(4, rel=1e-3)
    assert feature_distance(torch.randn(2, 500, 64), torch.randn(2, 500, 64)).item() == pytest.approx(2, rel=0.05)


def test_the_loss_is_the_mean_over_blocks_and_reaches_the_student_only():
    student = [torch.randn(2, 3, 8, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(2, 3, 8, requires_grad=True) for _ in range(3)]
    loss = distillation_loss(student, teacher)
    assert loss.item() == pytest.approx(
        sum(feature_distance(s, t).item() for s, t in zip(student, teacher, strict=True)) / 3, rel=1e-5
    )
    loss.backward()
    assert all(s.grad.abs().sum() > 0 for s in student) and all(t.grad is None for t in teacher)


def test_half_precision_features_are_compared_in_float32():
    a, b = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    assert feature_distance(a, b).dtype == torch.float32
    assert feature_distance(a, b).item() == feature_distance(a.float(), b.float()).item()


def test_a_constant_token_gives_finite_gradients():
    x = torch.zeros(1, 2, 8, requires_grad=True)
    feature_distance(x, torch.randn(1, 2, 8)).backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("num_layers", "every", "wanted"),
    [(24, 4, (3, 7, 11, 15, 19, 23)), (6, 4, (3, 5)), (3, 4, (2,)), (1, 1, (0,)), (5, 2, (1, 3, 4))],
)
def test_every_fourth_block_and_the_last_are_compared(num_layers, every, wanted):
    assert distilled_layers(num_layers, every) == wanted


def test_mismatched_features_are_errors():
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="wanted the same block's tokens"):
        feature_distance(x, x[:, :2])
    for ours, theirs in (([], []), ([x], [x, x])):
        with pytest.raises(ValueError, match="wanted equally many"):
            distillation_loss(ours, theirs)
    with pytest.raises(ValueError, match="every 0"):
        distilled_layers(6, 0)
