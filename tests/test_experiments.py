"""One pass gives the gradient of two, RWR follows its definition, claims.py measures what it says,
and the pages have its numbers.

    python -m pytest -q tests/test_experiments.py  # with experiments/requirements.txt; two minutes

What the README says about learning is measured by claims.py, most of it with eight seeds. Here the
README is compared with the stored numbers.
"""
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import choose
import claims
import ddpo
import figures
import noise
import rewards
import rwr
import single_pass
from test_ddpo import disturb, flags, read_log, step_weights

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder with the text parts of shapes/ and a tiny random UNet and decoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=64,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(ROOT / "shapes", unet=unet, vae=vae)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def config(pipeline, tmp_path):
    """Settings of a run of DDPO_SF on the random pipeline that takes seconds."""
    return ddpo.Config(
        model=str(pipeline), prompts="shapes/prompts.txt", algo="sf", samples_per_epoch=8, steps=3,
        epochs=2, batch=4, min_count=2, lr=1e-3, sample_every=9, device="cpu",
        out=str(tmp_path / "run"))


@pytest.fixture
def regression(pipeline, tmp_path):
    """Settings of two rounds of RWR on the random pipeline; `batch` divides neither number."""
    return rwr.Config(
        model=str(pipeline), prompts="two red squares", samples_per_epoch=16, steps=3, epochs=2,
        batch=3, updates_per_epoch=3, update_batch=8, inverse_temperature=400.0, percentile=0.6,
        lr=1e-3, sample_every=9, device="cpu", out=str(tmp_path / "run"))


def read_lora(folder):
    return load_file(Path(folder, "lora", "pytorch_lora_weights.safetensors"))


