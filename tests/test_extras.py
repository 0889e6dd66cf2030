"""Who only swaps layers needs torch, Triton and NumPy; a command line says in one line what else it needs."""

import subprocess
import sys

import pytest

from stn_fast.errors import UserError
from stn_fast.extras import extra, require

ALL = ("yaml", "safetensors", "tqdm", "matplotlib", "sklearn", "scipy", "joblib")


def python(blocked, code, *arguments):
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n{code}"  # None there: it isn't installed
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_layers_models_and_methods_need_no_extra():
    done = python(
        ALL,
        "import torch, stn_fast as stn\n"
        "from stn_fast.models import plain_mlp, tuned\n"
        "from stn_fast.training import task\n"
        "from stn_fast.training.methods import SelfTuning\n"
        "space = stn.HyperparameterSpace([stn.Hyperparameter('hidden_dropout_1', low=0.0, high=0.9, init=0.3)])\n"
        "loss = task.classification_loss\n"
        "method = SelfTuning(tuned(plain_mlp((4, 8, 2)), space), space, loss, loss, seed=0)\n"
        "batch = torch.randn(6, 4), torch.randint(2, (6,))\n"
        "method.train_step(batch, 0), method.valid_step(batch, 1)\n",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "package"),
    [("yaml", "pyyaml"), ("safetensors", "safetensors"), ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")],
)
def test_a_missing_extra_is_told_before_the_run_begins(tmp_path, missing, package):
    code = "from stn_fast.train import main; raise SystemExit(main(sys.argv[1:]))"
    done = python((missing,), code, "digits", "--set", "seed=1", "--max-steps", "2", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {package} is missing: pip install 'stn-fast[train]' installs it")
    assert not list(tmp_path.rglob("result.json"))


def test_an_import_error_of_our_own_module_is_not_reported_as_a_missing_extra():
    with pytest.raises(ModuleNotFoundError), extra("pyyaml"):
        raise ModuleNotFoundError("No module named 'stn_fast.nowhere'", name="stn_fast.nowhere")
    with pytest.raises(UserError, match="no_such_package is missing"):
        require("no_such_package")


@pytest.mark.parametrize(("package", "name"), [("optuna", "compare"), ("matplotlib", "train"), ("timm", "examples")])
def test_the_extra_that_installs_a_package_is_named(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is missing: pip install 'stn-fast\[{name}\]'"):
        require(package)
