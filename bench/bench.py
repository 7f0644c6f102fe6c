"""Measure what an epoch of ddpo.py costs, as ratios of what is measured in turns in the same run:
compared with the calls of UNet and VAE that it cannot do without, one pass compared with two, and
compared with TRL's trainer.

    python bench/bench.py --size shapes   # the model in shapes/, with its settings
    python bench/bench.py --size medium   # 22 million parameters, latents of 32 x 32
    python bench/bench.py --size sd       # Stable Diffusion's size: 20 GB and hours
    python bench/bench.py --size tiny     # a minute: whether the command works
    python bench/bench.py --peer PYTHON   # also TRL, in the environment of that Python, which has
                                          # requirements-peer.txt
    python bench/bench.py --memory        # the memory of Stable Diffusion, counted without a GPU
    python bench/bench.py --size sd --device cuda --precision fp16 --peer PYTHON  # see gpu.py

All sizes but shapes have random weights. On a CPU a cost is the CPU seconds of one thread, which
other work on the machine disturbs least; on a GPU it is seconds. Each number is the median over
epochs. The peak memory is that of a process that does nothing else, on a CPU with all that it has
imported. The results are written to bench/results/bench-<size>-cpu-<precision>.json, and those of a
GPU to bench/results/gpu.jsonl.
"""
import argparse
import contextlib
import dataclasses
import json
import math
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
ROOT = HERE.parent
for folder in (ROOT / "experiments", ROOT):
    sys.path.insert(0, str(folder))
import ddpo  # noqa: E402
import memory  # noqa: E402
import rewards  # noqa: E402
import single_pass  # noqa: E402

RESULTS = HERE / "results"
SHAPES = ROOT / "shapes"
MODELS = ROOT / "runs" / "bench"


def vae_settings(widths: tuple, layers_per_block: int, norm_num_groups: int) -> dict:
    """Make the settings of a VAE like Stable Diffusion's, of other widths and depth."""
    return {"latent_channels": 4, "block_out_channels": widths,
            "layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups,
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths)}

