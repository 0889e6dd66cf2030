"""The language model is the embedding, LSTM and tied decoder that it says it is, for every example at its own h."""

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error
from random_response import respond
from torch import nn

import stn_fast as stn
from stn_fast.data.text import predictions
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.models import LanguageModel, tuned
from stn_fast.recipes import recipe
from stn_fast.training.hyper_state import without_description
from stn_fast.training.language import next_word_loss, regularised_next_word_loss
from stn_fast.training.methods import SelfTuning, check_streams
from stn_fast.training.spaces import build_space
from stn_fast.training.streams import Streams
from stn_fast.training.task import outputs

SPACE = build_space(recipe("ptb").config())
RATES = [name for name in SPACE.names if "dropout" in name]
WORDS, WIDTH = 17, 6


def model_of(space=SPACE, rank=None, **sizes):
    torch.manual_seed(0)
    network = LanguageModel(**dict(words=WORDS, embedding=WIDTH, hidden=WIDTH) | sizes)
    return respond(tuned(network, space, rank))


def space_of(*names):
    return HyperparameterSpace([one for one in SPACE if one.name in names])


def tokens_of(time, batch):
    return torch.randint(WORDS, (time, batch), generator=torch.Generator().manual_seed(1))


def sampled(batch, step=0, space=SPACE, **options):
    return space.sample(*space.initial_state(), batch_size=batch, seed=5, step=step, **options)


def folded_at(model, response):
    """The plain network at one response input for all."""
    own = model.tuned_hyperparameters
    before = own.location.clone()
    own.location.copy_(own.space.initial_state()[0] + response)
    with pytest.warns(UserWarning, match=r"embedding\.weight, decoder\.weight were one parameter"):
        folded = stn.fold(model)
    own.location.copy_(before)
    return folded


def plain_logits(network, decoder, tokens):
    """By torch's own layers with the weights of a plain network, and the state after the tokens, in float64."""
    hidden, after = F.embedding(tokens, network.embedding.weight.double()), []
    for own in network.lstm:
        lstm = nn.LSTM(own.input_size, own.hidden_size).double()
        lstm.load_state_dict(own.state_dict())
        hidden, last = lstm(hidden)
        after.append(last)
    weight, bias = decoder.weight.double(), decoder.bias.double()
    return F.linear(hidden, weight, bias), [torch.cat(parts) for parts in zip(*after, strict=True)]


@pytest.mark.parametrize("rank", [None, 2])
def test_every_example_has_the_plain_network_of_its_own_hyperparameters(rank):
    model, tokens, hyper = model_of(rank=rank).eval(), tokens_of(9, 4), sampled(4)
    assert [one.response_rank for one in (model.embedding, *model.lstm)] == [rank] * 3
    nn.init.normal_(model.decoder.bias)
    for name, gate in model.named_parameters():
        if "gate" in name:
            nn.init.normal_(gate)
    found = outputs(model, hyper, tokens)
    for b, response in enumerate(hyper.response):
        folded, column = folded_at(model, response), tokens[:, b : b + 1]
        want, (h_n, c_n) = plain_logits(folded, model.decoder, column)
        assert relative_error(found.logits[:, b], want[:, 0]) < 1e-5
        assert relative_error(found.state[0][:, b], h_n[:, 0]) < 1e-5
        assert relative_error(found.state[1][:, b], c_n[:, 0]) < 1e-5
        assert type(folded.embedding) is stn.EmbeddingWithDropout
        assert relative_error(folded(column).logits, want) < 1e-5


