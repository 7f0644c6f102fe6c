"""The claims of both papers that a laptop can show, tried on shapes/ with eight seeds each and more.

    python experiments/claims.py                # the runs that results/claims.json lacks, two at a time
    python experiments/claims.py --only location --count 16                # more seeds of those named so
    python experiments/claims.py --only "RL count" --seeds 200 201         # other seeds beside the recorded
    python experiments/claims.py --quick        # three short runs, ten minutes: trends, no verdicts

A run is a script with the arguments of RUNS, in runs/claims/<name>-<seed>/. results/claims.json has a line
for each that is finished, and is also the cache: what stands there with the same settings is not repeated,
so this may be stopped by Ctrl-C and begun again (after a change of shapes/ or of the scripts delete its
lines). The tables go to experiments/README.md.

A model is measured on images of seeds that no training saw, new ones for every seed and epoch, so that their
error is part of the spread over seeds: at the last epoch and two and four before, of which the mean counts
(in DDPO's Fig. 4, at equal queries, the last alone), and at those of STAGES. `alignment` and
`size` (of the JPEG, kB) are what runs are rewarded with. `strict`, with which none is, is the share of images
that are just what their caption says; `diversity` is the standard deviation of a pixel (0 to 1) between the
images of one caption, root mean square.
"""
import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "shapes"), str(HERE)]
import ddpo  # noqa: E402
import dpok  # noqa: E402
import rewards  # noqa: E402
import rwr  # noqa: E402
import shapes_reward  # noqa: E402
import single_pass  # noqa: E402

logging.set_verbosity_error()  # not that the text encoder has no LoRA

FOLDER, PAGE = HERE.parent / "runs" / "claims", HERE / "README.md"
RECORDED = HERE / "results" / "claims.json"
KINDS = {"colour": "a green square", "count": "two red squares",
         "composition": "a red circle and a blue square", "location": "a blue circle on the left",
         "bias": "four red circles"}
UNSEEN = {"colour": "a green circle", "count": "two blue squares",
          "composition": "a red circle and a blue triangle", "location": "a blue square on the left"}
ALL = dpok.load_prompts("shapes/prompts.txt")
OTHER = [prompt for prompt in ALL if prompt not in (*KINDS.values(), *UNSEEN.values())]
FIRST, BLOCKS = 100, 8  # no setting was chosen on seeds 100, 101, ...; of 128 images of the pre-trained model

# run: (script, its prompts, which are one of KINDS or all of shapes/prompts.txt, its other arguments)
ALIGNMENT, SFT = "--reward shapes/shapes_reward.py:alignment", "--algo sft --lr 3e-3"
EPOCHS = {kind: f"--epochs {30 if kind == 'location' else 20}" for kind in KINDS}  # of 64 images
REWARDS = {"jpeg": ("all", "--reward jpeg", 32), "count": ("count", ALIGNMENT, 20),
           "incompressibility": ("all", "--reward incompressibility", 32)}  # of DDPO's Fig. 4
WEIGHTED, BETAS = {"RWR": "", "RWR_sparse": " --algo sparse"}, ("0", "0.5")
RUNS = {f"DDPO {name}": (ddpo, kind, f"{reward} --epochs {epochs}")
        for name, (kind, reward, epochs) in REWARDS.items()}
RUNS |= {f"{method} {name}": (rwr, kind, f"{reward} --epochs {epochs // 4}{algo}")  # of 256 images
         for name, (kind, reward, epochs) in REWARDS.items() for method, algo in WEIGHTED.items()}
RUNS |= {f"SF {name}": (single_pass, kind, f"{reward} --epochs {epochs}")
         for name, (kind, reward, epochs) in REWARDS.items()}
RUNS |= {"DDPO jpeg kl_weight": (ddpo, "all", "--reward jpeg --epochs 32 --kl_weight 0.3"),
         "DDPO jpeg max_kl": (ddpo, "all", "--reward jpeg --epochs 32 --max_kl 0.05")}
