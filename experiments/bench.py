"""What an epoch of ddpo.py costs, as ratios of measurements taken side by side in one run: against the calls
of UNet and VAE that it cannot do without, in one pass against two, and against TRL's trainer.

    python experiments/bench.py --size shapes   # the model in shapes/, its settings
    python experiments/bench.py --size medium   # 22 million parameters, latents of 32 x 32
    python experiments/bench.py --size sd       # of Stable Diffusion's size: for a GPU, or 20 GB and patience
    python experiments/bench.py --peer PYTHON   # TRL's too; of an environment with requirements-peer.txt
    python experiments/bench.py --memory        # what Stable Diffusion takes, counted: which card fits what

medium and sd have random weights. On a CPU a cost is CPU seconds of one thread, which other work on the
machine disturbs least, on a GPU seconds. Each is a median over epochs, and what is compared takes turns. The
peak of memory is that of a process that does nothing else, on a CPU with all it has imported. The results are
in experiments/results/bench-<size>-<device>-<precision>.json.
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import diffusers
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import ddpo  # noqa: E402
import memory  # noqa: E402
import single_pass  # noqa: E402

RESULTS, SHAPES, MODELS = HERE / "results", HERE.parent / "shapes", HERE.parent / "runs" / "bench"
UNETS = {  # what is not named is the class's default, Stable Diffusion's
    "medium": dict(sample_size=32, block_out_channels=(96, 192, 320), cross_attention_dim=96,
                   down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), layers_per_block=1,
                   up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2),
    "sd": dict(sample_size=64, cross_attention_dim=768)}
VAES = {size: dict(latent_channels=4, block_out_channels=widths, layers_per_block=layers,
                   norm_num_groups=groups, down_block_types=("DownEncoderBlock2D",) * len(widths),
                   up_block_types=("UpDecoderBlock2D",) * len(widths))
        for size, widths, layers, groups in (("medium", (32, 64), 1, 8), ("sd", (128, 256, 512, 512), 2, 32))}
SETTINGS = {
    "shapes": dict(prompts="shapes/prompts.txt", samples_per_epoch=64, steps=10, batch=64, guidance=2.0),
    "medium": dict(samples_per_epoch=6, steps=6, batch=3, updates_per_epoch=2),
    "sd": dict(samples_per_epoch=2, steps=2, batch=1, updates_per_epoch=2, guidance=1.0)}  # a row a sample
ON_GPU = dict(samples_per_epoch=16, steps=10, batch=8, guidance=5.0)  # of the size sd


def make_model(size):
    """A folder with a pipeline of that size: random weights, and text parts like those of shapes/, but of the
    UNet's width and with as many tokens as Stable Diffusion's."""
    folder = SHAPES if size == "shapes" else MODELS / size
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        unet, vae = diffusers.UNet2DConditionModel(**UNETS[size]), diffusers.AutoencoderKL(**VAES[size])
        text = transformers.CLIPTextConfig.from_pretrained(SHAPES / "text_encoder")
        text.hidden_size, text.max_position_embeddings = UNETS[size]["cross_attention_dim"], 77
        tokenizer = transformers.CLIPTokenizer.from_pretrained(SHAPES / "tokenizer", model_max_length=77)
        parts = dict(unet=unet, vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=tokenizer)
        diffusers.StableDiffusionPipeline.from_pretrained(SHAPES, **parts).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):  # what TRL's older transformers read
            shutil.copy(SHAPES / "tokenizer" / name, folder / "tokenizer")
    return folder


# ---------- measuring one run

def clock(device):
    """CPU seconds of this process, or seconds once the GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@contextlib.contextmanager
def timed(spent, device, part):
    """Adds what each call of the function that it decorates takes to the cost of a part."""
    spent[part] -= clock(device)
    yield
    spent[part] += clock(device)


def bare_epoch(pipe, config):
    """The calls of UNet (LoRA in it) and VAE that an epoch in two passes cannot do without, and nothing else:
    sampling, decoding, a forward and a backward pass of each pair (i, k), and for the KL that is logged two
    forward passes of about one pair a sample."""
    N, K, halves, unet = config.samples_per_epoch, config.steps, 1 if config.guidance == 1 else 2, pipe.unet
    rows, size = halves * config.batch, unet.config.sample_size
    tokens, width = pipe.tokenizer.model_max_length, unet.config.cross_attention_dim
    x_t = torch.randn(rows, 4, size, size).to(pipe.device, unet.dtype)
    cond = torch.randn(rows, tokens, width).to(pipe.device, unet.dtype)
    t = torch.full((rows,), 500, device=pipe.device)

    def forward(chunk):
        B = halves * len(chunk)  # guidance doubles them
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
    for samples in torch.arange(N).chunk(config.updates_per_epoch):
        for chunk in torch.arange(len(samples) * K).split(config.batch):
            forward(chunk).sum().backward()
        unet.zero_grad()


