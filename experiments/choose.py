"""Choose the weights of --noise_aware by training on shapes/, on seeds that no claim uses.

    python experiments/choose.py  # the runs that results/choice.json lacks, two at a time

First, each rule of noise.py, the published weights among them, is tried at each learning rate, on
two tasks, with three seeds. Then the finalists, which are the published weights and the two best
other rules, each at its best rate, are tried on all tasks of LEVELS with eight seeds. All runs have
the same number of reward queries, 1,024. A run is judged by

- its reward: the mean over its last four epochs;
- its strict accuracy at equal reward: at the point where the mean reward of four epochs first
  reaches the task's value in LEVELS, interpolated linearly, also from the pre-trained model to the
  first four epochs;
- collapse: strict accuracy ends below half of the pre-trained model's.

All of this is about the training images of an epoch. The share of a rule at a rate is its gain in
reward over the pre-trained model, divided by the largest gain at the same task, and averaged over
the two tasks. It decides who the finalists are. Rates at which a run collapses are left out.

results/choice.json has a line for each finished run, with the mean reward, the strict accuracy and
the KL of each epoch, and is also the cache. The tables are printed from it. After a change of
shapes/, of settings or of what the scripts compute, delete it.
"""
import contextlib
import itertools
import shutil
import sys
from concurrent.futures import as_completed
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
TASKS = "incompressibility", "location"  # on which each rule is tried
SEEDS = range(300, 303)
LEVELS = {"incompressibility": 2.0, "jpeg": -1.75, "location": 0.7, "composition": 0.82,
          "count": 0.88}  # task of the finalists: kB, -kB, and alignment
FINAL_SEEDS = range(300, 308)
EPOCHS = 16


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


def first_runs() -> list[tuple]:
    """List the runs in which each rule is tried, all of one seed before the next."""
    return [(rule, lr, task, seed)
            for seed, task, rule, lr in itertools.product(SEEDS, TASKS, RULES, RATES)]


def final_runs(rates: dict) -> list[tuple]:
    """List the runs of the finalists {rule: learning rate}, all of one seed before the next."""
    return [(rule, lr, task, seed)
            for seed, task, (rule, lr) in itertools.product(FINAL_SEEDS, LEVELS, rates.items())]


def run_all(runs: list[tuple]):
    """Make the runs that choice.json lacks."""
    stored = {"runs": claims.load(FILE)["runs"]}
    with claims.processes(2) as pool:
        waiting = {}
        for run in runs:
            if key(*run) not in stored["runs"]:
                waiting[pool.submit(train, *run)] = key(*run)
        for job in as_completed(waiting):
            stored["runs"][waiting[job]] = job.result()
            claims.save(FILE, stored)
            print(waiting[job], "is finished", flush=True)


def ends_with(run: dict, what: str) -> float:
    """Average a number over the last epochs of a run."""
    return float(np.mean(run[what][-claims.LAST:]))


def strict_at(run: dict, level: float, begin: dict) -> float | None:
    """Interpolate strict accuracy where the reward first reaches a level, None if it does not.
    `begin` has the scores of the pre-trained model."""
    reward = [begin["reward"], *claims.moving_mean(run["reward"])]
    strict = [begin["strict"], *claims.moving_mean(run["strict"])]
    for i in range(1, len(reward)):
        if reward[i] >= level:
            share = (level - reward[i - 1]) / (reward[i] - reward[i - 1])
            return float(strict[i - 1] + share * (strict[i] - strict[i - 1]))
    return None


def start(before: dict, task: str) -> dict:
    """Get the scores of the pre-trained model, whose `before` is that of claims.json."""
    scores = before[claims.RUNS[f"DDPO {task}"].kind]["trained"]
    sizes = {"jpeg": -scores["size"], "incompressibility": scores["size"]}
    return {"reward": sizes.get(task, scores["alignment"]), "strict": scores["strict"]}


def found(stored: dict, rule: str, lr: float, task: str, seeds) -> list[dict]:
    """Get the runs of a rule at a learning rate, in the order of the seeds."""
    return [stored["runs"][key(rule, lr, task, seed)] for seed in seeds]


def collapsed(runs: list, before: dict, task: str) -> int:
    """Count the runs whose strict accuracy ends below half of the pre-trained model's."""
    return sum(ends_with(run, "strict") < start(before, task)["strict"] / 2 for run in runs)


