"""Whether roundings alone carry the ratio out of its clip: one update in fp32, fp16 and bf16, side by side.

    python experiments/precision.py            # shapes/ at latents of 32 x 32, and 10 million parameters
    python experiments/precision.py --size sd  # the size of Stable Diffusion: on a CUDA GPU, 20 GB; without
                                               # one half precision is imitated: half an hour, 12 GB

An update moves the guided noise by delta, in half precision also because the changed weights round anew. With
it the mean of the step moves, by g sigma in the root mean square of the latent's D numbers. An action of the
old policy is mean + sigma noise, so that the mean log-ratio of a pair is Gaussian with mean -g^2 / 2 and
variance g^2 / D: the share of ratios outside the clip needs no sampling. The clip is 1.64 / D, for which 1e-4
stands with Stable Diffusion's D of 16,384.

The update is AdamW's first on fresh LoRA, by the gradient in fp32 of (DDPO_SF) at some of the states that are
looked at, with DDPO's settings and with DPOK's: the same for all precisions. The states are noise; the
weights are those of shapes/ or random. `imitated` rounds the weights and each module's output, but computes
in fp32.
"""
import argparse
import copy
import json
import sys
import time
from pathlib import Path

import diffusers
import torch
from diffusers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import ddpo  # noqa: E402
import dpok  # noqa: E402

logging.set_verbosity_error()  # not that a UNet is cast as a whole
FILE = HERE / "results" / "precision.json"
STEPS = (0, 25, 45, 46, 47, 48, 49)  # of 50: the beginning, the middle, the last five
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"shapes": ("real", 4), "10M": ("real", 2),  # how, states of each step
         "sd": ("real" if DEVICE == "cuda" else "imitated", 1)}
UNETS = {"10M": bench.UNETS["medium"] | {"block_out_channels": (64, 128, 224)}, "sd": bench.UNETS["sd"]}


def load_unet(size):
    """A frozen UNet in fp32; that of shapes/ takes latents of any size."""
    torch.manual_seed(0)
    if size == "shapes":
        unet = diffusers.UNet2DConditionModel.from_pretrained(bench.SHAPES, subfolder="unet")
    else:
        unet = diffusers.UNet2DConditionModel(**UNETS[size])
    return unet.eval().to(DEVICE)


def in_precision(unet, name, imitated):
    """A copy of a UNet in a precision, or rounded as in it, with fresh LoRA in fp32 -> UNet, its LoRA."""
    unet = copy.deepcopy(unet)
    if name in HALF and imitated:
        def rounded(module, inputs, output):
            return output.to(HALF[name]).float() if isinstance(output, torch.Tensor) else output

        for parameter in unet.parameters():
            parameter.data = parameter.data.to(HALF[name]).float()
        for module in unet.modules():
            module.register_forward_hook(rounded)
    elif name in HALF:
        unet.to(HALF[name])
    return unet, ddpo.add_lora(unet, 4, torch.Generator().manual_seed(0))


def states(unet, scheduler, size, count):
    """`count` states at each of STEPS -> x_t (n, 4, H, W), t (n,), cond (n, L, E), uncond (1, L, E)."""
    side, width = 32 if size == "shapes" else unet.sample_size, unet.cross_attention_dim
    n = count * len(STEPS)
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(n, 4, side, side, generator=generator)
    text = torch.randn(n + 1, 77, width, generator=generator).bfloat16().float()  # no rounding of its own
    t = scheduler.timesteps[list(STEPS)].repeat_interleave(count)
    return [tensor.to(DEVICE) for tensor in (x_t, t, text[1:], text[:1])]


