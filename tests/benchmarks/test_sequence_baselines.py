"""What the package is compared with on sequences computes what it stands for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sequences
from benchmarks.cases import Case
from benchmarks.sequence_cases import (
    GATED_LSTM_MODES,
    GATED_LSTM_SHAPES,
    _in_one_piece,
    gated_lstm_inputs,
    gated_lstm_shapes,
    sequence_limit,
)

CASE = Case("gated_lstm", "full", (4, 3, 6), torch.float32, torch.device("cpu"), compiled=False)
STEPS, BATCH, HIDDEN = CASE.shape


def inputs_in_float64():
    inputs, _ = gated_lstm_inputs(CASE)
    return [tensor.double() for tensor in inputs]


def test_eager_gated_lstm_is_torchs_lstm_with_each_examples_own_weights() -> None:
    x, h_0, c_0, *weights, h = inputs_in_float64()
    got = sequences.gated_lstm(x, h_0, c_0, *weights, h)
    for b in range(BATCH):
        plain = torch.nn.LSTM(HIDDEN, HIDDEN, dtype=torch.float64)
        own = {}
        for side, (w, bias, r, r_bias, gate, bias_gate) in {"ih": weights[:6], "hh": weights[6:]}.items():
            own[f"weight_{side}_l0"] = w + torch.diag(gate @ h[b]) @ r
            own[f"bias_{side}_l0"] = bias + (bias_gate @ h[b]) * r_bias
        plain.load_state_dict(own)
        want, _ = plain(x[:, b : b + 1], (h_0[None, b : b + 1], c_0[None, b : b + 1]))
        torch.testing.assert_close(got[:, b : b + 1], want)


def test_joined_products_give_the_same() -> None:
    inputs = inputs_in_float64()
    torch.testing.assert_close(sequences.concatenated_lstm(*inputs), sequences.gated_lstm(*inputs))


def test_plain_lstm_is_torchs() -> None:
    x, h_0, c_0, *weights, h = inputs_in_float64()
    plain = torch.nn.LSTM(HIDDEN, HIDDEN, dtype=torch.float64)
    names = "weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0"
    plain.load_state_dict(dict(zip(names, (*weights[:2], *weights[6:8]), strict=True)))
    got = sequences.plain_lstm(x, h_0, c_0, *weights, h)
    torch.testing.assert_close(got, plain(x, (h_0[None], c_0[None]))[0])


def test_the_plain_lstm_that_is_timed_has_the_same_weights_in_one_piece() -> None:
    inputs, _ = gated_lstm_inputs(CASE)
    laid_out = _in_one_piece(inputs)
    assert all(map(torch.equal, laid_out, inputs))
    torch.testing.assert_close(sequences.plain_lstm(*laid_out), sequences.plain_lstm(*inputs))


def test_cuda_measures_the_layers_of_both_language_models() -> None:
    assert set(gated_lstm_shapes(torch.device("cuda"))) == {(70, 40, 650), (70, 80, 1150), (35, 20, 200)}
    assert set(gated_lstm_shapes(torch.device("cpu"))) == set(GATED_LSTM_SHAPES)


@pytest.mark.parametrize("mode", GATED_LSTM_MODES)
def test_all_implementations_of_a_mode_return_the_same_gradients(mode: str) -> None:
    case = Case("gated_lstm", mode, CASE.shape, torch.float32, CASE.device, compiled=False)
    providers = case.providers()
    got, want = (providers[name].call(providers[name].prepare()) for name in ("stn_fast", "eager"))
    assert len(got) == len(want) == sum(GATED_LSTM_MODES[mode][1])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_baselines_return_what_eager_returns() -> None:
    case = Case("gated_lstm", "full", CASE.shape, torch.float32, CASE.device)
    providers = case.providers()
    want = providers["eager"].call(None)
    for name in ("compiled_step", "concatenated"):
        for one, other in zip(providers[name].call(None), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_both_limits_give_the_same_products() -> None:
    limit = sequence_limit(gated_lstm_inputs(CASE)[0])
    of_x, last = limit.forward_one()
    torch.testing.assert_close(of_x, torch.cat(limit.forward_two()[:2], dim=1))
    torch.testing.assert_close(last, torch.cat(limit.forward_two()[2:], dim=1))
    dx, of_input, state, of_hidden = (tensor.clone() for tensor in limit.backward_one(weights=True, first_state=True))
    dx_two, weight, response, state_two, recurrent, recurrent_response = limit.backward_two(True, True)
    torch.testing.assert_close(dx, dx_two)
    torch.testing.assert_close(state, state_two)
    torch.testing.assert_close(of_input, torch.cat([weight, response]))
    torch.testing.assert_close(of_hidden, torch.cat([recurrent, recurrent_response]))


def test_the_limit_does_the_arithmetic_of_its_products_and_no_more() -> None:
    limit = sequence_limit(gated_lstm_inputs(CASE)[0])
    product = 2 * BATCH * HIDDEN * 8 * HIDDEN  # [W; R] and the rows of one step
    for count, products in {
        2 * STEPS: [limit.forward_one, limit.forward_two],
        4 * STEPS: [lambda of=of: of(True, True) for of in (limit.backward_one, limit.backward_two)],
        2 * STEPS - 1: [lambda of=of: of(False, False) for of in (limit.backward_one, limit.backward_two)],
    }.items():
        for run in products:
            with FlopCounterMode(display=False) as counter:
                run()
            assert counter.get_total_flops() == count * product
