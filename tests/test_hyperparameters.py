import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import stn_fast as stn
from stn_fast.hyperparameter import RAW_SCALE_BOUNDS
from stn_fast.hyperparameters import SCALE_BOUNDS, inverse_softplus


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
    floats = stn.HyperparameterSpace([one for one in space() if not one.integer])
    valued = floats.with_response("value").at(floats.initial_state()[0], batch_size=2)
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


@pytest.mark.parametrize("response", ["shifted", "raw", "value"])
def test_an_antithetic_batch_has_the_opposite_perturbation(response):
    one = stn.HyperparameterSpace([h for h in space() if not h.integer]).with_response(response)
    draw = dict(batch_size=40, seed=3, step=9, first_example=5)
    location, raw_scale = (tensor.requires_grad_() for tensor in one.initial_state())
    batch = one.sample(location, raw_scale, **draw)
    other = one.sample(location, raw_scale, antithetic=True, **draw)
    assert (other.seed, other.step, other.first_example) == (batch.seed, batch.step, batch.first_example)
    assert other["dropout"].is_contiguous()
    raw = one.with_response("raw").sample(location, raw_scale, **draw).response
    values = torch.stack([torch.tensor([*one.values(row).values()]) for row in 2 * location.detach() - raw.detach()])
    torch.testing.assert_close(other.values, values)
    expected = values if response == "value" else batch.response.detach().neg() + (2 * location * (response == "raw"))
    torch.testing.assert_close(other.response, expected, check_layout=False, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(of.response.sum(), (location, raw_scale)) for of in (batch, other)]
    if response != "value":
        torch.testing.assert_close(gradients[1], (gradients[0][0], -gradients[0][1]))


def test_integers_of_an_antithetic_batch_are_whole():
    location, raw_scale = space().initial_state()
    holes = space().sample(location, raw_scale, batch_size=40, seed=3, step=9, antithetic=True)["cutout_holes"]
    assert torch.equal(holes, holes.floor())
    assert holes.unique().numel() > 1


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


def test_names_are_looked_for_in_a_space_and_in_a_batch():
    """`if "weight_decay" in space` was always false, and a penalty after it skipped."""
    one = space()
    hyper = one.at(one.initial_state()[0], batch_size=2)
    for found in (one, hyper):
        assert "weight_decay" in found
        assert "weight_decoy" not in found
        assert 0 not in found
    assert one["dropout"] in one
    assert [h.name for h in one] == list(one.names)
    with pytest.raises(TypeError, match=r"not iterable: loop over hyper\.space\.names"):
        list(hyper)
    with pytest.raises(TypeError, match=r"by a name or by a slice of examples, as in hyper\[:2\], got 0"):
        hyper[0]


