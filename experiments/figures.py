"""The figures of results/, from what claims.py found.

    python experiments/figures.py    # of results/claims.json; three are pictures of runs in runs/claims/

Plots are legible at a width of 400 pixels. Bands and bars are standard errors over the seeds.
"""
import shutil
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import claims  # noqa: E402
from claims import BETAS, FIRST, FOLDER, KINDS, RECORDED, STAGES, WEIGHTED  # noqa: E402
from claims import over_seeds, standard_error  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RESULTS = RECORDED.parent


def axes(rows, title):
    plt.rcParams["font.size"] = 9
    figure, panels = plt.subplots(rows, figsize=(4.6, 0.4 + 2.6 * rows), layout="constrained", squeeze=False)
    figure.suptitle(textwrap.fill(title, 56), fontsize=10)
    return figure, panels[:, 0]


def plot_fig4(before, found):
    """Reward against reward queries: mean and standard error over seeds."""
    figure, panels = axes(3, "From as many rewards DDPO learns more than RWR at the caption's count, "
                             "not at a file's size (DDPO, Fig. 4)")
    units = {"jpeg": "reward, −kB", "incompressibility": "reward, kB", "count": "reward, alignment"}
    for axis, (reward, unit) in zip(panels, units.items()):
        for method in ("DDPO", "SF", *WEIGHTED):
            runs = found[f"{method} {reward}"]
            values = np.array([run["reward_mean"] for run in runs])
            mean, error = values.mean(0), values.std(0, ddof=1) / len(values)**0.5
            queries = np.linspace(0, runs[0]["queries"], len(mean) + 1)[1:]
            axis.plot(queries, mean, label={"DDPO": "DDPO_IS", "SF": "DDPO_SF"}.get(method, method))
            axis.fill_between(queries, mean - error, mean + error, alpha=0.3)
        axis.set(xlabel=f"reward queries ({reward})", ylabel=unit)
    panels[0].legend()
    figure.savefig(RESULTS / "fig4.png", dpi=150)


def plot_methods(before, found):
    figure, (axis,) = axes(1, "DPOK draws its prompt right more often than supervised training does")
    bars = {"pre-trained": [[before[kind]["trained"]["strict"]] for kind in KINDS]}
    for method in ("KL-O", "DDPO", "RL"):
        bars[method] = [over_seeds(found, name) if (name := f"{method} {kind}") in found else []
                        for kind in KINDS]
    for i, (label, values) in enumerate(bars.items()):
        axis.bar(np.arange(len(KINDS)) + 0.2 * i, [np.mean(v) if len(v) else 0 for v in values], 0.18,
                 label={"RL": "DPOK"}.get(label, label),
                 yerr=[standard_error(v) if len(v) > 1 else 0 for v in values])
    axis.set(xticks=np.arange(len(KINDS)) + 0.3, xticklabels=KINDS, ylabel="strictly right, share",
             xlabel="kind of prompt", ylim=(0, 1.25))
    axis.legend(ncols=4, fontsize=7.5)
    figure.savefig(RESULTS / "methods.png", dpi=150)


def plot_frontier(before, found):
    figure, (axis,) = axes(1, "β 0.5 gives up reward and keeps the other prompts right")
    for beta in BETAS:
        sizes, strict = (over_seeds(found, f"jpeg beta {beta}", what, where)
                         for what, where in (("size", "trained"), ("strict", "other")))
        axis.plot(-sizes, strict, "o", label=f"β {beta}", markersize=5)
    axis.plot(-before["count"]["trained"]["size"], before["count"]["other"]["strict"], "k*", markersize=11,
              label="pre-trained")
    axis.set(xlabel="reward of its own prompt, −kB", ylabel="other prompts strictly right, share")
    axis.legend()
    figure.savefig(RESULTS / "frontier.png", dpi=150)


def plot_overoptimisation(before, found):
    figure, (axis,) = axes(1, "Smaller files cost the captions, unless a KL penalty holds them (DDPO, A)")
    start = before["all"]["trained"]
    for name in ("DDPO jpeg", "DDPO incompressibility", "DDPO jpeg kl_weight", "DDPO jpeg max_kl"):
        path = [[over_seeds(found, name, what, epoch=epoch).mean() for epoch in (*STAGES.get(name, ()), None)]
                for what in ("size", "strict")]
        axis.plot([start["size"], *path[0]], [start["strict"], *path[1]], "o-", label=name[5:], markersize=4)
    axis.plot(start["size"], start["strict"], "k*", markersize=11, label="pre-trained")
    axis.set(xlabel="size of the JPEG, kB", ylabel="strictly right, share", ylim=(0, None))
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "overoptimisation.png", dpi=150)


def copy_grids():
    """Pictures that runs of the first seed left, where their folders are."""
    for name, picture, file in (("DDPO incompressibility", "progress", "ddpo-incompressibility"),
                                ("DDPO jpeg kl_weight", "comparison", "ddpo-jpeg-kl"),
                                ("RWR_sparse jpeg", "progress", "rwr-sparse-jpeg")):
        if (grid := FOLDER / f"{name}-{FIRST}" / f"{picture}.png").exists():
            shutil.copy(grid, RESULTS / f"{file}.png")


def main():
    stored = claims.load(RECORDED)
    before, found = stored["pre-trained"], claims.finished(stored)
    for plot in (plot_fig4, plot_methods, plot_frontier, plot_overoptimisation):
        plot(before, found)
    copy_grids()


if __name__ == "__main__":
    main()
