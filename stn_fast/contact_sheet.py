"""``python -m stn_fast.contact_sheet DATA``: draws images of a data set, original and augmented."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from stn_fast import values
from stn_fast.command_line import Parser, run_command, whole_number
from stn_fast.errors import UserError, did_you_mean
from stn_fast.plot import new_figure, save
from stn_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from stn_fast.data import Images

DATA = {"cifar10": "stn_fast.data.cifar10", "fashion-mnist": "stn_fast.data.fashion_mnist"}

# A strength of each effect that is clearly visible in images of about thirty pixels.
VISIBLE: dict[str, float] = {
    "flip": 0.5,
    "crop_padding": 4,
    "rotation": 30,
    "translation": 0.2,
    "scale": 0.5,
    "shear": 30,
    "brightness": 0.7,
    "contrast": 0.8,
    "saturation": 1,
    "hue": 0.5,
    "input_scale": 0.7,
    "input_noise": 0.5,
    "input_dropout": 0.3,
    "cutout_length": 10,
    "cutout_holes": 2,
}
OF_COLOUR = ("saturation", "hue")
MILDER = 0.3  # factor of these strengths in the row with all effects
STREAM = 1
SEED = 224  # chosen so that ten images show both directions of every effect
COLUMNS, MOST_COLUMNS = 10, 50

CELL, GAP, LABEL = 0.62, 0.04, 1.3  # inches
FONT_SIZE, LABEL_LINES = 8.0, 4  # points; lines of text that fit beside a row


class Row(NamedTuple):
    """One row of the sheet: its label and the strengths of its augmentation."""

    label: str
    setting: Mapping[str, float]


def default_rows(channels: int) -> list[Row]:
    """One row for every effect, then one with all of them at lower strengths."""
    names = [name for name in VISIBLE if channels == 3 or name not in OF_COLOUR]
    alone = [{name: VISIBLE[name]} for name in names if not name.startswith("cutout")]
    cutout = {name: VISIBLE[name] for name in names if name.startswith("cutout")}
    kept = {"flip": VISIBLE["flip"], "crop_padding": VISIBLE["crop_padding"], **cutout}
    together = {name: MILDER * VISIBLE[name] for name in names} | kept
    return [*map(row_of, [*alone, cutout]), Row("all of them,\nmilder", together)]


def row_of(setting: Mapping[str, float]) -> Row:
    """A row labelled with its strengths."""
    parts = [f"{name.replace('_', ' ')} {strength:g}" for name, strength in setting.items()]
    abreast = 1 if len(parts) <= LABEL_LINES else 2
    return Row("\n".join(", ".join(parts[i : i + abreast]) for i in range(0, len(parts), abreast)), setting)


def parse_setting(text: str) -> dict[str, float]:
    """Parses ``brightness=0.5,hue=0.1`` to {name: strength}.

    Raises:
        UserError: a name is unknown or given twice, or a strength is not a number.
    """
    setting: dict[str, float] = {}
    for pair in text.split(","):
        name, _, strength = pair.partition("=")
        if name not in VISIBLE:
            raise UserError(f"--set {text}: there is no augmentation '{name}': {did_you_mean(name, VISIBLE)}")
        if name in setting:
            raise UserError(f"--set {text}: {name} is given twice")
        try:
            setting[name] = values.whole_number(strength) if name == "crop_padding" else values.number(strength)
        except ValueError:
            kind = "a whole number" if name == "crop_padding" else "a number"
            raise UserError(f"--set {text}: {name} must be {kind}, as in {name}={VISIBLE[name]:g}") from None
    return setting


def load(data: str, root: str | None) -> Images:
    """The images of a data set.

    Raises:
        UserError: there is no such data set, or its files are damaged or missing.
    """
    if data not in DATA:
        raise UserError(f"unknown data set '{data}': {did_you_mean(data, DATA)}")
    return import_module(DATA[data]).load(root)


def chosen(inputs: Tensor, first: int, columns: int, same: bool) -> Tensor:
    """The images of the columns, beginning with number ``first``; if ``same``, that one in every column.

    Raises:
        UserError: there are fewer images, or too many columns.
    """
    last = first if same else first + columns - 1
    if not 1 <= columns <= MOST_COLUMNS:
        raise UserError(f"--columns {columns}: must be from 1 to {MOST_COLUMNS}")
    if first < 0 or last >= len(inputs):
        raise UserError(f"--first {first}: needs images {first} to {last}, but there are 0 to {len(inputs) - 1}")
    return inputs[first].expand(columns, -1, -1, -1) if same else inputs[first : last + 1]


def augmented(x: Tensor, row: Row, data: Images, seed: int) -> Tensor:
    """``x`` augmented with a row's strengths; the normalisation is undone and values are clamped to [0, 1].

    Raises:
        UserError: a strength is outside of its domain, or needs colour images.
    """
    import torch

    from stn_fast.functional import augment

    setting = dict(row.setting)
    flip, crop_padding = setting.pop("flip", 0.0), int(setting.pop("crop_padding", 0))
    strengths = {name: torch.full((len(x),), float(strength)) for name, strength in setting.items()}
    options: dict[str, Any] = dict(seed=seed, step=0, stream=STREAM, flip=flip, crop_padding=crop_padding)
    try:
        y = augment(x, strengths, mean=data.mean, std=data.std, **options)
    except ValueError as error:
        raise UserError(
            f"--set {','.join(f'{name}={value:g}' for name, value in row.setting.items())}: {error}"
        ) from None
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (data.mean, data.std))
    return (y * std + mean).clamp(0, 1)


def draw(x: Tensor, rows: Sequence[Row], data: Images, seed: int, title: str) -> Figure:
    """The original images (N, C, H, W), and below them one row for every setting."""
    pictures = [x / 255, *(augmented(x, row, data, seed) for row in rows)]
    labels = ["originals", *(row.label for row in rows)]
    pitch, head = CELL + GAP, 0.45
    width, height = LABEL + pitch * len(x), head + pitch * len(pictures)
    figure = new_figure(width, height)
    figure.text(0.5, 1 - head / 2 / height, title, ha="center", va="center", fontsize=11)
    for line, (batch, name) in enumerate(zip(pictures, labels, strict=True)):
        bottom = height - head - pitch * (line + 1) + GAP
        middle = (bottom + CELL / 2) / height
        size = FONT_SIZE * min(1, LABEL_LINES / (1 + name.count("\n")))
        figure.text((LABEL - 0.1) / width, middle, name, ha="right", va="center", fontsize=size, linespacing=1.1)
        for column, image in enumerate(batch.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()):
            place = ((LABEL + pitch * column) / width, bottom / height, CELL / width, CELL / height)
            axis = figure.add_axes(place)
            axis.imshow(image, interpolation="nearest", vmin=0, vmax=1)
            axis.set_axis_off()
    return figure


def parser() -> Parser:
    """The flags."""
    it = Parser("python -m stn_fast.contact_sheet", "Draws images of a data set, original and augmented.")
    flag = it.add_argument
    flag("data", nargs="?", default="cifar10", metavar="DATA", help=f"{' or '.join(DATA)} (default: cifar10)")
    names = ", ".join(f"{name}={strength:g}" for name, strength in VISIBLE.items())
    rows = (
        "strengths of one row, e.g. brightness=0.5,hue=0.1; repeat for more rows "
        f"(default: a row for each of {names}; and one with all of them, milder)"
    )
    flag("--set", action="append", default=[], metavar="NAME=STRENGTH,...", help=rows)
    flag("--columns", type=whole_number, default=COLUMNS, metavar="N", help=f"images in a row (default: {COLUMNS})")
    flag("--first", type=whole_number, default=0, metavar="N", help="training image of the first column (default: 0)")
    flag("--same", action="store_true", help="show this image in every column, each with new random draws")
    flag("--seed", type=whole_number, default=SEED, metavar="N", help=f"seed of all random numbers (default: {SEED})")
    root = "folder of the data sets; missing ones are downloaded (default: $STN_FAST_DATA, else ~/.cache/stn_fast/data)"
    flag("--data-root", metavar="DIR", help=root)
    output = "PNG, PDF or SVG file (default: contact-sheet-DATA.png)"
    flag("-o", "--output", metavar="FILE", help=output)
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, or 2 for a user's error."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    flags = parser().given(arguments)
    rows = [row_of(parse_setting(text)) for text in flags["set"]]
    if not 0 <= flags["seed"] < 2**63:
        raise UserError(f"--seed {flags['seed']}: must be at least 0 and below 2**63")
    data = load(flags["data"], flags["data_root"])
    x = chosen(data.train.inputs, flags["first"], flags["columns"], flags["same"])
    figure = draw(x, rows or default_rows(x.shape[1]), data, flags["seed"], flags["data"])
    saved = save(figure, flags["output"] or f"contact-sheet-{flags['data']}.png")
    print(printable(str(saved)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
