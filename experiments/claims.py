"""The claims of both papers that a laptop can show, tried on shapes/ with five seeds or eight: runs, measurements, verdicts, tables and figures.

    python experiments/claims.py               everything, two runs at a time on two cores
    python experiments/claims.py --only count  the runs that have this in their name; then the tables of all that is finished
    python experiments/claims.py --quick       shorter runs of one seed, within ten minutes: trends, no verdicts
What is finished is not repeated, so it may be stopped and started again; after a change of shapes/ or of the scripts delete runs/.

A run is `python ddpo.py` or `python dpok.py` with the arguments of RUNS, in runs/claims/<name>-<seed>/. The tuned model is then measured on
images of seeds that no run has seen, the same for every model. `alignment` and `size` (of the JPEG, kB) are what runs are rewarded with;
`strict`, with which none is, is the share of images that are just what their caption says; `diversity` is how far the images of one caption
differ: the standard deviation of a pixel's value (0 to 1) between them. Once all is finished the numbers, as claims.json, and the figures go to
experiments/results/, until then to runs/claims/.
"""
import argparse
import contextlib
import csv
import dataclasses
import json
import shlex
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "shapes")]
import ddpo  # noqa: E402
import dpok  # noqa: E402
import rewards  # noqa: E402
import shapes_reward  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FOLDER, RESULTS = HERE.parent / "runs" / "claims", HERE / "results"
KINDS = dict(zip(("colour", "count", "composition", "location"), dpok.PROMPTS["shapes"])) | {"bias": "four red circles"}
ALIGNMENT = ["--reward", "shapes/shapes_reward.py:alignment"]
METHODS = {"KL-O": (dpok, ["--algo", "sft", "--lr", "3e-3"]), "KL-D": (dpok, ["--algo", "sft", "--lr", "3e-3", "--kl_d"]),
           "DDPO": (ddpo, [*ALIGNMENT, "--epochs", "30"]), "RL": (dpok, [])}
BETAS = "0", "0.1", "0.5"
# run: (script, its prompts, which are one of KINDS or all 16 of shapes/prompts.txt, its other arguments)
RUNS = {f"{method} {kind}": (script, kind, arguments) for method, (script, arguments) in METHODS.items() for kind in KINDS
        if kind != "bias" or method == "RL"}
for name, (kind, reward) in {"count": ("count", ALIGNMENT), "jpeg": ("all", ["--reward", "jpeg"])}.items():  # as many queries and updates
    sf = [*reward, "--epochs", "24", "--buffer_size", "64", "--algo", "sf", "--single_pass"]
    ppo = [*reward, "--epochs", "6", "--buffer_size", "256", "--samples_per_epoch", "256"]
    RUNS |= {f"SF64 {name}": (ddpo, kind, sf), f"lr 1e-3 SF64 {name}": (ddpo, kind, [*sf, "--lr", "1e-3"]),
             f"IS256 {name}": (ddpo, kind, ppo), f"unclipped IS256 {name}": (ddpo, kind, [*ppo, "--clip_range", "1000"])}
RUNS |= {f"no value {kind}": (dpok, kind, ["--no-value"]) for kind in ("count", "location")}
RUNS |= {f"jpeg beta {beta}": (dpok, "count", ["--reward", "jpeg", "--beta", beta]) for beta in BETAS}
RUNS |= {f"DDPO {name}": (ddpo, "all", ["--reward", *arguments]) for name, arguments in {
    "jpeg": ["jpeg"], "incompressibility": ["incompressibility", "--epochs", "30"],
    "jpeg kl_weight": ["jpeg", "--kl_weight", "0.3"]}.items()}
SEEDS = {name: 8 if name.startswith(("SF64", "IS256")) else 5 for name in RUNS}
STUDENT = {5: 2.78, 8: 2.36}  # standard errors from 0 to the end of a 95 % interval
# epochs after which a run is measured besides its last; 22 of SF64 take the time of 4 of IS256
STAGES = {"DDPO jpeg": (12, 24, 36), "DDPO count": (24,)} | {f"{name} {kind}": (epochs,) for name, epochs in {"SF64": 22, "IS256": 4}.items()
                                                             for kind in ("count", "jpeg")}
