"""Searches: their ranges, and that a study which is stopped and continued has the trials of one that is not."""

import math
from dataclasses import replace

import optuna
import pytest

from stn_fast.comparison.guesses import guessed
from stn_fast.comparison.search import STARTUP, Study, open_journal, sampled, search_space
from stn_fast.errors import UserError
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import HyperparameterConfig

DIGITS = recipe("digits").config()
SPACE = search_space(DIGITS)


def space_of(**entry):
    return search_space(replace(DIGITS, hyperparameters={"a": HyperparameterConfig(**entry)}))["a"]


def test_two_bounds_are_drawn_uniformly_and_a_single_one_log_uniformly_over_two_decades():
    dropout, decay = SPACE["input_dropout"].distribution(), SPACE["weight_decay"].distribution()
    assert (dropout.low, dropout.high, dropout.log) == (pytest.approx(9e-5), pytest.approx(0.89991), False)
    assert (decay.low, decay.high, decay.log) == (pytest.approx(1e-4), pytest.approx(1e-2), True)


def test_the_guesses_low_and_high_are_the_ends_of_what_is_drawn_beside_a_single_bound():
    drawn = SPACE["weight_decay"]
    starts = [guessed(DIGITS, guess).hyperparameters["weight_decay"].init for guess in ("low", "high")]
    assert [drawn.init(drawn.low), drawn.init(drawn.high)] == pytest.approx(starts)


def test_a_distance_is_drawn_where_the_single_bound_is_not_0():
    above, below = space_of(init=3.0, low=2.0), space_of(init=-1.0, high=1.0)
    assert (above.low, above.high, above.init(0.5)) == (0.1, 10.0, 2.5)
    assert (below.low, below.high, below.init(0.5)) == (0.2, 20.0, 0.5)
    with pytest.raises(UserError, match="a bound of a"):
        space_of(init=0.0)


@pytest.mark.parametrize(("low", "high", "first", "last"), [(2.0, 24.0, 2, 23), (0.5, 4.5, 0, 4), (-1.0, 1.0, -1, 0)])
def test_an_integer_is_drawn_from_every_value_that_it_can_have(low, high, first, last):
    drawn = space_of(init=(low + high) / 2 + 0.1, low=low, high=high, integer=True)
    distribution = drawn.distribution()
    assert isinstance(distribution, optuna.distributions.IntDistribution)
    assert (distribution.low, distribution.high, distribution.log) == (first, last, False)
    for value in range(first, last + 1):
        assert low < drawn.init(value) < high
        assert math.floor(drawn.init(value)) == value


@pytest.mark.parametrize("name", RECIPES)
def test_every_draw_is_a_valid_start(name):
    defaults = recipe(name).config()
    space = search_space(defaults)
    assert set(space) == set(defaults.enabled)
    for end in ("low", "high"):
        config = sampled(defaults, space, {key: getattr(each, end) for key, each in space.items()})
        for key, entry in config.enabled.items():
            entry.named(key)


def loss(sample):
    """Of a trial: lowest at dropout 0.2; infinite above 0.8, as if it became non-finite."""
    return math.inf if sample["input_dropout"] > 0.8 else abs(sample["input_dropout"] - 0.2)


def trials(path, method, count, stop=(), seed=0, loss=loss):
    """The samples of a study; where a trial is in ``stop``, its first attempt ends before it is told."""
    storage, samples = None, []
    for number in range(count):
        for attempt in range(2 if number in stop else 1):
            if storage is None or number in stop:
                storage = open_journal(path)
                study = Study(storage, "name", method, seed, SPACE)
            sample, trial = study.sample(number)
            if trial is not None and (attempt or number not in stop):
                study.tell(trial, loss(sample))
        samples.append(sample)
    return samples


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_study_that_was_stopped_has_the_same_trials(tmp_path, method):
    whole = trials(tmp_path / "whole", method, 8)
    assert len({str(sample) for sample in whole}) == 8
    assert trials(tmp_path / "stopped", method, 8, stop=(0, 2, 3, 5, 7)) == whole
    assert trials(tmp_path / "stopped", method, 8) == whole  # all of them are finished
    found = optuna.load_study(study_name="name", storage=open_journal(tmp_path / "stopped")).get_trials()
    assert [trial.state.name for trial in found].count("FAIL") == 5
    assert {trial.state.name for trial in found} == {"FAIL", "COMPLETE"}
    assert trials(tmp_path / "other", method, 8, seed=1) != whole


def test_tpe_learns_from_its_trials_after_a_few_random_ones(tmp_path):
    one = trials(tmp_path / "one", "tpe", STARTUP + 1)
    other = trials(tmp_path / "other", "tpe", STARTUP + 1, loss=lambda sample: -loss(sample) if loss(sample) < 1 else 9)
    assert one[:STARTUP] == other[:STARTUP]
    assert one[STARTUP] != other[STARTUP]


def test_an_infinite_loss_is_a_finished_trial_that_does_not_stop_a_search(tmp_path):
    samples = trials(tmp_path / "j", "tpe", 8, loss=lambda sample: math.inf)
    storage = open_journal(tmp_path / "j")
    found = optuna.load_study(study_name="name", storage=storage).get_trials()
    assert [trial.value for trial in found] == [math.inf] * 8
    assert [trial.params for trial in found] == samples


def test_a_journal_that_was_cut_is_continued(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = trials(whole, "tpe", 6)
    text = whole.read_bytes()
    for size in (len(text) // 3, len(text) // 2, len(text) - 1):
        cut.write_bytes(text[:size])
        (tmp_path / "cut.lock").touch()
        assert trials(cut, "tpe", 6) == expected


@pytest.mark.parametrize("text", ["hello\n", '{"a": 1}\n', "[]\n", "\x00\n{}\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path, text):
    file = tmp_path / "searches.journal"
    file.write_text(text)
    with pytest.raises(UserError, match=r"searches\.journal is not a journal of Optuna"):
        Study(open_journal(file), "name", "random", 0, SPACE).sample(0)
    assert file.read_text() == text
