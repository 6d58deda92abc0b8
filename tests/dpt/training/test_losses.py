"""The loss against values worked out by hand, and its invariances."""

import math

import pytest
import torch

from dpt.evaluation.alignment import align_least_squares
from dpt.training.losses import absolute, gradient_loss, scale_invariant_log_loss, scale_shift_invariant_loss, squared


def picture(rows):
    return torch.tensor([rows], dtype=torch.float64)


def everywhere(x):
    return torch.ones_like(x, dtype=torch.bool)


def test_alignment_by_hand():
    """Blind spot: scale and shift swapped or unweighted. For p = 0, 1, 2 and t = 1, 3, 8 the normal equations give 3.5 and 0.5."""
    scale, shift = align_least_squares(picture([[0, 1, 2]]), picture([[1, 3, 8]]), everywhere(picture([[0, 0, 0]])))
    assert scale.item() == pytest.approx(3.5) and shift.item() == pytest.approx(0.5)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_alignment_in_any_unit(unit):
    """Blind spot: small numbers taken for a constant, or large ones, which differ by more than rounding, too."""
    prediction = picture([[0, 1, 2]]).float() * unit
    scale, shift = align_least_squares(prediction, picture([[1, 3, 8]]).float(), everywhere(prediction))
    assert scale.item() * unit == pytest.approx(3.5) and shift.item() == pytest.approx(0.5)


def test_alignment_ignores_masked_pixels():
    """Blind spot: an invalid pixel, NaN at that, that leaks into the sums."""
    prediction, target = picture([[0, 1, 2, 100]]), picture([[1, 3, 8, float("nan")]])
    scale, shift = align_least_squares(prediction, target, torch.tensor([[[True, True, True, False]]]))
    assert scale.item() == pytest.approx(3.5) and shift.item() == pytest.approx(0.5)


def test_alignment_is_a_pictures_own():
    """Blind spot: one fit over the whole batch."""
    prediction = torch.cat((picture([[0, 1, 2]]), picture([[0, 1, 2]])))
    scale, shift = align_least_squares(prediction, torch.stack((2 * prediction[0] + 1, 5 * prediction[1] - 3)), everywhere(prediction))
    assert scale.tolist() == pytest.approx([2, 5]) and shift.tolist() == pytest.approx([1, -3])


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4, 0.7, 12345.678])  # the last two leave rounding of themselves
def test_a_constant_prediction_gets_the_mean(value):
    """Blind spot: the singular system, 0/0."""
    scale, shift = align_least_squares(torch.full((1, 3, 3), value), torch.arange(9.0).view(1, 3, 3), torch.ones(1, 3, 3, dtype=torch.bool))
    assert scale.item() == 0 and shift.item() == pytest.approx(4)


def test_data_terms_by_hand():
    """Blind spot: the factor, and the mean over valid pixels only. (1 + 4 + 9) / 3 / 2."""
    mask = torch.tensor([[[True, True], [True, False]]])
    residual = picture([[1, -2], [3, 50]])
    assert squared(residual, mask).item() == pytest.approx(14 / 6)
    assert absolute(residual, mask).item() == pytest.approx(2)


def test_gradient_loss_by_hand():
    """Blind spot: a direction forgotten. Differences across: 1, 2; down: 2, 3 (absolute values); 8 over 4 pixels."""
    residual = picture([[0, 1], [2, 4]])
    assert gradient_loss(residual, everywhere(residual), scales=1).item() == pytest.approx(8 / 4)


def test_gradient_loss_at_the_second_scale():
    """Blind spot: coarser scales that repeat the first. On a 3x3 ramp r = x the first gives 6/9, the second sees columns 0 and 2: 4/4."""
    residual = torch.arange(3.0).expand(1, 3, 3)
    assert gradient_loss(residual, everywhere(residual), scales=2).item() == pytest.approx(6 / 9 + 4 / 4)


def test_gradient_loss_needs_both_pixels():
    """Blind spot: a difference taken against an invalid pixel. Only the left pair of the upper row counts: 1 over 3 valid."""
    mask = torch.tensor([[[True, True, False], [False, False, True]]])
    assert gradient_loss(picture([[0, 1, 9], [9, 9, 9]]), mask, scales=1).item() == pytest.approx(1 / 3)


