"""RWR: reward-weighted regression, which DDPO is compared with (Black et al., section 4.2 and Fig. 4).

    python experiments/rwr.py --reward jpeg                 # weights exp(beta r) / Z
    python experiments/rwr.py --reward jpeg --algo sparse   # RWR_sparse: the best tenth alone

The flags and the run folder are those of ddpo.py, with those of Config below. Denoising is one step of a
decision process here: the state is c, the action x_0, and log p_theta(x_0 | c), which cannot be computed, is
replaced by minus the loss that the model was pre-trained with. A round draws images from the model, weighs
each by its reward, and trains the model on them; rounds follow each other as DDPO's epochs do.

What differs from the paper, and why:
1. The loss is that of the noise, E || eps - eps_theta(x_t, t, c) ||^2 at any of the T = 1000 noise levels, as
   in the authors' code; Eq. 1 has the same difference in the means, with another weight for each level.
2. Weights have mean 1 over the images of a prompt that are trained on, as in the code, and not sum 1.
3. beta multiplies the reward as it is, so what it does depends on the reward's unit and spread: on shapes/
   the JPEG sizes of one prompt differ by tenths of a kB, and beta is 10.
As in E.1, eps_theta is the guided noise; a model trained without guidance collapses after the first round.
"""
import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo  # noqa: E402
from ddpo import RANK, WORLD, setting  # noqa: E402


@dataclasses.dataclass
class Config(ddpo.Config):
    """ddpo.py's settings, but for these; those of the ratio and of the advantage mean nothing here."""
    algo: Literal["rwr", "sparse"] = setting("rwr", "RWR or RWR_sparse")
    epochs: int = setting(5, "rounds; paper: 50,000 images in all")
    samples_per_epoch: int = setting(10_000, "images a round; paper: 10,000")
    updates_per_epoch: int = setting(400, "optimiser steps a round; paper: 400")
    update_batch: int = setting(128, "images, each at a noise level, of an optimiser step; paper: 128")
    inverse_temperature: float = setting(0.2, "beta of RWR, per unit of reward; paper: 0.2")
    percentile: float = setting(0.9, "RWR_sparse drops this share of a prompt's images; paper: 0.9")

    divisors = {"batch": "samples_per_epoch", "pairs": "update_batch"}

    def __post_init__(self):
        super().__post_init__()
        self.bounds = {"eta": (0, 1), "steps": (0, 500), "percentile": (0, 1)}


def weights(prompt, reward, config):
    """w_RWR = exp(beta r) / Z or w_sparse = 1[r >= C] (4.2), where Z, which makes their mean 1, and the
    percentile C are those of one prompt's images (D.3); prompt (N,) numbers, reward (N,) -> (N,)."""
    reward, weight = reward.double(), torch.empty(len(reward), dtype=torch.double)
    for own in (prompt == number for number in prompt.unique()):
        if config.algo == "rwr":
            weight[own] = (config.inverse_temperature * reward[own]).softmax(0) * own.sum()
        else:
            weight[own] = (reward[own] >= reward[own].quantile(config.percentile)).double()
    return weight.float()


def weighted_loss(eps_pred, eps, weight):
    """w(x_0, c) || eps - eps_theta(x_t, t, c) ||^2, as a mean over the latent and over B images; eps_pred and
    eps (B, 4, H, W), weight (B,)."""
    return (weight * (eps_pred - eps).square().flatten(1).mean(1)).mean()


def train(config):
    """RWR, to the last round or the bound on the KL -> the run's folder. Raises ValueError."""
    if config.kl_weight:
        raise ValueError(f"kl_weight {config.kl_weight} is no setting of RWR; leave it 0, or use ddpo.py")
    pipe, all_prompts, reward_fn = ddpo.prepare(config)
    lora = ddpo.add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(lora, config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=pipe.unet.dtype == torch.float16)
    parts = dict(lora=nn.ParameterList(lora), optimizer=optimizer, scaler=scaler)
    folder, log = ddpo.start_run(pipe, all_prompts, reward_fn, config, parts)
    N, n, T = config.samples_per_epoch, config.update_batch, pipe.scheduler.config.num_train_timesteps
    cond = pipe.encode_prompt(all_prompts, pipe.device, 1, False)[0]

    while not ddpo.finished(log, config):
        epoch, started, infos, norms = len(log) + 1, time.time(), [], []
        rng = ddpo.generator(config.seed, epoch, N)  # samples: 0 to N - 1
        prompt, images, reward = torch.randint(len(all_prompts), (N,), generator=rng), [], []  # c ~ p(c)
        for block in torch.arange(RANK, N, WORLD).split(max(256, config.batch)):  # so that N may be 10,000
            texts = [all_prompts[j] for j in prompt[block]]
            generators = [ddpo.generator(config.seed, epoch, i) for i in block.tolist()]
            rollout = ddpo.sample(pipe, texts, config, generators)
            images.append(rollout.latents[:, -1].clone())  # x_0 ~ p_theta(x_0 | c)
            reward.append(reward_fn(rollout.images, texts))  # r(x_0, c)
        images, reward = ddpo.gather(torch.cat(images)), ddpo.gather(torch.cat(reward))
        weight = weights(prompt, reward, config)  # w(x_0, c), (N,)

        for chosen in draw(weight.nonzero()[:, 0], n * config.updates_per_epoch, rng).split(n):  # one step
            levels = torch.randint(T, (n,), generator=rng)
            noises = torch.randn(n, *images.shape[1:], generator=rng)
            drawn = (part[RANK::WORLD].to(pipe.device).split(config.batch)
                     for part in (chosen, prompt[chosen], weight[chosen], levels, noises))
            for i, j, w, t, eps in zip(*drawn):  # (B,) each, eps (B, 4, H, W)
                x_t = pipe.scheduler.add_noise(images[i], eps, t)  # q(x_t | x_0)
                eps_pred = ddpo.predict_noise(pipe.unet, x_t, t, cond[j], rollout.uncond, config.guidance)
                loss = weighted_loss(eps_pred, eps, w)
                scaler.scale(loss * len(i) / n).backward()  # sums to the mean over n images
                infos.append({"update": len(norms), "pairs": len(i), "loss": loss.detach()})
            norms.append(ddpo.optimizer_step(lora, optimizer, scaler, config))

        log.append({"epoch": epoch, "reward_queries": epoch * N, "reward_mean": reward.mean().item(),
                    "reward_std": reward.std(correction=0).item(), **ddpo.summary(infos, norms, started),
                    "kl": ddpo.kl_to_pretrained(pipe, rollout, config, rng)})
        if RANK == 0:
            if ddpo.finished(log, config) or epoch % config.sample_every == 0:
                ddpo.draw_samples(pipe, all_prompts, reward_fn, config, folder, epoch)
            ddpo.save_run(folder, log, pipe.unet, parts)
    if RANK == 0:
        ddpo.draw_progress(folder)
    return folder


def draw(images, count, rng):
    """`count` of the numbers in `images`, at random; none twice before all are used -> (count,)."""
    rounds = [images[torch.randperm(len(images), generator=rng)] for _ in range(0, count, len(images))]
    return torch.cat(rounds)[:count]


def parse(argv=None):
    """ddpo.parse, with this script's settings and shapes/rwr.json."""
    with mock.patch.multiple(ddpo, SCRIPT="rwr", Config=Config):
        return ddpo.parse(argv)


def main(argv=None):
    """The exit status, as that of ddpo.main."""
    with mock.patch.multiple(ddpo, SCRIPT="rwr", Config=Config, train=train):
        return ddpo.main(argv)


if __name__ == "__main__":
    sys.exit(main())
