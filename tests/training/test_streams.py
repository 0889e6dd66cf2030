"""Streams: which predictions a window holds, what state it is given, and that an evaluation sees every word once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stn_fast.data import Split
from stn_fast.training.streams import IGNORED, ContinuousText, Streams, WholeText


def counted(words):
    """A text whose word number k is k, after the word -1."""
    return Split(torch.arange(words) - 1, torch.arange(words))


def streams(words=100, batch_size=3, window=4, seed=0, stream=0):
    return Streams(counted(words), batch_size, window, seed=seed, stream=stream)


def one_pass(text, number=0):
    """The targets of a whole pass, (length, B)."""
    first = number * text.per_pass
    return torch.cat([text[first + position].targets for position in range(text.per_pass)])


@given(st.integers(1, 300), st.integers(1, 7), st.integers(1, 9), st.integers(0, 5))
def test_a_pass_is_one_stretch_of_the_text_cut_into_streams(words, batch_size, window, number):
    if words < batch_size * window:
        return
    text = streams(words, batch_size, window)
    found = one_pass(text, number)
    assert found.shape == (words // (batch_size * window) * window, batch_size)
    stretch = found.t().flatten()
    assert stretch[0] >= 0
    assert stretch[-1] < words
    assert torch.equal(stretch, torch.arange(len(stretch)) + stretch[0])


def test_a_window_has_the_word_before_every_target():
    window = streams()[2]
    assert window.inputs.shape == (4, 3)
    assert window.examples == 3
    assert torch.equal(window.inputs, window.targets - 1)
    assert window.inputs.is_contiguous()
    assert window.targets.is_contiguous()


def test_words_left_over_by_one_pass_are_read_by_others():
    text = streams(words=65, batch_size=3, window=11)
    seen = torch.cat([one_pass(text, number).flatten() for number in range(300)])
    assert text.per_pass == 1
    assert set(seen.tolist()) == set(range(65))


def test_windows_depend_only_on_seed_stream_and_index():
    def begins(seed, stream, number):
        return streams(words=1000, window=100, seed=seed, stream=stream)[number * 3].targets[0, 0].item()

    assert begins(0, 0, 2) == begins(0, 0, 2)
    assert len({begins(*key) for key in [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]}) == 4
    forwards, backwards = streams(), streams()
    there = [forwards[index].targets for index in range(20)]
    for index in reversed(range(20)):
        assert torch.equal(backwards[index].targets, there[index])


def test_a_window_starts_from_the_state_of_the_previous_one_and_a_pass_without_a_state():
    text = streams()
    assert text.per_pass == 8
    for index in range(20):
        window = text[index]
        assert window.state == (None if index % 8 == 0 else {"seen": [torch.tensor(index - 1)]})
        assert text[index].state == window.state  # reading again changes nothing
        window.carry({"seen": [torch.tensor(index)]})


def test_a_carried_state_is_detached():
    text = streams()
    weight = torch.ones(2, requires_grad=True)
    text[0].carry((weight * 2, [weight * 3]))
    first, (second,) = text[1].state
    assert not first.requires_grad
    assert second.grad_fn is None
    assert torch.equal(second, torch.full((2,), 3.0))


def test_a_window_out_of_order_is_refused_rather_than_given_anothers_state():
    text = streams()
    text[0].carry(torch.zeros(1))
    text[1].carry(torch.ones(1))
    for index in (1, 3):
        says = rf"window {index} starts from .* window {index - 1}, but the state is for window 2: read"
        with pytest.raises(ValueError, match=says):
            text[index].state  # noqa: B018
    assert torch.equal(text[2].state, torch.ones(1))
    assert text[8].state is None


def test_a_restored_state_continues_and_does_not_keep_a_larger_tensor():
    text, again = streams(), streams()
    text[0].carry((torch.arange(1000.0)[:2], torch.ones(2)))
    saved = text.state_dict()
    assert saved["state"][0].untyped_storage().nbytes() == 8
    again.load_state_dict(saved)
    assert torch.equal(again[1].state[0], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="the state is for window 1"):
        again[2].state  # noqa: B018


def test_a_state_that_is_never_carried_on_is_noticed():
    text, whole = streams(), iter(WholeText(counted(10), 2, 4))
    assert text[0].state is None
    assert next(whole).state is None
    for window in (text[1], next(whole)):
        with pytest.raises(ValueError, match="window 0, but no state was carried"):
            window.state  # noqa: B018


def test_a_model_without_a_state_says_so():
    text = streams()
    for index in range(4):
        assert text[index].state is None
        assert text[index].finish(torch.ones(())) == 1


def test_a_windows_repr_is_a_line():
    assert repr(streams()[1]) == "Window(index=1, begins=False)"


@pytest.mark.parametrize(("count", "size"), [(0, 4), (2, 0)])
def test_an_evaluation_in_no_streams_or_no_words_is_refused(count, size):
    with pytest.raises(ValueError, match=f"WholeText: streams and size must be at least 1, got {count} and {size}"):
        WholeText(counted(10), count, size)


@pytest.mark.parametrize(
    ("words", "batch_size", "window", "says"),
    [
        (
            11,
            3,
            4,
            r"batch_size=3 columns of 4 words per step need 12 words, but the text has 11: use at most 2 columns",
        ),
        (3, 1, 4, r"need 4 words, but the text has 3: use a smaller window"),
        (11, 0, 4, "batch_size and window must be at least 1, got 0 and 4"),
        (11, 1, 0, "got 1 and 0"),
    ],
)
def test_a_text_shorter_than_a_batch_is_refused(words, batch_size, window, says):
    with pytest.raises(ValueError, match=says):
        streams(words, batch_size, window)


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 60))
def test_an_evaluation_sees_every_word_once_in_streams_of_equal_length(words, count, size):
    windows = list(WholeText(counted(words), count, size))
    targets = torch.cat([window.targets for window in windows])
    inputs = torch.cat([window.inputs for window in windows])
    there = targets != IGNORED
    assert sorted(targets[there].tolist()) == list(range(words))
    assert torch.equal(inputs[there], targets[there] - 1)
    assert there[:-1].all()
    for column, present in zip(targets.t(), there.t(), strict=True):
        column = column[present]
        assert torch.equal(column, torch.arange(len(column)) + column[0])
    assert all(window.targets.numel() <= max(size, window.examples) for window in windows)


def test_an_evaluation_starts_without_a_state_and_carries_it_every_time():
    text = WholeText(counted(10), 2, 4)
    for _ in range(2):
        seen = []
        for window in text:
            seen.append(window.state)
            window.carry(window.index)
        assert seen == [None, 0, 1]


def test_a_text_is_evaluated_in_the_streams_that_it_is_given():
    batching = ContinuousText(window=5, valid_streams=4, test_streams=1)
    assert [window.examples for window in batching.whole(counted(9), 100, test=False)] == [4]
    assert [window.examples for window in batching.whole(counted(9), 100, test=True)] == [1]


def test_a_window_keeps_the_state_that_an_objective_returns():
    text = streams()
    assert text[0].finish((torch.ones(()), torch.zeros(3))) == 1
    assert torch.equal(text[1].state, torch.zeros(3))
    text[0].undo(torch.tensor(False))
    assert torch.equal(text[1].state, torch.zeros(3))
    text[0].undo(None)
    assert text[1].state is None


def test_a_window_for_a_graph_is_independent_and_its_state_is_copied_back():
    text = streams()
    text[0].carry(torch.zeros(3))
    window = text[1]
    alike = window.like(window.parts())
    assert [torch.equal(*pair) for pair in zip(window.parts(), alike.parts(), strict=True)] == [True] * 3
    left = torch.ones(3)
    alike.finish((torch.zeros(()), left))
    assert torch.equal(window.state, torch.zeros(3))
    window.finish_as(alike)
    left.fill_(2)
    assert torch.equal(text[2].state, torch.ones(3))
