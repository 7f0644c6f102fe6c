"""Test on shapes/ those claims of both papers that a laptop can test, and what --noise_aware does.

Each run has eight seeds or more, except for those of 50 steps, which have four.

    python experiments/claims.py          # the runs that results/claims.json lacks, two at a time
    python experiments/claims.py --only "DDPO location" --count 16  # more seeds of this run
    python experiments/claims.py --only "RL count" --seeds 200 201  # repeat with other seeds
    python experiments/claims.py --quick  # three short runs, ten minutes: trends, no verdicts

A run is a script with the settings that RUNS, SHARED and COMMON name. Its folder is
runs/claims/<name>-<seed>/. results/claims.json has a line for each finished run. It is also the
cache: a run that is there with the same settings is not repeated, so Ctrl-C loses only the runs in
progress. A change of shapes/, of a script's defaults or of what it computes is not noticed. After
one, delete results/claims.json, or the lines of the runs that it concerns. If the lines of the
pre-trained model are missing, it is measured again. The tables are written to
experiments/README.md.

Repeats, with other seeds or on another device, have a folder and a JSON file of their own in
runs/claims/, so that they replace nothing that is recorded. A claim about two runs is compared once
both have been repeated with these seeds.

A model is measured on images of seeds that no training saw. They are new for every seed and epoch,
so the error of the measurement is part of the spread over seeds. A run is measured at its last
epoch and two and four epochs before, and the mean of the three is used. RWR is measured only at its
end, on three times as many images. In DDPO's Fig. 4 all methods are measured only at their end, so
that the queries are equal. Some runs are measured at the epochs of STAGES too. `alignment` and
`size` (of the JPEG, kB) are rewards of runs. `strict` is no run's reward: it is the share of images
that show exactly what their caption says. `diversity` is the standard deviation of a pixel (0 to 1)
between the images of one caption, root mean square.
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
import signal
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from diffusers.utils import logging
from transformers import HfArgumentParser

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parent / "shapes", HERE):
    sys.path.insert(0, str(folder))
import ddpo  # noqa: E402
import dpok  # noqa: E402
import rewards  # noqa: E402
import rwr  # noqa: E402
import shapes_reward  # noqa: E402
import single_pass  # noqa: E402

logging.set_verbosity_error()  # otherwise each load warns that the text encoder has no LoRA

FOLDER = HERE.parent / "runs" / "claims"
PAGE = HERE / "README.md"
RECORDED = HERE / "results" / "claims.json"
KINDS = {"colour": "a green square", "count": "two red squares",
         "composition": "a red circle and a blue square", "location": "a blue circle on the left",
         "bias": "four red circles"}
UNSEEN = {"colour": "a green circle", "count": "two blue squares",
          "composition": "a red circle and a blue triangle",
          "location": "a blue square on the left"}
ALL = dpok.load_prompts("shapes/prompts.txt")
OTHER = [prompt for prompt in ALL if prompt not in (*KINDS.values(), *UNSEEN.values())]
FIRST = 100  # no setting was chosen on seeds 100, 101, ...
BLOCKS = 8  # of 128 images each, on which the pre-trained model is measured
STAGES = {"DDPO jpeg": (12, 22), "DDPO incompressibility": (12, 22),  # run: further epochs
          "DDPO noise_aware jpeg": (4, 8, 12, 16, 22),
          "DDPO noise_aware incompressibility": (4, 8, 12, 16, 22),
          "RL noise_aware count": (10,)}
QUICK = {"RL count": 12, "KL-O count": 12, "DDPO jpeg": 15}  # run: epochs
LAST = 4  # epochs over which the reward of training images is averaged
# Number of seeds: standard errors from the mean to the end of its 95 % interval (Student's t)
STUDENT = {4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.2,
           13: 2.18, 14: 2.16, 15: 2.14, 16: 2.13}


# ---------- the runs

ALIGNMENT = "shapes/shapes_reward.py:alignment"
COMMON = "--device cpu --precision fp32 --model shapes --steps 10 --guidance 2 --batch 64"
SHARED = {  # script: what its runs have besides COMMON, unless a run names another value
    ddpo: "--prompts shapes/prompts.txt --samples_per_epoch 64 --lr 3e-3 --clip_range 6.4e-3 "
          "--noise_aware False",
    dpok: f"--reward {ALIGNMENT} --samples_per_epoch 64 --updates_per_epoch 5 --update_batch 128 "
          "--alpha 10 --beta 0.01 --value_lr 3e-4 --value_steps 10 --gamma 0.1 --lr 2e-3 "
          "--clip_range 6.4e-3 --evaluation_images 0 --noise_aware False",
    rwr: "--prompts shapes/prompts.txt --samples_per_epoch 256 --updates_per_epoch 10 "
         "--update_batch 128 --inverse_temperature 10 --lr 3e-3",
}
SHARED[single_pass] = SHARED[ddpo]


class Run(NamedTuple):
    """A run, apart from its seed."""
    script: ModuleType
    kind: str   # its prompts: a kind of KINDS, or "all" for those of shapes/prompts.txt
    flags: str  # its own settings
    seeds: int = 8


RUNS = {
    # The methods of DDPO's Fig. 4, with as many images: 64 per epoch, RWR 256 per round
    "DDPO jpeg": Run(ddpo, "all", "--reward jpeg --epochs 32"),
    "DDPO count": Run(ddpo, "count", f"--reward {ALIGNMENT} --epochs 20"),
    "DDPO incompressibility": Run(ddpo, "all", "--reward incompressibility --epochs 32"),
    "RWR jpeg": Run(rwr, "all", "--reward jpeg --epochs 8"),
    "RWR_sparse jpeg": Run(rwr, "all", "--reward jpeg --epochs 8 --algo sparse"),
    "RWR count": Run(rwr, "count", f"--reward {ALIGNMENT} --epochs 5"),
    "RWR_sparse count": Run(rwr, "count", f"--reward {ALIGNMENT} --epochs 5 --algo sparse"),
    "RWR incompressibility": Run(rwr, "all", "--reward incompressibility --epochs 8"),
    "RWR_sparse incompressibility":
        Run(rwr, "all", "--reward incompressibility --epochs 8 --algo sparse"),
    "SF jpeg": Run(single_pass, "all", "--reward jpeg --epochs 32"),
    "SF count": Run(single_pass, "count", f"--reward {ALIGNMENT} --epochs 20"),
    "SF incompressibility": Run(single_pass, "all", "--reward incompressibility --epochs 32"),
    # Remedies against over-optimisation
    "DDPO jpeg kl_weight": Run(ddpo, "all", "--reward jpeg --epochs 32 --kl_weight 0.3"),
    "DDPO jpeg max_kl": Run(ddpo, "all", "--reward jpeg --epochs 32 --max_kl 0.05"),
    # DPOK's Algorithm 1, DDPO and the supervised Algorithm 2 on one prompt each
    "RL colour": Run(dpok, "colour", "--epochs 20"),
    "RL count": Run(dpok, "count", "--epochs 20"),
    "RL composition": Run(dpok, "composition", "--epochs 20"),
    "RL location": Run(dpok, "location", "--epochs 30"),
    "RL bias": Run(dpok, "bias", "--epochs 20"),
    "DDPO colour": Run(ddpo, "colour", f"--reward {ALIGNMENT} --epochs 20"),
    "DDPO composition": Run(ddpo, "composition", f"--reward {ALIGNMENT} --epochs 20", seeds=16),
    "DDPO location": Run(ddpo, "location", f"--reward {ALIGNMENT} --epochs 30", seeds=16),
    "KL-O colour": Run(dpok, "colour", "--epochs 20 --algo sft --lr 3e-3"),
    "KL-O count": Run(dpok, "count", "--epochs 20 --algo sft --lr 3e-3"),
    "KL-O composition": Run(dpok, "composition", "--epochs 20 --algo sft --lr 3e-3"),
    "KL-O location": Run(dpok, "location", "--epochs 30 --algo sft --lr 3e-3"),
    "KL-D count": Run(dpok, "count", "--epochs 20 --algo sft --lr 3e-3 --kl_d"),
    # DPOK without its value function, and with two weights of the KL
    "no value location": Run(dpok, "location", "--epochs 30 --no-value"),
    "jpeg beta 0": Run(dpok, "count", "--reward jpeg --epochs 20 --beta 0"),
    "jpeg beta 0.5": Run(dpok, "count", "--reward jpeg --epochs 20 --beta 0.5"),
    # With --noise_aware, and 50 steps with and without it
    "DDPO noise_aware jpeg": Run(ddpo, "all", "--reward jpeg --epochs 32 --noise_aware"),
    "DDPO noise_aware incompressibility":
        Run(ddpo, "all", "--reward incompressibility --epochs 32 --noise_aware"),
    "DDPO noise_aware colour":
        Run(ddpo, "colour", f"--reward {ALIGNMENT} --epochs 20 --noise_aware"),
    "DDPO noise_aware count": Run(ddpo, "count", f"--reward {ALIGNMENT} --epochs 20 --noise_aware"),
    "DDPO noise_aware composition":
        Run(ddpo, "composition", f"--reward {ALIGNMENT} --epochs 20 --noise_aware", seeds=16),
    "DDPO noise_aware location":
        Run(ddpo, "location", f"--reward {ALIGNMENT} --epochs 30 --noise_aware", seeds=16),
    "SF noise_aware jpeg": Run(single_pass, "all", "--reward jpeg --epochs 32 --noise_aware"),
    "RL noise_aware count": Run(dpok, "count", "--epochs 20 --noise_aware"),
    "RL noise_aware composition": Run(dpok, "composition", "--epochs 20 --noise_aware"),
    "RL noise_aware location": Run(dpok, "location", "--epochs 30 --noise_aware"),
    "DDPO noise_aware jpeg kl_weight":
        Run(ddpo, "all", "--reward jpeg --epochs 32 --kl_weight 0.3 --noise_aware"),
    "DDPO 50_steps jpeg": Run(ddpo, "all", "--reward jpeg --epochs 16 --steps 50", seeds=4),
    "DDPO 50_steps noise_aware jpeg":
        Run(ddpo, "all", "--reward jpeg --epochs 16 --steps 50 --noise_aware", seeds=4),
    "DDPO 50_steps location":
        Run(ddpo, "location", f"--reward {ALIGNMENT} --epochs 16 --steps 50", seeds=4),
    "DDPO 50_steps noise_aware location":
        Run(ddpo, "location", f"--reward {ALIGNMENT} --epochs 16 --steps 50 --noise_aware",
            seeds=4),
}


def arguments(name: str) -> str:
    """Get the flags of a run that its script's runs do not share."""
    kind, flags = RUNS[name].kind, RUNS[name].flags
    if kind in KINDS:
        return f"--prompts {shlex.quote(KINDS[kind])} {flags}"
    return flags