def test_unperturbed_hyperparameters_are_one_plain_network():
    model, tokens = model_of().eval(), tokens_of(9, 4)
    hyper = SPACE.at(SPACE.initial_state()[0] + 0.7, batch_size=4)
    found = outputs(model, hyper, tokens).logits
    want, _ = plain_logits(folded_at(model, hyper.response[0]), model.decoder, tokens)
    assert relative_error(found, want) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_before_it_is_tuned_it_is_a_plain_network_without_dropout(training):
    torch.manual_seed(0)
    network, tokens = LanguageModel(WORDS, WIDTH, WIDTH).train(training), tokens_of(9, 4)
    found = network(tokens)
    assert torch.equal(found.raw, found.dropped)
    assert relative_error(found.logits, plain_logits(network, network.decoder, tokens)[0]) < 1e-6


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("layers", [2, 3])
def test_it_trains_as_a_network_of_gated_layers(layers, rank):
    model, tokens, hyper = model_of(rank=rank, layers=layers), tokens_of(9, 4), sampled(4)
    gated = dict(num_hyperparameters=len(SPACE), response_rank=rank)
    embedding = stn.HyperEmbedding(WORDS, WIDTH, **gated)
    dropouts = dict(dropout="hidden_dropout", recurrent_dropout="recurrent_dropout", stream=4)
    lstm = stn.HyperLSTM(WIDTH, WIDTH, layers, **dropouts, **gated)
    embedding.load_state_dict(model.embedding.state_dict())
    state = {f"{name[:-1]}{layer}": p for layer, own in enumerate(model.lstm) for name, p in own.state_dict().items()}
    lstm.load_state_dict(state)
    before, after = (
        stn.PerExampleDropout(f"{place}_dropout", stream=stream, shared_dims=(0,))
        for stream, place in ((2, "input"), (3, "output"))
    )
    x = stn.EmbeddingDropout("embedding_dropout", stream=1)(embedding, tokens, hyper, example_dim=1)
    raw, state = lstm(before(x, hyper, example_dim=1), hyper)
    dropped = after(raw, hyper, example_dim=1)
    found = outputs(model, sampled(4), tokens)
    assert torch.equal(found.raw, raw)
    assert torch.equal(found.dropped, dropped)
    assert torch.equal(found.logits, F.linear(dropped, embedding.weight, model.decoder.bias))
    assert all(map(torch.equal, found.state, state))


def test_a_text_in_two_windows_is_the_text_in_one():
    model, tokens, hyper = model_of().eval(), tokens_of(9, 4), sampled(4)
    first = outputs(model, hyper, tokens[:5])
    second = outputs(model, hyper, tokens[5:], first.state)
    whole = outputs(model, hyper, tokens)
    assert relative_error(torch.cat([first.logits, second.logits]), whole.logits) < 1e-6
    assert relative_error(torch.stack(second.state), torch.stack(whole.state)) < 1e-6


def test_the_decoder_is_the_embedding_and_is_not_gated():
    model = model_of()
    assert model.decoder.weight is model.embedding.weight
    # The embedding, two layers of two sides, and the decoder's bias.
    assert len(list(model.parameters())) == 3 + 2 * 2 * 6 + 1
    found = outputs(model.eval(), sampled(3), tokens_of(5, 3))
    want = F.linear(found.raw, model.embedding.weight, model.decoder.bias)
    assert torch.equal(found.logits, want)
    assert found.dropped is found.raw


def test_it_has_as_many_parameters_as_the_papers():
    """13,280,400 of a plain network of this size, and its responses and gates."""
    n, h, words = len(SPACE), 650, 10_000
    plain = words * h + 2 * (2 * 4 * h * h + 2 * 4 * h) + words
    gates = 2 * 2 * 2 * 4 * h * n + h * n
    network = LanguageModel(words)
    assert sum(p.numel() for p in network.parameters()) == plain == 13_280_400
    model = tuned(network, SPACE)
    assert sum(p.numel() for p in model.parameters()) == 2 * plain - words + gates


def test_starts_as_published():
    torch.manual_seed(0)
    model = LanguageModel(500, 100, 100)
    assert model.embedding.weight.abs().max() <= 0.1
    assert model.embedding.weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert model.lstm[1].weight_hh_l0.abs().max() <= 0.1
    assert model.lstm[1].weight_hh_l0.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert not model.decoder.bias.any()