RUNS |= {f"RL {kind}": (dpok, kind, EPOCHS[kind]) for kind in KINDS}
RUNS |= {f"DDPO {kind}": (ddpo, kind, f"{ALIGNMENT} {EPOCHS[kind]}") for kind in UNSEEN}
RUNS |= {f"KL-O {kind}": (dpok, kind, f"{EPOCHS[kind]} {SFT}") for kind in UNSEEN}
RUNS |= {"KL-D count": (dpok, "count", f"{EPOCHS['count']} {SFT} --kl_d"),
         "no value location": (dpok, "location", f"{EPOCHS['location']} --no-value")}
RUNS |= {f"jpeg beta {beta}": (dpok, "count", f"--reward jpeg --epochs 20 --beta {beta}") for beta in BETAS}
STAGES = {"DDPO jpeg": (12, 22), "DDPO incompressibility": (12, 22)}  # epochs at which a run is measured too
QUICK = {"RL count": 12, "KL-O count": 12, "DDPO jpeg": 15}  # run: epochs
# by the number of seeds, standard errors from a mean to the end of its 95 % interval
STUDENT = dict(zip(range(8, 17), (2.36, 2.31, 2.26, 2.23, 2.2, 2.18, 2.16, 2.14, 2.13)))


# ---------- the runs, and what they are measured by

def arguments(name):
    _, kind, flags = RUNS[name]
    return f"--prompts {shlex.quote(KINDS[kind])} {flags}".strip() if kind in KINDS else flags


def settings(name, **more):
    """The Config of a run."""
    script = RUNS[name][0]
    fixed = {"device": "cpu", "precision": "fp32"} | ({"evaluation_images": 2} if script is dpok else {})
    flags = [f"--{name}={value}" for name, value in (fixed | more).items()]
    with contextlib.redirect_stdout(None):
        return script.parse([*shlex.split(arguments(name)), *flags])


def fingerprint(name):
    """Of the settings that make a run what it is, but for its seed."""
    made = dataclasses.asdict(settings(name)) | {"out": "", "sample_every": 0}
    return f"{zlib.crc32(json.dumps(made, sort_keys=True).encode()):08x}"


