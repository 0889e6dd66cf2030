"""The cost model counts the arithmetic that the networks do, and a launch takes what its slowest part takes."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flops import flops_of
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_model as model
from benchmarks import language_steps, plain, steps, whole_steps
from benchmarks.aims import AIMS, Rows
from benchmarks.baselines import Limit
from benchmarks.cases import Case, all_cases, gated_linear_inputs
from benchmarks.cost_model import H100, H200, Machine, Work, operations
from benchmarks.sequence_cases import gated_lstm_inputs, sequence_limit
from stn_fast.kernels.gated_conv2d_backward import epilogue_partials
from stn_fast.kernels.gated_conv2d_gates import gates, gates_backward
from stn_fast.ops import products
from stn_fast.ops.gates import Wanted
from stn_fast.training.methods import SelfTuning

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
RESULTS, README = BENCHMARKS / "results", (BENCHMARKS / "README.md").read_text()
SHAPE = (5, 4, 16, 40)  # of the language model: T, B, H, words


@pytest.fixture
def counted(monkeypatch):
    """`flops_of`, with every product torch's own: those of other libraries are not counted."""
    monkeypatch.setattr(products, "library", lambda: "torch.mm")
    return flops_of


def bare(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_products_of_linear_layers_are_those_of_the_limit() -> None:
    case = Case("gated_linear", "full", (6, 5, 4), torch.float32, CPU)
    (x, weight, _, response_weight, *_), dy = gated_linear_inputs(case)
    limit = Limit.of(x, weight, response_weight, dy, dy)
    whole = bare(lambda: (limit.forward_one(), limit.backward_one(weights=True)))
    assert operations(model.linear(*case.shape, 2)) == whole
    assert operations(model.gated_linear(*case.shape)) == whole
    valid = bare(lambda: (limit.forward_one(), limit.backward_one(weights=False)))
    assert operations(model.linear(*case.shape, 2, dw=False)) == valid


@pytest.mark.parametrize("shape", [(2, 3, 8, 8, 4, 3, 2), (2, 5, 9, 9, 6, 3, 1), (2, 5, 9, 9, 6, 1, 2)])
def test_products_of_convolutions_are_those_of_the_bare_one(shape) -> None:
    case = Case("gated_conv2d_alexnet", "train", shape, torch.float32, CPU, compiled=False)
    limit = case.providers()["limit_one_convolution"]
    assert operations(model.convolution(shape, 2)) == bare(lambda: limit.call(None))
    assert operations(model.gated_convolution(shape)) == operations(model.convolution(shape, 2))


@pytest.mark.parametrize("outputs", [20, 130])
def test_gates_of_convolutions_have_the_bytes_of_their_tensors(outputs) -> None:
    shape = (2, 3, 30, 30, outputs, 3, 2)
    batch, n, bf16 = 2, model.HYPERPARAMETERS, torch.bfloat16
    h = torch.zeros(batch, n, dtype=bf16)
    weight_gate, bias_gate = torch.zeros(2, outputs, n, dtype=bf16)
    bias, response_bias = torch.zeros(2, outputs, dtype=bf16)
    images = torch.zeros(batch, outputs, 15, 15, dtype=bf16).to(memory_format=torch.channels_last)
    scale, shift = gates(bias, response_bias, weight_gate, bias_gate, h)
    tables = epilogue_partials(images, None, images[:, None], scale, 1, False, False, True, True)[1:]
    assert len(tables[0]) > 1
    *gradients, dh = gates_backward(
        *tables, response_bias, weight_gate, bias_gate, h, Wanted(*[True] * len(Wanted._fields))
    )
    used = (
        (bias, response_bias, weight_gate, bias_gate, h, scale, shift),
        (*tables, h, response_bias, bias_gate, *gradients),
        (*tables, weight_gate, response_bias, bias_gate, dh),
    )
    assert [work.bytes for work in model.conv_gates(shape)] == [sum(t.nbytes for t in tensors) for tensors in used]


def test_products_of_lstms_are_those_of_the_limit() -> None:
    case = Case("gated_lstm", "full", (4, 3, 6), torch.float32, CPU)
    limit = sequence_limit(gated_lstm_inputs(case)[0])
    whole = bare(lambda: (limit.forward_one(), limit.backward_one(weights=True, first_state=True)))
    assert operations(model.lstm(*case.shape, 2)) == whole
    assert operations(model.lstm(*case.shape, 1)) == whole / 2


def test_a_plain_alexnet_step_has_the_arithmetic_of_the_model() -> None:
    training = plain.Training(plain.alexnet(), partial(torch.optim.SGD, lr=0.1), 1.0)
    images, targets = torch.randn(2, 3, 32, 32), torch.arange(2)
    assert flops_of(lambda: training.step(images, targets)) == operations(model.alexnet_step(2, 1))
    assert sum(p.numel() for p in training.model.parameters()) == model.alexnet_parameters(1)


@pytest.mark.parametrize(
    ("mode", "plan"), [("train", model.alexnet_step(2, 2)), ("valid", model.alexnet_validation(2))]
)
def test_self_tuning_alexnet_steps_add_the_products_with_gates_alone(mode, plan, counted) -> None:
    provider = steps.makers(mode, 2, CPU, "fp32", None)["stn_fast"]()
    beyond = counted(lambda: provider.call(None)) - operations(plan)
    outputs = sum(plain.CHANNELS[1:]) + sum(plain.FULLY_CONNECTED[1:])
    gates = 2 * 2 * 15 * outputs  # one product of (2, 15) hyperparameters with one of the two gates of every layer
    # That of the gates with the mean of h hᵀ, by which a training step divides the response's gradients.
    squares = 2 * 15**2 * (2 * outputs + 2) if mode == "train" else 0
    assert squares < beyond <= 6 * gates + squares


def first_steps(branches: int) -> int:
    """Products for the gradient of the state before the first step, which no step needs."""
    _, batch, width, _ = SHAPE
    return language_steps.LAYERS * 2 * batch * width * 4 * width * branches


def test_a_plain_language_step_has_the_arithmetic_of_the_model() -> None:
    window, batch, width, words = SHAPE
    # In float64, whose LSTM is not one uncounted operation.
    network = plain.LanguageModel(words, width, language_steps.LAYERS, batch).double()
    training = plain.Training(network, language_steps.sgd, 1.0)
    tokens, targets = torch.randint(words, (2, window, batch))
    counted = flops_of(lambda: training.step(tokens, targets))
    assert counted == operations(model.language_step(*SHAPE, 1)) - first_steps(1)
    assert sum(p.numel() for p in network.parameters()) == model.language_parameters(width, words, 1)


def test_self_tuning_language_steps_add_the_products_with_gates_alone(counted) -> None:
    from stn_fast.data.text import predictions
    from stn_fast.models import LanguageModel, tuned
    from stn_fast.recipes import recipe
    from stn_fast.training import language
    from stn_fast.training.spaces import build_space
    from stn_fast.training.streams import Streams

    window, batch, width, words = SHAPE
    space = build_space(recipe("ptb").config())
    text = Streams(predictions(torch.randint(words, (8 * window * batch,)), 0), batch, window, seed=0, stream=0)

    def method(dtype: torch.dtype) -> SelfTuning:
        network = tuned(LanguageModel(words, width, width, language_steps.LAYERS), space).to(dtype)
        losses = language.regularised_next_word_loss, language.next_word_loss
        return whole_steps.self_tuning(network, space, losses, "fp32", optimizer=language_steps.sgd, tune_scales=False)

    train = counted(lambda: method(torch.float32).train_step(text[0], 0))
    gates = 2 * batch * len(space) * (width + language_steps.LAYERS * 2 * 4 * width)
    assert 0 < train - (operations(model.language_step(*SHAPE, 2)) - first_steps(2)) <= 6 * gates
    # Folded: one row of gates, and torch's own LSTM, which in float32 is one uncounted operation.
    valid = counted(lambda: method(torch.float64).valid_step(text[0], 1))
    assert 0 < valid - (operations(model.language_validation(*SHAPE)) - first_steps(1)) <= 6 * gates / batch


def test_a_launch_takes_what_its_slowest_part_takes() -> None:
    machine = Machine("round figures", 1e12, 1e9, on_chip=1e10, multiprocessors=100, launch=1e-3, barrier=1e-4)
    for work, seconds in {
        Work("arithmetic", operations=2e12, bytes=1): 2 + 1e-3,
        Work("few tiles", operations=2e12, tiles=50): 4 + 1e-3,
        Work("memory", operations=1, bytes=3e9): 3 + 1e-3,
        Work("on the chip", on_chip=5e10): 5 + 1e-3,
        Work("nothing", repeats=7): 7e-3,
        Work("steps of one launch", on_chip=1e10, repeats=10, persistent=True): 10 * (1 + 1e-4),
    }.items():
        assert machine.seconds([work]) == pytest.approx(seconds), work.name
    assert machine.seconds([Work("a", bytes=1e9), Work("b", bytes=2e9)]) == pytest.approx(3.002)
    assert model.launches([Work("a", repeats=3), Work("b", repeats=9, persistent=True)]) == 4


def test_measured_rates_take_the_place_of_assumed_ones() -> None:
    content = {
        "name": "NVIDIA H200",
        "copy_bytes_per_second": 4e12,
        "product_operations_per_second": {"bf16": 7e14, "tf32": 1e14},
        "multiprocessors": 131,
    }
    measured = model.measured_machine(content)
    assert (measured.operations, measured.bandwidth, measured.multiprocessors) == (7e14, 4e12, 131)
    assert measured.name == "NVIDIA H200, measured rates"
    broken = model.measured_machine({"name": "NVIDIA H200", "copy_bytes_per_second": None})
    assert (broken.operations, broken.bandwidth) == (H200.operations, H200.bandwidth)
    assert "assumed" in broken.name
    for predict in model.PREDICTIONS.values():  # twice the machine: half the time, but for launches
        fast = replace(H100, operations=2 * H100.operations, bandwidth=2 * H100.bandwidth, on_chip=2 * H100.on_chip)
        assert predict(H100).ours / 2 <= predict(fast).ours <= predict(H100).ours


def test_every_aim_has_a_prediction_and_every_aim_a_case_on_cuda() -> None:
    assert set(model.PREDICTIONS) == {aim.key for aim in AIMS}
    rows = []
    for case in all_cases(torch.device("cuda")):
        common = {"op": case.op, "mode": case.mode, "shape": list(case.shape), "p50": 2.0, "launches": 1}
        ratios = {"ratio_to_limit": 1.5, "ratio_to_plain": 1.5}
        dtype = str(case.dtype).removeprefix("torch.")
        rows += [common | ratios | {"provider": name, "dtype": dtype} for name in ("stn_fast", "eager")]
    found = {aim.key for aim in AIMS if aim.figure(Rows(rows)) is not None}
    assert found == {aim.key for aim in AIMS} - {"cycle alexnet", "cycle lstm"}  # those are of whole steps


def test_no_product_on_the_cpu_was_faster_than_its_two_cores_can_be() -> None:
    """The operations of the model by the times recorded: a wrong count shows as a rate that no such core has, or as
    rates that differ by far."""
    plans = {"gated_linear": lambda s: model.linear(*s, 2), "gated_lstm": lambda s: model.lstm(*s, 2)}
    plans |= dict.fromkeys(("gated_conv2d_alexnet", "gated_conv2d_resnet18"), lambda s: model.convolution(s, 2))
    rates = {}
    for row in json.loads((RESULTS / "cpu.json").read_text()):
        if row["mode"] == "train" and row["provider"] in ("limit_one_product", "limit_one_convolution"):
            rate = operations(plans[row["op"]](row["shape"])) / (row["p50"] * 1e-6)
            rates.setdefault(row["op"], []).append(rate)
    assert set(rates) == set(plans)
    # Two threads, at most 2 · 16 fused multiply-adds a cycle and 5 GHz each.
    assert max(map(max, rates.values())) < 2 * 64 * 5e9
    for large in rates["gated_linear"]:
        assert large > 20e9
    middle = [math.exp(sum(map(math.log, of_one)) / len(of_one)) for of_one in rates.values()]
    assert max(middle) < 4 * min(middle)


def test_cycles_on_the_cpu_cost_what_their_arithmetic_says() -> None:
    """And benchmarks/README.md says what was recorded."""
    # Only products take time there: one thread, no launches.
    cpu = Machine("a CPU", 7e10, math.inf, on_chip=math.inf, multiprocessors=1, launch=0, barrier=0)
    ratios = {}
    for row in json.loads((RESULTS / "cycles-cpu.json").read_text()):
        ratios[row["op"], tuple(row["shape"]), row["provider"]] = row["ratio_to_plain"]
    predicted = {("alexnet_step", (128, 3, 32, 32)): model.PREDICTIONS["cycle alexnet"]}
    for shape in language_steps.SHAPES.values():
        train, valid = model.language_step(*shape, 2), model.language_validation(*shape)
        predicted["language_step", shape] = model.cycle(train, valid, model.language_step(*shape, 1))
    said = README[README.index("A 2:1 cycle in units") :].partition("\n- ")[0]
    numbers = [float(number) for number in re.findall(r"\d\.\d\d", said)]
    measured = [ratios[(*key, "stn_fast")] for key in predicted]
    published = [ratios[(*key, "published")] for key in predicted if (*key, "published") in ratios]
    of_model = [predict(cpu).figure for predict in predicted.values()]
    for ratio, prediction in zip(measured, of_model, strict=True):
        assert 0.8 * prediction < ratio < 1.25 * prediction
    np.testing.assert_allclose(numbers, [*measured, *published, *of_model], atol=0.0051)


def test_the_command_prints_a_line_for_each_aim(capsys, tmp_path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"name": "some GPU", "copy_bytes_per_second": 1e12}))
    assert model.main(["--measured", str(file), "--rows", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("some GPU, some assumed rates")
    assert len(lines) == 2 + len(AIMS)
    with pytest.raises(SystemExit):
        model.main(["--measured", str(tmp_path / "missing.json")])
