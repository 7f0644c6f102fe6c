"""What can be shown about a GPU without one: devices, types, memory, rounding and resuming.

    python -m pytest -q tests/test_gpu.py  # about two minutes
"""
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import ddpo
import dpok
import memory
import precision

torch.set_num_threads(1)
SCRIPTS = [ddpo, dpok]
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2}


class Reads(TorchDispatchMode):
    """Note in `events` each operation that brings values from the fake GPU to the CPU. A question
    about a fake tensor, as in `decode`, is answered with yes."""

    def __init__(self, events: list):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.events.append("read")
            return True
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            if source.device.type == "cuda" and result.device.type == "cpu":
                self.events.append("read")
        return result


def events_of_sampling(script, K):
    """Decode a chunk of two, and then sample two chunks of two in K steps, on a fake GPU -> the
    number of reads of the former, and the events of the latter: "unet" and "read"."""
    config = script.Config(model="tiny", device="cuda", steps=K, batch=2, precision="fp16")
    events = []

    def note_call(module, inputs):
        events.append("unet")

    with FakeTensorMode():
        pipe = memory.make_pipeline(
            bench.UNETS["tiny"], bench.VAES["tiny"], SMALL_TEXT, torch.float16, "cuda")
        script.add_lora(pipe.unet, config.rank)
        pipe.unet.register_forward_pre_hook(note_call)
        generators = [torch.Generator() for _ in range(4)]
        with Reads(events):
            script.decode(pipe, torch.zeros(2, 4, 8, 8, device="cuda"))
            reads_of_decode = len(events)
            events.clear()
            script.sample(pipe, ["cat"] * 4, config, generators)
    return reads_of_decode, events


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_of_sampling_reads_a_value_from_the_gpu(script):
    """A read makes Python wait for the GPU. `decode` reads whether all numbers are finite, once per
    chunk of samples, after the chunk's last step; so the number of reads does not grow with K."""
    for K in (3, 6):
        reads_of_decode, events = events_of_sampling(script, K)
        chunk = ["unet"] * K + ["read"] * reads_of_decode
        assert events == chunk + chunk
        assert reads_of_decode in (1, 2)  # of the latents and of the pixels


class Launches(TorchDispatchMode):
    """Count the operations that a GPU gets a kernel for: all but views, empty tensors and
    questions about a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        without_kernel = function.is_view or "empty" in name or name in ("_unsafe_view", "device")
        if not without_kernel:
            self.count += 1
        return function(*args, **(kwargs or {}))


def launches_of_a_unet_call(script, lora_on):
    """Call a UNet of Stable Diffusion's size in fp16 on a fake GPU -> the number of launches: with
    diffusers' own processors for None, or with LoRA on or off."""
    with FakeTensorMode(), torch.no_grad():
        pipe = memory.make_pipeline(
            bench.UNETS["sd"], bench.VAES["tiny"], SMALL_TEXT, torch.float16, "cuda")
        if lora_on is not None:
            script.add_lora(pipe.unet, 4)
        switch = script.pretrained(pipe.unet) if lora_on is False else contextlib.nullcontext()
        with torch.device("cuda"), switch, Launches() as launches:
            x_t = torch.empty(8, 4, 64, 64, dtype=torch.float16)
            text = torch.empty(8, 77, 768, dtype=torch.float16)
            pipe.unet(x_t, torch.empty(8), text)
    return launches.count


@pytest.mark.parametrize("script", SCRIPTS)
def test_lora_adds_few_kernel_launches_to_a_unet_call(script):
    """With few rows a GPU waits for launches. LoRA has 128 layers, with two products each, the
    second of which adds to the layer's output, and one cast of all weights."""
    stock = launches_of_a_unet_call(script, None)
    assert 1000 < stock < 1300
    assert launches_of_a_unet_call(script, True) <= stock + 2 * 128 + 2
    assert launches_of_a_unet_call(script, False) <= stock


