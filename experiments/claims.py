"""What the DPOK paper claims, tried on shapes/ with five seeds: the runs, their measurement, the tables of the README, two pictures.

    python experiments/claims.py                              85 runs of 4 minutes, two at a time on two cores: three hours
    python experiments/claims.py --only "RL count" --seeds 1  some of the runs, without tables
What is finished is not repeated, so it may be stopped and started again.

A run is `python dpok.py` with the arguments of RUNS, in runs/claims/<name>-<seed>/. The tuned model is then measured on images of seeds that no
run has seen, the same for every model. `alignment` and `size` (of the JPEG, kB) are what runs are rewarded with; `strict`, with which none is, is the
share of images that are just what their caption says; `diversity` is how far the images of one caption differ: the standard deviation of a
pixel's value (0 to 1) between them. All numbers are in experiments/results/claims.json.
"""
import argparse
import contextlib
import csv
import dataclasses
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "shapes")]
import dpok  # noqa: E402
import rewards  # noqa: E402
import shapes_reward  # noqa: E402

FOLDER, RESULTS = HERE.parent / "runs" / "claims", HERE / "results"
KINDS = dict(zip(("colour", "count", "composition", "location"), dpok.PROMPTS["shapes"])) | {"bias": "four red circles"}
METHODS = {"RL": [], "KL-O": ["--algo", "sft", "--lr", "3e-3"], "KL-D": ["--algo", "sft", "--lr", "3e-3", "--kl_d"]}
BETAS = "0", "0.5"
RUNS = {f"{method} {kind}": ["--prompts", prompt, *arguments] for method, arguments in METHODS.items() for kind, prompt in KINDS.items()}
RUNS |= {f"jpeg beta {beta}": ["--prompts", KINDS["count"], "--reward", "jpeg", "--beta", beta] for beta in BETAS}
# the prompts of shapes/ that no run trains on and that are no unseen partner of those
OTHER = [p for p in dpok.load_prompts("shapes/prompts.txt") if p not in KINDS.values() and p not in dpok.UNSEEN.values()]


def settings(arguments, **more):
    more = {"device": "cpu", "precision": "fp32", "evaluation_images": 2, **more}
    return dpok.parse([*arguments, *(f"--{name}={value}" for name, value in more.items())])


def draw(pipe, config, prompts, count):
    """`count` images of each prompt, of seeds that no run has seen -> images, their prompts."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    return dpok.sample(pipe, texts, config, dpok.generators(12345, 0, range(len(texts)))).images, texts


def score(pipe, config, prompts, count):
    images, texts = draw(pipe, config, prompts, count)
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images]).reshape(len(prompts), count, -1)
    return {"alignment": shapes_reward.alignment(images, texts).mean().item(), "strict": shapes_reward.strict(images, texts).mean().item(),
            "size": rewards.jpeg_size(images).mean().item(), "diversity": pixels.std(1).mean().item(), "images": len(images)}


def measure(config, lora=None):
    """The pre-trained model, or a tuned one -> scores on the prompt of the run, on its unseen partner if it has one, and on the others."""
    pipe, prompt = dpok.load_pipeline(config), config.prompts
    if lora:
        dpok.load_lora(pipe.unet, lora)
    sets = {"trained": [prompt], "other": OTHER} | ({"unseen": [dpok.UNSEEN[prompt]]} if prompt in dpok.UNSEEN else {})
    return {name: score(pipe, config, prompts, 256 // len(prompts)) for name, prompts in sets.items()}


def run(name, seed):
    """Train, measure, and write measured.json last. A run without it was stopped, and one of other settings is out of date: both start over. What
    it prints is in <name>-<seed>.txt."""
    torch.set_num_threads(1)
    folder = FOLDER / f"{name}-{seed}"
    with open(f"{folder}.txt", "a", encoding="utf-8") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        config = settings(RUNS[name], seed=seed, out=folder)
        if (folder / "measured.json").exists() and json.loads((folder / "config.json").read_text()) == dataclasses.asdict(config) | {"out": ""}:
            return
        shutil.rmtree(folder, ignore_errors=True)
        dpok.train(config)
        scores = measure(config, folder / "lora")
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    scores |= {"queries": int(log[-1]["reward_queries"]), "updates": len(log) * config.updates_per_epoch,
               "kl": sum(float(row["kl"]) for row in log[-5:]) / 5, "minutes": sum(float(row["seconds"]) for row in log) / 60}
    dpok.replace(folder / "measured.json", (json.dumps(scores, indent=1) + "\n").encode())


def score_pretrained(kind):
    """The scores of the pre-trained model, for the prompt of a kind; measured once."""
    file = FOLDER / f"pre-trained {kind}.json"
    if not file.exists():
        scores = measure(settings(["--prompts", KINDS[kind]]))
        dpok.replace(file, (json.dumps(scores, indent=1) + "\n").encode())
    return json.loads(file.read_text(encoding="utf-8"))


def spread(values):
    """Mean ± standard error over seeds, as text."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / len(values)**0.5:.2f}"