def score(pipe, prompts, count, seed, epoch):
    """The scores of about `count` images of a model."""
    texts = [prompt for prompt in prompts for _ in range(count // len(prompts))]
    generators = [dpok.generator(seed, 100_000 + epoch, i) for i in range(len(texts))]  # none of a training
    images = dpok.sample(pipe, texts, settings("RL count"), generators).images
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    found = {"alignment": shapes_reward.alignment(images, texts).mean().item(),
             "strict": shapes_reward.strict(images, texts).mean().item(),
             "size": rewards.incompressibility(images, texts).mean().item(),
             "diversity": pixels.reshape(len(prompts), -1, pixels[0].size).var(1, ddof=1).mean().item()**0.5}
    return {what: round(value, 4) for what, value in found.items()}


def prompt_sets(kind):
    """The prompts of a kind, their unseen partners, and others."""
    return {"trained": [KINDS[kind]] if kind in KINDS else ALL, "other": OTHER,
            "unseen": [partner for other, partner in UNSEEN.items() if kind in (other, "all")]}


def run(name, seed, folder=FOLDER, device="cpu", **more):
    """Train, and measure on the CPU, in a process of its own -> what claims.json keeps of a run."""
    torch.set_num_threads(1)
    folder, (script, kind, _), measured = folder / f"{name}-{seed}", RUNS[name], {}
    wanted = ["trained"] + ["unseen"] * name.startswith(("RL ", "DDPO jpeg"))  # what claims speak of
    wanted += ["other"] * name.startswith(("RL ", "jpeg beta"))
    config, home = settings(name, seed=seed, out=folder, **more), dpok if script is dpok else ddpo
    config = dataclasses.replace(config, device=device, precision="auto")
    save_run = home.save_run
    shutil.rmtree(folder, ignore_errors=True)

    def save_and_keep(folder, log, *others):
        save_run(folder, log, *others)
        shutil.copytree(folder / "lora", folder / f"lora-{len(log)}")

    with (open(f"{folder}.txt", "w") as output, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output), mock.patch.object(home, "save_run", save_and_keep)):
        (dpok.train_supervised if config.algo == "sft" else script.train)(config)
        with open(folder / "log.csv", newline="") as file:
            log = {column: [float(value) for value in values] for column, *values in zip(*csv.reader(file))}
        last, pipe = len(log["epoch"]), dpok.load_pipeline(settings("RL count"))
        ends = [last] if script is rwr else [epoch for epoch in (last - 4, last - 2, last) if epoch > 0]
        for epoch in sorted(epoch for epoch in {*STAGES.get(name, ()), *ends} if epoch <= last):
            pipe.load_lora_weights(folder / f"lora-{epoch}")  # as stock diffusers loads it
            for where, prompts in prompt_sets(kind).items():
                if prompts and where in wanted:
                    count = 384 if script is rwr else 128 if where == "trained" else 64
                    scores = score(pipe, prompts, count, seed, epoch)
                    measured.setdefault(where, {})[epoch] = scores
            pipe.unload_lora_weights()
    return {"settings": fingerprint(name), "ends": ends, "queries": int(log["reward_queries"][-1]),
            "updates": last * config.updates_per_epoch, **measured,
            **{column: [float(f"{value:.4g}") for value in log[column]] for column in ("reward_mean", "kl")}}


def measure_pretrained():
    """{kind: the scores of the pre-trained model, of a thousand images of each set, and their errors}"""
    torch.set_num_threads(1)
    pipe = dpok.load_pipeline(settings("RL count"))
    sets = {kind: prompt_sets(kind) for kind in (*KINDS, "all")}
    scores = {}
    for prompts in {tuple(prompts) for kind in sets for prompts in sets[kind].values() if prompts}:
        blocks = [score(pipe, prompts, 128, 99, block) for block in range(BLOCKS)]
        parts = {what: np.array([block[what] for block in blocks]) for what in blocks[0]}
        scores[prompts] = {what: round(part.mean(), 4) for what, part in parts.items()}
        scores[prompts]["errors"] = {what: round(standard_error(part), 4) for what, part in parts.items()}
    return {kind: {where: scores[tuple(prompts)] for where, prompts in sets[kind].items() if prompts}
            for kind in sets}


def load(file):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"pre-trained": {}, "runs": {}}


def save(file, stored):
    """A line for each kind of the pre-trained model and each run."""
    sections = []
    for section, lines in stored.items():
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines.items())
        sections.append(f"{json.dumps(section)}: {{\n{lines}\n}}")
    file.with_suffix(".part").write_text("{" + ",\n".join(sections) + "}\n", encoding="utf-8")
    os.replace(file.with_suffix(".part"), file)


def run_all(jobs, at_once, file):
    """Make the runs (name, seed, further settings) that a file lacks, and keep each in it as it ends -> how
    many failed."""
    stored, failed = load(file), 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, name, seed, **more): f"{name}-{seed}" for name, seed, more in jobs
                   if stored["runs"].get(f"{name}-{seed}", {}).get("settings") != fingerprint(name)}
        for job in as_completed(waiting):
            print(waiting[job], job.exception() or "is finished", flush=True)
            failed += job.exception() is not None
            if not job.exception():
                stored["runs"][waiting[job]] = job.result()
                save(file, stored)
    return failed


# ---------- verdicts; `before` has the scores of the pre-trained model, `found` {run: those of each seed}

def finished(stored, least=8):
    """-> {run: [what is kept of each seed]}, of those that are finished with enough seeds."""
    made = {name: (fingerprint(name), []) for name in RUNS}
    for key, kept in sorted(stored["runs"].items()):
        name = key.rpartition("-")[0]
        if name in made and made[name][0] == kept["settings"]:
            made[name][1].append(kept)
    return {name: runs for name, (_, runs) in made.items() if len(runs) >= least}


def over_seeds(found, name, what="strict", where="trained", epoch=None, last=3):
    """One number of each seed: at an epoch, or the mean of the last at which the run was measured."""
    ends = [[epoch] if epoch else run["ends"][-last:] for run in found[name]]
    return np.array([np.mean([run[where][str(end)][what] for end in epochs])
                     for run, epochs in zip(found[name], ends)])


