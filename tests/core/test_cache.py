"""Laws of what is remembered of a tensor."""

import torch

from feddip_lite.core.cache import once_per_tensor
from feddip_lite.core.flat import kept_indices


def counting():
    calls = []

    @once_per_tensor
    def total(tensor):
        calls.append(1)
        return float(tensor.sum())

    return total, calls


def test_a_tensor_is_asked_once_as_long_as_it_is_unchanged():
    total, calls = counting()
    tensor = torch.ones(3)
    assert [total(tensor), total(tensor), len(calls)] == [3, 3, 1]
    tensor[0] = 5
    assert [total(tensor), total(tensor), len(calls)] == [7, 7, 2]


def test_equal_tensors_are_two_tensors():
    total, calls = counting()
    total(torch.ones(3)), total(torch.ones(3))
    assert len(calls) == 2


def test_a_tensor_that_is_gone_is_forgotten_even_if_another_takes_its_place():
    total, _ = counting()
    for value in range(50):
        assert total(torch.full((3,), float(value))) == 3 * value  # each is gone before the next is made


def test_tensors_without_a_version_are_asked_every_time():
    total, calls = counting()
    with torch.inference_mode():
        tensor = torch.ones(3)
        total(tensor)
        tensor[0] = 5
        assert total(tensor) == 7
    assert len(calls) == 2


def test_kept_indices_are_the_coordinates_of_true():
    mask = torch.tensor([True, False, False, True, True])
    assert kept_indices(mask).tolist() == [0, 3, 4]
    mask[0] = False
    assert kept_indices(mask).tolist() == [3, 4]