def tables(before, found):
    """before {kind: scores of the pre-trained model}, found {run: [scores of each seed]} -> lines of the README's tables, and of the verdicts."""
    def over_seeds(name, where="trained", what="strict"):
        return np.array([scores[where][what] for scores in found[name]])

    yield "| strict accuracy | pre-trained | RL | KL-O | KL-D | unseen partner, pre-trained | unseen partner, RL |\n|---|---|---|---|---|---|---|"
    for kind, prompt in KINDS.items():
        unseen = f"{before[kind]['unseen']['strict']:.2f} | {spread(over_seeds(f'RL {kind}', 'unseen'))}" if prompt in dpok.UNSEEN else " | "
        tuned = " | ".join(spread(over_seeds(f"{method} {kind}")) for method in METHODS)
        yield f"| {prompt} | {before[kind]['trained']['strict']:.2f} | {tuned} | {unseen} |"

    columns = ("trained", "size"), ("other", "strict"), ("other", "diversity"), ("trained", "strict")
    yield "\n| `--reward jpeg` | size, kB | strict, other prompts | diversity, other prompts | strict, its own prompt |\n|---|---|---|---|---|"
    yield "| pre-trained | " + " | ".join(f"{before['count'][where][what]:.2f}" for where, what in columns) + " |"
    for beta in BETAS:
        yield f"| `--beta {beta}` | " + " | ".join(spread(over_seeds(f"jpeg beta {beta}", *column)) for column in columns) + " |"

    yield "\n| run | reward queries | updates | minutes |\n|---|---|---|---|"
    for name in ("RL", "KL-O", "KL-D", "jpeg"):
        runs = [scores for run, seeds in found.items() if run.startswith(name) for scores in seeds]
        of_runs = ([scores[what] for scores in runs] for what in ("queries", "updates", "minutes"))
        yield f"| {name} | " + " | ".join(f"{min(values):.4g} to {max(values):.4g}" for values in of_runs) + " |"

    start, free, held = before["count"]["other"], *(over_seeds(f"jpeg beta {beta}", "other") for beta in BETAS)
    size, varied = over_seeds(f"jpeg beta {BETAS[1]}", "trained", "size"), [over_seeds(f"jpeg beta {beta}", "other", "diversity") for beta in BETAS]
    claims = [(f"RL raises {kind}, by 0.15 or more", over_seeds(f"RL {kind}") - before[kind]["trained"]["strict"], 0.15) for kind in KINDS]
    claims += [(f"RL beats {sft} at {kind}", over_seeds(f"RL {kind}") - over_seeds(f"{sft} {kind}"), 0) for kind in KINDS for sft in ("KL-O", "KL-D")]
    claims += [("jpeg, beta 0: strict of other prompts falls, by 0.15 or more", start["strict"] - free, 0.15),
               (f"jpeg, beta {BETAS[1]}: it falls by less than 0.1 (the effect is 0.1 less the fall)", 0.1 - (start["strict"] - held), 0),
               (f"jpeg, beta {BETAS[1]}: the size still falls, kB", before["count"]["trained"]["size"] - size, 0),
               (f"jpeg: diversity of other prompts is higher with beta {BETAS[1]} than with 0", varied[1] - varied[0], 0)]
    yield f"\n{len(claims)} claims are judged. One holds if its mean is large enough and above 0 by 2.78 standard errors (t, 5 seeds, 95 %)."
    yield "\n| claim | effect | |\n|---|---|---|"
    for text, effect, least in claims:
        holds = effect.mean() >= least and effect.mean() > 2.78 * effect.std(ddof=1) / len(effect)**0.5
        yield f"| {text} | {spread(effect)} | {'holds' if holds else 'does not hold'} |"


def picture(file, title, rows, prompts, count):
    """The same seeds below each other as in Fig. 2, seed 0 of each run; rows [run, or None for the pre-trained model]."""
    config, cells, captions = settings(["--prompts", KINDS["count"]]), [], []
    for names in rows:  # a run for each prompt
        for name, prompt in zip(names, prompts):
            pipe = dpok.load_pipeline(config)
            if name:
                dpok.load_lora(pipe.unet, FOLDER / f"{name}-0" / "lora")
            images, texts = draw(pipe, config, [prompt], count)
            cells += images
            captions += [f"{verdict:.0f} {text}" for verdict, text in zip(shapes_reward.strict(images, texts), texts)]
    dpok.draw_samples(RESULTS / file, title, cells, captions, columns=len(prompts) * count, size=160, text=10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="fewer make no tables")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for seed in range(options.seeds) for name in RUNS if options.only in name]
    with ProcessPoolExecutor(options.jobs) as pool:
        try:
            for job in tqdm(as_completed([pool.submit(run, *job) for job in wanted]), "runs", len(wanted)):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if options.only or options.seeds < 5:
        return
    before = {kind: score_pretrained(kind) for kind in KINDS}
    found = {name: [json.loads((FOLDER / f"{name}-{seed}" / "measured.json").read_text()) for seed in range(options.seeds)] for name in RUNS}
    lines = list(tables(before, found))
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "claims.json").write_text(json.dumps({"pre-trained": before, "runs": found, "tables": lines}, indent=1) + "\n", encoding="utf-8")
    prompts = list(KINDS.values())
    picture("dpok-methods.png", "rows: pre-trained, supervised (KL-O), RL; 1 is strictly right",
            [[None] * 5, [f"KL-O {kind}" for kind in KINDS], [f"RL {kind}" for kind in KINDS]], prompts, 2)
    picture("dpok-beta.png", f"reward jpeg on one prompt, images of others; rows: pre-trained, {', '.join(f'beta {beta}' for beta in BETAS)}",
            [[None] * 5, *([f"jpeg beta {beta}"] * 5 for beta in BETAS)], OTHER[::2][:5], 2)


if __name__ == "__main__":
    main()
