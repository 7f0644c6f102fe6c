"""One pass is two, RWR is its definition, the experiments measure what they say, and the pages have their
numbers.

    python -m pytest -q experiments/test_experiments.py   # with experiments/requirements.txt; two minutes

What the README says of learning is measured by claims.py, with eight seeds and more; a test holds the README
to the stored numbers.
"""
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
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import claims  # noqa: E402
import ddpo  # noqa: E402
import rewards  # noqa: E402
import rwr  # noqa: E402
import single_pass  # noqa: E402
from test_ddpo import disturb, flags, read_log  # noqa: E402

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


def read_lora(folder):
    return load_file(Path(folder, "lora", "pytorch_lora_weights.safetensors"))


@pytest.fixture
def taken(monkeypatch):
    """Of a run made with it: the pipe, LoRA as training might leave it, its gradients at an update that is
    not made, and the rollout."""
    add_lora, taken = ddpo.add_lora, {}

    def optimizer_step(lora, *others):
        taken.update(lora=lora, gradients=[parameter.grad.clone() for parameter in lora])
        return 0.0

    def kl_to_pretrained(pipe, rollout, *others):
        taken.update(pipe=pipe, rollout=rollout)
        return 0.0

    monkeypatch.setattr(ddpo, "add_lora", lambda *args: disturb(lora := add_lora(*args)) or lora)
    monkeypatch.setattr(ddpo, "optimizer_step", optimizer_step)
    monkeypatch.setattr(ddpo, "kl_to_pretrained", kl_to_pretrained)
    return taken


# ---------- one pass

@pytest.mark.parametrize("guidance, checkpointing", [(5.0, False), (1.0, False), (5.0, True)])
def test_one_pass_has_the_gradient_of_two(guidance, checkpointing, config, taken, monkeypatch):
    """Of seven samples in batches of four: collected while sampling, and by the loss at all pairs (i, k)."""
    monkeypatch.setattr(ddpo.Config, "divisors", {})
    config = dataclasses.replace(config, samples_per_epoch=7, steps=5, epochs=1, advantage_clip=1.0,
                                 guidance=guidance, gradient_checkpointing=checkpointing, min_count=32)
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


