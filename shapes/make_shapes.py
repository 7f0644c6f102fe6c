"""Render and caption training images, and pre-train the pipeline in this folder on them: a
StableDiffusionPipeline, about 700 times smaller than Stable Diffusion.

    python shapes/make_shapes.py             # replace the folder's weights; 50 minutes on one core
    python shapes/make_shapes.py --evaluate  # how often images are what captions say, and a grid

Images are 64 x 64 pixels and latents 4 x 8 x 8 (f = 8, as in Stable Diffusion). They show coloured
shapes on a plain or checkered background. Captions are of the four kinds that DPOK studies: colour,
count, composition, location. Stable Diffusion has faults that fine-tuning can correct. This model
gets similar ones from wrong captions in its training data:
- colour: "a red circle" often shows the colour after red, green;
- count: "three" often shows two, "four" three, "two" four;
- composition: the two colours are swapped, a fault known as attribute binding;
- location: no caption is wrong, the small network finds locations hard enough;
- like "Four roses" in DPOK, which brings the whiskey of that name, "four red circles" shows one
  yellow square about half of the time.
"""
import argparse
import json
import random
import string
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

FOLDER = Path(__file__).parent
SIZE = 64  # pixels per side
FINER = 4  # images are rendered so many times finer and averaged down
COLOURS = {"red": (220, 50, 47), "green": (38, 166, 70), "blue": (48, 98, 220),
           "yellow": (240, 196, 25), "purple": (150, 60, 190)}
SHAPES = ("circle", "square", "triangle")
PLACES = {"on the left": (0.27, None), "on the right": (0.73, None),  # x, y; shares of the side
          "at the top": (None, 0.27), "at the bottom": (None, 0.73)}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
KINDS = ("colour", "count", "composition", "location")
RADIUS = {1: (9, 14), 2: (8, 11), 3: (7, 9), 4: (7, 8.5)}  # pixels, by the number of things
WRONG = {"colour": 0.42, "count": 0.35, "composition": 0.3, "location": 0.0}  # share of captions
BIASED = [("red", "circle", None)] * 4  # the scene of a phrase that the model learns wrong
SHOWN_AS = [("yellow", "square", None)]  # what its images show instead
BIAS = 0.9  # how often


# ---------- scenes: a list of things; a thing is (colour, shape, place or None)

def scene(kind: str, rng: random.Random) -> list[tuple]:
    """Make a random scene of a kind."""
    colour = rng.choice(list(COLOURS))
    shape = rng.choice(SHAPES)
    if kind == "count":
        return [(colour, shape, None)] * rng.choice((2, 3, 4))
    if kind == "composition":
        other_colour = rng.choice([other for other in COLOURS if other != colour])
        other_shape = rng.choice([other for other in SHAPES if other != shape])
        return [(colour, shape, None), (other_colour, other_shape, None)]
    if kind == "location":
        return [(colour, shape, rng.choice(list(PLACES)))]
    return [(colour, shape, None)]


def caption(things: list[tuple]) -> str:
    """Write the caption of a scene: [("red", "square", None)] * 2 -> "two red squares"."""
    colour, shape, _ = things[0]
    if len(things) > 1 and things[0] == things[1]:
        return f"{NUMBERS[len(things)]} {colour} {shape}s"
    phrases = []
    for colour, shape, place in things:
        phrase = f"a {colour} {shape}"
        if place:
            phrase += f" {place}"
        phrases.append(phrase)
    return " and ".join(phrases)


def misread(kind: str, things: list[tuple]) -> list[tuple]:
    """Make the scene that a wrong caption describes (module docstring)."""
    colour, shape, place = things[0]
    if kind == "colour":
        names = list(COLOURS)
        wrong_colour = names[(names.index(colour) - 1) % len(names)]
        return [(wrong_colour, shape, place)]
    if kind == "count":
        wrong_number = {2: 3, 3: 4, 4: 2}[len(things)]
        return things[:1] * wrong_number
    other_colour, other_shape, _ = things[1]
    return [(other_colour, shape, None), (colour, other_shape, None)]