def measure(train, config, epochs, warm=0, bare=False):
    """Run ddpo.train or single_pass.train, without pictures, and after each epoch its bare calls if asked
    -> {"epoch": cost, "sampling": ..., "decoding", "reward", "kl", "updates", "bare"} of each epoch but those
    that warm up. "updates" is what the other parts leave of the epoch; saving and the log are in it."""
    spent, found, device = collections.Counter(), [], config.device
    part, start_run, save_run = functools.partial(timed, spent, device), ddpo.start_run, ddpo.save_run

    def start(*args):
        run = start_run(*args)
        spent.clear()
        spent["epoch"] -= clock(device)
        return run

    def end_epoch(*args):
        save_run(*args)
        spent["epoch"] += clock(device)
        cost = spent.copy()
        cost["sampling"] -= cost["decoding"]
        cost["updates"] = cost["epoch"] - sum(cost[name] for name in ("sampling", "decoding", "reward", "kl"))
        found.append(cost)
        if bare and len(found) > warm:
            timed(cost, device, "bare")(bare_epoch)(pipe, config)
        spent.clear()
        spent["epoch"] -= clock(device)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = dataclasses.replace(config, epochs=warm + epochs, out=folder)
        pipe, prompts, reward_fn = ddpo.prepare(config)
        pipe.vae.decode = part("decoding")(pipe.vae.decode)
        prepared = pipe, prompts, part("reward")(reward_fn)
        trace = part("sampling")(single_pass.sample_and_trace)
        with mock.patch.object(single_pass, "sample_and_trace", trace), mock.patch.multiple(
                ddpo, prepare=lambda config: prepared, start_run=start, save_run=end_epoch,
                sample=part("sampling")(ddpo.sample), kl_to_pretrained=part("kl")(ddpo.kl_to_pretrained),
                draw_samples=mock.Mock(), draw_progress=mock.Mock()):
            train(config)
    return found[warm:]


def train_trl(config, epochs):
    """TRL's DDPOTrainer with the same samples, steps, batch, updates, guidance and rank; it logs no KL -> CPU
    seconds of each epoch but the first."""
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    PartialState(cpu=True)  # without it the pipeline fails at a warning of its own
    samples = config.samples_per_epoch // config.updates_per_epoch  # of an update
    batch = min(config.batch, samples)  # TRL's calls are of one step
    settings = DDPOConfig(
        num_epochs=epochs + 1, save_freq=epochs + 9, mixed_precision="no", allow_tf32=False,
        sample_num_steps=config.steps, sample_guidance_scale=config.guidance, sample_batch_size=config.batch,
        sample_num_batches_per_epoch=config.samples_per_epoch // config.batch, train_batch_size=batch,
        train_gradient_accumulation_steps=samples // batch, per_prompt_stat_tracking=True,
        accelerator_kwargs={"cpu": True}, project_kwargs={"project_dir": str(MODELS)})
    pipeline = DefaultDDPOStableDiffusionPipeline(config.model)
    prompts, reward, costs = ddpo.load_prompts(config.prompts), ddpo.rewards.load("jpeg"), []

    def reward_fn(images, texts, metadata):
        pixels = images.permute(0, 2, 3, 1).float().numpy()
        return reward(pipeline.sd_pipeline.image_processor.numpy_to_pil(pixels), list(texts)), {}

    step, prompt_fn = 0, lambda: (prompts[len(costs) % len(prompts)], {})
    trainer = DDPOTrainer(settings, reward_fn, prompt_fn, pipeline)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    for epoch in range(epochs + 1):
        started = time.process_time()
        step = trainer.step(epoch, step)
        costs.append(time.process_time() - started)
    return costs[1:]


# ---------- measuring in a process of its own

def in_child(python, what, config, epochs):
    """`child` in a process of its own, so that its peak of memory is its own -> what it printed."""
    command = [python, __file__, "--child", json.dumps([what, dataclasses.asdict(config), epochs])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python}, {what}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(what, settings, epochs):
    torch.set_num_threads(1)
    config, warm = ddpo.Config(**settings), int(epochs > 1)  # one epoch alone is for its memory
    if what == "TRL":
        found = [{"epoch": cost} for cost in train_trl(config, epochs)]
    else:
        found = measure((single_pass if what == "single_pass.py" else ddpo).train, config, epochs, warm)
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    print(json.dumps({"epochs": found, "memory_gb": memory.peak(config.device), "versions": versions}))


# ---------- what is compared: rows (what, its cost, the ratio to something, of what)

def median(costs, name):
    return statistics.median(cost[name] for cost in costs)


def compare(other, what, costs, to):
    """costs [(of the other, its own)] of each turn -> a row of each."""
    others, own = ([turn[i] for turn in costs] for i in (0, 1))
    ratio = statistics.median(b / a for a, b in costs)
    return [(other, statistics.median(others), 1.0, to), (what, statistics.median(own), ratio, to)]