def mean_reward(runs: list) -> float:
    """Average the reward at the end over runs."""
    return float(np.mean([ends_with(run, "reward") for run in runs]))


def shares(stored: dict, before: dict) -> dict[tuple, float]:
    """Compute the share of each (rule, learning rate)."""
    gains = {}
    for rule, lr in itertools.product(RULES, RATES):
        gains[rule, lr] = [mean_reward(found(stored, rule, lr, task, SEEDS))
                           - start(before, task)["reward"] for task in TASKS]
    largest = np.max(list(gains.values()), 0)
    return {setting: float(np.mean(gain / largest)) for setting, gain in gains.items()}


def finalists(stored: dict, before: dict) -> dict[str, float]:
    """Choose the published weights and the two rules with the largest shares, each at the rate with
    its largest share among those at which no run collapses -> {rule: learning rate}."""
    share_of = shares(stored, before)
    best = {}
    for rule in RULES:
        rates = []
        for lr in RATES:
            collapses = [collapsed(found(stored, rule, lr, task, SEEDS), before, task)
                         for task in TASKS]
            if sum(collapses) == 0:
                rates.append(lr)
        if rates:
            best[rule] = max(rates, key=lambda lr: share_of[rule, lr])
    published = RULES[0]
    others = sorted(best.keys() - {published}, key=lambda rule: share_of[rule, best[rule]])
    chosen = {published, *others[-2:]}
    return {rule: best[rule] for rule in RULES if rule in chosen}


def spread(values: list) -> str:
    """Write mean ± standard error over seeds, or a single value."""
    return claims.spread(np.array(values)) if len(values) > 1 else f"{values[0]:.2f}"


def cells(runs: list, before: dict, task: str) -> list[str]:
    """Write reward, strict accuracy at equal reward, and collapses of the seeds of one setting."""
    at_level = [strict_at(run, LEVELS[task], start(before, task)) for run in runs]
    reached = [strict for strict in at_level if strict is not None]
    strict = f"{spread(reached)} ({len(reached)} of {len(runs)})" if reached else "not reached"
    reward = spread([ends_with(run, "reward") for run in runs])
    return [reward, strict, f"{collapsed(runs, before, task)} of {len(runs)}"]


def first_table(stored: dict, before: dict) -> list[str]:
    """Write what each rule has shown. `before` is the pre-trained model of claims.json."""
    columns = []
    for task in TASKS:
        columns += [f"{task}: reward", f"strict at {LEVELS[task]:g}", "collapsed"]
    lines = claims.header("weights", "learning rate", *columns, "share")
    share_of = shares(stored, before)
    for rule in RULES:
        for lr in RATES:
            row = [rule, f"{lr:g}"]
            for task in TASKS:
                runs = found(stored, rule, lr, task, SEEDS)
                row += cells(runs, before, task)
            lines.append(claims.row(*row, f"{share_of[rule, lr]:.2f}"))
    return lines


def lead(runs: list, others: list) -> str:
    """Write how much more reward runs have than others, seed by seed."""
    return spread([ends_with(one, "reward") - ends_with(other, "reward")
                   for one, other in zip(runs, others)])


def final_table(stored: dict, before: dict) -> list[str]:
    """Write what the finalists have shown."""
    lines = claims.header("task", "weights", "learning rate", "reward", "strict at equal reward",
                          "collapsed", "lead in reward")
    published = RULES[0]
    rates = finalists(stored, before)
    for task, level in LEVELS.items():
        tried = {rule: found(stored, rule, lr, task, FINAL_SEEDS) for rule, lr in rates.items()}
        for rule, runs in tried.items():
            ahead = "" if rule == published else lead(runs, tried[published])
            lines.append(claims.row(f"{task} ({level:g})", rule, f"{rates[rule]:g}",
                                    *cells(runs, before, task), ahead))
    return lines


def main():
    """Make the runs that are missing, and print the tables."""
    before = claims.load(claims.RECORDED)["pre-trained"]
    run_all(first_runs())
    run_all(final_runs(finalists(claims.load(FILE), before)))
    stored = claims.load(FILE)
    print("\n".join([*first_table(stored, before), "", *final_table(stored, before)]))


if __name__ == "__main__":
    main()
