"""Tensors whose memory alone doesn't say what they hold, given to every operation as operand and as gradient."""

import ast
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from numerics import assert_twice_as_good, relative_error
from torch.utils.checkpoint import checkpoint

import stn_fast as stn
from stn_fast import functional as SF
from stn_fast.ops import dropout, gated_conv2d, gated_embedding, gated_linear, gated_lstm, memory, noise, perturb
from stn_fast.ops.memory import address, plain_strides
from stn_fast.ops.operation import Operation

ROOT = Path(stn.__file__).parent
WHERE = dict(seed=3, step=5, stream=7)
SPACE = stn.HyperparameterSpace([stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.4)])
TOKENS = torch.tensor([[0, 3, 3], [8, 1, 0], [2, 2, 7], [5, 6, 4]])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lstm(x, h_0, c_0, *rest):
    y, (h_n, c_n) = SF.gated_lstm(x, h_0, c_0, SF.GatedParameters(*rest[:6]), SF.GatedParameters(*rest[6:12]), rest[12])
    return torch.cat([y.flatten(), h_n.flatten(), c_n.flatten()])


def perturbed(location, raw_scale):
    center, table = torch.zeros(1), SPACE._table
    values, response = perturb.perturb(location, raw_scale, center, table, step=1, seed=2, batch_size=4)
    return torch.cat([values, response])


def gates(outputs, *weight):
    shapes = (weight, (outputs,), weight, (outputs,), (outputs, 2), (outputs, 2))
    return [drawn(*shape, seed=k) for k, shape in enumerate(shapes)]


# Each operation and its floating point operands.
OPERATIONS = {
    "gated_linear": (SF.gated_linear, [drawn(4, 6), *gates(5, 5, 6), drawn(4, 2)]),
    "gated_conv2d": (SF.gated_conv2d, [drawn(4, 3, 8, 7), *gates(5, 5, 3, 3, 2), drawn(4, 2)]),
    "gated_lstm": (
        lstm,
        [drawn(3, 4, 6), drawn(4, 5), drawn(4, 5, seed=1), *gates(20, 20, 6), *gates(20, 20, 5), drawn(4, 2)],
    ),
    "gated_embedding": (
        lambda *floats: SF.gated_embedding(TOKENS, *floats, rate=torch.tensor([0.3]), **WHERE),
        [drawn(9, 5), drawn(9, 5, seed=1), drawn(5, 2), drawn(4, 2)],
    ),
    "dropout": (lambda x: SF.dropout(x, torch.full((4,), 0.5), **WHERE), [drawn(4, 6)]),
    "noise": (lambda x, scale: SF.noise(x, scale, **WHERE), [drawn(4, 6), drawn(4)]),
    "perturb": (perturbed, [drawn(1), drawn(1, seed=1)]),
}
each_operation = pytest.mark.parametrize(("function", "operands"), OPERATIONS.values(), ids=OPERATIONS.keys())


def leaves(operands):
    return [operand.detach().clone().requires_grad_() for operand in operands]


def gradients(function, operands, dy, around=nullcontext, **options):
    inputs = leaves(operands)
    y = function(*inputs)
    with around():
        return torch.autograd.grad(y, inputs, dy(y) if callable(dy) else dy, allow_unused=True, **options)


def check(got, want, tolerance=1e-6):
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert relative_error(ours, theirs) <= tolerance, f"operand {number}"


def zero_tensor(like):
    """What torch hands a backward pass behind torch.sgn: zeros without memory."""
    leaf = torch.randn(like.shape, dtype=like.dtype, requires_grad=True)
    (zero,) = torch.autograd.grad(torch.sgn(leaf).sum(), leaf)
    assert zero._is_zerotensor()
    return zero


@each_operation
def test_the_sign_of_a_lazily_negated_operand_counts(function, operands):
    for k, operand in enumerate(operands):
        changed, negated = list(operands), list(operands)
        changed[k], negated[k] = -operand, torch._neg_view(operand)
        for recorded in (torch.no_grad, torch.enable_grad):
            with recorded():
                check([function(*negated)], [function(*changed)])


