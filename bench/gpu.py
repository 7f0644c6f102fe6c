"""Measure what an epoch costs on a GPU at Stable Diffusion's size, compared with TRL's trainer.

    python bench/bench.py --size sd --device cuda --precision fp16 --peer PYTHON

Measured are the ceiling of the card (a large matrix product), UNet calls with diffusers' own
attention processors and with LoRA, and epochs of ddpo.py and of TRL, one after the other, at 4 and
at 16 samples per call. The calls, and each trainer at each batch, have a process of their own, with
random weights that are made on the GPU, so that nothing large is written to disk. Operations are
counted by PyTorch's FlopCounterMode, which does not see LoRA's second product (addmm_); at rank 4
that is little. `share` is the part of the ceiling that is reached. What is found goes to stderr at
once, and in the end as tables to stdout and as a line to bench/results/gpu.jsonl.
"""
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import bench
import ddpo
import memory

BATCHES = {"sd": (4, 16), "tiny": (2,)}  # samples per call
ROWS = {"sd": (8, 32), "tiny": (4,)}  # of the UNet calls
PRODUCT = {"cuda": 8192, "cpu": 256}  # side of the matrices
PRODUCTS = 20  # between two looks at the clock
EPOCH = {"sd": {"samples_per_epoch": 48, "steps": 4}, "tiny": {"samples_per_epoch": 4, "steps": 2}}
WARM_UP = 3  # calls
CALLS = 10  # of which the median is taken


# ---------- random weights
def random_pipeline(size: str, device: str, dtype: torch.dtype):
    """Make a pipeline of that size with random weights on the device."""
    torch.manual_seed(0)
    width = bench.UNETS[size].get("cross_attention_dim")
    text = memory.TEXT if size == "sd" else memory.TEXT | {
        "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 2}
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(**bench.UNETS[size])
        vae = diffusers.AutoencoderKL(**bench.VAES[size])
        text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        bench.SHAPES / "tokenizer", model_max_length=77)
    scheduler = diffusers.DDIMScheduler.from_pretrained(bench.SHAPES / "scheduler")
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return pipe.to(dtype=dtype)


@contextlib.contextmanager
def loading_random_weights(size: str, device: str):
    """Let both trainers load such a pipeline inside this context, whatever model they name."""
    original = diffusers.StableDiffusionPipeline.from_pretrained

    def load(*args, dtype=torch.float32, **options):
        return random_pipeline(size, device, dtype)

    diffusers.StableDiffusionPipeline.from_pretrained = staticmethod(load)
    try:
        yield
    finally:
        diffusers.StableDiffusionPipeline.from_pretrained = original


# ---------- what a process of its own measures
def median_seconds(function, device: str) -> float:
    """Call a function several times -> the median of the seconds that a call takes."""
    for _ in range(WARM_UP):
        function()
    seconds = []
    for _ in range(CALLS):
        start = bench.clock(device)
        function()
        seconds.append(bench.clock(device) - start)
    return statistics.median(seconds)