UNETS = {  # the classes' other settings are Stable Diffusion's
    "tiny": {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
             "cross_attention_dim": 64, "attention_head_dim": 2, "norm_num_groups": 4,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "medium": {"sample_size": 32, "block_out_channels": (96, 192, 320), "layers_per_block": 1,
               "cross_attention_dim": 96,
               "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
    "sd": {"sample_size": 64, "cross_attention_dim": 768}}
VAES = {"tiny": vae_settings((8, 8), layers_per_block=1, norm_num_groups=4),
        "medium": vae_settings((32, 64), layers_per_block=1, norm_num_groups=8),
        "sd": vae_settings((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)}
SETTINGS = {
    "tiny": {"samples_per_epoch": 8, "steps": 3, "batch": 4, "updates_per_epoch": 2},
    "shapes": {"prompts": "shapes/prompts.txt", "samples_per_epoch": 64, "steps": 10, "batch": 64,
               "guidance": 2.0},
    "medium": {"samples_per_epoch": 6, "steps": 6, "batch": 3, "updates_per_epoch": 2},
    "sd": {"samples_per_epoch": 2, "steps": 2, "batch": 1, "updates_per_epoch": 2,
           "guidance": 1.0}}  # without guidance a UNet call has one row per sample
LOG_COLUMNS = ("epoch", "reward_queries", "reward_mean", "reward_std", "ratio_mean",
               "ratio_deviation", "clipped", "grad_norm", "skipped", "seconds", "gpu_gb", "kl")


def make_model(size: str, models: Path) -> Path:
    """Make a pipeline of that size in the folder `models`, unless it is there -> the pipeline's own
    folder. UNet and VAE have random weights. The text parts are like those of shapes/, but as wide
    as the UNet, and with as many tokens as Stable Diffusion's."""
    if size == "shapes":
        return SHAPES
    folder = models / size
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNETS[size])
    vae = diffusers.AutoencoderKL(**VAES[size])
    text = transformers.CLIPTextConfig.from_pretrained(SHAPES / "text_encoder")
    text.hidden_size = UNETS[size]["cross_attention_dim"]
    text.max_position_embeddings = 77
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        SHAPES / "tokenizer", model_max_length=77)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        SHAPES, unet=unet, vae=vae, text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # what TRL's older transformers reads
        shutil.copy(SHAPES / "tokenizer" / name, folder / "tokenizer")
    return folder


# ---------- measuring epochs
class Measured(BaseException):
    """Ends a run when enough epochs are measured. The scripts report an Exception as an error."""

def clock(device: str) -> float:
    """Get the CPU seconds of this process or, once the GPU is done, the time in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()

def start_at_epoch_2(config: ddpo.Config, folder: Path):
    """Write a checkpoint as if epoch 1 was done, because a run that starts at epoch 1 first samples
    16 pictures. It has no LoRA and no optimiser, so that the run begins with fresh ones."""
    settings = dataclasses.asdict(config) | {"out": "", "resume": ""}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    row = dict.fromkeys(LOG_COLUMNS, 0.0) | {"epoch": 1}
    torch.save({"settings": settings, "log": [row]}, folder / "checkpoint.pt")

def measure(train, config: ddpo.Config, epochs: int, warm_up: int = 0, between=None) -> list[dict]:
    """Run `train` of ddpo or single_pass -> the costs of each epoch after the warm-up, {"epoch":
    cost, ...}. `between` is called between the epochs, off the clock, and may return more costs.

    Every epoch calls the reward once. So the reward, that of JPEG, looks at the clock: from the
    start of one call to the start of the next are the reward, updates, KL and saving of one epoch,
    and sampling and decoding of the next. The last call ends the run.
    """
    costs = []
    start = None  # of the epoch that is measured

    def clocked_jpeg(images: list, prompts: list):
        nonlocal start
        if start is not None:
            cost = {"epoch": clock(config.device) - start}
            if between is not None:
                cost |= between()
            costs.append(cost)
        if len(costs) == warm_up + epochs:
            raise Measured
        start = clock(config.device)
        return rewards.REWARDS["jpeg"](images, prompts)

    config = dataclasses.replace(
        config, reward="clocked_jpeg", epochs=warm_up + epochs + 2, sample_every=10**6)
    rewards.REWARDS["clocked_jpeg"] = clocked_jpeg
    with tempfile.TemporaryDirectory() as folder:
        start_at_epoch_2(config, Path(folder))
        resumed = dataclasses.replace(config, out="", resume=folder)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            try:
                train(resumed)
            except Measured:
                pass
            finally:
                del rewards.REWARDS["clocked_jpeg"]
    return costs[warm_up:]

def load_pipeline(config: ddpo.Config):
    """Load a pipeline with fresh LoRA, for what is measured between the epochs of a run."""
    pipe = ddpo.load_pipeline(config)
    ddpo.add_lora(pipe.unet, config.rank)
    return pipe

@torch.no_grad()
def measure_parts(pipe, config: ddpo.Config) -> dict:
    """Call the parts of an epoch that are functions of ddpo.py -> the cost of each. Sampling does
    not include decoding."""
    N = config.samples_per_epoch
    all_prompts = ddpo.load_prompts(config.prompts)
    prompts = [all_prompts[i % len(all_prompts)] for i in range(N)]
    generators = [ddpo.generator(config.seed, 1, i) for i in range(N)]
    rng = ddpo.generator(config.seed, 1, N)
    reward_fn = rewards.load("jpeg")

    start = clock(config.device)
    rollout = ddpo.sample(pipe, prompts, config, generators)
    sampled = clock(config.device)
    for x_0 in rollout.latents[:, -1].split(config.batch):
        ddpo.decode(pipe, x_0)
    decoded = clock(config.device)
    reward_fn(rollout.images, prompts)
    scored = clock(config.device)
    ddpo.kl_to_pretrained(pipe, rollout, config, rng)
    end = clock(config.device)

    decoding = decoded - sampled
    return {"sampling": sampled - start - decoding, "decoding": decoding,
            "reward": scored - decoded, "kl": end - scored}

def bare_epoch(pipe, config: ddpo.Config):
    """Do the calls of UNet (with LoRA) and VAE that an epoch in two passes cannot do without, and
    nothing else: sampling, decoding, a forward and backward pass of each pair (i, k), and for the
    KL in the log two forward passes of about one pair per sample."""
    N, K = config.samples_per_epoch, config.steps
    unet = pipe.unet
    rows_per_sample = 1 if config.guidance == 1 else 2
    rows = rows_per_sample * config.batch
    size = unet.config.sample_size
    tokens, width = pipe.tokenizer.model_max_length, unet.config.cross_attention_dim
    x_t = torch.randn(rows, 4, size, size).to(pipe.device, unet.dtype)
    cond = torch.randn(rows, tokens, width).to(pipe.device, unet.dtype)
    t = torch.full((rows,), 500, device=pipe.device)

    def forward(chunk):
        B = rows_per_sample * len(chunk)
        return unet(x_t[:B], t[:B], cond[:B]).sample.float()

    with torch.no_grad():
        for chunk in torch.arange(N).split(config.batch):
            for _ in range(K):
                forward(chunk)
            pipe.vae.decode(x_t[:len(chunk)].to(pipe.vae.dtype))
        for chunk in torch.arange(K * math.ceil(N / K)).split(config.batch):
            forward(chunk)
            with ddpo.pretrained(unet):
                forward(chunk)
    with torch.enable_grad():  # a reward is called without
        for samples in torch.arange(N).chunk(config.updates_per_epoch):
            for chunk in torch.arange(len(samples) * K).split(config.batch):
                forward(chunk).sum().backward()
            unet.zero_grad()

def measure_with_parts(config: ddpo.Config, epochs: int, warm_up: int = 0) -> list[dict]:
    """Measure epochs of ddpo.py, its parts and the bare calls in turns -> the costs of each turn,
    {"epoch", "sampling", "decoding", "reward", "updates", "kl", "bare"}. "updates" is what the
    other parts leave of the epoch, and includes saving."""
    pipe = load_pipeline(config)

    def parts_and_bare_calls() -> dict:
        cost = measure_parts(pipe, config)
        start = clock(config.device)
        bare_epoch(pipe, config)
        return cost | {"bare": clock(config.device) - start}

    costs = measure(ddpo.train, config, epochs, warm_up, parts_and_bare_calls)
    for cost in costs:
        others = cost["sampling"] + cost["decoding"] + cost["reward"] + cost["kl"]
        cost["updates"] = cost["epoch"] - others
    return costs

def train_trl(config: ddpo.Config, epochs: int) -> list[dict]:
    """Train with TRL's DDPOTrainer, with the same samples, steps, updates, guidance and rank
    -> {"epoch": cost} of each epoch after the first. The batch is the same in sampling. In
    an update it is at most the samples of that update, since a call has one step only. The batch
    must divide the samples of an epoch and of an update. TRL logs no KL."""
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    torch.backends.cudnn.allow_tf32 = False  # as in ddpo.py
    on_cpu = config.device == "cpu"
    PartialState(cpu=on_cpu)  # without it the pipeline fails at a warning of its own
    samples_per_update = config.samples_per_epoch // config.updates_per_epoch
    batch = min(config.batch, samples_per_update)
    settings = DDPOConfig(
        num_epochs=epochs + 1, save_freq=epochs + 9, allow_tf32=False,
        mixed_precision="fp16" if config.precision == "fp16" else "no",
        sample_num_steps=config.steps, sample_guidance_scale=config.guidance,
        sample_batch_size=config.batch,
        sample_num_batches_per_epoch=config.samples_per_epoch // config.batch,
        train_batch_size=batch, train_gradient_accumulation_steps=samples_per_update // batch,
        per_prompt_stat_tracking=True, accelerator_kwargs={"cpu": on_cpu},
        project_kwargs={"project_dir": str(MODELS)})
    pipeline = DefaultDDPOStableDiffusionPipeline(config.model)
    prompts = ddpo.load_prompts(config.prompts)
    reward = rewards.load("jpeg")
    costs = []

    def reward_fn(images, texts, metadata):
        pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
        pil_images = pipeline.sd_pipeline.image_processor.numpy_to_pil(pixels)
        return reward(pil_images, list(texts)), {}

    def prompt_fn():
        return prompts[len(costs) % len(prompts)], {}

    trainer = DDPOTrainer(settings, reward_fn, prompt_fn, pipeline)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    step = 0
    for epoch in range(epochs + 1):
        start = clock(config.device)
        step = trainer.step(epoch, step)
        costs.append({"epoch": clock(config.device) - start})
    return costs[1:]


# ---------- measuring in a process of its own
def in_child(python: str, trainer: str, config: ddpo.Config, epochs: int) -> dict:
    """Run `child` in a process of its own, so that the peak memory is its own -> what it printed.
    Raises RuntimeError if it fails."""
    arguments = json.dumps([trainer, dataclasses.asdict(config), epochs])
    command = [python, __file__, "--child", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{python}, {trainer}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])

def child(trainer: str, settings: dict, epochs: int):
    """Measure epochs of a trainer, after one to warm up if there are several, the peak memory in GB
    and, of several epochs of ddpo.py, the KL in the log; print it as JSON."""
    torch.set_num_threads(1)
    config = ddpo.Config(**settings)
    warm_up = 1 if epochs > 1 else 0
    if trainer == "TRL":
        costs = train_trl(config, epochs)
    elif trainer == "single_pass.py":
        costs = measure(single_pass.train, config, epochs, warm_up)
    else:
        costs = measure(ddpo.train, config, epochs, warm_up)
    result = {"epoch": median(costs, "epoch"), "memory_gb": memory.peak(config.device)}
    if trainer == "ddpo.py" and epochs > 1:  # after the peak: it takes a second pipeline
        result["kl"] = measure_parts(load_pipeline(config), config)["kl"]
    modules = (torch, diffusers, transformers)
    result["versions"] = {module.__name__: module.__version__ for module in modules}
    print(json.dumps(result))


# ---------- the comparisons; a row is (what, its cost, a ratio, to what)
def median(costs: list[dict], name: str) -> float:
    """Compute the median of one of the costs over the turns."""
    return statistics.median(cost[name] for cost in costs)

def compare(name: str, costs: list, reference_name: str, reference_costs: list, to: str) -> list:
    """Compare what took turns with a reference -> a row of the reference and one of the other. The
    ratio is the median over the turns."""
    ratios = [cost / reference for cost, reference in zip(costs, reference_costs)]
    return [(reference_name, statistics.median(reference_costs), 1.0, to),
            (name, statistics.median(costs), statistics.median(ratios), to)]

def compare_parts(config: ddpo.Config, epochs: int, warm_up: int) -> list:
    """Compare an epoch with the bare calls, and its parts with the epoch -> rows."""
    costs = measure_with_parts(config, epochs, warm_up)
    epoch = median(costs, "epoch")
    ratio = statistics.median(cost["epoch"] / cost["bare"] for cost in costs)
    rows = [("an epoch, DDPO_IS", epoch, ratio, "the bare calls")]
    for part in ("sampling", "decoding", "reward", "updates", "kl"):
        cost = median(costs, part)
        rows.append((part, cost, cost / epoch, "the epoch"))
    rows.append(("the bare calls of UNet and VAE", median(costs, "bare"), 1.0, "the bare calls"))
    return rows

def compare_passes(config: ddpo.Config, epochs: int, warm_up: int) -> list:
    """Compare DDPO_SF in one pass with DDPO_SF in two -> rows."""
    pipe = load_pipeline(config)
    epochs_of_two, epochs_of_one = [], []
    core_of_two, core_of_one = [], []  # sampling and updates: the epoch without its other parts
    for turn in range(epochs):
        turn_warm_up = warm_up if turn == 0 else 0
        two = measure(ddpo.train, config, 1, turn_warm_up)[0]["epoch"]
        one = measure(single_pass.train, config, 1, turn_warm_up)[0]["epoch"]
        parts = measure_parts(pipe, config)
        others = parts["decoding"] + parts["reward"] + parts["kl"]  # the same functions in both
        epochs_of_two.append(two)
        epochs_of_one.append(one)
        core_of_two.append(two - others)
        core_of_one.append(one - others)
    to = "DDPO_SF in two passes"
    rows = compare("an epoch, single_pass.py", epochs_of_one,
                   "an epoch, DDPO_SF", epochs_of_two, to)
    rows += compare("sampling and updates, single_pass.py", core_of_one,
                    "sampling and updates, DDPO_SF", core_of_two, to)
    return rows

def compare_peer(config: ddpo.Config, turns: int, python: str) -> tuple[list, dict, dict]:
    """Compare two epochs each of TRL and of ddpo.py, in turns and in processes of their own
    -> rows, peak memory in GB (also with as many rows in a UNet call as TRL's updates have), and
    versions."""
    peers, ours = [], []
    for _ in range(turns):
        peers.append(in_child(python, "TRL", config, epochs=2))
        ours.append(in_child(sys.executable, "ddpo.py", config, epochs=2))
    peer_epochs = [run["epoch"] for run in peers]
    our_epochs = [run["epoch"] for run in ours]
    without_kl = [run["epoch"] - run["kl"] for run in ours]
    peer_name = "an epoch, TRL 0.23.1"
    rows = compare("an epoch, DDPO_IS, next to TRL's", our_epochs, peer_name, peer_epochs,
                   "TRL's epoch")
    _, row_without_kl = compare("the same without the KL that is logged", without_kl, peer_name,
                                peer_epochs, "TRL's epoch")
    rows.append(row_without_kl)

    batch_of_trl = min(config.batch, config.samples_per_epoch // config.updates_per_epoch)
    same_batch = dataclasses.replace(config, batch=batch_of_trl)
    with_trl_rows = in_child(sys.executable, "ddpo.py", same_batch, epochs=1)
    peaks = {"ours next to TRL": median(ours, "memory_gb"), "TRL": median(peers, "memory_gb"),
             "ours with TRL's rows": with_trl_rows["memory_gb"]}
    return rows, peaks, {"ours": ours[0]["versions"], "TRL": peers[0]["versions"]}


def main(argv: list | None = None):
    """Measure, print a table and store the result."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SETTINGS, default="shapes", help="default: shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32",
                        help="default: fp32")
    parser.add_argument("--epochs", type=int,
                        help="number of epochs to take the median of (default: 5; on a GPU 2)")
    parser.add_argument("--peer", metavar="PYTHON", help="Python of the environment with TRL")
    parser.add_argument("--memory", action="store_true", help="count memory, measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS,
                        help="folder of the result (default: bench/results)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return child(*json.loads(options.child))
    options.results.mkdir(parents=True, exist_ok=True)
    if options.memory:
        return memory.report(UNETS["sd"], VAES["sd"], options.results / "memory.json")
    device = options.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs ({options.epochs}) must be at least 1")
    command = " ".join(argv).replace(options.peer or "PYTHON", "PYTHON")
    if device == "cuda":
        if options.size not in ("sd", "tiny"):
            parser.error(f"--size ({options.size}) must be sd or tiny on a GPU; "
                         "for the others add --device cpu")
        import gpu  # which imports this file
        gpu.measure(options.size, device, options.precision, options.peer, options.results, command,
                    options.epochs or 2)
        return None
    if options.peer and options.precision != "fp32":
        parser.error("--peer needs --precision fp32 on a CPU")

    torch.set_num_threads(1)
    settings = SETTINGS[options.size]
    config = ddpo.Config(model=str(make_model(options.size, MODELS)), device=device,
                         precision=options.precision, **settings)
    sf_config = dataclasses.replace(config, algo="sf", updates_per_epoch=1)
    warm_up = 1
    if options.size == "sd":
        warm_up = 0  # an epoch of minutes needs none

    is_alone = in_child(sys.executable, "ddpo.py", config, epochs=1)
    sf_alone = in_child(sys.executable, "single_pass.py", sf_config, epochs=1)
    peaks = {"DDPO_IS": is_alone["memory_gb"], "single_pass.py": sf_alone["memory_gb"]}
    epochs = options.epochs or 5
    rows = compare_parts(config, epochs, warm_up)
    rows += compare_passes(sf_config, epochs, warm_up)
    versions = {}
    if options.peer:
        peer_rows, peer_peaks, versions = compare_peer(config, epochs, options.peer)
        rows += peer_rows
        peaks |= peer_peaks

    print(f"| {options.size}, {options.precision} | CPU s | ratio | to |\n|---|---|---|---|")
    for what, cost, ratio, to in rows:
        print(f"| {what} | {cost:.3g} | {ratio:.2f} | {to} |")
    print("peak memory, GB: " + ", ".join(f"{who} {gb:.2f}" for who, gb in peaks.items()))
    result = {"machine": "one thread of a CPU", "torch": torch.__version__,
              "date": time.strftime("%Y-%m-%d"), "command": command, "unit": "CPU s",
              "settings": settings, "rows": rows,
              "peak_memory_gb": peaks, "versions": versions}
    suffix = "-peer" if options.peer else ""
    name = f"bench-{options.size}-{device}-{options.precision}{suffix}.json"
    (options.results / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
