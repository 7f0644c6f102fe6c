"""Make the figures of results/ from what claims.py has recorded.

    python experiments/figures.py  # from results/claims.json and the folders of runs/claims/

Five figures are plots of results/claims.json and one of results/noise.json. They are legible at a
width of 400 pixels. Bands and bars are standard errors over the seeds. Three more are copies of
pictures of runs of seed 100. They are left unchanged if the folder of the run is missing.
"""
import shutil
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import claims  # noqa: E402
from claims import KINDS, STAGES, over_seeds, standard_error  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RESULTS = claims.RECORDED.parent
TITLES = {"DDPO": "DDPO_IS", "SF": "DDPO_SF",  # of methods in DDPO's Fig. 4; others as they are
          "DDPO noise_aware": "DDPO_IS --noise_aware"}


def axes(rows: int, title: str):
    """Make a figure of some panels below each other -> figure, panels."""
    plt.rcParams["font.size"] = 9
    size = 4.6, 0.4 + 2.6 * rows
    figure, panels = plt.subplots(rows, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(textwrap.fill(title, 56), fontsize=10)
    return figure, panels[:, 0]


def plot_fig4(before: dict, found: dict):
    """Plot reward against the reward queries that a model was trained with: mean and standard error
    over seeds. An epoch's reward is that of the model before its update. The last point is the
    measurement of the claims."""
    figure, panels = axes(3, "DDPO_IS ends ahead of RWR on the counting prompt, and with "
                             "--noise_aware also on file sizes (Fig. 4)")
    units = {"jpeg": ("reward, −kB", "size", -1), "incompressibility": ("reward, kB", "size", 1),
             "count": ("reward, alignment", "alignment", 1)}
    for axis, (reward, (unit, what, sign)) in zip(panels, units.items()):
        for method in ("DDPO", "SF", "RWR", "RWR_sparse", "DDPO noise_aware"):
            name = f"{method} {reward}"
            values = np.array([kept["reward_mean"] for kept in found[name]])  # (seeds, epochs)
            end = sign * over_seeds(found, name, what, last=1)
            values = np.column_stack([values, end])
            mean = values.mean(0)
            error = values.std(0, ddof=1) / len(values) ** 0.5
            queries = np.linspace(0, found[name][0]["queries"], len(mean))
            axis.plot(queries, mean, label=TITLES.get(method, method))
            axis.fill_between(queries, mean - error, mean + error, alpha=0.3)
        axis.set(xlabel=f"reward queries ({reward})", ylabel=unit)
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    figure.savefig(RESULTS / "fig4.png", dpi=150)


def plot_curve(before: dict, found: dict):
    """Plot how the reward for a caption rises in training, for both scripts."""
    seeds = len(found["DDPO count"])
    figure, (axis,) = axes(1, f"Reward of sampled images, mean of {seeds} seeds")
    for script, name in {"ddpo.py": "DDPO count", "dpok.py": "RL count"}.items():
        values = np.array([kept["reward_mean"] for kept in found[name]])  # (seeds, epochs)
        mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
        epochs = np.arange(1, len(mean) + 1)
        axis.plot(epochs, mean, label=script)
        axis.fill_between(epochs, mean - error, mean + error, alpha=0.3)
    axis.set(xlabel="epoch (64 images each)", ylabel=f"alignment, “{KINDS['count']}”")
    axis.set_xticks(range(0, len(mean) + 1, 5))
    axis.legend()
    figure.savefig(RESULTS / "curve.png", dpi=150)


def plot_methods(before: dict, found: dict):
    """Plot strict accuracy by method for each kind of prompt. The pre-trained model's errors are
    those over blocks of its images."""
    figure, (axis,) = axes(
        1, "DPOK follows its prompt more often than supervised training does")
    methods = {"KL-O": "KL-O", "DDPO": "DDPO", "RL": "DPOK"}
    bars = {"pre-trained": [], "KL-O": [], "DDPO": [], "DPOK": []}  # (position, height, error) each
    centres = []
    position = 0.0
    for kind in KINDS:
        start = before[kind]["trained"]
        group = {"pre-trained": (start["strict"], start["errors"]["strict"])}
        for method, title in methods.items():
            if f"{method} {kind}" in found:  # what was not measured gets no place
                values = over_seeds(found, f"{method} {kind}")
                group[title] = values.mean(), standard_error(values)
        centres.append(position + 0.1 * (len(group) - 1))
        for title, (height, error) in group.items():
            bars[title].append((position, height, error))
            position += 0.2
        position += 0.2
    for title, measured in bars.items():
        positions, heights, errors = zip(*measured)
        axis.bar(positions, heights, 0.18, label=title, yerr=errors)
    axis.set(xticks=centres, xticklabels=KINDS, ylabel="strict accuracy",
             xlabel="kind of prompt", ylim=(0, 1.25))
    axis.legend(ncols=4, fontsize=7.5)
    figure.savefig(RESULTS / "methods.png", dpi=150)


def plot_frontier(before: dict, found: dict):
    """Plot accuracy on other prompts against reward, a dot for each run with β 0 or 0.5."""
    figure, (axis,) = axes(1, "With β 0.5, DPOK gains less reward and keeps the other prompts")
    for beta in ("0", "0.5"):
        sizes = over_seeds(found, f"jpeg beta {beta}", "size", "trained")
        strict = over_seeds(found, f"jpeg beta {beta}", "strict", "other")
        axis.plot(-sizes, strict, "o", label=f"β {beta}", markersize=5)
    size = before["count"]["trained"]["size"]
    strict = before["count"]["other"]["strict"]
    axis.plot(-size, strict, "k*", markersize=11, label="pre-trained")
    axis.set(xlabel="reward of its own prompt, −kB", ylabel="strict accuracy of other prompts")
    axis.legend()
    figure.savefig(RESULTS / "frontier.png", dpi=150)


def plot_overoptimisation(before: dict, found: dict):
    """Plot strict accuracy against the size of the JPEG along training, means over the seeds."""
    figure, (axis,) = axes(
        1, "As file sizes change, fewer images match their captions, except with a KL penalty "
        "(DDPO, A)")
    start = before["all"]["trained"]
    for name, line in {"DDPO jpeg": "C0o-", "DDPO noise_aware jpeg": "C0o:",
                       "DDPO incompressibility": "C1o-",
                       "DDPO noise_aware incompressibility": "C1o:",
                       "DDPO jpeg kl_weight": "C2o-", "DDPO noise_aware jpeg kl_weight": "C2o:",
                       "DDPO jpeg max_kl": "C3o-"}.items():
        sizes, strict = [start["size"]], [start["strict"]]
        for epoch in (*STAGES.get(name, ()), None):  # None: the end
            sizes.append(over_seeds(found, name, "size", epoch=epoch).mean())
            strict.append(over_seeds(found, name, "strict", epoch=epoch).mean())
        axis.plot(sizes, strict, line, label=name.removeprefix("DDPO "), markersize=4)
    axis.plot(start["size"], start["strict"], "k*", markersize=11, label="pre-trained")
    axis.set(xlabel="size of the JPEG, kB", ylabel="strict accuracy", ylim=(0, None))
    figure.legend(fontsize=8, ncols=2, loc="outside lower center")
    figure.savefig(RESULTS / "overoptimisation.png", dpi=150)


def plot_noise(measured: dict):
    """Plot what noise.py found at each of 10 steps of the pre-trained policy, with its errors. The
    error of a share assumes that those of the steps are independent."""
    figure, panels = axes(3, "The first steps decide the reward. The last step but one has most of "
                             "the gradient's noise.")
    for i, task in enumerate(("jpeg", "location")):
        found = measured[f"{task}, 10 steps, pre-trained"]
        _, noise, ratio = np.swapaxes(found["steps"], 0, 1)  # (K, 2) each: value, error
        values, errors = noise.T / noise[:, 0].sum()
        variance = errors**2
        of_others = variance.sum() - variance
        variance = (1 - values)**2 * variance + values**2 * of_others  # of n_k / sum_j n_j
        share = np.stack([values, variance**0.5], 1)
        deviation = np.array(found["deviation"])
        for axis, values in zip(panels, (ratio, share, deviation)):
            positions = np.arange(10) + 0.4 * i
            axis.bar(positions, values[:, 0], 0.4, yerr=values[:, 1], label=task)
    units = "signal / noise", "share of the noise", "deviation (kB; alignment)"
    for axis, unit in zip(panels, units):
        axis.set(ylabel=unit, xticks=np.arange(10) + 0.2, xticklabels=found["t"])
    panels[0].legend()
    panels[-1].set_xlabel("timestep t of the step")
    figure.savefig(RESULTS / "noise.png", dpi=150)


def noise_tables(measured: dict) -> list[str]:
    """Write what noise.py found as two tables: the 10 steps of the pre-trained policy, and the SNR
    of the whole gradient by rule of weights."""
    jpeg = measured["jpeg, 10 steps, pre-trained"]
    location = measured["location, 10 steps, pre-trained"]
    noise = np.array([found[1][0] for found in jpeg["steps"]])
    alignment = [plus_minus(found) for found in location["deviation"]]
    columns = {"share of the noise": [f"{share:.3f}" for share in noise / noise.sum()],
               "in closed form": [f"{share:.3f}" for share in jpeg["closed form"]],
               "SNR, `jpeg`": [plus_minus(found[2]) for found in jpeg["steps"]],
               "deviation of `jpeg`, kB": [plus_minus(found) for found in jpeg["deviation"]],
               "deviation of alignment, location": alignment}
    lines = claims.header("t", *[str(t) for t in jpeg["t"]])
    for name, cells in columns.items():
        lines.append(claims.row(name, *cells))
    title = "SNR of the whole gradient"
    lines += ["", *claims.header(title, *jpeg["rules"], "largest shares of the noise")]
    for name, found in sorted(measured.items()):
        noise = np.array([step[1][0] for step in found["steps"]])
        shares = [f"t = {found['t'][k]}: {noise[k] / noise.sum():.2f}"
                  for k in noise.argsort()[:-3:-1]]
        ratios = [plus_minus(rule[2]) for rule in found["rules"].values()]
        lines.append(claims.row(name, *ratios, ", ".join(shares)))
    return lines


def plus_minus(found: list) -> str:
    """Write a value and its error."""
    value, error = found
    return f"{value:.3f} ± {error:.3f}"


def copy_pictures():
    """Copy pictures of runs of the first seed, where their folders are there."""
    for name, picture, copy in (
            ("DDPO incompressibility", "progress.png", "ddpo-incompressibility.png"),
            ("DDPO jpeg kl_weight", "comparison.png", "ddpo-jpeg-kl.png"),
            ("RWR_sparse jpeg", "progress.png", "rwr-sparse-jpeg.png")):
        file = claims.FOLDER / f"{name}-{claims.FIRST}" / picture
        if file.exists():
            shutil.copy(file, RESULTS / copy)


def main():
    """Make all figures."""
    stored = claims.load(claims.RECORDED)
    before = stored["pre-trained"]
    found = claims.finished(stored)
    missing = [name for name in claims.RUNS if name not in found]
    if missing:
        sys.exit(f"figures.py: error: claims.py has not finished {', '.join(missing)}")
    plot_curve(before, found)
    plot_fig4(before, found)
    plot_methods(before, found)
    plot_frontier(before, found)
    plot_overoptimisation(before, found)
    measured = claims.load(RESULTS / "noise.json")["measured"]
    plot_noise(measured)
    print("\n".join(noise_tables(measured)))
    copy_pictures()


if __name__ == "__main__":
    main()
