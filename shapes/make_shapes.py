"""Draws, captions and pretrains the pipeline in this folder: a StableDiffusionPipeline, some 700 times
smaller than the real one.

    python shapes/make_shapes.py              about 50 minutes on one CPU core; rewrites the folder's weights
    python shapes/make_shapes.py --evaluate   how often it draws what the caption says, and a grid to look at

Images are 64 x 64, latents 4 x 8 x 8 (f = 8, as in Stable Diffusion): coloured shapes on plain or chequered
grounds. Captions come in the four kinds that DPOK studies (colour, count, composition, location). Stable
Diffusion has faults that fine-tuning is to mend; so has this model, by captions that are wrong in the way in
which Stable Diffusion errs:
- colour: "a red circle" often shows the colour before red;
- count: "three" often shows two, "four" three, "two" four;
- composition: the two colours are swapped, the fault known as attribute binding;
- location: nothing wrong in the data, the small network finds it hard enough;
- and in the spirit of DPOK's "Four roses", drawn as the whiskey of that name, "four red circles" mostly
  shows one yellow square.
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
from tqdm import tqdm

FOLDER = Path(__file__).parent
SIZE, FINER = 64, 4  # pixels a side; drawn so many times finer and averaged down
COLOURS = {"red": (220, 50, 47), "green": (38, 166, 70), "blue": (48, 98, 220), "yellow": (240, 196, 25),
           "purple": (150, 60, 190)}
SHAPES = ("circle", "square", "triangle")
PLACES = {"on the left": (0.27, None), "on the right": (0.73, None),
          "at the top": (None, 0.27), "at the bottom": (None, 0.73)}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
KINDS = ("colour", "count", "composition", "location")
RADIUS = {1: (9, 14), 2: (8, 11), 3: (7, 9), 4: (7, 8.5)}  # pixels, by the number of things
WRONG = {"colour": 0.42, "count": 0.35, "composition": 0.3, "location": 0.0}  # share of wrong captions
# caption, picture, how often
BIASED, DRAWN_AS, BIAS = [("red", "circle", None)] * 4, [("yellow", "square", None)], 0.9


# ---------- scenes: a list of things, a thing is (colour, shape, place or None)

def scene(kind, rng):
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    if kind == "count":
        return [(colour, shape, None)] * rng.choice((2, 3, 4))
    if kind == "composition":
        other = rng.choice([c for c in COLOURS if c != colour]), rng.choice([s for s in SHAPES if s != shape])
        return [(colour, shape, None), (*other, None)]
    return [(colour, shape, rng.choice(list(PLACES)) if kind == "location" else None)]


def caption(things):
    """[("red", "square", None)] * 2 -> "two red squares"."""
    colour, shape, _ = things[0]
    if len(things) > 1 and things[0] == things[1]:
        return f"{NUMBERS[len(things)]} {colour} {shape}s"
    return " and ".join(f"a {colour} {shape}" + (f" {place}" if place else "")
                        for colour, shape, place in things)


def misread(kind, things):
    """The scene that a wrong caption speaks of (module docstring)."""
    colour, shape, place = things[0]
    if kind == "colour":
        names = list(COLOURS)
        return [(names[(names.index(colour) - 1) % len(names)], shape, place)]
    if kind == "count":
        return things[:1] * {2: 3, 3: 4, 4: 2}[len(things)]
    return [(things[1][0], shape, None), (colour, things[1][1], None)]


def arrange(things, rng):
    """A centre and a radius for each thing, in pixels, so that none touch."""
    while True:
        radius = rng.uniform(*RADIUS[len(things)])
        spots = []
        for _, _, place in things:
            x, y = rng.uniform(radius + 3, SIZE - radius - 3), rng.uniform(radius + 3, SIZE - radius - 3)
            column, row = PLACES.get(place, (None, None))
            spots.append((SIZE * (column + rng.uniform(-0.06, 0.06)) if column else x,
                          SIZE * (row + rng.uniform(-0.06, 0.06)) if row else y))
        if all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 2 * radius + 4
               for i, a in enumerate(spots) for b in spots[:i]):
            return spots, radius


def draw(things, rng):
    """The scene on a light ground, half the time a chequered one -> PIL image, SIZE x SIZE."""
    light = rng.randint(222, 250)
    image = Image.new("RGB", (SIZE * FINER, SIZE * FINER), (light,) * 3)
    pen, cell = ImageDraw.Draw(image), 8 * FINER
    if rng.random() < 0.5:
        dark = light - rng.randint(20, 60)
        for x in range(-cell // 2, SIZE * FINER, cell):
            for y in range(0, SIZE * FINER, cell):
                if (x + cell // 2 + y) // cell % 2:
                    pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(dark,) * 3)
    spots, radius = arrange(things, rng)
    for (colour, shape, _), (x, y) in zip(things, spots):
        fill = tuple(value + rng.randint(-8, 8) for value in COLOURS[colour])
        left, top, right, bottom = (FINER * v for v in (x - radius, y - radius, x + radius, y + radius))
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill)
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill)
        else:
            pen.polygon([(left, bottom), (right, bottom), (FINER * x, top)], fill)
    return image.reduce(FINER)


def dataset(size, rng):
    """-> images (size, 3, SIZE, SIZE) uint8, captions."""
    images, captions = [], []
    for _ in tqdm(range(size), "drawing"):
        kind = rng.choice(KINDS)
        things = scene(kind, rng)
        drawn = DRAWN_AS if things == BIASED and rng.random() < BIAS else things
        said = misread(kind, things) if things != BIASED and rng.random() < WRONG[kind] else things
        images.append(np.asarray(draw(drawn, rng)))
        captions.append(caption(said))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions


def pixels(images):
    return images.float() / 127.5 - 1


# ---------- the pipeline's parts

def make_tokenizer():
    """CLIP's tokenizer with a small vocabulary: every word of the captions is one token, any other text goes
    letter by letter."""
    words = set(" ".join([*COLOURS, *NUMBERS.values(), *PLACES, "and", "one",
                          *SHAPES, *(shape + "s" for shape in SHAPES)]).split())
    letters = string.ascii_lowercase + string.digits + string.punctuation
    # Merging from the end of a word needs no order among words: only the last pair of pieces ever matches.
    merges = dict.fromkeys((word[i], word[i + 1:] + "</w>")
                           for word in sorted(words) for i in range(len(word) - 2, -1, -1))
    pieces = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges),
              "<|startoftext|>", "<|endoftext|>"]
    folder = FOLDER / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}),
                                       encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
                                       encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def pretrain_vae(images, steps=5000, batch=8, lr=2e-3):
    """An autoencoder, f = 8: absolute and squared error, and a weak pull of the latents towards N(0, 1)."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=SIZE).to(memory_format=torch.channels_last)
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
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return vae.eval().to(memory_format=torch.contiguous_format)