def settings(name: str, **more):
    """Make the Config of a run from COMMON, SHARED, its own flags, `more`, and the defaults of its
    script. shapes/*.json have no part in it."""
    script = RUNS[name].script
    flags = f"{COMMON} {SHARED[script]} {arguments(name)}"  # of two values the last one counts
    parser = HfArgumentParser(script.Config)
    config, = parser.parse_args_into_dataclasses(shlex.split(flags), look_for_args_file=False)
    return dataclasses.replace(config, **more)


# Settings that do not change what a run computes, or only its roundings
WITHOUT_EFFECT = ("seed", "device", "batch", "gradient_checkpointing", "compile", "sample_every",
                  "evaluation_images", "out", "resume")


def fingerprint(name: str) -> str:
    """Hash the settings of a run that change its results -> 8 hexadecimal digits.

    The seed is not part of it, since results/claims.json has a line for each seed. A setting at its
    published default is left out. So the fingerprints stay as they are when a script gets a new
    setting whose default is "off", or loses a setting that no run has changed.
    """
    script = RUNS[name].script
    config = settings(name)
    published = script.Config(algo=config.algo)  # some defaults depend on algo
    changed = {"script": Path(script.Config.script).stem, "algo": config.algo}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in WITHOUT_EFFECT and value != getattr(published, field.name):
            changed[field.name] = value
    return f"{zlib.crc32(json.dumps(changed, sort_keys=True).encode()):08x}"


