"""The language model is the embedding, LSTM and tied decoder that it says it is, for every example at its own h."""

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error
from torch import nn

from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.models import LanguageModel
from stn_fast.recipes import recipe
from stn_fast.training.methods import check_streams
from stn_fast.training.spaces import build_space

SPACE = build_space(recipe("ptb").config())
WORDS, WIDTH = 17, 6


def model_of(space=SPACE, **sizes):
    torch.manual_seed(0)
    return LanguageModel(space, **dict(words=WORDS, embedding=WIDTH, hidden=WIDTH) | sizes)


def tokens_of(time, batch):
    return torch.randint(WORDS, (time, batch), generator=torch.Generator().manual_seed(1))


def sampled(batch, step=0, space=SPACE, **options):
    return space.sample(*space.initial_state(), batch_size=batch, seed=5, step=step, **options)


def plain_logits(model, tokens, response, state=None):
    """With torch's own layers, at one response input for all."""
    hidden, state = model.lstm.fold(response).double()(model.embedding.fold(response).double()(tokens), state)
    return F.linear(hidden, model.embedding.weight.double(), model.decoder_bias.double()), state


@pytest.mark.parametrize("rank", [None, 2])
def test_every_example_has_the_plain_network_of_its_own_hyperparameters(rank):
    model, tokens, hyper = model_of(response_rank=rank).eval(), tokens_of(9, 4), sampled(4)
    assert model.embedding.response_rank == model.lstm.response_rank == rank
    nn.init.normal_(model.decoder_bias)
    for name, gate in model.named_parameters():
        if "gate" in name:
            nn.init.normal_(gate)
    outputs = model(tokens, hyper)
    for b, response in enumerate(hyper.response):
        want, (h_n, c_n) = plain_logits(model, tokens[:, b : b + 1], response)
        assert relative_error(outputs.logits[:, b], want[:, 0]) < 1e-5
        assert relative_error(outputs.state[0][:, b], h_n[:, 0]) < 1e-5
        assert relative_error(outputs.state[1][:, b], c_n[:, 0]) < 1e-5


def test_unperturbed_hyperparameters_are_one_plain_network():
    model, tokens = model_of().eval(), tokens_of(9, 4)
    hyper = SPACE.at(SPACE.initial_state()[0] + 0.7, batch_size=4)
    assert relative_error(model(tokens, hyper).logits, plain_logits(model, tokens, hyper.response[0])[0]) < 1e-5


def test_a_text_in_two_windows_is_the_text_in_one():
    model, tokens, hyper = model_of().eval(), tokens_of(9, 4), sampled(4)
    first = model(tokens[:5], hyper)
    second = model(tokens[5:], hyper, first.state)
    assert relative_error(torch.cat([first.logits, second.logits]), model(tokens, hyper).logits) < 1e-6


def test_the_decoder_is_the_embedding_and_is_not_gated():
    model = model_of()
    assert len(model.state_dict()) == 3 + 2 * 2 * 6 + 1  # embedding, two layers of two sides, the decoder's bias
    outputs = model.eval()(tokens_of(5, 3), sampled(3))
    want = F.linear(outputs.raw, model.embedding.weight, model.decoder_bias)
    assert torch.equal(outputs.logits, want)
    assert outputs.dropped is outputs.raw


def test_it_has_as_many_parameters_as_the_papers():
    """13,280,400 of a plain network of this size, and its responses and gates."""
    n, h, words = len(SPACE), 650, 10_000
    plain = words * h + 2 * (2 * 4 * h * h + 2 * 4 * h) + words
    gates = 2 * 2 * 2 * 4 * h * n + h * n
    model = LanguageModel(SPACE, words)
    assert plain == 13_280_400
    assert sum(p.numel() for p in model.parameters()) == 2 * plain - words + gates


def test_starts_as_published():
    torch.manual_seed(0)
    model = LanguageModel(SPACE, 500, 100, 100)
    assert model.embedding.weight.abs().max() <= 0.1
    assert model.lstm.weight_hh_l1.abs().max() <= 0.1
    assert model.lstm.weight_hh_l1.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert not model.decoder_bias.any()