def test_whole_loss_by_hand():
    """Blind spot: the weight between the terms. Fitting p = 0, 1, 2 to t = 1, 3, 8 leaves residuals -0.5, 1, -0.5."""
    prediction, target = picture([[0, 1, 2]]), picture([[1, 3, 8]])
    data, gradient = (0.25 + 1 + 0.25) / 3 / 2, (1.5 + 1.5) / 3 + 1 / 2 * 0
    loss = scale_shift_invariant_loss(prediction, target, everywhere(target), gradient_weight=0.5, scales=1)
    assert loss.item() == pytest.approx(data + 0.5 * gradient)
    loss = scale_shift_invariant_loss(prediction, target, everywhere(target), gradient_weight=0.1, scales=1, data_term="absolute")
    assert loss.item() == pytest.approx((0.5 + 1 + 0.5) / 3 + 0.1 * gradient)
    with pytest.raises(ValueError, match="data_term 'cubed'"):
        scale_shift_invariant_loss(prediction, target, everywhere(target), data_term="cubed")


def test_invariance_to_scale_and_shift():
    """Blind spot: a loss that depends on the prediction's units."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 9, 7, generator=generator).double(), torch.rand(2, 9, 7, generator=generator).double()
    mask = torch.rand(2, 9, 7, generator=generator) > 0.2
    one, other = (scale_shift_invariant_loss(p, target, mask).item() for p in (prediction, 7 * prediction + 40))
    assert one == pytest.approx(other, rel=1e-4)


def test_a_prediction_upside_down_is_driven_back():
    """Blind spot: a negative scale, under which an inverted prediction is perfect."""
    target = torch.arange(12.0).view(1, 3, 4)
    prediction = (-target).requires_grad_()
    loss = scale_shift_invariant_loss(prediction, target, everywhere(target))
    assert loss.item() > scale_shift_invariant_loss(torch.zeros_like(target), target, everywhere(target)).item()
    loss.backward()
    step = -prediction.grad
    assert ((step - step.mean()) * (target - target.mean())).sum() > 0  # descent turns it towards the target


def test_no_valid_pixel_gives_zero_and_finite_gradients():
    """Blind spot: 0/0 for a picture that is all sky."""
    prediction = torch.rand(1, 4, 4, requires_grad=True)
    loss = scale_shift_invariant_loss(prediction, torch.full((1, 4, 4), torch.inf), torch.zeros(1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(prediction.grad).all()


def test_shapes_must_agree():
    """Blind spot: silent broadcasting."""
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*\(4, 4\)"):
        scale_shift_invariant_loss(torch.rand(1, 4, 4), torch.rand(4, 4), torch.ones(4, 4, dtype=torch.bool))


def test_the_logarithmic_loss_by_hand():
    """Blind spot: a sign, the square of the mean for the mean of squares, log10. Errors ln 2 and 0: mean square L^2/2, mean L/2."""
    prediction, target = picture([[2, 3, 100]]), picture([[1, 3, float("nan")]])
    mask = torch.tensor([[[True, True, False]]])
    log2 = math.log(2)
    for focus, wanted in ((0.5, (log2**2 / 2 - log2**2 / 8) ** 0.5), (0, (log2**2 / 2) ** 0.5), (1, log2 / 2)):
        assert scale_invariant_log_loss(prediction, target, mask, focus).item() == pytest.approx(wanted)
    scaled = scale_invariant_log_loss(3 * target, target, mask, 1.0)  # a wrong scale costs nothing at 1, and all of it at 0
    assert scaled.item() == pytest.approx(0, abs=1e-3)
    assert scale_invariant_log_loss(3 * target, target, mask, 0.0).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("prediction", [[[1.0, 2.0]], [[0.0, -1.0]], [[1e-20, 1e20]]])
@pytest.mark.parametrize("known", [True, False])
def test_the_logarithmic_loss_has_finite_gradients(prediction, known):
    """Blind spot: the root's infinite slope at a perfect prediction, the logarithm of 0, a batch without truth."""
    prediction = torch.tensor([prediction], requires_grad=True)
    mask = torch.full((1, 1, 2), known)
    loss = scale_invariant_log_loss(prediction, torch.tensor([[[1.0, 2.0]]]), mask)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize(
    ("shapes", "focus", "message"),
    [(((1, 2, 3), (1, 3, 2), (1, 2, 3)), 0.5, "all must be the same"), (((1, 2, 3),) * 3, 1.5, "variance_focus 1.5: it must be from 0")],
)
def test_the_logarithmic_loss_says_what_is_wrong(shapes, focus, message):
    """Blind spot: broadcasting; a focus that makes the root's content negative."""
    prediction, target, mask = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        scale_invariant_log_loss(prediction, target, mask.bool(), focus)