# ---------- training and measuring

def score(pipe, prompts: list, count: int, seed: int, epoch: int, steps: int = 10) -> dict:
    """Score about `count` images of a model, as many for each prompt -> {measure: value}."""
    texts = []
    for prompt in prompts:
        texts += [prompt] * (count // len(prompts))
    generators = []
    for i in range(len(texts)):
        generators.append(dpok.generator(seed, 100_000 + epoch, i))  # no training has this epoch
    images = dpok.sample(pipe, texts, settings("RL count", steps=steps), generators).images
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    by_prompt = pixels.reshape(len(prompts), -1, pixels[0].size)
    scores = {"alignment": shapes_reward.alignment(images, texts).mean().item(),
              "strict": shapes_reward.strict(images, texts).mean().item(),
              "size": rewards.incompressibility(images, texts).mean().item(),
              "diversity": by_prompt.var(1, ddof=1).mean().item() ** 0.5}
    return {what: round(value, 4) for what, value in scores.items()}


def prompt_sets(kind: str) -> dict[str, list]:
    """List the prompts that runs of a kind train on, their unseen partners, and others."""
    trained = [KINDS[kind]] if kind in KINDS else ALL
    if kind == "all":
        unseen = list(UNSEEN.values())
    elif kind in UNSEEN:
        unseen = [UNSEEN[kind]]
    else:
        unseen = []
    return {"trained": trained, "other": OTHER, "unseen": unseen}


def measured_sets(name: str) -> list[str]:
    """List those sets of prompts on which claims need the scores of a run."""
    name = name.replace(" noise_aware", "")
    names = ["trained"]
    if name.startswith(("RL ", "DDPO jpeg")):
        names.append("unseen")
    if name.startswith(("RL ", "jpeg beta")):
        names.append("other")
    return names


def run(name: str, seed: int, folder: Path = FOLDER, device: str = "cpu", **more) -> dict:
    """Train on one thread, and measure on the CPU -> what claims.json keeps of a run."""
    torch.set_num_threads(1)
    script, kind = RUNS[name].script, RUNS[name].kind
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder / f"{name}-{seed}"
    config = settings(name, seed=seed, out=folder, sample_every=1, **more)  # keeps all LoRAs
    if device != "cpu":
        config = dataclasses.replace(config, device=device, precision="auto")
    shutil.rmtree(folder, ignore_errors=True)
    with (open(f"{folder}.txt", "w", encoding="utf-8") as output,
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)):
        script.train(config)
        log = read_log(folder / "log.csv")
        last = len(log["epoch"])
        ends = [epoch for epoch in (last - 4, last - 2, last) if epoch > 0]
        if script is rwr:  # a round of it is four epochs
            ends = [last]
        epochs = {*ends, *STAGES.get(name, ())}
        pipe = dpok.load_pipeline(settings("RL count"))
        measured = {}
        for epoch in sorted(epoch for epoch in epochs if epoch <= last):
            pipe.load_lora_weights(folder / "lora" / f"epoch_{epoch:04d}")  # by stock diffusers
            for where, prompts in prompt_sets(kind).items():
                if not prompts or where not in measured_sets(name):
                    continue
                count = 128 if where == "trained" else 64
                if script is rwr:
                    count = 384
                scores = score(pipe, prompts, count, seed, epoch, config.steps)
                measured.setdefault(where, {})[epoch] = scores
            pipe.unload_lora_weights()
    return {"settings": fingerprint(name), "ends": ends, "queries": int(log["reward_queries"][-1]),
            "updates": last * config.updates_per_epoch, **measured,
            "reward_mean": [float(f"{value:.4g}") for value in log["reward_mean"]],
            "kl": [float(f"{value:.4g}") for value in log["kl"]]}


def read_log(file: Path) -> dict[str, list[float]]:
    """Read log.csv -> {column: the value of each epoch}."""
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return {column: [float(row[column]) for row in rows] for column in rows[0]}


def measure_pretrained(known: dict) -> dict:
    """Measure the pre-trained model on a thousand images of each set of prompts, for those kinds of
    `pretrained_kind` that are not known yet -> all of them, {kind: {set: {measure: mean, "errors":
    {measure: standard error}}}}."""
    torch.set_num_threads(1)
    pipe = dpok.load_pipeline(settings("RL count"))
    by_prompts = {}  # kinds share some sets
    pretrained = dict(known)
    for name, run_of_kind in RUNS.items():
        kind = pretrained_kind(name)
        if kind in pretrained:
            continue
        pretrained[kind] = {}
        steps = settings(name).steps
        for where, prompts in prompt_sets(run_of_kind.kind).items():
            if not prompts:
                continue
            key = tuple(prompts), steps
            if key not in by_prompts:
                blocks = [score(pipe, prompts, 128, 99, block, steps) for block in range(BLOCKS)]
                by_prompts[key] = mean_and_errors(blocks)
            pretrained[kind][where] = by_prompts[key]
    return pretrained


def pretrained_kind(name: str) -> str:
    """Name the scores of the pre-trained model with which a run is compared."""
    return f"{RUNS[name].kind}, 50 steps" if "50_steps" in name else RUNS[name].kind


def mean_and_errors(blocks: list[dict]) -> dict:
    """Average the scores of several blocks -> {measure: mean, "errors": {measure: error}}."""
    means, errors = {}, {}
    for what in blocks[0]:
        values = np.array([block[what] for block in blocks])
        means[what] = round(values.mean(), 4)
        errors[what] = round(standard_error(values), 4)
    return means | {"errors": errors}


