"""DDPO_SF in one pass: its gradient is collected while sampling, so that no trajectory is gone through again.

    python experiments/single_pass.py --reward jpeg  # the flags and the run folder of ddpo.py, with --algo sf

(DDPO_SF), with the advantage A for the reward, is linear in A:

    sum_i sum_t A_i grad log p_theta(x_{t-1} | x_t, c_i)  =  sum_i A_i e_i,
    e_i = sum_t grad log p_theta(x_{t-1} | x_t, c_i),

and the trace e_i of a sample needs no reward. So each step of sampling is followed by its own backward pass,
which adds to e_i, and the activations of a step are let go before the next. Nothing is approximated, the
second forward pass over all steps is saved, and the memory does not grow with the number of steps: it is
that of one step of one batch, and a trace for each sample, as large as the LoRA weights (3.2 MB for Stable
Diffusion at rank 4).

What is known: e_i is the sum of Williams' characteristic eligibilities (REINFORCE, 1992) and the eligibility
trace of GPOMDP (Baxter and Bartlett, 2001). Others differentiate the sampling pass too, but keep its whole
graph until the reward is known (nepfaff/steerable-scene-generation, RTkenny/RLR-Optimizer) or replay the
steps (AReaL, pull request 1410). It serves DDPO_SF alone: later updates on the same samples are at other
weights, and the gradient of a KL penalty needs the pre-trained model at each step.
"""
import dataclasses
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo  # noqa: E402
from ddpo import RANK, WORLD, setting  # noqa: E402


@dataclasses.dataclass
class Config(ddpo.Config):
    """ddpo.py's settings, with one estimator."""
    algo: Literal["sf"] = setting("sf", "DDPO_SF")


@contextmanager
def lora_of_each(unet, count):
    """Inside this context each of the `count` inputs of a UNet call has LoRA weights of its own, of equal
    values -> these, (count, *shape), in the order of add_lora's list; .grad has each input's gradient."""
    layers = [side for processor in unet.attn_processors.values() for side in (processor.A, processor.B)]
    shared = [dict(side.items()) for side in layers]
    try:
        for side, weights in zip(layers, shared):
            side.update({name: nn.Parameter(weight.detach().expand(count, *weight.shape))
                         for name, weight in weights.items()})
        yield [parameter for parameter in unet.parameters() if parameter.requires_grad]
    finally:
        for side, weights in zip(layers, shared):
            side.update(weights)


@torch.no_grad()
def sample_and_trace(pipe, prompts, config, generators, scaler):
    """`ddpo.sample`, and the trace e_i / (N K) of each sample, times the scale of fp16's loss -> Rollout, and
    of each LoRA parameter the traces (N, *shape) on the CPU."""
    pipe.scheduler.set_timesteps(config.steps, device=pipe.device)
    N, K, size, timesteps = len(prompts), config.steps, pipe.unet.config.sample_size, pipe.scheduler.timesteps
    cond, uncond = (pipe.encode_prompt(texts, pipe.device, 1, False)[0] for texts in (prompts, [""]))
    latents = torch.empty(N, K + 1, 4, size, size, device=pipe.device)
    log_probs, images = torch.empty(N, K, device=pipe.device), []
    lora = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    traces = [torch.empty(N, *parameter.shape) for parameter in lora]
    for first in tqdm(range(0, N, config.batch), "sampling", leave=False):
        i = slice(first, first + config.batch)  # B samples
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators[i]])
        noise, B = noise.to(pipe.device), len(noise)  # (B, K + 1, 4, H, W)
        latents[i, 0] = noise[:, 0]  # x_T
        sums = [parameter.new_zeros(B, *parameter.shape) for parameter in lora]
        for k, t in enumerate(timesteps):
            rows = B if config.guidance == 1 else 2 * B  # of a UNet call
            with torch.enable_grad(), lora_of_each(pipe.unet, rows) as weights:
                mean, sigma = ddpo.policy(pipe, latents[i, k], t.expand(B), cond[i], uncond, config)
                latents[i, k + 1] = (mean + sigma * noise[:, k + 1]).detach()  # the action x_{t-1} is data
                log_prob = ddpo.log_prob(latents[i, k + 1], mean, sigma)
                scaler.scale(log_prob.sum() / (N * K)).backward()  # as small as in the mean over pairs
            log_probs[i, k] = log_prob.detach()
            for trace, weight in zip(sums, weights):  # e_i += grad log p_theta(x_{t-1} | x_t, c_i)
                trace += weight.grad.unflatten(0, (-1, B)).sum(0)  # the two halves of guidance together
            del mean, log_prob, weights, weight  # they hold what this step saved
        for trace, total in zip(traces, sums):
            trace[i] = total.cpu()
        x_0 = latents[i, K].to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        images += pipe.image_processor.postprocess(pipe.vae.decode(x_0).sample.float())
    return ddpo.Rollout(prompts, cond, uncond, timesteps, latents, log_probs, images), traces


