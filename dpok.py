"""DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models (Fan et al.,
NeurIPS 2023, arXiv:2305.16381v3). The Markov decision process is DDPO's (Eq. 4), with z for c.

`--algo rl` is Algorithm 1: it minimises objective (8), minus the reward plus the KL to the
pre-trained model, by gradient (9), with the value function of A.5 and the clipped ratio of A.6.
`--algo sft` is Algorithm 2, supervised training, with as many reward queries.
`diff ddpo.py dpok.py` shows what DPOK changes. Added: weights of the steps (on for shapes/).

    python dpok.py         # Stable Diffusion v1.5 on a CUDA GPU; without one, shapes/
    python dpok.py --help  # every setting with its published value

Differences from the paper or its code:
1. (9) leaves out the second sum of Eq. 16, in which later KLs act as penalties on earlier steps.
2. The KL is that of Lemma 4.2, as a mean over the latent, like log p (see `log_prob`). The code has
   the squared difference of the noises. The KL weights it, by 0.07 to 5.4 depending on the step.
3. Eq. 25 is printed as an equality. With one ratio per step it holds only at theta_old, and so does
   (9), whose KL is at states of theta_old. Eq. 26 has the bounds of its clip the other way round.
4. An update is the mean over n random pairs (i, k) of its epoch (code: of two epochs), not a sum.
5. V is fitted after the policy, so that it has not seen the rewards from which it is subtracted
   (code: before). It then lags behind them, and all r - V may have one sign, so r - V is centred.
6. Algorithm 2 was not released. Here t is any step of the sampler but the last, and f is the guided
   prediction. Eq. 12 and 13 are as printed: 12 lacks a factor of 2, and 13 one that depends on t.
"""
import csv
import dataclasses
import json
import math
import os
import sys
import textwrap
import time
from argparse import HelpFormatter
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import diffusers
import torch
import torch.distributed as dist
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from tqdm import tqdm
from transformers import HfArgumentParser

import rewards

# N samples per epoch, B per UNet call, K denoising steps, L text tokens of width E. A latent is
# (4, H, W). t is the scheduler's timestep (981, 961, ..., 1), k the step's number (0, ..., K - 1).

RANK, WORLD_SIZE = 0, 1  # which process this is, and how many there are
if "LOCAL_RANK" in os.environ:  # started by torchrun
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def setting(default, help: str, shown=None):
    """Make a field of Config. `shown` is the default as --help prints it."""
    return dataclasses.field(
        default=default, metadata={"help": f"{help} (default: {shown or default})"})

@dataclasses.dataclass
class Config:
    """The settings of a run. The defaults are the paper's for one prompt (5.2, appendix B), or the
    released code's where the paper has none."""
    model: str = setting("stable-diffusion-v1-5/stable-diffusion-v1-5", "SD 1.x: hub id or folder")
    reward: str = setting("imagereward", f"{', '.join(rewards.REWARDS)}, or FILE.py:FUNCTION")
    reward_options: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "options of the reward, KEY=VALUE (default: none)"})
    prompts: str = setting("color", "color, count, composition, location, roses, file, or phrase")
    unseen: str = setting("", "prompts that are evaluated, not trained on", "Fig. 10's")
    algo: Literal["rl", "sft"] = setting("rl", "Algorithm 1 (rl) or Algorithm 2 (sft)")
    epochs: int = setting(2000, "number of epochs; paper: 2000")
    samples_per_epoch: int = setting(10, "images sampled per epoch, m; paper: 10")
    updates_per_epoch: int = setting(5, "optimiser steps per epoch; paper: 5, for sft 8000 in all")
    update_batch: int | None = setting(
        None, "pairs per update, n; paper: as here; code: 48", "32, with --algo sft 128")
    batch: int = setting(2, "samples or pairs per UNet call; guidance doubles the rows")
    alpha: float = setting(10.0, "weight of the reward; paper: 10")
    beta: float = setting(0.01, "weight of the KL to the pre-trained model; paper: 0.01")
    noise_aware: bool = setting(False, "rl: weight the steps by sigma, for less noise; paper: no")
    value: bool = setting(True, "whether to subtract V (A.5; code: yes) and to centre (ours)")
    value_lr: float = setting(1e-4, "learning rate of V's AdamW; paper: 1e-4")
    value_steps: int = setting(1, "optimiser steps of V per epoch; code: 1")
    gamma: float = setting(2.0, "sft: weight of the KL; leaves out reward + gamma < 0; paper: 2")
    kl_d: bool = setting(False, "sft: KL-D (Eq. 13) instead of KL-O, which section 5.2 uses")
    steps: int = setting(50, "denoising steps; code: 50")
    guidance: float = setting(7.5, "weight w of classifier-free guidance, 1 for none; code: 7.5")
    eta: float = setting(1.0, "noise of DDIM, above 0 and at most 1; code: 1")
    lr: float | None = setting(
        None, "learning rate of AdamW; paper: as here", "1e-5, with --algo sft 2e-5")
    weight_decay: float = setting(0.01, "weight decay of AdamW; paper: AdamW's default; code: 0")
    max_grad_norm: float = setting(0.1, "norm to which the gradient is clipped; paper: 0.1")
    clip_range: float = setting(1e-4, "clip range of the ratio, see log_prob; paper: 1e-4")
    max_kl: float = setting(0.0, "stop when the mean KL of five epochs is above this, 0 for never")
    evaluation_images: int = setting(50, "images per prompt and model, 0 for none; paper: 50")
    rank: int = setting(4, "rank of LoRA; code: 4")
    seed: int = setting(0, "random seed of LoRA, prompts and noise")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda, mps or cpu")
    precision: Literal["auto", "fp16", "fp32"] = setting("auto", "auto: fp16 on CUDA, else fp32")
    gradient_checkpointing: bool = setting(False, "save memory at the cost of time")
    compile: bool = setting(False, "compile the UNet with torch.compile, which takes minutes")
    sample_every: int = setting(10, "epochs between pictures; the LoRA of each is kept")
    out: str = setting("", "folder of the run", "a new one in runs/")
    resume: str = setting("", "folder of a run to continue", "none")

    script = "dpok.py"
    shapes_settings = "shapes/dpok.json"
    zero_allowed = ("weight_decay", "alpha", "beta", "gamma", "max_kl", "evaluation_images", "seed")

    def __post_init__(self):
        self.out, self.resume = str(self.out), str(self.resume)
        if self.lr is None:
            self.lr = 2e-5 if self.algo == "sft" else 1e-5
        if self.update_batch is None:
            self.update_batch = 128 if self.algo == "sft" else 32

    def check(self):
        """Check what types and ranges do not cover. Raises ValueError."""
        for name in ("samples_per_epoch", "update_batch"):
            if getattr(self, name) % WORLD_SIZE:
                raise ValueError(f"{name} ({getattr(self, name)}) must be divisible by the number "
                                 f"of processes ({WORLD_SIZE})")
        if self.algo == "sft" and self.steps == 1:
            raise ValueError("steps (1) must be at least 2 for algo sft, which leaves out the last")
        if self.evaluation_images == 1:
            raise ValueError("evaluation_images (1) must be 0, or 2 or more for a standard error")
        if self.unseen and not self.resume:
            load_prompts(self.unseen)

