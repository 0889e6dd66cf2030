import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from stn_fast.ops.gated_conv2d import cpu
from stn_fast.ops.gated_conv2d.joined import join
from stn_fast.ops.halves import are_halves, convert, make_halves
from stn_fast.ops.memory import adjoin, as_one

SHAPE = (6, 4, 3, 2)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS.keys())


def halves(layout=torch.contiguous_format, dtype=torch.float32, shape=SHAPE):
    whole = torch.randn(2 * shape[0], *shape[1:], dtype=dtype).contiguous(memory_format=layout)
    return whole.chunk(2)


def apart(layout=torch.contiguous_format):
    return [half.clone() for half in halves(layout)]


def strangers():
    """Pairs that are not the two halves of a tensor, each for a different reason."""
    first, second = halves()
    memory = torch.randn(3 * 6 * 24)
    later = torch.randn(12, *SHAPE[1:])[6:]
    return {
        "two tensors": apart(),
        "the other way round": (second, first),
        "one tensor twice": (first, first),
        "the second half of another tensor": (first, later),
        "on the meta device": (torch.empty(SHAPE, device="meta"), torch.empty(12, *SHAPE[1:], device="meta")[6:]),
        "a gap between them": (memory[:144].view(SHAPE), memory[145:289].view(SHAPE)),
        "an overlap": (memory[:144].view(SHAPE), memory[143:287].view(SHAPE)),
        "other strides": (first, second.view(6, 2, 3, 4).permute(0, 3, 2, 1)),
        "another shape": (first, second[:3]),
        "another dtype": (first, second.view(torch.int32)),
        "one sparse": (first, second.to_sparse()),
        "one lazily negated": (first, torch._neg_view(second)),
        "halves of the second dimension": torch.randn(6, 8, 3, 2).chunk(2, dim=1),
    }


@layouts
def test_halves_are_joined_without_a_copy(layout):
    first, second = halves(layout)
    for joined in (as_one(first, second), join(first, second, 1), cpu._joined(first, second, 1, layout)):
        assert joined.data_ptr() == first.data_ptr()
        assert torch.equal(joined, torch.cat([first, second]))
        assert joined.is_contiguous(memory_format=layout)


@layouts
@pytest.mark.parametrize("shape", [(1, 4, 3, 2), (6, 1, 3, 2), (6, 4, 1, 1), (1, 1, 1, 1), (5, 3, 3, 2)], ids=str)
def test_sizes_of_one_and_odd_ones_are_joined_in_their_order(shape, layout):
    first, second = halves(layout, shape=shape)
    assert torch.equal(join(first, second, 1), torch.cat([first, second]))
    assert torch.equal(cpu._joined(first, second, 1, torch.channels_last), torch.cat([first, second]))


@pytest.mark.parametrize("name", strangers())
def test_other_pairs_are_not_taken_for_halves(name):
    first, second = strangers()[name]
    assert not adjoin(first, second)
    assert as_one(first, second) is None
    if name not in ("another shape", "another dtype", "one sparse", "on the meta device"):
        assert torch.equal(join(first, second, 1), torch.cat([first, second]))


def test_groups_are_joined_one_by_one():
    first, second = halves()
    joined = join(first, second, 2)
    assert torch.equal(joined, torch.cat([first[:3], second[:3], first[3:], second[3:]]))


def test_autograd_and_transforms_see_both_halves():
    first, second = (half.detach().requires_grad_() for half in halves())
    assert as_one(first, second) is None
    join(first, second, 1).square().sum().backward()
    assert torch.equal(second.grad, 2 * second.detach())
    stacked = torch.randn(5, 12, *SHAPE[1:])
    joined = torch.vmap(lambda whole: join(*whole.chunk(2), 1))(stacked)
    assert torch.equal(joined, stacked)


def copies(function, *arguments):
    """The result and how many copies it took."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = function(*arguments)
    return result, sum(event.count for event in profiler.key_averages() if event.key in ("aten::copy_", "aten::cat"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@layouts
def test_halves_and_their_gradients_are_converted_in_one_pass(layout, dtype):
    other = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    pair = [half.detach().requires_grad_() for half in halves(layout)]
    converted, took = copies(convert, *pair, dtype, other)
    assert took == 1
    assert adjoin(*converted)
    for half, of in zip(converted, pair, strict=True):
        assert torch.equal(half, of.to(dtype))
        assert half.is_contiguous(memory_format=other)
    upstream = halves(other, dtype)
    gradients, took = copies(torch.autograd.grad, converted, pair, upstream)
    assert took == 1
    for gradient, dy in zip(gradients, upstream, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, dy.float())
        assert gradient.is_contiguous(memory_format=layout)


def test_conversion_to_the_same_dtype_and_layout_copies_nothing():
    pair = halves()
    converted, took = copies(convert, *pair, torch.float32, torch.contiguous_format)
    assert took == 0
    assert all(after is before for after, before in zip(converted, pair, strict=True))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("make", [halves, apart])
def test_a_converted_half_requires_a_gradient_where_it_did(make, wanted):
    pair = [half.detach().requires_grad_(wants) for half, wants in zip(make(), wanted, strict=True)]
    converted = convert(*pair, torch.bfloat16, torch.channels_last)
    assert tuple(half.requires_grad for half in converted) == wanted
    for half, of in zip(converted, pair, strict=True):
        assert torch.equal(half, of.to(torch.bfloat16))
        if of.requires_grad:  # of one result alone, and no gradient reaches the other
            (gradient,) = torch.autograd.grad(half.float().sum(), of)
            assert torch.equal(gradient, torch.ones(SHAPE))
    with torch.no_grad():
        assert not any(half.requires_grad for half in convert(*pair, torch.bfloat16, torch.channels_last))


def test_conversion_can_be_differentiated_twice():
    pair, parameters = ([nn.Parameter(half.double()) for half in apart()] for _ in range(2))
    make_halves(*parameters)
    assert are_halves(*parameters)
    assert not are_halves(*pair)

    def loss(first, second):
        first, second = convert(first, second, torch.float32, torch.channels_last)
        return (first.double() ** 3 * second.double()).sum()

    for tensors in (pair, parameters):
        first_order = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        second_order = torch.autograd.grad(sum(g.sum() for g in first_order), tensors)
        first, second = (tensor.detach().float().double() for tensor in tensors)
        assert torch.allclose(second_order[0], (6 * first * second + 3 * first**2))
        assert torch.allclose(second_order[1], 3 * first**2)


def test_parameters_that_do_not_match_are_not_joined():
    first = nn.Parameter(torch.randn(SHAPE))
    others = (torch.randn(SHAPE).double(), torch.randn(5, *SHAPE[1:]), torch.randn(SHAPE).to_sparse())
    for second in (*map(nn.Parameter, others), None):
        address = first.data_ptr()
        make_halves(first, second)
        assert first.data_ptr() == address
        assert not are_halves(first, second)


def test_lazily_negated_halves_are_joined_with_their_sign():
    first, second = (torch._neg_view(half) for half in halves())
    assert torch.equal(join(first, second, 1), torch.cat([first, second]))
