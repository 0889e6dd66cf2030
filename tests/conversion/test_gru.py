"""A converted GRU: each example's outputs and gradients are those of torch's GRU with its own weights."""

import pytest
import torch
from converted_networks import converted, sampled
from numerics import relative_error
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import stn_fast as stn

OPTIONS = [dict(), dict(num_layers=2, bias=False), dict(num_layers=2, bidirectional=True, batch_first=True)]
STEPS, EXAMPLES, INPUTS, WIDTH = 3, 4, 6, 5


def made(options, response_rank=None):
    """A converted GRU, and (input, state) that require gradients."""
    torch.manual_seed(0)
    tuned = converted(nn.ModuleList([nn.GRU(INPUTS, WIDTH, **options).double()]), response_rank=response_rank)
    ways = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    shape = (EXAMPLES, STEPS) if options.get("batch_first") else (STEPS, EXAMPLES)
    x, state = torch.randn(*shape, INPUTS).double(), torch.randn(ways, EXAMPLES, WIDTH).double()
    return tuned, [x.requires_grad_(), state.requires_grad_()]


@pytest.mark.parametrize("response_rank", [2, None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_example_has_the_outputs_and_gradients_of_torchs_gru_with_its_weights(options, response_rank):
    tuned, given = made(options, response_rank)
    gru, hyper = tuned[0], sampled(tuned)
    with tuned.tuned_hyperparameters.using(hyper):
        y, last = gru(*given)
    plain, batch_dim = nn.GRU(INPUTS, WIDTH, **options).double(), 0 if options.get("batch_first") else 1
    outputs, states = [], []
    for example in range(EXAMPLES):
        place = slice(example, example + 1)
        x = given[0][place] if batch_dim == 0 else given[0][:, place]
        own = effective(gru, hyper.response[example].double())
        one, of_one = torch.func.functional_call(plain, own, (x, given[1][:, place]))
        outputs.append(one)
        states.append(of_one)
    wanted = torch.cat(outputs, batch_dim), torch.cat(states, 1)
    of = [*given, *gru.parameters()]
    weights = [torch.randn_like(one) for one in wanted]
    found, expected = (
        torch.autograd.grad(sum((one * weight).sum() for one, weight in zip(pair, weights, strict=True)), of)
        for pair in ((y, last), wanted)
    )
    for one, other in zip((y, last, *found), (*wanted, *expected), strict=True):
        assert relative_error(one, other) < 1e-12


def effective(gru, h):
    """The parameters of a plain GRU at one response input: W + diag(Gw h) R and b + (Gb h) ⊙ r."""
    found, own = {}, dict(gru.named_parameters())
    for ending in [name.removeprefix("weight") for name in own if name.startswith(("weight_ih", "weight_hh"))]:
        response, projection = own[f"response_weight{ending}"], own.get(f"response_projection{ending}")
        response = response if projection is None else response @ projection
        found[f"weight{ending}"] = own[f"weight{ending}"] + (own[f"weight_gate{ending}"] @ h)[:, None] * response
        if gru.bias:
            shift = own[f"bias_gate{ending}"] @ h * own[f"response_bias{ending}"]
            found[f"bias{ending}"] = own[f"bias{ending}"] + shift
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_gru_is_unchanged_by_the_conversion_and_folds_to_torchs(options):
    torch.manual_seed(0)
    plain, (_, given) = nn.GRU(INPUTS, WIDTH, **options).double(), made(options)
    wanted = plain(*given)
    tuned = stn.convert(nn.ModuleList([plain]), quiet=True).eval()
    for one, other in zip(tuned[0](*given), wanted, strict=True):
        assert relative_error(one, other) < 1e-12
    tuned, _ = made(options)
    folded = stn.fold(tuned.eval())
    assert type(folded[0]) is nn.GRU
    for one, other in zip(folded[0](*given), tuned[0](*given), strict=True):
        assert relative_error(one, other) < 1e-12


def test_an_input_of_one_example_has_no_batch_dimension():
    tuned, (x, state) = made({})
    y, last = tuned.eval()[0](x[:, 0], state[:, 0])
    wanted, of_batch = tuned[0](x[:, :1], state[:, :1])
    assert torch.equal(y, wanted[:, 0])
    assert torch.equal(last, of_batch[:, 0])


def test_dropout_between_the_layers_is_tuned():
    tuned = stn.convert(nn.ModuleDict({"gru": nn.GRU(4, 8, 2, dropout=0.5)}), quiet=True)
    assert tuned.tuned_hyperparameters.space.names == ("gru_dropout", "weight_decay")
    x, hyper = torch.randn(5, 3, 4), sampled(tuned, 3)
    with tuned.tuned_hyperparameters.using(hyper):
        one, other = tuned["gru"](x)[0], tuned["gru"](x)[0]
    assert (one != other).any()
    assert stn.fold(tuned)["gru"].dropout == pytest.approx(0.5)


def test_wrong_inputs_are_errors():
    tuned, (x, state) = made({})
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        with pytest.raises(TypeError, match=r"0 \(GRU\): a converted GRU does not support PackedSequence"):
            tuned[0](pack_sequence([x[:, 0].detach()]))
        with pytest.raises(RuntimeError, match="Expected hidden size"):
            tuned[0](x, state[:, :2])
        with pytest.raises(ValueError, match=r"must count the 4 examples"):
            tuned[0](x[:, :3])