def test_one_pass_refuses_a_penalty_and_the_other_estimator_in_one_line(config, capsys):
    for name, value in ("kl_weight", "0.1"), ("algo", "is"):
        assert single_pass.main([*flags(config), f"--{name}", value]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert name in last and value in last and not Path(config.out).exists()


# ---------- reward-weighted regression

@pytest.fixture
def regression(pipeline, tmp_path):
    """Settings of two rounds of RWR on the random pipeline."""
    return rwr.Config(
        model=str(pipeline), prompts="two red squares", samples_per_epoch=16, steps=3, epochs=2, batch=4,
        updates_per_epoch=3, update_batch=8, inverse_temperature=400.0, percentile=0.6, lr=1e-3,
        sample_every=9, device="cpu", out=str(tmp_path / "run"))


def test_the_weights_are_a_softmax_over_the_images_of_each_prompt(regression):
    config = dataclasses.replace(regression, inverse_temperature=0.2)
    prompt, reward = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([1.0, 20.0, 3.0, 10.0, -1.0])
    # exp(0.2 r) is 1.2214, 1.8221, 0.8187 for prompt 0, sum 3.8623; e^4, e^2 for prompt 1, sum 61.9872
    expected = torch.tensor([3 * 1.2214 / 3.8623, 2 * 54.5982 / 61.9872, 3 * 1.8221 / 3.8623,
                             2 * 7.3891 / 61.9872, 3 * 0.8187 / 3.8623])
    torch.testing.assert_close(rwr.weights(prompt, reward, config), expected, rtol=1e-4, atol=0)
    far = reward + 1000.0 * prompt  # neither another prompt's rewards nor a constant matter
    torch.testing.assert_close(rwr.weights(prompt, far, config), expected, rtol=1e-4, atol=0)


def test_the_sparse_weights_keep_the_best_tenth_of_each_prompt(regression):
    config = dataclasses.replace(regression, algo="sparse", percentile=0.9)
    prompt, reward = torch.arange(40) % 2, torch.randperm(40).float()
    reward[prompt == 1] += 100  # all of its images are better than those of prompt 0
    weight = rwr.weights(prompt, reward, config)
    for number in (0, 1):
        best = reward[prompt == number].topk(2).values
        assert torch.equal(reward[(prompt == number) & (weight > 0)].sort().values, best.sort().values)
    assert set(weight.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("algo", ["rwr", "sparse"])
def test_an_update_of_rwr_is_that_of_its_definition(algo, regression, taken):
    """The gradient of the mean over 8 of the round's images of w || eps - eps_theta(x_t, t, c) ||^2, with
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps and the guided eps_theta, at other weights than p_pre's."""
    config = dataclasses.replace(regression, algo=algo, epochs=1, updates_per_epoch=1)
    rwr.train(config)
    pipe, rollout = taken["pipe"], taken["rollout"]
    rng = ddpo.generator(config.seed, 1, 16)
    prompt = torch.randint(1, (16,), generator=rng)
    weight = rwr.weights(prompt, rewards.jpeg(rollout.images, rollout.prompts), config)
    kept = weight.nonzero()[:, 0]
    assert len(kept) == {"rwr": 16, "sparse": 7}[algo] and (algo == "sparse" or weight.std() > 0.1)
    i = torch.cat([kept[torch.randperm(len(kept), generator=rng)] for _ in range(0, 8, len(kept))])[:8]
    t = torch.randint(1000, (8,), generator=rng)
    eps = torch.randn(8, 4, 8, 8, generator=rng)
    abar = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * rollout.latents[i, -1] + (1 - abar).sqrt() * eps
    pipe.unet.zero_grad()
    with_text = pipe.unet(x_t, t, rollout.cond[i]).sample
    without = pipe.unet(x_t, t, rollout.uncond.expand(8, -1, -1)).sample
    guided = config.guidance * with_text + (1 - config.guidance) * without
    sum(w * (a - b).square().mean() / 8 for w, a, b in zip(weight[i], guided, eps)).backward()
    for gradient, parameter in zip(taken["gradients"], taken["lora"]):
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() > 0


def test_a_resumed_run_of_rwr_ends_as_if_it_had_not_stopped(regression, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert rwr.main(flags(regression, out=whole)) == rwr.main(flags(regression, out=stopped, epochs=1)) == 0
    assert rwr.main(["--resume", str(stopped), "--epochs", "2"]) == 0
    assert len(read_log(stopped)) == 2 and float(read_log(whole)[0]["grad_norm"]) > 0
    assert all(torch.equal(read_lora(stopped)[name], weights) for name, weights in read_lora(whole).items())


@pytest.mark.parametrize("change", [{"kl_weight": 0.1}, {"percentile": 1.5}])
def test_rwr_refuses_what_it_cannot_do_in_one_line(change, regression, capsys):
    assert rwr.main(flags(regression, **change)) == 2
    lines, (name, value), = capsys.readouterr().err.splitlines(), *change.items()
    assert len(lines) == 1 and f"rwr.py: error: {name} {value}" in lines[0]
    assert not Path(regression.out).exists()


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
    rows = bench.bench(config, types.SimpleNamespace(size="sd", epochs=1))
    names, stored = {row[0] for row in rows}, {row[0] for row in read_bench("sd")["rows"]}
    assert stored <= names and all(cost > 0 and ratio > 0 for _, cost, ratio, _ in rows)


def test_every_run_of_the_claims_is_a_command_of_its_script():
    algorithms = {"SF": "sf", "KL-O": "sft", "KL-D": "sft", "RWR": "rwr", "RWR_sparse": "sparse"}
    for name, (script, kind, _) in claims.RUNS.items():
        config = claims.settings(name, seed=1)
        prompts = [claims.KINDS[kind]] if kind in claims.KINDS else claims.ALL
        assert ddpo.load_prompts(config.prompts) == prompts and (config.seed, config.device) == (1, "cpu")
        assert config.algo == algorithms.get(name.split()[0], "is" if script is ddpo else "rl")
        if name in ("RWR jpeg", "RWR_sparse jpeg", "SF jpeg"):  # as many reward queries
            ours = claims.settings("DDPO jpeg")
            assert config.epochs * config.samples_per_epoch == ours.epochs * ours.samples_per_epoch


def test_a_run_of_the_claims_is_measured_at_three_epochs_and_kept_on_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setattr(claims, "score", lambda pipe, prompts, count, seed, epoch: {"strict": epoch / count})
    kept = claims.run("SF count", 3, tmp_path, epochs=5, samples_per_epoch=2, batch=2, steps=2)
    assert kept["ends"] == [1, 3, 5] and kept["trained"] == {n: {"strict": n / 128} for n in kept["ends"]}
    assert len(kept["kl"]) == 5 and (kept["queries"], kept["updates"]) == (10, 5)
    stored = {"pre-trained": {}, "runs": {f"SF count-{seed}": kept for seed in range(8)}}
    claims.save(tmp_path / "claims.json", stored)
    assert len((tmp_path / "claims.json").read_text().splitlines()) == 8 + 5
    found = claims.finished(claims.load(tmp_path / "claims.json"))
    assert claims.over_seeds(found, "SF count").tolist() == [3 / 128] * 8 and list(found) == ["SF count"]
    jobs = [("SF count", seed, {}) for seed in range(8)]
    monkeypatch.setattr(claims, "run", None)  # what is kept is not made again
    assert claims.run_all(jobs, 1, tmp_path / "claims.json") == 0


def test_a_verdict_is_that_of_its_interval():
    spread = [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]  # standard error 0.378, 95 % within 0.892
    for mean, least, error, says in ((0.9, 0, 0, "holds"), (0.9, 0, 0.1, "inconclusive"),
                                     (0.9, 1, 0, "inconclusive"), (0.05, 1, 0, "**fails**"),
                                     (-0.9, 0, 0, "**fails**"), (-0.8, 0, 0, "inconclusive"),
                                     (0.8, -0.1, 0, "holds"), (0.7, -0.1, 0, "inconclusive"),
                                     (-1, -0.1, 0, "**fails**")):
        assert claims.verdict(([], mean + torch.tensor(spread).numpy(), error), least) == says


# ---------- what was found

def test_one_step_has_most_of_the_noise_of_the_score():
    """Given x_t, the gradient of log p with respect to eps is noise of variance (c / sigma)^2, where the mean
    moves by c with eps: at the last step but one sigma is small, and little can still change."""
    scheduler = ddpo.load_pipeline(claims.settings("DDPO jpeg")).scheduler
    page = " ".join((HERE / "README.md").read_text(encoding="utf-8").split())
    for K, sentence in (10, "{:.0%} of the noise in DDPO's"), (50, "{:.0%} on Stable Diffusion's 50"):
        scheduler.set_timesteps(K)
        t, zero = scheduler.timesteps, torch.zeros(K, 1, 1, 1)
        still, sigma = ddpo.step_distribution(scheduler, zero, t, zero)
        moved, _ = ddpo.step_distribution(scheduler, zero + 1, t, zero)
        noise = ((moved - still) / sigma).flatten() ** 2
        assert noise.argmax() == K - 2
        assert sentence.format((noise.max() / noise.sum()).item()).replace("%", " %") in page


def read_bench(size):
    return json.loads((RESULTS / f"{BENCHES[size]}.json").read_text(encoding="utf-8"))


def read_claims():
    return claims.load(claims.RECORDED)


def test_what_the_experiments_found_is_so_in_every_seed():
    stored = read_claims()
    start, found = stored["pre-trained"]["all"]["trained"], claims.finished(stored)
    lost = {what: start[what] - claims.over_seeds(found, "DDPO jpeg", what) for what in ("size", "strict")}
    assert len(lost["size"]) >= 8 and min(lost["size"]) > 0.3 and min(lost["strict"]) > 0.15
    for size, most in {"shapes": 1.15, "medium": 1.05, "sd": 1.05}.items():
        ratios = {what: ratio for what, _, ratio, _ in read_bench(size)["rows"]}
        assert ratios["an epoch, DDPO_IS"] <= most and ratios["sampling and updates, single_pass.py"] <= 0.75


def test_the_pages_have_the_numbers_that_the_experiments_printed(capsys):
    readme, page = ((folder / "README.md").read_text(encoding="utf-8") for folder in (HERE.parent, HERE))
    beside = (HERE.parent / "docs" / "dpok.md").read_text(encoding="utf-8")
    stored = read_claims()
    tables = "\n".join(claims.all_tables(stored))
    assert f"<!-- begin of claims.py -->\n{tables}\n<!-- end of claims.py -->" in page
    assert len(claims.RECORDED.read_text(encoding="utf-8").splitlines()) <= 400
    table = claims.claim_table(stored["pre-trained"], claims.finished(stored))
    rows = [claims.row(*line.strip("| ").split(" | ")[-4:-1]) for line in table]
    assert all(line.split(" | ")[1] in beside for line in rows if "β" in line or "value function" in line)
    claims.repeat(stored, claims.load(HERE / "results" / "gpu.json"), 4)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and [line for line in printed if f"    {line}\n" not in page] == []
    claimed = readme.partition("## What holds")[2].partition("\n## ")[0]
    shown = [line for line in claimed.splitlines() if line.startswith("| ")][1:]
    assert shown and [line for line in shown if line not in rows] == []
    start, found = stored["pre-trained"], claims.finished(stored)
    shares = {name: [claims.over_seeds(found, f"{name} {kind}").mean() for kind in claims.UNSEEN]
              for name in ("KL-O", "RL")}
    scores = [start[kind]["trained"] for kind in claims.UNSEEN]
    shares["at most"] = [score["strict"] / score["alignment"] for score in scores]
    for who, values in shares.items():
        sentence = ", ".join(f"{kind} {value:.2f}" for kind, value in zip(claims.UNSEEN, values))
        assert sentence in beside and (who != "at most" or sentence in page)
    benches = [read_bench(size) for size in BENCHES]
    values = [{what: ratio for what, _, ratio, _ in b["rows"]} | b["peak_memory_gb"] for b in benches]
    costs = {what: to for what, _, _, to in benches[0]["rows"] if any(v.get(what, 1) != 1 for v in values)}
    costs |= {who: "GB" for who in benches[0]["peak_memory_gb"]}
    for what, to in costs.items():
        cells = " | ".join(f"{v[what]:.2f}" if what in v else "" for v in values)
        assert f"| {'peak memory, ' * (to == 'GB')}{what} | {to} | {cells} |" in readme + page
    shapes, medium, sd = (f"{v['sampling and updates, single_pass.py']:.2f}" for v in values)
    sentence = (f"take {shapes} of the CPU time of two passes on `shapes/`, {medium} with a random UNet of "
                f"22 million parameters and {sd}")
    assert sentence in " ".join((readme + page).split())


def test_what_the_readmes_show_and_link_to_is_there():
    links, lines = [], 0
    for folder in (HERE.parent, HERE, HERE.parent / "shapes"):
        page = (folder / "README.md").read_text(encoding="utf-8")
        found = re.findall(r'\[([^\]]*)\]\(([^)\s]+)\)|src="([^"]+)"', page)
        links += [(folder, text, target or source) for text, target, source in found if "://" not in target]
    for folder, text, target in links:
        file, _, place = target.partition("#")
        file = folder / (file or "README.md")
        assert file.exists(), target
        if re.fullmatch(r"L\d+", place):  # `name` is defined there
            line = file.read_text(encoding="utf-8").splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {text.strip('`')}\b", line), target
            lines += 1
        elif place:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert place in anchors, target
    assert len(links) > 30 and lines > 15
