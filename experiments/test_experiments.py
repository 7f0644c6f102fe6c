"""One pass is two, the experiments measure what they say, and the pages have their numbers.

    python -m pytest -q experiments/test_experiments.py   # with experiments/requirements.txt; within a minute

What the README says of learning is measured by claims.py, with five seeds and more; a test holds the README
to the stored numbers.
"""
import csv
import dataclasses
import json
import re
import sys
import time
import types
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import claims  # noqa: E402
import ddpo  # noqa: E402
import rewards  # noqa: E402
import single_pass  # noqa: E402

torch.set_num_threads(1)
RESULTS = HERE / "results"
BENCHES = {"shapes": "bench-shapes-cpu-fp32-peer", "medium": "bench-medium-cpu-fp32-peer",
           "sd": "bench-sd-cpu-fp32"}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder with the text parts of shapes/, and a tiny random UNet and decoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=64,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4)
    shapes = diffusers.StableDiffusionPipeline.from_pretrained(HERE.parent / "shapes", unet=unet, vae=vae)
    shapes.save_pretrained(folder)
    return folder


@pytest.fixture
def config(pipeline, tmp_path):
    """Settings of a run of DDPO_SF on the random pipeline that takes seconds."""
    return ddpo.Config(
        model=str(pipeline), prompts="shapes/prompts.txt", algo="sf", samples_per_epoch=8, steps=3, epochs=2,
        batch=4, min_count=2, lr=1e-3, sample_every=9, device="cpu", out=str(tmp_path / "run"))


def flags(config, **changes):
    """The command line that gives these settings."""
    settings = dataclasses.asdict(dataclasses.replace(config, **changes))
    return [f"--{name}={value}" for name, value in settings.items() if value not in ([], "")]


def read_lora(folder):
    return load_file(Path(folder, "lora", "pytorch_lora_weights.safetensors"))


