"""The measured tables of the README and of docs/results.md hold what the recorded results hold, to the digits shown."""

import json
import re
import statistics
from pathlib import Path
from statistics import geometric_mean

import pytest

from benchmarks import conversion, five_lines, precision
from benchmarks.hypergradient import mean_and_error
from benchmarks.short_runs import TASKS

ROOT = Path(__file__).parent.parent.parent
README = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/results.md"))
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"\d+(?:\.\d+)?"


def table(title: str, page: str = README) -> dict[str, list[str]]:
    """The rows below the heading that starts with ``title``: {first cell: the numbers in the others}."""
    lines = page[page.index(f"| {title}") :].split("\n\n")[0].splitlines()[2:]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: re.findall(NUMBER, " ".join(cells)) for name, *cells in rows}


def assert_shown(shown: list[str], recorded: list[float]) -> None:
    """Every number, with the decimals that are shown; a recorded ratio is itself rounded to four."""
    assert len(shown) == len(recorded)
    for text, value in zip(shown, recorded, strict=True):
        assert abs(float(text) - value) <= 0.5 * 10 ** -len(text.partition(".")[2]) + 5e-5, (text, value)


def medians(file: str, method: str, guess: float | None, keys: list[str]) -> list[float]:
    results = json.loads((RESULTS / file).read_text())[method]
    results = [result for result in results if result.get("guess") == guess]
    return [statistics.median(result[key] for result in results) for key in keys]


LOSSES = ["valid_loss", "test_loss", "test_accuracy"]
PERPLEXITIES = ["valid_perplexity", "test_perplexity"]
DIGITS, FASHION, PTB = (f"self_tuning_{name}.json" for name in ("digits", "fashion_mnist_small", "ptb_small"))
RUNS = [
    ("self-tuned", DIGITS, "stn", None, LOSSES),
    ("fixed at the guess", DIGITS, "fixed", None, LOSSES),
    ("self-tuning network, hyperparameters frozen", DIGITS, "frozen", None, LOSSES),
    *((f"self-tuned from {shown}", FASHION, "stn", float(shown), LOSSES) for shown in (".05", ".5")),
    *((f"fixed at {shown}", FASHION, "fixed", float(shown), LOSSES) for shown in (".05", ".5")),
    *((f"self-tuned from {shown}", PTB, "stn", float(shown), PERPLEXITIES) for shown in (".05", ".6")),
    *((f"fixed at {shown}", PTB, "fixed", float(shown), PERPLEXITIES) for shown in (".05", ".6")),
    *(
        (f"self-tuning network, hyperparameters frozen at {shown}", PTB, "frozen", float(shown), PERPLEXITIES)
        for shown in (".05", ".6")
    ),
]


@pytest.mark.parametrize(("name", "file", "method", "guess", "keys"), RUNS)
def test_scores_are_the_medians_that_were_recorded(name, file, method, guess, keys):
    cells = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
    if len(cells) > 1:  # two tables have rows of this name: that of losses first
        cells = cells[file == PTB :]
    assert_shown(re.findall(NUMBER, cells[0][len(name) + 2 :]), medians(file, method, guess, keys))


def test_what_is_said_about_three_guesses_on_ptb_small():
    found = json.loads((RESULTS / "compare-ptb-small.json").read_text())
    told = README[README.index("Over all guesses and seeds, the largest test loss") :].split("for the three searches")[
        0
    ]
    spreads = [entry["spread_of_test_loss"] for entry in found["methods"]]
    assert_shown(re.findall(r"\d\.\d+", told), spreads)
    assert [entry["worse_than_fixed"] for entry in found["methods"]] == [0, None, 0]
    rows = [json.loads(line) for line in (RESULTS / "compare-ptb-small" / "runs.jsonl").read_text().splitlines()]
    own = [row["test_perplexity"] for row in rows if row["method"] == "stn"]
    assert "their median over all guesses and seeds is 126.3" in README
    assert len(own) == 9
    assert_shown(["126.3"], [statistics.median(own)])


