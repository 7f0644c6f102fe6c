"""DDPO: Training Diffusion Models with Reinforcement Learning (Black et al., ICLR 2024, arXiv:2305.13301v4).

Section 4.3 makes denoising a Markov decision process: the state is (c, t, x_t), the action x_{t-1}, the
policy p_theta(x_{t-1} | x_t, c), and the reward r(x_0, c) comes at the end. `--algo sf` is the score-function
estimator (DDPO_SF), `--algo is` the importance-sampled one (DDPO_IS) under PPO's clip.

    python ddpo.py --reward jpeg   # Stable Diffusion v1.4 on a CUDA GPU, elsewhere the model in shapes/
    python ddpo.py --help          # every setting, with the published value

What differs from the paper, and why:
1. LoRA in the attention layers, to fit one GPU, not the whole UNet; learning rate of the authors' code.
2. log p is the mean over the latent, not the sum, as in the authors' code; see `log_prob` for the clip range.
3. The loss is a mean over the steps t, not a sum. To Adam the factor K matters only through max_grad_norm.
4. The sampler, which the paper does not name, is the authors' DDIM with eta 1, ancestral sampling.
5. As in the authors' code, advantages are clipped to +-5, and a prompt's own statistics need 16 rewards.
6. (DDPO_IS) is printed as an equality; with one ratio a step it holds only at theta = theta_old.
7. Added against over-optimisation (appendix A): `--kl_weight`, a KL penalty, and `--max_kl`, early stopping.
8. Reward-weighted regression is experiments/rwr.py, the 398 prompts experiments/imagenet_animals.txt.
"""
import dataclasses
import json
import math
import os
import re
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser

import rewards

# N samples an epoch, B in one UNet call, K denoising steps, L text tokens of width E; a latent is (4, H, W).
# t is the scheduler's timestep (981, 961, ..., 1), k the number of the step (0, 1, ..., K - 1).

SCRIPT, torchrun = Path(__file__).stem, os.environ if "LOCAL_RANK" in os.environ else {}
RANK, WORLD = int(torchrun.get("RANK", 0)), int(torchrun.get("WORLD_SIZE", 1))  # this process, and how many


def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Config:
    """Defaults: the authors' for LoRA (ddpo-pytorch, config/dgx.py), but for JPEG's prompts and buffer."""
    model: str = setting("CompVis/stable-diffusion-v1-4", "hub id or folder of Stable Diffusion 1.x")
    reward: str = setting("jpeg", "jpeg, incompressibility, aesthetic, imagereward, llava, file.py:function")
    reward_options: list[str] = dataclasses.field(default_factory=list, metadata={"help": "KEY=VALUE ..."})
    prompts: str = setting("animals", "animals, activities, counting, a text file, or a phrase")
    algo: Literal["is", "sf"] = setting("is", "DDPO_IS or DDPO_SF")
    epochs: int = setting(100, "code: 100 for JPEG, 200 for the rest")
    samples_per_epoch: int = setting(256, "images an epoch; paper: 256")
    updates_per_epoch: int | None = setting(None, "optimiser steps an epoch; paper: 4, with algo sf 1")
    batch: int = setting(4, "samples or pairs of a UNet call; guidance doubles them")
    steps: int = setting(50, "denoising steps; paper: 50")
    guidance: float = setting(5.0, "classifier-free guidance weight w, 1: none; paper: 5")
    eta: float = setting(1.0, "DDIM's noise, in (0, 1]; code: 1")
    lr: float = setting(3e-4, "AdamW's; code: 3e-4 for LoRA, paper: 1e-5 for the whole UNet")
    weight_decay: float = setting(1e-4, "AdamW's; paper: 1e-4")
    max_grad_norm: float = setting(1.0, "to which the gradient norm is clipped; paper: 1")
    clip_range: float = setting(1e-4, "of the ratio, see log_prob; paper: 1e-4")
    advantage_clip: float = setting(5.0, "to +- this; code: 5, paper: none")
    buffer_size: int = setting(32, "rewards remembered for each prompt; code: 16 for JPEG, 32 for the rest")
    min_count: int = setting(16, "rewards for a prompt's own statistics; code: 16")
    kl_weight: float = setting(0.0, "of the KL to the pre-trained model; paper: none")
    max_kl: float = setting(0.0, "stop once the KL's mean of 5 epochs is larger, 0: never; paper: by hand")
    rank: int = setting(4, "of LoRA; code: 4")
    seed: int = setting(0, "of everything random")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda, mps or cpu")
    precision: Literal["auto", "fp16", "fp32"] = setting("auto", "auto: fp16 on CUDA; bf16 drowns the ratio")
    gradient_checkpointing: bool = setting(False, "saves memory, costs time")
    compile: bool = setting(False, "torch.compile the UNet")
    sample_every: int = setting(10, "epochs between pictures")
    out: str = setting("", "folder of the run; default: a new one in runs/")
    resume: str = setting("", "folder of a run to continue")

    may_be_0 = "weight_decay", "kl_weight", "max_kl", "seed"
    divisors = {"batch": "samples_per_epoch", "updates_per_epoch": "samples_per_epoch"}

    def __post_init__(self):
        name = f"{SCRIPT}-{self.reward.rpartition(':')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.out = str(self.resume or self.out or Path("runs", name))
        if self.updates_per_epoch is None:
            self.updates_per_epoch = 1 if self.algo == "sf" else 4
        self.bounds = {"eta": (0, 1), "steps": (0, 500), "min_count": (0, self.buffer_size),  # above, at most
                       "updates_per_epoch": (0, 1 if self.algo == "sf" else 2**31)}


