"""Whether rounding alone carries the ratio out of its clip range: one update in fp32, fp16, bf16.

    python bench/precision.py            # shapes/ at latents of 32 x 32, and 10 million parameters
    python bench/precision.py --size sd  # Stable Diffusion's size: a CUDA GPU with 20 GB. Without
                                         # one half precision is imitated, in 30 minutes and 12 GB

An update changes the guided noise by delta. In half precision it does so also because the changed
weights are rounded again. The mean of the step then moves by g sigma, the root mean square over the
D numbers of a latent. An action of the old policy is mean + sigma noise, so the mean log-ratio of a
pair is Gaussian with mean -g^2 / 2 and variance g^2 / D. The share of ratios outside the clip range
follows without sampling. The clip range is 1.64 / D, which is 1e-4 for Stable Diffusion's D of
16,384.

The update is AdamW's first on fresh LoRA, once with DDPO's settings and once with DPOK's. It is the
same for all precisions: its gradient is that of (DDPO_SF) in fp32, at some of the states that are
compared. The states are noise. The weights are those of shapes/ or random. "imitated" means that
the weights and the output of each module are rounded, but computed in fp32.
"""
import argparse
import copy
import dataclasses
import json
import sys
import time
from pathlib import Path

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
import bench  # noqa: E402
import ddpo  # noqa: E402
import dpok  # noqa: E402

logging.set_verbosity_error()  # diffusers warns when a UNet is cast as a whole
FILE = HERE / "results" / "precision.json"
STEPS = [0, 25, 45, 46, 47, 48, 49]  # of 50: the beginning, the middle, the last five
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATES_PER_STEP = {"shapes": 4, "10M": 2, "sd": 1}
UNETS = {"10M": bench.UNETS["medium"] | {"block_out_channels": (64, 128, 224)},
         "sd": bench.UNETS["sd"]}


@dataclasses.dataclass
class States:
    """n states at which precisions are compared."""
    x_t: Tensor     # (n, 4, H, W)
    t: Tensor       # (n,)
    cond: Tensor    # (n, L, E)
    uncond: Tensor  # (1, L, E)


def load_unet(size: str):
    """Load a UNet in fp32, that of shapes/ or a random one. Both take latents of any size."""
    torch.manual_seed(0)
    if size == "shapes":
        unet = diffusers.UNet2DConditionModel.from_pretrained(bench.SHAPES, subfolder="unet")
    else:
        unet = diffusers.UNet2DConditionModel(**UNETS[size])
    return unet.eval().to(DEVICE)


def in_precision(unet, name: str, imitated: bool):
    """Copy a UNet into a precision, or round it as in that precision, and add fresh LoRA in fp32
    -> UNet, LoRA's parameters."""
    unet = copy.deepcopy(unet)

    def round_output(module, inputs, output):
        if isinstance(output, Tensor):
            return output.to(HALF[name]).float()
        return output

    if name in HALF and imitated:
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(HALF[name]).float()
        for module in unet.modules():
            module.register_forward_hook(round_output)
    elif name in HALF:
        unet.to(HALF[name])
    lora = ddpo.add_lora(unet, 4, torch.Generator().manual_seed(0))
    return unet, lora


def make_states(unet_config, scheduler, size: str, count: int) -> States:
    """Make `count` random states at each of STEPS."""
    side = 32 if size == "shapes" else unet_config.sample_size
    n = count * len(STEPS)
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(n, 4, side, side, generator=generator)
    text = torch.randn(n + 1, 77, unet_config.cross_attention_dim, generator=generator)
    text = text.bfloat16().float()  # in half precision the text is not rounded again
    t = scheduler.timesteps[STEPS].repeat_interleave(count)
    return States(x_t.to(DEVICE), t.to(DEVICE), text[1:].to(DEVICE), text[:1].to(DEVICE))


def predict_noise(unet, states: States, i: int, guidance: float) -> Tensor:
    """Predict the noise at state i -> (1, 4, H, W)."""
    one = slice(i, i + 1)
    return ddpo.predict_noise(
        unet, states.x_t[one], states.t[one], states.cond[one], states.uncond, guidance)


