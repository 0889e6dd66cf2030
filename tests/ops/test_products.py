import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good

from stn_fast.ops import products

_C = pytest.importorskip("stn_fast._C")

LIBRARIES = (
    "torch.mm",
    pytest.param("oneDNN", marks=pytest.mark.skipif(not products.offers_onednn(), reason="no oneDNN in torch")),
)
sizes = st.sampled_from([1, 2, 3, 5, 16, 17, 31, 67, 128])


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("library", LIBRARIES)
@settings(derandomize=True, deadline=None, max_examples=40)
@given(rows=sizes, inputs=sizes, outputs=sizes, seed=st.integers(0, 9))
def test_either_library_computes_the_products(library, rows, inputs, outputs, seed):
    x, weight, response = (drawn(*s, seed=seed) for s in ((rows, inputs), (outputs, inputs), (outputs, inputs)))
    dy, g = drawn(rows, outputs, seed=seed + 10), drawn(rows, outputs, seed=seed + 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "library", lambda: library)
        y = products.times_transpose(x, weight)
        dx = products.sum_of_two(dy, weight, g, response, out=torch.full((rows, inputs), torch.nan))
    exact = x.double() @ weight.double().T
    assert y.is_contiguous()
    assert_twice_as_good(y, x @ weight.T, exact, name="x Wᵀ")
    exact = dy.double() @ weight.double() + g.double() @ response.double()
    assert_twice_as_good(dx, dy @ weight + g @ response, exact, name="dy W + g R")


@pytest.mark.parametrize("library", LIBRARIES)
@settings(derandomize=True, deadline=None, max_examples=20)
@given(rows=st.sampled_from([1, 5, 1024, 1031]), inputs=sizes, outputs=sizes, last=st.sampled_from([0, 3, 1024]))
def test_either_library_computes_sums_over_rows(library, rows, inputs, outputs, last):
    dy, x, sums = drawn(rows + last, outputs, seed=0), drawn(rows + last, inputs, seed=1), products.SumOverRows()
    assert sums.total() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "library", lambda: library)
        for block in (slice(0, rows), slice(rows, None))[: 2 if last else 1]:
            sums.add(dy[block], x[block])
    got = sums.total()
    assert got.is_contiguous()
    assert_twice_as_good(got, dy.T @ x, dy.double().T @ x.double(), name="dyᵀ x")


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_of_a_larger_tensor_are_written_in_place(library, monkeypatch):
    monkeypatch.setattr(products, "library", lambda: library)
    whole = torch.zeros(6, 4)
    dy, weight = drawn(2, 3, seed=0), drawn(3, 4, seed=1)
    assert products.sum_of_two(dy, weight, dy, weight, out=whole[2:4]).data_ptr() == whole[2:4].data_ptr()
    assert torch.allclose(whole[2:4], 2 * dy @ weight)
    assert not whole[:2].any()
    assert not whole[4:].any()


def test_what_torch_has_does_not_depend_on_its_default_dtype_and_device():
    offered = products.offers_onednn()
    torch.set_default_dtype(torch.float64)
    try:
        assert products.offers_onednn.__wrapped__() == offered
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert products.offers_onednn.__wrapped__() == offered


def test_the_library_follows_from_the_processor_where_threads_are_as_promised(monkeypatch):
    for vendor, isa, expected in (
        ("amd", "x86-64-v4", "oneDNN" if products.offers_onednn() else "torch.mm"),
        ("amd", "x86-64-v3", "torch.mm"),
        ("intel", "x86-64-v4", "torch.mm"),
        ("other", "baseline", "torch.mm"),
    ):
        monkeypatch.setattr(_C, "vendor", lambda vendor=vendor: vendor)
        monkeypatch.setattr(_C, "isa", lambda isa=isa: isa)
        products._prefers_onednn.cache_clear()
        assert products.library() == expected
