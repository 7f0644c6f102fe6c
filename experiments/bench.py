"""What an epoch of ddpo.py costs, as ratios of measurements taken side by side in one run: against the calls of UNet and VAE that it cannot do
without, in one pass against two, with more samples, steps and rows, and against TRL's trainer.

    python experiments/bench.py --size shapes      the model in shapes/, its settings
    python experiments/bench.py --size medium      22 million parameters, latents of 32 x 32
    python experiments/bench.py --size sd          a UNet and a VAE of Stable Diffusion's size, random weights: for a GPU, or 20 GB and patience
    python experiments/bench.py --size medium --peer ENVIRONMENT/bin/python      TRL's too, where experiments/requirements-peer.txt is installed

On a CPU a cost is CPU seconds of one thread, which other work on the machine disturbs least; on a GPU it is seconds. Each is a median over
epochs, and what is compared takes turns. The peak of memory is that of a process that does nothing else (on a CPU with all it has imported).
The results are in experiments/results/bench-<size>-<device>-<precision>.json.
"""
import argparse
import dataclasses
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import ddpo  # noqa: E402

RESULTS, MODELS = HERE / "results", HERE.parent / "runs" / "bench"
UNETS = {"medium": {"sample_size": 32, "block_out_channels": (96, 192, 320), "layers_per_block": 1, "cross_attention_dim": 96,
                    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2},
         "sd": {"sample_size": 64, "cross_attention_dim": 768}}  # the rest are the class's defaults, Stable Diffusion's
VAES = {"medium": {"block_out_channels": (32, 64), "norm_num_groups": 8}, "sd": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}}
SETTINGS = {"shapes": {"prompts": "shapes/prompts.txt", "samples_per_epoch": 64, "steps": 10, "batch": 64, "guidance": 2.0, "updates_per_epoch": 4},
            "medium": {"samples_per_epoch": 4, "steps": 5, "batch": 2, "updates_per_epoch": 2},
            "sd": {"samples_per_epoch": 2, "steps": 2, "batch": 1, "guidance": 1.0, "updates_per_epoch": 2}}  # guidance would double each row
ON_GPU = {"samples_per_epoch": 16, "steps": 10, "batch": 8, "guidance": 5.0}  # of the size sd


def make_model(size):
    """A folder with a pipeline of that size: random weights, and text parts like those of shapes/, of the UNet's width and as many tokens as
    Stable Diffusion's."""
    folder, shapes = MODELS / size, HERE.parent / "shapes"
    if size == "shapes":
        return shapes
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**UNETS[size])
        levels = len(VAES[size]["block_out_channels"])
        vae = diffusers.AutoencoderKL(latent_channels=4, down_block_types=("DownEncoderBlock2D",) * levels,
                                      up_block_types=("UpDecoderBlock2D",) * levels, **VAES[size])
        text = transformers.CLIPTextConfig.from_pretrained(shapes / "text_encoder")
        text.hidden_size, text.max_position_embeddings = UNETS[size]["cross_attention_dim"], 77
        tokenizer = transformers.CLIPTokenizer.from_pretrained(shapes / "tokenizer", model_max_length=77)
        scheduler = diffusers.DDIMScheduler.from_pretrained(shapes / "scheduler", set_alpha_to_one=False, steps_offset=1, clip_sample=False)
        diffusers.StableDiffusionPipeline(vae, transformers.CLIPTextModel(text), tokenizer, unet, scheduler, None, None,
                                          requires_safety_checker=False).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):  # what TRL's older transformers read
            shutil.copy(shapes / "tokenizer" / name, folder / "tokenizer")
    return folder


