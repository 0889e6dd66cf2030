"""Plain training is that of the package's networks, and a cycle is compared with what it is said to be."""

import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from recorded_graphs import RecordedGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import language_steps, plain, steps, whole_steps
from benchmarks.timing import Timings, Turns
from stn_fast.models import LanguageModel, alexnet, tuned
from stn_fast.recipes import recipe
from stn_fast.training import capture
from stn_fast.training.methods import default_optimizer
from stn_fast.training.spaces import build_space
from stn_fast.training.task import outputs

WORDS, WIDTH, BATCH, LAYERS = 13, 6, 3, 2


def at_zero(space, batch):
    """Hyperparameters to which nothing responds."""
    hyper = space.at(space.initial_state()[0], batch_size=batch)
    hyper.response = torch.zeros(batch, len(space))
    return hyper


def test_the_plain_alexnet_is_the_self_tuning_one_without_its_response() -> None:
    space = build_space(recipe("cifar10").config())
    ours, theirs = tuned(alexnet(), space).eval(), plain.alexnet().eval()
    gated = [module for module in ours.modules() if hasattr(module, "response_weight")]
    layers = [module for module in theirs.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    for mine, other in zip(gated, layers, strict=True):
        other.load_state_dict({"weight": mine.weight, "bias": mine.bias})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), outputs(ours, at_zero(space, 2), x), rtol=1e-3, atol=1e-4)
    rates = [module.p for module in theirs.modules() if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d)]
    config = recipe("cifar10").config().hyperparameters
    assert rates == [rate.init for name, rate in config.items() if name.startswith(("conv_dropout", "fc_dropout"))]


def language_model() -> plain.LanguageModel:
    torch.manual_seed(0)
    return plain.LanguageModel(WORDS, WIDTH, LAYERS, BATCH)


def test_the_plain_language_model_is_the_self_tuning_one_without_its_response() -> None:
    space = build_space(recipe("ptb").config())
    ours, theirs = tuned(LanguageModel(WORDS, WIDTH, WIDTH, LAYERS), space).eval(), language_model().eval()
    with torch.no_grad():
        theirs.embedding.weight.copy_(ours.embedding.weight)
        theirs.decoder_bias.copy_(ours.decoder.bias)
        for name, parameter in theirs.lstm.named_parameters():
            parameter.copy_(ours.lstm[int(name[-1])].get_parameter(f"{name[:-1]}0"))
        tokens, state = torch.randint(WORDS, (5, BATCH)), None
        for _ in range(2):  # the state is carried on
            want = outputs(ours, at_zero(space, BATCH), tokens, state)
            state = want.state
            torch.testing.assert_close(theirs(tokens), want.logits, rtol=1e-3, atol=1e-5)