def measure_ceiling(device: str, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matrix product."""
    n = PRODUCT[device]
    a = torch.randn(n, n, device=device).to(dtype)

    def products():
        for _ in range(PRODUCTS):
            a @ a

    return PRODUCTS * 2 * n**3 / median_seconds(products, device)


def measure_calls(size: str, config: ddpo.Config) -> dict:
    """Measure the ceiling and UNet calls -> {"ceiling": operations per second, "calls": [[what,
    rows, seconds, operations], ...]}."""
    device = config.device
    pipe = ddpo.load_pipeline(config)
    unet = pipe.unet
    dtype = unet.dtype
    side = unet.config.sample_size

    def inputs(rows):
        x_t = torch.randn(rows, 4, side, side, device=device).to(dtype)
        text = torch.randn(rows, 77, unet.config.cross_attention_dim, device=device).to(dtype)
        return x_t, torch.full((rows,), 500, device=device), text

    def forward(arguments):
        with torch.no_grad():
            unet(*arguments)

    def forward_and_backward(arguments):
        unet(*arguments).sample.float().mean().backward()

    found = {"ceiling": measure_ceiling(device, dtype), "calls": []}

    def add(what, function, rows):
        arguments = inputs(rows)
        with FlopCounterMode(display=False) as counter:
            function(arguments)
        seconds = median_seconds(lambda: function(arguments), device)
        found["calls"].append([what, rows, seconds, counter.get_total_flops()])

    for rows in ROWS[size]:
        add("forward, diffusers' processors", forward, rows)
    ddpo.add_lora(unet, config.rank)
    for rows in ROWS[size]:
        add("forward, LoRA", forward, rows)
        add("forward and backward, LoRA", forward_and_backward, rows)
    return found


def measure_ours(config: ddpo.Config, epochs: int) -> dict:
    """Measure epochs of ddpo.py, its parts, and the peak of the memory."""
    costs = bench.measure(ddpo.train, config, epochs, warm_up=1)
    found = {"epoch": bench.median(costs, "epoch"), "memory_gb": memory.peak(config.device)}
    pipe = bench.load_pipeline(config)
    bench.measure_parts(pipe, config)  # to warm up
    found |= bench.measure_parts(pipe, config)
    others = found["sampling"] + found["decoding"] + found["reward"] + found["kl"]
    return found | {"updates": found["epoch"] - others}


def measure_trl(config: ddpo.Config, epochs: int) -> dict:
    """Measure epochs of TRL and the peak of the memory."""
    costs = bench.train_trl(config, epochs)
    return {"epoch": bench.median(costs, "epoch"), "memory_gb": memory.peak(config.device)}


def in_child(python: str, what: str, size: str, config: ddpo.Config, epochs: int) -> dict:
    """Measure "calls", "ours" or "TRL" in a process of its own. Raises RuntimeError if it fails."""
    arguments = json.dumps([what, size, dataclasses.asdict(config), epochs])
    command = [python, __file__, arguments]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # else TRL asks the hub for LoRA named random
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{python}, {what}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    found = done.stdout.splitlines()[-1]
    print(f"{what}, batch {config.batch}: {found}", file=sys.stderr, flush=True)
    return json.loads(found)


def child(what: str, size: str, settings: dict, epochs: int):
    """Measure in this process, and print the result as JSON."""
    config = ddpo.Config(**settings)
    with loading_random_weights(size, config.device):
        if what == "calls":
            found = measure_calls(size, config)
        elif what == "ours":
            found = measure_ours(config, epochs)
        else:
            found = measure_trl(config, epochs)
    modules = (torch, diffusers, transformers)
    found["versions"] = {module.__name__: module.__version__ for module in modules}
    print(json.dumps(found))


# ---------- the tables
def operations_of_an_epoch(config: ddpo.Config, calls: list) -> float:
    """Count the operations of an epoch's UNet calls: each pair (i, k) is sampled and learned from,
    and about one pair per sample goes through two forward passes for the KL in the log."""
    of_a_row = {}
    for what, rows, _, operations in calls:
        of_a_row[what] = operations / rows
    forward = of_a_row["forward, LoRA"]
    both = of_a_row["forward and backward, LoRA"]
    N, K = config.samples_per_epoch, config.steps
    rows_per_sample = 1 if config.guidance == 1 else 2
    return rows_per_sample * (N * K * (forward + both) + 2 * K * math.ceil(N / K) * forward)


def call_table(found: dict) -> list[str]:
    """Write the UNet calls: time, operations per second, share of the ceiling."""
    stock = {}
    lines = ["| a UNet call | rows | ms | ratio to diffusers' processors | TFLOP/s | share |",
             "|---|---|---|---|---|---|"]
    for what, rows, seconds, operations in found["calls"]:
        stock.setdefault(rows, seconds)  # the first of these rows is with diffusers' processors
        speed = operations / seconds
        lines.append(f"| {what} | {rows} | {1000 * seconds:.1f} | {seconds / stock[rows]:.2f} | "
                     f"{speed / 1e12:.3g} | {100 * speed / found['ceiling']:.0f} % |")
    return lines


def epoch_table(epochs: list[dict], ceiling: float) -> list[str]:
    """Write the epochs, ours compared with TRL's."""
    parts = ("sampling", "updates", "kl", "decoding", "reward")
    columns = ["samples per call", "ours, s", "without the KL", "TRL, s", "ours / TRL",
               "without the KL / TRL", "TFLOP/s", "share", "GB, ours", "GB, TRL", *parts]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for found in epochs:
        ours, trl = found["ours"], found.get("TRL")
        without_kl = ours["epoch"] - ours["kl"]
        speed = found["operations"] / (ours["sampling"] + ours["updates"] + ours["kl"])
        cells = [str(found["batch"]), f"{ours['epoch']:.2f}", f"{without_kl:.2f}"]
        if trl:
            cells += [f"{trl['epoch']:.2f}", f"{ours['epoch'] / trl['epoch']:.2f}",
                      f"{without_kl / trl['epoch']:.2f}"]
        else:
            cells += ["", "", ""]
        cells += [f"{speed / 1e12:.3g}", f"{100 * speed / ceiling:.0f} %",
                  f"{ours['memory_gb']:.1f}", f"{trl['memory_gb']:.1f}" if trl else ""]
        cells += [f"{ours[part]:.2f}" for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(size: str, device: str, precision: str, peer: str | None, results: Path, command: str,
            epochs: int) -> dict:
    """Measure calls and epochs, print the tables, and add the result to results/gpu.jsonl."""
    start_time = time.time()
    config = ddpo.Config(model="random", device=device, precision=precision, guidance=5.0,
                         updates_per_epoch=1, **EPOCH[size])
    calls = in_child(sys.executable, "calls", size, config, epochs)
    of_batches = []
    for batch in BATCHES[size]:
        of_batch = dataclasses.replace(config, batch=batch)
        found = {"batch": batch, "operations": operations_of_an_epoch(of_batch, calls["calls"])}
        found["ours"] = in_child(sys.executable, "ours", size, of_batch, epochs)
        if peer:
            found["TRL"] = in_child(peer, "TRL", size, of_batch, epochs)
        of_batches.append(found)

    print(f"a matrix product: {calls['ceiling'] / 1e12:.3g} TFLOP/s\n")
    print("\n".join([*call_table(calls), "", *epoch_table(of_batches, calls["ceiling"])]))
    machine = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "command": command,
              "settings": EPOCH[size], **calls, "epochs": of_batches}
    with open(results / "gpu.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{time.time() - start_time:.0f} s", file=sys.stderr)
    return result


if __name__ == "__main__":
    child(*json.loads(sys.argv[1]))
