"""DDPO: Training Diffusion Models with Reinforcement Learning (Black et al., ICLR 2024).

Section 4.3 of the paper (arXiv:2305.13301v4) makes denoising a Markov decision process: the state
is (c, t, x_t), the action is x_{t-1}, the policy is p_theta(x_{t-1} | x_t, c), and the reward
r(x_0, c) comes at the end. `--algo sf` is the score-function estimator (DDPO_SF), and `--algo is`
is the importance-sampled estimator (DDPO_IS) with PPO's clip.

    python ddpo.py --reward jpeg  # Stable Diffusion v1.4 on a CUDA GPU; without one, shapes/
    python ddpo.py --help         # every setting with its published value

Differences from the paper:
1. LoRA is trained, as in appendix C, and not the whole UNet, so that one GPU is enough.
2. log p is the mean over the latent, not the sum, as in the authors' code; see `log_prob`.
3. The loss is the mean over the K steps. Adam cancels the factor 1/K; the gradient's clip does not.
4. The sampler, which the paper does not name, is that of the authors' code: DDIM with eta = 1.
5. As in that code, advantages are clipped to +-5, and a prompt's own statistics need 16 rewards.
6. The paper prints (DDPO_IS) as exact. With one ratio per step it is so only at theta_old.
7. Added: a KL penalty, early stopping by the KL, and weights of the steps (on for shapes/).
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
from contextlib import contextmanager
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
    """The settings. They are ddpo-pytorch's for JPEG, except for the prompts and buffer_size."""
    model: str = setting("CompVis/stable-diffusion-v1-4", "Stable Diffusion 1.x: hub id or folder")
    reward: str = setting("jpeg", f"{', '.join(rewards.REWARDS)}, or FILE.py:FUNCTION")
    reward_options: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "options of the reward, KEY=VALUE (default: none)"})
    prompts: str = setting("animals", "animals, activities, counting, a text file, or a phrase")
    algo: Literal["is", "sf"] = setting("is", "estimator: DDPO_IS (is) or DDPO_SF (sf)")
    epochs: int = setting(100, "number of epochs; code: 100 for JPEG rewards, 200 for the others")
    samples_per_epoch: int = setting(256, "images sampled per epoch; paper: 256")
    updates_per_epoch: int | None = setting(None, "optimiser steps; paper: as here", "4, for sf 1")
    batch: int = setting(4, "samples or pairs per UNet call; guidance doubles the rows")
    steps: int = setting(50, "denoising steps; paper: 50")
    guidance: float = setting(5.0, "weight w of classifier-free guidance, 1 for none; paper: 5")
    eta: float = setting(1.0, "noise of DDIM, above 0 and at most 1; code: 1")
    lr: float = setting(3e-4, "learning rate of AdamW; paper, C: 3e-4; without LoRA: 1e-5")
    weight_decay: float = setting(1e-4, "weight decay of AdamW; paper: 1e-4")
    max_grad_norm: float = setting(1.0, "norm to which the gradient is clipped; paper: 1")
    clip_range: float = setting(1e-4, "clip range of the ratio, see log_prob; paper: 1e-4")
    advantage_clip: float = setting(5.0, "clip range of the advantage; code: 5; paper: none")
    buffer_size: int = setting(32, "rewards remembered per prompt; code: 32, for JPEG rewards 16")
    min_count: int = setting(16, "rewards before a prompt's own statistics are used; code: 16")
    noise_aware: bool = setting(False, "weight the steps by sigma, for less noise; paper: no")
    kl_weight: float = setting(0.0, "weight of the KL to the pre-trained model; paper: none")
    max_kl: float = setting(0.0, "stop when the mean KL of five epochs is above this, 0 for never")
    rank: int = setting(4, "rank of LoRA; code: 4")
    seed: int = setting(0, "random seed of LoRA, prompts and noise")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda, mps or cpu")
    precision: Literal["auto", "fp16", "fp32"] = setting("auto", "auto: fp16 on CUDA, else fp32")
    gradient_checkpointing: bool = setting(False, "save memory at the cost of time")
    compile: bool = setting(False, "compile the UNet with torch.compile, which takes minutes")
    sample_every: int = setting(10, "epochs between pictures; the LoRA of each is kept")
    out: str = setting("", "folder of the run", "a new one in runs/")
    resume: str = setting("", "folder of a run to continue", "none")

    script = "ddpo.py"  # these three have no annotation, so they are no settings
    shapes_settings = "shapes/ddpo.json"
    zero_allowed = ("weight_decay", "kl_weight", "max_kl", "seed")

    def __post_init__(self):
        self.out, self.resume = str(self.out), str(self.resume)
        if self.updates_per_epoch is None:
            self.updates_per_epoch = 1 if self.algo == "sf" else 4

    def check(self):
        """Check settings that depend on each other. Raises ValueError."""
        if self.algo == "sf" and self.updates_per_epoch > 1:
            raise ValueError(f"updates_per_epoch ({self.updates_per_epoch}) must be 1 for algo sf")
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count ({self.min_count}) must be at most buffer_size")
        if self.samples_per_epoch % (WORLD_SIZE * self.updates_per_epoch):
            raise ValueError(f"samples_per_epoch ({self.samples_per_epoch}) must be divisible by "
                             f"updates_per_epoch times the number of processes ({WORLD_SIZE})")

