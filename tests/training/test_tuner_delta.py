"""SelfTuner(method="delta-stn"): tangents of converted layers against torch.func, its steps and passes, evaluation."""

import copy
import io
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from converted_networks import NETWORKS, converted, inputs, plain
from random_response import respond
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import stn_fast as stn
from stn_fast.dispatch import use_backend
from stn_fast.models import mlp
from stn_fast.training import finite
from stn_fast.training.converted import LinearisedConverted
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.parameters import hold_parameters, is_response
from stn_fast.training.task import classification_loss, decayed_classification_loss

EXAMPLES = 5
SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-2),
    ]
)


# Tangents of converted networks


class ConvNet(nn.Module):
    """Convolutions of the frames of a film, several rows per example, and both kinds of norm."""

    def __init__(self, rate=0.4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, (3, 2), padding=1), nn.BatchNorm2d(4)
        self.narrow, self.layer = nn.Conv2d(4, 3, 2, stride=2, bias=False), nn.LayerNorm((3, 3))
        self.drop, self.head = nn.Dropout(rate), nn.Linear(27, 7)

    def forward(self, films):
        x = self.norm(self.conv(films.flatten(0, 1))).relu()
        x = self.layer(self.narrow(x)).flatten(1)
        return self.head(self.drop(F.gelu(x))).unflatten(0, films.shape[:2]).mean(1)


class Transformer(nn.Module):
    """Two blocks with scaled_dot_product_attention."""

    def __init__(self, rate=0.4):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(6, 18, bias=False) for _ in range(2))
        self.out, self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((6, 6), (6, 11), (11, 6))
        )
        self.drop = nn.ModuleList(nn.Dropout(rate) for _ in range(4))

    def forward(self, x):
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=i == 0).transpose(1, 2).flatten(2)
            x = x + self.drop[2 * i](self.out[i](attended))
            x = x + self.drop[2 * i + 1](self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x)))))
        return x


def network_and_inputs(kind, rank):
    if kind in NETWORKS:
        return converted(plain(kind, 0.4), response_rank=rank), inputs(kind, EXAMPLES)
    torch.manual_seed(0)
    shape = (3, 2, 6, 5) if kind is ConvNet else (7, 6)
    model = converted(kind().double(), response_rank=rank)
    return model, torch.randn(EXAMPLES, *shape, dtype=torch.float64)


def perturbed(tuned, step=3):
    own = tuned.tuned_hyperparameters
    return own.space.sample(
        own.location, own.raw_scale, batch_size=EXAMPLES, seed=1, step=step, center=own.location.clone()
    )


def response_gradients(model, outputs):
    """Of a loss that is not linear in the outputs, by name."""
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    named = {name: p for name, p in model.named_parameters() if is_response(name)}
    return dict(zip(named, torch.autograd.grad((outputs * weights).square().sum(), named.values()), strict=True))


def by_torch_func(model, x, hyper):
    """f(0) + J h by torch.func.jvp through the definitions of all operations."""

    def outputs(response):
        with model.tuned_hyperparameters.using(replace(hyper, response=response, calls={}, open_calls={})):
            return torch.func.functional_call(model, dict(model.named_parameters()), (x,))

    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        z, dz = torch.func.jvp(outputs, (torch.zeros_like(hyper.response),), (hyper.response,))
    return z + dz


@pytest.mark.parametrize("rank", [None, 1], ids=["full", "rank 1"])
@pytest.mark.parametrize("kind", [*NETWORKS, ConvNet, Transformer])
def test_outputs_and_response_gradients_are_those_of_torch_func(kind, rank):
    model, x = network_and_inputs(kind, rank)
    hyper = perturbed(model)
    with hold_parameters([p for name, p in model.named_parameters() if not is_response(name)]):
        with model.tuned_hyperparameters.using(hyper):
            found = LinearisedConverted(model)(x)
        expected = by_torch_func(model, x, hyper)
        pairs = {"outputs": (found, expected)}
        theirs = response_gradients(model, expected)
        pairs |= {name: (mine, theirs[name]) for name, mine in response_gradients(model, found).items()}
    for name, (mine, other) in pairs.items():
        assert (mine - other).norm() < 1e-12 * other.norm(), name
        assert other.norm() > 0, name