def standard_error(values):
    return values.std(ddof=1) / len(values)**0.5


def spread(values, error=0):
    """Mean ± standard error over seeds, with that of what all are compared with, as text."""
    return f"{values.mean():.2f} ± {math.hypot(standard_error(values), error):.2f}"


def claims(before, found):
    """-> (section of the paper, claim, the least mean effect at which it holds, {part of it: (its runs, the
    effect with each seed, the standard error of what all seeds are compared with)}), of what is finished."""
    def gained(name, what="strict", where="trained", epoch=None, sign=1):
        if name not in found:
            return None
        start = before[RUNS[name][1]][where]
        effect = over_seeds(found, name, what, where, epoch) - start[what]
        return [name], sign * effect, start["errors"][what]

    def lost(name, what="strict", where="trained", epoch=None):
        return gained(name, what, where, epoch, -1)

    def versus(one, other, what="strict", where="trained", sign=1, last=3):
        if not {one, other} <= found.keys():
            return None
        a, b = (over_seeds(found, name, what, where, last=last) for name in (one, other))
        return [one, other], sign * (a[:len(b)] - b[:len(a)]), 0  # seed by seed

    yield "DDPO 6.1", "DDPO makes JPEGs smaller or larger as it is asked, kB", 0, {
        "smaller": lost("DDPO jpeg", "size"), "larger": gained("DDPO incompressibility", "size")}
    yield "DDPO 6.2", "DDPO raises alignment, strict accuracy by 0.15 or more", 0.15, {
        kind: gained(f"DDPO {kind}") for kind in UNSEEN}
    names = {"DDPO": "DDPO_IS", "SF": "DDPO_SF"}
    for one, other in (*((one, other) for one in ("DDPO", "SF") for other in WEIGHTED), ("DDPO", "SF")):
        text = f"{names[one]} ends with more reward than {names.get(other, other)} (kB; count: alignment)"
        yield "DDPO Fig. 4", text, 0, {
            "`jpeg`": versus(f"{one} jpeg", f"{other} jpeg", "size", sign=-1, last=1),
            "`incompressibility`": versus(f"{one} incompressibility", f"{other} incompressibility", "size",
                                          last=1),
            "count": versus(f"{one} count", f"{other} count", "alignment", last=1)}
    sizes = "jpeg", "incompressibility"
    yield "DDPO A", "DDPO over-optimises a JPEG's size: strict accuracy is lost, 0.15 or more", 0.15, {
        f"`{name}`": lost(f"DDPO {name}") for name in sizes}
    yield "DDPO A", "DDPO over-optimises a JPEG's size: diversity falls", 0, {
        f"`{name}`": lost(f"DDPO {name}", "diversity") for name in sizes}
    remedies = {"`--kl_weight`": ("DDPO jpeg kl_weight", None), "`--max_kl`": ("DDPO jpeg max_kl", None),
                "stopped after epoch 12": ("DDPO jpeg", 12)}
    yield "DDPO A", "With a remedy, DDPO on `jpeg` keeps strict accuracy: above −0.1", -0.1, {
        name: gained(run, epoch=epoch) for name, (run, epoch) in remedies.items()}
    yield "DDPO A", "With a remedy, DDPO on `jpeg` still makes files smaller, kB", 0, {
        name: lost(run, "size", epoch=epoch) for name, (run, epoch) in remedies.items()}
    yield "DPOK 5.2, 5.4", "DPOK raises strict accuracy by 0.15 or more", 0.15, {
        kind: gained(f"RL {kind}") for kind in KINDS}
    for section, other in ("DPOK 5.2", "KL-O"), ("DPOK E.1", "KL-D"), ("", "DDPO"):
        baseline = "the supervised " * bool(section)
        yield section, f"DPOK ends better than {baseline}{other}, strict accuracy", 0, {
            kind: versus(f"RL {kind}", f"{other} {kind}") for kind in UNSEEN}
    text = "DPOK ends better with its value function, centred, than with no baseline, strict accuracy"
    yield "DPOK A.5", text, 0, {"location": versus("RL location", "no value location")}
    yield "DPOK Fig. 10", "DPOK raises prompts never trained on, a word apart, strict accuracy", 0, {
        kind: gained(f"RL {kind}", where="unseen") for kind in UNSEEN}
    yield "DDPO 6.3", "DDPO on `jpeg` makes files of captions never trained on smaller, kB", 0, {
        "": lost("DDPO jpeg", "size", "unseen")}
    text = "DPOK on `jpeg`, β 0: strict accuracy of other prompts is lost, 0.15 or more"
    yield "after DPOK 5.3", text, 0.15, {"": lost("jpeg beta 0", where="other")}
    text = "DPOK on `jpeg`, β 0.5: other prompts keep strict accuracy: above −0.1"
    yield "after DPOK 5.3", text, -0.1, {"": gained("jpeg beta 0.5", where="other")}
    text = "DPOK on `jpeg`, β 0.5: files of its own prompt get smaller, kB"
    yield "after DPOK 5.3", text, 0, {"": lost("jpeg beta 0.5", "size")}
    text = "DPOK on `jpeg`: other prompts stay more diverse with β 0.5 than with β 0"
    yield "after DPOK 5.3", text, 0, {"": versus("jpeg beta 0.5", "jpeg beta 0", "diversity", "other")}