# ---------- the MDP: one denoising step is a Gaussian (section 4.3)
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

class PromptStatistics:
    """Standardise rewards per prompt, in place of a value function (D.3): by the prompt's last
    `buffer_size` rewards or, while it has fewer than `min_count`, by those of the epoch."""

    def __init__(self, buffer_size: int, min_count: int):
        self.buffer_size, self.min_count = buffer_size, min_count
        self.rewards = {}  # prompt: its last rewards

    def update(self, prompts: list, reward: Tensor) -> Tensor:
        """Remember N rewards and standardise them: prompts (N), reward (N,) -> advantages (N,)."""
        reward = reward.double()  # so that equal rewards give 0, not a rounding error / 1e-6
        for prompt, r in zip(prompts, reward.tolist()):
            self.rewards.setdefault(prompt, []).append(r)
            del self.rewards[prompt][:-self.buffer_size]
        advantages = torch.empty_like(reward)
        for i, prompt in enumerate(prompts):
            reference = torch.tensor(self.rewards[prompt], dtype=torch.double)
            if len(reference) < self.min_count:
                reference = reward
            advantages[i] = (reward[i] - reference.mean()) / (reference.std(correction=0) + 1e-6)
        return advantages.float()

    def state_dict(self) -> dict:
        return self.rewards

    def load_state_dict(self, rewards: dict):
        self.rewards = rewards

# ---------- losses at B pairs (i, k) of a sample and a step; inputs are (B,)
def score_function_loss(log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict]:
    """Compute the loss of (DDPO_SF), with the advantage in place of r:
    grad J = E[ sum_t grad log p_theta(x_{t-1} | x_t, c) r(x_0, c) ]."""
    return -(advantage * log_prob).mean(), {}

def importance_sampling_loss(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor,
                             clip_range: float) -> tuple[Tensor, dict]:
    """Compute the loss of (DDPO_IS) with PPO's clip (D.1), which maximises
    E[ min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A) ].

    `ratio`, see log_prob, is a D-th root. Where it is 1, the gradient is that of (DDPO_SF)."""
    ratio = (log_prob - log_prob_old).exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    ratio = ratio.detach()
    info = {"ratio_mean": ratio.mean(), "ratio_deviation": (ratio - 1).abs().max(),
            "clipped": (clipped > unclipped).float().mean()}  # share without gradient from A
    return torch.maximum(unclipped, clipped).mean(), info

