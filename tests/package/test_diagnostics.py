"""The measures against closed forms and slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torchrl_spar import InputError, gradient_cosine, normal_share, support_distance, tangent_normal_split


def test_split_on_a_sphere_keeps_the_radial_part_as_normal():
    torch.manual_seed(0)
    point = torch.nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=-1)
    vector = torch.randn(50, 3, dtype=torch.float64)
    # Two vectors across the radius span the tangent plane; skewed and scaled, they still do.
    one = torch.linalg.cross(point, torch.randn(50, 3, dtype=torch.float64))
    two = 3 * torch.linalg.cross(point, one) + one
    tangent, normal = tangent_normal_split(vector, torch.stack((one, two), -1))
    radial = (vector * point).sum(-1, keepdim=True) * point
    torch.testing.assert_close(normal, radial)
    torch.testing.assert_close(tangent + normal, vector)


def test_dependent_and_shared_columns_span_what_they_span():
    line = torch.tensor([[1.0], [0.0], [0.0]])
    vector = torch.tensor([[[3.0, 4.0, 0.0]], [[0.0, 0.0, 2.0]]])
    for basis in (line, torch.cat((line, 2 * line), 1), line.expand(2, 1, 3, 1)):
        tangent, normal = tangent_normal_split(vector, basis)
        torch.testing.assert_close(tangent, torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]))
        torch.testing.assert_close(normal, torch.tensor([[[0.0, 4.0, 0.0]], [[0.0, 0.0, 2.0]]]))


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2])
def test_normal_share_is_the_sine_of_the_angle(angle):
    vector = 7 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    share = normal_share(vector, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    assert share.item() == pytest.approx(math.sin(angle), abs=1e-12)


def test_normal_share_of_no_move_is_zero():
    assert normal_share(torch.zeros(3, 2), torch.ones(2, 1)) == 0


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("block", [2**24, 70])
def test_support_distance_equals_a_full_sort(k, block, monkeypatch):
    monkeypatch.setattr("torchrl_spar.diagnostics.DISTANCES_PER_BLOCK", block)
    rng = np.random.default_rng(0)
    samples, data = rng.normal(size=(9, 3)), rng.normal(size=(30, 3))
    every = np.sqrt(((samples[:, None] - data[None]) ** 2).sum(-1))
    found = support_distance(torch.from_numpy(samples), torch.from_numpy(data), k=k)
    np.testing.assert_allclose(found, np.sort(every, 1)[:, :k].mean(1))


def test_rows_of_the_data_lie_in_it_however_far_from_zero():
    data = 1e4 + torch.rand(100, 5)
    assert support_distance(data, data).max() == 0


def test_gradient_cosine_over_all_parameters_together():
    one, two = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    # Gradients (1, 0 | 1) and (0, 0 | 2): the second reaches one parameter alone.
    cosine = gradient_cosine(one[0] + two.sum(), 2 * two.sum(), [one, two])
    assert cosine.item() == pytest.approx(1 / math.sqrt(2))
    assert gradient_cosine(one[0] + 0, 0 * one.sum(), [one]).item() == 0


def test_wrong_shapes_are_named():
    with pytest.raises(InputError, match="tangent_basis"):
        tangent_normal_split(torch.zeros(5, 3), torch.zeros(2, 1))
    with pytest.raises(InputError, match="reference"):
        support_distance(torch.zeros(5, 3), torch.zeros(5, 2))
    with pytest.raises(InputError, match="k=6"):
        support_distance(torch.zeros(5, 3), torch.zeros(5, 3), k=6)
