"""The language recipes: the paper's settings, and tasks that train and tune on a tiny text in their data's place."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import self_tuning
from stn_fast import plot
from stn_fast.data import ptb, text, wikitext2
from stn_fast.errors import UserError
from stn_fast.recipes import recipe, texts
from stn_fast.training.build import build_method
from stn_fast.training.layering import resolve
from stn_fast.training.progress import summary
from stn_fast.training.run import checked_task, run
from stn_fast.training.spaces import build_space

NAMES = ("ptb", "wikitext2", "ptb-small", "text")
RATE = (0.0, 0.95, 0.05, True)
RATE_OF_BATCH = (0.0, 0.95, 0.05, False)
PENALTY = (0.0, None, 0.05, False)
TUNED = {
    **dict.fromkeys(("output_dropout", "input_dropout", "hidden_dropout"), RATE),
    **dict.fromkeys(("embedding_dropout", "recurrent_dropout"), RATE_OF_BATCH),
    **dict.fromkeys(("activation_regularization", "temporal_activation_regularization"), PENALTY),
}
PUBLISHED = {
    "method": {"name": "stn", "train_steps": 2, "valid_steps": 1, "warmup_epochs": 1, "tune_scales": False},
    "optimizer": {
        "name": "sgd", "learning_rate": 30, "momentum": 0, "clip": 0.25, "decay_factor": 0.25, "decay_patience": 5,
        "min_learning_rate": 3e-4,
    },
    "hyper_optimizer": {"name": "adam", "learning_rate": 1e-2},
    "schedule": {"batch_size": 40, "patience": 20},
    "text": {"window": 70, "valid_streams": 10, "test_streams": 1, "min_count": 1, "width": 650, "layers": 2},
}  # fmt: skip
SMALL = {
    "method": {**PUBLISHED["method"], "scale_decay": 0.5},
    "optimizer": {"name": "adam", "learning_rate": 4e-3, "momentum": 0.9, "clip": 0.25, "decay_factor": 1},
    "hyper_optimizer": {"name": "adam", "learning_rate": 3e-2},
    "schedule": {"batch_size": 20, "epochs": 25, "patience": None},
    "text": {"window": 35, "min_count": 2, "width": 200, "layers": 2},
}
SETTINGS = {"ptb": PUBLISHED, "wikitext2": PUBLISHED, "ptb-small": SMALL, "text": SMALL}


@pytest.mark.parametrize("name", NAMES)
def test_the_tuned_hyperparameters_are_the_papers(name):
    config = recipe(name).config()
    found = {key: (entry.low, entry.high, entry.init, entry.per_example) for key, entry in config.enabled.items()}
    assert found == TUNED
    assert {entry.scale for entry in config.enabled.values()} == {2.0 if name in ("ptb-small", "text") else 1.0}
    space = build_space(config)
    assert space.values(space.initial_state()[0]) == pytest.approx(dict.fromkeys(TUNED, 0.05))


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_the_papers(name):
    config = recipe(name).config()
    for section, settings in SETTINGS[name].items():
        assert {key: getattr(getattr(config, section), key) for key in settings} == settings
    assert config.recipe == name
    assert config.train_fraction == (0.05 if name == "ptb-small" else 1.0)


def test_the_warm_up_of_one_epoch_is_the_published_331_steps():
    config = recipe("ptb").config()
    assert 929_589 // (config.schedule.batch_size * config.text.window) == 331


def sentences(lines, seed):
    """Lines of words, each likely after the one before it."""
    draw = torch.randint(0, 100, (lines, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for line in draw:
        word, words = line[0] % 20, []
        for number in line:
            word = (word + 1) % 20 if number < 80 else number % 20
            words.append(f"w{word}")
        found.append(" ".join(words))
    return "\n".join(found) + "\n"


@pytest.fixture
def short(monkeypatch, tmp_path):
    """short(recipe name, "key=value", ...): its configuration, on a tiny text and a narrow network."""
    files = []
    for number, (part, lines) in enumerate((("train", 220), ("valid", 60), ("test", 50))):
        files.append(tmp_path / f"{part}.txt")
        files[-1].write_text(sentences(lines, number))

    def load(root=None, *, min_count, train_fraction):
        return text.load(*files, min_count=min_count, train_fraction=train_fraction, cache=False)

    monkeypatch.setattr(ptb, "load", load)
    monkeypatch.setattr(wikitext2, "load", load)

    def short(name, *pairs):
        small = (
            "schedule.batch_size=5", "schedule.valid_batch_size=4", "schedule.epochs=2", "text.window=10",
            "text.width=8",            "optimizer.learning_rate=0.1", "train_fraction=1",
        )  # fmt: skip
        config = resolve(recipe(name).config(), None, [*small, *pairs])
        return replace(config, run_dir=str(tmp_path / name), data_root=str(tmp_path))

    return short


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_trains_and_tunes(short, name):
    result = run(short(name), recipe(name).build)
    words = 220 * 10
    assert result["steps"] == 2 * (words // 50) + (words // 50) // 2  # warm-up is the first of two epochs
    assert result["test_perplexity"] == math.exp(result["test_loss"]) < 21
    start, end = result["hyperparameters_start"], result["hyperparameters_end"]
    assert all(end[key] != start[key] for key in TUNED)
    assert result["peak_bytes"] > 0


def test_an_evaluation_does_not_depend_on_how_it_is_cut_into_windows(short):
    """Every word once, whatever the size of a batch."""
    losses = [
        run(short("ptb", f"schedule.eval_batch_size={size}", "schedule.max_steps=3"), recipe("ptb").build, resume=False)
        for size in (30, 100_000)
    ]
    assert losses[0]["test_loss"] == pytest.approx(losses[1]["test_loss"], rel=1e-6)


def test_only_frequent_words_of_the_share_that_is_trained_on_are_known(short):
    whole, part = (recipe("ptb").build(short("ptb", f"train_fraction={share}")).data for share in (1, 0.25))
    assert [len(split.targets) for split in whole] == [2200, 600, 500]
    assert [len(split.targets) for split in part] == [550, 600, 500]
    rare = recipe("ptb").build(short("ptb", "text.min_count=1000"))
    assert rare.model.embedding.num_embeddings == 2  # <unk> and <eos>


def test_a_result_says_how_many_words_are_known(short):
    got = run(short("text", "text.min_count=105", "schedule.max_steps=2"), recipe("text").build)
    assert 2 < got["vocabulary"] < 22
    assert 0 < got["unknown_share"] < 1
    assert f"{got['vocabulary']} words in the vocabulary; {got['unknown_share']:.1%} of the test text is" in summary(
        got
    )
    assert "no validation step was run: nothing has been tuned yet" in summary(got)


def test_weights_are_drawn_from_the_seed(short):
    models = [recipe("ptb").build(short("ptb", f"seed={seed}")).model for seed in (0, 0, 1)]
    weights = [model.lstm[0].weight_hh_l0 for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_size_of_the_network_is_a_setting(short):
    model = recipe("text").build(short("text", "text.width=6", "text.layers=3")).model
    assert model.embedding.embedding_dim == 6
    assert [layer.hidden_size for layer in model.lstm] == [6, 6, 6]
    with pytest.raises(UserError, match="nothing uses 'hidden_dropout':"):
        checked_task(short("text", "text.layers=1"), recipe("text").build)
    dropped = "hyperparameters.hidden_dropout.enabled=false"
    assert len(checked_task(short("text", "text.layers=1", dropped), recipe("text").build).model.lstm) == 1


def test_the_files_of_a_users_own_text_are_named_where_one_is_missing(short, tmp_path):
    config = short("text")
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(
        UserError,
        match=r"there is no file .*valid.txt: the recipe text needs .*test.txt in --data-root or STN_FAST_DATA",
    ):
        recipe("text").build(config)


def test_one_key_drops_a_regulariser(short):
    task = recipe("ptb").build(short("ptb", "hyperparameters.output_dropout.enabled=false"))
    assert task.model.output_dropout.p == 0.0
    assert "output_dropout" not in {getattr(module, "name", None) for module in task.model.modules()}
    assert len(task.space) == 6


def test_training_is_by_all_seven_and_validation_unperturbed(short):
    config = short("ptb")
    task = checked_task(config, recipe("ptb").build)
    method = build_method(config, task)
    sequence = task.batching.sequence(task.data.valid, 4, seed=0, stream=1)
    method.valid_step(sequence[0], 0)
    assert len(method.tuned) == 1
    assert method.location.grad.all()
    location = method.location.detach().clone()
    losses = [method.valid_step(task.batching.sequence(task.data.valid, 4, seed=0, stream=1)[0], s) for s in (1, 2)]
    assert not torch.equal(method.location, location)
    assert losses[0] != losses[1]  # the location alone has moved


def test_the_evidence_command_compares_perplexities(short, monkeypatch, tmp_path, capsys):
    config = short("ptb-small")
    monkeypatch.setattr(texts, "ptb_small", replace(texts.ptb_small, config=lambda: config))
    file, runs = tmp_path / "evidence.json", tmp_path / "runs"
    arguments = ["ptb-small", "--seeds", "2", "--epochs", "1", "--guesses", ".05", ".6"]
    assert self_tuning.main([*arguments, "--json", str(file), "--run-dir", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "start: output_dropout, input_dropout, hidden_dropout, embedding_dropout, recurrent_dropout\n" in said
    assert said.count("test perplexity  ") == 2 * len(self_tuning.METHODS)
    for guess in ("0.05", "0.6"):
        for method in ("fixed", "frozen"):
            assert f"from dropout {guess}: test perplexity there, median of stn / median of {method}: " in said
    line = "best validation perplexity, median of stn from dropout 0.6 / median of fixed from dropout 0.05: "
    (found,) = [text for text in said.splitlines() if text.startswith(line)]
    results = json.loads(file.read_text())
    medians = [
        sum(row["valid_perplexity"] for row in results[method] if row["guess"] == guess) / 2
        for method, guess in (("stn", 0.6), ("fixed", 0.05))
    ]
    assert float(found.removeprefix(line)) == pytest.approx(medians[0] / medians[1], abs=1e-3)
    start = results["stn"][2]["hyperparameters_start"]
    assert start["recurrent_dropout"] == pytest.approx(0.6)
    assert start["activation_regularization"] == pytest.approx(0.05)
    figure = plot.draw([plot.read_run(runs / "stn-seed0-from0.6")])
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]
    assert [title.replace("\n", " ") for title in titles] == ["loss", *(name.replace("_", " ") for name in TUNED)]
