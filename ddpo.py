"""DDPO: Training Diffusion Models with Reinforcement Learning (Black et al., ICLR 2024, arXiv:2305.13301v4), to be read beside it.

Section 4.3 makes denoising a Markov decision process: state (c, t, x_t), action x_{t-1}, policy p_theta(x_{t-1} | x_t, c), and at the end
the reward r(x_0, c). `--algo sf` is the score-function estimator (DDPO_SF), `--algo is` the importance-sampled one (DDPO_IS) under PPO's
clip; the iteration is that of appendix D.5; the policy is the guided one, and guidance is differentiated too (E.1).

    python ddpo.py --reward jpeg       on a CUDA GPU Stable Diffusion v1.4, elsewhere the small model in shapes/, within minutes
    python ddpo.py --help              every setting, with the published value

What differs from the paper, and why:
- LoRA in the attention layers, with the learning rate that the authors' code has for it, instead of the whole UNet: it fits one GPU.
- log p is the mean over the latent, not the sum, as in all the authors' code; `log_prob` says what that does to the clip range.
- The loss is the mean over the steps t too, where the estimators sum; with Adam and a cut gradient norm the factor K hardly matters.
- The paper names no sampler. DDIM with eta 1, the authors', is ancestral DDPM sampling on the shortened schedule.
- Advantages are cut at +-5, and a prompt has statistics of its own from 16 rewards on: both from the authors' code.
- (DDPO_IS) is printed as the gradient; with one ratio a step it is that only at theta = theta_old, and after that PPO's surrogate of it.
- Added against over-optimisation (appendix A): early stopping on the KL to the pre-trained model, and a penalty on it, mean over steps and
  latent, at the states that theta_old drew (DPOK, arXiv:2305.16381, Eq. 8 to 9, which leaves out part of its gradient, Eq. 16).
- Added: `--single_pass`, (DDPO_SF) without its second pass over the trajectories; `sample_and_trace` says why it is exact.
- Left out: RWR, tuning the whole UNet, and the 398 ImageNet prompts, for which the 45 animals stand in.

The numbers of a run: reward_mean rises. ratio_deviation, before an epoch's first update, is 0 but for rounding. clipped is well under 1. kl
grows slowly: a jump is a collapse. grad_norm keeps its size. The loss says nothing about progress and is not shown.
"""
import argparse
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import sys
import textwrap
import time
import warnings
from collections import defaultdict, deque
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import rewards

# Shapes: N samples an epoch, B rows of one UNet call, K denoising steps, L text tokens of width E; a latent is (4, H, W).
# t is the scheduler's timestep (981, 961, ..., 1), k the number of the step (0, 1, ..., K - 1).


def setting(default, help, group=None, zero=False, choices=None):
    """A field of Config: its default, the text of its flag, the group of flags that it opens, whether it may be 0, what may be chosen."""
    kind = {"default_factory": dict} if default is dict else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help, "group": group, "zero": zero, "choices": choices})


@dataclasses.dataclass
class Config:
    """Settings of a run. The defaults are what the authors published for LoRA (ddpo-pytorch, config/dgx.py); "paper" and "code" say which."""
    model: str = setting("CompVis/stable-diffusion-v1-4", "hub id or folder of a Stable Diffusion pipeline; paper: v1.4", "task")
    reward: str = setting("jpeg", "jpeg, incompressibility, aesthetic, imagereward, llava or path/to/file.py:function")
    reward_options: dict = setting(dict, "passed on to the reward")
    prompts: str = setting("animals", "animals (45), activities (45 x 3), counting (n animals), a text file, or a prompt of several words; "
                           "paper: ImageNet's 398 animals for JPEG, animals for aesthetic, activities for alignment")
    algo: str = setting("is", "DDPO_IS (clipped, several updates an epoch) or DDPO_SF (one update); paper: both", choices=("is", "sf"))
    samples_per_epoch: int = setting(256, "images an epoch; paper: 256", "sampling")
    steps: int = setting(50, "denoising steps; paper: 50")
    guidance: float = setting(5.0, "classifier-free guidance weight w, 1 is none; paper: 5")
    eta: float = setting(1.0, "DDIM's noise, in (0, 1]; code: 1")
    epochs: int = setting(100, "rounds of sampling and updating; code: 100 for JPEG, 200 for the rest", "training")
    updates_per_epoch: int = setting(4, "optimiser steps an epoch, each on its share of the samples; paper: 4 for is, 1 for sf")
    batch: int = setting(4, "rows of one UNet call, before guidance doubles them: as many as memory allows, the result is the same up to rounding")
    rank: int = setting(4, "rank of LoRA; code: 4")
    lr: float = setting(3e-4, "AdamW's learning rate; paper: 1e-5 for the whole UNet, code: 3e-4 for LoRA")
    weight_decay: float = setting(1e-4, "AdamW's weight decay; paper: 1e-4", zero=True)
    max_grad_norm: float = setting(1.0, "longer gradients are cut to this norm; paper: 1")
    clip_range: float = setting(1e-4, "of the ratio, the exponential of a change in mean log-probability per latent element; paper: 1e-4")
    advantage_clip: float = setting(5.0, "advantages are cut to +- this; code: 5, paper: none")
    buffer_size: int = setting(32, "rewards remembered for each prompt; code: 16 for JPEG, 32 for the rest")
    min_count: int = setting(16, "rewards from which on a prompt has statistics of its own; code: 16")
    kl_weight: float = setting(0.0, "weight in the loss of the KL to the pre-trained model, 0 is none; paper: none", zero=True)
    max_kl: float = setting(0.0, "stop once that KL (mean per latent element and step) is larger, 0 is never; paper: stopped by hand", zero=True)
    device: str = setting("", "cuda, cuda:1, mps or cpu; default: cuda where there is one, otherwise cpu", "machine")
    precision: str = setting("", "of the frozen weights; default: bf16 on a GPU that has it; code: fp16", choices=("", "fp32", "bf16"))
    gradient_checkpointing: bool = setting(False, "compute activations twice to save memory")
    single_pass: bool = setting(False, "with algo sf: collect the gradient while sampling instead of in a second pass, the same up to rounding")
    compile: bool = setting(False, "torch.compile the UNet: slow to start, then faster; for GPUs, as torch 2.13 compiles some UNets wrongly on a CPU")
    seed: int = setting(0, "of everything random", zero=True)
    out: str = setting("", "the run's folder; default: runs/ddpo-<reward>-<time>", "output")
    sample_every: int = setting(10, "epochs between pictures of fixed prompts and seeds")
    save_every: int = setting(10, "epochs between checkpoints, lora/ with them")
    lora: str = setting("", "folder of LoRA weights to start from; the KL stays that to the model without any")
    resume: str = setting("", "folder of a run that was stopped: go on from its checkpoint; only --epochs and --device may be given anew")

    @staticmethod
    def implied(settings):
        """What one setting settles as long as no other says otherwise."""
        return {"updates_per_epoch": 1} if settings.get("algo") == "sf" else {}

    def rules(self):
        """What must hold of this script's own settings: (holds, what to say if not), ..."""
        N, U, W = self.samples_per_epoch, self.updates_per_epoch, processes()[1]
        return [(N % U == 0, f"updates_per_epoch {U} must divide samples_per_epoch {N}; try {math.gcd(N, U)}"),
                (N % (U * W) == 0, f"{W} processes must divide the {N // U} samples of an update evenly; start {math.gcd(N // U, W)}"),
                (self.algo == "is" or U == 1, f"updates_per_epoch {U} must be 1 with algo sf, which has no ratio; set it to 1, or take algo is"),
                (not self.single_pass or self.algo == "sf", "single_pass needs algo sf, as the later updates of algo is are at weights that sampling has "
                 "not seen; add --algo sf"),
                (not (self.single_pass and self.kl_weight), f"kl_weight {self.kl_weight} must be 0 with single_pass, which leaves out the pass that "
                 "the KL's gradient needs; drop one of the two"),
                (self.min_count <= self.buffer_size, f"min_count {self.min_count} must be at most buffer_size {self.buffer_size}; lower it")]