# ---------- the MDP: one denoising step is a Gaussian (Eq. 4)
def predict_noise(unet: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor,
                  guidance: float) -> Tensor:
    """Predict the noise with guidance (DDPO Eq. 3), w eps(x_t, t, c) + (1 - w) eps(x_t, t).
    x_t (B, 4, H, W) float32, t (B,), cond (B, L, E), uncond (1, L, E) -> (B, 4, H, W) float32."""
    dtype = unet.conv_in.weight.dtype
    if guidance == 1:
        return unet(x_t.to(dtype), t, cond.to(dtype)).sample.float()
    x_t = torch.cat([x_t, x_t])
    t = torch.cat([t, t])
    text = torch.cat([uncond.expand_as(cond), cond])
    eps_uncond, eps_cond = unet(x_t.to(dtype), t, text.to(dtype)).sample.float().chunk(2)
    return eps_uncond + guidance * (eps_cond - eps_uncond)

def step_distribution(scheduler, eps: Tensor, t: Tensor, x_t: Tensor, eta: float = 1.0):
    """Compute DDIM's p_theta(x_{t-1} | x_t, c) = N(mean, sigma^2 I) (arXiv:2010.02502, Eq. 12, 16).

    sigma = eta sqrt((1 - abar_prev) / (1 - abar_t) (1 - abar_t / abar_prev))
    mean  = sqrt(abar_prev) x0_pred + sqrt(1 - abar_prev - sigma^2) eps

    eps, x_t (B, 4, H, W) float32, t (B,) -> mean (B, 4, H, W), sigma (B, 1, 1, 1)."""
    abar = scheduler.alphas_cumprod.to(x_t.device)
    t_prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    abar_t = abar[t].view(-1, 1, 1, 1)
    abar_prev = abar[t_prev.clamp(min=0)].view(-1, 1, 1, 1)  # the last step ends at abar_0 < 1
    x0_pred = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    sigma = eta * ((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)).sqrt()
    mean = abar_prev.sqrt() * x0_pred + (1 - abar_prev - sigma**2).sqrt() * eps
    return mean, sigma

def policy(pipe, x_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, config: Config):
    """Compute p_theta(x_{t-1} | x_t, c) at B states -> mean (B, 4, H, W), sigma (B, 1, 1, 1)."""
    eps = predict_noise(pipe.unet, x_t, t, cond, uncond, config.guidance)
    return step_distribution(pipe.scheduler, eps, t, x_t, config.eta)

def noise_weights(scheduler, eta: float) -> Tensor:
    """Compute the weights of the K steps for --noise_aware, sigma_k scaled to mean 1 -> (K,).
    grad log p is (z / sigma_k) c_k grad eps, with z ~ N(0, I) and c_k = d mean / d eps. The weight
    cancels 1 / sigma_k. TempFlow-GRPO (arXiv:2508.04324) weights flow models like this."""
    zero = torch.zeros(1, device=scheduler.timesteps.device)
    _, sigma = step_distribution(scheduler, zero, scheduler.timesteps, zero, eta)
    return (sigma / sigma.mean()).flatten()

