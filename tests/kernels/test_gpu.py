"""What only a GPU shows: large problems, CUDA graphs, the autotuner's own clock, devices other than the current one."""

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast.kernels import autotune
from stn_fast.kernels import gated_linear as gated
from stn_fast.kernels import random as draws
from stn_fast.kernels.augment import augment
from stn_fast.kernels.autotune import Autotuner
from stn_fast.kernels.dropout import dropout
from stn_fast.kernels.perturb import perturb_forward
from stn_fast.ops import augment as definition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(gated, "tuner", Autotuner())


def operands(batch, inputs, outputs, n, outer, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    rows = outer * batch
    shapes = [(rows, inputs), (outputs, inputs), (outputs,), (outputs, inputs), (outputs,), (outputs, n), (outputs, n)]
    shapes += [(batch, n), (rows, outputs)]
    scales = [1, inputs**-0.5, 1, inputs**-0.5, 1, n**-0.5, n**-0.5, 1, 1]
    *tensors, dy = (
        (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    return tensors, dy


def plain(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h):
    i_example = torch.arange(x.shape[0], device=x.device) % h.shape[0]
    y = x @ weight.T + bias + (h @ weight_gate.T)[i_example] * (x @ response_weight.T)
    return y + ((h @ bias_gate.T) * response_bias)[i_example]


def plain_gradients(tensors, dy, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = plain(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4096, 1024, 1024, 15, 1), (40, 650, 2600, 7, 70), (128, 784, 1000, 15, 1), (513, 80, 144, 17, 3)],
    ids=str,
)
def test_every_candidate_is_right_at_the_sizes_of_real_layers(shape, dtype):
    tensors, dy = operands(*shape, dtype)
    outer = shape[4]
    (y_plain, in_dtype), (y_exact, exact) = (plain_gradients(tensors, dy, d) for d in (dtype, torch.float64))
    names = ["library", *gated._Problem(tensors[0], tensors[1], tensors[7], 1).configs]
    x, weight, _, response_weight, response_bias, weight_gate, bias_gate, h = tensors
    for name in names:
        y, q = gated.forward(*tensors, outer, 1, True, config=name)
        assert_twice_as_good(y, y_plain, y_exact, f"y, {name}")
        got = gated.backward(
            dy,
            x,
            weight,
            response_weight,
            response_bias,
            weight_gate,
            bias_gate,
            h,
            q,
            outer,
            1,
            (True,) * 8,
            config=name,
        )
        for i, three in enumerate(zip(got, in_dtype, exact, strict=True)):
            assert_twice_as_good(*three, f"gradient {i}, {name}")


def test_the_autotuner_times_real_candidates_and_remembers():
    tensors, dy = operands(512, 256, 256, 15, 1, torch.bfloat16)
    y, q = gated.forward(*tensors, 1, 1, True)
    x, weight, _, response_weight, response_bias, weight_gate, bias_gate, h = tensors
    gated.backward(dy, x, weight, response_weight, response_bias, weight_gate, bias_gate, h, q, 1, 1, (True,) * 8)
    remembered = autotune.cache_file().read_text()
    for op in ("forward", "dx", "dw", "backward"):
        assert f"gated_linear {op} " in remembered
    again, _ = gated.forward(*tensors, 1, 1, True)
    assert torch.equal(y, again)
    assert autotune.cache_file().read_text() == remembered


def test_the_same_inputs_give_the_same_bits():
    tensors, dy = operands(700, 96, 80, 15, 3, torch.bfloat16)
    x, weight, _, response_weight, response_bias, weight_gate, bias_gate, h = tensors
    for name in ("library", *gated._Problem(x, weight, h, 1).configs):
        runs = []
        for _ in range(2):
            y, q = gated.forward(*tensors, 3, 1, True, config=name)
            tail = response_weight, response_bias, weight_gate, bias_gate, h, q, 3, 1, (True,) * 8
            runs.append([y, *gated.backward(dy, x, weight, *tail, config=name)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), name


def test_a_captured_graph_draws_fresh_numbers_at_every_replay():
    x = torch.ones(1, 64, 1, 256, device="cuda")
    rate, step = torch.full((64,), 0.5, device="cuda"), torch.tensor(0, device="cuda")
    location, raw_scale, center = torch.zeros(3, 5, device="cuda")
    table = torch.tensor([[3.0, 0, 1, 0, 1, 0]] * 5, device="cuda")

    def run():
        dropped = dropout(x, rate, step, 7, 1, 0, (1, 64, 1, 256), (0, 0, 1))
        sample, response = torch.empty(5, 64, device="cuda"), torch.empty(64, 5, device="cuda")
        perturb_forward(location, raw_scale, center, table, step, sample, response, None, 7, 0, -4.0, 3.0)
        return dropped, sample, draws.draw("normal", 8, 256, step, 7, 2)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    replays = []
    for value in (1, 2, 1):
        step.fill_(value)
        graph.replay()
        replays.append([t.clone() for t in captured])
        assert all(torch.equal(a, b) for a, b in zip(replays[-1], run(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(replays[0], replays[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(replays[0], replays[2], strict=True))


def test_an_unseen_problem_is_captured_without_being_timed():
    tensors, _ = operands(64, 64, 64, 15, 1, torch.bfloat16)
    gated.forward(*tensors, 1, 1, True, config="library")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = gated.forward(*tensors, 1, 1, True)
    graph.replay()
    assert torch.equal(y, gated.forward(*tensors, 1, 1, True, config="library")[0])
    assert not autotune.cache_file().exists()


def augmented(x, most, step):
    """All strengths at random below `most`, with what the definition gives in float32 and float64."""
    generator = torch.Generator().manual_seed(0)
    strengths = {name: value * torch.rand(len(x), generator=generator) for name, value in most.items()}
    table, mean, std = torch.stack(list(strengths.values())), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    where = dict(seed=7, stream=2, first_example=3)
    geometry = dict(flip=0.5, crop_padding=4)
    got = augment(x.to(step.device), table.to(step.device), 2**13 - 1, mean, std, step=step, **where, **geometry)
    draws = definition.draw(x, 2**13 - 1, step.cpu(), **where)
    return got, *(
        definition.reference(x, strengths, draws, mean, std, **geometry, dtype=d)
        for d in (torch.float32, torch.float64)
    )


@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (2, 3, 224, 224), (3, 3, 31, 33)], ids=str)
def test_augmentation_at_the_sizes_of_real_images_is_as_defined(shape):
    most = dict.fromkeys(definition.STRENGTHS, 0.5) | dict(rotation=40, shear=30, cutout_length=17, cutout_holes=4)
    coarse = torch.rand(*shape[:2], 8, 8, generator=torch.Generator().manual_seed(1))
    x = (255 * torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear")).round().to(torch.uint8)
    got, plain, exact = augmented(x, most, torch.tensor(4, device="cuda"))
    assert_twice_as_good(got, plain, exact)
    assert torch.equal(got.cpu() == 0, plain == 0)


def test_a_captured_augmentation_draws_fresh_numbers_at_every_replay():
    x, table = (
        torch.full((8, 3, 32, 32), 100, dtype=torch.uint8, device="cuda"),
        torch.full((13, 8), 0.4, device="cuda"),
    )
    step = torch.tensor(0, device="cuda")

    def run():
        return augment(x, table, 2**13 - 1, (0.5,) * 3, (0.25,) * 3, 7, step, 1, 0, 0.5, 4)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    replays = []
    for value in (1, 2):
        step.fill_(value)
        graph.replay()
        replays.append(captured.clone())
        assert torch.equal(captured, run())
    assert not torch.equal(*replays)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    tensors, _ = operands(64, 64, 64, 15, 1, torch.bfloat16)
    elsewhere = [t.to("cuda:1") for t in tensors]
    with torch.cuda.device(0):
        for config in ("library", *gated._Problem(tensors[0], tensors[1], tensors[7], 1).configs):
            got, _ = gated.forward(*elsewhere, 1, 1, True, config=config)
            assert got.device == elsewhere[0].device
            assert torch.equal(got.cpu(), gated.forward(*tensors, 1, 1, True, config=config)[0].cpu())


def test_more_than_2_to_the_31_elements_are_addressed():
    x = torch.ones(1, 3, 1, 2**30, dtype=torch.float16, device="cuda")
    rate, step = torch.tensor([0.0, 1.0, 0.0], device="cuda"), torch.tensor(0, device="cuda")
    y = dropout(x, rate, step, 7, 1, 0, (1, 3, 1, 2**30), (0, 0, 1))
    assert torch.equal(y[0, 2], x[0, 2])
    assert not y[0, 1].any()
