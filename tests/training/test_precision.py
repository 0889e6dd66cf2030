"""One setting decides in which precision the products of a step are computed, and is gone after it."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from gates_alone import FixedHyperparameters, SelfTuning
from run_files import result, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stn_fast as stn
from stn_fast.data import Split
from stn_fast.errors import UserError
from stn_fast.models import LanguageModel, mlp, tuned
from stn_fast.ops.casts import cast, casts_once
from stn_fast.recipes import digits
from stn_fast.training.build import build_method
from stn_fast.training.config import Config
from stn_fast.training.language import next_word_loss, regularised_next_word_loss
from stn_fast.training.layering import differences, read_yaml, resolve
from stn_fast.training.precision import float32_products
from stn_fast.training.run import run
from stn_fast.training.streams import Streams
from stn_fast.training.task import classification_loss, decayed_classification_loss

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-2),
    ]
)
BATCH = Split(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4)
backends = torch.backends


def newer():
    settings = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn)
    return [setting.fp32_precision for setting in (*settings, backends.mkldnn.matmul)]


def older():
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: backends.cuda.matmul.allow_tf32,
        lambda: backends.cudnn.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    return found


@pytest.fixture
def settings():
    """Puts torch's own defaults in place of the tests' for the time of a test."""

    def reset(cudnn, precisions):
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = cudnn
        backends.fp32_precision = "none"
        settings = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        for setting, value in zip(settings, precisions, strict=True):
            setting.fp32_precision = value

    reset(True, ("none", "tf32", "tf32"))
    yield
    reset(False, ("ieee", "ieee", "ieee"))


def method_of(objective, **options):
    torch.manual_seed(0)
    return SelfTuning(mlp(SPACE, (6, 8, 4)), SPACE, objective, objective, antithetic=False, **options)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_step_computes_in_its_precision_and_leaves_torch_as_it_was(precision, settings):
    seen = []

    def look():
        seen.append((newer()[1], *newer()[3:5], *older()[1:]))

    def objective(model, batch, hyper):
        look()
        loss = classification_loss(model, batch, hyper)
        loss.register_hook(lambda gradient: look())
        return loss

    before = newer(), older()
    method = method_of(objective, precision=precision)
    method.train_step(BATCH, 0)
    method.valid_step(BATCH, 1)
    value = "tf32" if precision == "tf32" else "ieee"
    assert seen == [(value, value, value, value == "tf32", value == "tf32")] * 4
    assert (newer(), older()) == before


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize(
    "change",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(backends.cudnn, "allow_tf32", False),
        lambda: setattr(backends, "fp32_precision", "tf32"),
        lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
        lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    ],
    ids=["defaults", "medium", "older matmul", "older cudnn", "all", "newer conv", "newer matmul"],
)
def test_precision_settings_are_restored_whichever_api_made_them(change, precision, settings):
    change()
    before = newer(), older()
    unchanged = before[0][1] == before[0][3] == before[0][4] == {"fp32": "ieee", "tf32": "tf32"}[precision]
    with float32_products(precision):
        assert unchanged or "refused" not in older()
    assert newer() == before[0]
    # What torch refused to read may be readable afterwards, and what it gave is what it gives.
    assert all(now == was or was == "refused" for now, was in zip(older(), before[1], strict=True))


def test_precision_settings_are_restored_after_an_error_too(settings):
    def objective(model, batch, hyper):
        raise KeyError

    before = newer(), older()
    with pytest.raises(KeyError):
        method_of(objective).train_step(BATCH, 0)
    assert (newer(), older()) == before


def test_torch_s_common_precision_setting_still_works_afterwards(settings):
    backends.fp32_precision = "tf32"
    with float32_products("fp32"):
        pass
    backends.fp32_precision = "ieee"
    assert backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(("precision", "want"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_the_kernels_follow_the_one_setting(precision, want, settings):
    gated_linear = pytest.importorskip("stn_fast.kernels.gated_linear")
    from stn_fast.kernels import gated_conv2d_implicit

    with float32_products(precision):
        assert gated_linear._precision(torch.float32) == want
        assert gated_conv2d_implicit.precision(torch.float32) == want


class Casts(TorchDispatchMode):
    """Counts casts from float32 to bfloat16 by shape."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outcome = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.seen[tuple(args[0].shape)] += outcome.dtype == torch.bfloat16
        return outcome