def assert_same_lora(folder, other):
    a, b = read_lora(folder), read_lora(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@dataclasses.dataclass
class Update:
    """What `the_update` sees of a run."""
    pipe: object = None
    rollout: object = None
    lora: list = None
    gradients: list = None  # of each parameter of LoRA, at the last update


@pytest.fixture
def the_update(monkeypatch):
    """Run with LoRA as training might leave it, and keep the gradient instead of making the
    update."""
    seen = Update()
    add_lora = ddpo.add_lora

    def add_disturbed_lora(*args):
        lora = add_lora(*args)
        disturb(lora)
        return lora

    def keep_the_gradient(lora, *others):
        seen.lora = lora
        seen.gradients = [parameter.grad.clone() for parameter in lora]
        return 0.0

    def keep_the_rollout(pipe, rollout, *others):
        seen.pipe = pipe
        seen.rollout = rollout
        return 0.0

    monkeypatch.setattr(ddpo, "add_lora", add_disturbed_lora)
    monkeypatch.setattr(ddpo, "optimizer_step", keep_the_gradient)
    monkeypatch.setattr(ddpo, "kl_to_pretrained", keep_the_rollout)
    return seen


def assert_gradients_agree(update):
    """Compare the gradients that a run had with those that a test has computed since."""
    for gradient, parameter in zip(update.gradients, update.lora, strict=True):
        assert parameter.grad.norm() > 0
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


# ---------- one pass

@pytest.mark.parametrize("guidance, checkpointing, noise_aware", [
    (5.0, False, False), (1.0, False, False), (5.0, True, False), (5.0, False, True)])
def test_one_pass_has_the_gradient_of_two(
        guidance, checkpointing, noise_aware, config, the_update):
    """Seven samples in batches of four: the gradient collected while sampling is that of the loss
    at all pairs (i, k)."""
    config = dataclasses.replace(
        config, samples_per_epoch=7, steps=5, epochs=1, advantage_clip=1.0, guidance=guidance,
        gradient_checkpointing=checkpointing, noise_aware=noise_aware, min_count=32)
    single_pass.train(config)
    pipe, one = the_update.pipe, the_update.rollout

    # Reference: sample, and then go through all steps again
    generators = [ddpo.generator(config.seed, 1, i) for i in range(7)]
    two = ddpo.sample(pipe, one.prompts, config, generators)
    reward = rewards.jpeg(two.images, two.prompts)
    advantage = ddpo.PromptStatistics(32, 32).update(two.prompts, reward)
    assert advantage.min() < -1 or advantage.max() > 1  # so that the clip matters
    advantage = advantage.clamp(-1, 1)
    weights = step_weights(pipe, config)
    pipe.unet.zero_grad()
    for k, t in enumerate(two.timesteps):
        x_t, x_prev = two.latents[:, k], two.latents[:, k + 1]
        mean, sigma = ddpo.policy(pipe, x_t, t.expand(7), two.cond, two.uncond, config)
        log_prob = ddpo.log_prob(x_prev, mean, sigma)
        loss, _ = ddpo.score_function_loss(log_prob, advantage * weights[k])
        (loss / config.steps).backward()

    assert_gradients_agree(the_update)
    for name in ("cond", "uncond", "timesteps", "latents", "log_probs"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    for a, b in zip(one.images, two.images, strict=True):
        assert a.tobytes() == b.tobytes()


def test_after_one_pass_the_unet_has_the_shared_lora_again(config, the_update):
    single_pass.train(dataclasses.replace(config, epochs=1))
    unet = the_update.pipe.unet
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter, shared in zip(trained, the_update.lora, strict=True):
        assert parameter is shared


class Saved:
    """A tensor that waits for a backward pass. Counts those that wait, and their maximum."""
    count = 0
    peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Saved.count += 1
        Saved.peak = max(Saved.peak, Saved.count)

    def __del__(self):
        Saved.count -= 1

    def unpack(self):
        return self.tensor


def test_the_memory_of_one_pass_does_not_grow_with_the_steps(config):
    """With eight steps no more tensors wait for a backward pass at once than with two."""
    pipe = ddpo.load_pipeline(config)
    ddpo.add_lora(pipe.unet, config.rank)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    generators = [ddpo.generator(config.seed, 1, i) for i in range(4)]
    peaks = {}
    for steps in (2, 8):
        Saved.peak = 0
        short = dataclasses.replace(config, steps=steps)
        with torch.autograd.graph.saved_tensors_hooks(Saved, Saved.unpack):
            single_pass.sample_and_trace(pipe, claims.ALL[:4], short, generators, scaler)
        peaks[steps] = Saved.peak
    assert Saved.count == 0
    assert peaks[2] == peaks[8] > 0


def test_a_run_in_one_pass_is_that_in_two(config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert single_pass.main(flags(config, out=one)) == 0
    assert ddpo.main(flags(config, out=two)) == 0

    for name, weights in read_lora(two).items():
        torch.testing.assert_close(read_lora(one)[name], weights, rtol=0, atol=1e-5)
    for a, b in zip(read_log(one), read_log(two), strict=True):
        assert a.keys() == b.keys()
        assert float(b["grad_norm"]) > 0
        for name in ("reward_mean", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)


def test_one_pass_in_fp16_scales_its_gradient_as_two_do(config, tmp_path):
    """Its scale is not that of a sum over all pairs, which would overflow. A skipped update is a
    lost epoch."""
    norms = {}
    for script in (ddpo, single_pass):
        folder = tmp_path / script.__name__
        changes = {"epochs": 1, "samples_per_epoch": 32, "precision": "fp16", "out": folder}
        assert script.main(flags(config, **changes)) == 0
        row, = read_log(folder)
        assert row["skipped"] == "0"
        norms[script] = float(row["grad_norm"])
    assert norms[ddpo] > 0
    assert norms[single_pass] == pytest.approx(norms[ddpo], rel=0.02)


def test_a_resumed_run_in_one_pass_ends_as_if_it_had_not_stopped(config, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert single_pass.main(flags(config, out=whole)) == 0
    assert single_pass.main(flags(config, out=stopped, epochs=1)) == 0
    assert single_pass.main(["--resume", str(stopped), "--epochs", "2"]) == 0
    assert len(read_log(stopped)) == 2
    assert_same_lora(stopped, whole)


@pytest.mark.parametrize("name, value", [("kl_weight", "0.1"), ("algo", "is")])
def test_one_pass_refuses_a_penalty_and_the_other_estimator_in_one_line(
        name, value, config, capsys):
    assert single_pass.main([*flags(config), f"--{name}", value]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert name in last_line and value in last_line
    assert not Path(config.out).exists()


def test_one_pass_refuses_settings_of_ddpo_that_need_two(config):
    with pytest.raises(ValueError, match="algo .* must be sf"):
        single_pass.train(dataclasses.replace(config, algo="is"))
    assert not Path(config.out).exists()


# ---------- gradient noise

def test_c_is_the_derivative_of_the_mean_and_its_shares_are_those_of_the_closed_form():
    """(c / sigma)^2 over its sum is largest at the last step but one. eps is predicted at x_t, and
    the mean is linear in it."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(ROOT / "shapes" / "scheduler")
    for steps, timestep, share in ((10, 101, 0.864), (50, 21, 0.487)):
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps
        sigma, c = noise.step_coefficients(scheduler, 1.0)
        x_t, eps = torch.randn(2, steps, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        mean, sigma_there = ddpo.step_distribution(scheduler, eps, t, x_t, 1.0)
        mean_moved, _ = ddpo.step_distribution(scheduler, eps + 0.5, t, x_t, 1.0)
        torch.testing.assert_close((mean_moved - mean) / 0.5, c.view(-1, 1, 1, 1).expand_as(eps),
                                   rtol=0, atol=1e-4)
        assert torch.equal(sigma_there.flatten(), sigma)
        shares = (c / sigma) ** 2 / ((c / sigma) ** 2).sum()
        assert t[shares.argmax()] == timestep
        assert shares.max().item() == pytest.approx(share, abs=1e-3)
        for weights in noise.rules(sigma, c).values():
            assert weights.mean().item() == pytest.approx(1) and weights.min() >= 0
        assert noise.rules(sigma, c)["without the noisiest step"][t == timestep] == 0


def test_the_terms_of_all_steps_sum_to_the_gradient_of_a_run(config, the_update):
    """Of ddpo.py --algo sf: minus the mean over the steps, since a run minimises."""
    ddpo.train(dataclasses.replace(config, epochs=1))
    rollout = the_update.rollout
    reward = rewards.jpeg(rollout.images, rollout.prompts)
    statistics = ddpo.PromptStatistics(config.buffer_size, config.min_count)
    advantage = statistics.update(rollout.prompts, reward)
    terms = noise.step_gradients(the_update.pipe, the_update.lora, rollout, advantage, config)
    for parameter, total in zip(the_update.lora, (-terms.mean(0)).split(
            [parameter.numel() for parameter in the_update.lora])):
        parameter.grad = total.view_as(parameter)
    assert_gradients_agree(the_update)


def test_signal_and_noise_are_those_of_gradients_whose_truth_is_known():
    """Gradients of 100 numbers, 0.3 each, with a deviation of 2: signal 9, noise 400. Over 200 sets
    of 20 batches the estimates are right on average. The jackknife does not understate their
    spread, and overstates it by less than a half."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        gradients = 0.3 + 2 * rng.standard_normal((20, 100))
        found.append(noise.with_jackknife(gradients @ gradients.T))
    values, errors = np.moveaxis(found, 2, 0)  # (200, 3) each: signal, noise, SNR
    assert values.mean(0) == pytest.approx([9, 400, 9 / 400], rel=0.1)
    ratio = errors.mean(0) / values.std(0)
    assert (0.9 < ratio).all() and (ratio < 1.5).all()


def test_a_step_drawn_again_leaves_the_steps_before_it_as_they_were(config):
    """With the noise as it was, the images are as they were. A reward that looks at nothing has no
    deviation, and the deviation of one that looks at pixels is that of independent draws."""
    pipe = ddpo.load_pipeline(config)
    ddpo.add_lora(pipe.unet, config.rank)
    prompts = claims.ALL[:4]
    cond, uncond = ddpo.encode_prompts(pipe, prompts), ddpo.encode_prompts(pipe, [""])
    pipe.scheduler.set_timesteps(config.steps)
    drawn = torch.randn(4, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states, images = noise.finish(pipe, drawn[:, 0], 0, drawn, cond, uncond, config)
    later, same_images = noise.finish(pipe, states[:, 2], 2, drawn, cond, uncond, config)
    assert torch.equal(later, states[:, 2:])
    assert [image.tobytes() for image in images] == [image.tobytes() for image in same_images]

    def constant(images, prompts):
        return torch.ones(len(images))

    assert noise.deviations(pipe, prompts, constant, config) == [[0.0, 0.0]] * 3
    draws = iter(torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)))
    found = noise.deviations(pipe, prompts, lambda images, prompts: next(draws), config)
    for deviation, error in found:
        assert deviation == pytest.approx(1, abs=3 * error) and 0.005 < error < 0.02


@pytest.mark.parametrize("steps, eta", [(10, 1.0), (50, 1.0), (10, 0.3)])
def test_noise_weights_are_proportional_to_the_width_of_the_steps(steps, eta):
    """Their mean is 1. With them, the variance of step k's term is proportional to c_k^2, where c_k
    is the derivative of the mean by eps, taken by finite differences: the network's own share."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(ROOT / "shapes" / "scheduler")
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps
    weights = ddpo.noise_weights(scheduler, eta)
    assert weights.shape == (steps,) and weights.min() > 0
    assert weights.mean().item() == pytest.approx(1)
    x_t, eps = torch.randn(2, steps, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, sigma = ddpo.step_distribution(scheduler, eps, t, x_t, eta)
    moved, _ = ddpo.step_distribution(scheduler, eps + 0.5, t, x_t, eta)
    c = ((moved - mean) / 0.5).flatten(1).mean(1)
    weighted = (weights * c / sigma.flatten()) ** 2
    torch.testing.assert_close(weighted / weighted.sum(), c**2 / (c**2).sum(), rtol=1e-3, atol=1e-6)


def drift_chain(signs, shared, weighted):
    """Estimate the gradient of E[r] on a chain whose steps are unequally noisy.

    x_{k+1} ~ N(x_k + signs_k theta_k, s_k^2) from x_0 = 0 at theta = 0, and r = x_3, so that the
    true gradient by theta_k is signs_k. With `shared`, theta is one number for all steps. The
    weights are those of noise_weights, s_k over their mean -> (200 blocks of 1,000 samples,
    parameters)."""
    s = torch.tensor([1.0, 0.5, 0.02])
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 3, generator=rng) * s
    reward = noise.sum(1)
    theta = torch.zeros(200, 1 if shared else 3, requires_grad=True)
    means = torch.tensor(signs) * theta.expand(-1, 3).repeat_interleave(1000, 0)
    log_prob = torch.stack([ddpo.log_prob(noise[:, k:k + 1], means[:, k:k + 1], s[k])
                            for k in range(3)], 1)
    weights = s / s.mean() if weighted else torch.ones(3)
    loss, _ = ddpo.score_function_loss(log_prob, reward[:, None] * weights)
    return -600 * torch.autograd.grad(loss, theta)[0]  # the loss is a mean over 200 x 3 terms


def snr(gradients):
    return (gradients.mean(0).square().sum() / gradients.var(0).sum()).item()


def test_with_parameters_of_its_own_each_step_still_ascends_and_the_noise_is_less():
    """Weights change the learning rate of each step's parameter, and no sign."""
    truth = torch.tensor([1.0, 1.0, -1.0])
    plain = drift_chain(truth.tolist(), shared=False, weighted=False)
    weighted = drift_chain(truth.tolist(), shared=False, weighted=True)
    error = plain.std(0) / 200**0.5
    assert ((plain.mean(0) - truth).abs() < 4 * error).all()
    ascent = (weighted.mean(0) * truth).sum()
    assert ascent > 4 * (weighted * truth).sum(1).std() / 200**0.5
    assert snr(weighted) > 20 * snr(plain)


def test_with_parameters_shared_by_the_steps_the_weighted_sum_may_descend():
    """Two steps with little weight pull the other way, and the true gradient is theirs: -1. The
    weighted sum has less noise and the wrong sign."""
    plain = drift_chain([1.0, 0.0, -2.0], shared=True, weighted=False)
    weighted = drift_chain([1.0, 0.0, -2.0], shared=True, weighted=True)
    assert abs(plain.mean() + 1) < 4 * plain.std() / 200**0.5
    assert weighted.mean() > 4 * weighted.std() / 200**0.5
    assert snr(weighted) > snr(plain)


def test_the_page_has_the_tables_of_the_noise():
    measured = claims.load(noise.FILE)["measured"]
    page = claims.PAGE.read_text(encoding="utf-8")
    assert len(measured) == 8
    for table in "\n".join(figures.noise_tables(measured)).split("\n\n"):
        assert table in page


def test_strict_accuracy_at_equal_reward_is_interpolated_where_the_level_is_first_reached():
    """Means of four epochs: reward 1, 1, 2, 3, strict accuracy 0.8, 0.8, 0.6, 0.4. The level 2.5
    lies half-way between the last two, and 0.5 between the pre-trained model and the first."""
    run = {"reward": [1, 1, 1, 1, 1, 5, 5], "strict": [0.8, 0.8, 0.8, 0.8, 0.8, 0.0, 0.0]}
    begin = {"reward": 0.0, "strict": 1.0}
    assert choose.strict_at(run, 2.5, begin) == pytest.approx(0.5)
    assert choose.strict_at(run, 0.5, begin) == pytest.approx(0.9)
    assert choose.strict_at(run, 3.1, begin) is None
    assert choose.ends_with(run, "reward") == 3


def test_a_run_that_chooses_has_the_weights_of_its_rule_and_keeps_its_epochs(
        config, tmp_path, monkeypatch):
    """The weights are seen in the advantages: at the step that a rule leaves out they are 0. The
    strict accuracy is of the 8 images of an epoch, and not of the 16 of a picture."""
    seen = []
    loss = ddpo.importance_sampling_loss

    def keep(log_prob, log_prob_old, advantage, clip_range):
        seen.append(advantage)
        return loss(log_prob, log_prob_old, advantage, clip_range)

    def strict(images, prompts):
        return torch.tensor([0.25, 0.75] * (len(images) // 2))

    c = dataclasses.replace(config, algo="is", updates_per_epoch=2, prompts="two red squares")
    monkeypatch.setattr(choose, "EPOCHS", 2)
    monkeypatch.setattr(ddpo, "importance_sampling_loss", keep)
    monkeypatch.setattr(choose, "FOLDER", tmp_path)
    monkeypatch.setattr(choose.shapes_reward, "strict", strict)
    monkeypatch.setattr(claims, "settings", lambda name, **more: dataclasses.replace(c, **more))
    run = choose.train("without the noisiest step", 1e-3, "location", 300)
    advantages = torch.cat(seen).view(-1, c.steps)
    assert (advantages[:, -2] == 0).all() and (advantages[:, [0, -1]] != 0).any()
    assert run["strict"] == [0.5, 0.5]
    assert len(run["reward"]) == len(run["kl"]) == 2


def test_the_finalists_are_the_published_weights_and_the_two_best_rules_without_collapse():
    """The gains in reward grow with the learning rate: 0.1, 0.25 and 0.4 of the number of the rule.
    Only rule 4 collapses, at its highest rate, so that its best rate is the second."""
    before = {"all": {"trained": {"size": 2.0, "alignment": 0.7, "strict": 0.5}},
              "location": {"trained": {"size": 1.7, "alignment": 0.6, "strict": 0.5}}}
    runs = {}
    for rule, lr, task, seed in choose.first_runs():
        number = choose.RULES.index(rule)
        gain = number * {1.5e-3: 0.1, 3e-3: 0.25, 6e-3: 0.4}[lr]
        strict = 0.2 if number == 4 and lr == 6e-3 else 0.5
        reward = {"incompressibility": 2.0, "location": 0.6}[task] + gain
        runs[choose.key(rule, lr, task, seed)] = {"reward": [reward] * 16, "strict": [strict] * 16}
    shares = choose.shares({"runs": runs}, before)
    assert shares[choose.RULES[2], 3e-3] == pytest.approx(0.5 / 1.6)
    assert choose.finalists({"runs": runs}, before) == {
        choose.RULES[0]: 1.5e-3, choose.RULES[3]: 6e-3, choose.RULES[4]: 3e-3}
    assert choose.start(before, "jpeg") == {"reward": -2.0, "strict": 0.5}


def test_a_lead_in_reward_is_taken_seed_by_seed():
    """Rewards differ by 8 from seed to seed, and leads by 1: 1 and 2, with an error of 0.19."""
    published = [{"reward": [8.0 * seed] * 16} for seed in range(8)]
    better = [{"reward": [8.0 * seed + 1 + seed % 2] * 16} for seed in range(8)]
    assert choose.lead(better, published) == "1.50 ± 0.19"


def test_the_page_has_the_tables_of_the_choice():
    """With all runs. `--noise_aware` is the rule that the page names."""
    page = claims.PAGE.read_text(encoding="utf-8")
    stored = claims.load(choose.FILE)
    before = claims.load(claims.RECORDED)["pre-trained"]
    runs = [*choose.first_runs(), *choose.final_runs(choose.finalists(stored, before))]
    assert {choose.key(*run) for run in runs} == stored["runs"].keys()
    assert "\n".join(choose.first_table(stored, before)) in page
    assert "\n".join(choose.final_table(stored, before)) in page
    scheduler = diffusers.DDIMScheduler.from_pretrained(ROOT / "shapes" / "scheduler")
    scheduler.set_timesteps(10)
    rules = noise.rules(*noise.step_coefficients(scheduler, 1.0))
    torch.testing.assert_close(ddpo.noise_weights(scheduler, 1.0), rules["sigma"])


# ---------- reward-weighted regression

def test_the_weights_are_a_softmax_over_the_images_of_each_prompt(regression):
    """exp(0.2 r) is 1.2214, 1.8221 and 0.8187 for prompt 0, with sum 3.8623, and e^4 and e^2 for
    prompt 1, with sum 61.9872. Their means are to be 1."""
    config = dataclasses.replace(regression, inverse_temperature=0.2)
    prompt_index = torch.tensor([0, 1, 0, 1, 0])
    reward = torch.tensor([1.0, 20.0, 3.0, 10.0, -1.0])
    expected = torch.tensor([3 * 1.2214 / 3.8623, 2 * 54.5982 / 61.9872, 3 * 1.8221 / 3.8623,
                             2 * 7.3891 / 61.9872, 3 * 0.8187 / 3.8623])
    weight = rwr.weights(prompt_index, reward, config)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)

    far_apart = reward + 1000.0 * prompt_index  # the other prompt's rewards do not matter
    weight = rwr.weights(prompt_index, far_apart, config)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)


def test_the_sparse_weights_keep_the_best_tenth_of_each_prompt(regression):
    config = dataclasses.replace(regression, algo="sparse", percentile=0.9)
    prompt_index = torch.arange(40) % 2
    reward = torch.randperm(40).float()
    reward[prompt_index == 1] += 100  # all of its images are better than those of prompt 0

    weight = rwr.weights(prompt_index, reward, config)

    assert set(weight.tolist()) == {0.0, 1.0}
    for number in (0, 1):
        kept = reward[(prompt_index == number) & (weight > 0)]
        best = reward[prompt_index == number].topk(2).values
        assert sorted(kept.tolist()) == sorted(best.tolist())


@pytest.mark.parametrize("algo", ["rwr", "sparse"])
def test_an_update_of_rwr_is_that_of_its_definition(algo, regression, the_update):
    """The gradient is that of the mean over 8 of the round's images of
    w || eps - eps_theta(x_t, t, c) ||^2, with x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps and the
    guided eps_theta. The weights of the UNet are not those of p_pre."""
    config = dataclasses.replace(regression, algo=algo, epochs=1, updates_per_epoch=1)
    rwr.train(config)
    pipe, rollout = the_update.pipe, the_update.rollout

    # Reference: the same random numbers, in their order
    rng = ddpo.generator(config.seed, 1, 16)
    prompt_index = torch.randint(1, (16,), generator=rng)
    reward = rewards.jpeg(rollout.images, rollout.prompts)
    weight = rwr.weights(prompt_index, reward, config)
    candidates = weight.nonzero()[:, 0]
    i = candidates[torch.randperm(len(candidates), generator=rng)]
    if algo == "sparse":  # seven images are candidates, so the eighth is one of a second round
        assert len(candidates) == 7
        i = torch.cat([i, candidates[torch.randperm(len(candidates), generator=rng)]])
    else:
        assert len(candidates) == 16
        assert weight.std() > 0.1
    i = i[:8]
    t = torch.randint(1000, (8,), generator=rng)
    eps = torch.randn(8, 4, 8, 8, generator=rng)
    abar = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * rollout.latents[i, -1] + (1 - abar).sqrt() * eps
    pipe.unet.zero_grad()
    eps_cond = pipe.unet(x_t, t, rollout.cond[i]).sample
    eps_uncond = pipe.unet(x_t, t, rollout.uncond.expand(8, -1, -1)).sample
    guided = config.guidance * eps_cond + (1 - config.guidance) * eps_uncond
    errors = (guided - eps).square().mean((1, 2, 3))
    (weight[i] * errors).mean().backward()

    assert_gradients_agree(the_update)


def test_a_resumed_run_of_rwr_ends_as_if_it_had_not_stopped(regression, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert rwr.main(flags(regression, out=whole)) == 0
    assert rwr.main(flags(regression, out=stopped, epochs=1)) == 0
    assert rwr.main(["--resume", str(stopped), "--epochs", "2"]) == 0
    assert len(read_log(stopped)) == 2
    assert float(read_log(whole)[0]["grad_norm"]) > 0
    assert_same_lora(stopped, whole)


@pytest.mark.parametrize(
    "name, value", [("kl_weight", 0.1), ("noise_aware", True), ("percentile", 1.5)])
def test_rwr_refuses_what_it_cannot_do_in_one_line(name, value, regression, capsys):
    assert rwr.main(flags(regression, **{name: value})) == 2
    line, = capsys.readouterr().err.splitlines()
    assert f"rwr.py: error: {name} ({value})" in line
    assert not Path(regression.out).exists()


@pytest.mark.parametrize("name", ["samples_per_epoch", "update_batch"])
def test_the_number_of_processes_divides_the_images_of_a_round_and_of_an_update(
        name, regression, monkeypatch):
    monkeypatch.setattr(rwr, "WORLD_SIZE", 4)
    regression.check()  # 16 images, 8 per update
    config = dataclasses.replace(regression, **{name: 10})
    with pytest.raises(ValueError, match=rf"{name} \(10\) must be divisible by .* processes \(4\)"):
        config.check()


# ---------- the claims: what is run

ALGORITHMS = {"DDPO": "is", "SF": "sf", "RWR": "rwr", "RWR_sparse": "sparse", "RL": "rl",
              "no": "rl", "jpeg": "rl", "KL-O": "sft", "KL-D": "sft"}  # first word of a run: algo


@pytest.mark.parametrize("name", claims.RUNS)
def test_a_run_of_the_claims_is_the_command_in_its_table(name):
    """As a user types it: the settings of all scripts, those of its script, its own, and a seed."""
    script = claims.RUNS[name].script
    command = f"{claims.COMMON} {claims.SHARED[script]} {claims.arguments(name)} --seed 1"
    typed = script.parse(shlex.split(command))
    typed.sample_every = claims.settings(name).sample_every  # changes no result
    assert typed == claims.settings(name, seed=1)
    assert typed.algo == ALGORITHMS[name.split()[0]]
    typed.check()


@pytest.mark.parametrize("name", claims.RUNS)
def test_a_run_of_the_claims_trains_on_the_prompts_of_its_kind(name):
    kind = claims.RUNS[name].kind
    prompts = ddpo.load_prompts(claims.settings(name).prompts)
    assert prompts == ([claims.KINDS[kind]] if kind in claims.KINDS else claims.ALL)


@pytest.mark.parametrize("method", ["RWR", "RWR_sparse", "SF"])
@pytest.mark.parametrize("reward", ["jpeg", "incompressibility", "count"])
def test_the_methods_of_fig_4_have_as_many_reward_queries(method, reward):
    baseline, ours = claims.settings(f"{method} {reward}"), claims.settings(f"DDPO {reward}")
    queries = baseline.epochs * baseline.samples_per_epoch
    assert queries == ours.epochs * ours.samples_per_epoch


@pytest.mark.parametrize("name", [name for name in claims.RUNS if " noise_aware" in name])
def test_a_noise_aware_run_differs_from_its_partner_by_the_flag_alone(name):
    partner = claims.settings(name.replace(" noise_aware", ""))
    assert not partner.noise_aware
    assert claims.settings(name) == dataclasses.replace(partner, noise_aware=True)
    assert claims.RUNS[name].seeds == claims.RUNS[name.replace(" noise_aware", "")].seeds


@pytest.mark.parametrize("name", ["DDPO jpeg", "SF jpeg", "RWR count", "RL count", "KL-O count"])
def test_a_run_of_the_claims_does_not_depend_on_the_settings_of_shapes(
        name, tmp_path, monkeypatch):
    """Whatever shapes/*.json say: here 1 for every number that they have."""
    script = claims.RUNS[name].script
    before, fingerprint = claims.settings(name), claims.fingerprint(name)
    shapes_settings = json.loads((ROOT / script.Config.shapes_settings).read_text(encoding="utf-8"))
    changed = {}
    for setting, value in shapes_settings.items():
        changed[setting] = value if isinstance(value, str) else type(value)(1)
    (tmp_path / "changed.json").write_text(json.dumps(changed), encoding="utf-8")
    monkeypatch.setattr(script.Config, "shapes_settings", str(tmp_path / "changed.json"))

    assert script.parse(["--device", "cpu"]).steps == 1  # the change is felt elsewhere
    assert claims.settings(name) == before
    assert claims.fingerprint(name) == fingerprint
    command = f"{claims.COMMON} {claims.SHARED[script]} {claims.arguments(name)}"
    typed = script.parse(shlex.split(command))
    assert dataclasses.replace(typed, sample_every=before.sample_every) == before


# ---------- the claims: which stored runs count

@dataclasses.dataclass
class LaterConfig(ddpo.Config):
    """The settings of ddpo.py once it has a further one, which is off by default."""
    later: bool = False


def test_a_fingerprint_leaves_out_a_setting_at_its_default(monkeypatch):
    """So a new setting that is off, or the loss of one that no run has on, orphans no run."""
    before = claims.fingerprint("DDPO jpeg")
    monkeypatch.setattr(ddpo, "Config", LaterConfig)
    assert claims.settings("DDPO jpeg").later is False
    assert claims.fingerprint("DDPO jpeg") == before

    run = claims.RUNS["DDPO jpeg"]
    switched_on = run._replace(flags=f"{run.flags} --later")
    monkeypatch.setitem(claims.RUNS, "DDPO jpeg", switched_on)
    assert claims.fingerprint("DDPO jpeg") != before


@pytest.mark.parametrize("flag", ["--lr 1e-3", "--epochs 31", "--algo sf --updates_per_epoch 1",
                                  "--reward incompressibility", "--rank 8"])
def test_a_fingerprint_changes_with_what_changes_results(flag, monkeypatch):
    before = claims.fingerprint("DDPO jpeg")
    run = claims.RUNS["DDPO jpeg"]
    monkeypatch.setitem(claims.RUNS, "DDPO jpeg", run._replace(flags=f"{run.flags} {flag}"))
    assert claims.fingerprint("DDPO jpeg") != before


@pytest.mark.parametrize("flag", ["--seed 7", "--out elsewhere", "--batch 16", "--compile",
                                  "--sample_every 3", "--kl_weight 0", "--eta 1"])
def test_a_fingerprint_does_not_change_with_what_does_not(flag, monkeypatch):
    before = claims.fingerprint("DDPO jpeg")
    run = claims.RUNS["DDPO jpeg"]
    monkeypatch.setitem(claims.RUNS, "DDPO jpeg", run._replace(flags=f"{run.flags} {flag}"))
    assert claims.fingerprint("DDPO jpeg") == before


def test_no_two_runs_have_the_same_fingerprint():
    fingerprints = {claims.fingerprint(name) for name in claims.RUNS}
    assert len(fingerprints) == len(claims.RUNS)


def test_every_stored_run_counts():
    """No change of settings has orphaned a run, and all are finished."""
    stored = claims.load(claims.RECORDED)
    counts = {name: len(runs) for name, runs in claims.finished(stored, least=1).items()}
    assert sum(counts.values()) == len(stored["runs"])
    assert counts == {name: run.seeds for name, run in claims.RUNS.items()}


# ---------- the claims: what is measured and kept

def lora_of(pipe):
    """The LoRA that diffusers has loaded -> {its name in the file: weights}."""
    weights = {}
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            weights["unet." + re.sub(r"\.default_\d+", "", name)] = parameter.detach().clone()
    return weights


def test_queries_are_saved_up_to_the_lower_of_two_ends():
    """Each run has 8 epochs. Means of four epochs are 1, 1, 2, 3, 4 for `late`, 4 for `soon` and
    2 for `low`. With seed 0 the first run is sooner by four epochs, and with seed 1 later by four.
    With seed 2 both are the same. With seed 3 the first ends at 2, two epochs before the other."""
    late = [1, 1, 1, 1, 1, 5, 5, 5]
    soon = [4] * 8
    low = [2] * 8
    found = {"DDPO count": [late, soon, soon, late], "SF count": [soon, late, soon, low]}
    found = {name: [{"seed": seed, "reward_mean": rewards_of_epochs}
                    for seed, rewards_of_epochs in enumerate(runs)] for name, runs in found.items()}
    part = claims.Effects({}, found).saved("SF count", "DDPO count")
    assert part.effect.tolist() == [4 / 8, -4 / 8, 0, 2 / 8]
    opposite = claims.Effects({}, found).saved("DDPO count", "SF count")
    assert opposite.effect.tolist() == [-4 / 8, 4 / 8, 0, -2 / 8]


def test_strict_accuracy_is_interpolated_where_the_size_is_first_crossed():
    sizes, strict = np.array([1.9, 1.7, 1.5, 1.6]), np.array([0.5, 0.4, 0.2, 0.0])
    assert claims.first_crossing(sizes, strict, 1.6) == pytest.approx(0.3)
    assert claims.first_crossing(-sizes, strict, -1.8) == pytest.approx(0.45)
    assert claims.first_crossing(sizes, strict, 1.0) == 0.0


@pytest.mark.parametrize("epoch", [12, 22, None])
def test_strict_accuracy_at_equal_size_is_that_at_the_size_of_the_other_run(stored, epoch):
    """Both runs lose accuracy in proportion to size. The first is twice as fast, and the second has
    0.1 less from its first measurement on. So they are 0.1 apart at every size."""
    start = stored["pre-trained"]["all"]["trained"]

    def runs(speed, offset):
        scores = {}
        for e in (4, 8, 12, 16, 22, 28, 30, 32):
            smaller = speed * e
            scores[str(e)] = {"size": start["size"] - smaller,
                              "strict": start["strict"] - smaller / 2 - offset}
        return [{"seed": seed, "ends": [28, 30, 32], "trained": scores} for seed in range(8)]

    found = {"DDPO noise_aware jpeg": runs(0.02, 0), "DDPO jpeg": runs(0.01, 0.1)}
    effects = claims.Effects(stored["pre-trained"], found)
    part = effects.ahead_at_equal_size("DDPO noise_aware jpeg", "DDPO jpeg", epoch)
    assert part.effect == pytest.approx(np.full(8, 0.1))


def made_up_run(name, better):
    """What is kept of seeds of a run in which the flag is better in every way by `better`."""
    task = name.split()
    size = {"jpeg": -better, "incompressibility": better}
    change = sum(size.get(word, 0) for word in task)
    scores = {"alignment": 0.6 + better, "strict": 0.5 + better, "size": 2 + change,
              "diversity": 0.2}
    ends = [14, 15, 16]
    epochs = {str(epoch): scores for epoch in (*ends, *claims.STAGES.get(name, ()))}
    reward = [0.0] * 12 + [1 + better] * 4
    return [{"seed": seed, "ends": ends, "trained": epochs, "unseen": epochs, "other": epochs,
             "kl": reward, "reward_mean": reward} for seed in range(claims.RUNS[name].seeds)]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_claims_about_noise_aware_have_the_right_signs(stored, sign):
    """In made-up runs in which all with the flag are better, or worse, than all without it."""
    found = {}
    for name in claims.RUNS:
        found[name] = made_up_run(name, 0.1 * sign if "noise_aware" in name else 0.0)
    checked = 0
    for claim in claims.noise_aware_claims(claims.Effects(stored["pre-trained"], found)):
        if " than " in claim.text and "fewer queries" not in claim.text:
            for part in claim.parts.values():
                assert part.effect == pytest.approx(np.full(len(part.effect), 0.1 * sign))
                checked += 1
    assert checked == 8 + 5 + 1 + 3 + 2 * 3 + 1
    table = claims.noise_aware_table(stored["pre-trained"], found)
    assert len(table) == 2 + 13


@pytest.mark.parametrize("missing", [name for name in claims.RUNS if "noise_aware" in name])
def test_the_claims_and_tables_do_without_a_run_that_is_missing(stored, missing):
    found = {name: made_up_run(name, 0.1) for name in claims.RUNS if name != missing}
    for claim in claims.claims(stored["pre-trained"], found):
        for part in claim.parts.values():
            assert part is None or missing not in part.runs
    assert claims.claim_table(stored["pre-trained"], found)
    assert len(claims.noise_aware_table(stored["pre-trained"], found)) == 2 + 12


@pytest.mark.parametrize("end", [
    lambda process: os.killpg(process.pid, signal.SIGINT),  # as Ctrl-C does
    lambda process: process.terminate(),
    lambda process: process.kill()], ids=["ctrl_c", "terminate", "kill"])
def test_an_interrupt_ends_the_runs_in_progress_and_those_that_have_not_begun(end, tmp_path):
    """The output ends when no process is left that could write."""
    script = tmp_path / "sleeps.py"
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(EXPERIMENTS)!r})
import claims
if __name__ == "__main__":
    with claims.processes(1) as pool:
        jobs = [pool.submit(time.sleep, 0.1), *[pool.submit(time.sleep, 60) for _ in range(3)]]
        for job in claims.as_completed(jobs):
            print("one is finished", flush=True)
""", encoding="utf-8")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    assert process.stdout.readline() == "one is finished\n"
    end(process)
    output, _ = process.communicate(timeout=30)
    assert output == ""
    assert process.returncode != 0


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A run of the claims with tiny settings -> what is kept of it, its folder, and for each epoch
    at which it was measured the LoRA and the number of images."""
    measured = {}

    def fake_score(pipe, prompts, count, seed, epoch, steps):
        assert steps == 2
        measured[epoch] = lora_of(pipe), count
        return {"strict": epoch / 100}

    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setattr(claims, "score", fake_score)
    kept = claims.run("SF count", 3, tmp_path, epochs=5, samples_per_epoch=2, batch=2, steps=2)
    return kept, tmp_path / "SF count-3", measured


def test_a_run_of_the_claims_is_measured_with_the_lora_that_was_kept_with_each_picture(small_run):
    """At the last epoch and two and four before, and each time another one."""
    _, folder, measured = small_run
    assert list(measured) == [1, 3, 5]
    for epoch, (lora, count) in measured.items():
        file = folder / "lora" / f"epoch_{epoch:04d}" / "pytorch_lora_weights.safetensors"
        saved = load_file(file)
        assert count == 128
        assert lora.keys() == saved.keys()
        for name in saved:
            assert torch.equal(lora[name], saved[name]), name
    for earlier, later in ((1, 3), (3, 5)):
        a, b = measured[earlier][0], measured[later][0]
        assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_the_claims_is_kept_on_a_line_and_not_repeated(small_run, tmp_path, monkeypatch):
    kept, _, _ = small_run
    assert kept["ends"] == [1, 3, 5]
    assert kept["trained"] == {1: {"strict": 0.01}, 3: {"strict": 0.03}, 5: {"strict": 0.05}}
    assert len(kept["kl"]) == len(kept["reward_mean"]) == 5
    assert kept["queries"] == 10
    assert kept["updates"] == 5

    file = tmp_path / "claims.json"
    runs = {f"SF count-{seed}": kept for seed in range(8)}
    claims.save(file, {"pre-trained": {}, "runs": runs})
    assert len(file.read_text(encoding="utf-8").splitlines()) == 8 + 5
    found = claims.finished(claims.load(file))
    assert list(found) == ["SF count"]
    assert claims.over_seeds(found, "SF count").tolist() == pytest.approx([0.03] * 8)

    monkeypatch.setattr(claims, "run", None)  # would fail if it were called
    jobs = [("SF count", seed, {}) for seed in range(8)]
    assert claims.run_all(jobs, 1, file) == 0


def test_the_scores_are_of_as_many_images_of_each_prompt_and_the_same_each_time(config):
    """A score has no memory: a second one with the same seed and epoch is equal, another epoch's
    images are others."""
    pipe = ddpo.load_pipeline(claims.settings("RL count"))
    prompts = claims.ALL[:2]
    first = claims.score(pipe, prompts, 9, seed=1, epoch=2)  # four images of each
    again = claims.score(pipe, prompts, 8, seed=1, epoch=2)
    other = claims.score(pipe, prompts, 8, seed=1, epoch=3)
    assert first == again
    assert first["size"] != other["size"]
    assert set(first) == {"alignment", "strict", "size", "diversity"}


@pytest.mark.parametrize("mean, least, error, says", [
    (0.9, 0, 0, "holds"),
    (0.9, 0, 0.1, "inconclusive"),  # by the error of what the seeds are compared with
    (1.0, 0.5, 0, "holds"),  # the mean is to reach `least`, the interval is to lie above 0
    (0.9, 1, 0, "inconclusive"),
    (0.05, 1, 0, "**fails**"),
    (-0.9, 0, 0, "**fails**"),
    (-0.8, 0, 0, "inconclusive"),
    (0.8, -0.1, 0, "holds"),  # a loss was to be avoided
    (0.7, -0.1, 0, "inconclusive"),
    (-1, -0.1, 0, "**fails**")])
def test_a_verdict_is_that_of_its_interval(mean, least, error, says):
    """Eight seeds, four of them 1 below the mean and four 1 above: the standard error is 0.378, and
    the 95 % interval ends 2.36 * 0.378 = 0.892 from the mean."""
    effect = mean + np.array([-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    assert claims.verdict(claims.Part([], effect, error), least) == says


# ---------- what was found

def words(file):
    """The text of a page with single spaces, so that it does not matter where lines end."""
    return " ".join(file.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("steps, sentence", [(10, "also gives {} % for the step at t = 101"),
                                             (50, "In closed form, the step at t = 21 has {} %")])
def test_the_page_has_the_largest_share_of_the_noise_in_closed_form(steps, sentence):
    scheduler = diffusers.DDIMScheduler.from_pretrained(ROOT / "shapes" / "scheduler")
    scheduler.set_timesteps(steps)
    sigma, c = noise.step_coefficients(scheduler, 1.0)
    variance = (c / sigma) ** 2
    share = (variance.max() / variance.sum()).item()
    assert variance.argmax() == steps - 2
    assert sentence.format(round(100 * share)) in words(EXPERIMENTS / "README.md")


@pytest.fixture(scope="module")
def stored():
    return claims.load(claims.RECORDED)


@pytest.fixture(scope="module")
def found(stored):
    return claims.finished(stored)


def test_ddpo_makes_smaller_files_and_loses_accuracy_with_every_seed(stored, found):
    start = stored["pre-trained"]["all"]["trained"]
    sizes = claims.over_seeds(found, "DDPO jpeg", "size")
    strict = claims.over_seeds(found, "DDPO jpeg", "strict")
    assert len(sizes) >= 8
    assert max(sizes) < start["size"] - 0.3
    assert max(strict) < start["strict"] - 0.15


def test_the_page_has_the_tables_of_the_stored_runs(stored):
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    for name, tables in {"results": claims.result_tables, "runs": claims.run_tables}.items():
        begin, end = claims.marks(name)
        assert "\n".join([begin, *tables(stored), end]) in page


def test_each_number_on_what_noise_aware_changes_is_in_a_table():
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    section = page.partition("### What `--noise_aware` changes")[2].partition("\n### ")[0]
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    numbers = re.findall(r"\d\.\d\d", section)
    assert len(numbers) > 10
    assert [number for number in numbers if number not in tables] == []


def test_the_page_of_shapes_has_the_accuracies_of_dpok(found):
    """After as many epochs as shapes/dpok.json has, and at the end of the claims' runs."""
    epochs = json.loads((ROOT / "shapes" / "dpok.json").read_text(encoding="utf-8"))["epochs"]
    soon = claims.over_seeds(found, "RL noise_aware count", epoch=epochs).mean()
    late = claims.over_seeds(found, "RL count").mean()
    page = words(ROOT / "shapes" / "README.md")
    assert f"After {epochs} epochs, strict accuracy is {soon:.2f}." in page
    assert f"it is {late:.2f} at the end of 20 epochs" in page


def test_the_tables_name_all_settings_that_runs_share():
    table = "\n".join(claims.shared_table())
    for flags_of_script in (claims.COMMON, *claims.SHARED.values()):
        assert f"`{flags_of_script}`" in table
    for script in claims.SHARED:
        assert f"`{script.Config.script}`" in table


def test_the_stored_runs_are_few_lines():
    assert len(claims.RECORDED.read_text(encoding="utf-8").splitlines()) <= 400


def result_rows(stored, found):
    """The rows of the table of claims without its first and last column: claim, effect, verdict."""
    rows = []
    for line in claims.claim_table(stored["pre-trained"], found):
        cells = line.strip("| ").split(" | ")
        rows.append(claims.row(*cells[-4:-1]))
    return rows


def test_the_readme_shows_claims_as_they_are_in_the_table(stored, found):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## What holds")[2].partition("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert shown
    rows = result_rows(stored, found)
    for line in shown:
        assert line in rows


def test_the_page_on_dpok_has_the_effects_of_beta_and_of_the_value_function(stored, found):
    page = (ROOT / "docs" / "dpok.md").read_text(encoding="utf-8")
    checked = 0
    for line in result_rows(stored, found):
        if "β" in line or "value function" in line:
            effect = line.split(" | ")[1].removeprefix("location ")
            assert effect in page
            checked += 1
    assert checked == 5


def test_the_pages_have_the_accuracies_of_the_supervised_baseline(stored, found):
    """Fitted to weighted images of p_pre, with gamma 0, a model ends at most at p_pre's strict
    accuracy over its alignment."""
    dpok_page = (ROOT / "docs" / "dpok.md").read_text(encoding="utf-8")
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    at_most, supervised, ours = [], [], []
    for kind in claims.UNSEEN:
        start = stored["pre-trained"][kind]["trained"]
        at_most.append(f"{start['strict'] / start['alignment']:.2f}")
        supervised.append(f"{claims.over_seeds(found, f'KL-O {kind}').mean():.2f}")
        ours.append(f"{claims.over_seeds(found, f'RL {kind}').mean():.2f}")
    for accuracies in (at_most, supervised, ours):
        assert f" | {' | '.join(accuracies)} |" in dpok_page
    assert f" | {' | '.join(at_most)} |" in page


def test_the_page_has_what_the_repetition_on_a_gpu_printed(stored, capsys):
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    on_gpu = claims.load(EXPERIMENTS / "results" / "gpu.json")
    claims.repeat(stored, on_gpu)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    for line in printed:
        assert f"    {line}\n" in page


# ---------- the pages of all folders

FOLDERS = {"README.md": ROOT, "experiments": EXPERIMENTS, "bench": ROOT / "bench",
           "shapes": ROOT / "shapes"}


def links_of(page):
    """Find the links of a page to files of this project -> [(text, target)]."""
    links = []
    for text, target, source in re.findall(r'\[([^\]]*)\]\(([^)\s]+)\)|src="([^"]+)"', page):
        if "://" not in (target or source):
            links.append((text, target or source))
    return links


def anchors_of(page):
    """Make the anchors of a page's headings as GitHub does."""
    anchors = []
    for heading in re.findall(r"^#+ (.+)$", page, re.M):
        letters = re.sub(r"[^\w -]", "", heading).lower()
        anchors.append(letters.replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_readme_shows_and_links_to_is_there(name):
    folder = FOLDERS[name]
    links = links_of((folder / "README.md").read_text(encoding="utf-8"))
    assert links
    for text, target in links:
        path, _, place = target.partition("#")
        file = folder / (path or "README.md")
        assert file.exists(), target
        if not place:
            continue
        content = file.read_text(encoding="utf-8")
        if re.fullmatch(r"L\d+", place):  # `text` is defined in this line
            line = content.splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {text.strip('`')}\b", line), target
        else:
            assert place in anchors_of(content), target
