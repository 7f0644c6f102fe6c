"""What bench/ measures is what it says, and the pages show the numbers that it has stored.

    python -m pytest -q tests/test_bench.py  # about a minute
"""
import dataclasses
import json
import math
import sys

import diffusers
import pytest
import torch

import bench
import ddpo
import gpu
import rewards
import single_pass
import ways

torch.set_num_threads(1)
ROOT = bench.ROOT
STORED = {"shapes": "bench-shapes-cpu-fp32-peer", "medium": "bench-medium-cpu-fp32-peer",
          "sd": "bench-sd-cpu-fp32"}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a pipeline of a tiny random UNet and decoder."""
    return bench.make_model("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture
def config(model):
    """Settings of an epoch that takes a second."""
    return ddpo.Config(model=str(model), samples_per_epoch=8, steps=3, batch=4,
                       updates_per_epoch=2, device="cpu")


def read_stored(size):
    file = bench.RESULTS / f"{STORED[size]}.json"
    return json.loads(file.read_text(encoding="utf-8"))


class Clock:
    """A clock that stands still, except while a function runs that was given a duration."""

    def __init__(self, monkeypatch):
        self.time = 0
        monkeypatch.setattr(bench, "clock", self.read)

    def read(self, device):
        return self.time

    def lasting(self, duration, function):
        def timed_function(*args, **kwargs):
            self.time += duration
            return function(*args, **kwargs)
        return timed_function


# ---------- what is measured
def test_what_a_part_takes_is_counted_in_that_part_and_in_no_other(config, monkeypatch):
    """8 samples are one call of `sample` and two of the decoder. Were decoding counted in sampling
    too, sampling would be 2 + 6 and, as what is left, updates 22 - 6."""
    clock = Clock(monkeypatch)
    decode = clock.lasting(3, diffusers.AutoencoderKL.decode)
    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", decode)
    monkeypatch.setitem(rewards.REWARDS, "jpeg", clock.lasting(5, rewards.jpeg))
    for name, duration in {"sample": 2, "kl_to_pretrained": 7, "optimizer_step": 11}.items():
        monkeypatch.setattr(ddpo, name, clock.lasting(duration, getattr(ddpo, name)))

    costs = bench.measure_with_parts(config, epochs=2, warm_up=1)

    parts = {"sampling": 2, "decoding": 2 * 3, "reward": 5, "kl": 7, "updates": 2 * 11}
    expected = parts | {"epoch": sum(parts.values()), "bare": 2 * 3}
    assert costs == [expected, expected]


def test_what_is_done_between_the_epochs_is_not_on_the_clock(config, monkeypatch):
    """Each epoch is measured once, and keeps what `between` returned after it."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(ddpo, "kl_to_pretrained", clock.lasting(7, ddpo.kl_to_pretrained))
    calls = []

    def between():
        calls.append(1)
        clock.time += 100
        return {"call": len(calls)}

    costs = bench.measure(ddpo.train, config, epochs=2, warm_up=1, between=between)

    assert costs == [{"epoch": 7, "call": 2}, {"epoch": 7, "call": 3}]
    assert "clocked_jpeg" not in rewards.REWARDS


@pytest.mark.parametrize("script", [ddpo, single_pass])
def test_a_measured_epoch_has_one_of_each_phase_and_no_pictures(script, config, monkeypatch):
    """From one scoring to the next: updates, KL, saving, sampling. Two such epochs, and before them
    the sampling that the first scoring needs."""
    phases = []

    def spied(name, function):
        def spy(*args, **kwargs):
            phases.append(name)
            return function(*args, **kwargs)
        return spy

    def score(images, prompts):
        phases.append("score")
        return rewards.jpeg(images, prompts)

    module, name = (ddpo, "sample") if script is ddpo else (single_pass, "sample_and_trace")
    monkeypatch.setattr(module, name, spied("sample", getattr(module, name)))
    monkeypatch.setattr(ddpo, "optimizer_step", spied("update", ddpo.optimizer_step))
    monkeypatch.setattr(ddpo, "kl_to_pretrained", spied("kl", ddpo.kl_to_pretrained))
    monkeypatch.setattr(ddpo, "end_epoch", spied("save", ddpo.end_epoch))
    monkeypatch.setattr(ddpo, "save_pictures", spied("pictures", ddpo.save_pictures))
    monkeypatch.setitem(rewards.REWARDS, "jpeg", score)
    config = dataclasses.replace(config, algo="sf", updates_per_epoch=1)

    costs = bench.measure(script.train, config, epochs=2)

    epoch = ["score", "update", "kl", "save", "sample"]
    assert phases == ["sample", *epoch, *epoch] and len(costs) == 2