class Copies(TorchDispatchMode):
    """Count the operations that copy a tensor, into another type or layout or as it is."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("clone", "copy_", "_to_copy"):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_unet_call_makes_as_many_copies_in_either_memory_format():
    """diffusers' UNet changes the layout around each attention block in both. So copies are no
    reason to prefer one: bench/ways.py measures which is faster."""
    counts = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        with FakeTensorMode(), torch.no_grad():
            pipe = memory.make_pipeline(
                bench.UNETS["sd"], bench.VAES["tiny"], SMALL_TEXT, torch.float16, "cuda")
            for parameter in pipe.unet.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=memory_format)
            ddpo.add_lora(pipe.unet, 4)
            with torch.device("cuda"), Copies() as copies:
                x_t = torch.empty(8, 4, 64, 64, dtype=torch.float16)
                text = torch.empty(8, 77, 768, dtype=torch.float16)
                pipe.unet(x_t, torch.empty(8), text)
        counts.append(copies.count)
    page = (Path(bench.HERE) / "README.md").read_text(encoding="utf-8")
    assert counts[0] == counts[1]
    assert f"makes {counts[0]} copies" in " ".join(page.split())


def call_with_lora(script, config, captured=False):
    """Load a pipeline with LoRA as training might leave it -> UNet, LoRA's parameters, and the
    arguments of a call of `predict_noise`. A UNet is captured as one graph, which runs as it is."""
    pipe = script.load_pipeline(config)
    if captured:
        pipe.unet.compile(backend="eager", fullgraph=True)
    lora = script.add_lora(pipe.unet, 4)
    rng = torch.Generator().manual_seed(1)
    for parameter in lora:
        torch.nn.init.normal_(parameter, generator=rng)
    x_t = torch.randn(2, 4, 8, 8, generator=rng)
    cond = script.encode_prompts(pipe, ["a red circle", "two blue squares"])
    return pipe.unet, lora, (pipe.unet, x_t, torch.tensor([667, 334]), cond, cond[:1], 5.0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_checkpointing_changes_no_gradient(script, tmp_path):
    """Blocks are computed again in the backward pass. By then the UNet was called without LoRA, as
    for the KL, and the copies of its weights must still be those of the first call."""
    config = script.Config(model=str(bench.make_model("tiny", tmp_path)), device="cpu", steps=3)
    gradients = {}
    for checkpointing in (False, True):
        changed = dataclasses.replace(config, gradient_checkpointing=checkpointing)
        unet, lora, arguments = call_with_lora(script, changed)
        eps = script.predict_noise(*arguments)
        with torch.no_grad(), script.pretrained(unet):
            script.predict_noise(*arguments)
        eps.square().sum().backward()
        gradients[checkpointing] = [parameter.grad for parameter in lora]

    for one, other in zip(gradients[False], gradients[True], strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one)


def test_a_captured_unet_call_follows_lora_like_an_eager_one(tmp_path):
    """With LoRA on, off, and changed by an optimiser, with and without gradient: nothing is baked
    into a graph of Dynamo's."""
    config = ddpo.Config(model=str(bench.make_model("tiny", tmp_path)), device="cpu", steps=3)
    outputs, gradients = {}, {}
    for captured in (False, True):
        unet, lora, arguments = call_with_lora(ddpo, config, captured)
        outputs[captured] = []
        for _ in range(2):
            eps = ddpo.predict_noise(*arguments)
            eps.square().sum().backward()
            with torch.no_grad():
                eps_sampling = ddpo.predict_noise(*arguments)
                with ddpo.pretrained(unet):
                    eps_pretrained = ddpo.predict_noise(*arguments)
                for parameter in lora:
                    parameter.add_(0.1)
            outputs[captured] += [eps.detach(), eps_sampling, eps_pretrained]
        gradients[captured] = [parameter.grad for parameter in lora]

    eager = outputs[False]
    assert not torch.allclose(eager[0], eager[2]) and not torch.allclose(eager[0], eager[3])
    torch.testing.assert_close(outputs[True], eager)
    torch.testing.assert_close(gradients[True], gradients[False])


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_on_a_gpu_is_float32_on_one_device_and_reads_no_value(script):
    """Stable Diffusion's parts in fp16 on a fake GPU, where mixed devices or types raise an error.
    All but the frozen weights is float32."""
    config = script.Config(model="sd", device="cuda", steps=3, batch=2, precision="fp16")
    reads = []
    with FakeTensorMode(), Reads(reads):
        pipe = memory.make_pipeline(
            bench.UNETS["sd"], bench.VAES["sd"], memory.TEXT, torch.float16, "cuda")
        lora = script.add_lora(pipe.unet, config.rank)
        rollout = script.sample(pipe, ["cat"] * 2, config, [torch.Generator() for _ in range(2)])
        i = torch.zeros(2, dtype=torch.long, device="cuda")
        k = torch.ones(2, dtype=torch.long, device="cuda")
        advantage = torch.ones(2, device="cuda")
        reads.clear()

        x_t, t = rollout.latents[i, k], rollout.timesteps[k]
        mean, sigma = script.policy(pipe, x_t, t, rollout.cond[i], rollout.uncond, config)
        with torch.no_grad(), script.pretrained(pipe.unet):
            mean_pre, _ = script.policy(pipe, x_t, t, rollout.cond[i], rollout.uncond, config)
        log_prob_new = script.log_prob(rollout.latents[i, k + 1], mean, sigma)
        log_prob_old = rollout.log_probs[i, k]
        kl = script.kl_divergence(mean, mean_pre, sigma)
        if script is ddpo:
            losses = [ddpo.score_function_loss(log_prob_new, advantage),
                      ddpo.importance_sampling_loss(
                          log_prob_new, log_prob_old, advantage, config.clip_range)]
        else:
            with torch.device("cuda"):
                value_network = dpok.ValueNetwork((4, 64, 64), 768, config.steps)
            advantage = advantage - value_network(x_t, rollout.cond[i, 0].float(), k)
            noised = pipe.scheduler.add_noise(x_t, torch.randn_like(x_t), t)
            x0_pred = dpok.predict_x0(pipe.scheduler, mean, t, noised)
            losses = [dpok.policy_loss(log_prob_new, log_prob_old, advantage, config.clip_range),
                      dpok.supervised_loss(x0_pred, x_t, advantage, sigma, gamma=2.0),
                      dpok.supervised_loss(x0_pred, x_t, advantage, sigma, gamma=2.0, x0_pre=x_t)]
        results = [*lora, rollout.latents, rollout.log_probs, mean, sigma, log_prob_new, kl]
        for loss, info in losses:
            results += [loss, *info.values()]

        for tensor in results:
            assert (tensor.device.type, tensor.dtype) == ("cuda", torch.float32)
        assert pipe.unet.conv_in.weight.dtype == torch.float16
        assert mean.requires_grad
        assert reads == []


