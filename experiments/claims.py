"""The claims of both papers that a laptop can show, tried on shapes/ with five seeds or eight.

    python experiments/claims.py               # everything, two runs at a time on two cores
    python experiments/claims.py --only count  # the runs with this in their name; tables as far as they go
    python experiments/claims.py --quick       # three short runs, within ten minutes: trends, no verdicts

What is finished is not repeated, so it may be stopped and started again; after a change of shapes/ or of the
scripts delete runs/. A run is a script with the arguments of RUNS, in runs/claims/<name>-<seed>/. Its model
is measured on images of seeds that no run has seen, the same for every model. `alignment` and `size` (of the
JPEG, kB) are what runs are rewarded with; `strict`, with which none is, is the share of images that are just
what their caption says; `diversity` is how far the images of one caption differ: the standard deviation of a
pixel's value (0 to 1) between them. Once all is finished claims.json and the figures go to
experiments/results/.
"""
import argparse
import contextlib
import csv
import dataclasses
import json
import os
import shlex
import shutil
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers.utils import logging, make_image_grid
from PIL import Image, ImageDraw, ImageOps

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "shapes"), str(HERE)]
import ddpo  # noqa: E402
import dpok  # noqa: E402
import rewards  # noqa: E402
import shapes_reward  # noqa: E402
import single_pass  # noqa: E402

logging.set_verbosity_error()  # not that the text encoder has no LoRA
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FOLDER, RESULTS = HERE.parent / "runs" / "claims", HERE / "results"
KINDS = {"colour": "a green square", "count": "two red squares",
         "composition": "a red circle and a blue square", "location": "a blue circle on the left",
         "bias": "four red circles"}
UNSEEN = {"colour": "a green circle", "count": "two blue squares",
          "composition": "a red circle and a blue triangle", "location": "a blue square on the left"}
ALL = dpok.load_prompts("shapes/prompts.txt")
OTHER = [prompt for prompt in ALL if prompt not in (*KINDS.values(), *UNSEEN.values())]

# run: (script, its prompts, which are one of KINDS or all of shapes/prompts.txt, its other arguments)
ALIGNMENT, SFT = "--reward shapes/shapes_reward.py:alignment", "--algo sft --lr 3e-3"
METHODS = {"KL-O": (dpok, SFT), "KL-D": (dpok, f"{SFT} --kl_d"), "DDPO": (ddpo, f"{ALIGNMENT} --epochs 30"),
           "RL": (dpok, "")}
BETAS = "0", "0.1", "0.5"
RUNS = {f"{method} {kind}": (script, kind, flags) for method, (script, flags) in METHODS.items()
        for kind in (KINDS if method == "RL" else UNSEEN)}
for name, kind, reward in ("count", "count", ALIGNMENT), ("jpeg", "all", "--reward jpeg"):
    sf = f"{reward} --epochs 24 --buffer_size 64"  # as many reward queries and updates
    ppo = f"{reward} --epochs 6 --buffer_size 256 --samples_per_epoch 256"
    RUNS |= {f"SF64 {name}": (single_pass, kind, sf),
             f"lr 1e-3 SF64 {name}": (single_pass, kind, f"{sf} --lr 1e-3"),
             f"IS256 {name}": (ddpo, kind, ppo),
             f"unclipped IS256 {name}": (ddpo, kind, f"{ppo} --clip_range 1000")}
RUNS |= {f"no value {kind}": (dpok, kind, "--no-value") for kind in ("count", "location")}
RUNS |= {f"jpeg beta {beta}": (dpok, "count", f"--reward jpeg --beta {beta}") for beta in BETAS}
RUNS |= {"DDPO jpeg": (ddpo, "all", "--reward jpeg"),
         "DDPO incompressibility": (ddpo, "all", "--reward incompressibility --epochs 30"),
         "DDPO jpeg kl_weight": (ddpo, "all", "--reward jpeg --kl_weight 0.3")}