def train(config):
    """DDPO_SF, one update an epoch, as `ddpo.train` does it -> the run's folder. Raises ValueError."""
    if config.algo != "sf" or config.kl_weight:
        raise ValueError(f"one pass is for sf without a KL penalty, not for algo {config.algo}, kl_weight "
                         f"{config.kl_weight}; use ddpo.py")
    pipe, all_prompts, reward_fn = ddpo.prepare(config)
    lora = ddpo.add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    statistics = ddpo.PromptStatistics(config.buffer_size, config.min_count)
    parts = dict(lora=nn.ParameterList(lora), optimizer=optimizer, scaler=scaler, statistics=statistics)
    folder, log = ddpo.start_run(pipe, all_prompts, reward_fn, config, parts)
    N, K, mine = config.samples_per_epoch, config.steps, slice(RANK, None, WORLD)

    while not ddpo.finished(log, config):
        epoch, started = len(log) + 1, time.time()
        rng = ddpo.generator(config.seed, epoch, N)
        prompts = [all_prompts[i] for i in torch.randint(len(all_prompts), (N,), generator=rng)]
        generators = [ddpo.generator(config.seed, epoch, i) for i in range(RANK, N, WORLD)]
        rollout, traces = sample_and_trace(pipe, prompts[mine], config, generators, scaler)
        reward = ddpo.gather(reward_fn(rollout.images, rollout.prompts))  # r(x_0, c), (N,)
        advantage = statistics.update(prompts, reward)[mine]
        advantage.clamp_(-config.advantage_clip, config.advantage_clip)
        for parameter, trace in zip(lora, traces):  # of minus the mean over samples and steps of A log p
            parameter.grad = -torch.tensordot(advantage, trace, 1).to(pipe.device) / WORLD
        norm = ddpo.optimizer_step(lora, optimizer, scaler, config)

        log.append({"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(),
                    "reward_std": reward.std(correction=0).item(),
                    **ddpo.summary([{"update": 0, "pairs": N * K}], [norm], started),
                    "kl": ddpo.kl_to_pretrained(pipe, rollout, config, rng)})
        del rollout, traces  # makes room for the next
        if RANK == 0:
            if ddpo.finished(log, config) or epoch % config.sample_every == 0:
                ddpo.draw_samples(pipe, all_prompts, reward_fn, config, folder, epoch)
            ddpo.save_run(folder, log, pipe.unet, parts)
    if RANK == 0:
        ddpo.draw_progress(folder)
    return folder


def parse(argv=None):
    """ddpo.parse, with --algo sf."""
    with mock.patch.object(ddpo, "Config", Config):
        return ddpo.parse(argv)


def main(argv=None):
    """The exit status, as that of ddpo.main."""
    with mock.patch.multiple(ddpo, Config=Config, train=train):
        return ddpo.main(argv)


if __name__ == "__main__":
    sys.exit(main())