def test_what_is_said_about_a_search_on_fashion_mnist_small():
    found = json.loads((RESULTS / "compare-fashion-mnist-small.json").read_text())
    told = README[README.index("The median over all guesses and seeds is") :].split("times the smallest")[0]
    rows = (RESULTS / "compare-fashion-mnist-small" / "runs.jsonl").read_text().splitlines()
    own = [row["test_loss"] for row in map(json.loads, rows) if row["method"] == "stn"]
    (search,) = (one for one in found["scores"] if (one["method"], one["part"]) == ("tpe", "all"))
    spread = found["methods"][0]["spread_of_test_loss"]
    assert len(own) == 9
    assert_shown(re.findall(r"\d\.\d+", told), [statistics.median(own), search["test_loss"]["median"], spread])
    of_run = [one["cpu_seconds_of_fixed"] for one in found["scores"] if one["method"] == "stn"]
    assert 6.5 < search["cpu_seconds_of_fixed"] / statistics.median(of_run) < 7.5
    assert found["methods"][0]["worse_than_fixed"] == 0


RANKS = {
    "full": "full",
    **{f"rank {rank}": f"rank-{rank}" for rank in (64, 16, 4, 1)},
    "auto (rank 2, 6 and 1)": "auto",
    "full, hyperparameters frozen": "frozen",
    "rank 16, 5 training steps per validation step": "cycle-5",
    "rank 16, 10 training steps per validation step": "cycle-10",
    "rank 16, half the validation batch": "half-batch",
}


OF_RANKS = ("full", "rank-64", "rank-16", "rank-4", "rank-1", "frozen")
ON_FASHION = (*OF_RANKS, "cycle-5", "cycle-10", "half-batch")


@pytest.mark.parametrize(
    ("title", "recipe", "seeds", "name", "variant"),
    [
        *(("response |", "digits", 5, name, variant) for name, variant in RANKS.items()),
        *(
            ("response on Fashion-MNIST", "fashion-mnist-small", 3, name, variant)
            for name, variant in RANKS.items()
            if variant in ON_FASHION
        ),
        *(
            ("response on Penn Treebank", "ptb-small", 2, name, variant)
            for name, variant in RANKS.items()
            if variant in OF_RANKS
        ),
    ],
)
def test_losses_of_ranks_are_those_that_were_recorded(title, recipe, seeds, name, variant):
    recorded = [json.loads(line) for line in (RESULTS / "response-rank.jsonl").read_text().splitlines()]
    runs = [row for row in recorded if (row["recipe"], row["variant"]) == (recipe, variant) and row["seed"] < seeds]
    assert sorted(row["seed"] for row in runs) == list(range(seeds))
    figures = []
    for key in ("valid_loss", "test_loss"):
        losses = [row[key] for row in runs]
        figures += [statistics.mean(losses), min(losses), max(losses)]
    assert_shown(table(title)[name], figures)


def rows(op: str, mode: str, provider: str = "stn_fast", file: str = "cpu.json", shape: tuple[int, ...] = ()) -> list:
    found = json.loads((RESULTS / file).read_text())
    key = (op, mode, provider)
    rows = [row for row in found if (row["op"], row["mode"], row["provider"]) == key]
    return [row for row in rows if row["shape"][: len(shape)] == list(shape)]


def ratios(row: dict) -> list[float]:
    return [row["ratio_to_limit"], row["ratio_to_eager"]]


def megabytes(*found: dict) -> list[float]:
    return [row["peak_bytes"] / 1e6 for row in found]


def sizes(name: str) -> tuple[int, ...]:
    """The numbers in the first cell of a row."""
    return tuple(map(int, re.findall(r"\d+", name)))


def test_gated_linear_layers():
    for name, shown in table("gated linear layer").items():
        forward, train, full = (
            rows("gated_linear", mode, shape=sizes(name))[0] for mode in ("forward", "train", "full")
        )
        (eager,) = rows("gated_linear", "train", "eager", shape=sizes(name))
        assert_shown(shown, [*ratios(forward), *ratios(train), *ratios(full), *megabytes(train, eager)])


@pytest.mark.parametrize(
    ("name", "op", "count"), [("AlexNet's five", "alexnet", 5), ("ResNet-18's eleven", "resnet18", 11)]
)
def test_gated_convolutions(name, op, count):
    (shown,) = [shown for row, shown in table("gated convolutions").items() if row.startswith(name)]
    recorded = []
    for mode in ("train", "valid"):
        found = rows(f"gated_conv2d_{op}", mode)
        assert len(found) == count
        recorded += [geometric_mean(column) for column in zip(*map(ratios, found), strict=True)]
    assert_shown(shown, recorded)