# ---------------------------------------------------------------- LoRA: W x + B A x in the attention layers (arXiv:2106.09685)

class LoRAAttnProcessor(nn.Module):
    """A diffusers attention processor: scaled dot-product attention with B A x (scale 1) added to to_q, to_k, to_v and to_out[0].

    A (rank, in) starts Gaussian, B (out, rank) zero, so that fresh LoRA changes nothing; both are float32 whatever the UNet is.
    """

    def __init__(self, attn, rank, generator=None):
        super().__init__()
        self.enabled = True
        layers = {"to_q": attn.to_q, "to_k": attn.to_k, "to_v": attn.to_v, "to_out": attn.to_out[0]}
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in layers.items():
            A = torch.randn(rank, layer.in_features, generator=generator) / rank  # as diffusers' LoRA layer, which the authors used
            self.A[name] = nn.Parameter(A.to(layer.weight.device))
            self.B[name] = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def project(self, name, layer, x):
        if not self.enabled:
            return layer(x)
        return layer(x) + x @ self.A[name].to(x.dtype).mT @ self.B[name].to(x.dtype).mT

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.project("to_q", attn.to_q, x), self.project("to_k", attn.to_k, context), self.project("to_v", attn.to_v, context)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, tokens, width)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(x)).unflatten(0, (len(x), attn.heads))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        return self.project("to_out", attn.to_out[0], x) / attn.rescale_output_factor


def add_lora(unet, rank, generator=None):
    """Freeze the UNet (placed and cast already), give every attention layer fresh LoRA, return what trains: a list of parameters."""
    if any(isinstance(p, LoRAAttnProcessor) for p in unet.attn_processors.values()):
        raise ValueError("this UNet has LoRA already; load it anew, or load_lora into what is there")
    unet.requires_grad_(False)
    unet.set_attn_processor({name: LoRAAttnProcessor(unet.get_submodule(name.removesuffix(".processor")), rank, generator)
                             for name in unet.attn_processors})
    return [p for p in unet.parameters() if p.requires_grad]


@contextmanager
def pretrained(unet):
    """Inside this context LoRA is off: the reference policy p_pre, bit for bit, without a second UNet."""
    processors = [p for p in unet.attn_processors.values() if isinstance(p, LoRAAttnProcessor)]
    before = [p.enabled for p in processors]
    try:
        for processor in processors:
            processor.enabled = False
        yield
    finally:
        for processor, enabled in zip(processors, before):
            processor.enabled = enabled


def lora_weights(unet):
    """The LoRA parameters under the names that diffusers and peft give them: <attention layer>.to_q.lora_A.weight, ..."""
    return {f"{name.removesuffix('.processor')}.{layer.replace('to_out', 'to_out.0')}.lora_{side}.weight": parameter
            for name, processor in unet.attn_processors.items() if isinstance(processor, LoRAAttnProcessor)
            for side in "AB" for layer, parameter in getattr(processor, side).items()}


def save_lora(unet, folder):
    """Write folder/pytorch_lora_weights.safetensors, diffusers' own format, whole or not at all."""
    weights = {name: parameter.detach().cpu() for name, parameter in lora_weights(unet).items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights, weight_name="partial.safetensors")
    os.replace(Path(folder, "partial.safetensors"), Path(folder, "pytorch_lora_weights.safetensors"))


def load_lora(unet, folder):
    """Copy the weights that save_lora wrote into the LoRA of `unet`, installed at the file's rank if there is none. Raises ValueError for
    a missing or an extra key, or another shape."""
    file = Path(folder, "pytorch_lora_weights.safetensors")
    try:
        loaded = {name.removeprefix("unet."): tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"LoRA {str(file)!r} cannot be read ({first_line(error)}); give a folder that a run wrote, such as runs/.../lora") from error
    ranks = [tensor.shape[0] for name, tensor in loaded.items() if name.endswith("lora_A.weight")]
    if ranks and not lora_weights(unet):
        add_lora(unet, ranks[0])
    installed = lora_weights(unet)
    wrong = sorted(loaded.keys() ^ installed.keys()) or [n for n in installed if loaded[n].shape != installed[n].shape]
    if wrong:
        raise ValueError(f"LoRA {str(file)!r} does not fit this UNet, beginning with {wrong[0]!r}; use the model and rank it was trained with")
    with torch.no_grad():
        for name, parameter in installed.items():
            parameter.copy_(loaded[name])


# ---------------------------------------------------------------- the MDP: one denoising step is a Gaussian (section 4.3)

def predict_noise(unet, x_t, t, cond, uncond, guidance):
    """Classifier-free guidance (DDPO Eq. 3): w eps(x_t, t, c) + (1 - w) eps(x_t, t), float32 (B, 4, H, W).

    x_t (B, 4, H, W) float32; t (B,), rows may differ; cond (B, L, E); uncond (1, L, E) or (B, L, E). Guidance 1 needs no second half.
    """
    if guidance != 1:
        x_t, t, cond = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond.expand_as(cond), cond])
    dtype = unet.conv_in.weight.dtype
    model_output = unet(x_t.to(dtype), t, encoder_hidden_states=cond.to(dtype)).sample.float()
    if guidance == 1:
        return model_output
    without, given = model_output.chunk(2)
    return without + guidance * (given - without)