# ---------- the algorithm: section 4.3, with the iteration of D.5
def train(config: Config) -> Path:
    """Train until `epochs` or `max_kl` is reached -> the run's folder. Raises ValueError."""
    pipe, all_prompts, reward_fn = prepare(config)
    lora = add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    statistics = PromptStatistics(config.buffer_size, config.min_count)
    run = start_run(config, pipe, all_prompts, reward_fn, lora=nn.ParameterList(lora),
                    optimizer=optimizer, scaler=scaler, statistics=statistics)
    N, K = config.samples_per_epoch, config.steps
    local = slice(RANK, N, WORLD_SIZE)  # the samples of this process

    while not finished(run.log, config):
        epoch = len(run.log) + 1
        start_time = time.time()
        rng = generator(config.seed, epoch, N)  # for prompts and the KL; samples have 0 to N - 1

        # 1. Sample: prompts c ~ p(c) and, for each, a trajectory of the policy theta_old
        prompts = [all_prompts[j] for j in torch.randint(len(all_prompts), (N,), generator=rng)]
        generators = [generator(config.seed, epoch, i) for i in range(N)]
        rollout = sample(pipe, prompts[local], config, generators[local])

        # 2. Score: the reward r(x_0, c) of each image
        reward = gather(reward_fn(rollout.images, rollout.prompts))  # (N,)

        # 3. Advantages: the rewards, standardised per prompt (D.3)
        advantage = statistics.update(prompts, reward)[local].to(pipe.device)
        advantage = advantage.clamp(-config.advantage_clip, config.advantage_clip)
        advantage = advantage[:, None].expand(-1, K)  # one for each step
        if config.noise_aware:  # not in the paper
            advantage = advantage * noise_weights(pipe.scheduler, config.eta)

        # 4. Update: one optimiser step per group of samples, at all of their steps (D.1, D.5)
        infos, grad_norms = [], []
        with tqdm(total=N // WORLD_SIZE * K, desc="updates", leave=False, disable=RANK > 0) as bar:
            for samples in torch.arange(N // WORLD_SIZE).chunk(config.updates_per_epoch):
                pairs = torch.cartesian_prod(samples, torch.arange(K)).to(pipe.device)
                for chunk in pairs.split(config.batch):
                    i, k = chunk.unbind(1)  # indices of samples and of steps, (B,)
                    x_t, x_prev = rollout.latents[i, k], rollout.latents[i, k + 1]
                    state = x_t, rollout.timesteps[k], rollout.cond[i], rollout.uncond
                    mean, sigma = policy(pipe, *state, config)
                    log_prob_new = log_prob(x_prev, mean, sigma)
                    log_prob_old = rollout.log_probs[i, k]
                    if config.algo == "sf":
                        loss, info = score_function_loss(log_prob_new, advantage[i, k])
                    else:
                        loss, info = importance_sampling_loss(
                            log_prob_new, log_prob_old, advantage[i, k], config.clip_range)
                    if config.kl_weight:
                        with torch.no_grad(), pretrained(pipe.unet):
                            mean_pre, _ = policy(pipe, *state, config)
                        loss = loss + config.kl_weight * kl_divergence(mean, mean_pre, sigma).mean()
                    share = len(chunk) / (len(pairs) * WORLD_SIZE)  # of the update's pairs
                    scaler.scale(loss * share).backward()
                    infos.append({"update": len(grad_norms), "pairs": len(chunk), **info})
                    bar.update(len(chunk))
                grad_norms.append(optimizer_step(lora, optimizer, scaler, config))

        # 5. Log and save
        kl = kl_to_pretrained(pipe, rollout, config, rng)
        row = {"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(),
               "reward_std": reward.std(correction=0).item(),
               **summary(infos, grad_norms, start_time), "kl": kl}
        del rollout  # makes room for the next
        end_epoch(run, row)
    end_run(run)
    return run.folder


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
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
    raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
    turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"""
PLURALS = {"mouse": "mice", "wolf": "wolves", "fox": "foxes", "goose": "geese", "fly": "flies",
           "butterfly": "butterflies", "sheep": "sheep", "deer": "deer", "fish": "fish"}
PROMPTS = {"animals": ANIMALS.split(), "activities": [], "counting": []}  # D.6, 5.1, appendix A
for animal in PROMPTS["animals"]:
    article = "an" if animal[0] in "aeiou" else "a"
    for activity in ("riding a bike", "playing chess", "washing dishes"):
        PROMPTS["activities"].append(f"{article} {animal} {activity}")
    for number in ("two", "three", "four", "five", "six", "seven", "eight"):
        PROMPTS["counting"].append(f"{number} {PLURALS.get(animal, animal + 's')}")

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
