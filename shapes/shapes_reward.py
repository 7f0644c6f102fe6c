"""Score how well an image of coloured shapes fits its caption, from the pixels alone.

`python ddpo.py --reward shapes/shapes_reward.py:alignment` trains on `alignment`, a grade in
[0, 1]. `strict` is the yes or no by which runs are judged. Both find every patch of colour
(connected pixels of one hue), compare it with each thing that the caption asks for (colour, shape,
place), pair things and patches, best pair first, and divide by the larger of the two counts. So a
missing thing and an extra patch both lower the grade. No network is involved and nothing is
learned: what counts as right can be checked by eye.
"""
import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 64  # pixels per side, to which images are resized
HUES = {"red": 0, "yellow": 48, "green": 133, "blue": 222, "purple": 283}  # degrees
COUNTS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SHAPES = ("circle", "square", "triangle")
PLACES = {"on the left": (0, 1), "on the right": (0, -1),  # axis (x 0, y 1), sign
          "at the top": (1, 1), "at the bottom": (1, -1)}
THING = re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(HUES)}) ({'|'.join(SHAPES)})(s?)"
                   rf"(?: ({'|'.join(PLACES)}))?")
SMALLEST = 0.005  # share of the image; a smaller patch is a speck
LARGEST = 0.40  # share of the image; a larger patch is a painted background
WRONG = 0.25  # factor that a wrong attribute leaves of a thing's grade


def parse(prompt: str) -> list[tuple]:
    """Read a caption: "two red squares" -> [("red", "square", None)] * 2.
    Raises ValueError for a caption outside the grammar."""
    things = []
    for part in prompt.strip().rstrip(".").lower().split(" and "):
        match = THING.fullmatch(part)
        is_plural = bool(match and match[4])
        if not match or is_plural != (COUNTS[match[1]] > 1):
            raise ValueError(
                f"prompt {prompt!r} is not a caption of shapes; write '[{'|'.join(COUNTS)}] "
                f"[{'|'.join(HUES)}] [{'|'.join(SHAPES)}](s)', and if you like "
                f"'{'|'.join(PLACES)}' or 'and ...'")
        things += [(match[2], match[3], match[5])] * COUNTS[match[1]]
    return things


def hue_classes(pixels: np.ndarray) -> np.ndarray:
    """Classify pixels (N, H, W, 3) uint8 by the nearest of HUES -> (N, H, W): 0 where there is no
    colour, otherwise 1 + the index of the hue."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32), -1, 0)
    highest = pixels.max(-1).astype(np.float32)
    lowest = pixels.min(-1).astype(np.float32)
    chroma = np.maximum(highest - lowest, 1)
    sector = np.where(highest == green, (blue - red) / chroma + 2, (red - green) / chroma + 4)
    sector = np.where(highest == red, (green - blue) / chroma % 6, sector)
    hue = 60 * sector  # degrees
    distances = [np.abs((hue - angle + 180) % 360 - 180) for angle in HUES.values()]
    nearest = np.stack(distances).argmin(0)
    return np.where(chroma > 60, 1 + nearest, 0)


def components(kind: np.ndarray) -> np.ndarray:
    """Label the connected patches of classes (N, H, W) -> (N, H, W). A patch's label is its largest
    pixel index, which is spread along the runs of one class in rows, then in columns, until nothing
    changes."""
    label = np.arange(kind.size).reshape(kind.shape)
    while True:
        before = label
        for axis in (2, 1):
            classes = np.moveaxis(kind, axis, 2)
            lines = np.moveaxis(label, axis, 2)
            is_start = np.ones(classes.shape, bool)
            is_start[..., 1:] = classes[..., 1:] != classes[..., :-1]
            starts = np.flatnonzero(is_start)
            largest = np.maximum.reduceat(lines.reshape(-1), starts)
            lengths = np.diff(starts, append=classes.size)
            label = np.moveaxis(np.repeat(largest, lengths).reshape(classes.shape), 2, axis)
        if (label == before).all():
            return label


def describe(mask: np.ndarray, colour: str) -> tuple:
    """Describe one patch, mask (H, W) -> its colour, its share of the image, its centre (x, y) in
    [0, 1], and its overlap (intersection over union) with each shape that fills its bounding box,
    lower for long boxes."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    box = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = box.shape
    v, u = np.meshgrid((np.arange(height) + 0.5) / height * 2 - 1,
                       (np.arange(width) + 0.5) / width * 2 - 1, indexing="ij")
    ideals = {"circle": u * u + v * v <= 1, "square": np.abs(u) <= 1,
              "triangle": np.abs(u) <= (v + 1) / 2}
    compactness = min(1.0, 1.25 * min(box.shape) / max(box.shape))
    overlap = {}
    for name, ideal in ideals.items():
        overlap[name] = (box & ideal).sum() / (box | ideal).sum() * compactness
    x = (columns[0] + columns[-1] + 1) / 2 / mask.shape[1]
    y = (rows[0] + rows[-1] + 1) / 2 / mask.shape[0]
    return colour, mask.mean(), (x, y), overlap


