import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import stn_fast as stn
from stn_fast.hyperparameters import SCALE_BOUNDS, inverse_softplus
from stn_fast.ops.perturb import RAW_SCALE_BOUNDS


def space():
    return stn.HyperparameterSpace(
        [
            stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.05, scale=0.5),
            stn.Hyperparameter("cutout_holes", low=0, high=4, init=1, scale=0.5, integer=True),
            stn.Hyperparameter("weight_decay", low=0.0, init=1e-4, scale=0.5, per_example=False),
            stn.Hyperparameter("offset", init=-2.0, scale=1.5),
        ]
    )


def test_initial_state_maps_back_to_what_was_asked_for():
    location, raw_scale = space().initial_state()
    assert space().values(location) == pytest.approx(
        {"dropout": 0.05, "cutout_holes": 1, "weight_decay": 1e-4, "offset": -2.0}, rel=1e-5
    )
    assert space().scales(raw_scale).tolist() == pytest.approx([0.5, 0.5, 0.5, 1.5], rel=1e-5)
    assert location.dtype == raw_scale.dtype == torch.float32


@given(st.floats(1e-35, 1e30))
def test_inverse_softplus_is_stable_for_tiny_and_large_values(y):
    x = inverse_softplus(y)
    back = math.exp(x) if x < -30 else max(x, 0) + math.log1p(math.exp(-abs(x)))
    assert back == pytest.approx(y, rel=1e-9)


@pytest.mark.parametrize("holes", range(1, 24))
def test_an_integer_starts_at_the_whole_number_it_was_given(holes):
    """In float32 the constrained value of an exact integer can round to just below it, and its floor to one less."""
    one = stn.HyperparameterSpace([stn.Hyperparameter("n", low=0, high=24, init=holes, integer=True)])
    location, _ = one.initial_state()
    assert one.values(location)["n"] == holes
    assert one.at(location, batch_size=2)["n"].tolist() == [holes, holes]


def test_each_call_of_initial_state_gives_fresh_leaves():
    one = space()
    location, raw_scale = one.initial_state()
    location.zero_()
    raw_scale.zero_()
    assert one.initial_state()[0].abs().sum() > 0
    assert one.values(one.initial_state()[0])["dropout"] == pytest.approx(0.05)


def test_unperturbed_batch_repeats_the_location_and_responds_by_its_shift():
    location, _ = space().initial_state()
    moved = location + torch.tensor([0.1, 0.2, 0.3, 0.4])
    hyper = space().at(moved, batch_size=3)
    assert hyper.shared
    assert torch.allclose(hyper.response, torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(3, 4), atol=1e-6)
    assert hyper["offset"].tolist() == pytest.approx([-1.6] * 3)


def test_initial_response_is_zero_when_shifted_and_the_location_when_raw():
    location, _ = space().initial_state()
    assert (space().at(location, batch_size=1).response == 0).all()
    raw = space().with_response("raw")
    assert torch.equal(raw.at(location, batch_size=1).response[0], location)
    valued = space().with_response("value").at(location, batch_size=2)
    assert torch.equal(valued.response, valued.values)


def test_centred_response_subtracts_the_given_centre():
    """Delta-STN: h = λ̃ − stop_gradient(λ)."""
    location, raw_scale = space().initial_state()
    location = (location + 1).requires_grad_()
    hyper = space().sample(location, raw_scale, batch_size=5, seed=0, step=0, center=location)
    raw = space().with_response("raw").sample(location, raw_scale, batch_size=5, seed=0, step=0)
    assert torch.allclose(hyper.response, (raw.response - location).detach(), atol=1e-6)
    (gradient,) = torch.autograd.grad(hyper.response.sum(), location)
    assert gradient.tolist() == [5.0] * 4


def test_entropy_is_that_of_independent_normals():
    _, raw_scale = space().initial_state()
    normals = torch.distributions.Normal(torch.zeros(4), space().scales(raw_scale))
    assert space().entropy(raw_scale).item() == pytest.approx(normals.entropy().sum().item(), rel=1e-6)
    raw_scale.requires_grad_()
    assert torch.autograd.gradcheck(space().entropy, raw_scale.detach().double().requires_grad_())


def test_clamp_brings_raw_scale_back_into_its_interval():
    raw_scale = torch.tensor([-9.0, 9.0, 0.0, 2.0])
    assert space().clamp_(raw_scale).tolist() == [RAW_SCALE_BOUNDS[0], RAW_SCALE_BOUNDS[1], 0.0, 2.0]
    assert space().scales(torch.tensor([-99.0, 99.0])).tolist() == pytest.approx(SCALE_BOUNDS)


def test_hyperbatch_is_a_pytree_of_its_three_tensors():
    location, raw_scale = space().initial_state()
    hyper = space().sample(location, raw_scale, batch_size=5, seed=7, step=3, first_example=10)
    leaves, spec = pytree.tree_flatten(hyper)
    assert [tuple(leaf.shape) for leaf in leaves] == [(5, 4), (5, 4), ()]
    again = pytree.tree_unflatten(leaves, spec)
    assert (again.seed, again.first_example, again.space) == (7, 10, hyper.space)
    halved = pytree.tree_map(lambda leaf: leaf[:2] if leaf.ndim else leaf, hyper)
    assert len(halved) == 2
    assert torch.equal(halved["dropout"], hyper["dropout"][:2])