# prompts besides its own that a run is measured on, those that a table asks for, by how its name begins
ALSO = {"RL": ("unseen", "other"), "KL-O": ("unseen",), "jpeg": ("other",), "DDPO jpeg": ("unseen",), "DDPO incompressibility": ("unseen",)}
PROMPTS = {kind: [prompt] for kind, prompt in KINDS.items()} | {"all": dpok.load_prompts("shapes/prompts.txt")}
# for runs on one prompt: the prompts of shapes/ that no such run trains on and that are no unseen partner of theirs
OTHER = [p for p in PROMPTS["all"] if p not in KINDS.values() and p not in dpok.UNSEEN.values()]
QUICK = {"RL count": 12, "KL-O count": 12, "DDPO jpeg": 15}  # run: epochs


def arguments(name):
    script, kind, others = RUNS[name]
    return (["--prompts", KINDS[kind]] if kind in KINDS else []) + others


def group(name):
    """The method of a run that is made for each of KINDS, otherwise the run's name."""
    method, _, kind = name.partition(" ")
    return method if method in METHODS and kind in KINDS else name


def settings(name, **more):
    script = RUNS[name][0]
    pictures = {"sample_every": 1000} if more.get("seed") else {}  # those of seed 0 are shown
    more = {"device": "cpu", "precision": "fp32", **pictures, **({"evaluation_images": 2} if script is dpok else {}), **more}
    with contextlib.redirect_stdout(None):
        return script.parse([*arguments(name), *(f"--{flag}={value}" for flag, value in more.items())])


# ---------------------------------------------------------------- the runs, and what they are measured by

