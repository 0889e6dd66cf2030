"""The bilevel problem with a known optimum, examples/ridge.py."""

import pytest
import ridge
import torch


@pytest.fixture(scope="module")
def problem():
    return ridge.problem(0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_optimum_is_one(problem):
    optimum = problem.optimum()
    assert optimum.abs().max() < 5  # no penalty is best at 0 or at infinity
    slope = torch.func.grad(problem.valid_loss)(optimum)
    assert slope.abs().max() < 1e-6 * problem.valid_loss(optimum)
    assert torch.linalg.eigvalsh(torch.func.hessian(problem.valid_loss)(optimum)).min() > 0


def test_the_networks_minimum_is_the_closed_form(problem):
    penalties = torch.linspace(-1, 1, ridge.FEATURES)
    space = ridge.space().with_response("shifted")
    hyper = space.at(penalties, batch_size=ridge.TRAIN, centred=True)
    model = ridge.Ridge()
    with torch.no_grad():
        model.head.weight.copy_(problem.solution(penalties.double()).T)
    batch = ridge.Split(*problem.train)
    loss = ridge.training_objective(model, batch, hyper)
    (slope,) = torch.autograd.grad(loss, model.head.weight)
    assert slope.abs().max() < 1e-4 * loss.item()


def test_delta_stn_finds_it(problem):
    path = ridge.tune("delta-stn", problem, seed=0, cycles=300)
    assert path.shape == (301, ridge.FEATURES)
    optimum = problem.optimum()
    assert ridge.share_left(problem, path[0], optimum) == 1
    assert ridge.share_left(problem, path[-1], optimum) < 0.4  # 0.03 % after the 1,500 cycles of the example


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "0"], "--seeds and --cycles must be at least 1; got 0 and 1500"),
        (["--plot", "absent/paths.png"], "there is no folder absent"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_tuned(arguments, says, capsys):
    with pytest.raises(SystemExit):
        ridge.main(arguments)
    assert says in capsys.readouterr().err


def test_the_command_prints_each_method_and_draws(tmp_path, capsys):
    picture = tmp_path / "paths.png"
    ridge.main(["--seeds", "1", "--cycles", "4", "--plot", str(picture)])
    said = capsys.readouterr().out
    assert said.count("%") == len(ridge.METHODS)
    assert picture.read_bytes()[:4] == b"\x89PNG"