def test_spaces_of_equal_hyperparameters_are_equal():
    """So that the pytrees of two HyperBatches fit together after pickling."""
    assert space() == space()
    assert hash(space()) == hash(space())
    assert space() != space().with_response("raw")
    location, raw_scale = space().initial_state()
    specs = [pytree.tree_structure(space().sample(location, raw_scale, batch_size=2, seed=0, step=0)) for _ in range(2)]
    assert specs[0] == specs[1]


def test_hyperbatch_passes_through_compile_func_and_data_parallel():
    one = space()
    location, raw_scale = one.initial_state()
    layer = stn.HyperLinear(3, 2, num_hyperparameters=4)
    x = torch.randn(5, 3)

    def step(location_):
        hyper = one.sample(location_, raw_scale, batch_size=5, seed=0, step=torch.zeros((), dtype=torch.int64))
        return layer(x, hyper).square().sum() + hyper["dropout"].sum()

    leaf = location.clone().requires_grad_()
    want = torch.autograd.grad(step(leaf), leaf)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.allclose(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    with torch.no_grad():
        assert torch.allclose(torch.func.grad(step)(location), want, rtol=1e-4)

    hyper = one.sample(location, raw_scale, batch_size=5, seed=0, step=0)
    taking_hyper = torch.compile(lambda h: layer(x, h), fullgraph=True, backend="aot_eager")
    assert torch.equal(taking_hyper(hyper), layer(x, hyper))


def test_hyperbatch_under_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layer = stn.HyperLinear(3, 2, num_hyperparameters=4)
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        location, raw_scale = space().initial_state()
        hyper = space().sample(location, raw_scale, batch_size=5, seed=0, step=0)
        x = torch.randn(5, 3)
        parallel(x, hyper).sum().backward()
        assert torch.equal(parallel(x, hyper), layer(x, hyper))
        assert layer.weight_gate.grad is not None
    finally:
        dist.destroy_process_group()


def test_columns_are_contiguous_and_looked_up_by_name():
    location, raw_scale = space().initial_state()
    hyper = space().sample(location, raw_scale, batch_size=6, seed=0, step=0)
    assert hyper["dropout"].is_contiguous()
    assert torch.equal(hyper["offset"], hyper.values[:, 3])
    with pytest.raises(KeyError, match="no hyperparameter 'droput'; this space has dropout, cutout_holes"):
        hyper["droput"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="", init=0.0), "wants a name"),
        (dict(name="p", low=0.0, high=0.9, init=0.0), r"'p': init=0.0 must lie strictly inside \(0.0, 0.9\)"),
        (dict(name="p", low=0.0, high=0.9, init=0.9), "init=0.9 must lie strictly inside"),
        (dict(name="p", low=0.0, init=-1.0), r"inside \(0.0, inf\)"),
        (dict(name="p", high=0.0, init=1.0), r"inside \(-inf, 0.0\)"),
        (dict(name="p", low=1.0, high=0.0, init=0.5), "low=1.0 must be below high=0.0"),
        (dict(name="p", init=math.nan), "init=nan is not a finite number"),
        (dict(name="p", init="0.3"), "init='0.3' is not a finite number"),
        (dict(name="p", init=0.0, high=math.inf), "high=inf is not a finite number"),
        (dict(name="p", init=0.0, scale=0.0), r"scale=0.0 must lie in \[0.0181, 3.0486\]"),
        (dict(name="p", init=0.0, scale=4.0), "scale=4.0 must lie in"),
        (dict(name="p", init=0.0, response="shfted"), "'shfted' must be 'shifted', 'raw' or 'value'"),
    ],
)
def test_a_bad_hyperparameter_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        stn.Hyperparameter(**arguments)


def test_a_bad_space_is_refused_by_name():
    with pytest.raises(ValueError, match="at least one Hyperparameter"):
        stn.HyperparameterSpace([])
    with pytest.raises(TypeError, match="wants Hyperparameter objects; got 'p'"):
        stn.HyperparameterSpace(["p"])
    with pytest.raises(ValueError, match="given twice: p"):
        stn.HyperparameterSpace(
            [stn.Hyperparameter("p", init=0.0), stn.Hyperparameter("q", init=0.0), stn.Hyperparameter("p", init=0.0)]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(location=torch.zeros(3)), r"location must be \(4,\) float32.*got \(3,\)"),
        (dict(step=-1), "step must be an int >= 0.*or a 0-dim int64 tensor on cpu, got -1"),
        (dict(first_example=-1), "first_example must be an int >= 0.*got -1"),
        (dict(step=torch.zeros(2, dtype=torch.int64)), "0-dim int64"),
        (dict(step=torch.zeros(())), "0-dim int64 tensor on cpu, got .*float32"),
        (dict(batch_size=-2), "batch_size must be an int >= 0.*got -2"),
        (dict(seed=-1), "seed must be an int >= 0"),
        (dict(seed=0.5), "seed must be an int >= 0.*got 0.5"),
        (dict(step=1.9), "step must be an int >= 0.*got 1.9"),
        (dict(batch_size=1.5), "batch_size must be an int >= 0.*got 1.5"),
    ],
)
def test_bad_arguments_to_sample_are_named(change, message):
    location, raw_scale = space().initial_state()
    arguments = dict(location=location, raw_scale=raw_scale, batch_size=2, seed=0, step=0) | change
    with pytest.raises(ValueError, match=message):
        space().sample(**arguments)


def test_bad_location_to_at_and_values_is_named():
    for call in (lambda: space().at(torch.zeros(5), batch_size=1), lambda: space().values(torch.zeros(5))):
        with pytest.raises(ValueError, match=r"location must be \(4,\) float32.*got \(5,\)"):
            call()