def load(file: Path) -> dict:
    """Read what `save` has written, or start empty."""
    if not file.exists():
        return {"pre-trained": {}, "runs": {}}
    return json.loads(file.read_text(encoding="utf-8"))


def save(file: Path, stored: dict):
    """Write JSON with a line for each kind of the pre-trained model and for each run."""
    sections = []
    for section, entries in stored.items():
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        sections.append(f"{json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n}")
    part = file.with_suffix(".part")
    part.write_text("{" + ",\n".join(sections) + "}\n", encoding="utf-8")
    os.replace(part, file)


def end_with_parent():
    """Let a worker end at Ctrl-C, and when the process that has started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def processes(at_once: int):
    """Start a pool of processes. An error cancels the jobs that have not begun. Ctrl-C, and a kill
    of this process, also end those in progress."""
    context = get_context("spawn")
    pool = ProcessPoolExecutor(at_once, mp_context=context, initializer=end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(jobs: list, at_once: int, file: Path) -> int:
    """Make the runs (name, seed, further settings) that a file lacks, and add each to the file when
    it is finished -> how many failed."""
    there = load(file)["runs"]
    failed = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with processes(at_once) as pool:
        waiting = {}
        for name, seed, more in jobs:
            key = f"{name}-{seed}"
            if there.get(key, {}).get("settings") != fingerprint(name):
                waiting[pool.submit(run, name, seed, **more)] = key
        for job in as_completed(waiting):
            key = waiting[job]
            if job.exception():
                failed += 1
                print(key, job.exception(), flush=True)
            else:
                stored = load(file)  # another claims.py may have added runs
                stored["runs"][key] = job.result()
                save(file, stored)
                print(key, "is finished", flush=True)
    return failed


# ---------- effects: differences of scores, one for each seed

def finished(stored: dict, least: int | None = None) -> dict[str, list]:
    """Choose the runs that are finished with at least `least` seeds, or as many as RUNS says
    -> {run: [what is kept of each seed]}. Runs with other settings than today's do not count."""
    found = {name: [] for name in RUNS}
    fingerprints = {name: fingerprint(name) for name in RUNS}
    for key, kept in sorted(stored["runs"].items()):
        name, _, seed = key.rpartition("-")
        if name in RUNS and kept["settings"] == fingerprints[name]:
            found[name].append(kept | {"seed": int(seed)})
    return {name: runs for name, runs in found.items()
            if len(runs) >= (least or RUNS[name].seeds)}


def over_seeds(found: dict, name: str, what: str = "strict", where: str = "trained",
               epoch: int | None = None, last: int = 3) -> np.ndarray:
    """Get one number for each seed: the score at an epoch, or the mean of the `last` scores."""
    values = []
    for kept in found[name]:
        epochs = kept["ends"][-last:] if epoch is None else [epoch]
        values.append(np.mean([kept[where][str(e)][what] for e in epochs]))
    return np.array(values)


def standard_error(values: np.ndarray) -> float:
    """Compute the standard error of a mean over seeds."""
    return values.std(ddof=1) / len(values) ** 0.5


def spread(values: np.ndarray, error: float = 0) -> str:
    """Write mean ± standard error over seeds; `error` is that of what all are compared with."""
    return f"{values.mean():.2f} ± {math.hypot(standard_error(values), error):.2f}"


class Part(NamedTuple):
    """A part of a claim."""
    runs: list          # names of the runs that it is about
    effect: np.ndarray  # with each seed
    error: float        # standard error of what all seeds are compared with


class Claim(NamedTuple):
    section: str  # of the paper
    text: str
    least: float  # the least mean effect at which it holds
    parts: dict   # {name: Part, or None while a run is missing}


@dataclasses.dataclass
class Effects:
    """The effects of runs, each a Part, or None if one of the runs is missing. `before` has the
    scores of the pre-trained model, `found` is {run: what is kept of each seed}."""
    before: dict
    found: dict

    def gained(self, name, what="strict", where="trained", epoch=None) -> Part | None:
        """Compare a run with the pre-trained model."""
        if name not in self.found:
            return None
        start = self.before[pretrained_kind(name)][where]
        effect = over_seeds(self.found, name, what, where, epoch) - start[what]
        return Part([name], effect, start["errors"][what])

    def lost(self, name, what="strict", where="trained", epoch=None) -> Part | None:
        """Compare the pre-trained model with a run."""
        return opposite(self.gained(name, what, where, epoch))

    def common(self, one, other) -> dict | None:
        """Choose the seeds that two runs share -> {run: [what is kept of each]}, None if they are
        too few."""
        if one not in self.found or other not in self.found:
            return None
        seeds = {kept["seed"] for kept in self.found[one]}
        seeds &= {kept["seed"] for kept in self.found[other]}
        enough = min(RUNS[one].seeds, RUNS[other].seeds,
                     max(len(self.found[one]), len(self.found[other])))
        if len(seeds) < enough:
            return None
        return {name: [kept for kept in self.found[name] if kept["seed"] in seeds]
                for name in (one, other)}

    def ahead(self, one, other, what="strict", where="trained", last=3) -> Part | None:
        """Compare two runs, seed by seed; None also if they share too few seeds."""
        both = self.common(one, other)
        if both is None:
            return None
        values = [over_seeds(both, name, what, where, last=last) for name in (one, other)]
        return Part([one, other], values[0] - values[1], 0)

    def saved(self, one, other) -> Part | None:
        """Compute how much earlier `one` reaches a reward than `other`, as a share of the reward
        queries, seed by seed. The reward is the lower one of those at which both end, so that both
        reach it. Rewards are means over LAST epochs of training images."""
        both = self.common(one, other)
        if both is None:
            return None
        shares = []
        for pair in zip(both[one], both[other]):
            first, second = [moving_mean(kept["reward_mean"]) for kept in pair]
            level = min(first[-1], second[-1])
            earlier = np.argmax(second >= level) - np.argmax(first >= level)
            shares.append(earlier / len(pair[0]["reward_mean"]))
        return Part([one, other], np.array(shares), 0)

    def ahead_at_equal_size(self, one, other, epoch=None) -> Part | None:
        """Compare the strict accuracy of two runs, seed by seed, at the size of a JPEG that `other`
        has after an epoch, or at its end. That of `one` is interpolated between its STAGES."""
        both = self.common(one, other)
        if both is None:
            return None
        start = self.before[pretrained_kind(one)]["trained"]
        path = {}
        for what in ("size", "strict"):
            stages = [over_seeds(both, one, what, epoch=stage) for stage in STAGES[one]]
            first = np.full(len(both[one]), start[what])
            path[what] = np.stack([first, *stages, over_seeds(both, one, what)], 1)
        levels = over_seeds(both, other, "size", epoch=epoch)
        reached = []
        for sizes, strict, level in zip(path["size"], path["strict"], levels):
            reached.append(first_crossing(sizes, strict, level))
        effect = np.array(reached) - over_seeds(both, other, "strict", epoch=epoch)
        return Part([one, other], effect, 0)