class Twice(nn.Module):
    """Every layer is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = stn.HyperConv2d(3, 3, 3, padding=1, num_hyperparameters=2)
        self.linear = stn.HyperLinear(75, 75, num_hyperparameters=2)

    def forward(self, x, hyper):
        x = self.conv(self.conv(x, hyper), hyper).flatten(1)
        return self.linear(self.linear(x, hyper), hyper)


@pytest.mark.parametrize("tune_scales", [True, False])
def test_a_layer_that_is_called_twice_is_cast_once(tune_scales):
    model, batch = Twice(), Split(torch.randn(4, 3, 5, 5), torch.arange(4))
    options = dict(precision="bf16", tune_scales=tune_scales, antithetic=False)
    method = SelfTuning(model, SPACE, classification_loss, classification_loss, **options)
    for take in (method.train_step, method.valid_step):
        with Casts() as casts:
            take(batch, 0)
        for layer, shape in ((model.conv, (3, 3, 3, 3)), (model.linear, (75, 75))):
            assert shape == layer.weight.shape == layer.response_weight.shape
            assert casts.seen[shape] == 2, f"{take.__name__}: W and R {shape}"


def language_method(**options):
    space = stn.HyperparameterSpace([stn.Hyperparameter("output_dropout", low=0.0, high=0.9, init=0.2)])
    model = tuned(LanguageModel(words=23, embedding=7, hidden=7), space)
    method = SelfTuning(model, space, regularised_next_word_loss, next_word_loss, **options)
    text = torch.randint(23, (400,), generator=torch.Generator().manual_seed(0))
    windows = Streams(Split(text[:-1], text[1:]), 4, 5, seed=0, stream=0)
    return method, windows


def test_a_window_of_a_text_casts_each_matrix_once():
    method, windows = language_method(precision="bf16", antithetic=False)
    for index in range(3):
        with Casts() as casts:
            method.train_step(windows[index], index)
        # W and R of both sides of both layers, and once the table as the decoder's matrix.
        assert casts.seen[28, 7] == 8
        assert casts.seen[23, 7] == 1


def test_with_bf16_parameters_and_sums_stay_in_float32():
    seen = {}

    def objective(model, batch, hyper):
        seen["logits"] = model(batch.inputs, hyper).dtype
        seen["loss"] = (loss := decayed_classification_loss(model, batch, hyper)).dtype
        return loss

    method = method_of(objective, precision="bf16")
    losses = method.train_step(BATCH, 0), method.valid_step(BATCH, 1)
    assert seen == {"logits": torch.bfloat16, "loss": torch.float32}
    state = [value for of_one in method.optimizer.state.values() for value in of_one.values()]
    learnt = [*method.model.parameters(), *(p.grad for p in method.model.parameters()), *state, *method.tuned]
    assert {tensor.dtype for tensor in (*learnt, *losses)} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_computes_the_penalties_of_a_language_model_in_float32():
    from stn_fast.training.language import activation_penalty

    space = stn.HyperparameterSpace([stn.Hyperparameter("activation_regularization", low=0.0, init=1.0)])
    hyper = space.at(space.initial_state()[0], batch_size=2)
    dropped = torch.randn(3, 2, 4).bfloat16()
    penalty = activation_penalty(dropped, dropped, hyper)
    torch.testing.assert_close(penalty, dropped.float().square().mean())


def test_an_objective_that_ends_in_16_bits_is_descended_in_float32():
    def objective(model, batch, hyper):
        return (model(batch.inputs, hyper) @ torch.ones(4, 1)).mean()

    method = method_of(objective, precision="bf16")
    assert method.train_step(BATCH, 0).dtype == torch.float32


def test_a_parameter_that_has_been_written_to_is_cast_anew():
    weight = nn.Parameter(torch.ones(2))
    with casts_once():
        first = cast(weight, torch.bfloat16)
        assert cast(weight, torch.bfloat16) is first
        with torch.no_grad():
            weight.mul_(3)
        assert torch.equal(cast(weight, torch.bfloat16), torch.full((2,), 3.0, dtype=torch.bfloat16))
    assert cast(weight, torch.bfloat16) is not cast(weight, torch.bfloat16)


def test_a_copy_made_without_a_graph_does_not_swallow_a_gradient():
    weight = nn.Parameter(torch.ones(2))
    with casts_once():
        with torch.no_grad():
            cast(weight, torch.bfloat16)
        cast(weight, torch.bfloat16).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2))


def test_an_unknown_precision_is_named_by_methods_and_configurations():
    for make in (partial(method_of, classification_loss), partial(FixedHyperparameters, nn.Linear(1, 1), SPACE, None)):
        with pytest.raises(ValueError, match=r"precision 'bf61': did you mean 'bf16'"):
            make(precision="bf61")
    with pytest.raises(UserError, match=r"precision = 'bf61': did you mean 'bf16'"):
        resolve(digits.config(), None, ["precision=bf61"])


@pytest.mark.parametrize("method", ["stn", "fixed"])
def test_a_recipe_runs_in_bf16_and_says_so(train, method):
    ran = train("precision=bf16", f"method.name={method}")
    assert result(ran)["precision"] == "bf16"
    assert rows(ran)[-1]["loss"] < 1.0


def test_a_run_is_not_continued_in_another_precision(train):
    train("schedule.max_steps=20")
    with pytest.raises(UserError, match="precision: fp32 -> bf16"):
        train("precision=bf16")


def test_evaluations_are_in_float32(train, monkeypatch, settings):
    from stn_fast.training import task

    seen, scores = [], task.classification_scores
    monkeypatch.setattr(
        task,
        "classification_scores",
        lambda *given: seen.append((newer()[1], torch.is_autocast_enabled("cpu"))) or scores(*given),
    )
    train("precision=tf32", "schedule.max_steps=3")
    assert set(seen) == {("ieee", False)}


ALWAYS = {"fp32": "fp32", "tf32": "tf32", "bf16": "bf16"}


@pytest.mark.parametrize(("device", "auto"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_auto_is_the_precision_of_the_device_and_an_explicit_one_stays(device, auto):
    found = {
        name: resolve(digits.config(), None, [f"precision={name}"], {"device": device}).precision
        for name in ("auto", *ALWAYS)
    }
    assert found == {"auto": auto, **ALWAYS}


def test_one_s_own_configuration_stays_in_float32_on_cuda():
    ours = digits.config()
    assert Config(recipe="mine", hyperparameters=ours.hyperparameters, device="cuda").resolved.precision == "fp32"


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_a_method_is_built_in_the_precision_of_the_device(device, precision):
    config = digits.config()  # `auto`, as no layer has resolved it
    assert build_method(replace(config, device=device), digits.build(config)).precision == precision


def test_a_run_records_the_precision_that_replaced_auto(make_config):
    config = replace(make_config("schedule.max_steps=20"), precision="auto")
    assert run(config, digits.build)["precision"] == "fp32"
    directory = Path(config.directory)
    assert result(directory)["precision"] == read_yaml(str(directory / "config.yaml"))["precision"] == "fp32"


def test_a_run_with_auto_resumes_only_in_the_same_precision(make_config):
    config = make_config("precision=fp32", "schedule.max_steps=20")
    done = run(config, digits.build)
    assert run(replace(config, precision="auto"), digits.build) == done  # finished, and read back
    run(replace(config, precision="bf16"), digits.build, resume=False)
    with pytest.raises(UserError, match="precision: bf16 -> fp32"):
        run(replace(config, precision="auto"), digits.build)


def test_configurations_differ_in_the_precision_that_they_resolve_to():
    config = digits.config()
    assert config.precision == "auto"
    assert differences(config, replace(config, precision="fp32")) == []
    there = replace(config, device="cuda")
    assert differences(replace(there, precision="fp32"), there) == ["precision: fp32 -> bf16"]
