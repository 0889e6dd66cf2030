"""Configuration: every wrong value is refused by name, and layers override one another in order."""

import pytest
import yaml

from stn_fast.errors import UserError
from stn_fast.recipes import digits, recipe
from stn_fast.training.config import Config, HyperparameterConfig, MethodConfig, as_published
from stn_fast.training.layering import differences, resolve, to_yaml
from stn_fast.training.spaces import build_space


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("schedule.epochs=0", r"schedule.epochs \(--epochs\) = 0: must be at least 1"),
        ("schedule.max_steps=-1", "schedule.max_steps"),
        ("schedule.checkpoints_kept=1", "schedule.checkpoints_kept = 1: must be at least 2"),
        ("schedule.batch_size=1.5", "schedule.batch_size = 1.5: must be a whole number"),
        ("schedule.batch_size=true", "must be a whole number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate = 0.0: must be a finite number above 0"),
        ("optimizer.learning_rate=.inf", "must be a finite number above 0"),
        ("optimizer.learning_rate=.nan", "must be a finite number above 0"),
        ("optimizer.learning_rate=fast", "must be a number"),
        ("optimizer.momentum=1", "must be at least 0 and below 1"),
        ("optimizer.decay_factor=0", "optimizer.decay_factor = 0.0: must be above 0 and at most 1"),
        ("optimizer.decay_factor=1.5", "must be above 0 and at most 1"),
        ("optimizer.decay_factor=.nan", "must be above 0 and at most 1"),
        ("optimizer.decay_patience=0", "optimizer.decay_patience = 0: must be at least 1"),
        ("optimizer.min_learning_rate=-1", "must be at least 0 and below learning_rate = 0.05"),
        ("optimizer.min_learning_rate=0.05", "must be at least 0 and below learning_rate = 0.05"),
        ("optimizer.min_learning_rate=.nan", "must be at least 0 and below"),
        ("optimizer.average=1", "optimizer.average = 1.0: must be at least 0 and below 1"),
        ("hyper_optimizer.name=rmsprob", "hyper_optimizer.name = 'rmsprob': did you mean 'rmsprop'"),
        ("schedule.patience=0", "schedule.patience = 0: must be at least 1"),
        ("train_fraction=0", r"train_fraction \(--train-fraction\) = 0.0: must be above 0 and at most 1"),
        ("train_fraction=1.5", "must be above 0 and at most 1"),
        ("train_fraction=.nan", "must be above 0 and at most 1"),
        ("hyper_optimizer.learning_rate=-1", "hyper_optimizer.learning_rate"),
        ("hyper_optimizer.beta2=1", "hyper_optimizer.beta2 = 1.0: must be at least 0 and below 1"),
        ("method.response_start=zeros", "method.response_start = 'zeros': did you mean 'zero'"),
        ("method.linearize=false", "method.linearize = False: only applies to --method delta-stn"),
        (
            "method.response_learning_rate=0.1",
            "method.response_learning_rate = 0.1: only applies to --method delta-stn",
        ),
        ("method.weight_decay=0.1", "method.weight_decay = 0.1: only applies to --method one-pass"),
        ("method.neumann_terms=3", "method.neumann_terms = 3: only applies to --method one-pass"),
        ("method.name=stm", "did you mean 'stn'"),
        ("method.train_steps=0", "method.train_steps"),
        ("method.valid_steps=0", "method.valid_steps"),
        ("method.warmup_epochs=-1", "method.warmup_epochs"),
        ("method.entropy_weight=-1", "method.entropy_weight"),
        ("method.scale_decay=0.5", "method.scale_decay = 0.5: only applies if tune_scales is false"),
        ("method.scale_decay=0", "method.scale_decay = 0.0: must be a finite number above 0"),
        ("method.response=shift", "did you mean 'shifted'"),
        ("method.freeze=perhaps", "must be true or false"),
        (
            "hyperparameters.input_dropout.init=0.95",
            "hyperparameters.input_dropout.init = 0.95: must be strictly inside",
        ),
        (
            "hyperparameters.input_dropout.init=.nan",
            "hyperparameters.input_dropout.init = nan: must be a finite number",
        ),
        (
            "hyperparameters.input_dropout.scale=5",
            "hyperparameters.input_dropout.scale = 5.0: must be in",
        ),
        ("hyperparameters.input_dropout.high=0.99999999", "excludes 1, but float32 values reach it"),
        ("hyperparameters.input_dropout.low=2", "hyperparameters.input_dropout.high"),
        ("hyperparameters.weight_decay.scale=0", "hyperparameters.weight_decay.scale"),
        ("seed=-1", r"seed \(--seed\)"),
        ("device=gpu", "did you mean 'cpu'"),
        ("recipe=ptb", "recipe"),
        ("schedule=3", "must be a section with keys epochs"),
        ("schedule.epoch=3", "unknown key 'schedule.epoch' in --set: did you mean 'epochs'"),
        ("sheduel.epochs=3", "did you mean 'schedule'"),
        ("hyperparameters.hidden_dropout_3.init=.1", "did you mean 'hidden_dropout_"),
        ("seed", "must be name=value"),
        ("seed=[1", "is not a YAML value"),
    ],
)
def test_a_wrong_value_is_refused_by_name(pair, says):
    with pytest.raises(UserError, match=says):
        resolve(digits.config(), None, [pair])