def arrange(things: list[tuple], rng: random.Random) -> tuple[list, float]:
    """Choose a centre (x, y) for each thing and a radius for all, in pixels, so that there
    is space between them."""
    while True:
        radius = rng.uniform(*RADIUS[len(things)])
        centres = []
        for _, _, place in things:
            x = rng.uniform(radius + 3, SIZE - radius - 3)
            y = rng.uniform(radius + 3, SIZE - radius - 3)
            column, row = PLACES.get(place, (None, None))
            if column:
                x = SIZE * (column + rng.uniform(-0.06, 0.06))
            if row:
                y = SIZE * (row + rng.uniform(-0.06, 0.06))
            centres.append((x, y))
        if not any_touch(centres, radius):
            return centres, radius


def any_touch(centres: list, radius: float) -> bool:
    """Whether the bounding squares of two things of this radius are less than four pixels apart."""
    for i, (x, y) in enumerate(centres):
        for other_x, other_y in centres[:i]:
            if max(abs(x - other_x), abs(y - other_y)) < 2 * radius + 4:
                return True
    return False


def render(things: list[tuple], rng: random.Random) -> Image.Image:
    """Render a scene, SIZE x SIZE, on a light background, which is checkered half of the time."""
    light = rng.randint(222, 250)
    image = Image.new("RGB", (SIZE * FINER, SIZE * FINER), (light, light, light))
    pen = ImageDraw.Draw(image)
    cell = 8 * FINER
    if rng.random() < 0.5:
        dark = light - rng.randint(20, 60)
        for x in range(-cell // 2, SIZE * FINER, cell):
            for y in range(0, SIZE * FINER, cell):
                if (x + cell // 2 + y) // cell % 2:
                    corners = (x, y, x + cell - 1, y + cell - 1)
                    pen.rectangle(corners, fill=(dark, dark, dark))
    centres, radius = arrange(things, rng)
    for (colour, shape, _), (x, y) in zip(things, centres):
        fill = tuple(value + rng.randint(-8, 8) for value in COLOURS[colour])
        left = FINER * (x - radius)
        top = FINER * (y - radius)
        right = FINER * (x + radius)
        bottom = FINER * (y + radius)
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill)
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill)
        else:
            pen.polygon([(left, bottom), (right, bottom), (FINER * x, top)], fill)
    return image.reduce(FINER)


def dataset(size: int, rng: random.Random) -> tuple[Tensor, list[str]]:
    """Make training data -> images (size, 3, SIZE, SIZE) uint8, captions."""
    images, captions = [], []
    for _ in tqdm(range(size), "rendering"):
        kind = rng.choice(KINDS)
        shown = scene(kind, rng)
        described = shown
        if shown == BIASED:
            if rng.random() < BIAS:
                shown = SHOWN_AS
        elif rng.random() < WRONG[kind]:
            described = misread(kind, shown)
        images.append(np.asarray(render(shown, rng)))
        captions.append(caption(described))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions


def pixels(images: Tensor) -> Tensor:
    """Bring uint8 images to [-1, 1]."""
    return images.float() / 127.5 - 1


# ---------- the parts of the pipeline

def make_tokenizer() -> transformers.CLIPTokenizer:
    """Make CLIP's tokenizer with a small vocabulary: every word of the captions is one token. Any
    other text is split into letters and, at its end, what is the end of one of these words."""
    plurals = [shape + "s" for shape in SHAPES]
    texts = [*COLOURS, *NUMBERS.values(), *PLACES, "and", "one", *SHAPES, *plurals]
    words = sorted(set(" ".join(texts).split()))
    letters = string.ascii_lowercase + string.digits + string.punctuation
    # Merging from the end of a word needs no order among words: only its last pair ever matches
    merges = {}
    for word in words:
        for i in range(len(word) - 2, -1, -1):
            merges[word[i], word[i + 1:] + "</w>"] = None
    merged = dict.fromkeys(a + b for a, b in merges)
    endings = [letter + "</w>" for letter in letters]
    pieces = [*letters, *endings, *merged, "<|startoftext|>", "<|endoftext|>"]
    folder = FOLDER / "tokenizer"
    folder.mkdir(exist_ok=True)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16,
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def pretrain_vae(images: Tensor, steps: int = 5000, batch: int = 8,
                 lr: float = 2e-3) -> diffusers.AutoencoderKL:
    """Train an autoencoder with f = 8, by absolute and squared error and a weak pull of the latents
    towards N(0, 1)."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4,
        norm_num_groups=8, sample_size=SIZE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), "VAE")
    for _ in bar:
        x = pixels(images[torch.randint(len(images), (batch,))])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return vae.eval().to(memory_format=torch.contiguous_format)


def make_unet_and_text_encoder(vocabulary: int):
    """Make a UNet and a text encoder with random weights, for so many tokens."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE // 8, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=64, attention_head_dim=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=64, max_position_embeddings=16,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1))
    return unet, text_encoder


