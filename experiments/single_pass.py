"""DDPO_SF in one pass: the gradient is collected while sampling, so no step is computed twice.

    python experiments/single_pass.py --reward jpeg  # flags and run folder of ddpo.py --algo sf

(DDPO_SF), with the advantage A for the reward, is linear in A:

    sum_i sum_t A_i grad log p_theta(x_{t-1} | x_t, c_i)  =  sum_i A_i e_i,
    e_i = sum_t grad log p_theta(x_{t-1} | x_t, c_i).

The trace e_i of a sample needs no reward. So each step of sampling is followed by its own backward
pass, which adds to e_i, and the step's activations are freed before the next step. Nothing is
approximated, and the second forward pass over all steps is saved. The memory for activations and
gradients does not grow with the number of steps: it is that of one step of one batch, plus a trace
for each sample, which is as large as the LoRA weights (3.2 MB for Stable Diffusion at rank 4).

Related work: e_i is the sum of Williams' characteristic eligibilities (REINFORCE, 1992) and the
eligibility trace of GPOMDP (Baxter and Bartlett, 2001). Others also differentiate while sampling,
but keep the whole graph until the reward is known (nepfaff/steerable-scene-generation,
RTkenny/RLR-Optimizer) or compute the steps again (AReaL, pull request 1410).

One pass is enough for DDPO_SF only: later updates on the same samples are at other weights, and the
gradient of a KL penalty needs the pre-trained model at each step.
"""
import dataclasses
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo  # noqa: E402
from ddpo import RANK, WORLD_SIZE, setting  # noqa: E402


@dataclasses.dataclass
class Config(ddpo.Config):
    """The settings of ddpo.py, with one estimator."""
    algo: Literal["sf"] = setting("sf", "estimator: DDPO_SF (sf)")

    script = "experiments/single_pass.py"
    shapes_settings = "shapes/ddpo.json"


class LoRAOfEachInput(ddpo.LoRAAttnProcessor):
    """The processor of ddpo.py, with LoRA weights of its own for each input of a UNet call."""

    def __init__(self, shared: ddpo.LoRAAttnProcessor, count: int):
        nn.Module.__init__(self)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name in shared.A:
            A, B = shared.A[name].detach(), shared.B[name].detach()
            self.A[name] = nn.Parameter(A.expand(count, *A.shape))
            self.B[name] = nn.Parameter(B.expand(count, *B.shape))

    def project(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x) + x @ self.A[name].to(x.dtype).mT @ self.B[name].to(x.dtype).mT


@contextmanager
def lora_of_each(unet: nn.Module, count: int):
    """Give each of the `count` inputs of a UNet call LoRA weights of its own inside this context,
    with equal values -> these weights, (count, *shape) each, in the order of add_lora's list. The
    `grad` of each then has every input's own gradient, summed over the calls."""
    shared = unet.attn_processors
    of_each = {}
    for name, processor in shared.items():
        of_each[name] = LoRAOfEachInput(processor, count)
    unet.set_attn_processor(of_each)
    try:
        yield [parameter for parameter in unet.parameters() if parameter.requires_grad]
    finally:
        unet.set_attn_processor(shared)