def predict_x0(scheduler, model_output, t, x_t):
    """What the model takes the finished latent and the noise to be -> x0_pred, eps (B, 4, H, W), for models that output eps or v; t (B,)."""
    abar_t = scheduler.alphas_cumprod.to(x_t.device)[t].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "epsilon":
        return (x_t - (1 - abar_t).sqrt() * model_output) / abar_t.sqrt(), model_output
    if scheduler.config.prediction_type == "v_prediction":
        return abar_t.sqrt() * x_t - (1 - abar_t).sqrt() * model_output, abar_t.sqrt() * model_output + (1 - abar_t).sqrt() * x_t
    raise ValueError(f"prediction_type {scheduler.config.prediction_type!r} is not known; use a model that predicts epsilon or v_prediction")


def step_distribution(scheduler, model_output, t, x_t, eta=1.0):
    """p_theta(x_{t-1} | x_t, c), a Gaussian (DDPO Eq. 2), here DDIM's step (arXiv:2010.02502 Eq. 12, 16) -> mean (B, 4, H, W), sigma (B, 1, 1, 1).

    sigma = eta sqrt((1 - abar_prev) / (1 - abar_t) (1 - abar_t / abar_prev)),  mean = sqrt(abar_prev) x0_pred + sqrt(1 - abar_prev - sigma^2) eps;
    t (B,). Raises ValueError where sigma would be 0 or x0_pred clipped: then this density is not the step's.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta {eta} must be in (0, 1]: without noise a step has no log-probability; use 1")
    if scheduler.config.thresholding or scheduler.config.clip_sample:
        raise ValueError("the scheduler clips x0_pred, so that the step is not the Gaussian computed here; set thresholding and clip_sample to False")
    table = scheduler.alphas_cumprod.to(x_t.device)
    prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    abar_t = table[t].view(-1, 1, 1, 1)
    abar_prev = torch.where(prev >= 0, table[prev.clamp(min=0)], scheduler.final_alpha_cumprod.to(table)).view(-1, 1, 1, 1)
    sigma = eta * ((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)).sqrt()
    if not (sigma > 0).all():
        raise ValueError("sigma is 0 at the last step, whose log-probability is then infinite; make the scheduler with set_alpha_to_one=False")
    x0_pred, eps = predict_x0(scheduler, model_output, t, x_t)
    return abar_prev.sqrt() * x0_pred + (1 - abar_prev - sigma**2).sqrt() * eps, sigma


def log_prob(x_prev, mean, sigma):
    """log N(x_{t-1}; mean, sigma^2), averaged over the D numbers of a latent -> (B,).

    The papers' density is the sum. With the mean, as in all their code, exp(log_prob - log_prob_old) is the D-th root of the true ratio:
    for D = 16,384 a clip range of 1e-4 lets the true ratio go from 0.19 to 5.2 (exp(+-1.64)). Where D is smaller the same clip is tighter.
    """
    density = -((x_prev - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def kl_divergence(mean, mean_ref, sigma):
    """KL(N(mean, sigma^2) || N(mean_ref, sigma^2)) = (mean - mean_ref)^2 / (2 sigma^2), averaged over the latent like log_prob -> (B,)."""
    return ((mean - mean_ref) ** 2 / (2 * sigma**2)).flatten(1).mean(1)


@dataclasses.dataclass
class Rollout:
    """N trajectories x_T, ..., x_0 of the policy, on the CPU: what an update needs of them."""
    prompts: list             # N texts
    cond: torch.Tensor        # (N, L, E) their embeddings
    timesteps: torch.Tensor   # (K,) t, falling
    latents: torch.Tensor     # (N, K + 1, 4, H, W) float32: x_t is [:, k], x_{t-1} is [:, k + 1]
    log_probs: torch.Tensor   # (N, K) log p(x_{t-1} | x_t, c) under the policy that drew them
    images: list              # N PIL images


def encode(pipe, prompts):
    """The prompts' embeddings (N, L, E); each text is encoded once. What the text encoder cannot read is cut off."""
    unique = list(dict.fromkeys(prompts))
    cond = pipe.encode_prompt(unique, pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    return cond[[unique.index(prompt) for prompt in prompts]]


def generators(seed, epoch, indices):
    """One generator for each sample, from (seed, epoch, global index of the sample): no sample depends on its batch or on other samples."""
    return [torch.Generator().manual_seed((seed * 2_654_435_761 + epoch * 1_000_003 + i) % 2**32) for i in indices]


def denoise(pipe, x_t, t, cond, uncond, noise, config):
    """One action of the policy: x_{t-1} = mean + sigma noise ~ p_theta(x_{t-1} | x_t, c) -> x_{t-1} (B, 4, H, W), its log-probability (B,)."""
    model_output = predict_noise(pipe.unet, x_t, t, cond, uncond, config.guidance)
    mean, sigma = step_distribution(pipe.scheduler, model_output, t, x_t, config.eta)
    x_prev = (mean + sigma * noise).detach()  # an action is data: log p is differentiated at it, not through it
    return x_prev, log_prob(x_prev, mean, sigma)


@torch.no_grad()
def sample(pipe, prompts, config, generators, denoise=denoise):
    """Roll the policy out: x_T ~ N(0, 1), then K steps x_{t-1} ~ p_theta(x_{t-1} | x_t, c), then the decoder -> Rollout.

    Each sample draws x_T and then a noise a step from its own CPU generator, in the order of diffusers' DDIM: the images are the same. Another
    `denoise` may do more at each step, as that of ddpo.py's --single_pass.
    """
    unet, scheduler, K = pipe.unet, pipe.scheduler, config.steps
    scheduler.set_timesteps(K, device=pipe.device)
    cond, uncond = encode(pipe, prompts), encode(pipe, [""])
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latents = torch.empty(len(prompts), K + 1, *shape[1:])
    log_probs, images = torch.empty(len(prompts), K), []
    for rows in tqdm(torch.arange(len(prompts)).split(config.batch), "sampling", leave=False):
        draws = [generators[i] for i in rows]
        x_t = torch.cat([torch.randn(shape, generator=g) for g in draws]).to(pipe.device)            # (B, 4, H, W)
        latents[rows, 0] = x_t.cpu()
        for k, t in enumerate(scheduler.timesteps):
            noise = torch.cat([torch.randn(shape, generator=g) for g in draws]).to(pipe.device)
            x_t, step_log_prob = denoise(pipe, x_t, t.expand(len(rows)), cond[rows], uncond, noise, config)
            log_probs[rows, k] = step_log_prob.cpu()
            latents[rows, k + 1] = x_t.cpu()
        decoded = pipe.vae.decode(x_t.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        images += pipe.image_processor.postprocess(decoded.float(), output_type="pil")
    return Rollout(list(prompts), cond.cpu(), scheduler.timesteps.cpu(), latents, log_probs, images)


# ---------------------------------------------------------------- advantages (appendix D.3)

class PromptStatistics:
    """Rewards standardised by the running mean and standard deviation of their own prompt, in place of a value function (D.3).

    Of each prompt the last `buffer_size` rewards are kept, this batch's among them; a prompt with fewer than `min_count` is standardised
    by the whole batch. Population standard deviation + 1e-6, so that equal rewards give 0.
    """

    def __init__(self, buffer_size, min_count):
        self.min_count = min_count
        self.buffer = defaultdict(lambda: deque(maxlen=buffer_size))

    def update(self, prompts, rewards):
        """prompts (N), rewards (N,) -> advantages (N,) float32."""
        batch = rewards.double()
        for prompt, reward in zip(prompts, batch.tolist()):
            self.buffer[prompt].append(reward)
        advantages = torch.empty_like(batch)
        for i, prompt in enumerate(prompts):
            own = self.buffer[prompt]
            reference = torch.tensor(own, dtype=torch.double) if len(own) >= self.min_count else batch
            advantages[i] = (batch[i] - reference.mean()) / (reference.std(correction=0) + 1e-6)
        return advantages.float()

    def state_dict(self):
        return {prompt: list(rewards) for prompt, rewards in self.buffer.items()}

    def load_state_dict(self, state):
        self.buffer.clear()
        for prompt, rewards in state.items():
            self.buffer[prompt].extend(rewards)


# ---------------------------------------------------------------- losses: means over rows, where the paper sums over t (K times this)

def score_function_loss(log_prob, advantage):
    """(DDPO_SF): its gradient is -E[ grad log p_theta(x_{t-1} | x_t, c) r(x_0, c) ], with the advantage for r; all (B,)."""
    return -(advantage * log_prob).mean(), {}


def importance_sampling_loss(log_prob, log_prob_old, advantage, clip_range):
    """(DDPO_IS) under PPO's clip (D.1), all (B,): -E[ min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A) ], ratio = p_theta / p_theta_old.

    At theta = theta_old the gradient is that of (DDPO_SF). `clipped` is the share of rows whose gradient the clip cuts off.
    """
    ratio = (log_prob - log_prob_old).exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    info = {"ratio_mean": ratio.mean().item(), "ratio_deviation": (ratio - 1).abs().max().item(),
            "clipped": (clipped > unclipped).float().mean().item()}
    return torch.maximum(unclipped, clipped).mean(), info


# ---------------------------------------------------------------- several processes (torchrun): of W, number p has the samples p, p + W, ...

def processes():
    """-> the number p of this process among those that torchrun started, and how many they are, W; 0 and 1 without torchrun."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "LOCAL_RANK" in os.environ else (0, 1)


def join_processes(device):
    """Join the other processes, if there are any -> the device of this one."""
    if processes()[1] > 1:
        if device.startswith("cuda"):
            device, here = f"cuda:{os.environ['LOCAL_RANK']}", torch.cuda.device_count()
            if int(os.environ["LOCAL_RANK"]) >= here:
                raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes need as many GPUs, here are {here}; lower --nproc-per-node")
            torch.cuda.set_device(device)
        if not dist.is_initialized():  # long enough for process 0 to draw and save alone
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    return device


def gather(share):
    """The list or tensor (N / W, ...) of this process -> that of all, in the order of the samples."""
    shares = [share] * processes()[1]
    if len(shares) == 1:
        return share
    dist.all_gather_object(shares, share)
    return torch.stack(shares, 1).flatten(0, 1) if torch.is_tensor(share) else [item for items in zip(*shares) for item in items]


def sum_gradients(parameters):
    """Add the gradients of all processes, each of which has its rows' share of the mean."""
    if processes()[1] > 1:
        for parameter in parameters:
            dist.all_reduce(parameter.grad)


# ---------------------------------------------------------------- a run: prompts, model, folder, pictures

ANIMALS = ("cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly "
           "fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla "
           "hedgehog kangaroo").split()  # D.6
ACTIVITIES = ("riding a bike", "playing chess", "washing dishes")
PLURALS = {"mouse": "mice", "wolf": "wolves", "fox": "foxes", "goose": "geese", "butterfly": "butterflies", "fly": "flies",
           "sheep": "sheep", "deer": "deer", "fish": "fish"}
PROMPTS = {
    "animals": ANIMALS,
    "activities": [f"a{'n' * (animal[0] in 'aeiou')} {animal} {activity}" for animal in ANIMALS for activity in ACTIVITIES],
    "counting": [f"{n} {PLURALS.get(a, a + 's')}" for a in ANIMALS for n in ("two", "three", "four", "five", "six", "seven", "eight")],
}


def load_prompts(name):
    """The texts of --prompts: a known set, a text file with one prompt a line, or one prompt given literally. Raises ValueError."""
    if name in PROMPTS:
        return list(PROMPTS[name])
    file = rewards.find(name)
    if file:
        try:
            prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ValueError(f"prompt file {name!r} cannot be read ({error}); give a text file in UTF-8") from error
        if not prompts:
            raise ValueError(f"prompt file {name!r} is empty; write one prompt a line")
        return prompts
    if len(name.split()) < 2 or name.lower().endswith(".txt"):
        raise ValueError(f"prompts {name!r} is neither a known set ({', '.join(PROMPTS)}) nor a text file, and a prompt given literally "
                         f"has several words; correct the name, or put a one-word prompt in a file")
    return [name]


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(config):
    """Refuse what cannot work, before anything is loaded or written. Raises ValueError with the value, the rule and the remedy."""
    for f in dataclasses.fields(config):
        value, choices, zero = getattr(config, f.name), f.metadata["choices"], f.metadata["zero"]
        if type(value) is not f.type and (type(value), f.type) != (int, float):
            raise ValueError(f"{f.name} {value!r} must be of type {f.type.__name__}; --help shows each setting")
        if choices and value not in choices:
            raise ValueError(f"{f.name} {value!r} is unknown; choose {' or '.join(filter(None, choices))}")
        if f.type in (int, float) and not (0 <= value < 2**31 if zero else 0 < value < 2**31):
            raise ValueError(f"{f.name} {value} must be {'0 or more' if zero else 'above 0'}, and below 2^31; the default is {f.default}")
    N, W, out = config.samples_per_epoch, processes()[1], Path(config.out)
    above = next((folder for folder in (out, *out.parents) if os.path.exists(folder)), Path())
    rules = config.rules() + [
        (config.eta <= 1, f"eta {config.eta} must be at most 1, where DDIM is the ancestral sampler; use 1"),
        (config.steps <= 500, f"steps {config.steps} must be at most 500, half of those the model was trained with; the papers take 50"),
        (N % W == 0, f"{W} processes must divide samples_per_epoch {N}; start {math.gcd(N, W)}"),
        (N % (config.batch * W) == 0, f"batch {config.batch} must divide samples_per_epoch {N}" + f" / {W} processes" * (W > 1)
         + f"; try {math.gcd(N // W, config.batch)}"),
        (not config.lora or Path(config.lora, "pytorch_lora_weights.safetensors").is_file(),
         f"lora {config.lora!r} holds no pytorch_lora_weights.safetensors; give a folder that a run wrote, such as runs/.../lora"),
        (not config.reward_options.keys() & {"name", "device"}, "reward_options must not hold name or device; use --reward and --device"),
        (above.is_dir() and os.access(above, os.W_OK | os.X_OK), f"out {config.out!r} cannot be made in {str(above)!r}; name another folder"),
        (config.resume or not config.out or above != out or not any(out.iterdir()), f"out {config.out!r} is not an empty folder; name a new one"),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
    try:
        torch.zeros(1, device=config.device or "cpu").item()
    except Exception as error:  # each kind of device has its own
        raise ValueError(f"device {config.device!r} is not to be had ({first_line(error)}); try cpu") from error
    load_prompts(config.prompts)
    rewards.check(config.reward)


def load_pipeline(config):
    """Stable Diffusion in eval mode on the device, with the scheduler of the MDP. Raises ValueError if there is none to be had."""
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    source = str(rewards.find(config.model) or config.model)
    try:
        found = diffusers.StableDiffusionPipeline.load_config(source)["_class_name"]
        if found != "StableDiffusionPipeline":
            raise ValueError(f"it is a {found}")
        parts = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": transformers.CLIPTextModel}
        for name, kind in parts.items():
            parts[name], info = kind.from_pretrained(source, subfolder=name, use_safetensors=True, output_loading_info=True)
            if info["missing_keys"]:  # these would be random numbers
                raise ValueError(f"its {name} lacks {sorted(info['missing_keys'])[0]}")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(source, **parts, safety_checker=None, feature_extractor=None,
                                                                 requires_safety_checker=False)
        if set(pipe.tokenizer("a").input_ids) <= set(pipe.tokenizer.all_special_ids):
            raise ValueError("its tokenizer has no vocabulary")
        pipe.to(config.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    except Exception as error:  # whatever a folder or a hub comes up with
        raise ValueError(f"model {config.model!r} cannot be loaded ({first_line(error)}); give a Stable Diffusion 1.x or 2.x folder with "
                         "safetensors, or a hub id and a network, or run the small model with --config shapes/ddpo.json") from error
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                                                         timestep_spacing="leading")
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is multiplied
        pipe.unet.to(memory_format=torch.channels_last)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    return pipe


def draw_samples(file, title, images, captions, columns=4, size=256, text=16):
    """A grid of captioned images under a title line, as PNG."""
    cell, top, font = (size + 8, size + 44), 32, ImageFont.load_default(text)
    sheet = Image.new("RGB", (columns * cell[0], top + -(-len(images) // columns) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 6), title, "black", font)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell[0] + 4, i // columns * cell[1] + top
        sheet.paste(image.resize((size, size), Image.Resampling.NEAREST if image.width < size else Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x, y + size + 2), "\n".join(textwrap.wrap(caption, 32)[:2]), "black", font, spacing=0)
    sheet.save(file)


def draw_summary(folder):
    """comparison.png: the first grid of samples beside the last. progress.png: title and first row of at most eight grids, evenly spaced."""
    grids = [Image.open(file) for file in sorted(Path(folder, "samples").glob("epoch_*.png"))]
    width, height = grids[0].size
    comparison = Image.new("RGB", (2 * width, height))
    for i, grid in enumerate((grids[0], grids[-1])):
        comparison.paste(grid, (i * width, 0))
    comparison.save(Path(folder, "comparison.png"))
    chosen, row = [grids[i * (len(grids) - 1) // 7] for i in range(8)] if len(grids) > 8 else grids, 32 + 256 + 44
    progress = Image.new("RGB", (width, row * len(chosen)))
    for i, grid in enumerate(chosen):
        progress.paste(grid.crop((0, 0, width, row)), (0, i * row))
    progress.save(Path(folder, "progress.png"))


def run_folder(config):
    """Where a run leaves its files."""
    name = f"{Path(__file__).stem}-{config.reward.rpartition(':')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(config.resume or config.out or Path("runs", name))


def replace(file, content):
    """Write bytes to a file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    os.replace(part, file)


def start_run(config, unet, parts):
    """Make the run's folder with the config.json that repeats the run, or go back to the checkpoint of one that is resumed -> the folder,
    TensorBoard's writer or None, and the number of epochs that are done."""
    folder = run_folder(config)
    begun = config.resume and any((folder / name).exists() for name in ("checkpoint.pt", "log.csv"))
    done = load_checkpoint(folder, unet, parts, config) if begun else 0
    if processes()[0] > 0:  # only process 0 writes
        return folder, None, done
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=bool(config.resume))
    except OSError as error:
        raise ValueError(f"out {str(folder)!r} cannot be made ({error}); name another folder") from error
    replace(folder / "config.json", (json.dumps({**dataclasses.asdict(config), "out": "", "resume": ""}, indent=2) + "\n").encode())
    try:
        from torch.utils.tensorboard import SummaryWriter  # not everybody has it
    except ImportError:
        return folder, None, done
    return folder, SummaryWriter(folder, purge_step=done + 1), done


def save_checkpoint(folder, epoch, stopped, unet, parts):
    """lora/, and checkpoint.pt: the epoch, whether it stopped the run early, the LoRA weights, and the state of `parts`, whatever else learns or
    counts, in plain types. It is the last of an epoch's files to be written: what it tells of is there."""
    save_lora(unet, folder / "lora")
    lora, file = {name: parameter.detach().cpu() for name, parameter in lora_weights(unet).items()}, io.BytesIO()
    torch.save({"script": Path(__file__).stem, "epoch": epoch, "stopped": stopped, "lora": lora,
                "parts": {name: part.state_dict() for name, part in parts.items()}}, file)
    replace(folder / "checkpoint.pt", file.getvalue())


def load_checkpoint(folder, unet, parts, config):
    """Bring the weights, `parts`, log.csv and lora/ back to the run's checkpoint -> the epochs that are done, all of them if it stopped the run
    early; later pictures will be drawn anew. Raises ValueError for a checkpoint that is damaged, of something else, or past the last epoch."""
    file, log, lora = folder / "checkpoint.pt", folder / "log.csv", lora_weights(unet)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        epoch = saved["epoch"]
        lines = log.read_bytes().splitlines(keepends=True)[:epoch + 1] if epoch else []
        shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (saved["lora"], lora)]
        if saved["script"] != Path(__file__).stem or shapes[0] != shapes[1] or epoch and len(lines) != epoch + 1:
            raise ValueError("it does not belong to this script, model and log.csv")
        for name, parameter in lora.items():
            parameter.data.copy_(saved["lora"][name])
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
    except Exception as error:  # cut short, or something else entirely
        raise ValueError(f"checkpoint {str(file)!r} cannot be used ({first_line(error)}); start anew with --config "
                         f"{folder / 'config.json'}") from error
    if epoch > config.epochs:
        raise ValueError(f"epochs {config.epochs} is below the {epoch} that {str(folder)!r} has done; give at least as many")
    if processes()[0] == 0:
        replace(log, b"".join(lines))
        save_lora(unet, folder / "lora")
    return config.epochs if saved["stopped"] else epoch


def averages(infos):
    """(update, rows, info) of an epoch's UNet calls -> means over all rows, but of ratio_deviation the largest before the first update."""
    total = sum(rows for _, rows, _ in infos)
    means = {name: sum(rows * info[name] for _, rows, info in infos) / total for name in infos[0][2]}
    if "ratio_deviation" in means:
        means["ratio_deviation"] = max(info["ratio_deviation"] for update, _, info in infos if update == 0)
    return means


def watch(row, config):
    """Whether the KL has passed its bound. Raises ValueError when an epoch's numbers are none; warns, once, when rounding alone moves the ratio
    by a tenth of the clip."""
    if not math.isfinite(row["kl"] + row["grad_norm"]):
        raise ValueError(f"epoch {row['epoch']} ended with kl {row['kl']} and grad_norm {row['grad_norm']}, and is not saved; start "
                         f"anew from what is, with --lora, and an lr below {config.lr:g} or --precision fp32")
    if row.get("ratio_deviation", 0) > config.clip_range / 10:
        warnings.warn(f"before an epoch's first update a ratio was off 1 by more than a tenth of clip_range {config.clip_range:g}, by rounding "
                      "alone; take --precision fp32")  # Python shows one text once
    stop = 0 < config.max_kl < row["kl"]
    if stop:
        tqdm.write(f"stopping early: kl {row['kl']:.4g} is above max_kl {config.max_kl:g}")
    return stop


def log_epoch(folder, row, writer):
    """One line on the screen, one row of log.csv, and TensorBoard's points where it is installed."""
    with open(folder / "log.csv", "a", newline="", encoding="utf-8") as file:
        log = csv.DictWriter(file, row)
        if file.tell() == 0:
            log.writeheader()
        log.writerow(row)
    if writer:
        for name, value in row.items():
            writer.add_scalar(name, value, row["epoch"])
    tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


def peak_memory(device):
    """GB taken at most so far: on the GPU, or by the whole process; not a number where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def show_samples(pipe, prompts, config, reward_fn, folder, epoch):
    """samples/epoch_....png: sixteen images of fixed prompts and seeds, each with its reward; these queries teach nothing."""
    prompts = [prompts[i % len(prompts)] for i in range(16)]
    rollout = sample(pipe, prompts, config, generators(config.seed, 0, range(16)))
    reward = reward_fn(rollout.images, prompts)
    title = f"{'epoch ' + str(epoch) if epoch or config.lora else 'pre-trained'}   reward queries {epoch * config.samples_per_epoch}   "
    title += f"mean reward {reward.mean():.3f}"
    draw_samples(folder / "samples" / f"epoch_{epoch:04d}.png", title, rollout.images, [f"{r:.3f} {p}" for r, p in zip(reward, prompts)])


# ---------------------------------------------------------------- the algorithm: section 4.3, with the iteration of appendix D.5

def policy(pipe, rollout, rows, uncond, config):
    """p_theta at rows of a rollout, row = i K + k for step k of sample i -> x_{t-1} as it was drawn, and mean and sigma now."""
    i, k = rows // config.steps, rows % config.steps
    x_t, t = rollout.latents[i, k].to(pipe.device), rollout.timesteps[k].to(pipe.device)
    model_output = predict_noise(pipe.unet, x_t, t, rollout.cond[i].to(pipe.device), uncond, config.guidance)
    mean, sigma = step_distribution(pipe.scheduler, model_output, t, x_t, config.eta)
    return rollout.latents[i, k + 1].to(pipe.device), mean, sigma


def kl_to_pretrained(pipe, rollout, rows, mean, sigma, uncond, config):
    """KL of the steps at `rows` from p_theta, given by mean and sigma, to p_pre -> (B,) with the gradient of p_theta."""
    with torch.no_grad(), pretrained(pipe.unet):
        _, mean_ref, _ = policy(pipe, rollout, rows, uncond, config)
    return kl_divergence(mean, mean_ref, sigma)


@torch.no_grad()
def mean_kl(pipe, rollout, uncond, config, rng):
    """The KL to p_pre, mean per latent element and step, estimated at one random step of each sample; its states are those that theta_old drew.
    The steps are spread evenly: each has the same chance, and their numbers differ by one at most."""
    (N, K), total = rollout.log_probs.shape, 0.0
    for rows in (torch.arange(N) * K + (torch.randperm(N, generator=rng) + torch.randint(K, (1,), generator=rng)) % K).split(config.batch):
        _, mean, sigma = policy(pipe, rollout, rows, uncond, config)
        total += kl_to_pretrained(pipe, rollout, rows, mean, sigma, uncond, config).sum().item()
    return sum(gather([total])) / (N * processes()[1])


def loss_at(pipe, rollout, advantage, uncond, config, rows):
    """(DDPO_SF) or (DDPO_IS) at rows (B,) of a rollout, and the KL penalty where it has a weight -> loss, info."""
    x_prev, mean, sigma = policy(pipe, rollout, rows, uncond, config)
    new, old, advantage = log_prob(x_prev, mean, sigma).cpu(), rollout.log_probs.flatten()[rows], advantage[rows // config.steps]
    if config.algo == "sf":
        loss, info = score_function_loss(new, advantage)
    else:
        loss, info = importance_sampling_loss(new, old, advantage, config.clip_range)
    if config.kl_weight:
        loss = loss + config.kl_weight * kl_to_pretrained(pipe, rollout, rows, mean, sigma, uncond, config).mean().cpu()
    return loss, info


# What follows, to `descend`, is for --single_pass alone: DDPO_SF without the second pass.

@contextmanager
def lora_of_rows(unet, count):
    """Inside this context each of the `count` rows of a UNet call has LoRA weights of its own, of the same value -> these (count, *shape), in the
    order of add_lora's list; row by row, their .grad is the gradient of that row alone."""
    layers = [side for p in unet.attn_processors.values() if isinstance(p, LoRAAttnProcessor) for side in (p.A, p.B)]
    shared = [dict(side.items()) for side in layers]
    try:
        for side, parameters in zip(layers, shared):
            side.update({name: nn.Parameter(p.detach().expand(count, *p.shape)) for name, p in parameters.items()})
        yield [p for p in unet.parameters() if p.requires_grad]
    finally:
        for side, parameters in zip(layers, shared):
            side.update(parameters)


def denoise_and_trace(traces, calls, pipe, x_t, t, cond, uncond, noise, config):
    """`denoise`, and the gradient of its log-probability added to the traces of its samples, which the number of the call tells."""
    first, halves = next(calls) // config.steps * config.batch, 1 if config.guidance == 1 else 2  # guidance doubles the rows of a sample
    with torch.enable_grad(), lora_of_rows(pipe.unet, halves * len(x_t)) as weights:
        x_prev, step_log_prob = denoise(pipe, x_t, t, cond, uncond, noise, config)
        step_log_prob.sum().backward()
    for trace, weight in zip(traces, weights):
        trace[first:first + len(x_t)] += weight.grad.unflatten(0, (halves, -1)).sum(0).cpu()
    return x_prev, step_log_prob.detach()


def sample_and_trace(pipe, prompts, config, generators):
    """`sample`, and of each sample its eligibility trace, e_i = sum_t grad_theta log p_theta(x_{t-1} | x_t, c_i) (the sum of the characteristic
    eligibilities of Williams 1992) -> Rollout, and of each LoRA parameter the traces (N, *shape), on the CPU.

    (DDPO_SF) is linear in the reward: its sum over samples and steps, sum_i sum_t A_i grad log p, is sum_i A_i e_i, and e_i needs no reward. So it
    is summed up while sampling, with a backward pass at each step; nothing is approximated, and the second forward pass is saved. Memory: the
    activations of one step of one batch, whatever K is, and a trace a sample, as large as the LoRA weights (3.2 MB for Stable Diffusion at rank 4).
    """
    traces = [torch.zeros(len(prompts), *p.shape) for p in pipe.unet.parameters() if p.requires_grad]
    return sample(pipe, prompts, config, generators, functools.partial(denoise_and_trace, traces, itertools.count())), traces


def trace_loss_at(traces, advantage, parameters, config, samples):
    """-1/(B K) sum_i A_i e_i . theta at samples (B,) -> loss, info. Its value means nothing; its gradient is that of (DDPO_SF) at all their rows."""
    weight = advantage[samples] / (len(samples) * config.steps)
    return -sum((torch.tensordot(weight, e[samples], 1) * p.cpu()).sum() for e, p in zip(traces, parameters)), {}


def descend(loss_at, rows, update, parameters, optimizer, config):
    """One step of AdamW on the mean of loss_at(rows) -> loss, info over the rows of all processes, config.batch at a time
    -> (update, rows, info) of each UNet call, and the norm of the gradient before it was cut."""
    infos = []
    for chunk in tqdm(rows.split(config.batch), f"update {update + 1}", leave=False):
        loss, info = loss_at(chunk)
        (loss * len(chunk) / (len(rows) * processes()[1])).backward()
        infos.append((update, len(chunk), info))
    sum_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    optimizer.step()
    optimizer.zero_grad()
    return infos, norm


def setup(config):
    """Check everything, then load everything; nothing is written yet -> config for this machine, pipe, prompts, reward, LoRA parameters."""
    config = dataclasses.replace(config, **{f: str(v) for f, v in vars(config).items() if isinstance(v, Path)})  # a Path is welcome
    check(config)
    device = join_processes(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    config = dataclasses.replace(config, device=device, precision=config.precision or ("bf16" if bf16 else "fp32"))
    prompts, reward_fn = load_prompts(config.prompts), rewards.load(config.reward, device, **config.reward_options)
    pipe = load_pipeline(config)
    lengths = [len(pipe.tokenizer(prompt).input_ids) for prompt in prompts]
    if max(lengths) > pipe.tokenizer.model_max_length:
        print(f"warning: the text encoder reads {pipe.tokenizer.model_max_length} tokens and does not see the end of "
              f"{prompts[lengths.index(max(lengths))]!r} ({max(lengths)} tokens)", file=sys.stderr)
    parameters = add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    if config.lora and not (run_folder(config) / "checkpoint.pt").exists():
        load_lora(pipe.unet, config.lora)
    try:
        sample(pipe, prompts[:1], dataclasses.replace(config, steps=1), generators(config.seed, 0, [0]))  # try it once
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # parts that do not fit together
        raise ValueError(f"model {config.model!r} draws no image from a text ({first_line(error)}); give a Stable Diffusion 1.x or 2.x") from error
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.compile:
        pipe.unet.compile()
    gather([])  # from here on every process has checked and loaded
    return config, pipe, prompts, reward_fn, parameters


def end_epoch(row, pipe, prompts, config, reward_fn, folder, writer, parts):
    """Log the epoch; every so often, and at the last, draw the samples and save -> whether to stop early."""
    epoch, stop = row["epoch"], watch(row, config)
    last = stop or epoch == config.epochs
    if processes()[0] > 0:  # only process 0 writes
        return stop
    log_epoch(folder, row, writer)
    if last or epoch % config.sample_every == 0:
        show_samples(pipe, prompts, config, reward_fn, folder, epoch)
    if last or epoch % config.save_every == 0:
        save_checkpoint(folder, epoch, stop, pipe.unet, parts)
    return stop


def train(config):
    """DDPO -> the run's folder. Raises ValueError for what cannot work; what was saved by then stays."""
    config, pipe, prompts, reward_fn, parameters = setup(config)
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    statistics = PromptStatistics(config.buffer_size, config.min_count)
    parts = {"optimizer": optimizer, "statistics": statistics}
    folder, writer, done = start_run(config, pipe.unet, parts)
    N, K, uncond, (p, W) = config.samples_per_epoch, config.steps, encode(pipe, [""]), processes()
    if done == 0 and p == 0:
        show_samples(pipe, prompts, config, reward_fn, folder, 0)
        save_checkpoint(folder, 0, False, pipe.unet, parts)

    for epoch in range(done + 1, config.epochs + 1):
        started, rng, infos, norms = time.time(), generators(config.seed, epoch, [N])[0], [], []
        texts = [prompts[i] for i in torch.randint(len(prompts), (N,), generator=rng)]         # c ~ p(c)
        drawn = (sample_and_trace if config.single_pass else sample)(pipe, texts[p::W], config, generators(config.seed, epoch, range(p, N, W)))
        rollout, traces = drawn if config.single_pass else (drawn, None)                       # x_T, ..., x_0 ~ p_theta_old
        reward = gather(reward_fn(rollout.images, texts[p::W]))                                # r(x_0, c), (N,)
        advantage = statistics.update(texts, reward).clamp(-config.advantage_clip, config.advantage_clip)[p::W]
        for update, samples in enumerate(torch.arange(N // W).chunk(config.updates_per_epoch)):
            if config.single_pass:                                                             # (DDPO_SF), differentiated already
                rows, loss = samples, functools.partial(trace_loss_at, traces, advantage, parameters, config)
            else:                                                                              # (DDPO_SF) or (DDPO_IS)
                rows = (samples[:, None] * K + torch.arange(K)).flatten()                      # every step of these samples
                rows = rows[torch.randperm(len(rows), generator=rng)]
                loss = functools.partial(loss_at, pipe, rollout, advantage, uncond, config)
            info, norm = descend(loss, rows, update, parameters, optimizer, config)            # one step for all of them (D.1)
            infos, norms = infos + info, norms + [norm]
        kl = mean_kl(pipe, rollout, uncond, config, rng)
        row = {"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(), "reward_std": reward.std(correction=0).item(),
               **averages(gather(infos)), "kl": kl, "grad_norm": sum(norms) / len(norms), "seconds": time.time() - started,
               "memory_gb": peak_memory(config.device)}
        if end_epoch(row, pipe, prompts, config, reward_fn, folder, writer, parts):
            break
    if p == 0:
        draw_summary(folder)
    return folder


# ---------------------------------------------------------------- the command line

def read_settings(file):
    """The settings in a JSON file. Raises ValueError."""
    try:
        settings = json.loads((rewards.find(file) or Path(file)).read_text(encoding="utf-8"))
        Config(**settings)
        return settings
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"config {str(file)!r} cannot be used ({error}); give a JSON object of settings, such as a run's config.json") from error


def parse(argv):
    """Command line -> Config: defaults, then a --config file, then flags. With neither CUDA nor a model named, shapes/ comes first."""
    script = Path(__file__).stem
    parser = argparse.ArgumentParser(f"{script}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    error, parser.error = parser.error, lambda message: error(f"{message}; --help shows each setting")
    parser.add_argument("--config", metavar="FILE.json", help="settings to start from, such as a run's config.json; flags override them")
    for f in dataclasses.fields(Config):
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        kind = {"type": f.type, "metavar": "|".join(filter(None, f.metadata["choices"] or ())) or f.type.__name__.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.type is dict:
            kind = {"nargs": "+", "metavar": "KEY=VALUE"}
        default = "" if f.default in ("", False, dataclasses.MISSING) else f" (default {f.default})"
        group.add_argument(f"--{f.name}", help=f.metadata["help"].replace("%", "%%") + default, **kind)
    flags = vars(parser.parse_args(argv))
    if "reward_options" in flags:
        pairs = [option.partition("=") for option in flags["reward_options"]]
        if not all(name.isidentifier() and equals for name, equals, _ in pairs):
            parser.error(f"reward_options {' '.join(flags['reward_options'])!r} must be of the form key=value key=value")
        flags["reward_options"] = {name: value for name, _, value in pairs}
    if flags.get("resume"):
        others = sorted(flags.keys() - {"resume", "epochs", "device"})
        if others or not Path(flags["resume"], "config.json").is_file():
            parser.error(f"resume goes on with the run's own settings; leave out --{others[0]}" if others else
                         f"resume {flags['resume']!r} holds no config.json; give the folder of a run, such as runs/...")
        return Config(**read_settings(Path(flags["resume"], "config.json")) | flags | {"out": flags["resume"]})
    settings = (read_settings(flags.pop("config")) if "config" in flags else {}) | flags
    if "model" not in settings and not str(settings.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"):
        print(f"no CUDA GPU in use: running the small model in shapes/ with shapes/{script}.json; --model names another")
        here = Path(__file__).resolve().parent
        embedded = read_settings(here / "shapes" / f"{script}.json")
        settings = {name: str(here / v) if type(v) is str and (here / v).exists() else v for name, v in embedded.items()} | settings
    config = Config(**Config.implied(settings) | settings)
    return dataclasses.replace(config, out=str(run_folder(config)))


def main(argv=None):
    """Exit status 0; 2, or after Ctrl-C 130, with the reason as the last line of stderr."""
    config = None
    try:
        config = parse(argv)
        folder = train(config)
    except SystemExit as stop:  # argparse has printed its help or its error
        return stop.code
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        remedy = "; lower --batch or add --gradient_checkpointing" if isinstance(error, torch.OutOfMemoryError) else ""
        if not isinstance(error, ValueError) and config and Path(config.out, "checkpoint.pt").exists():
            remedy += f"; to go on: python ddpo.py --resume {config.out}"
        print(f"ddpo.py: error: {' '.join(str(error).split()) or 'interrupted'}{remedy}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    if processes()[0] == 0:
        print(f"{folder}: comparison.png and progress.png show what changed, log.csv how, lora/ loads in diffusers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
