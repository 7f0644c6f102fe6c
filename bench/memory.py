"""Count the memory that a run needs, without a GPU: `python bench/bench.py --memory`.

Under FakeTensorMode tensors have shapes but no numbers, so Stable Diffusion's size takes seconds.
What is counted are the bytes of the storages that live at the same time during sampling, decoding
and an update. Sampling and decoding are the scripts' own functions, and `update` below does one
chunk as their loops do. Left as a margin is what CUDA and its libraries take, and the fragmentation
of the allocator. Not counted are models of rewards (the JPEG rewards have none), the value function
of dpok.py, and the optimiser of single_pass.py; the last two are smaller than the margin.
"""
import dataclasses
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

MARGIN = 1.5  # GB: about 0.6 for CUDA itself, the rest for workspaces and fragmentation
CARDS = (8, 12, 16, 24)  # GB
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12}  # CLIP ViT-L/14
CALLS = [(1, True), (1, False), (2, False), (4, True), (4, False), (8, False)]
# the calls of the table: --batch, --gradient_checkpointing


class LiveMemory(TorchDispatchMode):
    """Count the bytes of the storages that operations inside it make, while these live, and the
    most that lived at the same time."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        # `decode` reads whether all numbers are finite. A fake tensor has no numbers, so that the
        # question would raise an error. This mode sees it first, and answers yes.
        reads_value = function is torch.ops.aten._local_scalar_dense.default
        if reads_value and args[0].dtype == torch.bool:
            return True
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage):
        """Count a storage once, until it is freed."""
        if storage in self.known:
            return
        self.known.add(storage)
        weakref.finalize(storage, self.remove, storage.nbytes())
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def remove(self, size: int):
        """Stop counting the bytes of a storage that was freed."""
        self.bytes -= size


def make_pipeline(unet: dict, vae: dict, text: dict, dtype: torch.dtype, device="cpu"):
    """Make random parts with these settings, as ddpo.load_pipeline leaves them; on a fake device
    they are empty."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            unet = diffusers.UNet2DConditionModel(**unet)
            vae = diffusers.AutoencoderKL(**vae)
            text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
        finally:
            torch.set_default_dtype(torch.float32)
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()

    def encode_prompt(prompts, device, num_images_per_prompt, do_classifier_free_guidance):
        """Embed prompts as diffusers' method does when called by ddpo.encode_prompts."""
        token_ids = torch.zeros(len(prompts), 77, dtype=torch.long, device=device)
        return text_encoder(token_ids).last_hidden_state, None

    image_processor = types.SimpleNamespace(postprocess=list)
    return types.SimpleNamespace(
        unet=unet, vae=vae, text_encoder=text_encoder, scheduler=scheduler,
        device=torch.device(device), encode_prompt=encode_prompt, image_processor=image_processor)


def update(script, pipe, rollout, lora: list, config):
    """Do one chunk of an update, as in the loop of `train`, and the optimiser's step."""
    i = torch.zeros(config.batch, dtype=torch.long)
    k = torch.zeros(config.batch, dtype=torch.long)
    advantage = torch.ones(config.batch)
    state = rollout.latents[i, k], rollout.timesteps[k], rollout.cond[i], rollout.uncond
    mean, sigma = script.policy(pipe, *state, config)
    log_prob_new = script.log_prob(rollout.latents[i, k + 1], mean, sigma)
    log_prob_old = rollout.log_probs[i, k]
    if script is ddpo:
        loss, _ = ddpo.importance_sampling_loss(
            log_prob_new, log_prob_old, advantage, config.clip_range)
    else:
        loss, _ = dpok.policy_loss(log_prob_new, log_prob_old, advantage, config.clip_range)
        with torch.no_grad(), dpok.pretrained(pipe.unet):
            mean_pre, _ = dpok.policy(pipe, *state, config)
        loss = loss + dpok.kl_divergence(mean, mean_pre, sigma).mean()
    loss.backward()
    torch.optim.AdamW(lora, foreach=False).step()


def count(unet: dict, vae: dict, text: dict, script, config, mode=FakeTensorMode) -> dict:
    """Count the memory of a run, whose rollouts stay on the device -> {"sampling": GB, "update":
    GB}. With `contextlib.nullcontext` as the mode it is not only counted, but also done."""
    dtype = torch.float16 if config.precision == "fp16" else torch.float32
    with mode(), LiveMemory() as live:
        pipe = make_pipeline(unet, vae, text, dtype)
        lora = ddpo.add_lora(pipe.unet, config.rank)
        if config.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        # The latents of a whole epoch. What follows samples one batch, in two steps.
        size = pipe.unet.config.sample_size
        latents = torch.zeros(config.samples_per_epoch, config.steps + 1, 4, size, size)
        config = dataclasses.replace(config, steps=2)
        generators = [torch.Generator() for _ in range(config.batch)]
        prompts = [""] * config.batch
        live.peak = live.bytes
        if script is single_pass:
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            single_pass.sample_and_trace(pipe, prompts, config, generators, scaler)
            sampling = live.peak
        else:
            rollout = script.sample(pipe, prompts, config, generators)
            sampling = live.peak
            live.peak = live.bytes
            update(script, pipe, rollout, lora, config)
        del latents
        return {"sampling": sampling / 1e9, "update": live.peak / 1e9}


def peak(device: str) -> float:
    """Get the most memory that this process has taken, in GB, on the GPU or, on a CPU, in all; NaN
    where the system does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # Linux; getrusage's number is at least that of the parent
    if not status.exists():
        return math.nan
    kib = re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1]
    return int(kib) * 1024 / 1e9


def report(unet: dict, vae: dict, file: Path):
    """Print what Stable Diffusion takes with the scripts' defaults, and write it to a file."""
    rows = []
    for script in (ddpo, dpok, single_pass):
        config_class = dpok.Config if script is dpok else ddpo.Config
        for precision in ("fp16", "fp32"):
            for batch, checkpointing in CALLS:
                config = config_class(
                    precision=precision, batch=batch, gradient_checkpointing=checkpointing)
                gb = count(unet, vae, TEXT, script, config)
                rows.append([f"{script.__name__}.py", precision, batch, checkpointing,
                             gb["sampling"], gb["update"]])
    result = {"command": "--memory", "torch": torch.__version__, "rows": rows}
    file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def table(rows: list) -> list[str]:
    """Make a Markdown table, with the smallest card that has room for a run and MARGIN -> lines."""
    headers = ("Stable Diffusion", "precision", "`--batch`", "GB, sampling", "GB, an update",
               "smallest card")
    lines = [f"| {' | '.join(headers)} |", "|---|---|---|---|---|---|"]
    for name, precision, batch, checkpointing, sampling, update in rows:
        needed = max(sampling, update) + MARGIN
        large_enough = [f"{card} GB" for card in CARDS if card >= needed]
        card = large_enough[0] if large_enough else "more"
        call = f"{batch}, checkpointing" if checkpointing else batch
        lines.append(
            f"| {name} | {precision} | {call} | {sampling:.1f} | {update:.1f} | {card} |")
    return lines