def clock(device):
    """CPU seconds of this process, or seconds once the GPU is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(function, spent, name, device):
    def run(*args, **kwargs):
        started = clock(device)
        result = function(*args, **kwargs)
        spent[name] = spent.get(name, 0) + clock(device) - started
        return result
    return run


class Bare:
    """The calls of UNet (LoRA in it) and VAE that an epoch in two passes cannot do without, and nothing else: sampling, decoding, a forward and a
    backward pass of each row, and, for the KL that is logged, two forward passes of one row a sample."""

    def __init__(self, pipe, config):
        self.pipe, self.config, self.halves = pipe, config, 1 if config.guidance == 1 else 2
        size, generator = pipe.unet.config.sample_size, torch.Generator().manual_seed(0)
        self.x = torch.randn(self.halves * config.batch, 4, size, size, generator=generator).to(pipe.device, pipe.unet.dtype)
        self.t = torch.full((len(self.x),), 500, device=pipe.device)
        self.cond = ddpo.encode(pipe, ["a red circle"] * len(self.x)).to(pipe.unet.dtype)

    def forward(self, rows):
        rows = rows * self.halves
        return self.pipe.unet(self.x[:rows], self.t[:rows], encoder_hidden_states=self.cond[:rows]).sample

    @torch.no_grad()
    def sampling(self, steps):
        for _ in range(self.config.samples_per_epoch // self.config.batch):
            for _ in range(steps):
                self.forward(self.config.batch)
            self.pipe.vae.decode(self.x[:self.config.batch].to(self.pipe.vae.dtype))
            self.forward(self.config.batch)
            with ddpo.pretrained(self.pipe.unet):
                self.forward(self.config.batch)

    def epoch(self):
        self.sampling(self.config.steps)
        for samples in torch.arange(self.config.samples_per_epoch).chunk(self.config.updates_per_epoch):
            for rows in torch.arange(len(samples) * self.config.steps).split(self.config.batch):
                self.forward(len(rows)).float().sum().backward()
            self.pipe.unet.zero_grad(set_to_none=True)


def measure(config, epochs, bare=False, warm=0):
    """Train, without pictures; after each epoch, but for those that warm up, do its bare calls if asked
    -> [{"epoch": cost, "sampling": cost, "decoding": cost, ..., "bare": cost}]."""
    spent, found, pipes, device = {}, [], [], config.device
    names = {"sample": "sampling", "descend": "updates", "mean_kl": "kl"}
    originals = {name: getattr(ddpo, name) for name in (*names, "load_pipeline", "log_epoch", "show_samples", "draw_summary", "start_run")}
    load_reward = ddpo.rewards.load

    def load_pipeline(config):
        pipes.append(originals["load_pipeline"](config))
        pipes[0].vae.decode = timed(pipes[0].vae.decode, spent, "decoding", device)
        return pipes[0]

    def log_epoch(folder, row, writer):  # called at the end of each epoch
        cost = clock(device) - spent.pop("started")
        spent["sampling"] -= spent["decoding"]
        if row["epoch"] > warm:
            found.append({"epoch": cost, **spent, "bare": 0.0})
            if bare:
                timed(Bare(pipes[0], config).epoch, found[-1], "bare", device)()
        spent.clear()
        spent["started"] = clock(device)

    def start_run(*args):  # called before the first
        run = originals["start_run"](*args)
        spent.clear()
        spent["started"] = clock(device)
        return run

    try:
        for name, part in names.items():
            setattr(ddpo, name, timed(originals[name], spent, part, device))
        ddpo.load_pipeline, ddpo.log_epoch, ddpo.start_run = load_pipeline, log_epoch, start_run
        ddpo.show_samples = ddpo.draw_summary = lambda *args: None
        ddpo.rewards.load = lambda *args, **options: timed(load_reward(*args, **options), spent, "reward", device)
        with tempfile.TemporaryDirectory() as folder:
            ddpo.train(dataclasses.replace(config, epochs=warm + epochs, save_every=warm + epochs, out=folder))
    finally:
        ddpo.rewards.load = load_reward
        for name, function in originals.items():
            setattr(ddpo, name, function)
    return found


def median(found, name):
    return statistics.median(epoch[name] for epoch in found)


def train_trl(config, epochs):
    """The same work by TRL's DDPOTrainer: samples, steps, rows a call, updates, guidance, rank, but for the KL, which it does not log
    -> CPU seconds of each epoch but the first."""
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    PartialState(cpu=True)  # without it the pipeline fails at a warning of its own
    samples = config.samples_per_epoch // config.updates_per_epoch  # of an update; TRL's rows are samples, a step at a time
    batch = min(config.batch, samples)
    settings = DDPOConfig(
        num_epochs=epochs + 1, save_freq=epochs + 9, mixed_precision="no", allow_tf32=False, sample_num_steps=config.steps,
        sample_guidance_scale=config.guidance, sample_batch_size=config.batch, sample_num_batches_per_epoch=config.samples_per_epoch // config.batch,
        train_batch_size=batch, train_gradient_accumulation_steps=samples // batch, per_prompt_stat_tracking=True, accelerator_kwargs={"cpu": True},
        project_kwargs={"project_dir": str(MODELS)})
    pipeline = DefaultDDPOStableDiffusionPipeline(config.model)
    prompts, reward, marks = ddpo.load_prompts(config.prompts), ddpo.rewards.load("jpeg"), []

    def reward_fn(images, texts, metadata):
        images = pipeline.sd_pipeline.image_processor.numpy_to_pil(images.permute(0, 2, 3, 1).float().numpy())
        return reward(images, list(texts)), {}

    trainer, step = DDPOTrainer(settings, reward_fn, lambda: (prompts[len(marks) % len(prompts)], {}), pipeline), 0
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    for epoch in range(epochs + 1):
        started = time.process_time()
        step = trainer.step(epoch, step)
        marks.append(time.process_time() - started)
    return marks[1:]


def peak_memory(device):
    """GB that this process took at most. On Linux getrusage's number is no less than that of the process that started it."""
    status = Path("/proc/self/status")
    if device.startswith("cuda") or not status.exists():
        return ddpo.peak_memory(device)
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9