def bench(config, options):
    """An epoch and its parts, and one pass against two -> rows."""
    warm = int(options.size != "sd" or config.device != "cpu")  # an epoch of minutes needs no warming up
    found = measure(ddpo.train, config, options.epochs, warm, bare=True)
    epoch, ratio = median(found, "epoch"), statistics.median(cost["epoch"] / cost["bare"] for cost in found)
    parts = [(f"of it {part}", median(found, part), median(found, part) / epoch, "the epoch")
             for part in ("sampling", "decoding", "reward", "updates", "kl")]
    rows = [("an epoch, DDPO_IS", epoch, ratio, "the bare calls"), *parts,
            ("the bare calls of UNet and VAE", median(found, "bare"), 1.0, "the bare calls")]

    sf = dataclasses.replace(config, algo="sf", updates_per_epoch=1)
    turns = [[measure(script.train, sf, 1, warm * (turn == 0))[0] for script in (ddpo, single_pass)]
             for turn in range(options.epochs)]
    for what, parts in {"an epoch": ["epoch"], "sampling and updates": ["sampling", "updates"]}.items():
        costs = [[sum(cost[part] for part in parts) for cost in turn] for turn in turns]
        rows += compare(f"{what}, DDPO_SF", f"{what}, single_pass.py", costs, "DDPO_SF in two passes")
    return rows


def bench_peer(config, options):
    """Two epochs each, TRL's and ours taking turns, in processes of their own -> rows, memory, also with as
    many rows in a call of an update as TRL's, versions."""
    turns = [(in_child(options.peer, "TRL", config, 2), in_child(sys.executable, "ddpo.py", config, 2))
             for _ in range(options.epochs)]
    costs = [[median(run["epochs"], "epoch") for run in turn] for turn in turns]
    rows = compare("an epoch, TRL 0.23.1", "an epoch, DDPO_IS, beside TRL's", costs, "TRL's epoch")
    costs = [(trl, ours - median(run["epochs"], "kl")) for (trl, ours), (_, run) in zip(costs, turns)]
    rows += compare("", "the same without the KL that is logged", costs, "TRL's epoch")[1:]
    peer, own = zip(*turns)
    rows_of_trl = min(config.batch, config.samples_per_epoch // config.updates_per_epoch)
    same = in_child(sys.executable, "ddpo.py", dataclasses.replace(config, batch=rows_of_trl), 2)
    peaks = {"ours beside TRL": median(own, "memory_gb"), "TRL": median(peer, "memory_gb"),
             "ours with TRL's rows": same["memory_gb"]}
    return rows, peaks, {"ours": own[0]["versions"], "TRL": peer[0]["versions"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SETTINGS, default="shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--epochs", type=int, default=5, help="over which a median is taken")
    parser.add_argument("--peer", metavar="PYTHON", help="of the environment that has TRL")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*json.loads(options.child))
    if options.memory:
        return memory.report(UNETS["sd"], VAES["sd"], RESULTS / "memory.json")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.peer and (options.device, options.precision) != ("cpu", "fp32"):
        parser.error("peer is measured with --device cpu --precision fp32")
    torch.set_num_threads(1)
    gpu = options.device == "cuda"
    settings = SETTINGS[options.size] | (ON_GPU if gpu and options.size == "sd" else {})
    config = ddpo.Config(model=str(make_model(options.size)), device=options.device,
                         precision=options.precision, **settings)
    sf = dataclasses.replace(config, algo="sf", updates_per_epoch=1)
    peaks = {"DDPO_IS": in_child(sys.executable, "ddpo.py", config, 1)["memory_gb"],
             "single_pass.py": in_child(sys.executable, "single_pass.py", sf, 1)["memory_gb"]}
    rows, versions = bench(config, options), {}
    if options.peer:
        peer_rows, peer_peaks, versions = bench_peer(config, options)
        rows, peaks = rows + peer_rows, peaks | peer_peaks

    unit = "s" if gpu else "CPU s"
    print(f"| {options.size}, {options.precision} | {unit} | ratio | to |\n|---|---|---|---|")
    for what, cost, ratio, to in rows:
        print(f"| {what} | {cost:.3g} | {ratio:.2f} | {to} |")
    print("peak memory, GB: " + ", ".join(f"{who} {gb:.2f}" for who, gb in peaks.items()))
    machine = torch.cuda.get_device_name() if gpu else "one thread of a CPU"
    result = {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
              "command": " ".join(sys.argv[1:]).replace(options.peer or "PYTHON", "PYTHON"), "unit": unit,
              "settings": settings, "rows": rows, "peak_memory_gb": peaks, "versions": versions}
    peer = "-peer" if options.peer else ""
    file = RESULTS / f"bench-{options.size}-{options.device}-{options.precision}{peer}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