def test_gated_convolutions_against_bare_ones_laid_out_beforehand():
    said = re.search(
        rf"channels_last beforehand: ({NUMBER}) and ({NUMBER}) for AlexNet, ({NUMBER}) and ({NUMBER})", README
    )
    recorded = []
    for op in ("alexnet", "resnet18"):
        for mode in ("train", "valid"):
            both = zip(
                *(rows(f"gated_conv2d_{op}", mode, by) for by in ("stn_fast", "channels_last_convolution")), strict=True
            )
            recorded.append(geometric_mean([ours["ratio_to_limit"] / bare["ratio_to_limit"] for ours, bare in both]))
    assert_shown(list(said.groups()), recorded)


def times(*found: dict) -> float:
    """The median time of the first in that of the second."""
    ours, other = found
    return ours["p50"] / other["p50"]


def test_gated_lstms():
    plain = []
    for name, shown in table("gated LSTM").items():
        recorded = []
        for mode in ("train", "valid"):
            ours, joined = (rows("gated_lstm", mode, by, shape=sizes(name))[0] for by in ("stn_fast", "concatenated"))
            recorded += [*ratios(ours), times(ours, joined)]
        ours, eager, torchs = (
            rows("gated_lstm", "train", by, shape=sizes(name))[0] for by in ("stn_fast", "eager", "plain_lstm")
        )
        assert_shown(shown, [*recorded, *megabytes(ours, eager)])
        plain.append(times(torchs, ours))
    said = re.search(rf"takes ({NUMBER}) and ({NUMBER}) of our training step's time", README)
    assert_shown(list(said.groups()), plain)


def test_augmentation_against_pillow():
    ours, pillow = (rows("augment", "forward", by, shape=(128,))[0] for by in ("stn_fast", "pillow"))
    said = re.search(rf"\(({NUMBER}) times faster than with Pillow", README)
    assert_shown([said[1]], [times(pillow, ours)])


@pytest.mark.parametrize(
    ("name", "op", "shape"),
    [
        ("perturbing 15 hyperparameters, 128 examples", "perturb", (128,)),
        ("perturbing 15 hyperparameters, 4096 examples", "perturb", (4096,)),
        ("augmenting 128 images", "augment", (128,)),
        ("dropout, (128, 4096)", "dropout_flat", ()),
        ("dropout of channels", "dropout_channel", ()),
        ("dropout locked over time", "dropout_locked", ()),
    ],
)
def test_operations_against_eager_torch(name, op, shape):
    (shown,) = [shown for row, shown in table("times faster than eager torch").items() if row.startswith(name)]
    found = [row for mode in ("forward", "full") for row in rows(op, mode, shape=shape)]
    assert_shown(shown, [1 / row["ratio_to_eager"] for row in found])


def test_whole_steps():
    text = " ".join(README[README.index("Whole steps") :].split("\n\n")[0].split())
    text = re.sub(r"\(`[^`]*`\)", "", text)
    modes = ("train", "valid", "train_with_data")
    recorded = [rows("alexnet_step", mode, file="steps-cpu.json")[0]["ratio_to_eager"] for mode in modes]
    for shape in ((70, 40, 650), (35, 20, 200)):
        for mode in ("train", "valid"):
            (row,) = rows("language_step", mode, file="language-steps-cpu.json", shape=shape)
            recorded.append(row["ratio_to_eager"])
    assert_shown(re.findall(r"\d+\.\d+", text), recorded)


@pytest.mark.parametrize(
    ("network", "op", "file"),
    [
        ("AlexNet", "alexnet_step", "steps-low-rank-cpu.json"),
        ("LSTM of 2 × 650", "language_step", "language-steps-low-rank-cpu.json"),
    ],
)
def test_steps_of_low_rank_against_fixed_hyperparameters(network, op, file):
    shown = table("times `fixed` |")
    for name, provider in (("full", "stn_fast"), ("rank 16", "stn_fast_rank16"), ("auto", "stn_fast_auto")):
        modes = {mode: rows(op, mode, file=file, provider=provider)[0] for mode in ("train", "valid", "cycle")}
        (fixed,) = rows(op, "cycle", file=file, provider="fixed")
        expected = [row["ratio_to_fixed"] for row in modes.values()]
        expected.append(modes["cycle"]["peak_bytes"] / fixed["peak_bytes"])
        assert_shown(shown[f"{network}, {name}"], expected)


