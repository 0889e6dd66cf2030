"""Language models in training: a toy recurrent one against plain torch, carried states, resuming, exact perplexity."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from run_files import result, rows
from torch import nn

from stn_fast import plot
from stn_fast.data import DataSet, Split
from stn_fast.data.text import predictions
from stn_fast.errors import UserError
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.layers import HyperLinear, PerExampleDropout
from stn_fast.recipes import digits
from stn_fast.training import checkpoint
from stn_fast.training.build import build_method
from stn_fast.training.config import Config, HyperparameterConfig, MethodConfig, ScheduleConfig, TextConfig
from stn_fast.training.language import next_word_loss, next_word_scores, with_perplexity
from stn_fast.training.layering import resolve
from stn_fast.training.methods import FixedHyperparameters, SelfTuning
from stn_fast.training.progress import Progress, summary
from stn_fast.training.run import checked_task, run, using_threads
from stn_fast.training.spaces import build_space
from stn_fast.training.streams import ContinuousText, Streams, Window
from stn_fast.training.task import Task
from stn_fast.training.trainer import Trainer

WORDS = 7
SPACE = HyperparameterSpace([Hyperparameter("dropout", low=0.0, high=0.9, init=0.3)])


class Toy(nn.Module):
    """Embedding, torch's LSTM, dropout, and a gated layer that names the next word."""

    def __init__(self, space):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.lstm = nn.LSTM(6, 10)
        self.dropout = PerExampleDropout("dropout", stream=1)
        self.decoder = HyperLinear(10, WORDS, num_hyperparameters=len(space))

    def forward(self, inputs, hyper, state):
        hidden, state = self.lstm(self.embedding(inputs), state)
        return self.decoder(self.dropout(hidden, hyper, example_dim=1), hyper, example_dim=1), state


def synthetic(words, seed):
    """Words that depend on the one before and on a mood that lasts for some thirty words."""
    generator = torch.Generator().manual_seed(seed)
    mood, word, text = 0, 0, []
    for draw, jump in zip(torch.rand(words, generator=generator), torch.rand(words, generator=generator), strict=True):
        mood = 1 - mood if jump < 1 / 30 else mood
        word = (word + 1 + mood) % WORDS if draw < 0.8 else int(draw * 1e4) % WORDS
        text.append(word)
    return torch.tensor(text)


DATA = DataSet(*(predictions(synthetic(words, seed), 0) for seed, words in enumerate((2003, 403, 301))))


def toy(space=SPACE):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy(space)


def build(config):
    space = build_space(config)
    return Task(
        space=space,
        model=toy(space),
        data=DATA,
        training_objective=next_word_loss,
        validation_objective=next_word_loss,
        scores=next_word_scores,
        report=with_perplexity,
        batching=ContinuousText(config.text.window, config.text.valid_streams, config.text.test_streams),
    )


DEFAULTS = Config(
    recipe="toy",
    hyperparameters={"dropout": HyperparameterConfig(init=0.3, low=0.0, high=0.9)},
    method=MethodConfig(warmup_epochs=1),
    schedule=ScheduleConfig(epochs=4, batch_size=8, valid_batch_size=4, eval_batch_size=64, checkpoint_epochs=2),
    text=TextConfig(window=12, valid_streams=3, test_streams=1),
    threads=1,
)


@pytest.fixture(autouse=True)
def one_thread():
    with using_threads(1):
        yield


@pytest.fixture
def train(tmp_path):
    """Runs the toy under ``pairs``; the run directory."""

    def train(*pairs, name="run"):
        config = replace(resolve(DEFAULTS, None, pairs), run_dir=str(tmp_path / name))
        run(config, build)
        return tmp_path / name

    return train


def plain_nll(model, split, space=SPACE):
    """Summed cross entropy of one contiguous stream, in one forward pass from a zero state, with torch alone."""
    model.eval()
    location, _ = space.initial_state()
    gated = model.decoder
    decoder = gated.fold(space.at(location, batch_size=1).response[0])
    with torch.no_grad():
        hidden, _ = model.lstm(model.embedding(split.inputs[:, None]))
        return F.cross_entropy(decoder(hidden[:, 0]), split.targets, reduction="sum").item()