@pytest.mark.parametrize("kind", ["cnn", ConvNet, Transformer])
def test_tangents_of_converted_layers_have_the_closed_form(kind, monkeypatch):
    """Not that of forward-mode AD through the definition, which computes R ȧ for nothing."""
    model, x = network_and_inputs(kind, None)
    for name in ("gated_linear", "gated_conv2d"):
        monkeypatch.setattr(f"stn_fast.ops.{name}.reference", None)
    with model.tuned_hyperparameters.using(perturbed(model)):
        LinearisedConverted(model)(x)


# Steps


def batch(seed, examples=13):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 6, generator=generator), torch.randint(4, (examples,), generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 4))


def tuner_of(model=None, make=torch.optim.SGD, loss=F.cross_entropy, **options):
    tuned = respond(stn.convert(model or network(), quiet=True))
    tuned.tuned_hyperparameters.raw_scale.fill_(2.5)
    options = dict(method="delta-stn") | options
    return stn.SelfTuner(tuned, make(tuned.parameters(), lr=0.05), loss, **options)


def run(tuner, steps, start=0):
    return [tuner.step(batch(k), batch(100 + k)) for k in range(start, start + steps)]


def assert_same(one, other):
    """Two models have the same state, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def moved(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, dict(antithetic=False, tune_scales=False, seed=5), dict(linearize=False)])
def test_the_numbers_are_those_of_delta_stn_on_the_network_of_gated_layers_bit_for_bit(options):
    hand = respond(mlp(SPACE, (6, 16, 4), response_rank="auto"))
    tuned = stn.convert(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)), SPACE,
        dropouts={"2": "hidden_dropout_1"}, quiet=True,
    )  # fmt: skip
    layers = [tuned[0], tuned[3]]
    for ours, theirs in zip(layers, hand.layers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    hand.dropouts[1].stream = tuned[2].stream
    ordered = [dict(ours.named_parameters())[name] for ours, theirs in zip(layers, hand.layers, strict=True)
        for name, _ in theirs.named_parameters()]  # fmt: skip
    both = torch.optim.SGD(hand.parameters(), lr=0.05, momentum=0.9)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(ordered, lr=0.05, momentum=0.9), F.cross_entropy, method="delta-stn", **options
    )
    method = DeltaSelfTuning(
        hand, SPACE, decayed_classification_loss, classification_loss, optimizer=lambda parameters: both, **options
    )
    for k in range(4):
        assert torch.equal(tuner.train_step(batch(k)), method.train_step(batch(k), 2 * k))
        assert torch.equal(tuner.method.response_loss, method.response_loss)
        assert torch.equal(tuner.valid_step(batch(100 + k)), method.valid_step(batch(100 + k), 2 * k + 1))
    assert torch.equal(tuned.tuned_hyperparameters.location, method.location.detach())
    assert torch.equal(tuned.tuned_hyperparameters.raw_scale, method.raw_scale.detach())
    for ours, theirs in zip(layers, hand.layers, strict=True):
        assert_same(ours, theirs)


def test_one_optimizer_steps_the_weights_and_then_the_response():
    tuner = tuner_of(make=partial(torch.optim.AdamW, weight_decay=0))
    names = set(dict(tuner.model.named_parameters()))
    response = {name for name in names if is_response(name)}
    before, given = snapshot(tuner.model), batch(0)
    tuner.method.general_step(given, 0)
    assert moved(before, tuner.model) == names - response
    before, statistics = snapshot(tuner.model), tuner.model[1].running_mean.clone()
    tuner.method.response_step(given, 0)
    assert moved(before, tuner.model) == response
    assert torch.equal(tuner.model[1].running_mean, statistics)
    before = snapshot(tuner.model)
    tuner.valid_step(given)
    assert moved(before, tuner.model) == set()
    assert all(parameter.requires_grad for parameter in tuner.model.parameters())


def test_the_response_may_have_an_optimizer_of_its_own():
    given = []

    def make(parameters):
        given.extend(parameters)
        return torch.optim.Adam(parameters, lr=1e-3)

    tuned = respond(stn.convert(network(), quiet=True))
    weights = [p for name, p in tuned.named_parameters() if not is_response(name)]
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(weights, lr=0.05), F.cross_entropy, method="delta-stn", response_optimizer=make
    )
    response = [p for name, p in tuned.named_parameters() if is_response(name)]
    assert list(map(id, given)) == list(map(id, response))
    before = snapshot(tuned)
    tuner.train_step(batch(0))
    assert moved(before, tuned) == set(before)
    for name, parameter in tuned.named_parameters():
        if is_response(name):  # a first step of Adam is as long as its learning rate
            assert (parameter - before[name]).abs().max() < 1.001e-3, name


def test_a_bad_dropout_rate_is_tuned_away():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    y = (x[:, :4] @ torch.randn(4, 4, generator=generator)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.8), nn.Linear(16, 4))
    tuned = stn.convert(model, quiet=True)
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), lr=0.05, momentum=0.9), F.cross_entropy, method="delta-stn",
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.15),
    )  # fmt: skip
    for _ in range(50):
        tuner.step((x[:200], y[:200]), (x[200:], y[200:]))
    assert tuner.values()["dropout"] < 0.5


# Evaluation: W and b at the current hyperparameters, wherever they are


def plain_copy(tuned):
    """The network with W and b, and without a response."""
    model = network()
    model.load_state_dict({name: tensor for name, tensor in tuned.state_dict().items() if name in model.state_dict()})
    return model.eval()


def trained():
    tuner = tuner_of(hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.3))
    run(tuner, 3)
    return tuner


def test_evaluation_and_folding_use_the_plain_weights():
    tuner, (x, _) = trained(), batch(0)
    own, want = tuner.model.tuned_hyperparameters, plain_copy(tuner.model)
    assert (own.location != own.space.initial_state()[0]).all()
    assert torch.equal(own.response(), torch.zeros(2))
    torch.testing.assert_close(tuner.model.eval()(x), want(x), rtol=1e-6, atol=1e-6)
    folded = tuner.fold()
    assert all(map(torch.equal, folded.parameters(), want.parameters()))
    assert folded[3].p == tuner.values()["dropout"] == own.space.values(own.location)["dropout"]
    with own.using(tuner.method.unperturbed(13)):
        torch.testing.assert_close(tuner.model(x), want(x), rtol=1e-6, atol=1e-6)


def loaded(tuned):
    other = stn.convert(network(), quiet=True)
    other.load_state_dict(tuned.state_dict())
    return other


def saved(tuned):
    file = io.BytesIO()
    torch.save(tuned, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [loaded, saved, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_that_its_response_is_centred(copied):
    tuned, (x, _) = trained().model.eval(), batch(0)
    other = copied(tuned).eval()
    assert torch.equal(other(x), tuned(x))
    other.tuned_hyperparameters.location.add_(0.5)
    assert torch.equal(other(x), tuned(x))
    assert all(map(torch.equal, stn.fold(other).parameters(), stn.fold(tuned).parameters()))


def test_a_loaded_state_changes_the_response_that_was_used_before():
    tuned, (x, _) = trained().model, batch(0)
    other = respond(stn.convert(network(), quiet=True)).eval()
    other.tuned_hyperparameters.location.copy_(tuned.tuned_hyperparameters.location)
    other(x)
    other.load_state_dict(tuned.state_dict())
    assert torch.equal(other(x), tuned.eval()(x))


def test_a_method_does_not_go_on_with_the_response_of_the_other_one():
    for there, here in (("delta-stn", "stn"), ("stn", "delta-stn")):
        tuner = tuner_of(method=there)
        run(tuner, 1)
        model, before = tuner.model, copy.deepcopy(tuner.model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=f"tuned by {there}, whose response {here} can't go on with.*'{there}'"):
            stn.SelfTuner(model, optimizer, method=here)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        stn.SelfTuner(model, optimizer, method=there)


def test_a_method_may_be_chosen_until_the_hyperparameters_have_moved():
    tuner = tuner_of(method="delta-stn")
    tuner.train_step(batch(0))
    optimizer = torch.optim.SGD(tuner.model.parameters(), lr=0.1)
    stn.SelfTuner(tuner.model, optimizer)
    assert not tuner.model.tuned_hyperparameters.centred


# Passes


def train(tuner, number, passes=(False, True)):
    """A training step by passes: one of the weights and those of the response."""
    (x, y), optimizer = batch(number), tuner.method.optimizer
    of_response = tuner.method.response_optimizer
    optimizer.zero_grad()
    with tuner.training(len(x)):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    nn.utils.clip_grad_norm_(tuner.model.parameters(), 1.0)
    optimizer.step()
    of_response.zero_grad()
    for antithetic in passes:
        with tuner.responding(len(x), antithetic=antithetic) as linearised:
            ((F.cross_entropy(linearised(x), y) + tuner.penalty()) / len(passes)).backward()
    nn.utils.clip_grad_norm_([p for group in of_response.param_groups for p in group["params"]], 1.0)
    of_response.step()


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("own", [None, partial(torch.optim.SGD, lr=0.2)], ids=["one optimizer", "two"])
def test_passes_are_the_general_and_the_response_step_bit_for_bit(antithetic, own):
    steps, passes = (tuner_of(antithetic=antithetic, response_optimizer=own, seed=3) for _ in range(2))
    for k in range(3):
        steps.method.general_step(batch(k), 3 * k)
        steps.method.response_step(batch(k), 3 * k + 1)
        train(passes, k, (False, True) if antithetic else (False,))
        assert_same(steps.model, passes.model)
        x, y = batch(100 + k)
        with passes.validating(len(x)):
            loss = F.cross_entropy(passes.model(x), y)
        assert torch.equal(passes.hyper_step(loss), steps.method.valid_step((x, y), 3 * k + 2))
        assert_same(steps.model, passes.model)
    assert (passes.draws, passes.trained, passes.validated) == (9, 3, 3)


def test_both_passes_of_all_parts_of_a_batch_may_share_a_step_of_one_optimizer():
    tuner, reference = tuner_of(seed=3), tuner_of(seed=3)
    method, responses, gradients = reference.method, [], {}
    before, location = snapshot(tuner.model), method.location.detach()
    for k in range(2):
        x, y = batch(k)
        for one in (tuner, reference):
            with one.training(len(x)):
                (F.cross_entropy(one.model(x), y) + one.penalty()).backward()
            if one is reference:
                add_gradients(gradients, one)
            with one.responding(len(x)) as linearised:
                (F.cross_entropy(linearised(x), y) + one.penalty()).backward()
        add_gradients(gradients, reference)
        draw = dict(batch_size=len(x), seed=3, step=2 * k + 1, center=location)
        responses.append(method.space.sample(location, method.raw_scale.detach(), **draw).response)
    tuner.method.optimizer.step()
    assert tuner.trained == 1
    for name, parameter in reference.model.named_parameters():
        parameter.grad = gradients[name]
    method.shorten(method.optimizer, responses)
    for name, parameter in tuner.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.05 * gradients[name])


def add_gradients(sums, tuner):
    """Adds the gradients to sums, by name, and clears them."""
    for name, parameter in tuner.model.named_parameters():
        if parameter.grad is not None:
            sums[name] = sums.get(name, 0) + parameter.grad
            parameter.grad = None


def test_each_pass_gives_gradients_and_statistics_to_its_own_parameters_only():
    """Also where plain modules are left, and where a layer computes with its response at h = 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(20, 3))
    tuned = respond(stn.convert(model, exclude="1", quiet=True))
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), lr=0.1), method="delta-stn")
    x, names = torch.randn(5, 2, 7), {name for name, _ in tuned.named_parameters()}
    response = {name for name in names if is_response(name)}
    for kind, own in (("training", names - response), ("responding", response)):
        before = tuned[1].running_mean.clone()
        with getattr(tuner, kind)(5) as given:
            ((given or tuned)(x).square().mean() + tuner.penalty()).backward()
        assert {name for name, parameter in tuned.named_parameters() if parameter.grad is not None} == own
        assert torch.equal(tuned[1].running_mean, before) == (kind == "responding")
        tuner.method.optimizer.zero_grad()