@pytest.mark.parametrize(("network", "dimensions"), [("ResNet-18", 4), ("GPT-2", 2)])
def test_converted_networks_against_plain_ones(network, dimensions):
    found = json.loads((RESULTS / "conversion-cpu.json").read_text())
    ratios = {(row["mode"], row["provider"]): row["ratio_to_plain"] for row in found if len(row["shape"]) == dimensions}
    keys = [("train", "converted"), ("train", "converted_antithetic"), ("valid", "converted")]
    assert_shown(table("times the plain network")[network], [ratios[key] for key in keys])


@pytest.mark.parametrize(
    ("name", "network"), [("AlexNet", "alexnet"), ("ResNet-18", "own-resnet18"), ("LSTM of 2 × 200", "language")]
)
def test_converted_networks_against_gated_layers(name, network):
    shape = conversion.SHAPES[network]
    modes = ("train", "valid")
    found = [rows("conversion", mode, "converted", "conversion-gated-cpu.json", shape)[0] for mode in modes]
    ratios = [row["ratio_to_gated"] for row in found]
    assert_shown(table("times the network of gated layers")[name], ratios)
    assert max(ratios) <= 1.03


def test_response_steps_of_delta_stn():
    shown, found = table("times | double backward"), json.loads((RESULTS / "response-step-cpu.json").read_text())
    for network, width in (("MLP", 784), ("LSTM", None)):
        of_network = [row for row in found if (row["shape"][1] == 784) == (width == 784)]
        for name, provider in (("full", "stn_fast"), ("rank 16", "stn_fast_rank16")):
            response, iteration = (
                next(row for row in of_network if (row["mode"], row["provider"]) == (mode, provider))
                for mode in ("response", "iteration")
            )
            expected = [
                response["ratio_to_double_backward"],
                response["ratio_to_func_jvp"],
                iteration["ratio_to_plain"],
            ]
            assert_shown(shown[f"{network}, {name}"], expected)


METHODS = {
    "`stn`": "stn",
    "`delta-stn`": "delta-stn",
    "`one-pass`": "one-pass",
    "`fixed`": "fixed",
    "`stn`, hyperparameters frozen": "frozen",
}
ENDS = {
    "dropout of the input": ("input_dropout", 1),
    "dropout of the first hidden layer": ("hidden_dropout_1", 1),
    "dropout of the second hidden layer": ("hidden_dropout_2", 1),
    "noise of the input": ("input_noise", 1),
    "1000 × weight decay": ("weight_decay", 1000),
}


