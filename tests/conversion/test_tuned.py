"""`using`: which HyperBatch layers use, in nested calls, threads, checkpointing and compiled models."""

import copy
import io
import threading

import pytest
import torch
from converted_networks import converted, inputs, plain, sampled
from torch import nn
from torch.utils.checkpoint import checkpoint

import stn_fast as stn


def test_nested_calls_and_errors_restore_the_batch_used_before():
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 2)), quiet=True)
    own, outer, inner = tuned.tuned_hyperparameters, sampled(tuned), sampled(tuned, step=1)
    with own.using(outer):
        with pytest.raises(ZeroDivisionError), own.using(inner):
            1 / (own.current is outer)
        assert own.current is outer
    assert own.current is None


def test_another_thread_is_refused_while_one_is_inside():
    tuned, errors = stn.convert(nn.Sequential(nn.Linear(3, 2)), quiet=True), []
    own, hyper = tuned.tuned_hyperparameters, sampled(tuned)

    def enter():
        try:
            with own.using(hyper):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    def run():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    with own.using(hyper):
        run()
        assert own.current is hyper
    assert "another thread is using this model" in errors[0]
    run()
    assert len(errors) == 1


def in_another_thread(call):
    """The message of the RuntimeError that it raises there; None without one."""
    errors = []

    def run():
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors[0] if errors else None


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_called_in_another_thread_does_not_use_this_threads_batch(training):
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 2)), [stn.Dropout("0", init=0.3)], quiet=True).train(training)
    own, x = tuned.tuned_hyperparameters, torch.ones(4, 3)
    with own.using(sampled(tuned)):
        assert "another thread is using this model" in in_another_thread(lambda: tuned[0](x))
        tuned(x)
        assert "another thread is using this model" in in_another_thread(lambda: own.at_location().__enter__())
        with own.at_location():
            assert own.in_use() is None
        assert own.in_use() is not None
    if not training:
        assert in_another_thread(lambda: tuned(x)) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_pass_in_another_thread_recomputes_with_the_batch_of_its_forward_pass(reentrant):
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), quiet=True)
    x, grads = torch.ones(4, 3, requires_grad=True), []
    for backward in (lambda call: call(), in_another_thread):
        with tuned.tuned_hyperparameters.using(sampled(tuned)):
            loss = checkpoint(tuned, x, use_reentrant=reentrant).square().sum()
            assert backward(loss.backward) is None
            grads.append(x.grad)
            x.grad = None
    assert torch.equal(*grads)


def test_other_batches_are_refused():
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 2)), quiet=True)
    own = tuned.tuned_hyperparameters
    other = stn.HyperparameterSpace([stn.Hyperparameter("other", init=0.0)])
    cases = [
        (sampled(tuned).response, TypeError, "hyper must be a HyperBatch, as from space.sample, got Tensor"),
        (other.at(other.initial_state()[0], batch_size=4), ValueError, "space with other, the model.*weight_decay"),
        (sampled(tuned).to("meta"), ValueError, r"is on meta, the model's hyperparameters are on cpu"),
    ]
    for hyper, error, message in cases:
        with pytest.raises(error, match=message), own.using(hyper):
            pass


def test_values_and_scales_are_those_of_the_buffers():
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.3)), quiet=True)
    own = tuned.tuned_hyperparameters
    assert own.values() == pytest.approx({"dropout": 0.3, "weight_decay": 1e-4})
    assert own.scales() == pytest.approx({"dropout": 1.0, "weight_decay": 1.0})
    own.location.add_(1.0)
    assert own.values() == own.space.values(own.location)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["block", "norms"])
def test_checkpointing_repeats_masks_and_gives_the_same_gradients(kind, use_reentrant):
    tuned = converted(plain(kind, 0.4))
    x = inputs(kind)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)  # reentrant: an input must require a gradient

    def segment(scale):
        return tuned(x) * scale

    found = []
    for call in (segment, lambda given: checkpoint(segment, given, use_reentrant=use_reentrant)):
        tuned.zero_grad()
        with tuned.tuned_hyperparameters.using(sampled(tuned)):
            y = call(scale)
            y.square().sum().backward()
        found.append((y.detach(), *(parameter.grad for parameter in tuned.parameters())))
    assert all(map(torch.equal, *found))


def test_a_compiled_model_needs_no_new_graph_for_other_hyperparameters():
    torch.manual_seed(0)
    tuned = converted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 3)))
    graphs, x, own = [], torch.randn(4, 6), tuned.tuned_hyperparameters

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(tuned, fullgraph=True, backend=count)
    for step in range(4):
        own.location.add_(0.1)
        hyper = sampled(tuned, step=step)
        with own.using(hyper):
            y = compiled(x)
        with own.using(sampled(tuned, step=step)):
            torch.testing.assert_close(y, tuned(x))
    assert 1 <= len(graphs) <= 2
    torch._dynamo.reset()


def changes(own):
    """Every way to change the location, by name."""
    state = own.state_dict() | {"location": own.location - 0.7}
    grown = own.location + 0.3
    return {
        "in place": lambda: own.location.add_(0.1),
        "by its data": lambda: own.location.data.add_(0.1),
        "by a detached tensor": lambda: own.location.detach().add_(0.1),
        "by load_state_dict": lambda: own.load_state_dict(state),
        "by assignment of a state": lambda: own.load_state_dict(state | {"location": grown}, assign=True),
        "by another tensor": lambda: setattr(own, "location", own.location * 1.1),
        "in inference mode": lambda: torch.inference_mode()(own.location.add_)(0.1),
    }