def test_passes_of_the_other_method_are_errors():
    stn_tuner, tuner = tuner_of(method="stn"), tuner_of()
    with pytest.raises(RuntimeError, match=r'only SelfTuner\(\.\.\., method="delta-stn"\) has passes of the response'):
        stn_tuner.responding(13).__enter__()
    with pytest.raises(RuntimeError, match="antithetic=True repeats the draw of the pass before"):
        tuner.responding(13, antithetic=True).__enter__()
    with tuner.responding(13) as linearised:
        linearised(batch(0)[0])
        tuner.penalty()
    with pytest.raises(ValueError, match="this pass of delta-stn is not perturbed: give antithetic=True to responding"):
        tuner.training(13, antithetic=True).__enter__()


# Errors


def test_wrong_methods_and_options_are_named():
    raw = stn.HyperparameterSpace([stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.3, response="raw")])
    cases = [
        (dict(method="delta"), "method must be one of 'stn', 'delta-stn', got 'delta'"),
        (dict(method="stn", linearize=False), "linearize are options of method='delta-stn'"),
        (dict(method="stn", response_optimizer=torch.optim.SGD), "response_optimizer and .* are options of method="),
        (dict(linearize="no"), "linearize must be True or False"),
        (
            dict(response_optimizer=lambda p: torch.optim.SGD(list(p)[1:], 0.1)),
            "response_optimizer lacks 0.resp.*given",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            tuner_of(**options)
    with pytest.raises(TypeError, match=r"response_optimizer must make a torch\.optim\.Optimizer.*got list"):
        tuner_of(response_optimizer=list)
    tuned = stn.convert(network(), raw, quiet=True)
    with pytest.raises(ValueError, match="response='shifted', and dropout has another one"):
        stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), 0.1), method="delta-stn")
    assert not tuned.tuned_hyperparameters.centred


