"""Seeded weights: the same everywhere, and statistically what a model needs."""

import hashlib
import math
import struct

import pytest
import torch

from epplan.runtime.weights import SeededWeights, seeded_tensor
from tests.runtime_cases import DEEPSEEK

CPU = torch.device("cpu")


def numbers(key: str, count: int) -> torch.Tensor:
    return seeded_tensor(key, (count,), std=1.0, device=CPU, dtype=torch.float32)


def expected_number(key: str, index: int) -> float:
    """Return one number by exact integers; a change would make every stored result invalid."""

    word = index
    for part in struct.unpack("<3I", hashlib.blake2b(key.encode(), digest_size=12).digest()):
        word ^= part
        word = (word ^ word >> 15) * 0x45D9F3B % 2**32
    word ^= word >> 16
    return (word - 2**32 * (word >= 2**31)) / 2**31 * math.sqrt(3)


def test_numbers_are_a_function_of_key_and_index() -> None:
    count = (1 << 17) + 5  # beyond one chunk
    actual = numbers("0/3/expert7.up", count)
    for index in [*range(100), *range(count - 100, count)]:
        expected = expected_number("0/3/expert7.up", index)
        assert float(actual[index]) == pytest.approx(expected, rel=1e-6)


def test_numbers_are_uniform_and_independent() -> None:
    count = 1 << 18
    one, other = numbers("0/0/expert0.up", count), numbers("0/0/expert1.up", count)
    for sample in (one, other):
        assert abs(float(sample.mean())) < 5e-3
        assert abs(float(sample.std()) - 1) < 5e-3
        assert abs(float((sample[1:] * sample[:-1]).mean())) < 5e-3
    assert abs(float((one * other).mean())) < 5e-3


def test_an_expert_does_not_depend_on_what_else_is_built() -> None:
    def weights() -> SeededWeights:
        return SeededWeights(spec=DEEPSEEK, seed=5, device=CPU, dtype=torch.float32)

    alone = weights().expert(2, 9)
    among_others = [weights().expert(2, expert) for expert in range(DEEPSEEK.num_experts)][9]
    assert torch.equal(alone.down_HF, among_others.down_HF)
    assert not torch.equal(alone.down_HF, weights().expert(1, 9).down_HF)