@each_operation
def test_the_sign_of_a_lazily_negated_gradient_counts(function, operands):
    got = gradients(function, operands, lambda y: torch._neg_view(y.detach().cos()))
    check(got, gradients(function, operands, lambda y: -y.detach().cos()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operands are on the CPU")
@each_operation
def test_triton_reads_the_sign_of_a_lazily_negated_operand_and_gradient(function, operands):
    with stn.use_backend("triton"):
        changed, negated = list(operands), list(operands)
        changed[-1], negated[-1] = -operands[-1], torch._neg_view(operands[-1])
        check([function(*negated)], [function(*changed)])
        got = gradients(function, operands, lambda y: torch._neg_view(y.detach().cos()))
        check(got, gradients(function, operands, lambda y: -y.detach().cos()))


def test_an_imaginary_part_of_a_conjugate_is_read_with_its_sign():
    x = torch.complex(drawn(4, 6), drawn(4, 6, seed=1)).conj().imag
    assert x.is_neg()
    function, (_, *rest) = OPERATIONS["gated_linear"]
    check([function(x, *rest)], [function(x.clone(), *rest)])


@each_operation
def test_a_gradient_without_memory_is_zero(function, operands):
    for gradient in gradients(function, operands, zero_tensor):
        assert not gradient.any()


@each_operation
def test_an_operand_without_memory_is_zero(function, operands):
    for k, operand in enumerate(operands):
        without, zeros = list(operands), list(operands)
        without[k], zeros[k] = zero_tensor(operand), torch.zeros_like(operand)
        check([function(*without)], [function(*zeros)])


@each_operation
def test_operands_in_the_middle_of_their_storage_and_with_gaps_are_read_right(function, operands):
    def apart(operand):
        wide = torch.full((*operand.shape, 3), torch.nan)
        wide[..., 1] = operand
        return wide[..., 1]

    def behind(operand):
        return torch.cat([torch.full((5,), torch.nan), operand.flatten()])[5:].view(operand.shape)

    want = function(*operands)
    for move in (apart, behind):
        check([function(*map(move, operands))], [want])
        check(gradients(function, operands, lambda y, m=move: m(y.detach().cos())),
              gradients(function, operands, lambda y: y.detach().cos()))  # fmt: skip


@each_operation
def test_several_gradients_at_once_are_those_one_by_one(function, operands):
    """Under vmap a gradient is a wrapper that has no memory."""
    inputs = leaves(operands)
    y = function(*inputs)
    several = torch.stack([drawn(*y.shape, seed=k) for k in range(3)])
    got = torch.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(several)
    one_by_one = [gradients(function, operands, dy) for dy in several]
    check(got, [torch.stack(parts) for parts in zip(*one_by_one, strict=True)], tolerance=1e-5)


@each_operation
def test_a_trace_computes_what_the_operation_does(function, operands):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(function, tuple(operands), check_trace=False)
        other = [operand * 0.5 for operand in operands]
        check([traced(*other)], [function(*other)])


@each_operation
def test_a_trace_refuses_sizes_that_do_not_fit_together(function, operands):
    if function in (perturbed, OPERATIONS["gated_embedding"][0]):
        pytest.skip("its operands have no size in common that a trace could be given wrong")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(function, tuple(operands), check_trace=False)
        with pytest.raises(Exception, match=r"ValueError.*(traced for|positions of|differ in examples)"):
            traced(torch.cat([operands[0]] * 2, dim=1 if function is lstm else 0), *operands[1:])


@each_operation
def test_a_checkpointed_operation_has_the_same_gradients(function, operands):
    def recomputed(*inputs):
        return checkpoint(function, *inputs, use_reentrant=False)

    check(gradients(recomputed, operands, torch.ones_like), gradients(function, operands, torch.ones_like))


@each_operation
def test_gradients_are_the_same_with_saved_tensor_hooks(function, operands):
    def hooked(*inputs):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
            return function(*inputs)

    if function is OPERATIONS["gated_embedding"][0]:
        pytest.skip("its tokens and step are not floating point")
    got, want = (gradients(f, operands, torch.ones_like) for f in (hooked, function))
    check(got, want)


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_operation
def test_autocast_around_only_the_backward_pass_changes_nothing(function, operands, name, dtype):
    def around():
        return torch.autocast("cpu", dtype=dtype)

    with stn.use_backend(name):
        want = gradients(function, operands, lambda y: y.detach().cos())
        check(gradients(function, operands, lambda y: y.detach().cos(), around=around), want, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gated_linear", "gated_conv2d", "gated_lstm", "gated_embedding"])
def test_autocast_around_the_backward_pass_of_16_bits_changes_nothing(name, dtype):
    function, operands = OPERATIONS[name]
    operands = [operand.to(dtype) for operand in operands]

    def around():
        return torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float16 else torch.float16)

    want = gradients(function, operands, lambda y: y.detach().cos())
    check(gradients(function, operands, lambda y: y.detach().cos(), around=around), want, tolerance=0)


def test_autocast_of_a_device_that_is_neither_cpu_nor_cuda_is_left_alone():
    for function, operands in OPERATIONS.values():
        want = gradients(function, operands, torch.ones_like)
        torch.set_autocast_enabled("xpu", True)
        try:
            check(gradients(function, operands, torch.ones_like), want, tolerance=0)
        finally:
            torch.set_autocast_enabled("xpu", False)


@each_operation
def test_shapes_are_known_on_the_meta_device(function, operands):
    if function is OPERATIONS["dropout"][0]:
        got = SF.dropout(operands[0].to("meta"), torch.empty(4, device="meta"), **WHERE)
    elif function is OPERATIONS["gated_embedding"][0]:
        rate = torch.empty(1, device="meta")
        got = SF.gated_embedding(TOKENS.to("meta"), *(o.to("meta") for o in operands), rate=rate, **WHERE)
    elif function is perturbed:
        hyper = SPACE.sample(*SPACE.initial_state("meta"), batch_size=4, seed=0, step=0)
        got = torch.cat([hyper.values, hyper.response])
    else:
        got = function(*(operand.to("meta") for operand in operands))
    assert got.is_meta
    assert got.shape == function(*operands).shape


def test_augmentation_and_layers_at_one_shared_h_know_shapes_on_the_meta_device():
    def meta(*shape, **kwargs):
        return torch.empty(*shape, device="meta", **kwargs)

    options = dict(num_hyperparameters=2, device="meta")
    images = SF.augment(meta(2, 3, 8, 8, dtype=torch.uint8), {"hue": meta(2)}, mean=(0.0,) * 3, std=(1.0,) * 3, **WHERE)
    assert images.shape == (2, 3, 8, 8)
    assert stn.HyperLinear(6, 5, **options)(meta(4, 6), meta(2)).shape == (4, 5)
    assert stn.HyperConv2d(3, 5, 3, **options)(meta(4, 3, 8, 8), meta(2)).shape == (4, 5, 6, 6)
    assert stn.HyperLSTM(6, 5, **options)(meta(7, 4, 6), meta(2))[0].shape == (7, 4, 5)
    assert stn.HyperEmbedding(9, 5, **options)(meta(4, 3, dtype=torch.int64), meta(2)).shape == (4, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stn.HyperLinear(6, 5, **options)(meta(4, 6), meta(4, 2)).dtype == torch.float32


# (O, I, kh, kw) filters of a convolution with 2 groups, each a view with unusual strides in dimensions of size 1.
ODD_FILTERS = {
    "of a 1-D convolution, channels last": lambda: drawn(10, 2, 3).transpose(1, 2).unsqueeze(-1),
    "of a 1-D convolution": lambda: drawn(10, 3, 2).unsqueeze(-1),
    "of a 1-D convolution, the other way": lambda: drawn(10, 3, 2).unsqueeze(2),
    "expanded": lambda: drawn(1, 3, 2, 2).expand(10, -1, -1, -1),
    "a slice of larger ones": lambda: drawn(10, 6, 4, 4)[:, ::2, 1:3, 1:2],
    "one channel": lambda: drawn(10, 3, 2, 2)[:, 1:2],
    "one channel, channels last": lambda: drawn(10, 2, 2, 3).permute(0, 3, 1, 2)[:, 1:2],
}


@pytest.mark.parametrize("filters", ODD_FILTERS.values(), ids=ODD_FILTERS.keys())
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(9, 7), (1, 7), (7, 1), (19, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unusual_strides_of_dimensions_of_size_1_do_not_matter(filters, last, size, dtype):
    weight, groups = filters().to(dtype), 2
    if weight.shape[2] > size[0] + 2 or weight.shape[3] > size[1] + 2:
        pytest.skip("the filters are larger than the image")
    x = drawn(5, 2 * weight.shape[1], *size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    rest = [drawn(10, weight.shape[1], *weight.shape[2:]).to(dtype), drawn(10, 2).to(dtype), drawn(5, 2).to(dtype)]

    def run(x, weight, response, gate, h):
        return SF.gated_conv2d(x, weight, None, response, None, gate, None, h, groups=groups, padding=1)

    def results(operands):
        inputs = [operand.detach().requires_grad_() for operand in operands]
        y = run(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, y.detach().cos())

    plain = [operand.clone(memory_format=torch.contiguous_format) for operand in (x, weight, *rest)]
    with stn.use_backend("reference"):
        exact, same = results([operand.double() for operand in plain]), results(plain)
    for number, results_of in enumerate(zip(results([x, weight, *rest]), same, exact, strict=True)):
        assert_twice_as_good(*results_of, name=f"result {number}")


def test_strides_become_those_of_the_layout():
    odd = torch.randn(10, 2, 2).transpose(1, 2).unsqueeze(-1)
    for layout, strides in ((torch.channels_last, (4, 1, 2, 2)), (torch.contiguous_format, (4, 2, 1, 1))):
        plain = plain_strides(odd.contiguous(memory_format=layout), layout)
        assert plain.stride() == strides
        assert torch.equal(plain, odd)
    assert plain_strides(plain, torch.contiguous_format) is plain


def test_a_tensor_without_memory_has_no_address():
    zero = zero_tensor(torch.ones(6, 3))
    for tensor in (zero, zero[2]):  # the address of the slice is not 0
        with pytest.raises(RuntimeError, match=r"3,?\) without its numbers in memory"):
            address(tensor)
    assert address(torch.empty(0)) == address(None) == 0


def test_no_address_is_taken_outside_the_gate():
    """kernels/ knows nothing of ops/: its persistent kernel takes addresses of what ops/ has passed on."""
    allowed = {ROOT / "ops" / "memory.py", ROOT.parent / "kernels" / "gated_lstm_persistent.py"}
    for path in {*ROOT.rglob("*.py"), *(ROOT.parent / "kernels").rglob("*.py")} - allowed:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"data_ptr", "untyped_storage", "const_data_ptr", "__array_interface__"}, path


MODULES = [dropout, gated_conv2d, gated_embedding, gated_linear, gated_lstm, noise, perturb]


def test_every_function_that_reaches_a_kernel_passes_the_gate():
    """Operations are registered in operation.py alone, whose functions pass it, or are wrapped where they are."""
    for path in (ROOT / "ops").rglob("*.py"):
        tree = ast.parse(path.read_text())
        gated = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "reads_memory" for d in node.decorator_list)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.library.custom_op":
                assert path.name == "operation.py" or ast.unparse(call.args[1]) in gated, path


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_forward_and_backward_of_an_operation_pass_the_gate(module, monkeypatch):
    """However they are called: by the registration or past it."""
    (made,) = (value for value in vars(module).values() if isinstance(value, Operation))
    passed, functions = [], (made._compute, made._compute_backward)
    for function in functions:
        monkeypatch.setattr(memory, "_autocasts_anywhere", lambda: passed.append(True) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            function(torch.ones(1))
    assert len(passed) == len(functions)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_batched_gradients_are_computed_as_one_by_one(backend, monkeypatch):
    """torch.autograd.grad(..., is_grads_batched=True), whose tensors have no memory either."""
    monkeypatch.undo()  # they can't be filled with NaN
    x, weight, response_weight, h = (torch.randn(size, requires_grad=True) for size in ((4, 5), (5, 5), (5, 5), (4, 2)))
    gate, tokens = torch.randn(5, 2, requires_grad=True), torch.randint(5, (4, 3))
    with stn.use_backend(backend):
        results = {
            "linear": (SF.gated_linear(x, weight, None, response_weight, None, gate, None, h), (x, weight, gate, h)),
            "embedding": (SF.gated_embedding(tokens, weight, response_weight, gate, h), (weight, response_weight, h)),
            "dropout": (SF.dropout(x, torch.full((4,), 0.5), seed=0, step=0, stream=1), (x,)),
        }
        for name, (y, inputs) in results.items():
            dy = torch.randn(3, *y.shape)
            batched = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
            for k in range(3):
                for got, want in zip(batched, torch.autograd.grad(y, inputs, dy[k], retain_graph=True), strict=True):
                    assert relative_error(got[k], want) < 1e-5, name


def test_a_missing_tensor_is_named_in_the_error():
    x, weight, gate, h = (torch.ones(size) for size in ((4, 5), (5, 5), (5, 2), (4, 2)))
    tokens = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="gated_linear: response_weight must be a tensor, got None"):
        SF.gated_linear(x, weight, None, None, None, gate, None, h)
    with pytest.raises(ValueError, match="gated_embedding: response_weight must be a tensor, got None"):
        SF.gated_embedding(tokens, weight, None, gate, h)
    with pytest.raises(TypeError, match="HyperBatch, or its response as a tensor; got NoneType"):
        SF.gated_linear(x, weight, None, weight, None, gate, None, None)


def test_an_embeddings_own_table_may_change_between_forward_and_backward():
    """It isn't kept: only its response is."""
    table, response, gate, h = (torch.randn(size, requires_grad=True) for size in ((6, 4), (6, 4), (4, 2), (3, 2)))
    e = SF.gated_embedding(torch.tensor([[0, 1], [2, 3], [4, 5]]), table, response, gate, h)
    with torch.no_grad():
        table.mul_(2)
    e.sum().backward()
    assert torch.equal(table.grad, torch.ones(6, 4))