def one_update(unet, scheduler, at, config):
    """LoRA after one AdamW step, by (DDPO_SF) at some of the states, with advantages of 1 and -1 -> its
    parameters' values."""
    unet, lora = in_precision(unet, "fp32", False)
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    x_t, t, cond, uncond = at
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for i in range(0, len(x_t), max(len(x_t) // 3, 1)):
        eps = ddpo.predict_noise(unet, x_t[i:i + 1], t[i:i + 1], cond[i:i + 1], uncond, config.guidance)
        mean, sigma = ddpo.step_distribution(scheduler, eps, t[i:i + 1], x_t[i:i + 1], config.eta)
        log_prob = ddpo.log_prob((mean + sigma * noise[i]).detach(), mean, sigma)
        advantage = torch.tensor([1.0 if i % 2 else -1.0], device=DEVICE)
        ddpo.score_function_loss(log_prob, advantage)[0].backward()
    optimizer.step()
    return [parameter.detach().clone() for parameter in lora]


@torch.no_grad()
def moved(unet, scheduler, at, config, lora, updated):
    """What the update moves -> of each state delta and g, both root mean squares over the latent."""
    noises, fresh = [], [parameter.detach().clone() for parameter in lora]
    for values in (fresh, updated):
        for parameter, value in zip(lora, values):
            parameter.copy_(value)
        noises.append(torch.cat([ddpo.predict_noise(unet, *(part[i:i + 1] for part in at[:3]), at[3],
                                                    config.guidance) for i in range(len(at[0]))]))
    for parameter, value in zip(lora, fresh):
        parameter.copy_(value)
    x_t, t = at[:2]
    (old, sigma), (new, _) = (ddpo.step_distribution(scheduler, eps, t, x_t, config.eta) for eps in noises)
    return [x.square().mean((1, 2, 3)).sqrt() for x in (noises[1] - noises[0], (new - old) / sigma)]


def outside(g, D):
    """The share of ratios outside the clip: of N(-g^2 / 2, g^2 / D) outside +-1.64 / D."""
    log_ratio, edge = torch.distributions.Normal(-g**2 / 2, (g / D**0.5).clamp(min=1e-12)), 1.64 / D
    return 1 - log_ratio.cdf(torch.full_like(g, edge)) + log_ratio.cdf(torch.full_like(g, -edge))


def table(size):
    """-> rows: script, timestep, then of each precision delta, the mean true log-ratio and the share."""
    how, count = SIZES[size]
    scheduler = diffusers.DDIMScheduler.from_pretrained(bench.SHAPES, subfolder="scheduler")
    scheduler.set_timesteps(50)
    torch.backends.cudnn.allow_tf32 = False  # as load_pipeline has it
    unet = load_unet(size)
    at, rows = states(unet.config, scheduler, size, count), []
    D = at[0][0].numel()
    kinds = [("fp32", False), *((name, how == "imitated") for name in HALF)]
    kinds += [(name, True) for name in HALF] if how == "real" else []
    for script in (ddpo, dpok):
        config = script.Config(model="shapes", device="cpu")
        updated, columns = one_update(unet, scheduler, at, config), []
        for name, imitated in kinds:
            copied, lora = in_precision(unet, name, imitated)
            delta, g = moved(copied, scheduler, at, config, lora, updated)
            columns += [x.view(len(STEPS), count).mean(1) for x in (delta, -D * g**2 / 2, outside(g, D))]
        rows += [[script.__name__, t, *(column[i].item() for column in columns)]
                 for i, t in enumerate(scheduler.timesteps[list(STEPS)].tolist())]
    return {"D": D, "columns": [f"{name}{', imitated' * imitated}" for name, imitated in kinds], "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "small"], default="small", help="small: shapes and 10M")
    size = parser.parse_args().size
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in ("shapes", "10M") if size == "small" else (size,):
        started = time.time()
        found[name] = table(name)
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {time.time() - started:.0f} s", file=sys.stderr)
    print("\n".join(lines(found)))


def lines(found):
    """The results as Markdown."""
    for size, part in found.items():
        how = " | ".join(f"{name}: δ, log-ratio, share" for name in part["columns"])
        yield f"\n| {size}, D = {part['D']:,} | t | {how} |\n|---|---|{'---|' * len(part['columns'])}"
        for script, t, *numbers in part["rows"]:
            cells = [f"{delta:.2g}, {log_ratio:.2g}, {100 * share:.0f} %"
                     for delta, log_ratio, share in zip(*(numbers[i::3] for i in range(3)))]
            yield f"| {script} | {t} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