def draw(pipe, config, prompts, count):
    """`count` images of each prompt, of seeds that no run has seen -> images, their prompts."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    return dpok.sample(pipe, texts, config, dpok.generators(12345, 0, range(len(texts)))).images, texts


def score(pipe, config, prompts, count):
    images, texts = draw(pipe, config, prompts, count)
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images]).reshape(len(prompts), count, -1)
    return {"alignment": shapes_reward.alignment(images, texts).mean().item(), "strict": shapes_reward.strict(images, texts).mean().item(),
            "size": rewards.jpeg_size(images).mean().item(), "diversity": pixels.std(1).mean().item(), "images": len(images)}


def prompt_sets(kind, wanted=("unseen", "other")):
    """The prompts of a kind and, as far as wanted and there, their unseen partners and others."""
    sets = {"unseen": [dpok.UNSEEN[prompt] for prompt in PROMPTS[kind] if prompt in dpok.UNSEEN], "other": OTHER if kind in KINDS else []}
    return {"trained": PROMPTS[kind]} | {name: sets[name] for name in wanted if sets[name]}


def also(name):
    return next((wanted for start, wanted in ALSO.items() if name.startswith(start)), ())


def measure(sets, config, lora=None):
    """The pre-trained model, or a tuned one -> its scores on sets of prompts."""
    pipe = dpok.load_pipeline(config)
    if lora:
        dpok.load_lora(pipe.unet, lora)
    return {name: score(pipe, config, prompts, 256 // len(prompts)) for name, prompts in sets.items()}


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def write(file, scores):
    dpok.replace(file, (json.dumps(scores, indent=1) + "\n").encode())


def score_pretrained(kind):
    """The scores of the pre-trained model; measured once."""
    file = FOLDER / f"pre-trained {kind}.json"
    if not file.exists():
        write(file, measure(prompt_sets(kind), settings(next(name for name in RUNS if RUNS[name][1] == kind))))
    return read(file)


def finished(folder, name, config):
    """Whether the run is there with these settings, wherever the project lay when it was made, and measured on all and after all its stages."""
    script, kind, _ = RUNS[name]
    try:
        measured, ran = read(folder / "measured.json"), script.Config(**read(folder / "config.json"))
    except (OSError, ValueError, TypeError):  # not there, cut short, or of an older Config
        return False
    made, asked = ({name: Path(value).name if type(value) is str else value for name, value in dataclasses.asdict(c).items()
                    if name not in ("out", "sample_every")} for c in (ran, config))
    stages = {str(epochs) for epochs in STAGES.get(name, ()) if epochs < config.epochs}
    return made == asked and stages <= measured.get("stages", {}).keys() and prompt_sets(kind, also(name)).keys() <= measured.keys()


def run(folder, name, seed, **more):
    """Train, measure, and write measured.json last. A run without it was stopped, and one of other settings is out of date: both start over. What
    it prints is in <name>-<seed>.txt."""
    torch.set_num_threads(1)
    folder, (script, kind, _) = folder / f"{name}-{seed}", RUNS[name]
    with open(f"{folder}.txt", "a", encoding="utf-8") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        config = settings(name, seed=seed, out=folder, **more)
        if finished(folder, name, config):
            return
        shutil.rmtree(folder, ignore_errors=True)
        scores = {"stages": {}}
        for epochs in (*STAGES.get(name, ()), config.epochs):
            if epochs <= config.epochs:
                script.train(dataclasses.replace(config, epochs=epochs, resume=str(folder) if scores["stages"] else ""))
                scores["stages"][epochs] = measure(prompt_sets(kind, also(name) if epochs == config.epochs else ()), config, folder / "lora")
    write(folder / "measured.json", scores["stages"][config.epochs] | scores)


def load(folder, name, seed, **more):
    """The scores of a finished run with what its log says of it, or None."""
    folder = folder / f"{name}-{seed}"
    if not finished(folder, name, settings(name, seed=seed, out=folder, **more)):
        return None
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        log = {column: [float(value) for value in values] for column, *values in zip(*csv.reader(file))}
    return read(folder / "measured.json") | {
        "queries": int(log["reward_queries"][-1]), "updates": len(log["epoch"]) * read(folder / "config.json")["updates_per_epoch"],
        "kl": float(np.mean(log["kl"][-5:])), "minutes": sum(log["seconds"]) / 60,
        "log": {column: log[column] for column in ("reward_queries", "reward_mean", "kl", "seconds")}}


def run_all(folder, jobs, at_once):
    """jobs [(run, seed, further settings)] -> how many failed; they are named as they do."""
    failed = 0
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(at_once) as pool:
        try:
            waiting = {pool.submit(run, folder, name, seed, **more): f"{name}, seed {seed}" for name, seed, more in jobs}
            for job in tqdm(as_completed(waiting), "runs", len(jobs)):
                if job.exception():
                    failed += 1
                    tqdm.write(f"{waiting[job]} failed: {job.exception()}", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


# ---------------------------------------------------------------- verdicts and tables

def standard_error(values):
    """Of the mean over seeds, the first dimension; 0 for one value."""
    return values.std(0, ddof=1) / len(values)**0.5 if len(values) > 1 else 0.0


def spread(values):
    """Mean ± standard error over seeds, as text."""
    return f"{values.mean():.2f} ± {standard_error(values):.2f}" if np.isfinite(values).all() else ""


def over_seeds(found, name, where="trained", what="strict", epochs=None):
    """One number of every seed; not a number where a run is not finished."""
    seeds = found.get(name, [])
    seeds = [scores["stages"][str(epochs)] if epochs else scores for scores in seeds]
    return np.array([scores[where][what] for scores in seeds]) if seeds else np.array([np.nan])


def claims(before, found):
    """-> (section of the paper, claim, the least mean effect at which it holds, {what: (the runs it rests on, the effect with each seed)})."""
    def gain(name, where="trained", what="strict", epochs=None):
        return over_seeds(found, name, where, what, epochs) - before[RUNS[name][1]][where][what]

    def versus(one, other, where="trained", what="strict", epochs=(None, None)):
        a, b = (over_seeds(found, name, where, what, at) for name, at in zip((one, other), epochs))
        return (one, other), a[:len(b)] - b[:len(a)]  # some runs have eight seeds, others five

    size, later = {"what": "size"}, over_seeds(found, "DDPO jpeg", what="size", epochs=24) - over_seeds(found, "DDPO jpeg", what="size")
    yield "DDPO 6.1", "DDPO makes JPEGs smaller or larger as it is asked, kB", 0, {
        "smaller": (["DDPO jpeg"], -gain("DDPO jpeg", **size)), "larger": (["DDPO incompressibility"], gain("DDPO incompressibility", **size))}
    yield "DDPO 6.2", "DDPO raises alignment, strict accuracy by 0.15 or more", 0.15, {
        kind: ([f"DDPO {kind}"], gain(f"DDPO {kind}")) for kind in KINDS if f"DDPO {kind}" in RUNS}
    yield "DDPO 6.1", "DDPO_IS with 64 samples and four updates an epoch is better than DDPO_SF with 64 and one, on as many reward queries", 0, {
        "count, strict accuracy": versus("DDPO count", "SF64 count", epochs=(24, None)),
        "`jpeg`, kB": versus("SF64 jpeg", "DDPO jpeg", **size, epochs=(None, 24))}
    for text, epochs in {"on as many queries and updates": (None, None), "in about the same time, 22 epochs against 4": (22, 4)}.items():
        yield "", f"DDPO_SF with 64 samples and one update an epoch is better than DDPO_IS with 256 and four, {text}", 0, {
            "count, strict accuracy": versus("SF64 count", "IS256 count", epochs=epochs),
            "`jpeg`, kB": versus("IS256 jpeg", "SF64 jpeg", **size, epochs=epochs[::-1])}
    yield "DDPO A", "DDPO over-optimises `jpeg`: files shrink on after epoch 24, kB", 0, {"": (["DDPO jpeg"], later)}
    yield "DDPO A", "… and strict accuracy is lost, in all 0.15 or more", 0.15, {"": (["DDPO jpeg"], -gain("DDPO jpeg"))}
    yield "DDPO A", "… and diversity", 0, {"": (["DDPO jpeg"], -gain("DDPO jpeg", what="diversity"))}
    remedies = {"with `--kl_weight 0.3`": ("DDPO jpeg kl_weight", None), "stopped after epoch 12": ("DDPO jpeg", 12)}
    yield "DDPO A", "With a remedy, DDPO on `jpeg` loses less than 0.1 of strict accuracy (0.1 − the loss)", 0, {
        text: ([name], 0.1 + gain(name, epochs=epochs)) for text, (name, epochs) in remedies.items()}
    yield "DDPO A", "… and files still shrink, kB", 0, {text: ([name], -gain(name, **size, epochs=epochs)) for text, (name, epochs) in remedies.items()}
    yield "DPOK 5.2, 5.4", "DPOK raises strict accuracy by 0.15 or more", 0.15, {kind: ([f"RL {kind}"], gain(f"RL {kind}")) for kind in KINDS}
    for other, who in {"KL-O": "KL-O, supervised, as set up here,", "KL-D": "KL-D, supervised, as set up here,", "DDPO": "DDPO"}.items():
        yield "DPOK 5.2" if other != "DDPO" else "", f"DPOK is better than {who} on as many reward queries, strict accuracy", 0, {
            kind: versus(f"RL {kind}", f"{other} {kind}") for kind in KINDS if f"{other} {kind}" in RUNS}
    yield "DPOK A.5", "DPOK is better with the value function, centred, than with no baseline (`--no-value`), strict accuracy", 0, {
        kind: versus(f"RL {kind}", f"no value {kind}") for kind in KINDS if f"no value {kind}" in RUNS}
    yield "DPOK Fig. 10", "DPOK raises prompts never trained on, their unseen partners, strict accuracy", 0, {
        kind: ([f"RL {kind}"], gain(f"RL {kind}", "unseen")) for kind in KINDS if "unseen" in before[kind]}
    yield "DDPO 6.3", "DDPO on `jpeg` makes files of captions never trained on smaller, kB", 0, {"": (["DDPO jpeg"], -gain("DDPO jpeg", "unseen", "size"))}
    free, held = "jpeg beta 0", f"jpeg beta {BETAS[-1]}"
    yield "after DPOK 5.3", "DPOK on `jpeg`, β 0: strict accuracy of other prompts is lost, 0.15 or more", 0.15, {"": ([free], -gain(free, "other"))}
    yield "after DPOK 5.3", f"… β {BETAS[-1]}: less than 0.1 is lost (0.1 − the loss)", 0, {"": ([held], 0.1 + gain(held, "other"))}
    yield "after DPOK 5.3", "… and files still shrink, kB", 0, {"": ([held], -gain(held, **size))}
    yield "after DPOK 5.3", "… and other prompts stay more diverse than with β 0", 0, {"": versus(held, free, "other", "diversity")}


def verdict(effect, least):
    """Holds: the mean is large enough, and its 95 % interval lies above 0. Does not hold: the interval lies below what was asked."""
    mean, reach = effect.mean(), STUDENT[len(effect)] * standard_error(effect)
    return "holds" if mean >= least and mean > reach else "**does not hold**" if mean + reach < least else "not shown"


# before {kind: scores of the pre-trained model}, found {run: scores of each seed} -> lines of the README's tables

def claim_table(before, found):
    missing = 0
    yield "| paper | claim | effect | on `shapes/` | seeds | minutes of one core | runs (commands: experiments/README.md) |\n|---|---|---|---|---|---|---|"
    for section, text, least, parts in claims(before, found):
        judged = {label: verdict(effect, least) for label, (_, effect) in parts.items() if np.isfinite(effect).all()}
        if not judged:
            missing += 1
            continue
        verdicts = ", ".join(set(judged.values()) if len(set(judged.values())) == 1 else (f"{label}: {says}" for label, says in judged.items()))
        verdicts += ", the others are not run" if len(judged) < len(parts) else ""
        effects = "; ".join(f"{label} {spread(effect)}".strip() for label, (_, effect) in parts.items() if label in judged)
        names = list(dict.fromkeys(name for label in judged for name in parts[label][0]))
        seeds = ", ".join(sorted({str(len(parts[label][1])) for label in judged}))
        minutes = sum(scores["minutes"] for name in names for scores in found.get(name, []))
        yield f"| {section} | {text} | {effects} | {verdicts} | {seeds} | {minutes:.0f} | {', '.join(dict.fromkeys(group(name) for name in names))} |"

    if missing:
        yield f"\n{missing} more claims wait for their runs."


def ddpo_table(before, found):
    columns = [("trained", what) for what in ("size", "strict", "diversity")] + [("unseen", "size")]
    yield "\n| `ddpo.py` on the 16 prompts | after epoch | size, kB | strict | diversity | size, captions never trained on |\n|---|---|---|---|---|---|"
    yield "| pre-trained | | " + " | ".join(f"{before['all'][where][what]:.2f}" for where, what in columns) + " |"
    for name in ("DDPO jpeg", "DDPO jpeg kl_weight", "DDPO incompressibility"):
        for epochs in found[name][0]["stages"] if name in found else ():
            values = [spread(over_seeds(found, name, *column, epochs)) if column[0] in found[name][0]["stages"][epochs] else "" for column in columns]
            yield f"| `{shlex.join(RUNS[name][2])}` | {epochs} | " + " | ".join(values) + " |"


def single_pass_table(before, found):
    yield ("\n| eight seeds | queries | updates | strict, count | size, `jpeg`, kB | strict, `jpeg` | KL, count | KL, `jpeg` | minutes, count | minutes, `jpeg` |\n"
           f"{'|---' * 10}|")
    for who, text, samples, updates in (
            ("SF64", "DDPO_SF, `--single_pass`, 64 an epoch", 64, 1), ("IS256", "DDPO_IS, 256 an epoch", 256, 4),
            ("lr 1e-3 SF64", "DDPO_SF with `--lr 1e-3`, five seeds", 64, 1), ("unclipped IS256", "DDPO_IS with `--clip_range 1000`, five seeds", 256, 4)):
        count, jpeg = f"{who} count", f"{who} jpeg"
        for epochs in STAGES.get(count, ()) + (settings(count).epochs,) if {count, jpeg} <= found.keys() else ():
            values = [spread(over_seeds(found, name, what=what, epochs=epochs)) for name, what in ((count, "strict"), (jpeg, "size"), (jpeg, "strict"))]
            logs = [[scores["log"] for scores in found[name]] for name in (count, jpeg)]
            values += [spread(np.array([log["kl"][epochs - 1] for log in seeds])) for seeds in logs]
            values += [f"{np.mean([sum(log['seconds'][:epochs]) for log in seeds]) / 60:.2f}" for seeds in logs]
            yield f"| {text} | {samples * epochs} | {updates * epochs} | " + " | ".join(values) + " |"


def method_table(before, found):
    methods = [method for method in METHODS if any(f"{method} {kind}" in found for kind in KINDS)]
    if not methods:
        return
    yield (f"\n| strict accuracy | pre-trained | {' | '.join(methods)} | unseen partner: pre-trained | unseen: KL-O | unseen: RL | other prompts: pre-trained | other: RL |\n"
           f"{'|---' * (len(methods) + 7)}|")
    for kind, prompt in KINDS.items():
        tuned = [spread(over_seeds(found, f"{method} {kind}")) for method in methods]
        unseen = [f"{before[kind]['unseen']['strict']:.2f}", *(spread(over_seeds(found, f"{method} {kind}", "unseen")) for method in ("KL-O", "RL"))
                  ] if "unseen" in before[kind] else ["", "", ""]
        other = [f"{before[kind]['other']['strict']:.2f}", spread(over_seeds(found, f"RL {kind}", "other"))]
        yield f"| {prompt} | {before[kind]['trained']['strict']:.2f} | " + " | ".join(tuned + unseen + other) + " |"


def beta_table(before, found):
    columns = ("trained", "size"), ("other", "strict"), ("other", "diversity"), ("trained", "strict")
    yield "\n| `dpok.py --reward jpeg` | size, kB | strict, other prompts | diversity, other prompts | strict, its own prompt |\n|---|---|---|---|---|"
    yield "| pre-trained | " + " | ".join(f"{before['count'][where][what]:.2f}" for where, what in columns) + " |"
    for beta in (beta for beta in BETAS if f"jpeg beta {beta}" in found):
        yield f"| `--beta {beta}` | " + " | ".join(spread(over_seeds(found, f"jpeg beta {beta}", *column)) for column in columns) + " |"


def run_table(before, found):
    yield "\n| runs | command, with `--device cpu --precision fp32` and `--seed` 0, 1, … | reward queries | updates | minutes of one core |\n|---|---|---|---|---|"
    for runs in dict.fromkeys(map(group, RUNS)):
        names = [name for name in RUNS if group(name) == runs]
        seeds = [scores for name in names for scores in found.get(name, [])]
        if seeds:
            ranges = ((min(values), max(values)) for values in ([scores[what] for scores in seeds] for what in ("queries", "updates", "minutes")))
            command = f"python {RUNS[names[0]][0].__name__}.py " + ('--prompts "…" ' if runs in METHODS else "")
            command += shlex.join(RUNS[names[0]][2] if runs in METHODS else arguments(runs))
            yield f"| {runs} | `{command.strip()}` | " + " | ".join(f"{a:.4g}" if a == b else f"{a:.1f} to {b:.1f}" for a, b in ranges) + " |"
    yield f"| all {sum(map(len, found.values()))} | | | | {sum(scores['minutes'] for seeds in found.values() for scores in seeds):.0f} |"


TABLES = claim_table, ddpo_table, single_pass_table, method_table, beta_table, run_table


# ---------------------------------------------------------------- figures

def curve(axis, found, name, label):
    """Reward against reward queries: mean and standard error over seeds."""
    logs = [scores["log"] for scores in found.get(name, [])]
    if logs:
        values = np.array([log["reward_mean"] for log in logs])
        mean, error = values.mean(0), standard_error(values)
        axis.plot(logs[0]["reward_queries"], mean, label=label)
        axis.fill_between(logs[0]["reward_queries"], mean - error, mean + error, alpha=0.3)


def draw_figures(folder, before, found):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (title, label, runs) in zip(axes, [
            ("jpeg", "reward, -kB", {"DDPO jpeg": "DDPO_IS", "IS256 jpeg": "DDPO_IS, 256 an epoch", "SF64 jpeg": "DDPO_SF",
                                     "DDPO jpeg kl_weight": "DDPO_IS, KL penalty"}),
            ("incompressibility", "reward, kB", {"DDPO incompressibility": "DDPO_IS"}),
            ("alignment, \"two red squares\"", "reward", {"DDPO count": "DDPO_IS", "IS256 count": "DDPO_IS, 256 an epoch", "SF64 count": "DDPO_SF",
                                                        "RL count": "DPOK"})]):
        for name, text in runs.items():
            curve(axis, found, name, text)
        axis.set(title=title, xlabel="reward queries", ylabel=label)
        if axis.lines:
            axis.legend()
    figure.savefig(folder / "curves.png", dpi=100)

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    methods = ["pre-trained", *(method for method in METHODS if any(f"{method} {kind}" in found for kind in KINDS))]
    for axis, what in zip(axes, ("strict", "alignment")):
        for i, method in enumerate(methods):
            values = [over_seeds(found, f"{method} {kind}", what=what) if i else np.array([before[kind]["trained"][what]]) for kind in KINDS]
            axis.bar(np.arange(len(KINDS)) + i * 0.16, [v.mean() for v in values], 0.15, yerr=[standard_error(v) for v in values], label=method)
        axis.set(title=f"{what}, {'judged by' if what == 'strict' else 'rewarded'}", xticks=np.arange(len(KINDS)) + 0.08 * (len(methods) - 1), xticklabels=KINDS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
    figure.savefig(folder / "methods.png", dpi=100)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for beta in (beta for beta in BETAS if f"jpeg beta {beta}" in found):
        for scores in found.get(f"jpeg beta {beta}", []):
            axes[0].plot(scores["log"]["kl"], scores["log"]["reward_mean"], ".", color=f"C{BETAS.index(beta)}", alpha=0.3, markersize=4)
            axes[0].plot(scores["kl"], -scores["trained"]["size"], "o", color=f"C{BETAS.index(beta)}", markeredgecolor="black")
            axes[1].plot(-scores["trained"]["size"], scores["other"]["strict"], "o", color=f"C{BETAS.index(beta)}", markeredgecolor="black")
        axes[0].plot([], [], "o", color=f"C{BETAS.index(beta)}", label=f"β {beta}")
    axes[1].plot(-before["count"]["trained"]["size"], before["count"]["other"]["strict"], "*", color="black", markersize=12)
    axes[0].set(title="rounds of all seeds; ringed: the end, as measured", xlabel="KL to the pre-trained model, a step", ylabel="reward, −kB", xscale="log")
    axes[1].set(title="what it costs; star: pre-trained", xlabel="reward, −kB", ylabel="strict, other prompts")
    if axes[0].lines:
        axes[0].legend()
    figure.savefig(folder / "frontier.png", dpi=100)


def draw_images(file, title, rows, prompts, count):
    """The same seeds below each other as in DPOK's Fig. 2, seed 0 of each run; rows [run, or None for the pre-trained model]."""
    config, cells, captions = settings("RL count"), [], []
    for names in rows:  # a run for each prompt
        for name, prompt in zip(names, prompts):
            pipe = dpok.load_pipeline(config)
            if name:
                dpok.load_lora(pipe.unet, FOLDER / f"{name}-0" / "lora")
            images, texts = draw(pipe, config, [prompt], count)
            cells += images
            captions += [f"{right:.0f} {text}" for right, text in zip(shapes_reward.strict(images, texts), texts)]
    dpok.draw_samples(file, title, cells, captions, columns=len(prompts) * count, size=160, text=10)