def moving_mean(values: list) -> np.ndarray:
    """Average every LAST consecutive values."""
    return np.convolve(values, np.ones(LAST) / LAST, "valid")


def first_crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Interpolate y where x, on its way from x[0], first crosses a level; y[-1] if it does not."""
    for i in range(len(x) - 1):
        if min(x[i], x[i + 1]) <= level <= max(x[i], x[i + 1]):
            return float(y[i] + (level - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]))
    return float(y[-1])


def opposite(part: Part | None) -> Part | None:
    """Change the sign of an effect."""
    if part is None:
        return None
    return Part(part.runs, -part.effect, part.error)


# ---------- the claims

def claims(before: dict, found: dict) -> list[Claim]:
    """List the claims with the effects of the runs that are finished."""
    effects = Effects(before, found)
    return [*ddpo_claims(effects), *dpok_claims(effects), *transfer_claims(effects),
            *noise_aware_claims(effects)]


def ddpo_claims(effects: Effects) -> list[Claim]:
    """List the claims of DDPO's sections 6.1, 6.2 and appendix A, and of its Fig. 4."""
    gained, lost, ahead = effects.gained, effects.lost, effects.ahead
    made = [
        Claim("DDPO 6.1", "DDPO changes the size of JPEGs in the rewarded direction, kB", 0, {
            "smaller": lost("DDPO jpeg", "size"),
            "larger": gained("DDPO incompressibility", "size")}),
        Claim("DDPO 6.2", "DDPO raises strict accuracy by 0.15 or more", 0.15, {
            kind: gained(f"DDPO {kind}") for kind in UNSEEN})]

    titles = {"DDPO": "DDPO_IS", "SF": "DDPO_SF", "RWR": "RWR", "RWR_sparse": "RWR_sparse"}
    for one, other in (("DDPO", "RWR"), ("DDPO", "RWR_sparse"), ("SF", "RWR"),
                       ("SF", "RWR_sparse"), ("DDPO", "SF")):
        text = (f"{titles[one]} ends with more reward than {titles[other]} "
                "(kB for the size of a JPEG, alignment for the count)")
        smaller = opposite(ahead(f"{one} jpeg", f"{other} jpeg", "size", last=1))
        larger = ahead(f"{one} incompressibility", f"{other} incompressibility", "size", last=1)
        count = ahead(f"{one} count", f"{other} count", "alignment", last=1)
        parts = {"`jpeg`": smaller, "`incompressibility`": larger, "count": count}
        made.append(Claim("DDPO Fig. 4", text, 0, parts))

    lost_accuracy, lost_diversity = {}, {}
    for reward in ("jpeg", "incompressibility"):
        lost_accuracy[f"`{reward}`"] = lost(f"DDPO {reward}")
        lost_diversity[f"`{reward}`"] = lost(f"DDPO {reward}", "diversity")
    text = "DDPO over-optimises a JPEG's size: strict accuracy falls by 0.15 or more"
    made.append(Claim("DDPO A", text, 0.15, lost_accuracy))
    text = "DDPO over-optimises a JPEG's size: diversity falls"
    made.append(Claim("DDPO A", text, 0, lost_diversity))

    kept_accuracy = {"`--kl_weight`": gained("DDPO jpeg kl_weight"),
                     "`--max_kl`": gained("DDPO jpeg max_kl"),
                     "stopped after epoch 12": gained("DDPO jpeg", epoch=12)}
    lost_size = {"`--kl_weight`": lost("DDPO jpeg kl_weight", "size"),
                 "`--max_kl`": lost("DDPO jpeg max_kl", "size"),
                 "stopped after epoch 12": lost("DDPO jpeg", "size", epoch=12)}
    text = "With a remedy, DDPO on `jpeg` loses at most 0.1 strict accuracy (shown: the change)"
    made.append(Claim("DDPO A", text, -0.1, kept_accuracy))
    text = "With a remedy, DDPO on `jpeg` still makes files smaller, kB"
    made.append(Claim("DDPO A", text, 0, lost_size))
    return made


def dpok_claims(effects: Effects) -> list[Claim]:
    """List the claims of DPOK on the prompts that it is trained on."""
    gained, ahead = effects.gained, effects.ahead
    made = [Claim("DPOK 5.2, 5.4", "DPOK raises strict accuracy by 0.15 or more", 0.15, {
        kind: gained(f"RL {kind}") for kind in KINDS})]
    for section, other, title in (("DPOK 5.2", "KL-O", "the supervised KL-O"),
                                  ("DPOK E.1", "KL-D", "the supervised KL-D"),
                                  ("", "DDPO", "DDPO")):
        text = f"DPOK ends with higher strict accuracy than {title}"
        parts = {kind: ahead(f"RL {kind}", f"{other} {kind}") for kind in UNSEEN}
        made.append(Claim(section, text, 0, parts))
    text = ("With its centred value function, DPOK ends with higher strict accuracy than with no "
            "baseline")
    parts = {"location": ahead("RL location", "no value location")}
    made.append(Claim("DPOK A.5", text, 0, parts))
    return made