@pytest.mark.parametrize("rows", [slice(2), slice(2, 5), slice(-2, None), slice(3, 1), slice(None)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_slice_is_the_batch_of_those_examples_with_their_draws(rows, shared):
    location, raw_scale = space().initial_state()
    draw = dict(batch_size=6, seed=3, step=4, first_example=10)

    def sampled():
        return space().at(location + 1, **draw) if shared else space().sample(location, raw_scale, **draw)

    hyper, part = sampled(), sampled()[rows]
    assert torch.equal(part.values, hyper.values[rows])
    assert torch.equal(part.response, hyper.response[rows])
    assert len(part) == 0 or part["dropout"].is_contiguous()
    assert (part.seed, part.step, part.shared, part.space) == (3, hyper.step, shared, hyper.space)
    x, layer = torch.ones(6, 50), stn.PerExampleDropout("dropout", stream=1)
    assert torch.equal(layer(x[rows], part), layer(x, hyper)[rows])
    gated = stn.HyperLinear(50, 3, num_hyperparameters=4)
    torch.testing.assert_close(gated(x[rows], part), gated(x, hyper)[rows])


def test_a_slice_with_a_step_is_refused():
    hyper = space().at(space().initial_state()[0], batch_size=6)
    with pytest.raises(ValueError, match="consecutive examples: the slice must have step 1, got 2"):
        hyper[::2]


def test_a_batch_moves_to_a_device_whole():
    location, raw_scale = space().initial_state()
    hyper = space().sample(location, raw_scale, batch_size=6, seed=3, step=4)
    moved = hyper.to("meta")
    assert {t.device.type for t in (moved.values, moved.response, moved.step)} == {"meta"}
    assert moved["dropout"].is_contiguous()
    same = hyper.to("cpu")
    assert torch.equal(same.values, hyper.values)
    assert torch.equal(same.response, hyper.response)
    assert (same.seed, same.step, same.first_example) == (hyper.seed, hyper.step, hyper.first_example)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="", init=0.0), "name must be a non-empty string, got ''"),
        (dict(name="p", low=0.0, high=0.9, init=0.0), r"'p': init=0.0 must be strictly inside \(0.0, 0.9\)"),
        (dict(name="p", low=0.0, high=0.9, init=0.9), "init=0.9 must be strictly inside"),
        (dict(name="p", low=0.0, init=-1.0), r"inside \(0.0, inf\)"),
        (dict(name="p", high=0.0, init=1.0), r"inside \(-inf, 0.0\)"),
        (dict(name="p", low=1.0, high=0.0, init=0.5), "high=0.0 must be above low=1.0"),
        (dict(name="p", init=math.nan), "init=nan must be a finite number"),
        (dict(name="p", init="0.3"), "init=.0.3. must be a finite number"),
        (dict(name="p", init=0.0, high=math.inf), "high=inf must be a finite number"),
        (dict(name="p", init=0.0, scale=0.0), r"scale=0.0 must be in \[0.0181, 3.0486\]"),
        (dict(name="p", init=0.0, scale=4.0), "scale=4.0 must be in"),
        (dict(name="p", init=0.0, response="shfted"), "'shfted' must be 'shifted', 'raw' or 'value'"),
    ],
)
def test_a_bad_hyperparameter_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        stn.Hyperparameter(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(init=1e39), "init=1e[+]39 is too large for float32"),
        (dict(low=0.0, init=1e39), "init=1e[+]39 is too large for float32"),
        (dict(low=-(10**400), init=0.0), "low=-10+ must be a finite number"),
        (dict(low=-1e308, high=1e308, init=1.0), "low=-1e[+]308 is too large for float32"),
        (dict(low=-3e38, high=3e38, init=1.0), r"high=3e\+38 minus low=-3e\+38 is too large for float32"),
        (dict(low=0.0, init=1e-50), r"init=1e-50 is too close to a bound of \(0, inf\) for float32"),
        (dict(low=0.0, high=1.0, init=1e-39), r"init=1e-39 is too close to a bound of \(0, 1\) for float32"),
        (dict(high=1.0, init=0.99999999), "init=0.99999999 is too close to a bound"),
        (dict(low=1e3, high=2e3, init=1000.00001), "init=1000.00001 is too close to a bound"),
        (dict(low=0.0, high=0.9, init=0.9 - 1e-9), "is too close to a bound of"),
        (dict(low=1.0, high=1.00000001, init=1.000000005), "high=1.00000001 is the same number in float32 as low=1.0"),
        (dict(low=0.0, high=0.99999999, init=0.5), "high=0.99999999 excludes 1, but float32 values reach it"),
        (dict(low=-0.5, high=1 - 2**-24, init=0.5), "high=0.9999999[0-9]* excludes 1, but"),
        (dict(low=0.0, high=89.99999999, init=5.0), "high=89.99999999 excludes 90, but"),
        (dict(low=1e-46, init=5.0), "low=1e-46 excludes 0, but"),
        (dict(high=-1e-46, init=-5.0), "high=-1e-46 excludes -0, but"),
        (dict(low=0, high=4, init=3.9999999, integer=True), "init=3.9999999 is too close to a bound"),
        (dict(low=0, high=8, init=3.9999999, integer=True), "init=3.9999999 is 4 in float32, which changes its floor"),
    ],
)
def test_what_float32_cannot_hold_is_refused_where_it_is_given(arguments, message):
    with pytest.raises(ValueError, match=f"hyperparameter 'p': .*{message}"):
        stn.Hyperparameter("p", **arguments)


@given(
    low=st.none() | st.floats(-1e6, 1e6, width=32),
    width=st.none() | st.floats(1e-6, 1e6),
    share=st.floats(0.0, 1.0),
    integer=st.booleans(),
)
def test_every_value_of_a_range_that_is_taken_is_finite_and_starts_inside(low, width, share, integer):
    """`reach` is what float32 tensors reach, and the start is strictly inside and on the plateau of `init`."""
    high = None if width is None else (low or 0.0) + width
    init = (low or 0.0) + share * (width or 1.0)
    try:
        one = stn.HyperparameterSpace([stn.Hyperparameter("p", low=low, high=high, init=init, integer=integer)])
    except ValueError:
        return
    least, most = one["p"].reach
    for end in (-200.0, 200.0):
        value = one.values(torch.tensor([end]))["p"]
        assert math.isfinite(value)
        assert (math.floor(least) if integer and math.isfinite(least) else least) <= value <= most
    start = one.values(one.initial_state()[0])["p"]
    assert (start == math.floor(init)) if integer else (least < start < most)


