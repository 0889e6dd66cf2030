"""W and R of a HyperConv2d are stored as the halves of one tensor, and calls with them join nothing."""

import copy
import io
import pickle
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import stn_fast as stn
from stn_fast.ops.casts import casts_once
from stn_fast.ops.gated_conv2d import cpu
from stn_fast.ops.halves import are_halves

RESPONSE = torch.tensor([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2]])
BF16 = torch.bfloat16


def layer_of(groups=1, **options):
    torch.manual_seed(0)
    layer = stn.HyperConv2d(4, 8, 3, padding=1, groups=groups, num_hyperparameters=2, relu=True, **options)
    nn.init.normal_(layer.weight_gate)
    return layer


def joined(layer):
    return are_halves(*layer._filters())


def apart(layer):
    """The same layer with every parameter in memory of its own."""
    layer = copy.deepcopy(layer)
    for name, parameter in layer.named_parameters():
        setattr(layer, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    assert not joined(layer)
    return layer


def outcome(layer, layout=torch.contiguous_format, calls=1):
    """Output, gradients by name, and how often tensors were concatenated."""
    dtype = layer.bias.dtype
    x = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x.contiguous(memory_format=layout).requires_grad_()
    with stn.use_backend("reference"), mock.patch.object(torch, "cat", wraps=torch.cat) as cat:
        y = sum(layer(x, RESPONSE.to(dtype)) for _ in range(calls))
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return found, cat.call_count


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def bf16():
    return torch.autocast("cpu", BF16)


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_meta(layer):
    found = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    found.load_state_dict(layer.state_dict())
    return found


def with_flag(set_flag):
    def change(layer):
        set_flag(True)
        try:
            return layer.double()
        finally:
            set_flag(False)

    return change


def stepped(kind, **options):
    def change(layer):
        optimizer = kind(layer.parameters(), lr=0.1, **options)
        for _ in range(2):
            layer(torch.ones(3, 4, 9, 8), RESPONSE).square().sum().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return layer

    return change


def loaded(layer):
    other = layer_of()
    nn.init.zeros_(other.weight)
    other.load_state_dict(layer.state_dict())
    return other


WAYS = {
    "construction": lambda layer: layer,
    "deepcopy": copy.deepcopy,
    "deepcopy of a network": lambda layer: copy.deepcopy(nn.Sequential(layer))[0],
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
    "state dict": loaded,
    "to(dtype)": lambda layer: layer.to(torch.float64),
    "to(dtype) of a network": lambda layer: nn.Sequential(layer).to(torch.float64)[0],
    "to(dtype) with new parameters": with_flag(torch.__future__.set_overwrite_module_params_on_conversion),
    "to(dtype) with swapped parameters": with_flag(torch.__future__.set_swap_module_params_on_conversion),
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "channels_last": lambda layer: layer.to(memory_format=torch.channels_last),
    "the meta device": from_meta,
    "share_memory": lambda layer: layer.share_memory(),
    "SGD": stepped(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "fused SGD": stepped(torch.optim.SGD, momentum=0.9, fused=True),
    "Adam": stepped(torch.optim.Adam),
    "AdamW, many tensors at once": stepped(torch.optim.AdamW, foreach=True),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS.keys())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@layouts
def test_calls_do_not_concatenate_filters(way, layout):
    layer = way(layer_of())
    assert joined(layer)
    found, concatenations = outcome(layer, layout)
    assert concatenations == 0
    wanted, concatenations = outcome(apart(layer), layout)
    assert concatenations == 2
    assert_same(found, wanted)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("around", [nullcontext, casts_once])
@layouts
def test_no_filters_are_concatenated_under_autocast(layout, around, calls):
    layer = layer_of()
    with bf16(), around():
        found, concatenations = outcome(layer, layout, calls)
    assert concatenations == 0
    with bf16(), around():
        wanted, concatenations = outcome(apart(layer), layout, calls)
    assert concatenations == 2 * calls
    assert_same(found, wanted)
    assert found["weight"].dtype == found["response_weight"].dtype == torch.float32


@pytest.mark.parametrize("frozen", [("weight",), ("response_weight",), ("weight", "response_weight")], ids=str)
@pytest.mark.parametrize("around", [nullcontext, bf16])
def test_frozen_filters_get_no_gradient_and_the_others_the_same(frozen, around):
    layer = layer_of()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    for layout in FORMATS.values():
        with around():
            found, wanted = (outcome(one, layout)[0] for one in (layer, apart(layer)))
        assert not set(frozen) & set(found)
        assert_same(found, wanted)


@pytest.mark.parametrize("recorded", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("around", [nullcontext, bf16])
def test_without_a_graph_the_output_is_the_same(recorded, around):
    layer, x = layer_of(), torch.randn(3, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    other = apart(layer)
    with recorded(), around(), casts_once():
        assert torch.equal(layer(x, RESPONSE), other(x, RESPONSE))
        assert torch.equal(layer(x, RESPONSE[0]), other(x, RESPONSE[0]))


@layouts
def test_blocks_of_the_cpu_give_the_same(layout, monkeypatch):
    monkeypatch.setattr(cpu, "_AT_ONCE", 0)
    monkeypatch.setattr(cpu, "_BLOCK", 1)
    monkeypatch.setattr(stn, "use_backend", lambda _: nullcontext())
    layer = layer_of()
    assert_same(outcome(layer, layout)[0], outcome(apart(layer), layout)[0])


class Same(nn.Module):
    def forward(self, x):
        return x


def assigned(layer):
    layer.response_weight = nn.Parameter(layer.response_weight.detach().clone())


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Same())


def state_assigned(layer):
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)


def tied(layer):
    other = layer_of()
    other.weight = layer.weight
    nn.ModuleList([other, layer, other]).double().float()
    assert other.weight is layer.weight


def moved(layer):
    layer.weight.data = layer.weight.data.clone()


@pytest.mark.parametrize("change", [assigned, parametrized, state_assigned, tied, moved])
@pytest.mark.parametrize("around", [nullcontext, bf16])
def test_filters_that_are_no_longer_halves_give_the_same(change, around):
    layer = layer_of()
    with around():
        wanted = outcome(layer)[0]
    change(layer)
    for one in (layer, copy.deepcopy(layer), copy.deepcopy(layer).double().float()):
        with around():
            found = outcome(one)[0]
        assert_same(
            {name.replace("parametrizations.weight.original", "weight"): g for name, g in found.items()}, wanted
        )


def test_filters_in_externally_owned_memory_are_not_moved():
    """As those of a flat buffer of parameters do, or those that processes share."""
    layer = layer_of()
    flat = torch.cat([layer.weight.detach().flatten(), torch.zeros(3), layer.response_weight.detach().flatten()])
    layer.weight.data, layer.response_weight.data = (part.view(8, 4, 3, 3) for part in (flat[:288], flat[291:]))
    layer.to("cpu").float().requires_grad_()
    copy.copy(layer)
    flat.zero_()
    assert not layer.weight.any()
    assert not layer.response_weight.any()


def test_each_half_can_be_written_separately():
    layer = layer_of()
    versions = layer.weight._version, layer.response_weight._version
    before = layer.response_weight.detach().clone()
    with torch.no_grad():
        layer.weight.fill_(7.0)
    assert (layer.weight._version, layer.response_weight._version) == (versions[0] + 1, versions[1])
    assert torch.equal(layer.response_weight, before)


def test_a_saved_state_holds_both():
    state = layer_of().state_dict()
    for names in (list(state), ["weight"], ["response_weight"]):
        file = io.BytesIO()
        torch.save({name: state[name] for name in names}, file)
        file.seek(0)
        found = torch.load(file, weights_only=True)
        assert all(torch.equal(found[name], state[name]) for name in names)
        found[names[0]].zero_()
        assert all(torch.equal(found[name], state[name]) for name in names[1:])
    plain = nn.Conv2d(4, 8, 3)
    plain.load_state_dict({name: state[name] for name in ("weight", "bias")})
    assert torch.equal(plain.weight, state["weight"])


def test_groups_are_stored_apart():
    layer = layer_of(groups=2)
    for one in (layer, copy.deepcopy(layer), layer_of(groups=2).double()):
        assert not joined(one)
        assert_same(outcome(one)[0], outcome(apart(one))[0])


def test_tensors_without_numbers_are_halves_as_far_as_torch_lets_them():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        layer = layer_of()
        assert joined(layer)
        assert layer(torch.empty(3, 4, 9, 8), torch.empty(3, 2)).shape == (3, 8, 9, 8)
    with FakeTensorMode():
        assert layer_of()(torch.empty(3, 4, 9, 8), torch.empty(3, 2)).shape == (3, 8, 9, 8)
    with torch.inference_mode():
        layer = layer_of()
        assert joined(layer.double())


def test_a_compiled_layer_reads_the_halves():
    layer, x = layer_of(), torch.randn(3, 4, 9, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for around in (nullcontext, bf16):
        with around(), stn.use_backend("reference"):
            assert torch.equal(compiled(x, RESPONSE), layer(x, RESPONSE))


def test_a_trace_does_not_rely_on_where_filters_are_stored():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x = layer_of(), torch.randn(3, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    for around in (nullcontext, bf16):
        with torch.no_grad(), around():
            graph = make_fx(lambda parameters, x: torch.func.functional_call(layer, parameters, (x, RESPONSE)))(
                dict(layer.named_parameters()), x
            )
            other = apart(layer_of().requires_grad_(False))
            assert torch.equal(graph(dict(other.named_parameters()), x), other(x, RESPONSE))


def test_per_sample_gradients_are_those_of_each_filter():
    layer, x = layer_of(), torch.randn(3, 4, 9, 8)

    def loss(parameters, x, h):
        return torch.func.functional_call(layer, parameters, (x[None], h[None])).square().sum()

    parameters = dict(layer.named_parameters())
    found = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, RESPONSE)
    layer(x, RESPONSE).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


def test_filters_in_shared_memory_are_not_moved():
    layer = layer_of()
    layer._apply(lambda tensor: tensor.detach().clone().share_memory_())
    assert layer.weight.is_shared()
    assert layer.response_weight.is_shared()