def draw_all_images(folder, found):
    """Figures of images, as far as their runs are finished; the grids that the scripts left are of seed 0."""
    kinds, betas = list(KINDS)[:4], [beta for beta in BETAS if f"jpeg beta {beta}" in found]
    supervised, rl = ([f"{method} {kind}" for kind in kinds] for method in ("KL-O", "RL"))
    if {*supervised, *rl} <= found.keys():
        draw_images(folder / "dpok-methods.png", "rows: pre-trained, supervised (KL-O), RL; 1 is strictly right", [[None] * 4, supervised, rl],
                    [KINDS[kind] for kind in kinds], 2)
    if betas:
        title = f"reward jpeg on one prompt, images of others; rows: pre-trained, {', '.join(f'beta {beta}' for beta in betas)}"
        draw_images(folder / "dpok-beta.png", title, [[None] * 5, *([f"jpeg beta {beta}"] * 5 for beta in betas)], OTHER[::2][:5], 2)
    for name, (run, picture) in {"ddpo-jpeg": ("DDPO jpeg", "progress"), "ddpo-alignment": ("DDPO count", "comparison"),
                                 "ddpo-jpeg-kl": ("DDPO jpeg kl_weight", "comparison"), "dpok-bias": ("RL bias", "progress")}.items():
        if run in found:
            shutil.copy(FOLDER / f"{run}-0" / f"{picture}.png", folder / f"{name}.png")


