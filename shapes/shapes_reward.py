"""How well an image of coloured shapes fits its caption, read from the pixels alone.

`python ddpo.py --reward shapes/shapes_reward.py:alignment` rewards `alignment`, a grade in [0, 1]; `strict`
is the yes/no that runs are judged by. Both find every patch of colour (connected pixels of one hue), compare
it with each thing the caption asks for (colour, shape, place), pair them off best first, and divide by the
larger of the two counts: what is missing and what is too many lower the grade alike. No network, nothing
learned: what it calls right can be checked by eye.
"""
import re

import numpy as np
import torch
from PIL import Image

SIZE = 64  # pixels a side that images are brought to
HUES = {"red": 0, "yellow": 48, "green": 133, "blue": 222, "purple": 283}  # degrees on the colour wheel
COUNTS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SHAPES = ("circle", "square", "triangle")
PLACES = {"on the left": (0, 1), "on the right": (0, -1),  # axis (x 0, y 1), sign
          "at the top": (1, 1), "at the bottom": (1, -1)}
THING = re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(HUES)}) ({'|'.join(SHAPES)})(s?)"
                   rf"(?: ({'|'.join(PLACES)}))?")
SMALLEST, LARGEST = 0.005, 0.40  # share of the image: less is a speck, more is a painted ground
WRONG = 0.25  # what an attribute that is wrong leaves of a thing's grade


def parse(prompt):
    """"two red squares" -> [("red", "square", None)] * 2.
    Raises ValueError for a caption outside the grammar."""
    things = []
    for part in prompt.strip().rstrip(".").lower().split(" and "):
        match = THING.fullmatch(part)
        if not match or (COUNTS[match[1]] > 1) != bool(match[4]):
            raise ValueError(f"prompt {prompt!r} is not a caption of shapes; write '[a|two|three|four] "
                             f"[{'|'.join(HUES)}] [{'|'.join(SHAPES)}](s)', "
                             f"then '{'|'.join(PLACES)}' or 'and ...' if wanted")
        things += [(match[2], match[3], match[5])] * COUNTS[match[1]]
    return things


def hue_classes(pixels):
    """(N, H, W, 3) uint8 -> (N, H, W): 0 where there is no colour, else 1 + the index of the nearest hue."""
    r, g, b = np.moveaxis(pixels.astype(np.float32), -1, 0)
    high, low = pixels.max(-1).astype(np.float32), pixels.min(-1).astype(np.float32)
    chroma = np.maximum(high - low, 1)
    hue = 60 * np.where(high == r, (g - b) / chroma % 6,
                        np.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4))
    distance = np.stack([np.abs((hue - h + 180) % 360 - 180) for h in HUES.values()])
    return np.where(chroma > 60, 1 + distance.argmin(0), 0)


def components(kind):
    """(N, H, W) classes -> (N, H, W) labels, one for each connected patch: the largest pixel index, spread
    along the runs of one class in rows, then columns, until nothing changes."""
    label = np.arange(kind.size).reshape(kind.shape)
    while True:
        before = label
        for axis in (2, 1):
            k, lines = np.moveaxis(kind, axis, 2), np.moveaxis(label, axis, 2)
            starts = np.ones(k.shape, bool)
            starts[..., 1:] = k[..., 1:] != k[..., :-1]
            starts = np.flatnonzero(starts)
            runs = np.maximum.reduceat(lines.reshape(-1), starts)
            label = np.moveaxis(np.repeat(runs, np.diff(starts, append=k.size)).reshape(k.shape), 2, axis)
        if (label == before).all():
            return label


def describe(mask, colour):
    """One patch, mask (H, W) -> its colour, its share of the image, its centre (x, y) in [0, 1], and its
    overlap (intersection over union) with each shape drawn in its bounding box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = box.shape
    v, u = np.meshgrid((np.arange(height) + 0.5) / height * 2 - 1,
                       (np.arange(width) + 0.5) / width * 2 - 1, indexing="ij")
    ideals = {"circle": u * u + v * v <= 1, "square": np.abs(u) <= 1, "triangle": np.abs(u) <= (v + 1) / 2}
    overlap = {name: (box & ideal).sum() / (box | ideal).sum()
               * min(1.0, 1.25 * min(box.shape) / max(box.shape)) for name, ideal in ideals.items()}
    centre = (columns[0] + columns[-1] + 1) / 2 / mask.shape[1], (rows[0] + rows[-1] + 1) / 2 / mask.shape[0]
    return colour, mask.mean(), centre, overlap


def grade(thing, patch):
    """How well one patch is the thing asked for: colour x shape x place, each in [WRONG, 1]."""
    (colour, shape, place), (seen, share, centre, overlap) = thing, patch
    if share > LARGEST:
        return 0.0
    # the lead of the right shape over the next best
    lead = overlap[shape] - max(o for name, o in overlap.items() if name != shape)
    shape_grade = np.clip((lead + 0.1) / 0.15, 0, 1) * np.clip(overlap[shape] / 0.75, 0, 1)
    place_grade = 1.0
    if place:
        axis, sign = PLACES[place]
        # 1 from a tenth beyond the middle on
        place_grade = np.clip(0.5 + sign * (0.5 - centre[axis]) / 0.2, 0, 1)
    return float(np.prod([WRONG + (1 - WRONG) * g
                          for g in (float(seen == colour), shape_grade, place_grade)]))


def judge(images, prompts):
    """-> grades (N,) in [0, 1] and strict verdicts (N,). Things and patches are paired best first; an image
    fits strictly if it holds just as many patches as its caption names things, and each of them is graded
    above 0.8."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts; give one prompt for each image")
    wanted = [parse(p) for p in prompts]
    pixels = np.stack([np.asarray(i.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
                       for i in images])
    kinds = hue_classes(pixels)
    labels = components(kinds)
    grades, strict = [], []
    for things, kind, label in zip(wanted, kinds, labels):
        names, first, sizes = np.unique(label, return_index=True, return_counts=True)
        hues = kind.reshape(-1)[first]  # 0 is ground
        patches = [describe(label == name, list(HUES)[hue - 1]) for name, hue, size in zip(names, hues, sizes)
                   if hue > 0 and size >= SMALLEST * label.size]
        table = np.array([[grade(thing, patch) for patch in patches]
                          for thing in things]).reshape(len(things), len(patches))
        paired = []
        for _ in range(min(table.shape)):
            i, j = np.unravel_index(table.argmax(), table.shape)
            paired.append(table[i, j])
            table[i, :] = table[:, j] = -1.0
        grades.append(sum(paired) / max(table.shape))
        strict.append(len(things) == len(patches) and min(paired) > 0.8)
    return grades, strict


def alignment(images, prompts):
    """The grade, for training: list of PIL images of any size and mode, one prompt each
    -> float32 (N,) in [0, 1]."""
    return torch.tensor(judge(images, prompts)[0], dtype=torch.float32)


def strict(images, prompts):
    """The verdict, for judging a run: 1.0 where the image is what its prompt says, else 0.0; float32 (N,)."""
    return torch.tensor(judge(images, prompts)[1], dtype=torch.float32)