def test_fp16_leaves_the_ratio_to_the_policy_and_bf16_drowns_it(monkeypatch):
    """DPOK's first update on shapes/, at latents of 32 x 32, hardly moves the ratios by itself. In
    fp16, as made by load_pipeline, they stay in the clip range. In bf16 rounding moves most out."""
    monkeypatch.setattr(precision, "STEPS", [45, 46, 47])
    config = dpok.Config(model="shapes", device=precision.DEVICE, precision="fp16")
    pipe = dpok.load_pipeline(config)
    pipe.scheduler.set_timesteps(50)
    unet = precision.load_unet("shapes")
    states = precision.make_states(unet.config, pipe.scheduler, "shapes", 1)
    updated = precision.one_update(unet, pipe.scheduler, states, config)
    bf16_unet, _ = precision.in_precision(unet, "bf16", imitated=False)

    shares = {}
    for name, half_unet in {"fp16": pipe.unet, "bf16": bf16_unet}.items():
        lora = dpok.add_lora(half_unet, 4, torch.Generator().manual_seed(0))
        _, g = precision.movement(half_unet, pipe.scheduler, states, config, lora, updated)
        shares[name] = precision.share_outside(g, states.x_t[0].numel())

    assert shares["fp16"].max() < 0.01
    assert shares["bf16"].min() > 0.5