def log_prob(x_prev: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Compute log N(x_{t-1}; mean, sigma^2), averaged over the D elements of a latent -> (B,).

    The paper's density is the sum. With the mean, as in the authors' code, the exponential of
    log_prob - log_prob_old is the D-th root of the true ratio. For D = 16,384, a clip range of 1e-4
    allows true ratios from 0.19 to 5.15."""
    density = -((x_prev - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)

def kl_divergence(mean: Tensor, mean_pre: Tensor, sigma: Tensor) -> Tensor:
    """Compute KL(N(mean, sigma^2) || N(mean_pre, sigma^2)) = (mean - mean_pre)^2 / (2 sigma^2),
    averaged over the latent -> (B,)."""
    return ((mean - mean_pre) ** 2 / (2 * sigma**2)).flatten(1).mean(1)

@dataclasses.dataclass
class Rollout:
    """N trajectories x_T, ..., x_0 sampled by the old policy."""
    prompts: list[str]  # N
    cond: Tensor        # (N, L, E) c, the embeddings of the prompts
    uncond: Tensor      # (1, L, E) the embedding of the empty prompt
    timesteps: Tensor   # (K,) t, descending
    latents: Tensor     # (N, K + 1, 4, H, W) float32: x_t is [:, k], x_{t-1} is [:, k + 1]
    log_probs: Tensor   # (N, K) log p(x_{t-1} | x_t, c) under the old policy
    images: list        # N PIL images

def generator(seed: int, epoch: int, i: int) -> torch.Generator:
    """Make the generator of sample i of an epoch, so that resuming needs no saved random state."""
    return torch.Generator().manual_seed((seed * 2_654_435_761 + epoch * 1_000_003 + i) % 2**32)

@torch.no_grad()
def sample(pipe, prompts: list, config: Config, generators: list, title="sampling") -> Rollout:
    """Sample x_T ~ N(0, I) and K actions x_{t-1} ~ p_theta(x_{t-1} | x_t, c), and decode x_0.
    `generators` has one for each of the N prompts. Raises ValueError for non-finite numbers."""
    pipe.scheduler.set_timesteps(config.steps, device=pipe.device)
    N, K = len(prompts), config.steps
    size = pipe.unet.config.sample_size
    cond = encode_prompts(pipe, prompts)
    uncond = encode_prompts(pipe, [""])
    latents = torch.empty(N, K + 1, 4, size, size, device=pipe.device)
    log_probs = torch.empty(N, K, device=pipe.device)
    images = []
    with tqdm(total=N, desc=title, leave=False, disable=RANK > 0) as bar:
        for start in range(0, N, config.batch):
            i = slice(start, start + config.batch)  # B samples; the last chunk may be smaller
            noise = [torch.randn(latents.shape[1:], generator=g) for g in generators[i]]
            noise = torch.stack(noise).to(pipe.device)  # (B, K + 1, 4, H, W)
            latents[i, 0] = noise[:, 0]  # x_T
            for k, t in enumerate(pipe.scheduler.timesteps):
                t = t.expand(len(noise))  # (B,)
                mean, sigma = policy(pipe, latents[i, k], t, cond[i], uncond, config)
                latents[i, k + 1] = mean + sigma * noise[:, k + 1]  # the action x_{t-1}
                log_probs[i, k] = log_prob(latents[i, k + 1], mean, sigma)
            images += decode(pipe, latents[i, K])
            bar.update(len(noise))
    return Rollout(prompts, cond, uncond, pipe.scheduler.timesteps, latents, log_probs, images)

class ValueNetwork(nn.Module):
    """V(x_t, z, k), the reward expected at x_t (Eq. 23), as in the released code: three layers of
    256, gated by the step."""

    def __init__(self, latent_shape: tuple, text_dim: int, steps: int, width: int = 256):
        super().__init__()
        inputs = [math.prod(latent_shape) + text_dim, width, width]
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in inputs)
        self.gates = nn.ModuleList(nn.Embedding(steps, width) for _ in inputs)
        self.last = nn.Linear(width, 1)
        for gate in self.gates:
            nn.init.ones_(gate.weight)

    def forward(self, x_t: Tensor, z: Tensor, k: Tensor) -> Tensor:
        """x_t (B, 4, H, W), z (B, text_dim), k (B,) the step numbers -> (B,)."""
        h = torch.cat([x_t.flatten(1), z], 1)
        for layer, gate in zip(self.layers, self.gates):
            h = nn.functional.relu(layer(h) * gate(k))
        return self.last(h)[:, 0]

# ---------- losses at B pairs (i, k) of a sample and a step; inputs are (B,) or latents
def policy_loss(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor,
                clip_range: float) -> tuple[Tensor, dict]:
    """Compute the loss of Eq. 26, -E[ (r - V) clip(ratio, 1 - epsilon, 1 + epsilon) ], with the
    advantage r - V and ratio = p_theta / p_theta_old or its D-th root (see log_prob).

    PPO's min is missing: outside the band the gradient is 0 on both sides, whatever the sign of
    r - V. At theta = theta_old the gradient is that of Lemma 4.1, Eq. 6, with r - V for r."""
    ratio = (log_prob - log_prob_old).exp()
    loss = -(advantage * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    deviation = (ratio.detach() - 1).abs()
    info = {"ratio_mean": ratio.detach().mean(), "ratio_deviation": deviation.max(),
            "clipped": (deviation > clip_range).float().mean()}  # the share without gradient
    return loss, info

def predict_x0(scheduler, eps: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
    """Predict x_0, f_theta(x_t, t, z) = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
    abar_t = scheduler.alphas_cumprod.to(x_t.device)[t].view(-1, 1, 1, 1)
    return (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()

def supervised_loss(x0_pred: Tensor, x0: Tensor, reward: Tensor, sigma: Tensor, gamma: float,
                    x0_pre: Tensor | None = None) -> tuple[Tensor, dict]:
    """Compute the loss of KL-D (Eq. 13), (r + gamma) ||x_0 - f_theta||^2 / (2 sigma^2) or, with
    x0_pre = f_pre, of KL-O, (r ||x_0 - f_theta||^2 + gamma ||f_pre - f_theta||^2) / (2 sigma^2).

    x0_pred = f_theta, x0, x0_pre (B, 4, H, W), sigma (B, 1, 1, 1). Norms are means over the latent.
    Pairs with r + gamma < 0 count as 0 (appendix B)."""
    error = ((x0_pred - x0) ** 2 / (2 * sigma**2)).flatten(1).mean(1)
    loss = (reward + gamma) * error
    if x0_pre is not None:
        error_pre = ((x0_pred - x0_pre) ** 2 / (2 * sigma**2)).flatten(1).mean(1)
        loss = reward * error + gamma * error_pre
    left_out = reward + gamma < 0
    return loss.masked_fill(left_out, 0).mean(), {"left_out": left_out.float().mean()}

# ---------- Algorithm 1: reinforcement learning with KL
def train(config: Config) -> Path:
    """Train until `epochs` or `max_kl` is reached -> the run's folder. Raises ValueError."""
    if config.algo == "sft":
        return train_supervised(config)
    pipe, all_prompts, reward_fn = prepare(config)
    lora = add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    torch.manual_seed(config.seed)
    size, text_dim = pipe.unet.config.sample_size, pipe.text_encoder.config.hidden_size
    value_network = ValueNetwork((4, size, size), text_dim, config.steps).to(pipe.device)
    value_optimizer = torch.optim.AdamW(value_network.parameters(), config.value_lr)
    run = start_run(config, pipe, all_prompts, reward_fn, lora=nn.ParameterList(lora),
                    optimizer=optimizer, scaler=scaler, value=value_network,
                    value_optimizer=value_optimizer)
    plan_evaluation(run)
    N, K = config.samples_per_epoch, config.steps
    local = slice(RANK, N, WORLD_SIZE)  # the samples of this process

    while not finished(run.log, config):
        epoch = len(run.log) + 1
        start_time = time.time()
        rng = generator(config.seed, epoch, N)  # for prompts, pairs, KL; samples have 0 to N - 1

        # 1. Sample: prompts z ~ p(z) and, for each, a trajectory x_{0:T} of the policy theta_old
        prompts = [all_prompts[j] for j in torch.randint(len(all_prompts), (N,), generator=rng)]
        generators = [generator(config.seed, epoch, i) for i in range(N)]
        rollout = sample(pipe, prompts[local], config, generators[local])
        latents, log_probs = gather(rollout.latents), gather(rollout.log_probs)
        cond = gather(rollout.cond)

        # 2. Score: the reward r(x_0, z) of each image
        reward = gather(reward_fn(rollout.images, rollout.prompts)).to(pipe.device)  # (N,)

        # 3. Advantages: r - V(x_t, z, k) (A.5), centred (difference 5)
        advantage = reward[:, None].expand(N, K)
        fit = {}
        if config.value:
            states = value_states(pipe, prompts, latents)
            advantage = advantage - value_network(*states).detach().view(N, K)
            fit["value_error"] = advantage.square().mean().item()
            advantage = advantage - advantage.mean()
        if config.noise_aware:  # not in the paper
            advantage = advantage * noise_weights(pipe.scheduler, config.eta)

        # 4. Update: one optimiser step per n random pairs (i, k), by Eq. 9
        infos, grad_norms = [], []
        local_pairs = config.updates_per_epoch * config.update_batch // WORLD_SIZE
        with tqdm(total=local_pairs, desc="updates", leave=False, disable=RANK > 0) as bar:
            for pairs in choose_pairs(N, K, config, rng):
                for chunk in pairs[RANK::WORLD_SIZE].to(pipe.device).split(config.batch):
                    i, k = chunk.unbind(1)  # indices of samples and of steps, (B,)
                    x_t, x_prev = latents[i, k], latents[i, k + 1]
                    state = x_t, rollout.timesteps[k], cond[i], rollout.uncond
                    mean, sigma = policy(pipe, *state, config)
                    log_prob_new = log_prob(x_prev, mean, sigma)
                    log_prob_old = log_probs[i, k]
                    loss, info = policy_loss(
                        log_prob_new, log_prob_old, advantage[i, k], config.clip_range)
                    loss = config.alpha * loss
                    if config.beta:
                        with torch.no_grad(), pretrained(pipe.unet):
                            mean_pre, _ = policy(pipe, *state, config)
                        loss = loss + config.beta * kl_divergence(mean, mean_pre, sigma).mean()
                    share = len(chunk) / len(pairs)  # of the update's pairs
                    scaler.scale(loss * share).backward()
                    infos.append({"update": len(grad_norms), "pairs": len(chunk), **info})
                    bar.update(len(chunk))
                grad_norms.append(optimizer_step(lora, optimizer, scaler, config))

        # 5. Fit V to the rewards (Eq. 24)
        if config.value:
            for _ in range(config.value_steps):
                predicted = value_network(*states)
                nn.functional.mse_loss(predicted, reward.repeat_interleave(K)).backward()
                value_optimizer.step()
                value_optimizer.zero_grad()

        # 6. Log and save
        kl = kl_to_pretrained(pipe, rollout, config, rng)
        row = {"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(),
               "reward_std": reward.std(correction=0).item(),
               **summary(infos, grad_norms, start_time), **fit, "kl": kl}
        end_epoch(run, row)
    evaluate(run)
    end_run(run)
    return run.folder

def choose_pairs(samples: int, steps: int, config: Config, rng: torch.Generator) -> tuple:
    """Choose each update's n random pairs (i, k), none twice before all are used -> (n, 2) each."""
    pairs = torch.cartesian_prod(torch.arange(samples), torch.arange(steps))
    needed = config.updates_per_epoch * config.update_batch
    rounds = math.ceil(needed / len(pairs))
    order = torch.cat([torch.randperm(len(pairs), generator=rng) for _ in range(rounds)])
    return pairs[order[:needed]].split(config.update_batch)

def value_states(pipe, prompts: list, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """List an epoch's states: x_t (N K, 4, H, W), pooled text embeddings z (N K, E), k (N K,)."""
    N, K = len(latents), latents.shape[1] - 1
    tokens = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    z = pipe.text_encoder(tokens.input_ids.to(pipe.device)).pooler_output.float()
    k = torch.arange(K, device=z.device).repeat(N)
    return latents[:, :-1].flatten(0, 1), z.repeat_interleave(K, 0), k

# ---------- Algorithm 2: supervised learning with KL
def train_supervised(config: Config) -> Path:
    """Train until `epochs` or `max_kl` is reached -> the run's folder. Raises ValueError."""
    if config.algo != "sft":
        raise ValueError(f"algo ({config.algo!r}) must be 'sft' for Algorithm 2")
    pipe, all_prompts, reward_fn = prepare(config)
    lora = add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    run = start_run(config, pipe, all_prompts, reward_fn, lora=nn.ParameterList(lora),
                    optimizer=optimizer, scaler=scaler)
    plan_evaluation(run)

    # 1. Sample M images from p_pre, once, and score them
    images, prompt_index, reward = sample_data(run)
    cond = encode_prompts(pipe, all_prompts)
    uncond = encode_prompts(pipe, [""])
    pipe.scheduler.set_timesteps(config.steps, device=pipe.device)

    while not finished(run.log, config):
        epoch = len(run.log) + 1
        start_time = time.time()
        rng = generator(config.seed, config.epochs + epoch, 0)  # data: 1 to config.epochs

        # 2. Update: one optimiser step per n images, each noised to a random t > 1
        infos, grad_norms = [], []
        local_pairs = config.updates_per_epoch * config.update_batch // WORLD_SIZE
        with tqdm(total=local_pairs, desc="updates", leave=False, disable=RANK > 0) as bar:
            for pairs in choose_pairs(len(images), config.steps - 1, config, rng):
                noises = torch.randn(len(pairs), *images.shape[1:], generator=rng)[RANK::WORLD_SIZE]
                chunks = pairs[RANK::WORLD_SIZE].split(config.batch)
                for chunk, noise in zip(chunks, noises.split(config.batch)):
                    i, k = chunk.unbind(1)  # indices of images and of steps, (B,)
                    x_0, t = images[i].to(pipe.device), pipe.scheduler.timesteps[k]
                    x_t = pipe.scheduler.add_noise(x_0, noise.to(pipe.device), t)  # q(x_t | x_0)
                    state = x_t, t, cond[prompt_index[i]], uncond, config.guidance
                    eps = predict_noise(pipe.unet, *state)
                    mean, sigma = step_distribution(pipe.scheduler, eps, t, x_t, config.eta)
                    with torch.no_grad(), pretrained(pipe.unet):
                        eps_pre = predict_noise(pipe.unet, *state)
                        mean_pre, _ = step_distribution(pipe.scheduler, eps_pre, t, x_t, config.eta)
                    f_theta = predict_x0(pipe.scheduler, eps, t, x_t)
                    f_pre = None if config.kl_d else predict_x0(pipe.scheduler, eps_pre, t, x_t)
                    loss, info = supervised_loss(
                        f_theta, x_0, reward[i].to(pipe.device), sigma, config.gamma, f_pre)
                    info["kl"] = kl_divergence(mean.detach(), mean_pre, sigma).mean()
                    share = len(chunk) / len(pairs)  # of the update's pairs
                    scaler.scale(loss * share).backward()
                    infos.append({"update": len(grad_norms), "pairs": len(chunk), **info})
                    bar.update(len(chunk))
                grad_norms.append(optimizer_step(lora, optimizer, scaler, config))

        # 3. Log and save
        row = {"epoch": epoch, "reward_queries": len(images), "reward_mean": reward.mean().item(),
               "reward_std": reward.std(correction=0).item(),
               **summary(infos, grad_norms, start_time)}
        end_epoch(run, row)
    evaluate(run)
    end_run(run)
    return run.folder

def sample_data(run: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Sample and score as many images of p_pre as Algorithm 1 does, or take those that data/ keeps
    -> x_0 (M, 4, H, W), the number of the prompt (M,), reward (M,)."""
    config, epochs = run.config, []
    N = config.samples_per_epoch
    with tqdm(total=config.epochs, desc="data", leave=False, disable=RANK > 0) as bar:
        for epoch in range(1, config.epochs + 1):
            file = run.folder / "data" / f"epoch_{epoch:04d}.pt"
            if file.exists():
                epochs.append(torch.load(file, weights_only=True))
            else:
                rng = generator(config.seed, epoch, N)
                prompt_index = torch.randint(len(run.prompts), (N,), generator=rng)  # z ~ p(z)
                prompts = [run.prompts[j] for j in prompt_index[RANK::WORLD_SIZE]]
                generators = [generator(config.seed, epoch, i) for i in range(RANK, N, WORLD_SIZE)]
                with pretrained(run.pipe.unet):
                    rollout = sample(run.pipe, prompts, config, generators)
                x_0 = gather(rollout.latents[:, -1].contiguous()).cpu()
                epochs.append((x_0, prompt_index, gather(run.reward_fn(rollout.images, prompts))))
                if RANK == 0:
                    file.parent.mkdir(exist_ok=True)
                    with rewards.replacing(file) as new_file:
                        torch.save(epochs[-1], new_file)
            bar.update(1)
    x_0, prompt_index, reward = zip(*epochs)
    return torch.cat(x_0), torch.cat(prompt_index), torch.cat(reward)


# ========== the paper ends here
def optimizer_step(lora: list, optimizer, scaler, config: Config) -> float:
    """Sum and clip the gradient, make a step -> the norm before clipping. Raises ValueError."""
    if WORLD_SIZE > 1:
        for parameter in lora:
            dist.all_reduce(parameter.grad)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(lora, config.max_grad_norm).item()
    if not math.isfinite(norm) and scaler.get_scale() <= 1:  # fp32, or fp16's lowest scale
        raise ValueError(f"the norm of the gradient is {norm}; try an lr below {config.lr:g}")
    scaler.step(optimizer)  # no step if fp16 has overflowed
    scaler.update()
    optimizer.zero_grad()
    return norm

@torch.no_grad()
def kl_to_pretrained(pipe, rollout: Rollout, config: Config, rng: torch.Generator) -> float:
    """Estimate the mean KL per step to the pre-trained policy. Raises ValueError if not finite."""
    N, K = len(rollout.prompts) * WORLD_SIZE, config.steps
    step_index = torch.randperm(K * math.ceil(N / K), generator=rng) % K  # each equally often
    sample_index = torch.arange(len(step_index)) % N // WORLD_SIZE  # within its process
    pairs = torch.stack([sample_index, step_index], 1)
    total = torch.zeros(1, device=pipe.device)
    for chunk in pairs[RANK::WORLD_SIZE].to(pipe.device).split(config.batch):
        i, k = chunk.unbind(1)
        state = rollout.latents[i, k], rollout.timesteps[k], rollout.cond[i], rollout.uncond
        mean, sigma = policy(pipe, *state, config)
        with pretrained(pipe.unet):
            mean_pre, _ = policy(pipe, *state, config)
        total += kl_divergence(mean, mean_pre, sigma).sum()
    kl = gather(total).sum().item() / len(pairs)
    if not math.isfinite(kl):
        raise ValueError(f"the KL to the pre-trained model is {kl}; try an lr below {config.lr:g}")
    return kl

# ---------- LoRA: W x + B A x in the attention layers (arXiv:2106.09685)
class LoRAAttnProcessor(nn.Module):
    """A diffusers attention processor: to_q, to_k, to_v and to_out[0] yield W x + B A x. A (rank,
    in) is at first Gaussian, as in the authors' code, and B (out, rank) zero. Both are float32."""

    def __init__(self, attn, rank: int, generator: torch.Generator | None = None):
        super().__init__()
        self.enabled = True
        self.cast = {}  # "A.to_q" and so on: A and B in the UNet's precision, set by cast_lora
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        layers = {"to_q": attn.to_q, "to_k": attn.to_k, "to_v": attn.to_v, "to_out": attn.to_out[0]}
        for name, layer in layers.items():
            A = torch.randn(rank, layer.in_features, generator=generator) / rank
            self.A[name] = nn.Parameter(A.to(layer.weight.device))
            self.B[name] = nn.Parameter(self.A[name].new_zeros(layer.out_features, rank))

    def project(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # addmm_ takes only matrices
        y = layer(rows)
        if self.enabled:
            A, B = self.cast["A." + name], self.cast["B." + name]
            y.addmm_(rows @ A.mT, B.mT)  # y += B A x, with no kernel for the sum
        return y.unflatten(0, x.shape[:2])

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q = self.project("to_q", attn.to_q, x)
        k = self.project("to_k", attn.to_k, context)
        v = self.project("to_v", attn.to_v, context)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.project("to_out", attn.to_out[0], x)

def add_lora(unet: nn.Module, rank: int, generator: torch.Generator | None = None) -> list:
    """Freeze the UNet and give each attention layer fresh LoRA -> LoRA's parameters."""
    unet.requires_grad_(False)
    processors = {}
    for name in unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = LoRAAttnProcessor(attn, rank, generator)
    unet.register_forward_pre_hook(partial(cast_lora, nn.ModuleList(processors.values())))
    unet.set_attn_processor(processors)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]

def cast_lora(processors: nn.ModuleList, unet: nn.Module, inputs: tuple):
    """Before each UNet call, as its hook: cast all A and B as one tensor, to launch few kernels."""
    if not processors[0].enabled:  # `pretrained` switches all of them
        return
    weights = list(processors.parameters())
    flat = torch.cat([weight.flatten() for weight in weights]).to(unet.conv_in.weight.dtype)
    copies = iter(flat.split([weight.numel() for weight in weights]))
    for processor in processors:
        processor.cast = {name: next(copies).view_as(w) for name, w in processor.named_parameters()}

@contextmanager
def pretrained(unet: nn.Module):
    """Switch LoRA off inside this context, so that the policy is the pre-trained one."""
    try:
        for processor in unet.attn_processors.values():
            processor.enabled = False
        yield
    finally:
        for processor in unet.attn_processors.values():
            processor.enabled = True

def save_lora(unet: nn.Module, folder: Path):
    """Write LoRA in diffusers' own format. Raises ValueError."""
    weights = {}
    for name, processor in unet.attn_processors.items():
        for layer in processor.A:
            key = name.replace("processor", "to_out.0" if layer == "to_out" else layer)
            weights[f"{key}.lora_A.weight"] = processor.A[layer].detach().cpu()
            weights[f"{key}.lora_B.weight"] = processor.B[layer].detach().cpu()
    with rewards.replacing(folder / "pytorch_lora_weights.safetensors") as file:
        diffusers.StableDiffusionPipeline.save_lora_weights(folder, weights, weight_name=file.name)

# ---------- prompts and model
PROMPTS = {"color": ["A green colored rabbit"], "count": ["Four wolves in the park"],
           "composition": ["A cat and a dog"], "location": ["A dog on the moon"],
           "roses": ["Four roses"]}
UNSEEN = {"color": ["A green colored cat"], "count": ["Four birds in the park"],
          "composition": ["A cat and a cup"], "location": ["A lion on the moon"]}  # Fig. 10

def load_prompts(name: str) -> list[str]:
    """Get a set of PROMPTS, the lines of a text file, or a phrase. Raises ValueError."""
    if name in PROMPTS:
        return PROMPTS[name]
    if file := rewards.resolve_path(name):
        with rewards.user_error(f"cannot read prompts {name!r}", "give a UTF-8 text file"):
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        if not "".join(lines).strip():
            raise ValueError(f"prompts {name!r}: the file is empty; write one prompt per line")
        return [line.strip() for line in lines if line.strip()]
    if " " in name.strip() and "/" not in name and not name.endswith(".txt"):
        return [" ".join(name.split())]
    raise ValueError(f"unknown prompts {name!r}: no such file; expected {', '.join(PROMPTS)}, a "
                     "text file, or a quoted phrase of several words")

def load_pipeline(config: Config):
    """Load Stable Diffusion, frozen, with DDIM -> StableDiffusionPipeline. Raises ValueError."""
    on_cuda = config.device.startswith("cuda")
    half = config.precision == "fp16" or (config.precision == "auto" and on_cuda)
    source = rewards.resolve_path(config.model) or config.model
    files = Path(source).glob("*/*.fp16.safetensors")
    only_fp16 = any(not file.with_name(file.name.replace(".fp16", "")).exists() for file in files)
    with rewards.user_error(f"cannot load model {config.model!r}",
                            "give a hub id or folder of Stable Diffusion 1.x with safetensors; "
                            "from_single_file(FILE).save_pretrained(FOLDER) makes one of a file"):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            str(source), dtype=torch.float16 if half else torch.float32, use_safetensors=True,
            variant="fp16" if only_fp16 else None, safety_checker=None,
            requires_safety_checker=False).to(config.device)
        schedule, size = pipe.scheduler.config, pipe.unet.config.sample_size
        if schedule.prediction_type != "epsilon" or schedule.num_train_timesteps != 1000:
            raise ValueError("it does not predict epsilon at 1000 timesteps")
        if not isinstance(size, int):
            raise ValueError(f"the sample_size of its UNet is {size}, not the side of a square")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        schedule, clip_sample=False, thresholding=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="leading")  # set_alpha_to_one=False: the last sigma is above 0
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(config.device)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    if on_cuda:
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        pipe.unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.compile:
        pipe.unet.compile()
    return pipe

def encode_prompts(pipe, prompts: list) -> Tensor:
    """Embed n prompts -> (n, L, E)."""
    return pipe.encode_prompt(prompts, device=pipe.device, num_images_per_prompt=1,
                              do_classifier_free_guidance=False)[0]

def decode(pipe, x_0: Tensor) -> list:
    """Decode latents (B, 4, H, W) -> B PIL images. Raises ValueError for non-finite numbers."""
    vae = pipe.vae
    pixels = vae.decode(x_0.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    if not pixels.isfinite().all():  # they would be black images
        raise ValueError(f"the images in {vae.dtype} have infinite or NaN values; use "
                         "--precision fp32 or, if it happens during training, a lower --lr")
    return pipe.image_processor.postprocess(pixels)

# ---------- a run: --resume reads config.json and checkpoint.pt, and repeats the epoch cut off
LEFTOVERS = {"config.json", "prompts.txt", "samples", "data", "tensorboard", "evaluation.json"}
CHANGEABLE = ("epochs", "lr", "batch", "device", "precision", "sample_every", "max_kl", "kl_weight")

def prepare(config: Config):
    """Check the settings and load what they name -> pipe, prompts, reward. Raises ValueError."""
    check_settings(config)
    read_checkpoint(config)  # refuses a wrong --resume or --out before anything is loaded
    kept = Path(config.resume, "prompts.txt")  # a run keeps its prompts if their file changes
    prompts = load_prompts(str(kept) if config.resume and kept.exists() else config.prompts)
    with rewards.user_error(f"device {config.device!r} is not available", "use cpu"):
        if WORLD_SIZE > 1 and config.device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=config.device).item()
    if WORLD_SIZE > 1:
        dist.init_process_group(timeout=timedelta(days=1))  # others wait for process 0's pictures
    options = dict(option.split("=", 1) for option in config.reward_options)
    reward_fn = rewards.load(config.reward, **{"device": config.device, **options})
    return load_pipeline(config), prompts, reward_fn

def check_settings(config: Config):
    """Check settings, whether they come from flags, a file or Python. Raises ValueError."""
    settings = dataclasses.asdict(config)
    with rewards.user_error("cannot use reward_options", "give them in the form KEY=VALUE"):
        dict(option.split("=", 1) for option in settings.pop("reward_options"))
    flags = [f"--{name}={value}" for name, value in settings.items()]
    parsed = Parser(type(config)).parse_args(flags)  # refuses wrong types and choices
    for name, value in settings.items():
        lowest = "at least 0" if name in config.zero_allowed else "above 0"
        highest = {"eta": 1, "steps": 500}.get(name, 2**31)
        is_zero = value == 0 and lowest == "at least 0"
        if type(value) in (int, float) and not (0 < value <= highest or is_zero):
            raise ValueError(f"{name} ({value}) must be {lowest} and at most {highest}")
        if value != getattr(parsed, name):
            raise ValueError(f"{name} ({value!r}) must be written {getattr(parsed, name)!r}")
    spacing = 1000 // config.steps
    if spacing * config.steps < 900:
        raise ValueError(f"steps ({config.steps}) would leave out the noisiest timesteps; use "
                         f"{1000 // (spacing + 1)} or {1000 // spacing}")
    rewards.check(config.reward)
    config.check()

def read_checkpoint(config: Config) -> dict:
    """Check --out or --resume, and read the checkpoint, {} if there is none. Raises ValueError."""
    folder = Path(config.resume or config.out)
    found = {path.name for path in folder.glob("*") if path.suffix != ".part"}  # .part: unfinished
    of_failed_run = {"config.json", "samples"} <= found <= LEFTOVERS  # it had no checkpoint yet
    blocked = any(path.is_file() for path in [folder, *folder.parents])
    if config.out and not config.resume and (blocked or found and not of_failed_run):
        raise ValueError(f"out {config.out!r} is not an empty folder; name a new one")
    if not config.resume:
        return {}
    if "checkpoint.pt" not in found and found & {"log.csv", "lora"}:  # without these: from epoch 1
        raise ValueError(f"cannot resume from {config.resume!r}: it has no checkpoint.pt")
    with rewards.user_error(f"cannot resume from {config.resume!r}", "start a new run"):
        saved = {"settings": json.loads((folder / "config.json").read_text("utf-8-sig"))}
        if "checkpoint.pt" in found:
            saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        for name, value in vars(type(config)(**saved["settings"])).items():  # with defaults
            fixed = name not in CHANGEABLE or (name == "epochs" and config.algo == "sft")  # DPOK's
            if fixed and name != "resume" and getattr(config, name) != value:
                raise ValueError(f"{name} was {value!r}, which cannot change within a run")
    return saved

def start_run(config: Config, pipe, prompts: list, reward_fn, **parts) -> SimpleNamespace:
    """Try a UNet call, load the checkpoint, make the folder -> the run. Raises ValueError."""
    with rewards.user_error(f"cannot train model {config.model!r}",
                            "use Stable Diffusion 1.x, a lower --batch, --gradient_checkpointing"):
        size = pipe.unet.config.sample_size
        x_t = torch.zeros(config.batch, 4, size, size, device=pipe.device)
        t = torch.zeros(config.batch, device=pipe.device)
        cond = encode_prompts(pipe, [""] * config.batch)
        predict_noise(pipe.unet, x_t, t, cond, cond[:1], config.guidance).sum().backward()
        pipe.unet.zero_grad()
    saved = read_checkpoint(config)
    with rewards.user_error(f"cannot resume from {config.resume!r}", "start a new run"):
        for name, part in parts.items():
            if saved.get(name):  # GradScaler has no state in fp32
                part.load_state_dict(saved[name])
    parts["optimizer"].param_groups[0]["lr"] = config.lr  # not the checkpoint's: it may change
    gather(torch.zeros(1))  # a barrier: every process has now checked and loaded all
    run_name = f"{Path(config.script).stem}-{config.reward.rpartition(':')[2]}"
    folder = [config.resume or config.out or f"runs/{run_name}-{datetime.now():%Y%m%d-%H%M%S-%f}"]
    if config.out and RANK == 0:  # it may have files of a failed run
        for file in [*Path(config.out).glob("*/epoch_*.p*"), Path(config.out, "evaluation.json")]:
            file.unlink(missing_ok=True)
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(folder)  # that of process 0
    folder = Path(folder[0])
    run = SimpleNamespace(config=config, folder=folder, pipe=pipe, prompts=prompts, parts=parts,
                          reward_fn=reward_fn, log=saved.get("log", []), tensorboard=None)
    if RANK > 0:
        return run
    with rewards.user_error(f"cannot make {str(folder)!r}", "choose another --out"):
        (folder / "samples").mkdir(parents=True, exist_ok=bool(config.out or config.resume))
    with rewards.replacing(folder / "prompts.txt") as new_file:
        new_file.write_text("\n".join(prompts), encoding="utf-8")
    settings = dataclasses.asdict(config) | {"out": "", "resume": ""}
    with rewards.replacing(folder / "config.json") as new_file:
        new_file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    try:
        from torch.utils.tensorboard import SummaryWriter
        run.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=len(run.log))
    except Exception as error:  # it is not installed, or the installation is broken
        print(f"no curves for TensorBoard: {error}")
    print(f"{folder}: starts at epoch {len(run.log) + 1} of {config.epochs}", flush=True)
    if run.log:
        save_run(run)  # a kill may have come between the checkpoint and the rest
    else:
        save_pictures(run)
    return run

def finished(log: list, config: Config) -> bool:
    """Whether all epochs are done, or five epochs' mean KL (missing ones 0) is above `max_kl`."""
    return len(log) >= config.epochs or 0 < config.max_kl < sum(row["kl"] for row in log[-5:]) / 5

def summary(infos: list, grad_norms: list, start_time: float) -> dict:
    """Average the infos of an epoch, add gradient norms, time and memory -> a row of log.csv."""
    columns = {}
    for name in infos[0]:
        columns[name] = gather(torch.tensor([float(info[name]) for info in infos]))
    before_first_update = columns.pop("update") == 0
    pairs = columns.pop("pairs")
    row = {name: ((values * pairs).sum() / pairs.sum()).item() for name, values in columns.items()}
    if "ratio_deviation" in row:  # its largest before the first update: should be 0
        row["ratio_deviation"] = columns["ratio_deviation"][before_first_update].max().item()
    finite_norms = [norm for norm in grad_norms if math.isfinite(norm)]
    return row | {"grad_norm": sum(finite_norms) / max(len(finite_norms), 1),
                  "skipped": len(grad_norms) - len(finite_norms),
                  "seconds": time.time() - start_time,
                  "gpu_gb": torch.cuda.max_memory_allocated() / 1e9}

def end_epoch(run: SimpleNamespace, row: dict):
    """Log an epoch; process 0 prints it, makes pictures where they are due, and saves the run."""
    run.log.append(row)
    if RANK > 0:
        return
    epoch, epochs = row["epoch"], run.config.epochs
    columns = [f"{name} {value:.4g}" for name, value in row.items()
               if name != "epoch" and (value or name not in ("skipped", "gpu_gb"))]
    time_left = timedelta(seconds=round(row["seconds"] * (epochs - epoch)))
    print(f"epoch {epoch}/{epochs}", *columns, f"{time_left} left", sep="  ", flush=True)
    if finished(run.log, run.config) or epoch % run.config.sample_every == 0:
        save_pictures(run)
    save_run(run)

def save_run(run: SimpleNamespace):
    """Write checkpoint.pt (parts, settings, log), then log.csv, LoRA, curves. Raises ValueError."""
    epoch, folder = len(run.log), run.folder
    saved = {name: part.state_dict() for name, part in run.parts.items()}
    saved["settings"] = dataclasses.asdict(run.config) | {"out": "", "resume": ""}
    with rewards.replacing(folder / "checkpoint.pt") as new_file:
        torch.save(saved | {"log": run.log}, new_file)
    with rewards.replacing(folder / "log.csv") as new_file:
        with open(new_file, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, run.log[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(run.log)
    save_lora(run.pipe.unet, folder / "lora")
    if Path(folder, "samples", f"epoch_{epoch:04d}.png").exists():  # then the LoRA is kept too
        save_lora(run.pipe.unet, folder / "lora" / f"epoch_{epoch:04d}")
    if run.tensorboard:
        for name, value in run.log[-1].items():
            run.tensorboard.add_scalar(name, value, epoch)

def save_pictures(run: SimpleNamespace):
    """Write samples/epoch_NNNN.png: 16 images of fixed prompts, from noise that no epoch uses."""
    epoch = len(run.log)
    prompts = [run.prompts[i % len(run.prompts)] for i in range(16)]
    generators = [generator(run.config.seed, 0, i) for i in range(16)]
    images = sample(run.pipe, prompts, run.config, generators, "pictures").images
    tiles = []
    for image, prompt, reward in zip(images, prompts, run.reward_fn(images, prompts).tolist()):
        width = 32 if prompt.isascii() else 16  # characters per line
        text = textwrap.fill(prompt, width, max_lines=2, placeholder=" ...")
        caption = f"epoch {epoch}: {reward:.3f}\n{text}"
        tile = ImageOps.expand(image.resize((256, 256), Image.BOX), (4, 4, 4, 60), "white")
        ImageDraw.Draw(tile).text((4, 262), caption, "black", rewards.caption_font(prompt))
        tiles.append(tile)
    with rewards.replacing(run.folder / "samples" / f"epoch_{epoch:04d}.png") as new_file:
        make_image_grid(tiles, 4, 4).save(new_file, "PNG")

def end_run(run: SimpleNamespace):
    """Make comparison.png, progress.png and progress.gif of at most eight of the pictures."""
    if RANK > 0:
        return
    files = sorted(run.folder.glob("samples/epoch_*.png"))
    with rewards.user_error(f"cannot write to {str(run.folder)!r}", "continue with --resume"):
        chosen = sorted({i * (len(files) - 1) // 7 for i in range(8)})
        grids = [Image.open(files[i]) for i in chosen]
        make_image_grid([grids[0], grids[-1]], 1, 2).save(run.folder / "comparison.png")
        strips = [grid.crop((0, 0, grid.width, grid.height // 4)) for grid in grids]
        make_image_grid(strips, len(strips), 1).save(run.folder / "progress.png")
        first, *others = [grid.reduce(2) for grid in grids]
        gif = run.folder / "progress.gif"
        first.save(gif, save_all=True, append_images=others, duration=500, loop=0)
    print(f"{run.folder}: progress.png shows what has changed, log.csv how")

def plan_evaluation(run: SimpleNamespace):
    """List in evaluation.json the prompts to evaluate at the end. Raises ValueError."""
    config, file = run.config, run.folder / "evaluation.json"
    if RANK > 0 or config.evaluation_images == 0 or (config.resume and file.exists()):
        return
    unseen = load_prompts(config.unseen) if config.unseen else UNSEEN.get(config.prompts, [])
    trained = set(run.prompts)
    prompts = dict.fromkeys(run.prompts + unseen)
    table = [{"prompt": prompt, "trained": prompt in trained} for prompt in prompts]
    with rewards.replacing(file) as new_file:
        new_file.write_text(json.dumps(table, indent=2), encoding="utf-8")
    print(f"evaluation at the end: {2 * len(table) * config.evaluation_images} images of "
          f"{len(table)} prompts; --evaluation_images 0 skips it")

def evaluate(run: SimpleNamespace):
    """Compare the rewards of both models from the same seeds (Fig. 3): mean and standard error for
    each prompt, in evaluation.json, which keeps those that are finished."""
    file, n = run.folder / "evaluation.json", run.config.evaluation_images
    if RANK > 0 or n == 0:
        return
    table = json.loads(file.read_text(encoding="utf-8"))
    unfinished = [row for row in table if row.get("epoch") != len(run.log)]
    with tqdm(total=len(unfinished), desc="evaluation", leave=False) as bar:
        for row in unfinished:
            prompts = [row["prompt"]] * n
            models = {"pretrained": pretrained(run.pipe.unet), "tuned": nullcontext()}
            for name, context in models.items():
                generators = [generator(run.config.seed, 0, i) for i in range(n)]
                with context:
                    images = sample(run.pipe, prompts, run.config, generators, name).images
                reward = run.reward_fn(images, prompts)
                mean, error = reward.mean().item(), reward.std().item() / n**0.5
                row[name] = {"mean": mean, "standard_error": error}
                tqdm.write(f"{row['prompt']}, {name}: reward {mean:.3f} +- {error:.3f}")
            row |= {"images": n, "epoch": len(run.log)}
            with rewards.replacing(file) as new_file:
                new_file.write_text(json.dumps(table, indent=2), encoding="utf-8")
            bar.update(1)

# ---------- several processes, and the command line
def gather(rows: Tensor) -> Tensor:
    """Collect the rows of all processes, (n, ...) each, interleaved -> (WORLD_SIZE n, ...)."""
    if WORLD_SIZE == 1:
        return rows
    collected = [torch.empty_like(rows) for _ in range(WORLD_SIZE)]
    dist.all_gather(collected, rows)
    return torch.stack(collected, 1).flatten(0, 1)

class Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(message)

def parse(argv: list | None = None, config_class=Config) -> Config:
    """Read the settings. Later ones win: the defaults, shapes/*.json for a new run on shapes/, the
    config.json of the run to --resume, the file of --config, flags. Raises ValueError."""
    parser = Parser(config_class, prog=config_class.script, usage="%(prog)s [--SETTING VALUE ...]",
                    description="paper: the published value; code: that of the authors' code",
                    formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="JSON file of settings, such as a run's config.json")
    parser.set_defaults(**{field.name: None for field in dataclasses.fields(config_class)})
    flags = vars(parser.parse_args(argv))
    flags = {name: value for name, value in flags.items() if value is not None}  # those given
    settings = {}
    if resume := flags.get("resume"):
        if not Path(resume, "config.json").exists():
            raise ValueError(f"cannot resume from {resume!r}: it has no config.json")
        settings = read_settings(Path(resume, "config.json"))
    if file := flags.pop("config", None):
        settings |= read_settings(file)
    settings |= flags
    on_cuda = str(settings.get("device", config_class.device)).startswith("cuda")
    if "model" not in settings and not on_cuda:
        print(f"no model named, not on CUDA: training shapes/ by {config_class.shapes_settings}")
        settings["model"] = "shapes"
    root = Path(__file__).resolve().parent
    model = rewards.resolve_path(str(settings.get("model", config_class.model)))
    if not resume and model and model.resolve() == root / "shapes":
        settings = read_settings(root / config_class.shapes_settings) | settings
    with rewards.user_error("cannot use the settings", "see --help for their names"):
        return config_class(**settings)

def read_settings(file: str | Path) -> dict:
    """Read a JSON file of settings. Raises ValueError."""
    with rewards.user_error(f"cannot use settings file {str(file)!r}", "give a run's config.json"):
        return {**json.loads(Path(file).read_text(encoding="utf-8-sig"))}

def main(argv: list | None = None, config_class=Config, train=train) -> int:
    """Run the script -> exit status: 0; 2 for what the user can correct; 130 after Ctrl-C."""
    try:
        train(parse(argv, config_class))
        return 0
    except SystemExit as stop:  # after --help
        return stop.code
    except (ValueError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        reason = " ".join(str(error).split()) or "interrupted"
        print(f"{config_class.script}: error: {reason}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that lack a character
    sys.exit(main())