def trainer_of(*pairs, tmp_path):
    config = resolve(DEFAULTS, None, pairs)
    task = build(config)
    return Trainer(config, task, build_method(config, task), tmp_path / "checkpoints")


def forget(monkeypatch):
    """States are lost between windows."""
    monkeypatch.setattr(Window, "carry", lambda window, state: None)


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_perplexity_is_that_of_every_word_in_one_forward_pass_whatever_the_size_of_a_batch(tmp_path, size):
    trainer = trainer_of(f"schedule.eval_batch_size={size}", tmp_path=tmp_path)
    loss = plain_nll(trainer.method.model, DATA.test) / 301
    found = trainer.evaluate(DATA.test)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)


def test_the_validation_text_is_cut_into_the_streams_that_are_asked_for(tmp_path):
    trainer = trainer_of(tmp_path=tmp_path)
    model = trainer.method.model
    bounds = [0, 134, 268, 403]
    parts = [Split(*(part[first:last] for part in DATA.valid)) for first, last in pairwise(bounds)]
    assert trainer.evaluate(DATA.valid)["loss"] == pytest.approx(sum(plain_nll(model, p) for p in parts) / 403)


def test_an_evaluation_that_loses_the_state_is_noticed(tmp_path, monkeypatch):
    trainer = trainer_of("schedule.eval_batch_size=7", tmp_path=tmp_path)
    forget(monkeypatch)
    with pytest.raises(ValueError, match="window 0, but no state was carried"):
        trainer.evaluate(DATA.test)


def plain_training(model, text, steps, reset=False, clip=None, **adam):
    """Truncated backpropagation through time, in plain torch."""
    embedding, lstm = copy.deepcopy(model.embedding), copy.deepcopy(model.lstm)
    weight, bias = (nn.Parameter(p.detach().clone()) for p in (model.decoder.weight, model.decoder.bias))
    parameters = [*embedding.parameters(), *lstm.parameters(), weight, bias]
    optimizer = torch.optim.Adam(parameters, **adam) if adam else torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    state, losses = None, []
    for step in range(steps):
        window = text[step]
        if reset or step % text.per_pass == 0:
            state = None
        hidden, state = lstm(embedding(window.inputs), state)
        state = tuple(part.detach() for part in state)
        loss = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), window.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            total = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
            for parameter in parameters:
                parameter.grad *= min(1.0, clip / total.item())
        optimizer.step()
        losses.append(loss.item())
    return losses


def fixed_losses(text, steps, **options):
    """The losses of the same training, by FixedHyperparameters without dropout."""
    model = toy()
    model.dropout = None
    model.forward = lambda inputs, hyper, state: without_dropout(model, inputs, hyper, state)
    method = FixedHyperparameters(model, SPACE, next_word_loss, allow_unused=True, **options)
    return [method.train_step(text[step], step).item() for step in range(steps)]


def without_dropout(model, inputs, hyper, state):
    hidden, state = model.lstm(model.embedding(inputs), state)
    return model.decoder(hidden, hyper, example_dim=1), state


def text_streams():
    return Streams(DATA.train, 8, 12, seed=0, stream=0)


def test_training_is_truncated_backpropagation_through_time_with_a_carried_state():
    steps = 2 * text_streams().per_pass + 3
    found = fixed_losses(text_streams(), steps)
    assert found == pytest.approx(plain_training(toy(), text_streams(), steps), rel=1e-4)
    assert found != pytest.approx(plain_training(toy(), text_streams(), steps, reset=True), rel=1e-4)


def test_a_gradient_is_clipped_to_its_norm_over_all_weights():
    found = fixed_losses(text_streams(), 12, clip=0.05)
    assert found == pytest.approx(plain_training(toy(), text_streams(), 12, clip=0.05), rel=1e-4)
    assert found != pytest.approx(plain_training(toy(), text_streams(), 12), rel=1e-3)