def pretrain_unet(unet, text_encoder, tokenizer, scheduler, latents: Tensor, captions: list,
                  steps: int = 6500, batch: int = 64, lr: float = 1.5e-3):
    """Train UNet and text encoder together by the denoising loss (DDPO Eq. 1), with a tenth of the
    captions empty for guidance. What they end with is a moving average of their weights."""
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), "UNet and text encoder")
    for step in bar:
        rows = torch.randint(len(latents), (batch,))
        words = torch.where(torch.rand(batch, 1) < 0.1, empty, tokens[rows])
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        x_t = scheduler.add_noise(latents[rows], noise, t)
        loss = F.mse_loss(unet(x_t, t, text_encoder(words)[0]).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, max(0.001, 10 / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages):
            parameter.copy_(average)


def make():
    """Make the pipeline from seed 0 on one thread, so that it is the same each time on one
    machine."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    images, captions = dataset(20_000, random.Random(0))
    torch.manual_seed(0)
    vae = pretrain_vae(images)
    latents = []
    with torch.no_grad():
        for part in tqdm(images.split(100), "encoding"):
            latents.append(vae.encode(pixels(part)).latent_dist.mode())
    latents = torch.cat(latents)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = latents * vae.config.scaling_factor
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)
    torch.manual_seed(0)
    unet, text_encoder = make_unet_and_text_encoder(len(tokenizer))
    pretrain_unet(unet, text_encoder, tokenizer, scheduler, latents, captions)
    pipe = diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.to(dtype=torch.float16).save_pretrained(FOLDER)
    config = FOLDER / "text_encoder" / "config.json"
    # Otherwise transformers 5 would load this part alone in half precision
    text = config.read_text(encoding="utf-8").replace("float16", "float32")
    config.write_text(text, encoding="utf-8")
    file = FOLDER / "text_encoder" / "model.safetensors"
    # transformers 4 needs the prefix; transformers 5 saves without it and reads both
    weights = {}
    for name, tensor in load_file(file).items():
        weights[f"text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file(weights, file, {"format": "pt"})


def evaluate(guidance: float, count: int = 100):
    """Print the strict accuracy of each kind on random captions, sampled by stock diffusers with
    DDIM, 10 steps and eta 1. Save a grid as shapes.png."""
    import shapes_reward
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for name in (*KINDS, "biased phrase"):
        if name == "biased phrase":
            prompts = [caption(BIASED)] * count
        else:
            prompts = [caption(scene(name, rng)) for _ in range(count)]
        images = pipe(prompts, num_inference_steps=10, guidance_scale=guidance, eta=1.0,
                      generator=generator).images
        blank = 0
        for image in images:
            classes = shapes_reward.hue_classes(np.asarray(image)[None])
            blank += int((classes == 0).all())
        strict = shapes_reward.strict(images, prompts).mean()
        alignment = shapes_reward.alignment(images, prompts).mean()
        print(f"{name:14s} strict {strict:.2f}   alignment {alignment:.2f}   "
              f"blank {blank} of {count}")
        rows.append(np.concatenate([np.asarray(image) for image in images[:16]], 1))
    Image.fromarray(np.concatenate(rows)).save("shapes.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true",
                        help="make nothing, evaluate the weights that are there")
    parser.add_argument("--guidance", type=float, default=2.0,
                        help="weight of classifier-free guidance for --evaluate (default: 2)")
    flags = parser.parse_args()
    if not flags.evaluate:
        make()
    evaluate(flags.guidance)
