"""Black-box rewards r(x_0, c) for ddpo.py and dpok.py: images and prompts in, one number an image out, higher is better.

    reward = rewards.load("jpeg")          # or "incompressibility", or "path/to/file.py:function"
    reward(images, prompts)                # list of PIL images, list of str -> float32 tensor (N,)

The policy-gradient methods need no gradient of the reward, so it may be anything that looks at the finished image: a file size, a
model's opinion, your own function. A file given as `path/to/file.py:function` is run as it is: read it first if it came from a stranger.
"""
import functools
import importlib.util
import inspect
import io
import os
import sys
import traceback
from pathlib import Path

import torch


def jpeg_size(images):
    """Size of each image as a JPEG file in kB (1000 bytes), quality 95 as in the authors' code (DDPO section 5.1, which gives none)."""
    sizes = []
    for image in images:
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def jpeg(images, prompts):
    """Compressibility: minus the JPEG size in kB (DDPO section 5.1). Gamed by an empty image."""
    return -jpeg_size(images)


def incompressibility(images, prompts):
    """The JPEG size in kB (DDPO section 5.1). Gamed by noise (DDPO Fig. 7)."""
    return jpeg_size(images)


REWARDS = {"jpeg": jpeg, "incompressibility": incompressibility}


def find(path):
    """A file or folder given relative to the working folder or, failing that, to the folder of these scripts; None if in neither."""
    return next((p for p in (Path(path), Path(__file__).parent / path) if os.path.exists(p)), None)


def check(name):
    """Refuse an unusable reward name before anything is loaded or run. Raises ValueError."""
    path, colon, function = name.rpartition(":")
    if name in REWARDS:
        return
    if not colon or not path.endswith(".py"):
        raise ValueError(f"reward {name!r} is unknown; choose {', '.join(REWARDS)}, or give path/to/file.py:function")
    if find(path) is None:
        raise ValueError(f"reward file {path!r} is neither in the working folder nor beside the script; check the path")
    try:
        names = compile(find(path).read_bytes(), path, "exec").co_names
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"reward file {path!r} cannot be read as Python ({error}); correct it") from error
    if function not in names:
        raise ValueError(f"reward file {path!r} defines no {function!r}; name a function of that file")


def load(name, device="cpu", **options):
    """The reward called `name` (module docstring), as a function that also checks what goes in and comes out; `device` is where reward
    models run; options go to the reward. Raises ValueError for an unusable name, file or option."""
    check(name)
    if name in REWARDS:
        function = REWARDS[name]
    else:
        path, _, attribute = name.rpartition(":")
        spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", find(path))
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            function = getattr(module, attribute)
        except (Exception, SystemExit) as error:  # whatever that file does
            raise ValueError(f"reward file {path!r} fails when it is run ({where(error)}); correct it") from error
    try:
        inspect.signature(function).bind([], [], **options)
    except TypeError as error:
        raise ValueError(f"reward {name!r} cannot be called with images, prompts and the reward_options {options} ({error}); correct them") from error
    return functools.partial(score, functools.partial(function, **options), name)


def where(error):
    """What went wrong, and where, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, line {place.lineno} of {place.filename}".replace("\n", " ")


@torch.no_grad()
def score(function, name, images, prompts):
    """function(images, prompts) -> float32 (N,) on the CPU. Raises ValueError, naming the prompt, unless it is one finite number an image."""
    if len(images) != len(prompts) or not images:
        raise ValueError(f"reward {name!r} was given {len(images)} images and {len(prompts)} prompts; give one prompt for each image")
    try:
        result = function(images, prompts)
    except (Exception, SystemExit) as error:  # whatever that function does
        raise ValueError(f"reward {name!r} failed on the prompts from {prompts[0]!r} on ({where(error)}); correct it") from error
    try:
        reward = torch.as_tensor(result).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"reward {name!r} gave {result!r:.60} for the prompts from {prompts[0]!r} on; it must give one number an image") from error
    if reward.shape != (len(images),):
        raise ValueError(f"reward {name!r} gave a result of shape {tuple(reward.shape)} for the {len(images)} images of the prompts from "
                         f"{prompts[0]!r} on; it must give one number an image, shape ({len(images)},)")
    for prompt, value in zip(prompts, reward.tolist()):
        if not -float("inf") < value < float("inf"):
            raise ValueError(f"reward {name!r} gave {value} for the prompt {prompt!r}; it must be a finite number")
    return reward