class NoHostReads(TorchDispatchMode):
    """What a graph can't hold: a number that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


def trainings():
    torch.manual_seed(0)
    images, words = torch.randn(4, 3, 32, 32), torch.randint(WORDS, (2, 5, BATCH))
    yield plain.Training(plain.alexnet(), default_optimizer, 1.0), (images, torch.arange(4))
    yield plain.Training(language_model(), language_steps.sgd, 0.25), (words[0], words[1])


@pytest.mark.parametrize("which", [0, 1], ids=["alexnet", "language"])
def test_plain_steps_learn_and_can_be_captured(which) -> None:
    """A replay reads and writes the addresses that were captured, and nothing asks the device for a number."""
    training, batch = list(trainings())[which]
    losses = [training.step(*batch).item() for _ in range(2)]

    def places():
        tensors = [*training.model.parameters(), *training.model.buffers()]
        momenta = [t for state in training.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return [tensor.data_ptr() for tensor in (*tensors, *momenta)]

    before = places()
    with NoHostReads():
        training.step(*batch)
    assert places() == before
    losses += [training.step(*batch).item() for _ in range(3)]
    assert losses[-1] < losses[0]


class Graphs:
    """Runs again what was captured."""

    captures = 0

    def warm(self, run):
        run()

    def capture(self, prepare, call, calls):
        self.captures += 1
        states = [prepare() for _ in range(calls)]
        return lambda: [call(state) for state in states]


def test_a_captured_step_reads_the_batch_that_it_is_given() -> None:
    (training, (images, targets)), _ = trainings()
    training.model.eval()  # no dropout, so that a loss is a function of the batch
    step = training.captured(Graphs(), images, targets)
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(training.model(2 * images), targets.flip(0))
    torch.testing.assert_close(step(2 * images, targets.flip(0)), want)


@pytest.mark.parametrize(
    ("mode", "ours", "theirs"),
    [("train", "t", "t"), ("valid", "v", "t"), ("cycle", "ttv", "tt"), ("train_with_data", "t", "t")],
)
def test_a_turn_is_the_steps_of_its_mode(mode, ours, theirs) -> None:
    """Two training and one validation step against two plain training steps."""
    taken: list[str] = []

    def train() -> None:
        taken.append("t")

    whole_steps.steps_of(mode, train, lambda: taken.append("v")).call(None)
    assert "".join(taken) == ours
    taken.clear()
    whole_steps.steps_of(mode, train, None).call(None)
    assert "".join(taken) == theirs


def test_a_captured_method_that_takes_its_steps_one_by_one_is_not_called_captured(capsys) -> None:
    names, reasons = ("stn_fast", "stn_fast_captured"), []
    timings = Timings(names, np.ones((3, 2)), {name: Turns(float) for name in names})
    providers = {"stn_fast": whole_steps.steps_of("cycle", float, float)}
    providers["stn_fast_captured"] = whole_steps.steps_of("cycle", float, float, reasons)
    whole = ("x", "cycle", (1,), "bf16", providers, timings, torch.device("cpu"))
    assert [row["captured"] for row in whole_steps.rows_of(*whole)] == [None, True]
    reasons.append("train_step is not captured: it reads a number")
    rows = whole_steps.rows_of(*whole)
    assert [row["captured"] for row in rows] == [None, False]
    whole_steps.print_steps("x", "cycle", rows, providers, timings)
    assert "not captured: train_step is not captured" in capsys.readouterr().out


def test_captured_steps_are_compared_with_captured_plain_ones() -> None:
    names = ("stn_fast", "stn_fast_captured", "plain", "plain_captured")
    timings = Timings(names, np.array([[8.0, 3.0, 4.0, 1.0]] * 3), {name: Turns(float) for name in names})
    providers = {name: whole_steps.steps_of("cycle", float, float) for name in names}
    rows = whole_steps.rows_of("x", "cycle", (1,), "bf16", providers, timings, torch.device("cpu"))
    assert [row["ratio_to_plain"] for row in rows] == [2, 3, 1, 1]
    assert [row["ratio_to_eager"] for row in rows] == [None] * 4
    assert {row["dtype"] for row in rows} == {"bfloat16"}


SMALL = ["--seconds", "0", "--rounds", "2"]


@pytest.mark.parametrize(
    ("command", "own", "precision"),
    [
        (language_steps, ["--sizes", "ptb"], "fp32"),
        (language_steps, ["--sizes", "ptb"], "tf32"),
        (language_steps, ["--sizes", "ptb"], "bf16"),
        (steps, ["--batch", "2"], "bf16"),
    ],
)
def test_commands_measure_cycles_in_a_precision(command, own, precision, tmp_path, capsys, monkeypatch) -> None:
    if command is language_steps and precision == "bf16":
        try:
            with torch.autocast("cpu", torch.bfloat16):
                torch.nn.LSTM(6, 6)(torch.zeros(5, 2, 6))
        except RuntimeError as error:
            pytest.skip(f"torch has no LSTM in bfloat16 for this CPU: {error}")
    monkeypatch.setitem(language_steps.SHAPES, "ptb", (5, 2, 6, 13))
    monkeypatch.setattr(sys.modules[alexnet.__module__], "HIDDEN", (64, 64))
    before = torch.backends.cudnn.rnn.fp32_precision
    file = tmp_path / "rows.json"
    flags = ["--modes", "cycle", "--precision", precision, "--providers", "stn_fast", "plain", "--json", str(file)]
    assert command.main([*flags, *own, *SMALL]) == 0
    rows = {row["provider"]: row for row in json.loads(file.read_text())}
    assert set(rows) == {"stn_fast", "plain"}
    assert rows["stn_fast"]["ratio_to_plain"] > 0
    assert rows["stn_fast"]["precision"] == precision
    assert "ratio to plain" in capsys.readouterr().out
    assert torch.backends.cudnn.rnn.fp32_precision == before


def test_bf16_steps_multiply_in_bfloat16_and_keep_their_weights_in_float32() -> None:
    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.dtypes = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.addmm.default:
                self.dtypes.add(args[1].dtype)
            return function(*args, **(kwargs or {}))

    cast = whole_steps.casting("bf16", torch.device("cpu"))
    training = plain.Training(plain.alexnet(), default_optimizer, 1.0, cast)
    with Products() as products:
        training.step(torch.randn(2, 3, 32, 32), torch.arange(2))
    assert products.dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}


def test_plain_captured_takes_part_where_graphs_can_be_made(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(language_steps.SHAPES, "ptb", (5, 2, 6, 13))
    for command, own in ((steps, ["--batch", "2"]), (language_steps, ["--sizes", "ptb"])):
        file, graphs = tmp_path / "rows.json", Graphs()
        flags = ["--modes", "train", "--providers", "plain", "plain_captured", "--json", str(file)]
        assert command.main([*flags, *own, *SMALL], graphs=graphs) == 0
        rows = {row["provider"]: row for row in json.loads(file.read_text())}
        assert rows["plain_captured"]["ratio_to_plain"] == 1
        assert [rows[name]["captured"] for name in ("plain", "plain_captured")] == [None, True]
        assert graphs.captures == 1


@pytest.mark.parametrize("can_capture", [True, False])
def test_captured_self_tuning_takes_part_and_says_whether_it_was(can_capture, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(language_steps.SHAPES, "ptb", (5, 2, 6, 13))
    if can_capture:
        monkeypatch.setattr(capture, "captures", lambda device: True)
        monkeypatch.setattr(capture, "CudaGraphs", lambda device: RecordedGraphs())
    file, names = tmp_path / "rows.json", ["stn_fast_captured", "plain_captured"]
    flags = ["--sizes", "ptb", "--modes", "cycle", "--providers", *names, "--json", str(file), *SMALL]
    with nullcontext() if can_capture else pytest.warns(RuntimeWarning, match="not captured"):
        assert language_steps.main(flags, graphs=Graphs()) == 0
    rows = {row["provider"]: row for row in json.loads(file.read_text())}
    assert rows["stn_fast_captured"]["captured"] is can_capture
    assert rows["stn_fast_captured"]["ratio_to_plain"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
@pytest.mark.parametrize("command", [steps, language_steps])
def test_cuda_is_refused_in_one_line_where_there_is_none(command, capsys) -> None:
    assert command.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