def test_the_optimizer_of_the_configuration_is_the_one_that_trains(tmp_path):
    pairs = ("optimizer.name=adam", "optimizer.learning_rate=0.02", "optimizer.momentum=0.8", "optimizer.clip=0.5")
    for method in ("stn", "fixed"):
        built = trainer_of(*pairs, f"method.name={method}", tmp_path=tmp_path).method
        assert isinstance(built.optimizer, torch.optim.Adam)
        assert built.optimizer.defaults["lr"] == 0.02
        assert built.optimizer.defaults["betas"] == (0.8, 0.999)
        assert built.clip == 0.5
    assert isinstance(trainer_of(tmp_path=tmp_path).method.optimizer, torch.optim.SGD)


def test_training_and_validation_carry_states_of_their_own():
    method = SelfTuning(toy(), SPACE, next_word_loss, next_word_loss)
    train, valid = text_streams(), Streams(DATA.valid, 4, 12, seed=0, stream=1)
    method.train_step(train[0], 0)
    method.valid_step(valid[0], 1)
    hidden = [streams[1].state[0] for streams in (train, valid)]
    assert [tuple(part.shape) for part in hidden] == [(1, 8, 10), (1, 4, 10)]
    method.train_step(train[1], 2)
    assert torch.equal(valid[1].state[0], hidden[1])
    assert not torch.equal(train[2].state[0], hidden[0])
    assert not train[2].state[0].requires_grad


def test_a_validation_step_goes_on_from_the_state_it_left():
    model = toy()
    method = SelfTuning(model, SPACE, next_word_loss, next_word_loss, tune_scales=False, entropy_weight=0.0)
    valid = Streams(DATA.valid, 4, 12, seed=0, stream=1)
    windows = [valid[0], valid[1]]
    losses = []
    for step in range(2):
        location = method.location.detach().clone()
        losses.append(method.valid_step(valid[step], step).item())
    inputs, targets = (torch.cat([getattr(window, part) for window in windows]) for part in ("inputs", "targets"))
    with torch.no_grad():
        hidden, _ = model.lstm(model.embedding(inputs))
        logits = model.decoder(hidden[12:], SPACE.at(location, batch_size=4), example_dim=1)
    assert losses[1] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets[12:].flatten()).item(), rel=1e-5)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, step):
    advance = Trainer._advance

    def advance_or_die(trainer):
        if trainer.step == step:
            raise Killed
        advance(trainer)

    monkeypatch.setattr(Trainer, "_advance", advance_or_die)


@pytest.mark.parametrize("pairs", [(), ("optimizer.name=adam", "optimizer.learning_rate=0.01", "optimizer.clip=0.25")])
def test_a_run_stopped_in_the_middle_of_a_pass_and_resumed_equals_one_never_stopped(train, same_run, pairs):
    whole = train(*pairs, name="whole")
    stopped = train(*pairs, "schedule.max_steps=47", name="stopped")
    state = checkpoint.read(checkpoint.path_of(stopped / "checkpoints", 47))
    assert state["train_steps"] % 20 != 0
    assert state["valid_steps"] % 8 != 0
    same_run(whole, train(*pairs, name="stopped"))