def verdict(part, least):
    """Holds: the mean is large enough, and its 95 % interval lies above 0 or, where a loss was to be avoided,
    above the `least` named. Fails: the interval lies below what was asked. Else it is inconclusive."""
    _, effect, error = part
    mean, reach = effect.mean(), STUDENT[len(effect)] * math.hypot(standard_error(effect), error)
    if mean >= least and mean - reach > min(least, 0):
        return "holds"
    return "**fails**" if mean + reach < least else "inconclusive"


def repeat(stored, again, count):
    """Whether the mean over `count` other seeds lies where it would in 95 of 100 cases, by the recorded."""
    before = stored["pre-trained"]
    for (_, claim, _, recorded), (_, _, _, new) in zip(claims(before, finished(stored)),
                                                       claims(before, finished(again, count))):
        for name in (name for name in recorded if recorded[name] and new[name]):
            old, mean = recorded[name][1], new[name][1].mean()
            reach = STUDENT[len(old)] * old.std(ddof=1) * (1 / len(old) + 1 / count)**0.5
            says = "within" if abs(mean - old.mean()) <= reach else "OUTSIDE"
            what = ", ".join(filter(None, (claim, name)))
            print(f"{what}: {mean:.2f}, {says} {old.mean():.2f} ± {reach:.2f}")


# ---------- the tables, as lines of text

def row(*cells):
    return f"| {' | '.join(cells)} |"


def header(*columns):
    return f"\n{row(*columns)}\n{'|---' * len(columns)}|"


def claim_table(before, found):
    yield header("paper", "claim", "effect", "on `shapes/`", "runs").strip()
    for section, claim, least, parts in claims(before, found):
        parts = {name: part for name, part in parts.items() if part}
        effects = "; ".join(f"{name} {spread(*part[1:])}".strip() for name, part in parts.items())
        verdicts = {name: verdict(part, least) for name, part in parts.items()}
        names = dict.fromkeys(name for runs, *_ in parts.values() for name in runs)
        if parts:
            (says, times), = Counter(verdicts.values()).most_common(1)
            common = says if 2 * times > len(verdicts) else ""
            others = ", ".join(f"{name}: {says}" for name, says in verdicts.items() if says != common)
            yield row(section, claim, effects, "; ".join(filter(None, (common, others))), ", ".join(names))


def ddpo_table(before, found):
    columns = ("size", "trained"), ("strict", "trained"), ("diversity", "trained")
    yield header("the 16 prompts", "after epoch", "size, kB", "strict", "diversity", "KL")
    cells = (f"{before['all'][where][what]:.2f}" for what, where in columns)
    yield row("pre-trained", "", *cells, "0")
    for name in (name for name in found if RUNS[name][1] == "all"):
        for epoch in (*STAGES.get(name, ()), None):
            kl = np.array([run["kl"][epoch - 1] if epoch else np.mean(run["kl"][-5:]) for run in found[name]])
            lasts = [run["ends"][-1] for run in found[name]]
            when = str(epoch or f"{min(lasts)} to {max(lasts)}" * (min(lasts) < max(lasts)) or lasts[0])
            yield row(name, when, *(spread(over_seeds(found, name, *column, epoch)) for column in columns),
                      f"{np.median(kl):.2g}")