class Cut(nn.Module):
    def forward(self, x):
        return torch.autograd.forward_ad.unpack_dual(x).primal


def test_what_cuts_tangents_is_an_error():
    message = r"no gradient to 1\.response_weight, although the loss depends on its layer"
    for step in (lambda tuner: tuner.train_step(batch(0)), lambda tuner: train(tuner, 0)):
        model = network()
        model[2] = nn.Sequential(Cut(), nn.ReLU())
        tuner = tuner_of(model)
        with pytest.raises(RuntimeError, match=message):
            step(tuner)


def test_a_loss_that_the_model_returns_is_an_error():
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.inner(x), labels)}

    x, y = batch(0)
    tuner = tuner_of(Returning(), loss=lambda output, batch: output["loss"])
    with pytest.raises(RuntimeError, match=r"the model returns a single number.*return logits"):
        tuner.train_step(dict(x=x, labels=y))


def test_the_device_waits_for_the_first_response_step_of_an_optimizer_of_both(monkeypatch):
    """Its state is created in that step, and a fused SGD that skips it would leave that memory unwritten."""
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    tuner = tuner_of(skip_nonfinite=1)
    decided = []
    apply = finite._apply_unless
    monkeypatch.setattr(finite, "_apply_unless", lambda bad, *given: decided.append(bad) or apply(bad, *given))
    tuner.train_step(batch(0))
    assert decided == []
    tuner.train_step(batch(1))
    assert len(decided) == 2