def transfer_claims(effects: Effects) -> list[Claim]:
    """List the claims on prompts that were not trained on."""
    gained, lost, ahead = effects.gained, effects.lost, effects.ahead
    text = "DPOK raises strict accuracy of unseen prompts that differ from its own by one word"
    parts = {kind: gained(f"RL {kind}", where="unseen") for kind in UNSEEN}
    return [
        Claim("DPOK Fig. 10", text, 0, parts),
        Claim("DDPO 6.3", "DDPO on `jpeg` makes files of unseen captions smaller, kB",
              0, {"": lost("DDPO jpeg", "size", "unseen")}),
        Claim("after DPOK 5.3",
              "DPOK on `jpeg`, β 0: other prompts' strict accuracy falls by 0.15 or more",
              0.15, {"": lost("jpeg beta 0", where="other")}),
        Claim("after DPOK 5.3",
              "DPOK on `jpeg`, β 0.5: other prompts lose at most 0.1 strict accuracy (the change)",
              -0.1, {"": gained("jpeg beta 0.5", where="other")}),
        Claim("after DPOK 5.3", "DPOK on `jpeg`, β 0.5: files of its own prompt get smaller, kB",
              0, {"": lost("jpeg beta 0.5", "size")}),
        Claim("after DPOK 5.3",
              "DPOK on `jpeg`: other prompts stay more diverse with β 0.5 than with β 0",
              0, {"": ahead("jpeg beta 0.5", "jpeg beta 0", "diversity", "other")})]


def noise_aware_claims(effects: Effects) -> list[Claim]:
    """List the claims about --noise_aware, which is not in the papers. Each run is compared with
    the same run without it, and in Fig. 4 with the baselines."""
    gained, lost, ahead, saved = effects.gained, effects.lost, effects.ahead, effects.saved

    def more_reward(one: str, other: str, task: str, last: int = 3) -> Part | None:
        what = "alignment" if task in KINDS else "size"
        part = ahead(f"{one} {task}", f"{other} {task}", what, last=last)
        return opposite(part) if task == "jpeg" else part

    tasks = "jpeg", "incompressibility", *UNSEEN
    pairs = {}  # name of a part: task, run with the flag, run without it
    for task in tasks:
        title = task if task in KINDS else f"`{task}`"
        pairs[title] = task, "DDPO noise_aware", "DDPO"
    for task, title in {"jpeg": "`jpeg` at 50 steps", "location": "location at 50 steps"}.items():
        pairs[title] = task, "DDPO 50_steps noise_aware", "DDPO 50_steps"
    more = {}
    higher = {}
    sooner = {}
    for title, (task, one, other) in pairs.items():
        more[title] = more_reward(one, other, task)
        sooner[title] = saved(f"{one} {task}", f"{other} {task}")
        if task in KINDS:
            higher[title] = ahead(f"{one} {task}", f"{other} {task}")

    at_equal_size = {}
    for task in ("jpeg", "incompressibility"):
        for epoch in (12, 22, None):
            title = f"`{task}`, {epoch or 'end'}"
            at_equal_size[title] = effects.ahead_at_equal_size(f"DDPO noise_aware {task}",
                                                               f"DDPO {task}", epoch)

    flag = "With `--noise_aware`"
    units = "(kB for the size of a JPEG, alignment for the others)"
    made = [
        Claim("", f"{flag}, DDPO_IS ends with more reward than without it {units}", 0, more),
        Claim("", f"{flag}, DDPO_IS ends with higher strict accuracy than without it", 0, higher),
        Claim("", f"{flag}, DDPO_IS reaches the same reward with fewer queries than without it "
              "(shown: the difference, as a share of a run's queries)", 0, sooner),
        Claim("", f"{flag}, DDPO_IS has higher strict accuracy at the file size that a run without "
              "it has after epoch 12, after epoch 22 and at its end", 0, at_equal_size),
        Claim("", f"{flag}, DDPO_SF ends with more reward than without it, kB", 0,
              {"`jpeg`": more_reward("SF noise_aware", "SF", "jpeg")}),
        Claim("", f"{flag}, DPOK ends with higher strict accuracy than without it", 0, {
            task: ahead(f"RL noise_aware {task}", f"RL {task}")
            for task in ("count", "composition", "location")})]
    for other in ("RWR", "RWR_sparse"):
        parts = {}
        for title, (task, one, _) in pairs.items():
            if f"{other} {task}" in RUNS and "50_steps" not in one:
                parts[title] = more_reward(one, other, task, last=1)
        made.append(Claim("after DDPO Fig. 4",
                          f"{flag}, DDPO_IS ends with more reward than {other} {units}", 0, parts))
    with_penalty = "DDPO noise_aware jpeg kl_weight"
    smaller = opposite(ahead(with_penalty, "DDPO jpeg kl_weight", "size"))
    return [
        *made,
        Claim("after DDPO A", f"{flag}, DDPO over-optimises a JPEG's size: strict accuracy falls "
              "by 0.15 or more", 0.15, {
                  f"`{task}`": lost(f"DDPO noise_aware {task}")
                  for task in ("jpeg", "incompressibility")}),
        Claim("after DDPO A", f"{flag} and `--kl_weight`, DDPO on `jpeg` loses at most 0.1 strict "
              "accuracy (shown: the change)", -0.1, {"": gained(with_penalty)}),
        Claim("after DDPO A", f"{flag} and `--kl_weight`, DDPO on `jpeg` makes files smaller than "
              "with `--kl_weight` alone, kB", 0, {"": smaller})]