QUICK = {"RL count": 12, "KL-O count": 12, "DDPO jpeg": 15}  # run: epochs
SEEDS = {name: 8 if name.startswith(("SF64", "IS256")) else 5 for name in RUNS}
STUDENT = {5: 2.78, 8: 2.36}  # standard errors from 0 to the end of a 95 % interval
# epochs after which a run is measured besides its last; 22 of SF64 take the time of 4 of IS256
STAGES = {"DDPO jpeg": (12, 24, 36), "DDPO count": (24,), "SF64 count": (22,), "SF64 jpeg": (22,),
          "IS256 count": (4,), "IS256 jpeg": (4,)}


# ---------- the runs, and what they are measured by

def arguments(name):
    _, kind, flags = RUNS[name]
    return f"--prompts {shlex.quote(KINDS[kind])} {flags}".strip() if kind in KINDS else flags


def settings(name, **more):
    """The Config of a run."""
    script, fixed = RUNS[name][0], {"device": "cpu", "precision": "fp32"}
    fixed |= {"evaluation_images": 2} if script is dpok else {"algo": "sf"} if script is single_pass else {}
    fixed |= {"sample_every": 1000} if more.get("seed") else {}  # the pictures of seed 0 are shown
    flags = [f"--{name}={value}" for name, value in (fixed | more).items()]
    with contextlib.redirect_stdout(None):
        return (dpok if script is dpok else ddpo).parse([*shlex.split(arguments(name)), *flags])


def load_model(lora=None):
    """The pre-trained model or, as stock diffusers loads it, a tuned one."""
    pipe = dpok.load_pipeline(settings("RL count"))
    if lora:
        pipe.load_lora_weights(lora)
    return pipe