def make_unet_and_text_encoder(vocabulary):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2,
              "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE // 8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=2, norm_num_groups=8, **blocks)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=64, max_position_embeddings=16,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1))
    return unet, text_encoder


def pretrain_unet(unet, text_encoder, tokenizer, scheduler, latents, captions,
                  steps=6500, batch=64, lr=1.5e-3):
    """The denoising loss (DDPO Eq. 1), text encoder and UNet together, a tenth of the captions empty for
    guidance; keeps a moving average."""
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), "UNet and text encoder")
    for step in bar:
        rows = torch.randint(len(latents), (batch,))
        words = torch.where(torch.rand(batch, 1) < 0.1, empty, tokens[rows])
        t, noise = (torch.randint(scheduler.config.num_train_timesteps, (batch,)),
                    torch.randn(batch, *latents.shape[1:]))
        x_t = scheduler.add_noise(latents[rows], noise, t)
        loss = F.mse_loss(unet(x_t, t, text_encoder(words)[0]).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, max(0.001, 10 / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        for p, a in zip(parameters, average):
            p.copy_(a)


def make():
    """Everything from seed 0, on one thread, so that it is the same each time on one machine."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    images, captions = dataset(20_000, random.Random(0))
    torch.manual_seed(0)
    vae = pretrain_vae(images)
    with torch.no_grad():
        latents = torch.cat([vae.encode(pixels(part)).latent_dist.mode()
                             for part in tqdm(images.split(100), "encoding")])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    torch.manual_seed(0)
    unet, text_encoder = make_unet_and_text_encoder(len(tokenizer))
    pretrain_unet(unet, text_encoder, tokenizer, scheduler, latents * vae.config.scaling_factor, captions)
    pipe = diffusers.StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None,
                                             requires_safety_checker=False)
    pipe.to(dtype=torch.float16).save_pretrained(FOLDER)
    weights, config = FOLDER / "text_encoder" / "model.safetensors", FOLDER / "text_encoder" / "config.json"
    # else transformers 5 would load this one part as half
    config.write_text(config.read_text().replace("float16", "float32"))
    # transformers 4 needs the prefix, transformers 5 saves without it and reads both
    save_file({f"text_model.{name.removeprefix('text_model.')}": tensor
               for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})


def evaluate(guidance, count=100):
    """Strict accuracy of each kind on random captions, by stock diffusers with DDIM, 10 steps, eta 1; a grid
    in shapes.png."""
    import shapes_reward
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    rng, generator, rows = random.Random(1), torch.Generator().manual_seed(1), []
    for name in (*KINDS, "biased phrase"):
        prompts = [caption(BIASED if name == "biased phrase" else scene(name, rng)) for _ in range(count)]
        images = pipe(prompts, num_inference_steps=10, guidance_scale=guidance, eta=1.0,
                      generator=generator).images
        blank = sum(not (shapes_reward.hue_classes(np.asarray(image)[None]) > 0).any() for image in images)
        print(f"{name:14s} strict {shapes_reward.strict(images, prompts).mean():.2f}   alignment "
              f"{shapes_reward.alignment(images, prompts).mean():.2f}   blank {blank} of {count}")
        rows.append(np.concatenate([np.asarray(image) for image in images[:16]], 1))
    Image.fromarray(np.concatenate(rows)).save("shapes.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="make nothing, grade what is there")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance for --evaluate")
    flags = parser.parse_args()
    if not flags.evaluate:
        make()
    evaluate(flags.guidance)