def test_a_run_in_fp32_goes_on_in_fp16_and_back(tmp_path):
    """As when a run is resumed on another device. GradScaler has a state in fp16 only."""
    run = tmp_path / "run"
    model = bench.make_model("tiny", tmp_path)
    assert ddpo.main([f"--model={model}", "--device=cpu", "--reward=jpeg", "--epochs=1",
                      "--steps=2", "--samples_per_epoch=4", f"--out={run}"]) == 0
    assert "scale" not in torch.load(run / "checkpoint.pt")["scaler"]

    assert ddpo.main([f"--resume={run}", "--epochs=2", "--precision=fp16"]) == 0
    assert torch.load(run / "checkpoint.pt")["scaler"]["scale"] > 1

    assert ddpo.main([f"--resume={run}", "--epochs=3", "--precision=fp32"]) == 0
    assert "scale" not in torch.load(run / "checkpoint.pt")["scaler"]
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["precision"] == "fp32"
    assert len((run / "log.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_does_not_fit_the_memory_fails_before_the_first_epoch_is_sampled(
        script, tmp_path, monkeypatch, capsys):
    """In one line that says what to lower, and with nothing written."""
    def no_room(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.Tensor, "backward", no_room)
    monkeypatch.setattr(script, "sample", None)

    status = script.main(["--device", "cpu", "--reward", "jpeg", "--out", str(tmp_path / "run")])

    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert last_line.startswith(f"{script.__name__}.py: error:")
    for words in ("out of memory", "--batch", "--gradient_checkpointing"):
        assert words in last_line
    assert not (tmp_path / "run").exists()


def measure_memory():
    """Print the GB of sampling and an update with 22 million parameters, counted and taken."""
    text = SMALL_TEXT | {"hidden_size": 96, "intermediate_size": 96}
    config = dpok.Config(model="medium", batch=4, samples_per_epoch=8, precision="fp32",
                         device="cpu")
    parts = bench.UNETS["medium"], bench.VAES["medium"], text
    counted = memory.count(*parts, dpok, config)
    before = memory.peak("cpu")
    memory.count(*parts, dpok, config, mode=contextlib.nullcontext)
    print(json.dumps([max(counted.values()), memory.peak("cpu") - before]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="the system does not say how much memory a process has taken")
def test_the_memory_that_is_counted_is_what_a_run_takes():
    """In a process of its own, where every block is mapped by itself, so that the allocator keeps
    none that is free."""
    done = subprocess.run(
        [sys.executable, "-c", "import conftest, test_gpu; test_gpu.measure_memory()"],
        cwd=Path(__file__).parent, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"},
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted, taken = json.loads(done.stdout.splitlines()[-1])
    assert taken == pytest.approx(counted, rel=0.1)
    assert counted > 0.5


def test_the_page_has_the_tables_that_the_programs_printed():
    page = (bench.HERE / "README.md").read_text(encoding="utf-8")
    memory_rows = json.loads((bench.RESULTS / "memory.json").read_text(encoding="utf-8"))["rows"]
    results = json.loads(precision.FILE.read_text(encoding="utf-8"))
    lines = memory.table(memory_rows) + precision.tables(results)
    missing = [line for line in lines if line not in page]
    assert missing == [] and len(lines) > 60


def test_the_imitated_rounding_is_that_of_real_half_precision():
    """Where both were measured, delta is the same within a quarter, at every timestep."""
    results = json.loads(precision.FILE.read_text(encoding="utf-8"))
    for result in (results["shapes"], results["10M"]):
        for name in precision.HALF:
            # a row has script and timestep, and then three numbers of each precision
            real = 2 + 3 * result["columns"].index(name)
            imitated = 2 + 3 * result["columns"].index(f"{name}, imitated")
            for row in result["rows"]:
                assert row[imitated] == pytest.approx(row[real], rel=0.25)
