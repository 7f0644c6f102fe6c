"""RWR: reward-weighted regression, a baseline of DDPO (Black et al., section 4.2 and Fig. 4).

    python experiments/rwr.py --reward jpeg                # weights exp(beta r) / Z
    python experiments/rwr.py --reward jpeg --algo sparse  # RWR_sparse: the best tenth only
    python experiments/rwr.py --help                       # every setting with its published value

Flags and run folder are those of ddpo.py, plus the flags of Config below. Denoising is a single
step of a decision process here: the state is c and the action is x_0. log p_theta(x_0 | c) cannot
be computed, so minus the loss of pre-training takes its place. A round samples images from the
model, weights each of them by its reward, and trains the model on them.

Differences from the paper:
1. The loss is that of the noise, E || eps - eps_theta(x_t, t, c) ||^2 at any of the T = 1000 noise
   levels, as in the authors' code. Eq. 1 has the same difference in the means, which weights each
   level differently.
2. The weights of one prompt's images have mean 1, as in the code, not sum 1.
3. beta multiplies the reward as it is, so the right beta depends on the reward's unit and spread.
   On shapes/ the JPEG sizes of one prompt differ by tenths of a kB, and beta is 10.
As in E.1, eps_theta is the guided noise. A model trained without guidance collapses after the
first round.
"""
import dataclasses
import math
import sys
import time
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
    """The settings of ddpo.py, except for these. Those of the ratio and of the advantage are not
    used."""
    algo: Literal["rwr", "sparse"] = setting("rwr", "weights: RWR (rwr) or RWR_sparse (sparse)")
    epochs: int = setting(5, "number of rounds; paper: 50,000 images in all")
    samples_per_epoch: int = setting(10_000, "images sampled per round; paper: 10,000")
    updates_per_epoch: int = setting(400, "optimiser steps per round; paper: 400")
    update_batch: int = setting(128, "images per update, each at one noise level; paper: 128")
    inverse_temperature: float = setting(0.2, "beta of RWR, per unit of reward; paper: 0.2")
    percentile: float = setting(0.9, "share of a prompt's images that sparse drops; paper: 0.9")

    script = "experiments/rwr.py"
    shapes_settings = "shapes/rwr.json"

    def check(self):
        """Check what concerns several settings. Raises ValueError."""
        for name in ("kl_weight", "noise_aware"):
            if getattr(self, name):
                raise ValueError(f"{name} ({getattr(self, name)}) is not part of RWR")
        if self.percentile > 1:
            raise ValueError(f"percentile ({self.percentile}) must be above 0 and at most 1")
        for name in ("samples_per_epoch", "update_batch"):
            if getattr(self, name) % WORLD_SIZE:
                raise ValueError(f"{name} ({getattr(self, name)}) must be divisible by the number "
                                 f"of processes ({WORLD_SIZE})")


def weights(prompt_index: Tensor, reward: Tensor, config: Config) -> Tensor:
    """Compute w_RWR = exp(beta r) / Z or w_sparse = 1[r >= C] (4.2) of N images.

    Z and the percentile C are those of one prompt's images (D.3), and Z makes the mean weight 1.
    If several rewards equal C, w_sparse keeps all of these images, so more than the best tenth.
    prompt_index (N,), the number of each image's prompt, reward (N,) -> (N,).
    """
    reward = reward.double()
    weight = torch.empty_like(reward)
    for number in prompt_index.unique():
        same_prompt = prompt_index == number
        own_reward = reward[same_prompt]
        if config.algo == "rwr":
            softmax = (config.inverse_temperature * own_reward).softmax(0)
            weight[same_prompt] = softmax * len(own_reward)
        else:
            threshold = own_reward.quantile(config.percentile)
            weight[same_prompt] = (own_reward >= threshold).double()
    return weight.float()


def weighted_loss(eps_pred: Tensor, eps: Tensor, weight: Tensor) -> Tensor:
    """Compute w(x_0, c) || eps - eps_theta(x_t, t, c) ||^2, averaged over the latent and over B
    images. eps_pred, eps (B, 4, H, W), weight (B,) -> ()."""
    return (weight * (eps_pred - eps).square().flatten(1).mean(1)).mean()


