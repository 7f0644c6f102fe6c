"""Compare ways to run the UNet: memory formats, CUDA graphs, compiled blocks; speed and ratio.

    python bench/ways.py               # Stable Diffusion's size, in fp16 on a GPU
    python bench/ways.py --size tiny   # a minute on a CPU: whether the command works

Each way has a process of its own, with random weights. Its table row has the seconds to the first
call with a backward pass and to the first one without, the median time of later calls, and how far
the ratio is from 1 before the first update, at the worst timestep. Sampling needs no gradient and
updates do, so the two may run kernels that round differently, and the clip range is 1e-4. As in a
run, LoRA is fresh, and in the update a sample shares its UNet call with other samples than it did
in sampling. Blocks are compiled whole (fullgraph), so that nothing falls back to eager silently.
The table goes to stdout, and a line with the ratio at every timestep to bench/results/ways.jsonl.
"""
import argparse
import dataclasses
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import bench  # puts the project's folders on the path
import ddpo
import gpu

WAYS = ("channels_last", "contiguous", "CUDA graphs", "compiled blocks")
ROWS = {"sd": (8, 32), "tiny": (4, 6)}  # of a UNet call
EPOCH = {"sd": {"samples_per_epoch": 8, "steps": 50, "batch": 4},
         "tiny": {"samples_per_epoch": 4, "steps": 3, "batch": 4}}
VARIANTS = 64  # of one block: widths, rows, LoRA on and off, with and without gradient


def prepare(unet: nn.Module, way: str, device: str):
    """Make a UNet run in one of WAYS. On a CPU, which is for tests, compiled code runs as it is."""
    unet.to(memory_format=torch.channels_last)
    if way == "contiguous":
        unet.to(memory_format=torch.contiguous_format)
    if way == "CUDA graphs":
        unet.compile(backend="cudagraphs" if device == "cuda" else "eager")
    if way == "compiled blocks":
        torch._dynamo.config.recompile_limit = VARIANTS
        for block in unet.modules():
            if isinstance(block, (BasicTransformerBlock, ResnetBlock2D)):
                backend = "inductor" if device == "cuda" else "eager"
                block.compile(backend=backend, fullgraph=True)


def measure_way(way: str, size: str, config: ddpo.Config) -> dict:
    """Measure one way -> {"first": seconds, "calls": [[what, rows, seconds]], "deviation":
    {timestep: largest distance of the ratio from 1}}."""
    with gpu.loading_random_weights(size, config.device):
        pipe = ddpo.load_pipeline(config)
    unet = pipe.unet
    ddpo.add_lora(unet, config.rank, torch.Generator().manual_seed(0))
    prepare(unet, way, config.device)
    side = unet.config.sample_size

    def call(rows, backward):
        x_t = torch.randn(rows, 4, side, side, device=config.device, dtype=unet.dtype)
        text = torch.randn(rows, 77, unet.config.cross_attention_dim, device=config.device,
                           dtype=unet.dtype)
        with torch.set_grad_enabled(backward):
            eps = unet(x_t, torch.full((rows,), 500, device=config.device), text).sample
        if backward:
            eps.float().mean().backward()

    found = {"first": [], "calls": []}
    for backward in (True, False):
        start = time.perf_counter()
        call(ROWS[size][0], backward)
        bench.clock(config.device)  # waits for the GPU
        found["first"].append(time.perf_counter() - start)
    for rows in ROWS[size]:
        for what, backward in {"forward": False, "forward and backward": True}.items():
            seconds = gpu.median_seconds(lambda: call(rows, backward), config.device)
            found["calls"].append([what, rows, seconds])
    return found | {"deviation": ratio_deviation(pipe, config)}


def ratio_deviation(pipe, config: ddpo.Config) -> dict:
    """Sample, and compute the log-probabilities again with gradient, the samples in another order
    -> {timestep: the largest distance of the ratio from 1}."""
    N = config.samples_per_epoch
    prompts = ["a cat", "a dog"] * (N // 2)
    rollout = ddpo.sample(pipe, prompts, config, [ddpo.generator(0, 1, i) for i in range(N)])
    order = torch.arange(N, device=pipe.device).flip(0).view(-1, config.batch).T.flatten()
    deviation = {}
    for k, t in enumerate(rollout.timesteps):
        largest = 0.0
        for i in order.split(config.batch):
            x_t, x_prev = rollout.latents[i, k], rollout.latents[i, k + 1]
            mean, sigma = ddpo.policy(
                pipe, x_t, t.expand(len(i)), rollout.cond[i], rollout.uncond, config)
            log_ratio = ddpo.log_prob(x_prev, mean, sigma) - rollout.log_probs[i, k]
            largest = max(largest, (log_ratio.exp() - 1).abs().max().item())
        deviation[int(t)] = largest
    return deviation


def tables(found: dict) -> list[str]:
    """Write time and ratio of each way."""
    calls = [f"{what}, {rows} rows, ms" for what, rows, _ in found[WAYS[0]]["calls"]]
    columns = ["way", "first call with backward, s", "without, s", *calls, "ratio off by", "at t"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for way, of_way in found.items():
        worst = max(of_way["deviation"], key=of_way["deviation"].get)
        cells = [way, *[f"{seconds:.1f}" for seconds in of_way["first"]],
                 *[f"{1000 * seconds:.1f}" for _, _, seconds in of_way["calls"]],
                 f"{of_way['deviation'][worst]:.1e}", str(worst)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(size: str, device: str, precision: str, results: Path) -> dict:
    """Measure all ways, print the tables, and add the result to results/ways.jsonl."""
    config = ddpo.Config(model="random", device=device, precision=precision, **EPOCH[size])
    found = {}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for way in WAYS:
            found[way] = pool.submit(measure_way, way, size, config).result()
            print(way, json.dumps(found[way]), flush=True)
    print("\n".join(tables(found)))
    machine = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
              "settings": dataclasses.asdict(config), "ways": found}
    with open(results / "ways.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return result


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=EPOCH, default="sd", help="default: sd")
    parser.add_argument("--results", type=Path, default=bench.RESULTS,
                        help="folder of the result (default: bench/results)")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        measure(options.size, "cuda", "fp16", options.results)
    elif options.size == "tiny":
        measure(options.size, "cpu", "fp32", options.results)
    else:
        parser.error("--size sd needs a CUDA GPU; --size tiny runs without")


if __name__ == "__main__":
    main()