def verdict(part: Part, least: float) -> str:
    """Judge a part of a claim by its mean effect over seeds and the 95 % interval of it.

    It holds if the mean is at least `least` and the interval lies above 0 or, where a loss is to be
    avoided and `least` is negative, above `least`. It fails if the interval lies below `least`.
    Otherwise it is inconclusive.
    """
    mean = part.effect.mean()
    error = math.hypot(standard_error(part.effect), part.error)
    reach = STUDENT[len(part.effect)] * error
    if mean >= least and mean - reach > min(least, 0):
        return "holds"
    if mean + reach < least:
        return "**fails**"
    return "inconclusive"


def repeat(stored: dict, again: dict):
    """Print whether the mean over other seeds, or over the same on another device, lies in the 95 %
    prediction interval of the recorded seeds. For the same seeds this interval is too wide."""
    before = stored["pre-trained"]
    recorded_claims = claims(before, finished(stored))
    new_claims = claims(before, finished(again, least=1))
    for recorded, new in zip(recorded_claims, new_claims):
        for name in recorded.parts:
            if not recorded.parts[name] or not new.parts[name]:
                continue
            old = recorded.parts[name].effect
            others = new.parts[name].effect
            mean = others.mean()
            reach = STUDENT[len(old)] * old.std(ddof=1) * (1 / len(old) + 1 / len(others)) ** 0.5
            says = "within" if abs(mean - old.mean()) <= reach else "OUTSIDE"
            what = f"{recorded.text}, {name}" if name else recorded.text
            print(f"{what}: {mean:.2f}, {says} {old.mean():.2f} ± {reach:.2f}")


# ---------- the tables, as lists of lines

def row(*cells: str) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def header(*columns: str) -> list[str]:
    """Write the first two lines of a Markdown table."""
    return [row(*columns), f"{'|---' * len(columns)}|"]


def claim_table(before: dict, found: dict) -> list[str]:
    """Write the claims with their effects and verdicts."""
    lines = header("paper", "claim", "effect", "on `shapes/`", "runs")
    for claim in claims(before, found):
        effects, verdicts, names = [], {}, []
        for name, part in claim.parts.items():
            if part is None:
                continue
            effects.append(f"{name} {spread(part.effect, part.error)}".strip())
            verdicts[name] = verdict(part, claim.least)
            names += part.runs
        if verdicts:
            runs = ", ".join(dict.fromkeys(names))
            cells = claim.section, claim.text, "; ".join(effects), verdict_text(verdicts), runs
            lines.append(row(*cells))
    return lines


def verdict_text(verdicts: dict[str, str]) -> str:
    """Write the verdict of most parts once, and those of the others with their names."""
    (most, times), = Counter(verdicts.values()).most_common(1)
    if 2 * times <= len(verdicts):
        return ", ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())
    others = [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict != most]
    if not others:
        return most
    return f"{most}; {', '.join(others)}"


def ddpo_table(before: dict, found: dict) -> list[str]:
    """Write what the runs on all prompts end with."""
    measures = "size", "strict", "diversity"
    lines = header("the 16 prompts", "after epoch", "size, kB", "strict", "diversity", "KL")
    start = [f"{before['all']['trained'][what]:.2f}" for what in measures]
    lines.append(row("pre-trained", "", *start, "0"))
    for name in found:
        if RUNS[name].kind != "all" or "50_steps" in name:
            continue
        for epoch in STAGES.get(name, ()):
            scores = [spread(over_seeds(found, name, what, epoch=epoch)) for what in measures]
            lines.append(row(name, str(epoch), *scores, logged_kl(found[name], epoch)))
        ends = np.concatenate([kept["ends"] for kept in found[name]])
        when = str(ends[0])
        if min(ends) < max(ends):
            when = f"{min(ends)} to {max(ends)}"
        scores = [spread(over_seeds(found, name, what)) for what in measures]
        lines.append(row(name, when, *scores, logged_kl(found[name])))
    return lines


def logged_kl(runs: list, epoch: int | None = None) -> str:
    """Write the KL of a run: the mean over the last five epochs, up to `epoch` if it is given, and
    then the median over the seeds."""
    means = [np.mean(kept["kl"][:epoch][-5:]) for kept in runs]
    return f"{np.median(means):.2g}"


def method_table(before: dict, found: dict) -> list[str]:
    """Write the strict accuracy of each method on each kind of prompt."""
    methods = "KL-O", "KL-D", "SF", "RWR", "RWR_sparse", "DDPO", "RL"
    lines = header("strict accuracy", "pre-trained", *methods, "unseen partner: pre-trained",
                   "unseen: RL", "other prompts: pre-trained", "other: RL")

    for kind, prompt in KINDS.items():
        start = {"unseen": ""}
        for where, scores in before[kind].items():
            start[where] = f"{scores['strict']:.2f}"
        by_method = [accuracy(found, f"{method} {kind}", "trained") for method in methods]
        lines.append(row(prompt, start["trained"], *by_method,
                         start["unseen"], accuracy(found, f"RL {kind}", "unseen"),
                         start["other"], accuracy(found, f"RL {kind}", "other")))
    return lines


def noise_aware_table(before: dict, found: dict) -> list[str]:
    """Write what runs with and without --noise_aware end with, on the seeds that both have."""
    columns = []
    for what in ("size in kB, or alignment", "strict"):
        columns += [f"{what}: pre-trained", f"{what}: without", f"{what}: with"]
    lines = header("run", *columns, "KL: without", "KL: with")
    for name in found:
        partner = name.replace(" noise_aware", "")
        both = Effects(before, found).common(name, partner)
        if name == partner or both is None:
            continue
        start = before[pretrained_kind(name)]["trained"]
        cells = [partner]
        for what in ("size" if RUNS[name].kind == "all" else "alignment", "strict"):
            cells += [f"{start[what]:.2f}", spread(over_seeds(both, partner, what)),
                      spread(over_seeds(both, name, what))]
        lines.append(row(*cells, logged_kl(both[partner]), logged_kl(both[name])))
    return lines


def accuracy(found: dict, name: str, where: str) -> str:
    """Write the strict accuracy of a run on a set of prompts; nothing if it was not measured."""
    if name not in found or where not in found[name][0]:
        return ""
    return spread(over_seeds(found, name, where=where))