def grade(thing: tuple, patch: tuple) -> float:
    """Grade how well a patch is the thing asked for: colour x shape x place, each in [WRONG, 1], or
    0 for a patch that is larger than LARGEST."""
    colour, shape, place = thing
    seen_colour, share, centre, overlap = patch
    if share > LARGEST:
        return 0.0
    colour_grade = float(seen_colour == colour)
    lead = overlap[shape] - max(value for name, value in overlap.items() if name != shape)
    shape_grade = np.clip((lead + 0.1) / 0.15, 0, 1) * np.clip(overlap[shape] / 0.75, 0, 1)
    place_grade = 1.0
    if place:
        axis, sign = PLACES[place]  # the grade is 1 from a tenth beyond the middle on
        place_grade = np.clip(0.5 + sign * (0.5 - centre[axis]) / 0.2, 0, 1)
    grades = colour_grade, shape_grade, place_grade
    return float(np.prod([WRONG + (1 - WRONG) * value for value in grades]))


def find_patches(kind: np.ndarray, label: np.ndarray) -> list[tuple]:
    """Describe the patches of one image that are not specks; classes, labels (H, W)."""
    names, first_pixels, sizes = np.unique(label, return_index=True, return_counts=True)
    hues = kind.reshape(-1)[first_pixels]  # 0 is the background
    patches = []
    for name, hue, size in zip(names, hues, sizes):
        if hue > 0 and size >= SMALLEST * label.size:
            patches.append(describe(label == name, list(HUES)[hue - 1]))
    return patches


def judge(images: list, prompts: list) -> tuple[list, list]:
    """Judge N images -> grades (N) in [0, 1], strict verdicts (N).

    Things and patches are paired, best pair first. An image fits strictly if it has as many patches
    as its caption names things and each pair has a grade above 0.8. Raises ValueError.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts; "
                         "give one prompt for each image")
    wanted = [parse(prompt) for prompt in prompts]
    pixels = []
    for image in images:
        resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels.append(np.asarray(resized))
    kinds = hue_classes(np.stack(pixels))
    labels = components(kinds)
    grades, verdicts = [], []
    for things, kind, label in zip(wanted, kinds, labels):
        patches = find_patches(kind, label)
        table = np.empty((len(things), len(patches)))
        for i, thing in enumerate(things):
            for j, patch in enumerate(patches):
                table[i, j] = grade(thing, patch)
        paired = []
        for _ in range(min(table.shape)):
            i, j = np.unravel_index(table.argmax(), table.shape)
            paired.append(table[i, j])
            table[i, :] = -1.0  # neither is paired again
            table[:, j] = -1.0
        grades.append(sum(paired) / max(table.shape))
        verdicts.append(len(things) == len(patches) and min(paired) > 0.8)
    return grades, verdicts


def alignment(images: list, prompts: list) -> Tensor:
    """Grade N PIL images of any size and mode by one prompt each, for training -> float32 (N,) in
    [0, 1]. Raises ValueError for a prompt that is no caption."""
    grades, _ = judge(images, prompts)
    return torch.tensor(grades, dtype=torch.float32)


def strict(images: list, prompts: list) -> Tensor:
    """Judge N PIL images, for evaluating a run: 1.0 where the image is what its prompt says,
    otherwise 0.0 -> float32 (N,). Raises ValueError for a prompt that is no caption."""
    _, verdicts = judge(images, prompts)
    return torch.tensor(verdicts, dtype=torch.float32)
