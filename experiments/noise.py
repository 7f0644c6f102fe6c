"""Where the noise of DDPO's gradient comes from: signal and noise by denoising step, on shapes/.

    python experiments/noise.py  # an hour on two cores; results/noise.json and results/noise.png

The gradient of (DDPO_SF) is a sum over the K steps. Its term g_k is the mean over a batch of A grad
log p_theta(x_{t-1} | x_t, c). A is the reward minus the mean of its prompt's n images, over the
standard deviation of the batch. The mean includes the image itself, so SNR is too small by the
factor 1 - 1/n (3/4 for jpeg). Three numbers are estimated from independent batches. The signal |E
g_k|^2 is the mean inner product of two batches' g_k, which is unbiased. The noise is the variance
of one batch's g_k. SNR is signal over noise. The same is done for the sum of w_k g_k, for each rule
of weights w. Errors are the jackknife's; near a signal of 0 they are too large by nearly a half.

In closed form grad log p = (z / sigma_k) c_k grad eps, with z ~ N(0, I) and c_k = d mean / d eps.
If eps were equally sensitive to the weights at all steps, step k's share of the noise would be
(c_k / sigma_k)^2 over the sum of these. `deviation` is the reward's standard deviation when the
noise of step k alone is resampled, as in TempFlow-GRPO (arXiv:2508.04324) for flows. Its error is
rough at the last steps, where few images change.
"""
import shutil
import sys
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import claims  # noqa: E402
import ddpo  # noqa: E402
import figures  # noqa: E402
import rewards  # noqa: E402

FILE = claims.RECORDED.parent / "noise.json"
FOLDER = claims.FOLDER.parent / "noise"
TASKS = {"jpeg": ("DDPO jpeg", 12), "location": ("DDPO location", 15)}  # run, epochs of training
BATCHES = {10: 24, 50: 12}  # number of steps: batches


def step_coefficients(scheduler, eta: float) -> tuple[Tensor, Tensor]:
    """Compute sigma_k and c_k = d mean / d eps of each step -> (K,), (K,)."""
    t = scheduler.timesteps
    eps = torch.ones(len(t), 1, 1, 1)  # the mean is linear in eps and x_t
    c, sigma = ddpo.step_distribution(scheduler, eps, t, torch.zeros_like(eps), eta)
    return sigma.flatten(), c.flatten()


def rules(sigma: Tensor, c: Tensor) -> dict[str, Tensor]:
    """Make the candidates for weights of the steps, each with mean 1 -> {name: (K,)}."""
    without_noisiest = torch.ones_like(sigma)
    without_noisiest[(c / sigma).abs().argmax()] = 0
    candidates = {"1, as published": torch.ones_like(sigma), "sigma": sigma,
                  "sigma / abs(c)": sigma / c.abs(), "sigma^2 / abs(c)": sigma**2 / c.abs(),
                  "without the noisiest step": without_noisiest}
    return {name: weights / weights.mean() for name, weights in candidates.items()}


def step_gradients(pipe, lora: list, rollout: ddpo.Rollout, advantage: Tensor, config) -> Tensor:
    """Compute g_k of a batch -> (K, number of LoRA's weights)."""
    gradients = []
    for k in range(config.steps):
        t = rollout.timesteps[k].expand(len(advantage))
        mean, sigma = ddpo.policy(
            pipe, rollout.latents[:, k], t, rollout.cond, rollout.uncond, config)
        log_prob = ddpo.log_prob(rollout.latents[:, k + 1], mean, sigma)
        of_each_parameter = torch.autograd.grad((advantage * log_prob).mean(), lora)
        gradients.append(torch.cat([gradient.flatten() for gradient in of_each_parameter]))
    return torch.stack(gradients)


def signal_and_noise(products: np.ndarray) -> np.ndarray:
    """Estimate signal, noise and SNR from the inner products of n batches' gradients (n, n)."""
    n = len(products)
    squares = np.trace(products)
    signal = (products.sum() - squares) / (n * (n - 1))
    noise = squares / n - signal
    return np.array([signal, noise, signal / noise])


def with_jackknife(products: np.ndarray) -> list:
    """Estimate as above -> [signal, its error], [noise, its error], [SNR, its error]."""
    n = len(products)
    without = [np.delete(np.delete(products, b, 0), b, 1) for b in range(n)]
    errors = np.std([signal_and_noise(others) for others in without], 0) * (n - 1) ** 0.5
    return np.stack([signal_and_noise(products), errors], 1).tolist()