def quick(at_once):
    """Trends only -> how many runs failed."""
    folder = HERE.parent / "runs" / "claims-quick"
    failed = run_all(folder, [(name, 0, {"epochs": epochs}) for name, epochs in QUICK.items()], at_once)
    print("one seed, short runs: trends, no verdicts\n\n| run | epochs | size, kB | strict | minutes |\n|---|---|---|---|---|")
    for name, epochs in QUICK.items():
        scores, start = load(folder, name, 0, epochs=epochs), score_pretrained(RUNS[name][1])["trained"]
        if scores:
            pairs = " | ".join(f"{start[what]:.2f} → {scores['trained'][what]:.2f}" for what in ("size", "strict"))
            print(f"| {name} | {epochs} | {pairs} | {scores['minutes']:.1f} |")
    return failed


def main():
    """Exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    options = parser.parse_args()
    torch.set_num_threads(1)  # here as in the runs
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.quick:
        return int(quick(options.jobs) > 0)
    jobs = [(name, seed, {}) for seed in range(8) for name in RUNS if options.only in name and seed < SEEDS[name]]
    if not jobs:
        parser.error(f"only {options.only!r} is in the name of no run; the runs are {', '.join(RUNS)}")
    failed = run_all(FOLDER, jobs, options.jobs)
    before = {kind: score_pretrained(kind) for kind in PROMPTS}
    found = {name: [load(FOLDER, name, seed) for seed in range(SEEDS[name])] for name in RUNS}
    found = {name: scores for name, scores in found.items() if all(scores)}
    folder = RESULTS if found.keys() == RUNS.keys() else FOLDER
    lines = [line for table in TABLES for line in table(before, found)]
    print("\n".join(lines))
    folder.mkdir(exist_ok=True)
    write(folder / "claims.json", {"pre-trained": before, "runs": found, "tables": lines})
    draw_figures(folder, before, found)
    draw_all_images(folder, found)
    print(f"numbers and figures are in {folder}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