@pytest.mark.parametrize("name", RATES)
def test_each_dropout_acts_alone_in_training_alone_and_afresh_at_every_step(name):
    space = space_of(name)
    bare = tuned(LanguageModel(WORDS, WIDTH, WIDTH), HyperparameterSpace([Hyperparameter("a", init=0.0)]))
    model, tokens = model_of(space), tokens_of(9, 4)
    bare.load_state_dict(without_description(model.state_dict()))
    location = space.initial_state()[0] + 3

    def logits(of, step):
        hyper = of.tuned_hyperparameters.space.at(location, batch_size=4, seed=5, step=step)
        hyper.response = torch.zeros_like(hyper.response)
        return outputs(of, hyper, tokens).logits

    assert not torch.equal(logits(model, 0), logits(model, 1))
    assert torch.equal(logits(model, 0), logits(model, 0))
    assert not torch.equal(logits(model, 0), logits(bare, 0))
    assert torch.equal(logits(model.eval(), 0), logits(bare.eval(), 0))


def test_no_dropout_without_its_name():
    space = HyperparameterSpace([Hyperparameter("activation_regularization", low=0.0, init=0.05, per_example=False)])
    model, hyper, tokens = model_of(space), sampled(4, space=space), tokens_of(9, 4)
    assert torch.equal(outputs(model, hyper, tokens).logits, outputs(model.eval(), hyper, tokens).logits)


def assert_locked(dropped):
    """Over time (T, B, D), but not over examples."""
    assert (dropped == dropped[0]).all()
    assert 0 < dropped[0].sum() < dropped[0].numel()
    assert not torch.equal(dropped[0, 0], dropped[0, 1])


def test_output_dropout_is_locked_over_time_for_every_example():
    model, hyper = model_of(embedding=50, hidden=50), SPACE.at(SPACE.initial_state()[0] + 3, batch_size=4, step=1)
    found = outputs(model, hyper, tokens_of(9, 4))
    assert_locked(found.dropped == 0)
    assert (found.raw != 0).all()


@pytest.mark.parametrize("name", ["input_dropout", "hidden_dropout"])
def test_dropout_before_and_between_layers_is_locked_over_time_for_every_example(name):
    model, space, seen = model_of(space_of(name), embedding=50, hidden=50, layers=3), space_of(name), []
    for dropout in model.modules():
        if getattr(dropout, "name", None) == name:
            dropout.register_forward_hook(lambda *called: seen.append(called[-1] == 0))
    outputs(model, space.at(space.initial_state()[0] + 3, batch_size=4, step=1), tokens_of(9, 4))
    assert len(seen) == (1 if name == "input_dropout" else 2)
    for dropped in seen:
        assert_locked(dropped)
    assert len(seen) == 1 or not torch.equal(*seen)


def test_half_a_batch_is_trained_on_as_half_of_the_whole():
    """The masks of words and weights are the batch's, those of activations each example's."""
    model, tokens = model_of(), tokens_of(9, 6)
    whole, half = outputs(model, sampled(6), tokens), outputs(model, sampled(2, first_example=4), tokens[:, 4:])
    assert relative_error(half.logits, whole.logits[:, 4:]) < 1e-5


def streams_of(model):
    """{(name of a module, the rate that it draws for): its streams}"""
    found = {}
    for place, module in model.named_modules():
        if getattr(module, "name", None) is not None:
            found[place, module.name] = module.streams if hasattr(module, "streams") else (module.stream,)
    return found


@pytest.mark.parametrize("layers", [2, 4])
def test_every_layer_draws_from_a_stream_of_its_own(layers):
    model = model_of(layers=layers)
    check_streams(model)
    streams = [one for streams in streams_of(model).values() for one in streams]
    # Words, input, output, between the layers, and the weights of each.
    assert len(set(streams)) == len(streams) == 3 + (layers - 1) + layers