# ---------- the MDP: one denoising step is a Gaussian (section 4.3)

def predict_noise(unet, x_t, t, cond, uncond, guidance):
    """Classifier-free guidance (DDPO Eq. 3): w eps(x_t, t, c) + (1 - w) eps(x_t, t) -> (B, 4, H, W) float32;
    x_t (B, 4, H, W), t (B,) with a timestep for each, cond (B, L, E), uncond (1, L, E)."""
    dtype = unet.conv_in.weight.dtype
    if guidance == 1:
        return unet(x_t.to(dtype), t, cond.to(dtype)).sample.float()
    x_t, t, text = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond.expand_as(cond), cond])
    eps_uncond, eps_cond = unet(x_t.to(dtype), t, text.to(dtype)).sample.float().chunk(2)
    return eps_uncond + guidance * (eps_cond - eps_uncond)


def step_distribution(scheduler, eps, t, x_t, eta=1.0):
    """p_theta(x_{t-1} | x_t, c) = N(mean, sigma^2 I) of DDIM (arXiv:2010.02502, Eq. 12 and 16)
    -> mean (B, 4, H, W), sigma (B, 1, 1, 1); t (B,).

    sigma = eta sqrt((1 - abar_prev) / (1 - abar_t) (1 - abar_t / abar_prev))
    mean  = sqrt(abar_prev) x0_pred + sqrt(1 - abar_prev - sigma^2) eps
    """
    table = scheduler.alphas_cumprod.to(x_t.device)
    prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # at the end abar_0
    abar_t, abar_prev = table[t].view(-1, 1, 1, 1), table[prev.clamp(min=0)].view(-1, 1, 1, 1)
    x0_pred = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    sigma = eta * ((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)).sqrt()
    return abar_prev.sqrt() * x0_pred + (1 - abar_prev - sigma**2).sqrt() * eps, sigma


def policy(pipe, x_t, t, cond, uncond, config):
    """p_theta(x_{t-1} | x_t, c) at B states (x_t, t, c) -> mean (B, 4, H, W), sigma (B, 1, 1, 1)."""
    eps = predict_noise(pipe.unet, x_t, t, cond, uncond, config.guidance)
    return step_distribution(pipe.scheduler, eps, t, x_t, config.eta)