def runs_of_methods(recipe, method):
    lines = (RESULTS / "methods.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if (row["recipe"], row["method"]) == (recipe, method)]


@pytest.mark.parametrize("name", METHODS)
def test_methods_from_three_guesses(name):
    runs, expected = runs_of_methods("digits", METHODS[name]), []
    for guess in (0.05, 0.3, 0.7):
        from_guess = [run for run in runs if run["guess"] == guess]
        assert [run["seed"] for run in from_guess] == list(range(5))
        expected += [statistics.median(run[key] for run in from_guess) for key in LOSSES[:2]]
    assert_shown(table("method, from dropout")[name], [*expected, statistics.median(r["wall_seconds"] for r in runs)])


def test_where_hyperparameters_end():
    shown, relative = table("hyperparameter at the end"), {}
    for name, (parameter, factor) in ENDS.items():
        expected = []
        for method in ("stn", "delta-stn"):
            values = [factor * run["hyperparameters_end"][parameter] for run in runs_of_methods("digits", method)]
            expected += [statistics.mean(values), statistics.pstdev(values)]
            relative[method, parameter] = expected[-1] / expected[-2]
        assert_shown(shown[name], expected)
    wider = [
        parameter for parameter, _ in ENDS.values() if relative["delta-stn", parameter] > relative["stn", parameter]
    ]
    assert wider == ["input_noise"]


def test_the_machine_and_torch_are_those_of_the_rows():
    said = re.search(r"On an (.*) with (\d+) threads and torch ([\d.]+\d)", README)
    for row in json.loads((RESULTS / "cpu.json").read_text()):
        assert row["device"] == f"{said[1]}, {said[2]} threads"
        assert row["versions"]["torch"].startswith(said[3])


def test_losses_in_both_precisions_and_the_recipes_that_take_bf16():
    recorded = json.loads((RESULTS / "precision.json").read_text())
    shown = table("recipe | fp32 | bf16")
    assert len(shown) == len(recorded)
    for name, runs in recorded.items():
        fp32, bf16 = (precision.losses(runs, each) for each in ("fp32", "bf16"))
        assert_shown(
            shown[f"`{name}`, {len(fp32)} seeds"],
            [statistics.mean(fp32), statistics.mean(bf16), precision.spread(fp32)],
        )
    said = re.search(r"use it on CUDA by default:\n([^.]*)\.", README)[1]
    assert set(re.findall("`([^`]*)`", said)) == {name for name, runs in recorded.items() if precision.holds(runs)}


HYPERGRADIENTS = (ROOT / "docs" / "hypergradients.md").read_text()
TRIED = {
    "one pass, `method.antithetic=false`": "method.antithetic=false",
    "`method.response_rank=auto`": "method.response_rank=auto",
    "`hyper_optimizer.learning_rate=0.1`, three times the recipe's": "hyper_optimizer.learning_rate=0.1",
    "σ = 0.5, `hyperparameters.NAME.scale=0.5` for all": "hyperparameters.output_dropout.scale=0.5",
}


def runs_with(recipe, setting):
    rows = map(json.loads, (RESULTS / "settings.jsonl").read_text().splitlines())
    found = [row for row in rows if row["recipe"] == recipe and setting in row["set"]]
    return sorted(found, key=lambda row: row["guess"])


@pytest.mark.parametrize("name", TRIED)
def test_settings_that_were_tried_on_ptb_small(name):
    expected = [row[key] for row in runs_with("ptb-small", TRIED[name]) for key in PERPLEXITIES]
    assert expected
    assert_shown(table("`ptb-small`, seed 0", HYPERGRADIENTS)[name], expected)


def test_the_recipe_as_it_was_beside_settings_that_were_tried():
    expected = [run[key] for run in runs_of_methods("ptb-small", "stn") for key in PERPLEXITIES]
    assert_shown(table("`ptb-small`, seed 0", HYPERGRADIENTS)["as it was (σ = 1 for all, not tuned)"], expected)


def test_averaged_weights_on_ptb_small():
    shown = table("`ptb-small`, averaged or not", HYPERGRADIENTS)
    scores = json.loads((RESULTS / "compare-ptb-small-averaged.json").read_text())["scores"]
    averaged = {(one["method"], one["guess"]): [one[key]["median"] for key in PERPLEXITIES] for one in scores}
    rows = map(json.loads, (RESULTS / "compare-ptb-small" / "runs.jsonl").read_text().splitlines())
    plain = {(row["method"], row["guess"]): [row[key] for key in PERPLEXITIES] for row in rows if row["seed"] == 0}
    for guess in ("low", "high"):
        keys = [(method, guess) for method in ("stn", "fixed")]
        assert_shown(shown[f"from {guess}"], [one for key in keys for one in (*averaged[key], *plain[key])])


def test_two_passes_with_the_published_start_on_fashion_mnist_small():
    expected = [row[key] for row in runs_with("fashion-mnist-small", "method.antithetic=true") for key in LOSSES[:2]]
    shown = table("`fashion-mnist-small`, seed 0", HYPERGRADIENTS)["published start, two passes"]
    assert_shown(shown, expected)


@pytest.mark.parametrize("step", [244, 1221, 1954])
def test_hypergradients_on_ptb_small_are_those_that_were_recorded(step):
    shown = table(f"hyperparameter, step {step}", HYPERGRADIENTS)
    for row in map(json.loads, (RESULTS / "hypergradient-ptb-small.jsonl").read_text().splitlines()):
        if row["step"] == step:
            thousandths = [row["gradient"], row["standard_error"], row["fitted"]]
            thousandths += [row["differences"][horizon][0] for horizon in ("10", "50", "200")]
            expected = [abs(1000 * number) for number in thousandths]
            expected.insert(2, row["signal_to_noise"])
            assert_shown(shown.pop(row["hyperparameter"].replace("_", " ")), expected)
    assert not shown


def hypergradient_rows():
    return [json.loads(line) for line in (RESULTS / "hypergradient.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", hypergradient_rows(), ids=lambda row: f"{row['step']}-{row['hyperparameter']}")
def test_hypergradients_are_those_that_were_recorded(row):
    thousandths = [row["gradient"], row["standard_error"], row["fitted"]]
    for horizon in ("10", "50", "200", "rest"):
        thousandths += mean_and_error(row, horizon)
    expected = [abs(1000 * value) for value in thousandths]  # the table's numbers are read without their signs
    expected.insert(2, row["signal_to_noise"])
    name = f"{row['step']}, {row['hyperparameter'].replace('_', ' ')}"
    assert_shown(table("step, hyperparameter", HYPERGRADIENTS)[name], expected)
    shown = next(line for line in HYPERGRADIENTS.splitlines() if line.startswith(f"| {name} |"))
    assert ("| -" in shown.split(" ± ")[0]) == (row["gradient"] < 0)


COMPARED_NAMES = {"stn": "self-tuned", "fixed": "fixed", "frozen": "self-tuning network, frozen"}


@pytest.mark.parametrize(
    ("recipe", "name", "keys"),
    [
        ("digits-small", "`digits-small`", LOSSES[:2]),
        ("digits-even-split", "even split", LOSSES[:2]),
        ("fashion-mnist-small", "`fashion-mnist-small`", LOSSES[:2]),
        ("ptb-small", "`ptb-small`", PERPLEXITIES),
    ],
)
def test_the_comparison_with_a_search_is_the_recorded_one(recipe, name, keys):
    recorded = json.loads((RESULTS / f"compare-{recipe}.json").read_text())
    shown = table(f"{name}, 3 seeds | best validation {'loss' if keys == LOSSES[:2] else 'perplexity'} |")
    parts = {"all": "TPE, 10 trials", "in CPU s of stn": "TPE, in the CPU time of one self-tuned run"}
    for entry in recorded["scores"]:
        own = f"{COMPARED_NAMES.get(entry['method'])} from {entry['guess']}"
        name = own if entry["guess"] else parts.get(entry["part"], "TPE, in the CPU time of its steps")
        scores = [entry[key][of] for key in keys for of in ("median", "smallest", "largest")]
        compute = [entry["cpu_seconds_of_fixed"], entry["step_cpu_seconds_of_fixed"]]
        assert_shown(shown.pop(name), [*scores, *(value for value in compute if value is not None)])
    assert not shown


def test_no_short_run_became_non_finite():
    rows = [json.loads(line) for line in (RESULTS / "short-runs.jsonl").read_text().splitlines()]
    assert {(row["task"], row["seed"]) for row in rows} == {(task, seed) for task in TASKS for seed in range(100)}
    assert {(row["method"], row["cycles"], row["as_published"], row["diverged"]) for row in rows} == {
        ("stn", 100, False, None)
    }


def test_what_is_said_about_an_even_split():
    methods = json.loads((RESULTS / "compare-digits-even-split.json").read_text())["methods"]
    told = README[README.index("Here ten trials of TPE are better") :].split(", and self-tuned")[0]
    found = {entry["method"]: entry for entry in methods}
    medians = [found[method]["test_loss"]["median"] for method in ("tpe", "stn")]
    assert_shown(re.findall(r"\d\.\d+", told), medians)
    assert (found["stn"]["worse_than_fixed"], found["stn"]["compared_with_fixed"]) == (0, 9)


def medians_of_stn(scores):
    """Of its validation and test losses, from each guess in turn."""
    found = {entry["guess"]: entry for entry in scores if entry["method"] == "stn"}
    return [found[guess][loss]["median"] for guess in ("low", "middle", "high") for loss in LOSSES[:2]]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("`shifted`, 6 seeds", "compare-digits-small-six-seeds"),
        ("`raw`, 6 seeds", "compare-digits-small-raw"),
        ("`value`, 3 seeds", "compare-digits-small-value"),
    ],
)
def test_other_responses_on_digits_small(name, file):
    scores = json.loads((RESULTS / f"{file}.json").read_text())["scores"]
    expected = medians_of_stn(scores)
    assert_shown(table("`digits-small`, `method.response`", HYPERGRADIENTS)[name], expected)
    assert {entry["seeds"] for entry in scores} == {int(name.split()[1])}