def test_an_integer_just_below_a_whole_number_starts_below_it():
    """The few roundings that keep 1 from starting as 0 don't lift 1.999999 to 2."""
    for init, whole in ((1.999999, 1), (1.0, 1), (2.0, 2), (2.5, 2), (0.000001, 0)):
        one = stn.HyperparameterSpace([stn.Hyperparameter("n", low=0, high=4, init=init, integer=True)])
        assert one.values(one.initial_state()[0])["n"] == whole


def test_the_checks_do_not_depend_on_the_default_device_and_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            one = stn.Hyperparameter("n", low=0, high=4, init=3, integer=True)
            with pytest.raises(ValueError, match=r"high=0\.99999999 excludes 1, but"):
                stn.Hyperparameter("p", low=0.0, high=0.99999999, init=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert one.start == stn.Hyperparameter("n", low=0, high=4, init=3, integer=True).start


def test_an_integer_that_responds_with_its_value_is_refused():
    """The floor has no gradient, so it would never be tuned, and nothing would say so."""
    for make in (
        lambda: stn.Hyperparameter("n", low=0, high=4, init=1, integer=True, response="value"),
        lambda: space().with_response("value"),
    ):
        with pytest.raises(ValueError, match="response='value' cannot tune an integer"):
            make()


@pytest.mark.parametrize("field", ["init", "low", "high", "scale"])
def test_numpys_numbers_are_kept_as_pythons_and_bools_are_refused(field):
    numbers = dict(low=0, high=8, init=2, scale=1)
    for kind in (np.float32, np.float64, np.float16, np.int64, np.uint8):
        one = stn.Hyperparameter("p", **numbers | {field: kind(numbers[field])})
        assert one == stn.Hyperparameter("p", **numbers)
        assert type(getattr(one, field)) in (int, float)
    for wrong in (True, np.bool_(True), torch.tensor(1.0), np.array([1.0])):
        with pytest.raises(ValueError, match=f"'p': {field}=.* must be a finite number"):
            stn.Hyperparameter("p", **numbers | {field: wrong})


@pytest.mark.parametrize("field", ["integer", "per_example"])
def test_text_is_not_accepted_as_a_bool(field):
    """'False' is true to Python."""
    for wrong in ("False", "no", 0, None):
        with pytest.raises(ValueError, match=f"'p': {field} must be True or False, got"):
            stn.Hyperparameter("p", init=0.0, **{field: wrong})
    assert getattr(stn.Hyperparameter("p", init=0.0, **{field: np.bool_(False)}), field) is False


def test_a_bad_space_is_refused_by_name():
    with pytest.raises(ValueError, match="at least one Hyperparameter"):
        stn.HyperparameterSpace([])
    with pytest.raises(TypeError, match="expected Hyperparameter objects, got 'p'"):
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


@settings(deadline=None)
@given(
    st.sampled_from([(None, None), (0.0, None), (None, 3.0), (0.0, 0.9), (-2.0, 5.0), (2.0, 24.0), (1e3, 2e3)]),
    st.floats(-20, 20),
)
def test_the_checks_know_what_float32_makes_of_a_location(bounds, location):
    """What the checks expect without torch holds what torch computes."""
    low, high = bounds
    inside = {(False, False): 0.1, (True, False): (low or 0) + 1, (False, True): (high or 0) - 1}
    one = stn.Hyperparameter(
        "p", low=low, high=high, init=inside.get((low is not None, high is not None), ((low or 0) + (high or 0)) / 2)
    )
    least, most = one._in_float32(location)
    value = stn.HyperparameterSpace([one]).values(torch.tensor([location]))["p"]
    assert least <= value <= most
    # From an upper bound alone softplus is subtracted, which is larger than what is left where that is negative.
    subtracted = high - value if low is None and high is not None else 0
    assert most - least <= 1e-6 * max(abs(value), abs(low or 0), abs(high or 0), subtracted)