def test_the_bare_calls_are_those_of_an_epoch(config):
    """As many rows go through UNet and decoder as in an epoch of ddpo.py; batch need not divide."""
    config = dataclasses.replace(config, samples_per_epoch=6, batch=4)
    pipe = bench.load_pipeline(config)
    rows = {"unet": 0, "vae": 0}

    def count_unet(module, inputs):
        rows["unet"] += len(inputs[0])

    def count_vae(module, inputs):
        rows["vae"] += len(inputs[0])

    pipe.unet.register_forward_pre_hook(count_unet)
    pipe.vae.decoder.register_forward_pre_hook(count_vae)
    bench.bare_epoch(pipe, config)

    # 6 samples of 3 steps: 18 rows of sampling, 18 of updates, and for the KL 2 x 6
    assert rows == {"unet": 2 * (18 + 18 + 12), "vae": 6}  # guidance doubles the rows


def test_the_command_measures_what_the_stored_results_have(model, tmp_path, monkeypatch, capsys):
    """At a tiny size, with its processes; the peer is left out."""
    monkeypatch.setattr(bench, "MODELS", model.parent)
    before = {file: file.read_bytes() for file in bench.RESULTS.glob("*.json")}

    bench.main(["--size", "tiny", "--device", "cpu", "--epochs", "1", "--results", str(tmp_path)])

    result = json.loads((tmp_path / "bench-tiny-cpu-fp32.json").read_text(encoding="utf-8"))
    stored = read_stored("sd")
    assert result.keys() == stored.keys()
    assert [(what, to) for what, _, _, to in result["rows"]] == [
        (what, to) for what, _, _, to in stored["rows"]]
    assert result["peak_memory_gb"].keys() == stored["peak_memory_gb"].keys()
    assert min(result["peak_memory_gb"].values()) > 0.1
    for what, cost, ratio, _ in result["rows"]:
        assert math.isfinite(cost) and math.isfinite(ratio)
        if "updates" not in what:  # what a noisy clock leaves for these may be anything
            assert cost > 0
    parts = [ratio for _, _, ratio, to in result["rows"] if to == "the epoch"]
    assert len(parts) == 5 and sum(parts) == pytest.approx(1)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(result["rows"]) + 1
    assert before == {file: file.read_bytes() for file in bench.RESULTS.glob("*.json")}


def test_a_process_of_its_own_also_measures_the_kl_in_the_log(config):
    """For the comparison with TRL, which logs no KL."""
    result = bench.in_child(sys.executable, "ddpo.py", config, epochs=2)

    assert 0 < result["kl"] < result["epoch"]
    assert result["memory_gb"] > 0.1 and result["versions"]["torch"] == torch.__version__


