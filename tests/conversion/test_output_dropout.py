"""Dropout in the list given to convert: which outputs are dropped and how, in steps, copies and compiled models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from converted_networks import assert_descends, converted, sampled
from numerics import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import stn_fast as stn
from stn_fast import random
from stn_fast.conversion import check_rows


class Part(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 6)
        self.layer4 = nn.Sequential(Part(), Part())
        self.parts = nn.ModuleList([Part()])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.parts[0](self.layer4(self.stem(x))))


def hooks(model):
    return {name: list(module._forward_hooks.values()) for name, module in model.named_modules()}


def mask(hyper, name, stream, elements, call=0):
    """keep / (1 − rate) of every example, from the NumPy generator."""
    seed = hyper.seed + (call << 32)
    drawn = random.uniform(seed, int(hyper.step), stream, len(hyper), elements, hyper.first_example)
    rate = hyper[name][:, None]
    return ((torch.from_numpy(drawn) >= rate) / (1 - rate.double())).double()


def made(*additions, **options):
    return converted(Network().double(), space=list(additions), **options)


def test_outputs_are_dropped_in_training_mode_with_masks_of_their_own():
    tuned = made(stn.Dropout("layer4.*", init=0.5), stn.Dropout("stem", init=0.2))
    x, hyper = torch.randn(7, 5).double(), sampled(tuned, 7, step=3)
    masks = [mask(hyper, *of, 6) for of in (("dropout_stem", 3), ("dropout_layer4", 1), ("dropout_layer4", 2))]
    with tuned.tuned_hyperparameters.using(hyper):
        y = tuned(x)
        tuned.eval()
        given = tuned.stem(x) * masks[0]
        given = tuned.layer4[1](tuned.layer4[0](given) * masks[1]) * masks[2]
        want = tuned.head(tuned.parts[0](given))
    assert all(0 < (one == 0).double().mean() < 1 for one in masks)
    assert not torch.equal(masks[1], masks[2])
    assert relative_error(y, want) < 1e-6


def test_nothing_is_dropped_in_evaluation_mode_or_by_a_part_in_it():
    torch.manual_seed(1)
    tuned, x = made(stn.Dropout("layer4.*", init=0.5)), torch.randn(4, 5).double()
    plain = stn.fold(tuned).eval()
    assert relative_error(tuned.eval()(x), plain(x)) < 1e-12
    tuned.train().layer4.eval()
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x)
        assert torch.equal(tuned.eval()(x), y)


def test_a_module_that_is_called_twice_draws_again():
    tuned = converted(nn.Sequential(nn.Linear(3, 3)).double(), space=[stn.Dropout("0", init=0.5)])
    x, hyper = torch.randn(4, 3).double(), sampled(tuned)
    with tuned.tuned_hyperparameters.using(hyper):
        found = [tuned(x) for _ in range(2)]
        tuned.eval()
        want = [tuned(x) * mask(hyper, "dropout_0", 1, 3, call) for call in range(2)]
    assert all(relative_error(y, one) < 1e-6 for y, one in zip(found, want, strict=True))
    assert not torch.equal(*found)


@pytest.mark.parametrize(("shape", "dim"), [((8, 3), 0), ((4, 5, 3), 0), ((5, 4, 3), 1), ((2, 12, 3), 1)])
def test_rows_of_an_example_have_its_rate_in_any_dimension(shape, dim):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double()
    tuned = converted(model, space=[stn.Dropout("1", init=0.5)], example_dims={"*": dim})
    x, hyper = torch.rand(shape).double(), sampled(tuned)
    with tuned.tuned_hyperparameters.using(hyper):
        y = tuned[1](x)
    rows = shape[dim] // 4 * (x.numel() // shape[dim])
    of_example = mask(hyper, "dropout_1", 1, rows)
    apart = (*shape[:dim], 4, -1, *shape[dim + 1 :])
    examples_first = x.view(apart).movedim(dim, 0)
    want = (examples_first.reshape(4, -1) * of_example).view(examples_first.shape).movedim(0, dim).reshape(shape)
    assert relative_error(y, want) < 1e-6


def test_training_mode_needs_hyperparameters():
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), [stn.Dropout("1")], quiet=True)
    with pytest.raises(RuntimeError, match=r"1 \(ReLU\) is in training mode.*using\(hyper\)"):
        tuned[1](torch.ones(4, 3))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.lstm, self.pick = nn.Linear(3, 3), nn.LSTM(3, 3, batch_first=True), nn.Identity()

    def forward(self, x):
        return self.linear(self.lstm(x)[0]) + 0 * self.pick(x.argmax(1, keepdim=True))


@pytest.mark.parametrize(("name", "kind", "got"), [("lstm", "LSTM", "tuple"), ("pick", "Identity", r"torch\.int64")])
def test_outputs_that_cannot_be_dropped_are_an_error_that_names_the_module(name, kind, got):
    tuned = stn.convert(Several(), [stn.Dropout(name)], quiet=True)
    before, message = copy.deepcopy(tuned), rf"{name} \({kind}\): its output must be a floating point tensor.*got {got}"
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    for check in (True, False):
        tuner = stn.SelfTuner(tuned, optimizer, lambda y, wanted: y.square().mean(), check_rows=check)
        with pytest.raises(TypeError, match=message):
            tuner.step((torch.randn(4, 2, 3), torch.zeros(4)))
    assert all(map(torch.equal, tuned.parameters(), before.parameters()))


def test_outputs_without_the_examples_are_refused():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.turn = nn.Linear(3, 3), nn.Identity()

        def forward(self, x):
            return self.turn(self.linear(x).transpose(0, 1)).transpose(0, 1)

    tuned, x = stn.convert(Turned(), [stn.Dropout("turn")], quiet=True), torch.randn(4, 6, 3)
    with pytest.raises(
        ValueError, match=r"turn \(Identity\) has outputs \(6, 4, 3\) for 4.*'turn': 1.*another pattern"
    ):
        check_rows(tuned, x)
    own = tuned.tuned_hyperparameters
    message = r"turn \(Identity\): dimension 0 of its output \(6, 4, 3\).*the 4 examples.*{'turn': 1}"
    with own.using(sampled(tuned)), pytest.raises(ValueError, match=message):
        tuned(x)
    right = stn.convert(Turned(), [stn.Dropout("turn", init=0.5)], example_dims={"turn": 1}, quiet=True)
    check_rows(right, x)
    with right.tuned_hyperparameters.using(sampled(right)):
        assert (right(x) == 0).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_drops_with_its_own_hyperparameters(copied):
    tuned, x = made(stn.Dropout("layer4.*", init=0.5)), torch.randn(4, 5).double()
    twin = copied(tuned)
    for hook in hooks(twin)["layer4.0"] + hooks(twin)["layer4.1"]:
        assert hook.tuned is twin.tuned_hyperparameters
    with tuned.tuned_hyperparameters.using(sampled(tuned)), twin.tuned_hyperparameters.using(sampled(twin)):
        assert torch.equal(twin(x), tuned(x))
    twin.tuned_hyperparameters.location.add_(1.0)
    with tuned.tuned_hyperparameters.using(sampled(tuned)), twin.tuned_hyperparameters.using(sampled(twin)):
        assert not torch.equal(twin(x), tuned(x))


def test_a_hook_registered_on_a_loaded_model_does_not_replace_it(monkeypatch):
    saved = pickle.dumps(made(stn.Dropout("stem")))
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    loaded = pickle.loads(saved)
    (hook,) = hooks(loaded)["stem"]
    for _ in range(hook.handle.id + 1):
        loaded.stem.register_forward_hook(lambda module, given, y: None)
    assert hook in hooks(loaded)["stem"]


def test_names_of_parameters_and_classes_are_those_without_it():
    tuned, other = made(stn.Dropout("layer4.*"), stn.Dropout("*.up")), made()
    assert tuned.state_dict().keys() == other.state_dict().keys()
    assert [type(one) for one in tuned.modules()] == [type(one) for one in other.modules()]
    again = made(stn.Dropout("layer4.*"), stn.Dropout("*.up"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    again.load_state_dict(tuned.state_dict())
    assert again.tuned_hyperparameters.values() == tuned.tuned_hyperparameters.values()


def test_nothing_is_left_after_folding():
    tuned, seen = made(stn.Dropout("layer4.*", init=0.5)), []
    tuned.layer4[0].register_forward_hook(lambda module, given, y: seen.append(type(module)))
    plain, original = stn.fold(tuned), Network()
    assert all(len(found) == (name == "layer4.0") for name, found in hooks(plain).items())
    for module, wanted in zip(plain.modules(), original.modules(), strict=True):
        assert module.__dict__.keys() == wanted.__dict__.keys()
    assert len(hooks(tuned)["layer4.0"]) == 2
    x = torch.randn(4, 5).double()
    assert torch.equal(plain.train()(x), plain.eval()(x))
    assert seen == [Part, Part]
    stn.convert(plain, [stn.Dropout("layer4.*")], quiet=True)


def test_a_conversion_that_fails_half_way_leaves_no_hook():
    class Refusing(Part):
        def register_forward_hook(self, hook):
            raise RuntimeError("no hooks here")

    model = nn.Sequential(Part(), Refusing())
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="no hooks here"):
        stn.convert(model, [stn.Dropout("?")])
    assert not any(hooks(model).values())
    assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_masks(use_reentrant):
    tuned, x = made(stn.Dropout("layer4.*", init=0.5), stn.Dropout("*.up")), torch.randn(4, 5).double()
    inner, found = tuned.layer4, []
    for call in (inner, lambda given: checkpoint(inner, given, use_reentrant=use_reentrant)):
        tuned.zero_grad()
        with tuned.tuned_hyperparameters.using(sampled(tuned)):
            y = tuned.head(call(tuned.stem(x)))
            y.square().sum().backward()
        found.append((y.detach(), *(one.grad for one in tuned.parameters() if one.grad is not None)))
    assert all(map(torch.equal, *found))


def test_a_compiled_model_drops_the_same_without_a_graph_break_and_needs_no_new_graph():
    tuned, graphs = stn.convert(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), [stn.Dropout("1", init=0.5)], quiet=True), []
    x, own = torch.randn(4, 5), tuned.tuned_hyperparameters
    torch._dynamo.reset()
    compiled = torch.compile(tuned, fullgraph=True, backend=lambda graph, given: graphs.append(graph) or graph.forward)
    for step in range(3):
        own.location.add_(0.1)
        with own.using(sampled(tuned, step=step)):
            y = compiled(x)
        with own.using(sampled(tuned, step=step)):
            assert torch.equal(y, tuned(x))
        assert (y == 0).any()
    assert len(graphs) == 1
    tuned.eval()
    torch.testing.assert_close(compiled(x), tuned(x))
    torch._dynamo.reset()


def batch(examples):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 5, generator=generator)
    return x, torch.randint(3, (examples,), generator=generator)


def test_a_training_step_has_the_gradient_of_the_dropped_network():
    tuned, (x, y) = made(stn.Dropout("layer4.*", init=0.5)), batch(6)
    before, x = copy.deepcopy(tuned), x.double()
    optimizer = torch.optim.SGD(tuned.parameters(), 1.0)
    tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, clip=None, antithetic=False, seed=2)
    tuner.train_step((x, y))
    own = before.tuned_hyperparameters
    hyper = own.space.sample(own.location, own.raw_scale, batch_size=6, seed=2, step=0)
    before.eval()
    with own.using(hyper):
        given = before.stem(x)
        for k in range(2):
            given = before.layer4[k](given) * mask(hyper, "dropout_layer4", k + 1, 6)
        loss = F.cross_entropy(before.head(before.parts[0](given)), y)
        decays = [one.weight_decay_penalty(hyper, hyper["weight_decay"]) for one in before.modules() if isinstance(
            one, nn.Linear)]  # fmt: skip
        (loss + sum(decays)).backward()
    for name, parameter in before.named_parameters():
        if not name.rpartition(".")[2].startswith("response"):
            moved = parameter.detach() - tuned.get_parameter(name).detach()
            assert relative_error(moved, parameter.grad) < 1e-5, name


def test_a_validation_step_has_the_hypergradient_of_the_network_that_drops_nothing():
    tuned, (x, y) = made(stn.Dropout("layer4.*", init=0.5)), batch(7)
    x, own = x.double(), tuned.tuned_hyperparameters
    location = own.location.clone().requires_grad_()
    plain = copy.deepcopy(tuned).eval()
    for hook in hooks(plain)["layer4.0"] + hooks(plain)["layer4.1"]:
        hook.handle.remove()
    with plain.tuned_hyperparameters.using(own.space.at(location, batch_size=7)):
        (wanted,) = torch.autograd.grad(F.cross_entropy(plain(x), y), location)
    assert_descends(tuned, (x, y), location, wanted)


def test_a_rate_that_is_far_too_high_is_tuned_down():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    tuned = stn.convert(model, [stn.Dropout("1", init=0.8)], quiet=True)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), 0.05), F.cross_entropy,
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1))  # fmt: skip
    x = torch.randn(80, 6)
    y = (x[:, :4] @ torch.randn(4, 4)).argmax(1)
    for _ in range(60):
        tuner.step((x[:40], y[:40]), (x[40:], y[40:]))
    assert tuner.values()["dropout_1"] < 0.7
