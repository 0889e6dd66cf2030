"""python -m stn_fast.contact_sheet: what is drawn is what augmentation gives, every error is one line."""

import numpy as np
import pytest
import torch

from stn_fast import contact_sheet
from stn_fast.contact_sheet import VISIBLE, default_rows, draw, parse_setting, row_of
from stn_fast.data import Images, Split, cifar10, fashion_mnist
from stn_fast.functional import augment
from stn_fast.ops.augment import STRENGTHS


def made_up(channels, mean, std):
    """Smooth images, neither black nor white anywhere, as a data set."""
    coarse = torch.rand(12, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    split = Split((60 + 140 * pixels).round().to(torch.uint8), torch.zeros(12, dtype=torch.int64))
    return Images(split, split, mean, std)


COLOUR, GREY = made_up(3, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)), made_up(1, (0.29,), (0.35,))


@pytest.fixture
def data_sets(monkeypatch):
    monkeypatch.setattr(cifar10, "load", lambda root: COLOUR)
    monkeypatch.setattr(fashion_mnist, "load", lambda root: GREY)


def cells(figure, columns):
    """The images that were drawn, (rows, columns, H, W, 3)."""
    drawn = [np.asarray(axis.get_images()[0].get_array()) for axis in figure.axes]
    return np.stack(drawn).reshape(-1, columns, *drawn[0].shape)


def labels(figure):
    return [text.get_text() for text in figure.texts[1:]]


def test_every_strength_has_a_row_and_changes_the_images():
    assert set(VISIBLE) == {"flip", "crop_padding", *STRENGTHS}
    x = COLOUR.train.inputs[:10]
    rows = default_rows(3)
    assert set().union(*(row.setting for row in rows[:-1])) == set(rows[-1].setting) == set(VISIBLE)
    for row in rows:
        changed = (contact_sheet.augmented(x, row, COLOUR, contact_sheet.SEED) - x / 255).abs().mean((1, 2, 3))
        assert (changed > 0.01).sum() >= 3, row.label


def test_a_data_set_without_colours_has_no_rows_of_them():
    missing = set(VISIBLE) - set().union(*(row.setting for row in default_rows(1)))
    assert missing == {"saturation", "hue"}


def test_the_first_row_shows_the_originals_and_the_others_what_augment_gives():
    x = COLOUR.train.inputs[3:7]
    setting = dict(brightness=0.3, flip=0.5, crop_padding=2)
    figure = draw(x, [row_of(setting), row_of(dict(input_noise=0.1))], COLOUR, 5, "title")
    originals, augmented, _ = cells(figure, 4)
    assert np.array_equal(originals, (x / 255).permute(0, 2, 3, 1).numpy())
    brightness = dict(brightness=torch.full((4,), 0.3))
    options = dict(seed=5, step=0, stream=1, flip=0.5, crop_padding=2)
    y = augment(x, brightness, mean=COLOUR.mean, std=COLOUR.std, **options)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (COLOUR.mean, COLOUR.std))
    np.testing.assert_allclose(augmented, (y * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert labels(figure) == ["originals", "brightness 0.3\nflip 0.5\ncrop padding 2", "input noise 0.1"]


def test_grey_images_are_drawn_grey():
    drawn = cells(draw(GREY.train.inputs[:3], [row_of(dict(contrast=0.5))], GREY, 0, "title"), 3)
    assert drawn.shape == (2, 3, 32, 32, 3)
    assert np.ptp(drawn, axis=-1).max() == 0


def test_the_same_image_is_drawn_anew_in_every_column():
    x = contact_sheet.chosen(COLOUR.train.inputs, 4, 3, same=True)
    originals, turned = cells(draw(x, [row_of(dict(rotation=40.0))], COLOUR, 0, "title"), 3)
    assert np.array_equal(originals[0], originals[2])
    assert not np.allclose(turned[0], turned[1])


@pytest.mark.parametrize("rows", [default_rows(3), [row_of(VISIBLE), row_of(VISIBLE)]], ids=["default", "long"])
def test_labels_overlap_neither_each_other_nor_the_images(rows):
    figure = draw(COLOUR.train.inputs[:2], rows, COLOUR, 0, "title")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    images = [axis.get_window_extent() for axis in figure.axes]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in [*boxes[index + 1 :], *images])
        assert box.x0 >= 0


def test_a_setting_is_read_by_name():
    assert parse_setting("brightness=0.5,crop_padding=4") == {"brightness": 0.5, "crop_padding": 4}


def test_the_command_writes_a_picture(data_sets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert contact_sheet.main([]) == 0
    assert (tmp_path / "contact-sheet-cifar10.png").stat().st_size > 50_000
    command = ["fashion-mnist", "--set", "rotation=20", "--set", "cutout_length=5,cutout_holes=1", "--columns", "3"]
    assert contact_sheet.main([*command, "--same", "--first", "9", "--seed", "1", "-o", "small.svg"]) == 0
    assert (tmp_path / "small.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out.splitlines() == ["contact-sheet-cifar10.png", "small.svg"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cifar"], "unknown data set 'cifar': did you mean 'cifar10'?"),
        (["--set", "brightnes=0.5"], "no augmentation 'brightnes': did you mean 'brightness'?"),
        (["--set", "brightness"], "brightness must be a number, as in brightness=0.7"),
        (["--set", "crop_padding=1.5"], "crop_padding must be a whole number"),
        (["--set", "hue=0.1,hue=0.2"], "hue is given twice"),
        (["--set", "hue=0.7"], "--set hue=0.7: augment: hue must be in [0, 0.5]"),
        (["--set", "hue=.nan"], "augment: hue"),
        (["--set", "hue=0_1"], "hue must be a number"),
        (["--first", "1_0"], "invalid int value: '1_0'"),
        (["--set", "cutout_length=5"], "'cutout_length' without 'cutout_holes'"),
        (["--set", "cutout_length=33,cutout_holes=1"], "cutout_length must be in [0, 32] for images of 32 x 32"),
        (["--set", "flip=2"], "must be in [0, 1]"),
        (["fashion-mnist", "--set", "hue=0.1"], "hue needs images with 3 channels"),
        (["--columns", "0"], "--columns 0: must be from 1 to 50"),
        (["--columns", "five"], "invalid int value: 'five'"),
        (["--first", "5", "--columns", "8"], "--first 5: needs images 5 to 12, but there are 0 to 11"),
        (["--first", "-1"], "--first -1"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["-o", "absent/x.png"], "--output absent/x.png cannot be written"),
        (["-o", "x.mp3"], "cannot be written"),
        (["--colums", "5"], "did you mean '--columns'?"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, says, data_sets, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert contact_sheet.main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
