"""Laws of classifier-free guidance."""

import pytest
import torch

from zigma.flow import expand_time
from zigma.guidance import classifier_free
from zigma.solvers import solve_ode


class Model:
    """A model that mixes x, t and y non-linearly, with a record of the batches it was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        y = y.float().flatten(1).mean(1) if y.is_floating_point() else y.float()
        return torch.sin(x + expand_time(y, x)) * (1 + expand_time(t * y, x))


X, T = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9])
TEXT, NULL = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))


def test_guidance_extrapolates_from_null_to_condition_in_one_evaluation():
    model = Model()
    v = classifier_free(model, TEXT, NULL, 2.5)(X, T)
    assert model.batches == [6]
    null, cond = Model()(X, T, NULL), Model()(X, T, TEXT)
    torch.testing.assert_close(v, null + 2.5 * (cond - null))


def test_scale_one_is_the_plain_model_at_its_own_cost():
    model = Model()
    assert torch.equal(classifier_free(model, TEXT, NULL, 1)(X, T), Model()(X, T, TEXT))
    assert model.batches == [3]


def test_scale_zero_is_unconditional():
    torch.testing.assert_close(classifier_free(Model(), TEXT, NULL, 0)(X, T), Model()(X, T, NULL))


@pytest.mark.parametrize("row", [NULL[0], NULL[:1]])
def test_one_null_row_serves_the_whole_batch(row):
    v = classifier_free(Model(), TEXT, row, 3)(X, T)
    torch.testing.assert_close(v, classifier_free(Model(), TEXT, NULL[:1].repeat(3, 1, 1), 3)(X, T))


def test_labels_are_conditions_too():
    v = classifier_free(Model(), torch.tensor([1, 2, 3]), torch.tensor(0), 3)(X, T)
    cond, null = Model()(X, T, torch.tensor([1, 2, 3])), Model()(X, T, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(v, null + 3 * (cond - null))


def test_batch_equals_single():
    v = classifier_free(Model(), TEXT, NULL, 4, rescale=0.7)(X, T)
    for i in range(3):
        alone = classifier_free(Model(), TEXT[i : i + 1], NULL[i : i + 1], 4, rescale=0.7)(X[i : i + 1], T[i : i + 1])
        torch.testing.assert_close(v[i : i + 1], alone)


def test_outside_the_interval_there_is_no_guidance_and_no_cost():
    model = Model()
    velocity = classifier_free(model, TEXT, NULL, 4, interval=(0.4, 0.6))
    v, guided, plain = velocity(X, T), classifier_free(Model(), TEXT, NULL, 4)(X, T), Model()(X, T, TEXT)
    torch.testing.assert_close(v[1], guided[1])
    torch.testing.assert_close(v[[0, 2]], plain[[0, 2]])
    assert torch.equal(velocity(X, T * 0), Model()(X, T * 0, TEXT))
    assert model.batches == [6, 3]


def test_full_rescale_restores_the_deviation_of_the_conditional_velocity():
    dims = (1, 2, 3)
    plain, guided = Model()(X, T, TEXT), classifier_free(Model(), TEXT, NULL, 6)(X, T)
    v = classifier_free(Model(), TEXT, NULL, 6, rescale=1)(X, T)
    torch.testing.assert_close(v.std(dims), plain.std(dims))
    torch.testing.assert_close(v / v.std(dims, keepdim=True), guided / guided.std(dims, keepdim=True))
    half = classifier_free(Model(), TEXT, NULL, 6, rescale=0.5)(X, T)
    torch.testing.assert_close(half, (v + guided) / 2)


def test_guided_sampling_of_a_constant_field_lands_where_it_must():
    def constant(x, t, y):
        return expand_time(y.float(), x).expand_as(x)

    x1 = solve_ode(classifier_free(constant, torch.tensor([1, 2, 3]), torch.tensor([1]), 3), X, steps=4)
    torch.testing.assert_close(x1, X + torch.tensor([1.0, 4.0, 7.0]).view(3, 1, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TEXT, None, 2), "got no null condition: give one, or use scale 1"),
        ((None, NULL, 2), "got no condition: give one, or use scale 1"),
        (
            (TEXT, NULL[:, :4], 2),
            r"expected a null condition of shape \(3, 5, 8\) or of one row of it, got \(3, 4, 8\)",
        ),
        ((TEXT, NULL[:2], 2), r"got \(2, 5, 8\)"),
    ],
)
def test_conditions_that_do_not_fit_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier_free(Model(), *arguments)


def test_a_batch_that_does_not_fit_its_conditions_is_explained():
    with pytest.raises(ValueError, match="got 3 conditions for a batch of 2"):
        classifier_free(Model(), TEXT, NULL, 2)(X[:2], T[:2])
    with pytest.raises(ValueError, match="expected low <= high"):
        classifier_free(Model(), TEXT, NULL, 2, interval=(0.9, 0.1))
