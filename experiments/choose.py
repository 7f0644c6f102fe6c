"""Choose the weights of --noise_aware by training on shapes/, on seeds that no claim uses.

    python experiments/choose.py  # the runs that results/choice.json lacks, two at a time

Each rule of noise.py, the published weights among them, is tried at each learning rate, on two
tasks, with three seeds. All runs have the same number of reward queries, 1,024. A run is judged by

- its reward: the mean over its last four epochs;
- its strict accuracy at equal reward: at the point, interpolated linearly, where the mean reward of
  four epochs first reaches the task's value in LEVELS;
- collapse: strict accuracy ends below half of the pre-trained model's.

All of this is about the training images of an epoch. results/choice.json has a line for each
finished run, with the mean reward, the strict accuracy and the KL of each epoch, and is also the
cache. The table is printed from it.
"""
import contextlib
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import claims  # noqa: E402
import ddpo  # noqa: E402
import noise  # noqa: E402
import rewards  # noqa: E402
import shapes_reward  # noqa: E402

FILE = claims.RECORDED.parent / "choice.json"
FOLDER = claims.FOLDER.parent / "choice"
RULES = list(noise.rules(torch.ones(10), torch.ones(10)))
RATES = 1.5e-3, 3e-3, 6e-3
LEVELS = {"incompressibility": 2.0, "location": 0.7}  # task: kB, alignment
EPOCHS = 16
SEEDS = range(300, 303)
LAST = 4  # epochs over which a run's numbers are averaged


def train(rule: str, lr: float, task: str, seed: int) -> dict:
    """Train with weights of a rule, on one thread -> what choice.json keeps of a run."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = FOLDER / f"{rule} {lr:g} {task} {seed}".replace("/", "over")
    shutil.rmtree(folder, ignore_errors=True)
    config = claims.settings(f"DDPO {task}", lr=lr, epochs=EPOCHS, seed=seed, out=folder,
                             sample_every=EPOCHS, noise_aware=True)
    reward_fn = rewards.load(config.reward)
    strict = []

    def reward_and_strict(images: list, prompts: list) -> torch.Tensor:
        if len(images) == config.samples_per_epoch:  # not the run's pictures
            strict.append(round(shapes_reward.strict(images, prompts).mean().item(), 4))
        return reward_fn(images, prompts)

    def weights(scheduler, eta: float) -> torch.Tensor:
        return noise.rules(*noise.step_coefficients(scheduler, eta))[rule]

    with (open(f"{folder}.txt", "w", encoding="utf-8") as output,
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(output),
          patch.object(rewards, "load", lambda *names, **options: reward_and_strict),
          patch.object(ddpo, "noise_weights", weights)):
        ddpo.train(config)
    log = claims.read_log(folder / "log.csv")
    shutil.rmtree(folder)
    kept = {"reward": log["reward_mean"], "kl": log["kl"]}
    rounded = {name: [float(f"{value:.4g}") for value in values] for name, values in kept.items()}
    return rounded | {"strict": strict}


def key(rule: str, lr: float, task: str, seed: int) -> str:
    """Name a run in choice.json."""
    return f"{rule}, lr {lr:g}, {task}, {EPOCHS} epochs, seed {seed}"


def run_all():
    """Make the runs that choice.json lacks, all of one seed before the next."""
    stored = {"runs": claims.load(FILE)["runs"]}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        waiting = {}
        for seed in SEEDS:
            for task in LEVELS:
                for rule in RULES:
                    for lr in RATES:
                        name = key(rule, lr, task, seed)
                        if name not in stored["runs"]:
                            waiting[pool.submit(train, rule, lr, task, seed)] = name
        for job in claims.finished_jobs(pool, waiting):
            stored["runs"][waiting[job]] = job.result()
            claims.save(FILE, stored)
            print(waiting[job], "is finished", flush=True)


def ends_with(run: dict, what: str) -> float:
    """Average a number over the last epochs of a run."""
    return float(np.mean(run[what][-LAST:]))


def strict_at(run: dict, level: float) -> float | None:
    """Interpolate strict accuracy where the reward first reaches a level, None if it does not."""
    window = np.ones(LAST) / LAST
    reward = np.convolve(run["reward"], window, "valid")
    strict = np.convolve(run["strict"], window, "valid")
    reached = np.flatnonzero(reward >= level)
    if len(reached) == 0:
        return None
    i = reached[0]
    if i == 0:
        return float(strict[0])
    share = (level - reward[i - 1]) / (reward[i] - reward[i - 1])
    return float(strict[i - 1] + share * (strict[i] - strict[i - 1]))


def cells(runs: list, task: str, start: float) -> list[str]:
    """Write reward, strict accuracy at equal reward, and collapses of the seeds of one setting."""
    if not runs:
        return ["", "", ""]
    at_level = [strict_at(run, LEVELS[task]) for run in runs]
    reached = [strict for strict in at_level if strict is not None]
    strict = f"{np.mean(reached):.2f} ({len(reached)} of {len(runs)})" if reached else "not reached"
    collapsed = sum(ends_with(run, "strict") < start / 2 for run in runs)
    return [f"{np.mean([ends_with(run, 'reward') for run in runs]):.2f}", strict,
            f"{collapsed} of {len(runs)}"]


def table(stored: dict, before: dict) -> list[str]:
    """Write what the finished runs have shown. `before` is the pre-trained model of claims.json."""
    columns = []
    for task, level in LEVELS.items():
        columns += [f"{task}: reward", f"strict at {level:g}", "collapsed"]
    lines = claims.header("weights", "learning rate", *columns)
    for rule in RULES:
        for lr in RATES:
            row = [rule, f"{lr:g}"]
            for task in LEVELS:
                kind = claims.RUNS[f"DDPO {task}"].kind
                names = [key(rule, lr, task, seed) for seed in SEEDS]
                runs = [stored["runs"][name] for name in names if name in stored["runs"]]
                row += cells(runs, task, before[kind]["trained"]["strict"])
            lines.append(claims.row(*row))
    return lines


def main():
    """Make the runs that are missing, and print the table."""
    run_all()
    print("\n".join(table(claims.load(FILE), claims.load(claims.RECORDED)["pre-trained"])))


if __name__ == "__main__":
    main()