def sample_step(pipe, x_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor,
                config: ddpo.Config, scaler, weight: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Sample one action x_{t-1} and differentiate its log-probability into the LoRA weights of each
    input: times the `weight` of its step, divided by `pairs` = N K, times the scale of fp16's loss.

    x_t, noise (B, 4, H, W), t (B,), cond (B, L, E), uncond (1, L, E) -> x_{t-1} (B, 4, H, W),
    log_prob (B,). Nothing of the step's graph is kept.
    """
    with torch.enable_grad():
        mean, sigma = ddpo.policy(pipe, x_t, t, cond, uncond, config)
        x_prev = (mean + sigma * noise).detach()  # the action is data
        log_prob = ddpo.log_prob(x_prev, mean, sigma)
        scaler.scale(weight * log_prob.sum() / pairs).backward()
    return x_prev, log_prob.detach()


@torch.no_grad()
def sample_and_trace(pipe, prompts: list, config: ddpo.Config, generators: list,
                     scaler) -> tuple[ddpo.Rollout, list[Tensor]]:
    """Sample as `ddpo.sample` does, and collect the trace e_i / (N K) of each of this process's N
    samples, times the scale of fp16's loss -> the Rollout, and for each LoRA parameter the traces
    (N, *shape), on the CPU. With `--noise_aware`, step k's term of e_i is multiplied
    by noise_weights[k]. Raises ValueError for non-finite numbers."""
    pipe.scheduler.set_timesteps(config.steps, device=pipe.device)
    timesteps = pipe.scheduler.timesteps
    N, K = len(prompts), config.steps
    size = pipe.unet.config.sample_size
    cond = ddpo.encode_prompts(pipe, prompts)
    uncond = ddpo.encode_prompts(pipe, [""])
    step_weights = torch.ones(K, device=pipe.device)
    if config.noise_aware:
        step_weights = ddpo.noise_weights(pipe.scheduler, config.eta)
    latents = torch.empty(N, K + 1, 4, size, size, device=pipe.device)
    log_probs = torch.empty(N, K, device=pipe.device)
    images = []
    lora = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    traces = [torch.empty(N, *parameter.shape) for parameter in lora]
    with tqdm(total=N, desc="sampling and gradients", leave=False, disable=RANK > 0) as bar:
        for start in range(0, N, config.batch):
            i = slice(start, start + config.batch)  # B samples; the last chunk may be smaller
            noise = [torch.randn(latents.shape[1:], generator=g) for g in generators[i]]
            noise = torch.stack(noise).to(pipe.device)  # (B, K + 1, 4, H, W)
            latents[i, 0] = noise[:, 0]  # x_T
            B = len(noise)
            rows = B if config.guidance == 1 else 2 * B  # of a UNet call
            with lora_of_each(pipe.unet, rows) as weights:
                for k, t in enumerate(timesteps):
                    # e_i += grad log p_theta(x_{t-1} | x_t, c_i)
                    latents[i, k + 1], log_probs[i, k] = sample_step(
                        pipe, latents[i, k], t.expand(B), cond[i], uncond, noise[:, k + 1], config,
                        scaler, step_weights[k], N * K)
            for trace, weight in zip(traces, weights):
                of_sample = weight.grad.unflatten(0, (-1, B))  # with guidance a sample has two rows
                trace[i] = of_sample.sum(0).cpu()
            images += ddpo.decode(pipe, latents[i, K])
            bar.update(len(noise))
    rollout = ddpo.Rollout(prompts, cond, uncond, timesteps, latents, log_probs, images)
    return rollout, traces


def train(config: ddpo.Config) -> Path:
    """Train until `epochs` or `max_kl` is reached -> the run's folder. Raises ValueError."""
    if config.algo != "sf":
        raise ValueError(f"algo ({config.algo}) must be sf for one pass; use ddpo.py")
    if config.kl_weight:
        raise ValueError(f"kl_weight ({config.kl_weight}) must be 0 for one pass; use ddpo.py")
    pipe, all_prompts, reward_fn = ddpo.prepare(config)
    lora = ddpo.add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    statistics = ddpo.PromptStatistics(config.buffer_size, config.min_count)
    run = ddpo.start_run(config, pipe, all_prompts, reward_fn, lora=nn.ParameterList(lora),
                         optimizer=optimizer, scaler=scaler, statistics=statistics)
    N, K = config.samples_per_epoch, config.steps
    local = slice(RANK, N, WORLD_SIZE)  # the samples of this process

    while not ddpo.finished(run.log, config):
        epoch = len(run.log) + 1
        start_time = time.time()
        rng = ddpo.generator(config.seed, epoch, N)  # samples have the numbers 0 to N - 1

        # 1. Sample: prompts c ~ p(c) and, for each, a trajectory and its trace e_i
        prompts = [all_prompts[j] for j in torch.randint(len(all_prompts), (N,), generator=rng)]
        generators = [ddpo.generator(config.seed, epoch, i) for i in range(N)]
        rollout, traces = sample_and_trace(pipe, prompts[local], config, generators[local], scaler)

        # 2. Score: the reward r(x_0, c) of each image
        reward = ddpo.gather(reward_fn(rollout.images, rollout.prompts))  # (N,)

        # 3. Advantages: the rewards, standardised per prompt (D.3)
        advantage = statistics.update(prompts, reward)[local]
        advantage.clamp_(-config.advantage_clip, config.advantage_clip)

        # 4. Update: one optimiser step, by the gradient of minus the mean of A log p over all pairs
        for parameter, trace in zip(lora, traces):
            gradient = -torch.tensordot(advantage, trace, 1)  # a process's - sum_i A_i e_i / (N K)
            parameter.grad = gradient.to(pipe.device) / WORLD_SIZE  # optimizer_step adds them up
        grad_norms = [ddpo.optimizer_step(lora, optimizer, scaler, config)]

        # 5. Log and save
        kl = ddpo.kl_to_pretrained(pipe, rollout, config, rng)
        infos = [{"update": 0, "pairs": N * K}]
        row = {"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(),
               "reward_std": reward.std(correction=0).item(),
               **ddpo.summary(infos, grad_norms, start_time), "kl": kl}
        del rollout, traces  # makes room for the next
        ddpo.end_epoch(run, row)
    ddpo.end_run(run)
    return run.folder


def parse(argv: list | None = None) -> Config:
    """Read the settings as ddpo.parse does. Raises ValueError."""
    return ddpo.parse(argv, Config)


def main(argv: list | None = None) -> int:
    """Run the script -> exit status, as that of ddpo.main."""
    return ddpo.main(argv, Config, train)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that lack a character
    sys.exit(main())