@torch.no_grad()
def finish(pipe, x_t: Tensor, first: int, noise: Tensor, cond: Tensor, uncond: Tensor, config):
    """Denoise from step `first` on, with given noise (N, K + 1, 4, H, W) -> its states, images."""
    states = [x_t]
    for k in range(first, config.steps):
        t = pipe.scheduler.timesteps[k].expand(len(x_t))
        mean, sigma = ddpo.policy(pipe, states[-1], t, cond, uncond, config)
        states.append(mean + sigma * noise[:, k + 1])
    return torch.stack(states, 1), ddpo.decode(pipe, states[-1])


def deviations(pipe, prompts: list, reward_fn, config) -> list:
    """Resample the noise of each step alone -> of each step [the reward's deviation, its error].
    The mean square of the difference of two samples is twice the variance."""
    rng = ddpo.generator(config.seed, 999_999, 0)  # no training has this epoch
    cond, uncond = ddpo.encode_prompts(pipe, prompts), ddpo.encode_prompts(pipe, [""])
    side = pipe.unet.config.sample_size
    noise = torch.randn(len(prompts), config.steps + 1, 4, side, side, generator=rng)
    states, images = finish(pipe, noise[:, 0], 0, noise, cond, uncond, config)
    reward = reward_fn(images, prompts)
    found = []
    for k in range(config.steps):
        other = noise.clone()
        other[:, k + 1] = torch.randn(noise[:, 0].shape, generator=rng)
        _, images = finish(pipe, states[:, k], k, other, cond, uncond, config)
        halves = (reward - reward_fn(images, prompts)).square().numpy() / 2
        deviation = halves.mean() ** 0.5
        error = halves.std(ddof=1) / len(halves) ** 0.5 / (2 * deviation) if deviation else 0.0
        found.append([float(deviation), float(error)])
    return found


def measure(task: str, steps: int, checkpoint: str | None, batches: int, samples=64) -> dict:
    """Measure a task at the pre-trained policy or a checkpoint's; its prompts divide `samples`."""
    torch.set_num_threads(1)
    name, _ = TASKS[task]
    config = claims.settings(name, steps=steps)
    pipe = ddpo.load_pipeline(config)
    lora = ddpo.add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(0))
    if checkpoint:
        nn.ParameterList(lora).load_state_dict(torch.load(checkpoint, weights_only=True)["lora"])
    reward_fn = rewards.load(config.reward)
    all_prompts = ddpo.load_prompts(config.prompts)
    prompts = [all_prompts[i % len(all_prompts)] for i in range(samples)]
    gradients = []
    for batch in range(batches):
        generators = [ddpo.generator(config.seed, 500_000 + batch, i) for i in range(samples)]
        rollout = ddpo.sample(pipe, prompts, config, generators)
        reward = reward_fn(rollout.images, prompts).view(-1, len(all_prompts))  # (repeats, prompts)
        advantage = ((reward - reward.mean(0)) / reward.std()).flatten()
        gradients.append(step_gradients(pipe, lora, rollout, advantage, config))
    gradients = torch.stack(gradients).double()  # (batches, K, weights)
    sigma, c = step_coefficients(pipe.scheduler, config.eta)
    by_step = []
    for k in range(steps):
        by_step.append(with_jackknife((gradients[:, k] @ gradients[:, k].T).numpy()))
    by_rule = {}
    for rule, weights in rules(sigma, c).items():
        weighted = torch.einsum("bkp,k->bp", gradients, weights.double())
        by_rule[rule] = with_jackknife((weighted @ weighted.T).numpy())
    return {"t": pipe.scheduler.timesteps.tolist(), "steps": by_step, "rules": by_rule,
            "closed form": ((c / sigma) ** 2 / ((c / sigma) ** 2).sum()).tolist(),
            "deviation": deviations(pipe, prompts, reward_fn, config)}


def train(task: str) -> str:
    """Train for a short time on one thread, with 10 steps -> the checkpoint."""
    torch.set_num_threads(1)
    name, epochs = TASKS[task]
    shutil.rmtree(FOLDER / task, ignore_errors=True)
    run = ddpo.train(claims.settings(name, epochs=epochs, out=FOLDER / task))
    return str(run / "checkpoint.pt")


def main():
    """Train, measure each task at both policies and numbers of steps, store and plot."""
    measured = claims.load(FILE).get("measured", {})
    with claims.processes(2) as pool:
        checkpoints = dict(zip(TASKS, pool.map(train, TASKS)))
        jobs = {}
        for steps, batches in BATCHES.items():
            for task, checkpoint in checkpoints.items():
                for policy, file in {"pre-trained": None, "trained": checkpoint}.items():
                    jobs[pool.submit(measure, task, steps, file, batches)] = (
                        f"{task}, {steps} steps, {policy}")
        for job in as_completed(jobs):
            measured[jobs[job]] = job.result()
            claims.save(FILE, {"measured": measured})
    figures.plot_noise(measured)


if __name__ == "__main__":
    main()