def test_integers_cannot_respond_with_their_value():
    config = recipe("cifar10").config()
    with pytest.raises(UserError, match=r"method.response = 'value': cannot tune integers.*disable cutout_"):
        resolve(config, None, ["method.response=value"])
    names = [name for name, entry in config.hyperparameters.items() if entry.integer]
    without = [f"hyperparameters.{name}.enabled=false" for name in names]
    build_space(resolve(config, None, ["method.response=value", *without]))


@pytest.mark.parametrize(("given", "rank"), [("16", 16), ("auto", "auto"), ("null", None)])
def test_the_rank_of_the_response_is_a_number_auto_or_null(given, rank, tmp_path):
    config = resolve(recipe("digits").config(), None, [f"method.response_rank={given}"])
    assert config.method.response_rank == rank
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert resolve(recipe("digits").config(), str(file), []) == config


@pytest.mark.parametrize("given", ["0", "-1", "automatic", "1.5", "true"])
def test_a_wrong_rank_is_refused_by_its_key(given):
    with pytest.raises(UserError, match=r"method\.response_rank"):
        resolve(recipe("digits").config(), None, [f"method.response_rank={given}"])


def test_fixed_hyperparameters_cannot_also_be_frozen():
    with pytest.raises(UserError, match="--freeze"):
        resolve(digits.config(), None, ["method.name=fixed"], {"method.freeze": True})


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="unknown recipe 'digit': did you mean 'digits'"):
        recipe("digit")


def test_a_config_needs_hyperparameters():
    with pytest.raises(UserError, match="at least one"):
        Config(recipe="digits", hyperparameters={})


def test_a_hyperparameter_that_is_not_enabled_is_left_out():
    config = resolve(digits.config(), None, ["hyperparameters.input_noise.enabled=false"])
    assert set(config.hyperparameters) - set(config.enabled) == {"input_noise"}
    assert build_space(config).names == tuple(config.enabled)
    assert differences(digits.config(), config) == ["hyperparameters.input_noise.enabled: True -> False"]
    left = [f"hyperparameters.{name}.enabled=false" for name in config.enabled]
    with pytest.raises(UserError, match="at least one that is enabled"):
        resolve(config, None, left)


def test_layers_override_one_another_in_order(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\nschedule: {epochs: 1, batch_size: 1}\noptimizer: {learning_rate: 1e-3}\n")
    config = resolve(digits.config(), str(file), ["seed=2", "schedule.epochs=2"], {"seed": 3})
    assert (config.seed, config.schedule.epochs, config.schedule.batch_size) == (3, 2, 1)
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.momentum == digits.config().optimizer.momentum


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1\n", "must hold a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("shedule: {}\n", "unknown key 'shedule' in .*: did you mean 'schedule'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, says):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        resolve(digits.config(), str(file))


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"absent.yaml: No such file"):
        resolve(digits.config(), str(tmp_path / "absent.yaml"))


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    config = resolve(digits.config(), None, ["optimizer.learning_rate=1e-7", "hyperparameters.input_noise.high=3"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert resolve(digits.config(), str(file)) == config
    assert yaml.safe_load(to_yaml(config))["hyperparameters"]["input_noise"]["high"] == 3.0


def test_only_what_decides_results_counts_as_a_difference():
    ours = digits.config()
    longer = resolve(ours, None, ["schedule.epochs=999", "schedule.max_steps=5", "run_dir=x", "data_root=y"])
    assert differences(ours, longer) == []
    patient = resolve(ours, None, ["schedule.patience=5", "optimizer.min_learning_rate=1e-5"])
    assert differences(ours, patient) == []
    other = resolve(ours, None, ["seed=5", "hyperparameters.input_noise.init=0.1", "train_fraction=0.5"])
    assert differences(ours, other) == [
        "hyperparameters.input_noise.init: 0.3 -> 0.1",
        "seed: 0 -> 5",
        "train_fraction: 1.0 -> 0.5",
    ]


def test_run_directories_of_different_methods_do_not_collide():
    labels = {MethodConfig().label, MethodConfig(freeze=True).label, MethodConfig(name="fixed").label}
    assert len(labels) == 3


def test_one_pass_owns_the_learning_rate():
    one_pass = ["method.name=one-pass"]
    assert resolve(digits.config(), pairs=one_pass).method.has_response is False
    says = r"optimizer\.decay_factor = 0\.5: must be 1 for --method one-pass, which tunes the learning rate"
    with pytest.raises(UserError, match=says):
        resolve(digits.config(), pairs=[*one_pass, "optimizer.decay_factor=0.5"])
    with pytest.raises(UserError, match=r"method\.neumann_terms = 0: must be at least 1"):
        resolve(digits.config(), pairs=[*one_pass, "method.neumann_terms=0"])


def test_a_missing_bound_means_unbounded():
    assert HyperparameterConfig(init=-1e9).low is None


def test_the_data_root_defaults_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("STN_FAST_DATA", raising=False)
    assert resolve(digits.config()).data_root is None
    monkeypatch.setenv("STN_FAST_DATA", "/data")
    file = tmp_path / "config.yaml"
    file.write_text("data_root: null\n")
    assert resolve(digits.config(), str(file)).data_root == "/data"
    assert resolve(digits.config(), flags={"data_root": "here"}).data_root == "here"
    monkeypatch.setenv("STN_FAST_DATA", "")
    assert resolve(digits.config()).data_root is None


def test_the_published_steps_have_constant_scales():
    config = resolve(digits.config(), None, ["method.tune_scales=false", "method.scale_decay=0.25"])
    published = as_published(config)
    assert (published.method.scale_decay, published.method.antithetic) == (1.0, False)
    assert {one.scale for one in published.hyperparameters.values()} == {0.25 * 0.5}