def test_where_a_raw_response_arrives_on_digits_small():
    told = HYPERGRADIENTS[HYPERGRADIENTS.index("18 runs end between") :].split("- On `ptb-small`")[0]
    raw, shifted = (
        json.loads((RESULTS / f"compare-digits-small-{name}.json").read_text())["methods"][0]
        for name in ("raw", "six-seeds")
    )
    ends = [one["ends"]["input_noise"][of] for one in (raw, shifted) for of in ("smallest", "largest")]
    spreads = [one["spread_of_test_loss"] for one in (raw, shifted)]
    medians = [one["test_loss"]["median"] for one in (raw, shifted)]
    assert (raw["runs"], shifted["runs"]) == (18, 18)
    assert_shown(re.findall(r"\d\.\d+", told), [*ends, *spreads, *medians])


def test_a_raw_response_on_ptb_small():
    (low,) = json.loads((RESULTS / "compare-ptb-small-raw.json").read_text())["scores"]
    told = HYPERGRADIENTS[HYPERGRADIENTS.index("seeds 0 and 1 end at") :].split("All recipes keep")[0]
    raw = [low["valid_perplexity"][of] for of in ("smallest", "largest")]
    rows = map(json.loads, (RESULTS / "compare-ptb-small" / "runs.jsonl").read_text().splitlines())
    shifted = {row["seed"]: row["valid_perplexity"] for row in rows if (row["method"], row["guess"]) == ("stn", "low")}
    assert_shown(re.findall(r"\d+\.\d+", told), [*raw, shifted[0], shifted[1]])