def method_table(before, found):
    methods = "KL-O", "KL-D", "SF", "RWR", "RWR_sparse", "DDPO", "RL"
    yield header("strict accuracy", "pre-trained", *methods, "unseen partner: pre-trained", "unseen: RL",
                 "other prompts: pre-trained", "other: RL")
    for kind, prompt in KINDS.items():
        start = {where: f"{scores['strict']:.2f}" for where, scores in before[kind].items()}
        tuned = [spread(over_seeds(found, name)) if (name := f"{method} {kind}") in found else ""
                 for method in methods]
        unseen, other = (spread(over_seeds(found, f"RL {kind}", where=where))
                         if f"RL {kind}" in found and where in start else "" for where in ("unseen", "other"))
        yield row(prompt, start["trained"], *tuned, start.get("unseen", ""), unseen, start["other"], other)


def run_table(before, found):
    command = "command, with `--device cpu --precision fp32` and `--seed`"
    yield header("run", command, "queries, at most", "updates")
    for name, runs in found.items():
        file = Path(RUNS[name][0].__file__).relative_to(HERE.parent)
        cost = (str(max(run[what] for run in runs)) for what in ("queries", "updates"))
        yield row(name, f"`python {file} {arguments(name)}`", *cost)


def all_tables(stored):
    """The lines between two marks in experiments/README.md."""
    tables = claim_table, ddpo_table, method_table, run_table
    return [line for table in tables for line in table(stored["pre-trained"], finished(stored))]


# ---------- the command line

def quick(at_once):
    """Trends only -> how many runs failed."""
    file, before = FOLDER / "quick.json", load(RECORDED)["pre-trained"]
    file.unlink(missing_ok=True)
    failed = run_all([(name, 0, {"epochs": epochs}) for name, epochs in QUICK.items()], at_once, file)
    print("one seed, short runs: trends, no verdicts")
    for key, scores in load(file)["runs"].items():
        name, last = key.rpartition("-")[0], str(scores["ends"][-1])
        for what in ("size", "strict"):
            start, end = before[RUNS[name][1]]["trained"][what], scores["trained"][last][what]
            print(f"{name}, {last} epochs: {what} {start:.2f} → {end:.2f}")
    return failed


def main():
    """Exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--count", type=int, choices=STUDENT, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--device", default="cpu", help="cuda: in fp16, beside the recorded")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    options = parser.parse_args()
    names = [options.only] if options.only in RUNS else [name for name in RUNS if options.only in name]
    seeds = options.seeds or range(FIRST, FIRST + options.count)
    if not names:
        parser.error(f"only {options.only!r} is in the name of no run; the runs are {', '.join(RUNS)}")
    if options.quick:
        return int(quick(options.jobs) > 0)
    jobs = [(name, seed, {"device": options.device}) for name in names for seed in seeds]
    if options.seeds or options.device != "cpu":
        again = FOLDER / f"{options.device}-seeds-{'-'.join(map(str, seeds))}.json"
        failed = run_all(jobs, options.jobs, again)
        repeat(load(RECORDED), load(again), len(seeds))
        return int(failed > 0)
    if not (stored := load(RECORDED))["pre-trained"]:
        save(RECORDED, stored | {"pre-trained": measure_pretrained()})
    failed = run_all(jobs, options.jobs, RECORDED)
    page, tables = PAGE.read_text(encoding="utf-8"), "\n".join(all_tables(load(RECORDED)))
    begin, end = (page.index(f"<!-- {mark} of claims.py -->") for mark in ("begin", "end"))
    PAGE.write_text(f"{page[:begin]}<!-- begin of claims.py -->\n{tables}\n{page[end:]}", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