@pytest.mark.parametrize("change", changes(stn.convert(nn.Linear(3, 2), quiet=True).tuned_hyperparameters))
def test_evaluation_follows_every_change_of_the_location(change):
    tuned, x = converted(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))).eval(), torch.randn(4, 6)
    own = tuned.tuned_hyperparameters
    before = tuned(x)
    changes(own)[change]()
    with own.using(own.space.at(own.location, batch_size=4)):
        want = tuned(x)
    assert torch.equal(tuned(x), want)
    assert not torch.equal(want, before)


def test_the_layers_of_an_evaluation_share_one_response_input(monkeypatch):
    tuned, x = converted(nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])).eval(), torch.randn(4, 3)
    own, calls = tuned.tuned_hyperparameters, []
    at = type(own.space).at
    monkeypatch.setattr(type(own.space), "at", lambda *given, **options: calls.append(0) or at(*given, **options))
    tuned(x)
    tuned(x)
    assert len(calls) == 1
    own.location.add_(0.1)
    tuned(x)
    assert len(calls) == 2


def test_a_response_input_made_in_inference_mode_can_be_differentiated_through():
    tuned, x = converted(nn.Sequential(nn.Linear(3, 3))).eval(), torch.randn(4, 3)
    with torch.inference_mode():
        tuned(x)
    tuned(x).sum().backward()
    assert tuned[0].response_weight.grad.any()


def test_a_location_that_requires_a_gradient_gets_one_from_each_evaluation():
    tuned, x = converted(nn.Sequential(nn.Linear(3, 3))).eval(), torch.randn(4, 3)
    own = tuned.tuned_hyperparameters
    tuned(x)
    own.location.requires_grad_()
    for _ in range(2):
        own.location.grad = None
        tuned(x).sum().backward()
        assert own.location.grad.any()


def test_a_compiled_evaluation_follows_the_location_and_needs_no_new_graph():
    tuned, x = converted(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))).eval(), torch.randn(4, 6)
    own, graphs = tuned.tuned_hyperparameters, []
    torch._dynamo.reset()
    compiled = torch.compile(tuned, fullgraph=True, backend=lambda graph, given: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x), tuned(x))
            own.location.add_(0.1)
    assert len(graphs) <= 2
    torch._dynamo.reset()


def test_a_compiled_model_is_folded_as_the_model_itself():
    tuned, x = converted(nn.Sequential(nn.Linear(6, 3))).eval(), torch.randn(4, 6)
    result = stn.fold(torch.compile(tuned, backend="eager"))
    assert type(result) is nn.Sequential
    torch.testing.assert_close(result(x), tuned(x))


# The state dict


def with_space(*names, **options):
    torch.manual_seed(0)
    space = stn.HyperparameterSpace([stn.Hyperparameter(name, low=0.0, init=0.3, **options) for name in names])
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    return stn.convert(model, space, dropouts={}, of_loss=[*names], quiet=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: with_space("b", "a"), "b, a there, a, b here, in this order"),
        (lambda: with_space("a", "c"), "a, c there, a, b here"),
        (lambda: with_space("a", "b", high=0.5), "a high=0.5 there, None here; b high=0.5"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_of_another_space_is_refused_although_its_shapes_are_the_same(other, message, strict):
    tuned = with_space("a", "b")
    with pytest.raises(RuntimeError, match=f"converted with another space: {message}"):
        tuned.load_state_dict(other().state_dict(), strict=strict)
    assert tuned.load_state_dict(with_space("a", "b", scale=0.5).state_dict())  # the scale is only the first σ


def test_a_state_dict_goes_through_files_copies_and_plain_models(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tuned = with_space("a", "b")
    with torch.no_grad():
        tuned.tuned_hyperparameters.location.add_(0.5)
    file = io.BytesIO()
    torch.save(tuned.state_dict(), file)
    file.seek(0)
    safetensors.save_model(tuned, tmp_path / "model.safetensors")
    states = [
        torch.load(file, weights_only=True),
        safetensors.load_file(tmp_path / "model.safetensors"),
        copy.deepcopy(tuned).double().state_dict(),
        torch.optim.swa_utils.AveragedModel(tuned).module.state_dict(),
        torch.compile(tuned, backend="eager")._orig_mod.state_dict(),
    ]
    for state in states:
        again = with_space("a", "b")
        again.load_state_dict(state)
        assert again.tuned_hyperparameters.values() == tuned.tuned_hyperparameters.values()
        with pytest.raises(RuntimeError, match="another space"):
            with_space("b", "a").load_state_dict(state)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2)).state_dict()
    assert not tuned.load_state_dict(plain, strict=False).unexpected_keys
    assert torch.equal(tuned[0].weight, plain["0.weight"])
    assert "tuned_hyperparameters.location" in tuned.load_state_dict(plain, strict=False).missing_keys
    x = torch.randn(5, 3)
    tuned.eval()
    assert torch.equal(torch.func.functional_call(tuned, tuned.state_dict(), x), tuned(x))