# ---------- a GPU
def test_the_command_for_a_gpu_runs_to_its_end(tmp_path, capsys):
    """At a tiny size, on a CPU and without its peer. Each process has random weights."""
    result = gpu.measure("tiny", "cpu", "fp32", None, tmp_path, "the command", 1)

    line, = (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == json.loads(json.dumps(result))
    assert result["ceiling"] > 0 and result["versions"]["torch"] == torch.__version__
    stock, ours, both = (operations for _, _, _, operations in result["calls"])
    assert 0 < stock <= ours < both
    epoch, = result["epochs"]
    parts = ("sampling", "decoding", "reward", "updates", "kl")
    assert sum(epoch["ours"][part] for part in parts) == pytest.approx(epoch["ours"]["epoch"])
    printed = capsys.readouterr().out
    assert "forward, LoRA | 4" in printed and "\n| 2 | " in printed


def test_compiled_blocks_never_fall_back_to_eager_and_the_ratio_is_measured_at_each_step():
    """On a CPU, with a backend that runs the captured code as it is. Two numbers of rows, with and
    without gradient, give more variants of a block than Dynamo's usual limit, after which it gives
    up silently. Here each is captured, and the ratio is 1 in float32."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = ddpo.Config(model="random", device="cpu", precision="fp32", **ways.EPOCH["tiny"])
    found = ways.measure_way("compiled blocks", "tiny", config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [(what, rows) for what, rows, _ in found["calls"]] == [
        ("forward", 4), ("forward and backward", 4), ("forward", 6), ("forward and backward", 6)]
    assert list(found["deviation"]) == [667, 334, 1]
    assert max(found["deviation"].values()) < 1e-5

    *_, line = ways.tables({"channels_last": {
        "first": [1.0, 2.0], "calls": [["forward", 8, 0.05]], "deviation": {"21": 1e-4, "1": 0.0}}})
    assert line == "| channels_last | 1.0 | 2.0 | 50.0 | 1.0e-04 | 21 |"


def test_the_tables_of_a_gpu_are_right():
    """With round numbers. A row costs 1 TFLOP forward and 2 with backward. An epoch has 48 samples
    of 4 steps and guidance: 384 rows are sampled, 384 learned from, and 96 go twice through the
    UNet for the KL."""
    calls = [["forward, diffusers' processors", 8, 0.04, 8e12], ["forward, LoRA", 8, 0.05, 8e12],
             ["forward and backward, LoRA", 8, 0.1, 16e12]]
    config = ddpo.Config(samples_per_epoch=48, steps=4)
    operations = gpu.operations_of_an_epoch(config, calls)
    assert operations == (384 + 2 * 384 + 2 * 96) * 1e12

    lines = gpu.call_table({"calls": calls, "ceiling": 400e12})
    assert "| forward, LoRA | 8 | 50.0 | 1.25 | 160 | 40 % |" in lines

    ours = {"epoch": 9.0, "sampling": 3.0, "updates": 4.0, "kl": 1.0, "decoding": 0.8,
            "reward": 0.2, "memory_gb": 10.0}
    epoch = {"batch": 4, "operations": operations, "ours": ours,
             "TRL": {"epoch": 10.0, "memory_gb": 12.0}}
    *_, line = gpu.epoch_table([epoch], 400e12)
    assert line == ("| 4 | 9.00 | 8.00 | 10.00 | 0.90 | 0.80 | 168 | 42 % | 10.0 | 12.0 | "
                    "3.00 | 4.00 | 1.00 | 0.80 | 0.20 |")


# ---------- what was found
@pytest.mark.parametrize("size, most", [("shapes", 1.15), ("medium", 1.05), ("sd", 1.05)])
def test_an_epoch_costs_little_more_than_its_calls_and_one_pass_less_than_two(size, most):
    ratios = {what: ratio for what, _, ratio, _ in read_stored(size)["rows"]}
    assert ratios["an epoch, DDPO_IS"] <= most
    assert ratios["sampling and updates, single_pass.py"] <= 0.75


def read_pages():
    pages = [(folder / "README.md").read_text(encoding="utf-8")
             for folder in (ROOT, ROOT / "bench", ROOT / "experiments")]
    return "\n".join(pages)


def test_the_pages_have_the_table_of_the_stored_costs():
    """Its rows are the ratios that are not 1 by definition, and the peaks of memory."""
    results = [read_stored(size) for size in STORED]
    ratios = [{what: ratio for what, _, ratio, _ in result["rows"]} for result in results]
    expected = []
    for what, _, _, to in results[0]["rows"]:
        if any(of_size.get(what, 1) != 1 for of_size in ratios):
            expected.append((what, to, [of_size.get(what) for of_size in ratios]))
    for who in results[0]["peak_memory_gb"]:
        peaks = [result["peak_memory_gb"].get(who) for result in results]
        expected.append((f"peak memory, {who}", "GB", peaks))

    page = read_pages()
    assert len(expected) > 10
    for what, to, values in expected:
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        assert f"| {what} | {to} | {' | '.join(cells)} |" in page


def test_the_pages_say_what_one_pass_costs():
    shares = []
    for size in STORED:
        ratios = {what: ratio for what, _, ratio, _ in read_stored(size)["rows"]}
        shares.append(f"{ratios['sampling and updates, single_pass.py']:.2f}")
    shapes, medium, sd = shares
    sentence = (f"take {shapes} of the CPU time of two passes on `shapes/`, {medium} with a random "
                f"UNet of 22 million parameters and {sd}")
    assert sentence in " ".join(read_pages().split())