def shared_table() -> list[str]:
    """Write the settings that runs share."""
    lines = header("runs of", "settings, unless a run's command names others")
    lines.append(row("all scripts", f"`{COMMON}`"))
    scripts = {}  # flags: the scripts whose runs share them
    for script, flags in SHARED.items():
        scripts.setdefault(flags, []).append(f"`{script.Config.script}`")
    for flags, names in scripts.items():
        lines.append(row(", ".join(names), f"`{flags}`"))
    return lines


def run_table(found: dict) -> list[str]:
    """Write the commands of the runs."""
    title = "command, with the settings above and `--seed`"
    lines = header("run", title, "queries, at most", "updates")
    for name, runs in found.items():
        queries = max(kept["queries"] for kept in runs)
        updates = max(kept["updates"] for kept in runs)
        command = f"`python {RUNS[name].script.Config.script} {arguments(name)}`"
        lines.append(row(name, command, str(queries), str(updates)))
    return lines


def result_tables(stored: dict) -> list[str]:
    """Write what the runs have shown."""
    before, found = stored["pre-trained"], finished(stored)
    return [*claim_table(before, found), "", *ddpo_table(before, found), "",
            *method_table(before, found), "", *noise_aware_table(before, found),
            *unfinished(found)]


def unfinished(found: dict) -> list[str]:
    """Write which runs have yet to be made; nothing if there are none."""
    names = [name for name in RUNS if name not in found]
    if not names:
        return []
    return ["", f"Not finished yet: {', '.join(names)}. `python experiments/claims.py` makes them."]


def run_tables(stored: dict) -> list[str]:
    """Write how to repeat the runs."""
    return [*shared_table(), "", *run_table(finished(stored))]


# ---------- the command line

def quick(at_once: int) -> int:
    """Print trends of short runs -> how many runs failed."""
    file = FOLDER / "quick.json"
    file.unlink(missing_ok=True)
    before = load(RECORDED)["pre-trained"]
    jobs = [(name, 0, {"epochs": epochs, "folder": FOLDER / "quick"})
            for name, epochs in QUICK.items()]
    failed = run_all(jobs, at_once, file)
    print("one seed, short runs: trends, no verdicts")
    for key, kept in load(file)["runs"].items():
        name = key.rpartition("-")[0]
        last = kept["ends"][-1]
        for what in ("size", "strict"):
            start = before[RUNS[name].kind]["trained"][what]
            end = kept["trained"][str(last)][what]
            print(f"{name}, {last} epochs: {what} {start:.2f} → {end:.2f}")
    return failed


def write_page(stored: dict):
    """Replace the tables of experiments/README.md, each between two marks."""
    page = PAGE.read_text(encoding="utf-8")
    for name, tables in {"results": result_tables, "runs": run_tables}.items():
        begin, end = marks(name)
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = "\n".join([before + begin, *tables(stored), end + after])
    PAGE.write_text(page, encoding="utf-8")


def marks(name: str) -> tuple[str, str]:
    """Name the lines of experiments/README.md between which some tables stand."""
    return f"<!-- {name} of claims.py begin -->", f"<!-- {name} of claims.py end -->"


def main() -> int:
    """Run the command line -> exit status 1 if a run failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME",
                        help="the run of this name or, failing that, the runs with it in theirs")
    parser.add_argument("--count", type=int, choices=STUDENT,
                        help=f"number of seeds, from {FIRST} on (default: 8 for most runs, 4 for "
                             "those of 50 steps, 16 for some)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[],
                        help="other seeds, to be compared with the recorded ones")
    parser.add_argument("--device", default="cpu",
                        help="cuda: train there in fp16 and compare with the recorded runs")
    parser.add_argument("--quick", action="store_true",
                        help="three short runs, ten minutes; only --jobs can be given with it")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    options = parser.parse_args()
    names = [name for name in RUNS if options.only in name]
    if options.only in RUNS:
        names = [options.only]
    if not names:
        parser.error(f"no run has {options.only!r} in its name; the runs are {', '.join(RUNS)}")
    is_repeat = bool(options.seeds) or options.device != "cpu"
    if (options.quick or is_repeat) and not load(RECORDED)["pre-trained"]:
        parser.error(f"{RECORDED} has no scores of the pre-trained model; run claims.py without "
                     "--quick, --seeds and --device first")
    if options.seeds and options.count:
        parser.error("--count cannot be combined with --seeds")
    if options.quick:
        if options.only or options.seeds or options.device != "cpu" or options.count:
            parser.error("--quick cannot be combined with --only, --count, --seeds or --device")
        return int(quick(options.jobs) > 0)
    seeds_of = {}
    for name in names:
        count = options.count or RUNS[name].seeds
        if count < RUNS[name].seeds:
            parser.error(f"--count {count} is less than the {RUNS[name].seeds} seeds of {name!r}; "
                         "use --seeds for a repeat with fewer")
        seeds_of[name] = list(dict.fromkeys(options.seeds)) or range(FIRST, FIRST + count)
    folder = FOLDER
    if is_repeat:
        seeds = max(seeds_of.values(), key=len)
        folder /= f"{options.device}-seeds-{'-'.join(str(seed) for seed in seeds)}"
    jobs = []
    for name, seeds in seeds_of.items():
        for seed in seeds:
            jobs.append((name, seed, {"device": options.device, "folder": folder}))
    if is_repeat:
        again = folder.with_suffix(".json")
        failed = run_all(jobs, options.jobs, again)
        repeat(load(RECORDED), load(again))
        return int(failed > 0)
    stored = load(RECORDED)
    if not {pretrained_kind(name) for name in RUNS} <= stored["pre-trained"].keys():
        measured = measure_pretrained(stored["pre-trained"])
        save(RECORDED, load(RECORDED) | {"pre-trained": measured})
    failed = run_all(jobs, options.jobs, RECORDED)
    write_page(load(RECORDED))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