@pytest.mark.parametrize("step", [21, 64])
def test_a_run_killed_anywhere_and_resumed_equals_one_never_killed(train, same_run, tmp_path, step):
    whole = train(name="whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(name="killed")
    same_run(whole, train(name="killed"))


@pytest.mark.parametrize("which", ["train_batches", "valid_batches"])
def test_the_states_of_both_texts_are_part_of_the_checkpoint(train, which):
    whole = train(name="whole")
    root = train("schedule.max_steps=47", name="other") / "checkpoints"
    state = checkpoint.read(checkpoint.path_of(root, 47))
    for part in state[which]["state"]:
        part += 0.5
    checkpoint.write(root, 47, state, state["best"]["step"])
    assert rows(train(name="other")) != rows(whole)


def test_a_run_reports_perplexity_and_words(train):
    directory = train()
    got, found = result(directory), rows(directory, timeless=False)
    assert got["test_perplexity"] == math.exp(got["test_loss"])
    assert got["valid_perplexity"] == math.exp(got["valid_loss"])
    evaluations = [row for row in found if row["phase"] == "eval"]
    assert evaluations[-1]["loss"] < 0.95 * evaluations[0]["loss"]
    assert all(row["test_perplexity"] == math.exp(row["test_loss"]) for row in evaluations)
    assert evaluations[-1]["step"] == 4 * 20 + (3 * 20) // 2  # 2003 words in 8 streams of 12 words at a step


def test_output_and_plot_of_a_run_show_its_perplexity(train, capsys):
    directory = train("schedule.epochs=1")
    got = result(directory, timeless=False)
    assert f"test perplexity {got['test_perplexity']:.2f}" in summary(got)
    last = rows(directory, timeless=False)[-1]
    Progress(epochs=1).row(last)
    assert f"perplexity {last['valid_perplexity']:.2f}" in capsys.readouterr().err
    figure = plot.draw([plot.read_run(directory)])
    best = plot.read_run(directory).best
    assert any(f"test perplexity there {best['test_perplexity']:.1f}" in text.get_text() for text in figure.texts)


def test_self_tuning_moves_the_hyperparameters_of_a_language_model(train):
    moved = result(train("hyper_optimizer.learning_rate=0.05"))["moved_in_initial_scales"]
    assert abs(moved["dropout"]) > 0.1


def test_the_examples_of_a_text_are_its_words(tmp_path):
    trainer = trainer_of(tmp_path=tmp_path)
    words = trainer.train_batches[0].inputs.numel()
    for _ in range(3):
        trainer._advance()
    passes = 2 if trainer.config.method.antithetic else 1
    assert trainer.examples == {"train_examples": 3 * passes * words, "valid_examples": 0}


def test_evaluating_leaves_the_states_of_training_alone(tmp_path):
    trainer = trainer_of(tmp_path=tmp_path)
    trainer._advance()
    before = copy.deepcopy(trainer.train_batches.state_dict())
    trainer.evaluate(DATA.valid)
    after = trainer.train_batches.state_dict()
    assert after["next"] == before["next"] == 1
    assert all(torch.equal(*pair) for pair in zip(after["state"], before["state"], strict=True))


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (
            "schedule.batch_size=170",
            r"schedule.batch_size = 170: columns of 12 words per step need 2,040 words.*2,003",
        ),
        (
            "text.window=120",
            r"schedule.valid_batch_size = 4: .* need 480 words, but the text has 403: use at most 3 columns",
        ),
    ],
)
def test_a_text_with_fewer_words_than_a_batch_needs_is_a_users_error(pair, says):
    with pytest.raises(UserError, match=says):
        checked_task(resolve(DEFAULTS, None, [pair]), build)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("text.window=0", r"text.window = 0: must be at least 1"),
        ("text.test_streams=0", r"text.test_streams = 0"),
        ("text.windw=3", r"unknown key 'text.windw' in --set: .*window"),
        ("optimizer.clip=0", r"optimizer.clip = 0.0: must be a finite number above 0"),
        ("optimizer.name=adma", r"optimizer.name = 'adma': .*adam"),
    ],
)
def test_bad_values_of_the_new_keys_are_named(pair, says):
    with pytest.raises(UserError, match=says):
        resolve(DEFAULTS, None, [pair])


def test_a_recipe_without_a_text_refuses_keys_for_one():
    with pytest.raises(UserError, match=r"text in --set: the recipe has no such section"):
        resolve(digits.config(), None, ["text.window=35"])


def test_perplexity_beyond_a_float_is_infinite():
    assert with_perplexity({"loss": 1e4})["perplexity"] == math.inf
