"""The generator: published answers, and the C++ core against the NumPy reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stn_fast import _C, random

# counter, key, output: the vectors that Random123 publishes for philox4x32-10 (kat_vectors)
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# In units of the float32 spacing at the value; the worst of 1e7 draws was 3.0.
WORST_NORMAL_ULP = 4

draws = dict(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**63 - 1),
    stream=st.integers(0, 2**32 - 1),
    examples=st.integers(1, 6),
    elements=st.integers(1, 150),
    first_example=st.integers(0, 2**34),
)


def words(text):
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def drawn(function, examples, elements, first_example=0, seed=0, step=0, stream=0, threads=1):
    out = torch.full((examples, elements), float("nan"))
    function(out.data_ptr(), examples, elements, first_example, seed, step, stream, threads)
    return out.numpy()


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_numpy_philox_gives_the_published_answers(counter, key, output):
    np.testing.assert_array_equal(random.philox4x32(words(counter), words(key)), words(output))


def test_cpp_philox_gives_the_published_answers():
    counters, keys, outputs = (
        np.stack([words(text) for text in column]) for column in zip(*KNOWN_ANSWERS, strict=True)
    )
    out = np.zeros_like(counters)
    _C.philox(counters.ctypes.data, keys.ctypes.data, out.ctypes.data, len(counters), 1)
    np.testing.assert_array_equal(out, outputs)


def test_cpp_philox_equals_numpy_on_random_counters_with_any_number_of_threads():
    source = np.random.default_rng(0)
    counters = source.integers(0, 2**32, (5001, 4), dtype=np.uint32)
    keys = source.integers(0, 2**32, (5001, 2), dtype=np.uint32)
    for threads in (1, 2, 3):
        out = np.zeros_like(counters)
        _C.philox(counters.ctypes.data, keys.ctypes.data, out.ctypes.data, len(counters), threads)
        np.testing.assert_array_equal(out, random.philox4x32(counters, keys))


def test_a_number_is_addressed_by_element_example_step_and_stream():
    seed, step, stream = 0x0123456789ABCDEF, 2**32 + 7, 3
    bits = random.bits(seed, step, stream, examples=3, elements=10, first_example=5)
    counter = np.array([9 // 4, 5 + 2, 7, stream], np.uint32)
    key = np.array([0x89ABCDEF, 0x01234567], np.uint32)
    assert bits[2, 9] == random.philox4x32(counter, key)[9 % 4]


@settings(deadline=None, max_examples=60)
@given(**draws)
def test_cpp_uniforms_equal_numpy_bit_for_bit(seed, step, stream, examples, elements, first_example):
    got = drawn(_C.uniform, examples, elements, first_example, seed, step, stream)
    np.testing.assert_array_equal(got, random.uniform(seed, step, stream, examples, elements, first_example))


@settings(deadline=None, max_examples=60)
@given(**draws)
def test_cpp_normals_of_any_shape_are_within_ulps_of_numpy(seed, step, stream, examples, elements, first_example):
    got = drawn(_C.normal, examples, elements, first_example, seed, step, stream)
    want = random.normal(seed, step, stream, examples, elements, first_example)
    assert (np.abs(got - want) <= WORST_NORMAL_ULP * np.spacing(np.abs(want))).all()


def test_a_million_cpp_normals_are_within_ulps_of_numpy_zero_crossings_included():
    got = drawn(_C.normal, 1000, 1003, seed=1, step=2, stream=3)
    want = random.normal(1, 2, 3, 1000, 1003)
    assert (np.abs(got - want) <= WORST_NORMAL_ULP * np.spacing(np.abs(want))).all()


@pytest.mark.parametrize("normal", [random.normal, None], ids=["numpy", "cpp"])
def test_normals_have_the_moments_of_a_normal_distribution(normal):
    z = (normal(7, 0, 1, 1000, 1000) if normal else drawn(_C.normal, 1000, 1000, seed=7, stream=1)).astype(np.float64)
    # four standard errors of each sample moment of 1e6 normals
    assert abs(z.mean()) < 4e-3
    assert abs((z**2).mean() - 1) < 4 * 2**0.5 * 1e-3
    assert abs((z**3).mean()) < 4 * 15**0.5 * 1e-3
    assert abs((z**4).mean() - 3) < 4 * 96**0.5 * 1e-3
    assert abs((z[:, 0::2] * z[:, 1::2]).mean()) < 4 * 2**0.5 * 1e-3
    assert 4.2 < np.abs(z).max() < 5.8


@pytest.mark.parametrize("function", [_C.uniform, _C.normal])
def test_draws_do_not_depend_on_the_number_of_threads(function):
    one = drawn(function, 33, 777, seed=5, threads=1)
    for threads in (2, 3):
        np.testing.assert_array_equal(drawn(function, 33, 777, seed=5, threads=threads), one)


@pytest.mark.parametrize("function", [_C.uniform, _C.normal])
def test_two_processes_draw_what_one_would_for_the_whole_batch(function):
    whole = drawn(function, 10, 37, seed=5, step=1)
    halves = [drawn(function, 5, 37, first_example=first, seed=5, step=1) for first in (0, 5)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_fresh_numbers_come_with_every_seed_step_and_stream():
    kinds = [dict(), dict(seed=1), dict(seed=2**32), dict(step=1), dict(stream=1)]
    assert len({drawn(_C.uniform, 2, 8, **kind).tobytes() for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(("examples", "elements"), [(0, 5), (5, 0)])
def test_nothing_is_drawn_for_an_empty_shape(examples, elements):
    guard = torch.full((8,), 7.0)
    _C.normal(guard.data_ptr(), examples, elements, 0, 0, 0, 0, 2)
    assert (guard == 7).all()
    assert random.normal(0, 0, 0, examples, elements).shape == (examples, elements)