def read_log(folder):
    with open(Path(folder, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


def disturb(lora):
    """LoRA as training might leave it: B no longer 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora:
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return lora


# ---------- one pass

@pytest.mark.parametrize("guidance, checkpointing", [(5.0, False), (1.0, False), (5.0, True)])
def test_one_pass_gives_the_optimiser_the_gradient_of_two(guidance, checkpointing, config, monkeypatch):
    """Of seven samples in batches of four: collected while sampling, and by the loss at all pairs (i, k)."""
    monkeypatch.setattr(ddpo.Config, "divisors", {})
    config = dataclasses.replace(config, samples_per_epoch=7, steps=5, epochs=1, advantage_clip=1.0,
                                 guidance=guidance, gradient_checkpointing=checkpointing, min_count=32)
    add_lora, taken = ddpo.add_lora, {}

    def optimizer_step(lora, *others):
        taken.update(lora=lora, gradients=[parameter.grad for parameter in lora])
        return 0.0

    def kl_to_pretrained(pipe, rollout, *others):
        taken.update(pipe=pipe, rollout=rollout)
        return 0.0

    monkeypatch.setattr(ddpo, "add_lora", lambda *args: disturb(add_lora(*args)))
    monkeypatch.setattr(ddpo, "optimizer_step", optimizer_step)
    monkeypatch.setattr(ddpo, "kl_to_pretrained", kl_to_pretrained)
    single_pass.train(config)
    pipe, lora, one = taken["pipe"], taken["lora"], taken["rollout"]
    shared = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    assert len(shared) == len(lora) and all(a is b for a, b in zip(shared, lora))  # the samples' own are gone

    generators = [ddpo.generator(config.seed, 1, i) for i in range(7)]
    two = ddpo.sample(pipe, one.prompts, config, generators)
    assert all(torch.equal(getattr(one, name), getattr(two, name))
               for name in ("cond", "uncond", "timesteps", "latents", "log_probs"))
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in two.images]
    advantage = ddpo.PromptStatistics(32, 32).update(two.prompts, rewards.jpeg(two.images, two.prompts))
    assert advantage.min() < 0 < 1 < advantage.max()
    advantage = advantage.clamp(-1, 1)
    pipe.unet.zero_grad()
    for k, t in enumerate(two.timesteps):
        state = two.latents[:, k], t.expand(7), two.cond, two.uncond
        mean, sigma = ddpo.policy(pipe, *state, config)
        loss, _ = ddpo.score_function_loss(ddpo.log_prob(two.latents[:, k + 1], mean, sigma), advantage)
        (loss / config.steps).backward()
    for gradient, parameter in zip(taken["gradients"], lora):
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() > 0


def test_the_memory_of_one_pass_does_not_grow_with_the_steps(config):
    """Of the tensors that wait for a backward pass, as many at most with eight steps as with two."""
    class Waiting:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.append(None)
            peaks[-1] = max(peaks[-1], len(alive))

        def __del__(self):
            alive.pop()

    alive, peaks, pipe = [], [], ddpo.load_pipeline(config)
    ddpo.add_lora(pipe.unet, config.rank)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    generators = [ddpo.generator(config.seed, 1, i) for i in range(4)]
    for steps in (2, 8):
        peaks.append(0)
        c = dataclasses.replace(config, steps=steps)
        with torch.autograd.graph.saved_tensors_hooks(Waiting, lambda waiting: waiting.tensor):
            single_pass.sample_and_trace(pipe, claims.ALL[:4], c, generators, scaler)
    assert peaks[0] == peaks[1] > 0 == len(alive)


def test_a_run_in_one_pass_is_that_in_two(config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert single_pass.main(flags(config, out=one)) == ddpo.main(flags(config, out=two)) == 0
    for name, weights in read_lora(two).items():
        torch.testing.assert_close(read_lora(one)[name], weights, rtol=0, atol=1e-5)
    for a, b in zip(read_log(one), read_log(two), strict=True):
        assert a.keys() == b.keys() and float(b["grad_norm"]) > 0
        for name in ("reward_mean", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)


def test_one_pass_in_fp16_scales_its_gradient_as_two_do(config, tmp_path):
    """Not that of a sum over all pairs, which would overflow: a skipped update is a lost epoch."""
    logs = {}
    for script in (ddpo, single_pass):
        folder = tmp_path / script.__name__
        assert script.main(flags(config, out=folder, epochs=1, samples_per_epoch=32, precision="fp16")) == 0
        logs[script] = read_log(folder)[0]
    assert [row["skipped"] for row in logs.values()] == ["0", "0"]
    norms = [float(row["grad_norm"]) for row in logs.values()]
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] > 0


def test_a_resumed_run_in_one_pass_ends_as_if_it_had_not_stopped(config, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert single_pass.main(flags(config, out=whole)) == 0
    assert single_pass.main(flags(config, out=stopped, epochs=1)) == 0
    assert single_pass.main(["--resume", str(stopped), "--epochs", "2"]) == 0
    assert len(read_log(stopped)) == 2
    assert all(torch.equal(read_lora(stopped)[name], weights) for name, weights in read_lora(whole).items())


def test_one_pass_refuses_a_penalty_in_one_line(config, capsys):
    assert single_pass.main([*flags(config), "--kl_weight", "0.1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "kl_weight 0.1" in lines[0] and not Path(config.out).exists()


# ---------- what is measured

@pytest.mark.parametrize("script", [ddpo, single_pass])
def test_the_parts_of_an_epoch_are_the_epoch_and_none_is_in_two(script, config, monkeypatch):
    """A decoder that takes 0.3 seconds more, twice an epoch, is not in the rest of sampling."""
    decode, before = diffusers.AutoencoderKL.decode, dict(vars(ddpo))

    def slow_decode(*args):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        return decode(*args)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", slow_decode)
    (cost,) = bench.measure(script.train, config, 1, bare=True)
    parts = [cost[name] for name in ("sampling", "decoding", "reward", "kl", "updates")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(cost["epoch"])
    assert cost["decoding"] > 0.6 > cost["sampling"] and cost["bare"] > 0.6
    assert vars(ddpo) == before


def test_the_bench_compares_what_the_readme_tells(config):
    config = dataclasses.replace(config, algo="is", updates_per_epoch=2)
    rows = bench.bench(config, types.SimpleNamespace(size="sd", epochs=1, growth=True))
    names, stored = {row[0] for row in rows}, {row[0] for row in read_bench("sd")["rows"]}
    growth = {"an epoch, samples_per_epoch 16", "an epoch, steps 6", "an epoch, batch 2"}
    assert stored | growth <= names and all(cost > 0 and ratio > 0 for _, cost, ratio, _ in rows)


def test_every_run_of_the_claims_is_a_command_of_its_script():
    for name, (_, kind, _) in claims.RUNS.items():
        config = claims.settings(name, seed=1)
        prompts = [claims.KINDS[kind]] if kind in claims.KINDS else claims.ALL
        assert ddpo.load_prompts(config.prompts) == prompts and (config.seed, config.device) == (1, "cpu")
        assert ("SF64" in name, name.startswith("KL-")) == (config.algo == "sf", config.algo == "sft")


def test_the_tables_are_those_of_the_stored_numbers():
    stored = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))
    lines = [line for table in claims.TABLES for line in table(stored["pre-trained"], stored["runs"])]
    assert lines == stored["tables"] and stored["runs"].keys() == claims.RUNS.keys()


# ---------- what was found

def read_bench(size):
    return json.loads((RESULTS / f"{BENCHES[size]}.json").read_text(encoding="utf-8"))


def test_what_the_experiments_found_is_so_in_every_seed():
    found = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))
    start, count = found["pre-trained"]["all"]["trained"], found["pre-trained"]["count"]["trained"]
    seeds = {name: [scores["trained"] for scores in found["runs"][f"DDPO {name}"]]
             for name in ("jpeg", "incompressibility", "jpeg kl_weight", "count")}
    empty = rewards.incompressibility([Image.new("RGB", (64, 64), (240, 240, 240))], [""]).item()
    assert all(len(scores) >= 5 for scores in seeds.values())
    for scores in seeds["jpeg"]:
        assert start["size"] - scores["size"] >= (start["size"] - empty) / 3
        assert scores["strict"] <= start["strict"] / 2
    for scores in seeds["jpeg kl_weight"]:
        assert start["size"] - scores["size"] > 0.1 and scores["strict"] >= start["strict"] - 0.1
    assert all(scores["size"] - start["size"] >= 0.1 for scores in seeds["incompressibility"])
    assert all(scores["strict"] - count["strict"] >= 0.2 for scores in seeds["count"])
    for size, most in {"shapes": 1.15, "medium": 1.05, "sd": 1.05}.items():
        ratios = {what: ratio for what, _, ratio, _ in read_bench(size)["rows"]}
        assert ratios["an epoch, DDPO_IS"] <= most and ratios["sampling and updates, single_pass.py"] <= 0.75


def test_the_readme_has_the_numbers_that_the_experiments_printed():
    files = HERE.parent / "README.md", HERE / "README.md"
    pages = "".join(file.read_text(encoding="utf-8") for file in files)
    tables = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))["tables"]
    rows = [row for lines in tables for row in lines.splitlines() if row.startswith("|")]
    assert rows and [row for row in rows if row not in pages] == []
    benches = [read_bench(size) for size in BENCHES]
    values = [{what: ratio for what, _, ratio, _ in b["rows"]} | b["peak_memory_gb"] for b in benches]
    costs = {what: to for what, _, _, to in benches[0]["rows"] if any(v.get(what, 1) != 1 for v in values)}
    costs |= {who: "GB" for who in benches[0]["peak_memory_gb"]}
    for what, to in costs.items():
        cells = " | ".join(f"{v[what]:.2f}" if what in v else "" for v in values)
        assert f"| {'peak memory, ' * (to == 'GB')}{what} | {to} | {cells} |" in pages
    shapes, medium, sd = (f"{v['sampling and updates, single_pass.py']:.2f}" for v in values)
    sentence = (f"take {shapes} of the CPU time of two passes on `shapes/`, {medium} with a random UNet of "
                f"22 million parameters and {sd}")
    assert sentence in " ".join(pages.split())


def test_what_the_readmes_show_and_link_to_is_there():
    files = [HERE.parent / "README.md", HERE / "README.md", HERE.parent / "shapes" / "README.md"]
    links = [(file.parent, pair) for file in files
             for pair in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)", file.read_text(encoding="utf-8"))]
    targets = [folder / "".join(pair) for folder, pair in links if "://" not in "".join(pair)]
    assert len(targets) > 10
    for file, _, heading in (str(target).partition("#") for target in targets):
        assert Path(file).exists(), file
        page = Path(file).read_text(encoding="utf-8").lower() if heading else "# \n"
        assert f"# {heading.replace('-', ' ')}\n" in page
