"""What the package's language model is compared with computes what it stands for."""

import json

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import baselines, language_steps, published_language
from stn_fast.models import LanguageModel, tuned
from stn_fast.recipes import recipe
from stn_fast.training.spaces import build_space
from stn_fast.training.task import outputs

SPACE = build_space(recipe("ptb").config())
WORDS, WIDTH, BATCH = 13, 6, 3


def trainer():
    torch.manual_seed(0)
    ranges = [baselines.Range(h.low, h.high, h.integer) for h in SPACE]
    shared = [not h.per_example for h in SPACE]
    sizes = dict(words=WORDS, width=WIDTH, layers=2, batch=BATCH)
    return published_language.Trainer(SPACE.names, ranges, shared, *SPACE.initial_state(), **sizes)


def window(time=5):
    return torch.randint(WORDS, (2, time, BATCH), generator=torch.Generator().manual_seed(1))


def test_the_published_network_is_the_packages() -> None:
    """Same weights in both: the same logits and states, so their steps do the same arithmetic."""
    ours, theirs = tuned(LanguageModel(WORDS, WIDTH, WIDTH), SPACE).eval(), trainer().model
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        for name in ("weight", "response_weight", "weight_gate"):
            getattr(theirs, name).copy_(getattr(ours.embedding, name))
        for mine, layer in zip(ours.lstm, theirs.layers, strict=True):
            for side, gated in (("ih", layer.from_input), ("hh", layer.from_hidden)):
                for name, parameter in gated.named_parameters():
                    parameter.copy_(getattr(mine, f"{name}_{side}_l0"))
        hyper = SPACE.sample(*SPACE.initial_state(), batch_size=BATCH, seed=0, step=0)
        tokens, state = window()[0], torch.randn(2, BATCH, WIDTH)
        found = outputs(ours, hyper, tokens, (state, 2 * state))
        states = [(h, 2 * h) for h in state]
        logits, after, raw, dropped = theirs(tokens, hyper.response, None, states)
    torch.testing.assert_close(logits, found.logits, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(raw, found.raw, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.stack([cell for _, cell in after]), found.state[1], rtol=1e-3, atol=1e-5)
    assert dropped is raw


class Masked(TorchFunctionMode):
    """Counts products with what has the shape of a recurrent weight, element by element."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.mul and args[0].shape == (4 * WIDTH, WIDTH)
        return function(*args, **(kwargs or {}))


def test_the_published_network_masks_its_weights_once_a_call_however_long_it_is() -> None:
    """As its authors' code does: at every time step, the package would be compared with something slower."""
    it = trainer()
    for time in (1, 5):
        inputs, targets = window(time)
        with Masked() as masked:
            it.train_step(inputs, targets)
        assert masked.count == 2 * 2  # layers, branches


def test_the_published_steps_train_and_tune_and_carry_states() -> None:
    it = trainer()
    inputs, targets = window()
    losses = [it.train_step(inputs, targets).item() for _ in range(2)]
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
    assert it.states["train"][1][1].any()
    assert not it.states["valid"][1][1].any()
    weight, location = it.model.weight.detach().clone(), it.location.detach().clone()
    it.valid_step(inputs, targets)
    assert torch.equal(it.model.weight, weight)
    assert it.model.weight.grad is not None
    assert (it.location != location).all()


def test_the_command_prints_a_ratio_and_writes_rows(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(language_steps.SHAPES, "ptb", (5, 2, 6, 13))
    file = tmp_path / "rows.json"
    assert language_steps.main(["--sizes", "ptb", "--seconds", "0", "--rounds", "2", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    for mode in language_steps.MODES:
        assert sum(line.split()[1:2] == [mode] and "ratio to published" in line for line in said.splitlines()) == 2
    rows = json.loads(file.read_text())
    assert {row["provider"] for row in rows} == {"stn_fast", "plain", "published"}
    assert len(rows) == 3 * len(language_steps.MODES)


def test_steps_of_low_rank_are_compared_with_fixed_hyperparameters(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(language_steps.SHAPES, "ptb", (5, 2, 6, 13))
    file = tmp_path / "rows.json"
    arguments = ["--sizes", "ptb", "--seconds", "0", "--rounds", "2", "--providers", "stn_fast_rank4", "fixed"]
    assert language_steps.main([*arguments, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert sum("stn_fast_rank4" in line and "ratio to fixed" in line for line in said.splitlines()) == 3
    rows = json.loads(file.read_text())
    assert all(row["ratio_to_fixed"] == 1 for row in rows if row["provider"] == "fixed")
    assert len(rows) == 2 * len(language_steps.MODES)
