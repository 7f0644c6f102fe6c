"""Right on a GPU, as far as it can be shown without one: devices, types, memory and roundings.

    python -m pytest -q experiments/test_gpu.py   # a minute
"""
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import ddpo  # noqa: E402
import dpok  # noqa: E402
import memory  # noqa: E402
import precision  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize("script", [ddpo, dpok])
def test_on_a_gpu_devices_and_types_agree_and_no_step_reads_a_value_back(script):
    """Stable Diffusion's parts in fp16 on a fake CUDA device, where mixed devices or types raise, and what
    reads a value. All but the frozen weights is float32."""
    config = script.Config(model="sd", device="cuda", steps=3, batch=2, precision="fp16")
    with FakeTensorMode():
        pipe = memory.make_pipeline(bench.UNETS["sd"], bench.VAES["sd"], memory.TEXT, torch.float16, "cuda")
        lora = script.add_lora(pipe.unet, config.rank)
        rollout = script.sample(pipe, ["cat"] * 4, config, [torch.Generator() for _ in range(4)])
        i, k, advantage = (torch.ones(2, dtype=dtype, device="cuda") for dtype in (int, int, torch.float32))
        x_t, t = rollout.latents[i, k], rollout.timesteps[k]
        mean, sigma = script.policy(pipe, x_t, t, rollout.cond[i], rollout.uncond, config)
        with torch.no_grad(), script.pretrained(pipe.unet):
            mean_pre, _ = script.policy(pipe, x_t, t, rollout.cond[i], rollout.uncond, config)
        new, old = script.log_prob(rollout.latents[i, k + 1], mean, sigma), rollout.log_probs[i, k]
        kl = script.kl_divergence(mean, mean_pre, sigma)
        if script is ddpo:
            losses = [ddpo.score_function_loss(new, advantage),
                      ddpo.importance_sampling_loss(new, old, advantage, config.clip_range)]
        else:
            noised = pipe.scheduler.add_noise(x_t, torch.randn_like(x_t), t)
            x0_pred = dpok.predict_x0(pipe.scheduler, mean, t, noised)
            with torch.device("cuda"):
                value = dpok.ValueNetwork((4, 64, 64), 768, config.steps)
            advantage = advantage - value(x_t, rollout.cond[i, 0].float(), k)
            losses = [dpok.policy_loss(new, old, advantage, config.clip_range),
                      dpok.supervised_loss(x0_pred, x_t, advantage, sigma, 2.0),
                      dpok.supervised_loss(x0_pred, x_t, advantage, sigma, 2.0, x_t)]
        results = [*lora, rollout.latents, rollout.log_probs, mean, sigma, new, kl,
                   *(loss for loss, _ in losses), *(value for _, info in losses for value in info.values())]
        assert {(tensor.device.type, tensor.dtype) for tensor in results} == {("cuda", torch.float32)}
        assert pipe.unet.conv_in.weight.dtype == torch.float16 and mean.requires_grad


def test_fp16_leaves_the_ratio_to_the_policy_and_bf16_drowns_it(monkeypatch):
    """On shapes/ at latents of 32 x 32, DPOK's first update, which itself hardly moves them: with the UNet as
    load_pipeline makes it for fp16 they stay in the clip, in bf16 roundings carry most out of it."""
    monkeypatch.setattr(precision, "STEPS", (45, 46, 47))
    config = dpok.Config(model="shapes", device=precision.DEVICE, precision="fp16")
    pipe = dpok.load_pipeline(config)
    pipe.scheduler.set_timesteps(50)
    unet = precision.load_unet("shapes")
    at = precision.states(unet.config, pipe.scheduler, "shapes", 1)
    updated = precision.one_update(unet, pipe.scheduler, at, config)
    share = {}
    for name, half in (("fp16", pipe.unet), ("bf16", precision.in_precision(unet, "bf16", False)[0])):
        lora = dpok.add_lora(half, 4, torch.Generator().manual_seed(0))
        _, g = precision.moved(half, pipe.scheduler, at, config, lora, updated)
        share[name] = precision.outside(g, at[0][0].numel())
    assert share["fp16"].max() < 0.01 and share["bf16"].min() > 0.5


def test_a_run_in_fp32_goes_on_in_fp16_and_back(tmp_path):
    """As by --resume on another device: GradScaler has a state in fp16 alone."""
    run, config = tmp_path / "run", tmp_path / "run" / "config.json"
    assert ddpo.main(["--device=cpu", "--reward=jpeg", "--epochs=1", "--steps=2", "--samples_per_epoch=4",
                      "--batch=4", f"--out={run}"]) == 0
    for epoch, half in (2, "fp16"), (3, "fp32"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"precision": half}))
        assert ddpo.main(["--resume", str(run), "--epochs", str(epoch)]) == 0
    assert len((run / "log.csv").read_text().splitlines()) == 1 + 3


def test_what_does_not_fit_the_memory_fails_before_the_first_epoch_is_sampled(tmp_path, monkeypatch, capsys):
    def no_room(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.Tensor, "backward", no_room)
    for script in (ddpo, dpok):
        monkeypatch.setattr(script, "sample", None)
        assert script.main(["--device", "cpu", "--reward", "jpeg", "--out", str(tmp_path / "run")]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert "out of memory" in last and "--batch" in last and "--gradient_checkpointing" in last
        assert not (tmp_path / "run").exists()


def measure_memory():
    """In a process of its own: GB of sampling and an update with 22 M parameters, counted and taken."""
    text = dict(hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    config = dpok.Config(model="medium", batch=4, samples_per_epoch=8, precision="fp32", device="cpu")
    run = lambda *mode: max(memory.count(  # noqa: E731
        bench.UNETS["medium"], bench.VAES["medium"], text, dpok, config, *mode).values())
    counted, before = run(), memory.peak("cpu")
    run(contextlib.nullcontext)
    print(json.dumps([counted, memory.peak("cpu") - before]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say a process's peak")
def test_the_memory_that_is_counted_is_what_a_run_takes():
    """Every block by mmap, so that the allocator keeps none that is free."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run([sys.executable, "-c", "import test_gpu; test_gpu.measure_memory()"], cwd=HERE,
                          env=environment, capture_output=True, text=True)
    counted, taken = json.loads(done.stdout.splitlines()[-1])
    assert taken == pytest.approx(counted, rel=0.1) and counted > 0.5


def test_the_pages_have_the_tables_that_the_experiments_printed():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    rows = json.loads((HERE / "results" / "memory.json").read_text())["rows"]
    lines = [*memory.lines(rows), *precision.lines(json.loads(precision.FILE.read_text()))]
    assert len(lines) > 60 and [line for line in lines if line not in page] == []


def test_the_imitated_roundings_are_those_of_real_half_precision():
    """Where both were measured: the same delta of the guided noise, to a quarter, at every timestep."""
    found = json.loads(precision.FILE.read_text())
    for part in (found["shapes"], found["10M"]):
        columns = part["columns"]
        for name in precision.HALF:
            real, imitated = (2 + 3 * columns.index(column) for column in (name, f"{name}, imitated"))
            assert all(row[imitated] == pytest.approx(row[real], rel=0.25) for row in part["rows"])