@pytest.mark.parametrize("name", [name for name in SPACE.names if "dropout" in name])
def test_each_dropout_acts_alone_in_training_alone_and_afresh_at_every_step(name):
    space = HyperparameterSpace([h for h in SPACE if h.name == name])
    model, tokens, bare = (
        model_of(space),
        tokens_of(9, 4),
        model_of(HyperparameterSpace([Hyperparameter("a", init=0.0)])),
    )
    bare.load_state_dict(model.state_dict())
    location = space.initial_state()[0] + 3

    def logits(of, step):
        hyper = space.at(location, batch_size=4, seed=5, step=step)
        hyper.response = torch.zeros_like(hyper.response)
        return of(tokens, hyper).logits

    assert not torch.equal(logits(model, 0), logits(model, 1))
    assert torch.equal(logits(model, 0), logits(model, 0))
    assert not torch.equal(logits(model, 0), logits(bare, 0))
    assert torch.equal(logits(model.eval(), 0), logits(bare.eval(), 0))


def test_no_dropout_without_its_name():
    space = HyperparameterSpace([Hyperparameter("activation_regularization", low=0.0, init=0.05, per_example=False)])
    model, hyper = model_of(space), sampled(4, space=space)
    assert torch.equal(model(tokens_of(9, 4), hyper).logits, model.eval()(tokens_of(9, 4), hyper).logits)


def test_output_dropout_is_locked_over_time_for_every_example():
    model, hyper = model_of(embedding=50, hidden=50), SPACE.at(SPACE.initial_state()[0] + 3, batch_size=4, step=1)
    outputs = model(tokens_of(9, 4), hyper)
    dropped = outputs.dropped == 0
    assert (dropped == dropped[0]).all()
    assert 0 < dropped[0].sum() < dropped[0].numel()
    assert not torch.equal(dropped[0, 0], dropped[0, 1])
    assert (outputs.raw != 0).all()


def test_input_dropout_is_locked_over_time_for_every_example():
    space = HyperparameterSpace([h for h in SPACE if h.name == "input_dropout"])
    model, seen = model_of(space, embedding=50, hidden=50), []
    model.input_dropout.register_forward_hook(lambda *called: seen.append(called[-1]))
    model(tokens_of(9, 4), space.at(space.initial_state()[0] + 3, batch_size=4, step=1))
    dropped = seen[0] == 0
    assert (dropped == dropped[0]).all()
    assert 0 < dropped[0].sum() < dropped[0].numel()
    assert not torch.equal(dropped[0, 0], dropped[0, 1])


def test_half_a_batch_is_trained_on_as_half_of_the_whole():
    """The masks of words and weights are the batch's, those of activations each example's."""
    model, tokens = model_of(), tokens_of(9, 6)
    whole, half = model(tokens, sampled(6)), model(tokens[:, 4:], sampled(2, first_example=4))
    assert relative_error(half.logits, whole.logits[:, 4:]) < 1e-5


def test_every_layer_draws_from_a_stream_of_its_own():
    check_streams(model_of())
    check_streams(model_of(layers=4))


def test_a_validation_step_moves_every_hyperparameter_through_the_response_alone():
    model = model_of().eval().requires_grad_(False)
    location = SPACE.initial_state()[0].requires_grad_()
    model(tokens_of(9, 4), SPACE.at(location, batch_size=4)).logits.square().sum().backward()
    assert location.grad.all()


def test_wrong_arguments_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"hidden must equal embedding.*got 8 and 6"):
        model_of(hidden=8)
    with pytest.raises(ValueError, match=r"words must be an int >= 1.*got 0"):
        model_of(words=0)
    with pytest.raises(ValueError, match=r"hidden_dropout is applied between layers"):
        model_of(layers=1)
    model, state = model_of(), (torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, WIDTH))
    with pytest.raises(ValueError, match=r"h_0 must be \(2, 4, 6\).*got \(2, 3, 6\)"):
        model(tokens_of(9, 4), sampled(4), state)
    with pytest.raises(IndexError, match=r"17 rows, so tokens are 0 to 16; got 17"):
        model(torch.full((3, 4), 17), sampled(4))