@pytest.mark.parametrize("recipe", ["digits-small", "fashion-mnist-small", "ptb-small"])
def test_the_summary_of_three_tasks_is_that_of_the_recorded_runs(recipe):
    recorded = json.loads((RESULTS / f"compare-{recipe}.json").read_text())
    methods = {entry["method"]: entry for entry in recorded["methods"]}
    score = "test_perplexity" if recipe == "ptb-small" else "test_loss"
    compute: dict[str, list[float]] = {
        method: [
            entry["cpu_seconds_of_fixed"]
            for entry in recorded["scores"]
            if entry["method"] == method and entry["part"] in (None, "all")
        ]
        for method in ("stn", "tpe")
    }
    own, search = ([methods[name][score]["median"], methods[name][f"spread_of_{score}"]] for name in ("stn", "tpe"))
    assert (methods["stn"]["runs"], methods["tpe"]["runs"]) == (9, 30)
    runs = [methods["stn"]["worse_than_fixed"], methods["stn"]["compared_with_fixed"]]
    expected = [*own, *runs, min(compute["stn"]), max(compute["stn"]), *search, *compute["tpe"]]
    assert_shown(table("task, 9 runs, 3 searches")[f"`{recipe}`"], expected)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("σ shrinks from 2 to .5", "compare-digits-small"),
        ("σ starts at .5 and is tuned", "compare-digits-small-narrow"),
    ],
)
def test_wide_perturbations_on_digits_small(name, file):
    scores = json.loads((RESULTS / f"{file}.json").read_text())["scores"]
    expected = medians_of_stn(scores)
    assert_shown(table("`digits-small`, self-tuned", HYPERGRADIENTS)[name], expected)


def test_the_vision_transformer_is_the_recorded_one():
    rows = json.loads((RESULTS / "five_lines.json").read_text())
    shown = table("vision transformer, 3 seeds")
    keys = [*LOSSES, "epochs", "cpu_seconds"]
    for name, numbers in shown.items():
        of_run = [row for row in rows if row["run"] == name]
        assert_shown(numbers, [statistics.median(row[key] for row in of_run) for key in keys])
    assert set(shown) == set(five_lines.RUNS)
    told = README[README.index("Of each seed, the self-tuned") :]
    numbers = re.findall(r"\d?\.\d+", told)[: 2 * 3]
    ratios = [ratio for run in five_lines.RUNS[1:] for ratio in five_lines.ratios(rows, run, "valid_loss")]
    assert_shown(numbers, ratios)