def log_prob(x_prev, mean, sigma):
    """log N(x_{t-1}; mean, sigma^2), as the mean over the D numbers of a latent -> (B,).

    The paper's density is the sum. With the mean, as in the authors' code, exp(log_prob - log_prob_old) is
    the D-th root of the true ratio: for D = 16,384 a clip range of 1e-4 is true ratios from 0.19 to 5.1.
    """
    density = -((x_prev - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def kl_divergence(mean, mean_pre, sigma):
    """KL(N(mean, sigma^2) || N(mean_pre, sigma^2)) = (mean - mean_pre)^2 / (2 sigma^2), averaged -> (B,)."""
    return ((mean - mean_pre) ** 2 / (2 * sigma**2)).flatten(1).mean(1)


@dataclasses.dataclass
class Rollout:
    """N trajectories x_T, ..., x_0 sampled by the old policy."""
    prompts: list            # N texts
    cond: torch.Tensor       # (N, L, E) c, their embeddings
    uncond: torch.Tensor     # (1, L, E) that of the empty prompt
    timesteps: torch.Tensor  # (K,) t, descending
    latents: torch.Tensor    # (N, K + 1, 4, H, W) float32: x_t is [:, k], x_{t-1} is [:, k + 1]
    log_probs: torch.Tensor  # (N, K) log p(x_{t-1} | x_t, c) under the old policy
    images: list             # N PIL images


def generator(seed, epoch, i):
    """For sample i of an epoch, whatever its batch or process; so resuming needs no random state."""
    return torch.Generator().manual_seed((seed * 2_654_435_761 + epoch * 1_000_003 + i) % 2**32)


@torch.no_grad()
def sample(pipe, prompts, config, generators):
    """Roll the policy out: x_T ~ N(0, I), K actions x_{t-1} ~ p_theta(x_{t-1} | x_t, c), then the decoder."""
    pipe.scheduler.set_timesteps(config.steps, device=pipe.device)
    N, K, size, timesteps = len(prompts), config.steps, pipe.unet.config.sample_size, pipe.scheduler.timesteps
    cond, uncond = (pipe.encode_prompt(texts, pipe.device, 1, False)[0] for texts in (prompts, [""]))
    latents = torch.empty(N, K + 1, 4, size, size, device=pipe.device)
    log_probs, images = torch.empty(N, K, device=pipe.device), []
    for first in tqdm(range(0, N, config.batch), "sampling", leave=False):
        i = slice(first, first + config.batch)  # B samples
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators[i]])
        noise = noise.to(pipe.device)  # (B, K + 1, 4, H, W)
        latents[i, 0] = noise[:, 0]  # x_T
        for k, t in enumerate(timesteps):
            mean, sigma = policy(pipe, latents[i, k], t.expand(len(noise)), cond[i], uncond, config)
            latents[i, k + 1] = mean + sigma * noise[:, k + 1]  # the action, x_{t-1}
            log_probs[i, k] = log_prob(latents[i, k + 1], mean, sigma)
        x_0 = latents[i, K].to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        images += pipe.image_processor.postprocess(pipe.vae.decode(x_0).sample.float())
    return Rollout(prompts, cond, uncond, timesteps, latents, log_probs, images)


class PromptStatistics:
    """Rewards standardised per prompt, in place of a value function (D.3), by mean and deviation of its last
    `buffer_size` rewards or, while it has fewer than `min_count`, of the whole epoch's."""

    def __init__(self, buffer_size, min_count):
        self.buffer_size, self.min_count, self.rewards = buffer_size, min_count, {}

    def update(self, prompts, reward):
        """prompts (N), reward (N,) -> advantages (N,)."""
        reward = reward.double()  # so that equal rewards give 0, not rounding / 1e-6
        for prompt, r in zip(prompts, reward.tolist()):
            self.rewards[prompt] = [*self.rewards.get(prompt, []), r][-self.buffer_size:]
        advantages = torch.empty_like(reward)
        for i, prompt in enumerate(prompts):
            own = torch.tensor(self.rewards[prompt], dtype=torch.double)
            reference = own if len(own) >= self.min_count else reward
            advantages[i] = (reward[i] - reference.mean()) / (reference.std(correction=0) + 1e-6)
        return advantages.float()

    def state_dict(self):
        return self.rewards

    def load_state_dict(self, rewards):
        self.rewards = rewards