def in_child(python, what, config, epochs):
    """A measurement in a process of its own, so that its peak of memory is its own -> what `child` printed."""
    command = [python, __file__, "--child", json.dumps([what, dataclasses.asdict(config), epochs])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python}, {what}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(what, settings, epochs):
    torch.set_num_threads(1)
    config = ddpo.Config(**settings)
    warm = int(epochs > 1)  # one epoch alone is for its memory
    found = [{"epoch": cost} for cost in train_trl(config, epochs)] if what == "trl" else measure(config, epochs, warm=warm)
    print(json.dumps({"epochs": found, "memory_gb": peak_memory(config.device),
                      "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}}))


def bench(config, options):
    """-> the table's rows: (what, cost, its ratio to something, of what)."""
    warm = int(options.size != "sd" or config.device != "cpu")  # an epoch of minutes needs no warming up
    found = measure(config, options.epochs, bare=True, warm=warm)
    epoch = median(found, "epoch")
    yield "an epoch, DDPO_IS", epoch, statistics.median(e["epoch"] / e["bare"] for e in found), "the bare calls"
    for part in ("sampling", "decoding", "reward", "updates", "kl"):
        yield f"of it {part}", median(found, part), median(found, part) / epoch, "the epoch"
    yield "the bare calls of UNet and VAE", median(found, "bare"), 1.0, "the bare calls"

    two = dataclasses.replace(config, algo="sf", updates_per_epoch=1)
    one = dataclasses.replace(two, single_pass=True)
    turns = [[measure(c, 1, warm=warm * int(config.compile or i == 0))[0] for c in (two, one)] for i in range(options.epochs)]
    for what, parts in {"an epoch": ["epoch"], "sampling and updates": ["sampling", "updates"]}.items():
        costs = [[sum(cost[part] for part in parts) for cost in turn] for turn in turns]
        yield f"{what}, DDPO_SF", statistics.median(a for a, _ in costs), 1.0, "DDPO_SF in two passes"
        yield f"{what}, DDPO_SF, --single_pass", statistics.median(b for _, b in costs), statistics.median(b / a for a, b in costs), "DDPO_SF in two passes"
    for name in ("samples_per_epoch", "steps", "batch") if options.growth else ():
        before, after = getattr(config, name), max(config.batch // 2, 1) if name == "batch" else 2 * getattr(config, name)
        turns = [[measure(dataclasses.replace(config, **{name: n}), 1, warm=warm)[0]["epoch"] for n in (before, after)] for _ in range(options.epochs)]
        yield f"an epoch, {name} {after}", statistics.median(b for _, b in turns), statistics.median(b / a for a, b in turns), f"{name} {before}"


def bench_peer(config, options):
    """-> rows of the table, memory of both, versions: two epochs each, ours and TRL's taking turns, each in a process of its own."""
    turns = [[in_child(python, what, config, 2) for python, what in ((sys.executable, "ours"), (options.peer, "trl"))] for _ in range(options.epochs)]
    costs = [[median(a["epochs"], "epoch"), median(a["epochs"], "epoch") - median(a["epochs"], "kl"), median(b["epochs"], "epoch")] for a, b in turns]
    rows = [("an epoch, TRL 0.23.1", statistics.median(c[2] for c in costs), 1.0, "TRL's epoch")]
    rows += [(text, statistics.median(c[i] for c in costs), statistics.median(c[i] / c[2] for c in costs), "TRL's epoch")
             for i, text in enumerate(("an epoch, DDPO_IS, beside TRL's", "the same without the KL that is logged"))]
    memory = {who: statistics.median(turn[i]["memory_gb"] for turn in turns) for i, who in enumerate(("ours beside TRL", "TRL"))}
    return rows, memory, {who: turns[0][i]["versions"] for i, who in enumerate(("ours", "TRL"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SETTINGS, default="shapes")
    parser.add_argument("--device", help="default: cuda where there is one, but for --peer, otherwise cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--growth", action="store_true", help="also with twice the samples, twice the steps, half the rows")
    parser.add_argument("--epochs", type=int, default=5, help="over which a median is taken")
    parser.add_argument("--peer", metavar="PYTHON", help="of the environment that has TRL")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*json.loads(options.child))
    options.device = options.device or ("cuda" if torch.cuda.is_available() and not options.peer else "cpu")
    if not options.device.startswith(("cuda", "cpu")):
        parser.error(f"device {options.device!r} is not measured; take cuda or cpu")
    if options.peer and (options.device, options.precision, options.compile) != ("cpu", "fp32", False):
        parser.error("peer is measured on a CPU in fp32 alone; leave --device, --precision and --compile out")
    torch.set_num_threads(1)
    MODELS.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[options.size] | (ON_GPU if options.size == "sd" and options.device.startswith("cuda") else {})
    config = ddpo.Config(model=str(make_model(options.size)), device=options.device, precision=options.precision, compile=options.compile,
                         reward="jpeg", **settings)
    one_pass = dataclasses.replace(config, algo="sf", updates_per_epoch=1, single_pass=True)
    memory, versions = {what: in_child(sys.executable, "ours", c, 1)["memory_gb"] for what, c in (("DDPO_IS", config), ("--single_pass", one_pass))}, {}
    rows = list(bench(config, options))
    if options.peer:
        peer_rows, peer_memory, versions = bench_peer(config, options)
        rows, memory = rows + peer_rows, memory | peer_memory
    unit = "s" if options.device.startswith("cuda") else "CPU s"
    print(f"| {options.size}, {options.precision} | {unit} | ratio | to |\n|---|---|---|---|")
    for what, cost, ratio, to in rows:
        print(f"| {what} | {cost:.3g} | {ratio:.2f} | {to} |")
    print("peak memory, GB: " + ", ".join(f"{who} {gb:.2f}" for who, gb in memory.items()))
    machine = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else f"one thread of {platform.processor() or 'a CPU'}"
    command = " ".join(sys.argv[1:]).replace(options.peer or "PYTHON", "PYTHON")
    result = {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "command": command, "unit": unit,
              "settings": settings, "rows": rows, "peak_memory_gb": memory, "versions": versions}
    marks = "".join(f"-{name}" for name in ("compile", "growth", "peer") if getattr(options, name))
    file = RESULTS / f"bench-{options.size}-{options.device.partition(':')[0]}-{options.precision}{marks}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__":
    main()