def one_update(unet, scheduler, states: States, config) -> list[Tensor]:
    """Make AdamW's first step in fp32, by (DDPO_SF) at three or four of the states, with an
    advantage of 1 or -1 each -> the values of LoRA's parameters."""
    unet, lora = in_precision(unet, "fp32", imitated=False)
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    n = len(states.x_t)
    noise = torch.randn(states.x_t.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for i in range(0, n, max(n // 3, 1)):
        one = slice(i, i + 1)
        eps = predict_noise(unet, states, i, config.guidance)
        mean, sigma = ddpo.step_distribution(
            scheduler, eps, states.t[one], states.x_t[one], config.eta)
        x_prev = (mean + sigma * noise[i]).detach()
        log_prob = ddpo.log_prob(x_prev, mean, sigma)
        sign = 1.0 if i % 2 else -1.0
        loss, _ = ddpo.score_function_loss(log_prob, torch.tensor([sign], device=DEVICE))
        loss.backward()
    optimizer.step()
    return [parameter.detach().clone() for parameter in lora]


def set_values(parameters: list, values: list):
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def root_mean_square(x: Tensor) -> Tensor:
    """Compute the root mean square of each latent, (n, 4, H, W) -> (n,)."""
    return x.square().mean((1, 2, 3)).sqrt()


@torch.no_grad()
def movement(unet, scheduler, states: States, config, lora: list, updated: list):
    """Measure how far the update moves the guided noise and the mean -> delta (n,), g (n,)."""
    n = len(states.x_t)
    fresh = [parameter.detach().clone() for parameter in lora]
    eps_old = torch.cat([predict_noise(unet, states, i, config.guidance) for i in range(n)])
    set_values(lora, updated)
    eps_new = torch.cat([predict_noise(unet, states, i, config.guidance) for i in range(n)])
    set_values(lora, fresh)
    mean_old, sigma = ddpo.step_distribution(
        scheduler, eps_old, states.t, states.x_t, config.eta)
    mean_new, _ = ddpo.step_distribution(scheduler, eps_new, states.t, states.x_t, config.eta)
    return root_mean_square(eps_new - eps_old), root_mean_square((mean_new - mean_old) / sigma)


def share_outside(g: Tensor, D: int) -> Tensor:
    """Compute the share of ratios outside the clip range: of N(-g^2 / 2, g^2 / D) outside
    +-1.64 / D -> the shape of g."""
    clip_range = torch.full_like(g, 1.64 / D)
    log_ratio = torch.distributions.Normal(-g**2 / 2, (g / D**0.5).clamp(min=1e-12))
    return 1 - log_ratio.cdf(clip_range) + log_ratio.cdf(-clip_range)


def compare(size: str) -> dict:
    """Compare the precisions -> {"D": the numbers of a latent, "columns": the precisions, "rows"}.
    A row has script and timestep, and then of each precision: delta, the mean true log-ratio
    -D g^2 / 2, and the share of ratios outside the clip range."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(bench.SHAPES, subfolder="scheduler")
    scheduler.set_timesteps(50)
    torch.backends.cudnn.allow_tf32 = False  # as in load_pipeline
    unet = load_unet(size)
    count = STATES_PER_STEP[size]
    states = make_states(unet.config, scheduler, size, count)
    D = states.x_t[0].numel()

    precisions = [("fp32", False)]
    if size != "sd" or DEVICE == "cuda":  # real half precision at that size is too slow on a CPU
        precisions += [("fp16", False), ("bf16", False)]
    precisions += [("fp16", True), ("bf16", True)]

    rows = []
    for script in (ddpo, dpok):
        config = script.Config(model="shapes", device="cpu")
        updated = one_update(unet, scheduler, states, config)
        columns = []
        for name, imitated in precisions:
            rounded, lora = in_precision(unet, name, imitated)
            delta, g = movement(rounded, scheduler, states, config, lora, updated)
            for values in (delta, -D * g**2 / 2, share_outside(g, D)):
                columns.append(values.view(len(STEPS), count).mean(1))
        for i, t in enumerate(scheduler.timesteps[STEPS].tolist()):
            rows.append([script.__name__, t, *(column[i].item() for column in columns)])
    names = [f"{name}, imitated" if imitated else name for name, imitated in precisions]
    return {"D": D, "columns": names, "rows": rows}


def tables(results: dict) -> list[str]:
    """Make a Markdown table of each size -> lines."""
    lines = []
    for size, result in results.items():
        headers = [f"{name}: δ, log-ratio, share" for name in result["columns"]]
        lines.append(f"\n| {size}, D = {result['D']:,} | t | {' | '.join(headers)} |")
        lines.append("|---|---|" + "---|" * len(headers))
        for script, t, *numbers in result["rows"]:
            cells = []
            for i in range(0, len(numbers), 3):
                delta, log_ratio, share = numbers[i:i + 3]
                cells.append(f"{delta:.2g}, {log_ratio:.2g}, {100 * share:.0f} %")
            lines.append(f"| {script} | {t} | {' | '.join(cells)} |")
    return lines


def main():
    """Measure one size or several, store the results and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=["small", *STATES_PER_STEP], default="small",
                        help="model to measure; small: shapes and 10M (default: small)")
    options = parser.parse_args()
    sizes = ["shapes", "10M"] if options.size == "small" else [options.size]
    results = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for size in sizes:
        start_time = time.time()
        results[size] = compare(size)
        FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{size}: {time.time() - start_time:.0f} s", file=sys.stderr)
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