# ---------- losses, at B pairs (i, k); inputs (B,)

def score_function_loss(log_prob, advantage):
    """(DDPO_SF): grad J = E[ sum_t grad log p_theta(x_{t-1} | x_t, c) r(x_0, c) ], the advantage for r."""
    return -(advantage * log_prob).mean(), {}


def importance_sampling_loss(log_prob, log_prob_old, advantage, clip_range):
    """(DDPO_IS) with PPO's clip (D.1): maximise E[ min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A) ].

    ratio = p_theta / p_theta_old is 1 at an epoch's first update, where the gradient is that of (DDPO_SF).
    """
    ratio = (log_prob - log_prob_old).exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    ratio = ratio.detach()
    info = {"ratio_mean": ratio.mean(), "ratio_deviation": (ratio - 1).abs().max(),
            "clipped": (clipped > unclipped).float().mean()}  # the share of pairs without a gradient
    return torch.maximum(unclipped, clipped).mean(), info


# ---------- the algorithm: section 4.3, with the iteration of D.5

def train(config):
    """Sample, score, update, to the last epoch or the bound on the KL -> run's folder. Raises ValueError."""
    pipe, all_prompts, reward_fn = prepare(config)
    lora = add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    statistics = PromptStatistics(config.buffer_size, config.min_count)
    parts = dict(lora=nn.ParameterList(lora), optimizer=optimizer, scaler=scaler, statistics=statistics)
    folder, log = start_run(pipe, all_prompts, reward_fn, config, parts)  # log: a row for each epoch
    N, K, mine = config.samples_per_epoch, config.steps, slice(RANK, None, WORLD)

    while not finished(log, config):
        epoch, started, infos, norms = len(log) + 1, time.time(), [], []
        rng = generator(config.seed, epoch, N)  # samples: 0 to N - 1
        prompts = [all_prompts[i] for i in torch.randint(len(all_prompts), (N,), generator=rng)]  # c ~ p(c)
        generators = [generator(config.seed, epoch, i) for i in range(RANK, N, WORLD)]
        rollout = sample(pipe, prompts[mine], config, generators)  # trajectories of theta_old
        reward = gather(reward_fn(rollout.images, rollout.prompts))  # r(x_0, c), (N,)
        advantage = statistics.update(prompts, reward)[mine].to(pipe.device)
        advantage.clamp_(-config.advantage_clip, config.advantage_clip)

        for samples in torch.arange(N // WORLD).chunk(config.updates_per_epoch):  # one optimiser step each
            pairs = torch.cartesian_prod(samples, torch.arange(K)).to(pipe.device)  # each at each of K steps
            for i, k in (chunk.T for chunk in pairs.split(config.batch)):  # (B,) and (B,)
                state = rollout.latents[i, k], rollout.timesteps[k], rollout.cond[i], rollout.uncond
                mean, sigma = policy(pipe, *state, config)
                new, old = log_prob(rollout.latents[i, k + 1], mean, sigma), rollout.log_probs[i, k]
                if config.algo == "sf":
                    loss, info = score_function_loss(new, advantage[i])
                else:
                    loss, info = importance_sampling_loss(new, old, advantage[i], config.clip_range)
                if config.kl_weight:
                    with torch.no_grad(), pretrained(pipe.unet):
                        mean_pre, _ = policy(pipe, *state, config)
                    loss = loss + config.kl_weight * kl_divergence(mean, mean_pre, sigma).mean()
                scaler.scale(loss * len(i) / (len(pairs) * WORLD)).backward()  # sums to the mean over pairs
                infos.append({"update": len(norms), "pairs": len(i), **info})
            norms.append(optimizer_step(lora, optimizer, scaler, config))

        log.append({"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(),
                    "reward_std": reward.std(correction=0).item(), **summary(infos, norms, started),
                    "kl": kl_to_pretrained(pipe, rollout, config, rng)})
        del rollout  # makes room for the next
        if RANK == 0:
            if finished(log, config) or epoch % config.sample_every == 0:
                draw_samples(pipe, all_prompts, reward_fn, config, folder, epoch)
            save_run(folder, log, pipe.unet, parts)
    if RANK == 0:
        draw_progress(folder)
    return folder


def optimizer_step(lora, optimizer, scaler, config):
    """AdamW on the gradient of all processes, its norm clipped -> that norm. Where fp16 overflows, GradScaler
    lowers its scale and skips the step; else a non-finite gradient raises ValueError."""
    for parameter in lora if WORLD > 1 else ():
        dist.all_reduce(parameter.grad)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(lora, config.max_grad_norm).item()
    if not math.isfinite(norm) and scaler.get_scale() <= 1:
        raise ValueError(f"the gradient is {norm}; try an lr below {config.lr:g}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def kl_to_pretrained(pipe, rollout, config, rng):
    """The KL of a step to the pre-trained policy, at states of the old one, each step equally often and the
    same pairs on several processes -> float. Raises ValueError if it is non-finite."""
    N, K, total = len(rollout.prompts) * WORLD, config.steps, torch.zeros(1, device=pipe.device)
    steps = torch.randperm(K * math.ceil(N / K), generator=rng) % K
    pairs = torch.stack([torch.arange(len(steps)) % N // WORLD, steps], 1)
    for i, k in (chunk.T for chunk in pairs[RANK::WORLD].to(pipe.device).split(config.batch)):
        state = rollout.latents[i, k], rollout.timesteps[k], rollout.cond[i], rollout.uncond
        mean, sigma = policy(pipe, *state, config)
        with pretrained(pipe.unet):
            mean_pre, _ = policy(pipe, *state, config)
        total += kl_divergence(mean, mean_pre, sigma).sum()
    kl = gather(total).sum().item() / len(pairs)
    if not math.isfinite(kl):
        raise ValueError(f"the KL is {kl}; try an lr below {config.lr:g}")
    return kl


# ========== the paper ends here
# ---------- LoRA: W x + B A x in attention layers (arXiv:2106.09685)

class LoRAAttnProcessor(nn.Module):
    """A diffusers attention processor that adds B A x to to_q, to_k, to_v and to_out[0]. A (rank, in) starts
    Gaussian and B (out, rank) zero, so that fresh LoRA changes nothing; both are float32."""

    def __init__(self, attn, rank, generator=None):
        super().__init__()
        self.enabled, self.A, self.B = True, nn.ParameterDict(), nn.ParameterDict()
        layers = dict(to_q=attn.to_q, to_k=attn.to_k, to_v=attn.to_v, to_out=attn.to_out[0])
        for name, layer in layers.items():
            A = torch.randn(rank, layer.in_features, generator=generator) / rank  # as in the authors' code
            self.A[name] = nn.Parameter(A.to(layer.weight.device))
            self.B[name] = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def project(self, name, layer, x):
        if not self.enabled:
            return layer(x)
        return layer(x) + x @ self.A[name].to(x.dtype).mT @ self.B[name].to(x.dtype).mT

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None):
        """x (B, tokens, width); Stable Diffusion has no mask."""
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q = self.project("to_q", attn.to_q, x)
        k, v = self.project("to_k", attn.to_k, context), self.project("to_v", attn.to_v, context)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.project("to_out", attn.to_out[0], x)


def add_lora(unet, rank, generator=None):
    """Freeze the UNet, give each attention layer fresh LoRA -> LoRA's parameters."""
    unet.requires_grad_(False)
    layers = {name: unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors}
    unet.set_attn_processor({name: LoRAAttnProcessor(attn, rank, generator) for name, attn in layers.items()})
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


@contextmanager
def pretrained(unet):
    """Inside this context LoRA is off: the pre-trained policy."""
    processors = unet.attn_processors.values()
    try:
        for processor in processors:
            processor.enabled = False
        yield
    finally:
        for processor in processors:
            processor.enabled = True


def save_lora(unet, folder):
    """Write LoRA in diffusers' own format, atomically."""
    weights = {re.sub(r"processor\.(.)\.(\w+)", r"\2.lora_\1.weight", name).replace("to_out.l", "to_out.0.l"):
               weight.detach().cpu() for name, weight in unet.named_parameters() if weight.requires_grad}
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, weights, weight_name="part.safetensors")
    os.replace(Path(folder, "part.safetensors"), Path(folder, "pytorch_lora_weights.safetensors"))


# ---------- a run: settings, prompts, model, folder, pictures, processes

ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox
    wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken
    duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo""".split()  # D.6
PLURALS = dict(mouse="mice", wolf="wolves", fox="foxes", goose="geese", butterfly="butterflies", fly="flies",
               sheep="sheep", deer="deer", fish="fish")
PROMPTS = {"animals": ANIMALS,
           "activities": [f"a{'n' * (animal[0] in 'aeiou')} {animal} {activity}" for animal in ANIMALS
                          for activity in ("riding a bike", "playing chess", "washing dishes")],
           "counting": [f"{n} {PLURALS.get(animal, animal + 's')}" for animal in ANIMALS
                        for n in "two three four five six seven eight".split()]}


def load_prompts(name):
    """The texts of --prompts: a known set, a text file (one a line), or one prompt of several words."""
    file, phrase = rewards.find(name), [name] * (" " in name and "/" not in name and name[-4:] != ".txt")
    with rewards.one_line(f"prompts {name!r} are no use", f"give {', '.join(PROMPTS)}, a file or a phrase"):
        lines = PROMPTS.get(name) or (file.read_text(encoding="utf-8-sig").splitlines() if file else phrase)
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError("there are none")
    return prompts


def load_pipeline(config):
    """Stable Diffusion, frozen, with DDIM, whose last sigma is above 0 (set_alpha_to_one=False)."""
    cuda = config.device.startswith("cuda")
    half = config.precision == "fp16" or config.precision == "auto" and cuda
    with rewards.one_line(f"model {config.model!r} cannot be loaded",
                          "give a hub id or folder of Stable Diffusion 1.x, in safetensors"):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            rewards.find(config.model) or config.model, dtype=torch.float16 if half else torch.float32,
            use_safetensors=True, safety_checker=None, requires_safety_checker=False).to(config.device)
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise ValueError("it does not predict epsilon")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, thresholding=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="leading")
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(config.device)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    if cuda:
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        pipe.unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.compile:
        pipe.unet.compile()
    return pipe


def prepare(config):
    """Check the settings, load what they name -> pipe, prompts, reward function. Raises ValueError."""
    for name, value in vars(config).items():
        (low, high), zero = config.bounds.get(name, (0, 2**31)), name in config.may_be_0
        if type(value) in (int, float) and not (low < value <= high or zero and value == 0):
            raise ValueError(f"{name} {value} must be {'0 or ' * zero}above {low} and at most {high}")
    for name, whole in config.divisors.items():
        a, b = getattr(config, name, 1), getattr(config, whole)
        if more := -b % (a * WORLD):
            raise ValueError(f"{name} {a} x {WORLD} processes must divide {whole} {b}; try {b + more}")
    with rewards.one_line(f"reward_options {config.reward_options} lack a =", "give KEY=VALUE ..."):
        options = dict(option.split("=", 1) for option in config.reward_options)
    if not config.resume and (Path(config.out).is_file() or any(Path(config.out).glob("*"))):
        raise ValueError(f"out {config.out!r} is not an empty folder; name a new one")
    prompts = load_prompts(config.prompts)
    with rewards.one_line(f"device {config.device!r} is unavailable", "try cpu, or fewer processes"):
        if WORLD > 1 and config.device.startswith("cuda"):
            torch.cuda.set_device(int(torchrun["LOCAL_RANK"]))
        torch.zeros(1, device=config.device).item()
    if WORLD > 1:
        dist.init_process_group(timeout=timedelta(days=1))  # while process 0 draws
    reward_fn = rewards.load(**dict(name=config.reward, device=config.device) | options)
    return load_pipeline(config), prompts, reward_fn


def start_run(pipe, prompts, reward_fn, config, parts):
    """Try a call like an update's, so that what does not fit fails now; make the run's folder, or bring
    `parts`, whatever has a state_dict, back to its checkpoint -> folder, log."""
    with rewards.one_line(f"model {config.model!r} cannot be trained",
                          "use Stable Diffusion 1.x, a lower --batch or --gradient_checkpointing"):
        x_t = torch.zeros(config.batch, 4, *2 * [pipe.unet.config.sample_size], device=pipe.device)
        text = pipe.encode_prompt([""], pipe.device, config.batch, False)[0]
        predict_noise(pipe.unet, x_t, x_t[:, 0, 0, 0], text, text[:1], config.guidance).sum().backward()
        pipe.unet.zero_grad()
    folder, log, file = Path(config.out), [], Path(config.out, "checkpoint.pt")
    if file.exists():
        with rewards.one_line(f"{str(file)!r} cannot be used", "start a new run"):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved[name] or part.state_dict())  # fp32's scaler leaves none
            log = saved["log"]
    gather(torch.zeros(1))  # by now every process has checked and loaded
    if RANK == 0:
        if config.algo in ("is", "rl"):
            print(f"{folder}: clip_range: true ratios in exp(+-{config.clip_range * x_t[0].numel():.3g})")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        settings = dataclasses.asdict(config) | {"out": "", "resume": ""}
        (folder / "config.part").write_text(json.dumps(settings, indent=2))
        os.replace(folder / "config.part", folder / "config.json")
        if not log:
            draw_samples(pipe, prompts, reward_fn, config, folder, 0)
    return folder, log


def finished(log, config):
    """Whether the last epoch or the bound on the KL, by its mean of five (0 before the first), is reached."""
    return len(log) >= config.epochs or 0 < config.max_kl < sum(row["kl"] for row in log[-5:]) / 5


def summary(infos, norms, started):
    """Means over all pairs, of ratio_deviation the maximum before the first update; mean norm of the gradient
    where fp16 did not overflow; seconds, and GB of the GPU."""
    columns = {name: gather(torch.tensor([float(info[name]) for info in infos])) for name in infos[0]}
    first, pairs = columns.pop("update") == 0, columns.pop("pairs")
    means = {name: ((values * pairs).sum() / pairs.sum()).item() for name, values in columns.items()}
    if "ratio_deviation" in means:
        means["ratio_deviation"] = columns["ratio_deviation"][first].max().item()
    taken = [norm for norm in norms if math.isfinite(norm)]
    return means | {"grad_norm": sum(taken) / max(len(taken), 1), "skipped": len(norms) - len(taken),
                    "seconds": time.time() - started, "gpu_gb": torch.cuda.max_memory_allocated() / 1e9}


def save_run(folder, log, unet, parts):
    """An epoch's numbers on the screen and, where installed, TensorBoard; log.csv, lora/ and last, by rename,
    checkpoint.pt: a run killed at any moment goes on from there."""
    tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in log[-1].items()))
    with rewards.one_line(f"{str(folder)!r} cannot be saved", f"then: python {SCRIPT}.py --resume {folder}"):
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            with SummaryWriter(folder / "tensorboard") as writer:
                for name, value in log[-1].items():
                    writer.add_scalar(name, value, len(log))
        rows = [log[0].keys(), *(row.values() for row in log)]
        (folder / "log.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
        save_lora(unet, folder / "lora")
        state = {"log": log} | {name: part.state_dict() for name, part in parts.items()}
        torch.save(state, folder / "checkpoint.part")
        os.replace(folder / "checkpoint.part", folder / "checkpoint.pt")


def draw_samples(pipe, prompts, reward_fn, config, folder, epoch):
    """samples/epoch_NNNN.png: 16 images of fixed prompts and seeds, not used for training."""
    prompts, tiles = [prompts[i % len(prompts)] for i in range(16)], []
    images = sample(pipe, prompts, config, [generator(config.seed, 0, i) for i in range(16)]).images
    captions = [f"epoch {epoch}: {reward:.3f}\n{textwrap.fill(prompt, 32)}"
                for prompt, reward in zip(prompts, reward_fn(images, prompts).tolist())]
    bottom = 24 + 18 * max(caption.count("\n") for caption in captions)
    for image, caption in zip(images, captions):
        tiles.append(ImageOps.expand(image.resize((256, 256), Image.BOX), (4, 4, 4, bottom), "white"))
        ImageDraw.Draw(tiles[-1]).text((4, 262), caption, "black", font_size=15)
    make_image_grid(tiles, 4, 4).save(folder / "samples" / f"epoch_{epoch:04d}.png")


def draw_progress(folder):
    """comparison.png: first and last samples; progress.png: four images along training; progress.gif: all."""
    grids = [Image.open(file) for file in sorted((folder / "samples").glob("*.png"))]
    make_image_grid([grids[0], grids[-1]], 1, 2).save(folder / "comparison.png")
    chosen = sorted({i * (len(grids) - 1) // 7 for i in range(8)})
    strips = [grids[i].crop((0, 0, grids[i].width, grids[i].height // 4)) for i in chosen]
    make_image_grid(strips, len(strips), 1).save(folder / "progress.png")
    first, *others = (grid.reduce(2) for grid in grids)
    first.save(folder / "progress.gif", save_all=True, append_images=others, duration=500, loop=0)
    print(f"{folder}: progress.png shows what changed, log.csv how")


def gather(share):
    """This process's (N / WORLD, ...), the samples RANK, RANK + WORLD, ... -> (N, ...) of all, in order."""
    if WORLD == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(WORLD)]
    dist.all_gather(shares, share)
    return torch.stack(shares, 1).flatten(0, 1)


def parse(argv=None):
    """Flags, over the settings of --config or of the resumed run, over the defaults -> Config. With neither a
    CUDA GPU nor a model named, defaults are those of shapes/. Raises ValueError."""
    parser = HfArgumentParser(Config, prog=f"{SCRIPT}.py", allow_abbrev=False)
    parser.add_argument("--config", default="", help="JSON file of settings, such as a run's")
    argv = sys.argv[1:] if argv is None else list(argv)
    flags, named = parser.parse_args(argv), {flag.partition("=")[0] for flag in argv if flag[:2] == "--"}
    if flags.resume and named - {"--resume", "--epochs", "--device"}:
        raise ValueError(f"resume {flags.resume!r}: only --epochs and --device can be changed")
    argv = read_flags(f"{Path(flags.resume).resolve()}/config.json" if flags.resume else flags.config) + argv
    if not any(flag.startswith("--model") for flag in argv) and parser.parse_args(argv).device[:4] != "cuda":
        print(f"no CUDA GPU in use: training shapes/ with shapes/{SCRIPT}.json; --model names another")
        argv = read_flags(f"shapes/{SCRIPT}.json") + argv
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]


def read_flags(file):
    """The settings in a JSON file, as flags."""
    with rewards.one_line(f"config {file!r} cannot be used", "give a run's config.json"):
        settings = json.loads((rewards.find(file) or Path(file)).read_text()) if file else {}
        return [flag for name, value in settings.items() if value != []
                for flag in ([f"--{name}", *value] if type(value) is list else [f"--{name}={value}"])]


def main(argv=None):
    """Exit status 0; 2 for what a user can mend, the reason last on stderr; 130 after Ctrl-C."""
    try:
        train(parse(argv))
        return 0
    except SystemExit as stop:  # argparse has printed its help or its error
        return stop.code
    except (ValueError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        print(f"{SCRIPT}.py: error: {' '.join(str(error).split()) or 'interrupted'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(main())