def draw(pipe, prompts, count):
    """`count` images of each prompt, of seeds that no run has seen -> images, their prompts."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    generators = [dpok.generator(12345, 0, i) for i in range(len(texts))]
    return dpok.sample(pipe, texts, settings("RL count"), generators).images, texts


def score(pipe, prompts):
    images, texts = draw(pipe, prompts, 256 // len(prompts))
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    return {"alignment": shapes_reward.alignment(images, texts).mean().item(),
            "strict": shapes_reward.strict(images, texts).mean().item(),
            "size": rewards.incompressibility(images, texts).mean().item(),
            "diversity": pixels.reshape(len(prompts), -1, pixels[0].size).std(1).mean().item(),
            "images": len(images)}


def measure(kind, sets=("trained", "unseen", "other"), lora=None):
    """The scores of a model on the prompts of a kind, on their unseen partners, and on others."""
    prompts = {"trained": [KINDS[kind]] if kind in KINDS else ALL, "other": OTHER if kind in KINDS else [],
               "unseen": [partner for name, partner in UNSEEN.items() if kind in (name, "all")]}
    pipe = load_model(lora)
    return {name: score(pipe, prompts[name]) for name in sets if prompts[name]}


def write(file, content):
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, file)


def score_pretrained(kind):
    """The scores of the pre-trained model; measured once."""
    file = FOLDER / f"pre-trained {kind}.json"
    if not file.exists():
        write(file, measure(kind))
    return json.loads(file.read_text())


def run(folder, name, seed, **more):
    """Train, measure, and write measured.json last. What it prints is in <name>-<seed>.txt. A run that was
    stopped, or is of other settings, starts over."""
    torch.set_num_threads(1)
    if load(folder, name, seed, **more):
        return
    folder, (script, kind, _), stages = folder / f"{name}-{seed}", RUNS[name], {}
    config = settings(name, seed=seed, out=folder, **more)
    train = dpok.train_supervised if config.algo == "sft" else script.train
    shutil.rmtree(folder, ignore_errors=True)
    with (open(f"{folder}.txt", "w") as output, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output)):
        for epochs in [stage for stage in STAGES.get(name, ()) if stage < config.epochs] + [config.epochs]:
            train(dataclasses.replace(config, epochs=epochs, resume=str(folder) if stages else ""))
            sets = ["trained", "unseen", "other"] if epochs == config.epochs else ["trained"]
            stages[epochs] = measure(kind, sets, folder / "lora")
    write(folder / "measured.json", stages[config.epochs] | {"stages": stages})


def load(folder, name, seed, **more):
    """The scores of a run with what its log says of it; None if none with these settings is finished."""
    folder = folder / f"{name}-{seed}"
    if not (folder / "measured.json").exists():
        return None
    made, asked = json.loads((folder / "config.json").read_text()), settings(name, seed=seed, **more)
    if any(made.get(field) != value for field, value in dataclasses.asdict(asked).items()
           if field not in ("out", "sample_every")):
        return None
    with open(folder / "log.csv", newline="") as file:
        log = {column: [float(value) for value in values] for column, *values in zip(*csv.reader(file))}
    return json.loads((folder / "measured.json").read_text()) | {
        "queries": int(log["reward_queries"][-1]), "updates": len(log["epoch"]) * made["updates_per_epoch"],
        "kl": float(np.mean(log["kl"][-5:])), "minutes": sum(log["seconds"]) / 60,
        "log": {column: log[column] for column in ("reward_queries", "reward_mean", "kl", "seconds")}}


def run_all(folder, jobs, at_once):
    """jobs [(run, seed, further settings)] -> how many failed."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(at_once)
    try:
        waiting = {pool.submit(run, folder, name, seed, **more): (name, seed) for name, seed, more in jobs}
        for job in as_completed(waiting):
            print(*waiting[job], job.exception() or "is finished", flush=True)
        return sum(job.exception() is not None for job in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


# ---------- verdicts; before {kind: scores of the pre-trained model}, found {run: scores of each seed}

def standard_error(values):
    """Of the mean over seeds, the first dimension; 0 for one value."""
    return values.std(0, ddof=1) / len(values)**0.5 if len(values) > 1 else 0.0


def spread(values):
    """Mean ± standard error over seeds, as text."""
    return f"{values.mean():.2f} ± {standard_error(values):.2f}" if np.isfinite(values).all() else ""


def over_seeds(found, name, what="strict", where="trained", epochs=None):
    """One number of every seed; not a number where a run is not finished."""
    seeds = [scores["stages"][str(epochs)] if epochs else scores for scores in found.get(name, [])]
    return np.array([scores[where][what] for scores in seeds] or [np.nan])


def claims(before, found):
    """-> (section of the paper, claim, the least mean effect at which it holds, {part of it: (the runs that
    show it, the effect with each seed)})."""
    def gained(name, what="strict", where="trained", epochs=None):
        return [name], over_seeds(found, name, what, where, epochs) - before[RUNS[name][1]][where][what]

    def lost(name, what="strict", where="trained", epochs=None):
        return [name], -gained(name, what, where, epochs)[1]

    def kept(name, where="trained", epochs=None):
        return [name], 0.1 + gained(name, "strict", where, epochs)[1]

    def versus(one, other, what="strict", where="trained", epochs=(None, None)):
        a, b = (over_seeds(found, name, what, where, at) for name, at in zip((one, other), epochs))
        return [one, other], a[:len(b)] - b[:len(a)]  # some runs have eight seeds, others five

    jpeg = "DDPO jpeg"
    yield "DDPO 6.1", "DDPO makes JPEGs smaller or larger as it is asked, kB", 0, {
        "smaller": lost(jpeg, "size"), "larger": gained("DDPO incompressibility", "size")}
    yield "DDPO 6.2", "DDPO raises alignment, strict accuracy by 0.15 or more", 0.15, {
        kind: gained(f"DDPO {kind}") for kind in UNSEEN}
    text = "DDPO_IS with 64 samples and four updates an epoch is better than DDPO_SF with 64 and one,"
    yield "DDPO 6.1", f"{text} on as many reward queries", 0, {
        "count, strict accuracy": versus("DDPO count", "SF64 count", epochs=(24, None)),
        "`jpeg`, kB": versus("SF64 jpeg", jpeg, "size", epochs=(None, 24))}
    text = "DDPO_SF with 64 samples and one update an epoch is better than DDPO_IS with 256 and four,"
    for sf, ppo, terms in ((None, None, "on as many queries and updates"),
                           (22, 4, "in about the same time, 22 epochs against 4")):
        yield "", f"{text} {terms}", 0, {
            "count, strict accuracy": versus("SF64 count", "IS256 count", epochs=(sf, ppo)),
            "`jpeg`, kB": versus("IS256 jpeg", "SF64 jpeg", "size", epochs=(ppo, sf))}
    yield "DDPO A", "DDPO over-optimises `jpeg`: files shrink on after epoch 24, kB", 0, {
        "": versus(jpeg, jpeg, "size", epochs=(24, None))}
    yield "DDPO A", "… and strict accuracy is lost, in all 0.15 or more", 0.15, {"": lost(jpeg)}
    yield "DDPO A", "… and diversity", 0, {"": lost(jpeg, "diversity")}
    text = "With a remedy, DDPO on `jpeg` loses less than 0.1 of strict accuracy (0.1 − the loss)"
    yield "DDPO A", text, 0, {
        "with `--kl_weight 0.3`": kept("DDPO jpeg kl_weight"),
        "stopped after epoch 12": kept(jpeg, epochs=12)}
    yield "DDPO A", "… and files still shrink, kB", 0, {
        "with `--kl_weight 0.3`": lost("DDPO jpeg kl_weight", "size"),
        "stopped after epoch 12": lost(jpeg, "size", epochs=12)}
    yield "DPOK 5.2, 5.4", "DPOK raises strict accuracy by 0.15 or more", 0.15, {
        kind: gained(f"RL {kind}") for kind in KINDS}
    for section, other, note in (("DPOK 5.2", "KL-O", ", supervised, as set up here,"),
                                 ("DPOK 5.2", "KL-D", ", supervised, as set up here,"), ("", "DDPO", "")):
        yield section, f"DPOK is better than {other}{note} on as many reward queries, strict accuracy", 0, {
            kind: versus(f"RL {kind}", f"{other} {kind}") for kind in UNSEEN}
    text = "DPOK is better with the value function, centred, than with no baseline (`--no-value`),"
    yield "DPOK A.5", f"{text} strict accuracy", 0, {
        kind: versus(f"RL {kind}", f"no value {kind}") for kind in ("count", "location")}
    yield "DPOK Fig. 10", "DPOK raises prompts never trained on, their unseen partners, strict accuracy", 0, {
        kind: gained(f"RL {kind}", where="unseen") for kind in UNSEEN}
    yield "DDPO 6.3", "DDPO on `jpeg` makes files of captions never trained on smaller, kB", 0, {
        "": lost(jpeg, "size", "unseen")}
    text = "DPOK on `jpeg`, β 0: strict accuracy of other prompts is lost, 0.15 or more"
    yield "after DPOK 5.3", text, 0.15, {"": lost("jpeg beta 0", where="other")}
    text = "… β 0.5: less than 0.1 is lost (0.1 − the loss)"
    yield "after DPOK 5.3", text, 0, {"": kept("jpeg beta 0.5", "other")}
    yield "after DPOK 5.3", "… and files still shrink, kB", 0, {"": lost("jpeg beta 0.5", "size")}
    yield "after DPOK 5.3", "… and other prompts stay more diverse than with β 0", 0, {
        "": versus("jpeg beta 0.5", "jpeg beta 0", "diversity", "other")}


def verdict(effect, least):
    """Holds: the mean is large enough, and its 95 % interval lies above 0. Does not hold: the interval lies
    below what was asked."""
    mean, reach = effect.mean(), STUDENT[len(effect)] * standard_error(effect)
    if mean >= least and mean > reach:
        return "holds"
    return "**does not hold**" if mean + reach < least else "not shown"


# ---------- the README's tables, as lines of text

def row(*cells):
    return f"| {' | '.join(cells)} |"


def header(*columns):
    return f"\n{row(*columns)}\n{'|---' * len(columns)}|"


def group(name):
    """The method of a run that is made for each of KINDS, otherwise the run's name."""
    method, _, kind = name.partition(" ")
    return method if method in METHODS and kind in KINDS else name


def claim_table(before, found):
    yield header("paper", "claim", "effect", "on `shapes/`", "seeds", "minutes of one core",
                 "runs (commands: experiments/README.md)").strip()
    for section, claim, least, parts in claims(before, found):
        if any(np.isnan(effect).any() for _, effect in parts.values()):
            continue  # a run of it is not finished
        effects = "; ".join(f"{part} {spread(effect)}".strip() for part, (_, effect) in parts.items())
        verdicts = {part: verdict(effect, least) for part, (_, effect) in parts.items()}
        if len(set(verdicts.values())) == 1:
            verdicts = {"": verdict for verdict in verdicts.values()}
        verdicts = ", ".join(f"{part}: {says}".removeprefix(": ") for part, says in verdicts.items())
        seeds = ", ".join(sorted({str(len(effect)) for _, effect in parts.values()}))
        names = list(dict.fromkeys(name for names, _ in parts.values() for name in names))
        minutes = sum(scores["minutes"] for name in names for scores in found[name])
        groups = ", ".join(dict.fromkeys(map(group, names)))
        yield row(section, claim, effects, verdicts, seeds, f"{minutes:.0f}", groups)


def ddpo_table(before, found):
    columns = ("size", "trained"), ("strict", "trained"), ("diversity", "trained"), ("size", "unseen")
    yield header("`ddpo.py` on the 16 prompts", "after epoch", "size, kB", "strict", "diversity",
                 "size, captions never trained on")
    yield "| pre-trained | " + row(*(f"{before['all'][where][what]:.2f}" for what, where in columns))
    for name in ("DDPO jpeg", "DDPO jpeg kl_weight", "DDPO incompressibility"):
        for epochs, stage in found[name][0]["stages"].items() if name in found else ():
            yield row(f"`{RUNS[name][2]}`", epochs, *(
                spread(over_seeds(found, name, what, where, epochs)) if where in stage else ""
                for what, where in columns))


def single_pass_table(before, found):
    yield header("eight seeds", "queries", "updates", "strict, count", "size, `jpeg`, kB", "strict, `jpeg`",
                 "KL, count", "KL, `jpeg`", "minutes, count", "minutes, `jpeg`")
    for who, text in {"SF64": "DDPO_SF, `single_pass.py`, 64 an epoch", "IS256": "DDPO_IS, 256 an epoch",
                      "lr 1e-3 SF64": "DDPO_SF with `--lr 1e-3`, five seeds",
                      "unclipped IS256": "DDPO_IS with `--clip_range 1000`, five seeds"}.items():
        count, jpeg, config = f"{who} count", f"{who} jpeg", settings(f"{who} count")
        for n in (*STAGES.get(count, ()), config.epochs) if {count, jpeg} <= found.keys() else ():
            logs = [[scores["log"] for scores in found[name]] for name in (count, jpeg)]
            yield row(text, str(n * config.samples_per_epoch), str(n * config.updates_per_epoch),
                      spread(over_seeds(found, count, "strict", epochs=n)),
                      spread(over_seeds(found, jpeg, "size", epochs=n)),
                      spread(over_seeds(found, jpeg, "strict", epochs=n)),
                      *(spread(np.array([log["kl"][n - 1] for log in seeds])) for seeds in logs),
                      *(f"{np.mean([sum(log['seconds'][:n]) for log in seeds]) / 60:.2f}" for seeds in logs))


def method_table(before, found):
    yield header("strict accuracy", "pre-trained", *METHODS, "unseen partner: pre-trained", "unseen: KL-O",
                 "unseen: RL", "other prompts: pre-trained", "other: RL")
    for kind, prompt in KINDS.items():
        start = {where: f"{scores['strict']:.2f}" for where, scores in before[kind].items()}
        tuned = [spread(over_seeds(found, f"{method} {kind}")) for method in METHODS]
        unseen = [start["unseen"], *(spread(over_seeds(found, f"{method} {kind}", where="unseen"))
                                     for method in ("KL-O", "RL"))] if kind in UNSEEN else ["", "", ""]
        other = spread(over_seeds(found, f"RL {kind}", where="other"))
        yield row(prompt, start["trained"], *tuned, *unseen, start["other"], other)


def beta_table(before, found):
    columns = ("size", "trained"), ("strict", "other"), ("diversity", "other"), ("strict", "trained")
    yield header("`dpok.py --reward jpeg`", "size, kB", "strict, other prompts", "diversity, other prompts",
                 "strict, its own prompt")
    yield row("pre-trained", *(f"{before['count'][where][what]:.2f}" for what, where in columns))
    for beta in BETAS:
        yield row(f"`--beta {beta}`", *(spread(over_seeds(found, f"jpeg beta {beta}", *c)) for c in columns))


def run_table(before, found):
    yield header("runs", "command, with `--device cpu --precision fp32` and `--seed` 0, 1, …",
                 "reward queries", "updates", "minutes of one core")
    for runs in dict.fromkeys(map(group, found)):
        names, cells = [name for name in found if group(name) == runs], []
        script, _, flags = RUNS[names[0]]
        file = f"{'experiments/' if script is single_pass else ''}{script.__name__}.py"
        flags = f'--prompts "…" {flags}'.strip() if runs in METHODS else arguments(runs)
        for what in ("queries", "updates", "minutes"):
            values = [scores[what] for name in names for scores in found[name]]
            a, b = min(values), max(values)
            cells.append(f"{a:.4g}" if a == b else f"{a:.1f} to {b:.1f}")
        yield row(runs, f"`python {file} {flags}`", *cells)
    minutes = [scores["minutes"] for seeds in found.values() for scores in seeds]
    yield f"| all {len(minutes)} | | | {row(f'{sum(minutes):.0f}')}"


TABLES = claim_table, ddpo_table, single_pass_table, method_table, beta_table, run_table


# ---------- figures

def plot_curves(found):
    """Reward against reward queries: mean and standard error over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (title, names) in zip(axes, {
            "jpeg, −kB": ["DDPO jpeg", "IS256 jpeg", "SF64 jpeg", "DDPO jpeg kl_weight"],
            "incompressibility, kB": ["DDPO incompressibility"],
            'alignment, "two red squares"': ["DDPO count", "IS256 count", "SF64 count", "RL count"]}.items()):
        for name in names:
            queries = found[name][0]["log"]["reward_queries"]
            values = np.array([scores["log"]["reward_mean"] for scores in found[name]])
            mean, error = values.mean(0), standard_error(values)
            axis.plot(queries, mean, label=name)
            axis.fill_between(queries, mean - error, mean + error, alpha=0.3)
        axis.set(title=title, xlabel="reward queries", ylabel="reward")
        axis.legend()
    figure.savefig(RESULTS / "curves.png", dpi=100)


def plot_methods(before, found):
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    for axis, what, title in zip(axes, ("strict", "alignment"), ("strict, judged by", "alignment, rewarded")):
        bars = {"pre-trained": [np.array([before[kind]["trained"][what]]) for kind in KINDS]}
        for method in METHODS:
            bars[method] = [over_seeds(found, f"{method} {kind}", what) for kind in KINDS]
        for i, (label, values) in enumerate(bars.items()):
            axis.bar(np.arange(len(KINDS)) + 0.16 * i, [v.mean() for v in values], 0.15, label=label,
                     yerr=[standard_error(v) for v in values])
        axis.set(title=title, xticks=np.arange(len(KINDS)) + 0.32, xticklabels=KINDS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
    figure.savefig(RESULTS / "methods.png", dpi=100)


def plot_frontier(before, found):
    """What a weight of the KL buys: the reward against the KL, and what is lost against the reward."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for beta, colour in zip(BETAS, ("C0", "C1", "C2")):
        left.plot([], [], "o", color=colour, label=f"β {beta}")
        for scores in found[f"jpeg beta {beta}"]:
            log, reward, ringed = scores["log"], -scores["trained"]["size"], {"markeredgecolor": "black"}
            left.plot(log["kl"], log["reward_mean"], ".", color=colour, alpha=0.3, markersize=4)
            left.plot(scores["kl"], reward, "o", color=colour, **ringed)
            right.plot(reward, scores["other"]["strict"], "o", color=colour, **ringed)
    right.plot(-before["count"]["trained"]["size"], before["count"]["other"]["strict"], "k*", markersize=12)
    left.set(title="rounds of all seeds; ringed: the end, as measured", xscale="log",
             xlabel="KL to the pre-trained model, a step", ylabel="reward, −kB")
    right.set(title="what it costs; star: pre-trained", xlabel="reward, −kB", ylabel="strict, other prompts")
    left.legend()
    figure.savefig(RESULTS / "frontier.png", dpi=100)


def save_grid(file, title, images, captions, columns):
    """Images, enlarged, in rows under a title, each above its caption."""
    captions, tiles = [textwrap.fill(caption, 28) for caption in captions], []
    bottom = 10 + 13 * (1 + max(caption.count("\n") for caption in captions))
    for image, caption in zip(images, captions):
        tiles.append(ImageOps.expand(image.resize((160, 160), Image.BOX), (4, 4, 4, bottom), "white"))
        ImageDraw.Draw(tiles[-1]).text((4, 166), caption, "black", font_size=10)
    sheet = make_image_grid(tiles, len(tiles) // columns, columns)
    sheet = ImageOps.expand(sheet, (0, 24, 0, 0), "white")
    ImageDraw.Draw(sheet).text((4, 6), title, "black", font_size=12)
    sheet.save(file)


def draw_images(file, title, rows, prompts):
    """Two images of each prompt, the same seeds below each other as in DPOK's Fig. 2. A row has a run for
    each prompt, shown by its seed 0, or None for the pre-trained model."""
    cells, captions = [], []
    for names in rows:
        for name, prompt in zip(names, prompts):
            images, texts = draw(load_model(name and FOLDER / f"{name}-0" / "lora"), [prompt], 2)
            cells += images
            captions += [f"{right:.0f} {prompt}" for right in shapes_reward.strict(images, texts)]
    save_grid(RESULTS / file, title, cells, captions, 2 * len(prompts))


def draw_all_images():
    """Figures of images, of seed 0; some are grids that the scripts left."""
    rows = [[name and f"{name} {kind}" for kind in UNSEEN] for name in (None, "KL-O", "RL")]
    draw_images("dpok-methods.png", "rows: pre-trained, supervised (KL-O), RL; 1 is strictly right", rows,
                [KINDS[kind] for kind in UNSEEN])
    rows = [[None] * 5, *([f"jpeg beta {beta}"] * 5 for beta in BETAS)]
    title = f"reward jpeg on one prompt, images of others; rows: pre-trained, beta {', '.join(BETAS)}"
    draw_images("dpok-beta.png", title, rows, OTHER[::2][:5])
    for name, picture, file in (("DDPO jpeg", "progress", "ddpo-jpeg"), ("RL bias", "progress", "dpok-bias"),
                                ("DDPO count", "comparison", "ddpo-alignment"),
                                ("DDPO jpeg kl_weight", "comparison", "ddpo-jpeg-kl")):
        shutil.copy(FOLDER / f"{name}-0" / f"{picture}.png", RESULTS / f"{file}.png")


def quick(at_once):
    """Trends only -> how many runs failed."""
    folder = HERE.parent / "runs" / "claims-quick"
    failed = run_all(folder, [(name, 0, {"epochs": epochs}) for name, epochs in QUICK.items()], at_once)
    print("one seed, short runs: trends, no verdicts")
    for name, epochs in QUICK.items():
        scores, start = load(folder, name, 0, epochs=epochs), score_pretrained(RUNS[name][1])["trained"]
        for what in ("size", "strict") if scores else ():
            print(f"{name}, {epochs} epochs: {what} {start[what]:.2f} → {scores['trained'][what]:.2f}")
    return failed


def main():
    """Exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    options = parser.parse_args()
    torch.set_num_threads(1)  # here as in the runs
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.quick:
        return int(quick(options.jobs) > 0)
    names = [name for name in RUNS if options.only in name]
    if not names:
        parser.error(f"only {options.only!r} is in the name of no run; the runs are {', '.join(RUNS)}")
    jobs = [(name, seed, {}) for seed in range(8) for name in names if seed < SEEDS[name]]
    failed = run_all(FOLDER, jobs, options.jobs)
    before = {kind: score_pretrained(kind) for kind in (*KINDS, "all")}
    found = {name: [load(FOLDER, name, seed) for seed in range(SEEDS[name])] for name in RUNS}
    found = {name: scores for name, scores in found.items() if all(scores)}
    lines = [line for table in TABLES for line in table(before, found)]
    print("\n".join(lines))
    if found.keys() == RUNS.keys():
        write(RESULTS / "claims.json", {"pre-trained": before, "runs": found, "tables": lines})
        plot_curves(found)
        plot_methods(before, found)
        plot_frontier(before, found)
        draw_all_images()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
