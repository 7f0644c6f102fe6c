"""What memory a run needs, counted without it: `python experiments/bench.py --memory`.

Under FakeTensorMode tensors have shapes and no numbers, so that Stable Diffusion's size takes seconds; the
bytes of the storages that live at once are counted through sampling, decoding and an update, each by the
scripts' own functions. Not counted, and left as a margin: what CUDA and its libraries take, and the holes
between blocks. Nor are reward models, other than JPEG's none.
"""
import dataclasses
import itertools
import json
import math
import re
import types
import weakref
from pathlib import Path

import diffusers
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddpo
import dpok
import single_pass

MARGIN = 1.5  # GB: about 0.6 of CUDA's own, the rest for its libraries' workspaces and fragmentation
CARDS = 8, 12, 16, 24
TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)  # ViT-L/14


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside it make, while they live, and their peak."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result

    def add(self, tensors):
        for storage in (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.remove, storage.nbytes())
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)

    def remove(self, size):
        self.bytes -= size


def make_pipeline(unet, vae, text, dtype, device="cpu"):
    """Random parts of these settings, as ddpo.load_pipeline leaves them; on a fake device they are empty."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            unet, vae = diffusers.UNet2DConditionModel(**unet), diffusers.AutoencoderKL(**vae)
            text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
        finally:
            torch.set_default_dtype(torch.float32)
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()

    def encode_prompt(texts, device, images, guided):
        ids = torch.zeros(len(texts), 77, dtype=torch.long, device=device)
        return text_encoder(ids).last_hidden_state.repeat_interleave(images, 0), None

    return types.SimpleNamespace(
        unet=unet, vae=vae, text_encoder=text_encoder, scheduler=scheduler, device=torch.device(device),
        encode_prompt=encode_prompt, image_processor=types.SimpleNamespace(postprocess=list))


def update(script, pipe, rollout, lora, config):
    """One chunk of an update, as in the loop of `train`, and the optimiser's step."""
    i, k = torch.zeros(config.batch, dtype=torch.long), torch.zeros(config.batch, dtype=torch.long)
    state = rollout.latents[i, k], rollout.timesteps[k], rollout.cond[i], rollout.uncond
    mean, sigma = script.policy(pipe, *state, config)
    new, advantage = script.log_prob(rollout.latents[i, k + 1], mean, sigma), torch.ones(config.batch)
    if script is ddpo:
        loss, _ = ddpo.importance_sampling_loss(new, rollout.log_probs[i, k], advantage, config.clip_range)
    else:
        loss, _ = dpok.policy_loss(new, rollout.log_probs[i, k], advantage, config.clip_range)
        with torch.no_grad(), dpok.pretrained(pipe.unet):
            mean_pre, _ = dpok.policy(pipe, *state, config)
        loss = loss + dpok.kl_divergence(mean, mean_pre, sigma).mean()
    loss.backward()
    torch.optim.AdamW(lora, foreach=False).step()


def count(unet, vae, text, script, config, mode=FakeTensorMode):
    """GB of a run with a config, whose rollouts stay on the device -> {"sampling", "update"}. With the mode
    `nullcontext` it is not only counted, but done."""
    with mode(), Live() as live:
        pipe = make_pipeline(unet, vae, text, torch.float16 if config.precision == "fp16" else torch.float32)
        lora = ddpo.add_lora(pipe.unet, config.rank)
        if config.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        side, N = pipe.unet.config.sample_size, config.samples_per_epoch
        rollouts = torch.zeros(N, config.steps + 1, 4, side, side)  # of the epoch; below, those of a batch
        live.peak, short = live.bytes, dataclasses.replace(config, steps=2)
        generators, prompts = [torch.Generator() for _ in range(config.batch)], [""] * config.batch
        if script is single_pass:
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            rollout, traces = single_pass.sample_and_trace(pipe, prompts, short, generators, scaler)
            sampling = live.peak
        else:
            rollout = script.sample(pipe, prompts, short, generators)
            sampling, live.peak = live.peak, live.bytes
            update(script, pipe, rollout, lora, short)
        del rollouts
        return {"sampling": sampling / 1e9, "update": live.peak / 1e9}


def peak(device):
    """GB that this process took at most, on the GPU or in all; not a number where the system does not say."""
    status = Path("/proc/self/status")  # Linux; getrusage's number would be at least that of the parent
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    kib = re.search(r"VmHWM:\s+(\d+)", status.read_text())[1] if status.exists() else math.nan
    return float(kib) * 1024 / 1e9


def report(unet, vae, file):
    """Print what Stable Diffusion takes with the scripts' defaults, and keep it in a file."""
    rows = []
    calls = (1, True), (1, False), (2, False), (4, True), (4, False), (8, False)
    for script, precision, (batch, checkpointing) in itertools.product(
            (ddpo, dpok, single_pass), ("fp16", "fp32"), calls):
        Config = dpok.Config if script is dpok else ddpo.Config
        config = Config(precision=precision, batch=batch, gradient_checkpointing=checkpointing)
        found = count(unet, vae, TEXT, script, config)
        rows.append([f"{script.__name__}.py", precision, batch, checkpointing, *found.values()])
    file.write_text(json.dumps({"command": "--memory", "torch": torch.__version__, "rows": rows}) + "\n")
    print("\n".join(lines(rows)))


def lines(rows):
    """As Markdown, with the smallest card that has room for it and MARGIN."""
    yield "| Stable Diffusion | precision | `--batch` | GB, sampling | GB, an update | a card of |"
    yield "|---|---|---|---|---|---|"
    for name, precision, batch, checkpointing, sampling, update in rows:
        card = next((f"{card} GB" for card in CARDS if max(sampling, update) + MARGIN <= card), "more")
        how = f"{batch}, checkpointing" if checkpointing else batch
        yield f"| {name} | {precision} | {how} | {sampling:.1f} | {update:.1f} | {card} |"