def train(config: Config) -> Path:
    """Train until `epochs` or `max_kl` is reached -> the run's folder. Raises ValueError."""
    pipe, all_prompts, reward_fn = ddpo.prepare(config)
    lora = ddpo.add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    run = ddpo.start_run(config, pipe, all_prompts, reward_fn, lora=nn.ParameterList(lora),
                         optimizer=optimizer, scaler=scaler)
    N, n = config.samples_per_epoch, config.update_batch
    T = pipe.scheduler.config.num_train_timesteps
    cond = ddpo.encode_prompts(pipe, all_prompts)
    blocks = torch.arange(RANK, N, WORLD_SIZE).split(max(256, config.batch))  # N may be 10,000

    while not ddpo.finished(run.log, config):
        epoch = len(run.log) + 1
        start_time = time.time()
        rng = ddpo.generator(config.seed, epoch, N)  # samples have the numbers 0 to N - 1

        # 1. Sample and score: prompts c ~ p(c), images x_0 ~ p_theta(x_0 | c), rewards r(x_0, c)
        prompt_index = torch.randint(len(all_prompts), (N,), generator=rng)
        local_x_0, local_reward = [], []
        for number, block in enumerate(blocks, start=1):
            prompts = [all_prompts[j] for j in prompt_index[block]]
            generators = [ddpo.generator(config.seed, epoch, i) for i in block.tolist()]
            title = f"sampling, block {number} of {len(blocks)}"
            rollout = ddpo.sample(pipe, prompts, config, generators, title)
            local_x_0.append(rollout.latents[:, -1].clone())
            local_reward.append(reward_fn(rollout.images, prompts))
        x_0 = ddpo.gather(torch.cat(local_x_0))  # (N, 4, H, W), on the run's device
        reward = ddpo.gather(torch.cat(local_reward))  # (N,)

        # 2. Weights w(x_0, c): by the rewards of the same prompt (4.2)
        weight = weights(prompt_index, reward, config)  # (N,), on the CPU
        images = choose_images(weight, n * config.updates_per_epoch, rng)

        # 3. Update: one optimiser step per n images, each noised to a random level t
        infos, grad_norms = [], []
        local = torch.arange(RANK, n, WORLD_SIZE)  # of n images, those of this process
        total = config.updates_per_epoch * len(local)
        with tqdm(total=total, desc="updates", leave=False, disable=RANK > 0) as bar:
            for chosen in images.split(n):
                timesteps = torch.randint(T, (n,), generator=rng)
                noises = torch.randn(n, *x_0.shape[1:], generator=rng)
                for b in local.split(config.batch):  # B images
                    i = chosen[b]
                    t = timesteps[b].to(pipe.device)
                    eps = noises[b].to(pipe.device)
                    w = weight[i].to(pipe.device)
                    x_t = pipe.scheduler.add_noise(x_0[i], eps, t)  # q(x_t | x_0)
                    eps_pred = ddpo.predict_noise(pipe.unet, x_t, t, cond[prompt_index[i]],
                                                  rollout.uncond, config.guidance)
                    loss = weighted_loss(eps_pred, eps, w)
                    scaler.scale(loss * len(i) / n).backward()  # sums to the mean over n images
                    infos.append(
                        {"update": len(grad_norms), "pairs": len(i), "loss": loss.detach()})
                    bar.update(len(i))
                grad_norms.append(ddpo.optimizer_step(lora, optimizer, scaler, config))

        # 4. Log and save. The KL is estimated on the images of the last block
        kl = ddpo.kl_to_pretrained(pipe, rollout, config, rng)
        row = {"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(),
               "reward_std": reward.std(correction=0).item(),
               **ddpo.summary(infos, grad_norms, start_time), "kl": kl}
        ddpo.end_epoch(run, row)
    ddpo.end_run(run)
    return run.folder


def choose_images(weight: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Choose images of a weight above 0 at random, none twice before all are used -> their numbers
    (count,). weight (N,)."""
    candidates = weight.nonzero()[:, 0]
    rounds = []
    for _ in range(math.ceil(count / len(candidates))):
        rounds.append(candidates[torch.randperm(len(candidates), generator=rng)])
    return torch.cat(rounds)[:count]


def parse(argv: list | None = None) -> Config:
    """Read the settings as ddpo.parse does. Raises ValueError."""
    return ddpo.parse(argv, Config)


def main(argv: list | None = None) -> int:
    """Run the script -> exit status, as that of ddpo.main."""
    return ddpo.main(argv, Config, train)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that lack a character
    sys.exit(main())