@pytest.mark.parametrize("name", RATES)
def test_a_dropout_draws_the_same_numbers_whatever_others_are_tuned(name):
    alone, every = (streams_of(model_of(space, layers=3)) for space in (space_of(name), SPACE))
    assert alone == {place: streams for place, streams in every.items() if place[1] == name} != {}


def test_a_validation_step_moves_every_hyperparameter_through_the_response_alone():
    model = model_of().eval().requires_grad_(False)
    location = SPACE.initial_state()[0].requires_grad_()
    outputs(model, SPACE.at(location, batch_size=4), tokens_of(9, 4)).logits.square().sum().backward()
    assert location.grad.all()


def test_wrong_arguments_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"hidden must equal embedding.*got 8 and 6"):
        model_of(hidden=8)
    with pytest.raises(ValueError, match=r"words must be an int >= 1.*got 0"):
        model_of(words=0)
    model, state = model_of(), (torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, WIDTH))
    with pytest.raises(ValueError, match=r"h_0 must be \(1, 4, 6\).*got \(1, 3, 6\)"):
        outputs(model, sampled(4), tokens_of(9, 4), state)
    with pytest.raises(IndexError, match=r"17 rows, so tokens are 0 to 16; got 17"):
        outputs(model, sampled(4), torch.full((3, 4), 17))


@pytest.mark.parametrize(
    ("layers", "objective", "unused"),
    [
        (1, regularised_next_word_loss, "'hidden_dropout'"),
        (2, next_word_loss, "'activation_regularization', 'temporal_activation_regularization'"),
    ],
)
def test_a_hyperparameter_that_nothing_uses_is_refused_at_the_first_step(layers, objective, unused):
    model, text = model_of(layers=layers), predictions(torch.arange(200) % WORDS, 0)
    method = SelfTuning(model, SPACE, objective, next_word_loss)
    with pytest.raises(ValueError, match=rf"nothing uses {unused}:"):
        method.train_step(Streams(text, 4, 9, seed=0, stream=0)[0], 0)


def test_a_rate_that_examples_would_have_of_their_own_is_refused_where_they_share_it():
    for name, kind in (("embedding_dropout", "EmbeddingWithDropout"), ("recurrent_dropout", "DropConnectLSTM")):
        space = HyperparameterSpace([Hyperparameter(name, low=0.0, high=0.9, init=0.05)])
        with pytest.raises(ValueError, match=rf"'{name}' must have per_example=False, because {kind}"):
            model_of(space)


def test_the_state_of_a_folded_one_is_not_loaded_into_tied_weights():
    model = model_of()
    model.tuned_hyperparameters.location += 0.7
    with pytest.warns(UserWarning, match=r"embedding\.weight, decoder\.weight were one parameter"):
        folded = stn.fold(model)
    tied = LanguageModel(WORDS, WIDTH, WIDTH)
    with pytest.raises(RuntimeError, match=r"decoder\.weight differs from embedding\.weight"):
        tied.load_state_dict(folded.state_dict())
    tied.load_state_dict(LanguageModel(WORDS, WIDTH, WIDTH).state_dict())
    tied.decoder.weight = nn.Parameter(tied.decoder.weight.clone())
    tied.load_state_dict(folded.state_dict())
    tokens = tokens_of(5, 3)
    assert torch.equal(tied.eval()(tokens).logits, folded.eval()(tokens).logits)


def test_it_is_tuned_within_another_network():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader = LanguageModel(WORDS, WIDTH, WIDTH)

        def forward(self, tokens):
            return self.reader(tokens)

    def logits(network):
        torch.manual_seed(0)
        return outputs(tuned(network(), SPACE), sampled(4), tokens_of(5, 4)).logits

    assert torch.equal(logits(Wrapper), logits(lambda: LanguageModel(WORDS, WIDTH, WIDTH)))
