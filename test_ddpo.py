"""Tests that teach: each name is a claim about the method, and each would fail if the method were wrong.

    python -m pytest -q test_ddpo.py      on a tiny random UNet, without a network; within two minutes

`Chain` is the smallest policy of the kind that DDPO and DPOK train: one number, three Gaussian steps, and all
expectations and their gradients known in closed form.
"""
import ast
import csv
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import textwrap
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: a hub id that is not on this machine fails at once

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence

import ddpo
import dpok
import rewards

LORA = "lora/pytorch_lora_weights.safetensors"
torch.set_num_threads(1)


# ---------- what the tests run on

def tiny_unet(**changes):
    torch.manual_seed(0)
    settings = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2,
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4)
    return diffusers.UNet2DConditionModel(**settings | changes).eval()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder with random parts as Stable Diffusion has them, PNDM the scheduler. It reads 24 letters."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=26)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=26, bos_token_id=52, eos_token_id=53, pad_token_id=53))
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        skip_prk_steps=True, steps_offset=1)
    diffusers.StableDiffusionPipeline(vae, text_encoder, tokenizer, tiny_unet(), scheduler, None, None,
                                      requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def config(pipeline, tmp_path):
    """Settings of a run of ddpo on the random pipeline that takes seconds."""
    return ddpo.Config(
        model=str(pipeline), samples_per_epoch=8, updates_per_epoch=2, steps=3, epochs=2, batch=4, lr=1e-2,
        min_count=2, sample_every=9, device="cpu", out=str(tmp_path / "run"))


@pytest.fixture
def dpok_config(config, tmp_path):
    """The same for dpok, on two prompts."""
    (tmp_path / "prompts.txt").write_text("a dog\n\n a white cat \n")
    names = {f.name for f in dataclasses.fields(dpok.Config)}
    shared = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    own = dict(algo="rl", unseen="a cat", max_grad_norm=0.1, update_batch=12, evaluation_images=2)
    return dpok.Config(**shared | own | dict(prompts=str(tmp_path / "prompts.txt"), advantage_clip=0.0))


def flags(config, **changes):
    """The command line that gives these settings."""
    settings = dataclasses.asdict(dataclasses.replace(config, **changes))
    return [f"--{name}={value}" for name, value in settings.items() if value not in ([], "")]


def disturb(lora, scale=0.3):
    """LoRA as training might leave it: B no longer 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora:
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def load(config):
    pipe = ddpo.load_pipeline(config)
    disturb(ddpo.add_lora(pipe.unet, config.rank, torch.Generator().manual_seed(0)))
    return pipe


def generators(config, count, epoch=1):
    return [ddpo.generator(config.seed, epoch, i) for i in range(count)]


def unet_inputs():
    torch.manual_seed(2)
    return torch.randn(3, 4, 8, 8), torch.tensor([901, 501, 1]), torch.randn(3, 5, 16)


def own_reward(folder, text):
    """A reward of one's own, in a file -> its name for --reward."""
    (folder / "own.py").write_text(textwrap.dedent(text))
    return f"{folder}/own.py:reward"


def read_log(folder):
    with open(Path(folder, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


# ---------- the MDP: one step is a Gaussian

@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_the_policys_step_is_ddims_step_at_every_timestep(eta, config):
    """50 rows, each at its own timestep, with the scheduler that load_pipeline makes of Stable Diffusion's.
    Sigma is above 0 at the last step too, which without set_alpha_to_one=False it would not be."""
    scheduler = ddpo.load_pipeline(config).scheduler
    scheduler.set_timesteps(50)
    torch.manual_seed(0)
    x_t, eps, noise = torch.randn(3, 50, 4, 8, 8)
    mean, sigma = ddpo.step_distribution(scheduler, eps, scheduler.timesteps, x_t, eta)
    for k, t in enumerate(scheduler.timesteps):
        i = slice(k, k + 1)
        step = scheduler.step(eps[i], t, x_t[i], eta=eta, variance_noise=noise[i]).prev_sample
        torch.testing.assert_close(mean[i] + sigma[k] * noise[i], step, rtol=1e-5, atol=1e-5)
    assert scheduler.timesteps.tolist()[::49] == [981, 1]
    assert sigma.shape == (50, 1, 1, 1) and sigma.min() > 0.02 * eta


def test_log_prob_and_kl_are_means_over_the_latent_of_those_of_normal_distributions():
    torch.manual_seed(0)
    (x, mean, other), sigma = torch.randn(3, 3, 4, 8, 8), torch.tensor([0.02, 0.1, 0.4]).view(3, 1, 1, 1)
    expected = Normal(mean, sigma).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(ddpo.log_prob(x, mean, sigma), expected)
    expected = kl_divergence(Normal(mean, sigma), Normal(other, sigma)).mean((1, 2, 3))
    torch.testing.assert_close(ddpo.kl_divergence(mean, other, sigma), expected)


def test_guidance_is_w_times_conditional_plus_one_minus_w_times_unconditional():
    """Rows may stand at different timesteps; guidance 1 runs the UNet once a row, not twice."""
    unet, (x_t, t, cond), uncond, rows = tiny_unet(), unet_inputs(), torch.randn(1, 5, 16), []
    with torch.no_grad():
        given = torch.cat([unet(x_t[i:i + 1], t[i], cond[i:i + 1]).sample for i in range(3)])
        without = torch.cat([unet(x_t[i:i + 1], t[i], uncond).sample for i in range(3)])
        unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
        guided = ddpo.predict_noise(unet, x_t, t, cond, uncond, 5.0)
        plain = ddpo.predict_noise(unet, x_t, t, cond, uncond, 1.0)
    torch.testing.assert_close(guided, 5 * given - 4 * without, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, given, rtol=1e-4, atol=1e-5)
    assert rows == [6, 3]


# ---------- LoRA

def test_fresh_lora_changes_nothing_and_alone_gets_gradients():
    """A is Gaussian with deviation 1 / rank, as in the authors' code; B is 0."""
    unet, inputs = tiny_unet(), unet_inputs()
    before = unet(*inputs).sample.detach()
    lora = ddpo.add_lora(unet, 4, torch.Generator().manual_seed(7))
    after = unet(*inputs).sample
    after.square().sum().backward()
    assert torch.equal(before, after) and len(lora) == 8 * len(unet.attn_processors)  # A, B of q, k, v, out
    assert {id(p) for p in unet.parameters() if p.grad is not None} == {id(p) for p in lora}
    first = next(iter(unet.attn_processors.values()))
    expected = torch.randn(4, 8, generator=torch.Generator().manual_seed(7)) / 4
    assert torch.equal(first.A["to_q"].data, expected) and not first.B["to_q"].any()


def test_with_lora_off_the_unet_is_the_pretrained_one_bit_for_bit():
    unet, inputs = tiny_unet(), unet_inputs()
    with torch.no_grad():
        before = unet(*inputs).sample
        disturb(ddpo.add_lora(unet, 4))
        tuned = unet(*inputs).sample
        with pytest.raises(KeyError), ddpo.pretrained(unet):
            assert torch.equal(unet(*inputs).sample, before)
            raise KeyError  # LoRA comes back on the way out of an error, too
        assert not torch.allclose(tuned, before) and torch.equal(unet(*inputs).sample, tuned)


def test_a_tuned_model_draws_in_stock_diffusers_what_it_draws_here(config, tmp_path):
    """As the README says: through peft, whose LoRA is W + B A, DDIM with that eta, the same generators."""
    config.eta, pipe, prompts = 0.6, load(config), ["cat", "dog"]
    ours = ddpo.sample(pipe, prompts, config, generators(config, 2)).images
    ddpo.save_lora(pipe.unet, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [Path(LORA).name]
    stock = diffusers.StableDiffusionPipeline.from_pretrained(config.model, safety_checker=None)
    stock.scheduler = diffusers.DDIMScheduler.from_config(
        stock.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    stock.set_progress_bar_config(disable=True)

    def distance():
        theirs = stock(prompts, num_inference_steps=config.steps, guidance_scale=config.guidance, eta=0.6,
                       generator=generators(config, 2)).images
        return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(ours, theirs))

    without_lora = distance()
    stock.load_lora_weights(tmp_path)
    assert distance() <= 1 < without_lora


# ---------- trajectories

def test_a_sample_depends_on_its_seed_epoch_and_index_and_not_on_its_batch(config):
    pipe, prompts = load(config), ["cat", "dog", "cow"]
    together = ddpo.sample(pipe, prompts, config, generators(config, 3))
    for i, prompt in enumerate(prompts):
        alone = ddpo.sample(pipe, [prompt], config, [ddpo.generator(0, 1, i)])
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-4)
    starts = {ddpo.generator(*numbers).initial_seed() for numbers in np.ndindex(3, 3, 3)}
    assert len(starts) == 27 and ddpo.generator(2, 3, 4).initial_seed() == 1_016_904_239


def at(pipe, rollout, i, k, config):
    """The policy at pairs (i, k) of a rollout -> log p of its actions, KL to the pre-trained policy."""
    state = rollout.latents[i, k], rollout.timesteps[k], rollout.cond[i], rollout.uncond
    mean, sigma = ddpo.policy(pipe, *state, config)
    with torch.no_grad(), ddpo.pretrained(pipe.unet):
        mean_pre, _ = ddpo.policy(pipe, *state, config)
    new = Normal(mean, sigma).log_prob(rollout.latents[i, k + 1]).mean((1, 2, 3))
    return new, kl_divergence(Normal(mean, sigma), Normal(mean_pre, sigma)).mean((1, 2, 3))


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_ratio_is_one_before_the_first_update(eta, config):
    """log p recomputed from the stored latents, pairs in another order, is the log p of the sampling."""
    config = dataclasses.replace(config, eta=eta)
    pipe = load(config)
    rollout = ddpo.sample(pipe, ["cat", "dog", "cow", "bee"], config, generators(config, 4))
    i, k = torch.cartesian_prod(torch.arange(4), torch.arange(config.steps))[torch.randperm(12)].T
    torch.testing.assert_close(at(pipe, rollout, i, k, config)[0], rollout.log_probs[i, k], rtol=0, atol=2e-5)


def test_the_kl_of_a_run_is_its_mean_over_all_states_seeing_each_step_equally_often(config, monkeypatch):
    """Eight samples of three steps: nine pairs, three of each step, no sample left out. 0 with fresh LoRA."""
    pipe, policy, seen = ddpo.load_pipeline(config), ddpo.policy, []
    lora = ddpo.add_lora(pipe.unet, config.rank)
    rollout = ddpo.sample(pipe, ["cat"] * 8, config, generators(config, 8))
    estimate = lambda seed: ddpo.kl_to_pretrained(  # noqa: E731
        pipe, rollout, config, torch.Generator().manual_seed(seed))
    assert estimate(0) == 0
    disturb(lora)
    i, k = torch.cartesian_prod(torch.arange(8), torch.arange(3)).T
    exact = at(pipe, rollout, i, k, config)[1].mean().item()
    estimates = [estimate(seed) for seed in range(30)]
    assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / 30**0.5) and exact > 1e-4
    monkeypatch.setattr(ddpo, "policy", lambda *a: seen.append(a[1:3]) or policy(*a))
    estimate(0)
    x_t, t = (torch.cat(part) for part in zip(*seen[::2]))  # every other call is the pre-trained policy's
    assert sorted(t.tolist()) == sorted(3 * rollout.timesteps.tolist())
    assert all(any(torch.equal(x, rollout.latents[i, k]) for x in x_t for k in range(3)) for i in range(8))


# ---------- estimators, against the truth

class Chain:
    """x_3 ~ N(1, 1), then three steps x' ~ N(theta x, s^2), s = 0.5; r = -(x_0 - 1)^2; p_pre has theta 0.5.

    All is Gaussian: mean m and variance v of x go to theta m and theta^2 v + s^2; E[r] = -(m_0 - 1)^2 - v_0;
    a step's KL is (theta - 0.5)^2 x_t^2 / (2 s^2), whose mean has E[x_t^2] = m^2 + v."""
    K, s, pre = 3, torch.tensor(0.5), 0.5

    def __init__(self, theta=0.8, N=200_000, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.theta, self.x = theta, [1 + torch.randn(N, 1, generator=generator)]
        for _ in range(self.K):
            self.x.append(theta * self.x[-1] + self.s * torch.randn(N, 1, generator=generator))
        self.reward = -(self.x[-1][:, 0] - 1) ** 2

    def log_probs(self, theta):
        """theta a number or (N, 1) -> (N, K), with ddpo.log_prob itself; the latent has one number."""
        return torch.stack([ddpo.log_prob(self.x[k + 1], theta * self.x[k], self.s) for k in range(3)], 1)

    def kl(self, theta):
        return torch.stack([dpok.kl_divergence(theta * x, self.pre * x, self.s) for x in self.x[:3]], 1)

    def gradients(self, objective, theta=None):
        """Of objective(thetas), thetas (N, 1), in 200 blocks of samples that share a theta -> (200,)."""
        parameter = torch.full((200,), theta or self.theta, requires_grad=True)
        thetas = parameter.repeat_interleave(len(self.reward) // 200)[:, None]
        return 200 * torch.autograd.grad(objective(thetas), parameter)[0]

    @classmethod
    def moments(cls, theta, steps):
        m, v = torch.ones((), dtype=torch.double), torch.ones((), dtype=torch.double)
        for _ in range(steps):
            m, v = theta * m, theta**2 * v + cls.s.double() ** 2
        return m, v

    @classmethod
    def objective(cls, theta, alpha=1.0, beta=0.0):
        """DPOK Eq. 8 in closed form: alpha E[-r] + beta sum_t E[KL_t]."""
        m, v = cls.moments(theta, cls.K)
        squares = sum(m**2 + v for m, v in (cls.moments(theta, k) for k in range(cls.K)))
        kl = (theta - cls.pre) ** 2 / (2 * cls.s.double() ** 2) * squares
        return alpha * ((m - 1) ** 2 + v) + beta * kl

    @classmethod
    def truth(cls, theta, *weights):
        theta = torch.tensor(theta, dtype=torch.double, requires_grad=True)
        return torch.autograd.grad(cls.objective(theta, *weights), theta)[0].item()


def test_the_score_function_estimator_is_the_gradient_of_the_expected_reward():
    """Of -E[r], from 200,000 trajectories, within 4 standard errors; with a step dropped, the sign flipped or
    sigma forgotten far off. The loss is a mean over steps, so times K."""
    chain, truth = Chain(), Chain.truth(0.8)
    variants = {"": lambda new: new, "a step dropped": lambda new: new * torch.tensor([1, 1, 0]),
                "flipped": lambda new: -new, "no sigma": lambda new: new * chain.s**2}
    for name, variant in variants.items():
        gradients = chain.gradients(lambda theta: chain.K * ddpo.score_function_loss(
            variant(chain.log_probs(theta)).flatten(), chain.reward.repeat_interleave(3))[0])
        error = abs(gradients.mean().item() - truth) / (gradients.std().item() / 200**0.5)
        assert error > 12 if name else error < 4, name


def test_importance_sampling_is_the_score_function_at_theta_old_and_a_surrogate_of_it_elsewhere():
    """Trajectories sampled at 0.8. There both estimators agree, whatever the clip. At theta = 0.6 the ratio
    of the whole trajectory gives the true gradient; with one ratio a step (DDPO_IS) is elsewhere."""
    chain, reward = Chain(), Chain().reward.repeat_interleave(3)
    old = chain.log_probs(0.8).flatten()
    mean = lambda loss, theta=0.8: chain.gradients(  # noqa: E731
        lambda thetas: chain.K * loss(chain.log_probs(thetas).flatten())[0], theta).mean().item()
    plain = mean(lambda new: ddpo.score_function_loss(new, reward))
    for clip in (1e-4, 0.2, 1e9):
        for loss in (ddpo.importance_sampling_loss, dpok.policy_loss):
            assert mean(lambda new: loss(new, old, reward, clip)) == pytest.approx(plain, rel=1e-3)
    whole = (chain.log_probs(0.6) - chain.log_probs(0.8)).sum(1).exp().repeat_interleave(3)
    exact = mean(lambda new: ddpo.score_function_loss(new, reward * whole), 0.6)
    surrogate = mean(lambda new: ddpo.importance_sampling_loss(new, old, reward, 1e9), 0.6)
    assert exact == pytest.approx(Chain.truth(0.6), abs=0.1) and abs(surrogate - Chain.truth(0.6)) > 0.3


@pytest.mark.parametrize("advantage, ratio, ppo",
                         [(1.0, 1.3, 0.0), (1.0, 0.7, -0.7), (-1.0, 1.3, 1.3), (-1.0, 0.7, 0.0)])
def test_ppos_clip_cuts_the_gradient_on_one_side_and_dpoks_on_both(advantage, ratio, ppo):
    """Clip 0.2. PPO's min: what is good and already more likely, or bad and already less likely, gives no
    more gradient; where the policy moved the wrong way it is whole, -advantage x ratio. Eq. 26 has no min:
    outside the band there is none, whatever the sign of the advantage. Inside both are whole."""
    for loss, expected in ((ddpo.importance_sampling_loss, ppo), (dpok.policy_loss, 0.0)):
        for r, gradient in ((ratio, expected), (1.1, -1.1 * advantage)):
            log_prob = torch.tensor([r]).log().requires_grad_()
            value, info = loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
            value.backward()
            assert log_prob.grad.item() == pytest.approx(gradient) and not info["ratio_mean"].requires_grad
            numbers = {"ratio_mean": r, "ratio_deviation": abs(r - 1), "clipped": float(gradient == 0)}
            assert {name: number.item() for name, number in info.items()} == pytest.approx(numbers)


@pytest.mark.parametrize("algo, updates, rounds", [("sf", 1, 60), ("is", 4, 20)])
def test_both_estimators_climb_to_the_best_theta(algo, updates, rounds):
    """From 0.2 to where E[r] is greatest by the closed form; DDPO_IS with four updates an epoch."""
    best = min(torch.linspace(0, 1, 1001).tolist(), key=lambda theta: Chain.objective(theta).item())
    theta = torch.tensor(0.2, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.03)
    for i in range(rounds):
        chain = Chain(theta.item(), 500, seed=i)
        advantage = ddpo.PromptStatistics(500, 1).update(["c"] * 500, chain.reward).repeat_interleave(3)
        old = chain.log_probs(theta).flatten().detach()
        for _ in range(updates):
            new = chain.log_probs(theta).flatten()
            loss, _ = (ddpo.score_function_loss(new, advantage) if algo == "sf" else
                       ddpo.importance_sampling_loss(new, old, advantage, 0.2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert 0.4 < best < 0.9 and theta.item() == pytest.approx(best, abs=0.08)


# ---------- advantages, and an epoch of DDPO

def test_advantages_of_a_worked_example():
    """Cats got 1, 3, dogs 10, 20: each is standardised among its own. One fish, fewer than min_count = 2, is
    standardised by the epoch's 1, 3, 10, 20, 6: mean 8, variance (49 + 25 + 4 + 144 + 4) / 5 = 45.2, so (6 -
    8) / 6.723 = -0.2975."""
    statistics = ddpo.PromptStatistics(buffer_size=4, min_count=2)
    update = lambda one, prompts, *reward: one.update(prompts, torch.tensor(reward)).tolist()  # noqa: E731
    first = update(statistics, ["cat", "cat", "dog", "dog", "fish"], 1.0, 3.0, 10.0, 20.0, 6.0)
    assert first == pytest.approx([-1, 1, -1, 1, -0.2975], abs=1e-4)
    # The cats' next reward is 5, their rewards 1, 3, 5: mean 3, deviation 1.63299.
    assert update(statistics, ["cat"], 5.0) == pytest.approx([2 / 1.63299], abs=1e-4)
    # The buffer holds the last four, 3, 5, 7, 7: mean 5.5, deviation 1.6583; so after a resume.
    again = ddpo.PromptStatistics(4, 2)
    again.load_state_dict(json.loads(json.dumps(statistics.state_dict())))
    for one in (statistics, again):
        update(one, ["cat"], 7.0)
        assert update(one, ["cat"], 7.0) == pytest.approx([1.5 / 1.6583], abs=1e-4)
    # Equal rewards teach nothing.
    assert update(ddpo.PromptStatistics(32, 16), ["cat"] * 16 + ["dog"] * 4, *[0.1] * 20) == [0.0] * 20


@pytest.mark.parametrize("algo, updates", [("is", 2), ("sf", 1)])
def test_an_epoch_of_training_is_the_algorithm_done_one_pair_at_a_time(algo, updates, config):
    """Eight samples, three steps: sample i's advantage, clipped, meets all its steps, an update sees its
    block (is: calls of 8 and 4 pairs). eta, clip: every factor shows; seed 2: no gradient is rounding."""
    c = dataclasses.replace(config, algo=algo, updates_per_epoch=updates, epochs=1, kl_weight=0.5, seed=2,
                            eta=0.6, advantage_clip=0.8, clip_range=1e-3, weight_decay=0.5, batch=4 * updates)
    trained, pipe, norms = ddpo.train(c), ddpo.load_pipeline(c), []
    lora = ddpo.add_lora(pipe.unet, c.rank, torch.Generator().manual_seed(c.seed))
    optimizer = torch.optim.AdamW(lora, c.lr, weight_decay=c.weight_decay)
    prompts = [ddpo.ANIMALS[i] for i in torch.randint(45, (8,), generator=ddpo.generator(c.seed, 1, 8))]
    rollout = ddpo.sample(pipe, prompts, c, generators(c, 8))
    reward = rewards.load("jpeg")(rollout.images, prompts)
    advantage = ddpo.PromptStatistics(c.buffer_size, c.min_count).update(prompts, reward)
    assert (advantage.abs() > 0.8).any()
    advantage = advantage.clamp(-0.8, 0.8)
    for block in torch.arange(8).chunk(updates):
        for i, k in torch.cartesian_prod(block, torch.arange(3)):
            new, kl = at(pipe, rollout, i[None], k[None], c)
            ratio = (new - rollout.log_probs[i, k]).exp()
            clipped = ratio.clamp(1 - c.clip_range, 1 + c.clip_range)
            gain = torch.min(ratio * advantage[i], clipped * advantage[i])
            gain = gain if algo == "is" else advantage[i] * new
            ((c.kl_weight * kl - gain) / (len(block) * 3)).backward()
        norms.append(nn.utils.clip_grad_norm_(lora, c.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    same_lora(trained, lora, [np.mean(norms)], 3e-4)  # Adam moves each weight by about lr = 0.01


def same_lora(folder, lora, norms, tolerance):
    """A run's LoRA and mean norms of the gradient are those of a run by hand."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert [row["grad_norm"] for row in saved["log"]] == pytest.approx(norms, rel=2e-3)
    for a, b in zip(saved["lora"].values(), lora, strict=True):
        torch.testing.assert_close(a, b.data, rtol=0, atol=tolerance)


def test_the_log_averages_over_all_pairs_and_looks_at_the_ratio_before_the_first_update():
    """Calls of 64, 64 and 32 pairs; an update that overflowed is not in the mean of the norms."""
    infos = [{"update": u, "pairs": n, "clipped": c, "ratio_deviation": d}
             for u, n, c, d in ((0, 64, 0.5, 0.1), (0, 64, 0.25, 0.3), (1, 32, 1.0, 9.0))]
    row = ddpo.summary(infos, [1.0, math.inf, 2.0], time.time())
    assert row["clipped"] == (32 + 16 + 32) / 160 and row["ratio_deviation"] == pytest.approx(0.3)
    assert (row["grad_norm"], row["skipped"]) == (1.5, 1) and not {"update", "pairs"} & row.keys()


# ---------- DPOK

def test_what_both_scripts_name_alike_is_the_same_text():
    """But Config, train and main; so `diff ddpo.py dpok.py` shows what DPOK changes."""
    texts = [Path(script.__file__).read_text() for script in (ddpo, dpok)]
    ours, theirs = ({node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
                     if isinstance(node, (ast.FunctionDef, ast.ClassDef))} for text in texts)
    shared = ours.keys() & theirs.keys() - {"Config", "train", "main"}
    assert len(shared) > 25 and [name for name in sorted(shared) if ours[name] != theirs[name]] == []


def test_lemma_4_2_the_kl_of_the_images_is_at_most_the_sum_of_the_kls_of_the_steps():
    """x_0 is Gaussian under both, so that its KL is known; the steps' is estimated at x_t ~ p_theta."""
    chain = Chain()
    (m, v), (m_pre, v_pre) = chain.moments(chain.theta, 3), chain.moments(chain.pre, 3)
    images = kl_divergence(Normal(m, v.sqrt()), Normal(m_pre, v_pre.sqrt())).item()
    steps = chain.objective(chain.theta, 0, 1).item()
    assert chain.kl(chain.theta).sum(1).mean().item() == pytest.approx(steps, rel=0.02)
    assert 0.1 < images < steps


def test_eq_9_is_the_gradient_of_objective_8_but_for_the_dropped_term_of_eq_16():
    """alpha 1, beta 2. The truth is the closed form's; the estimate comes of dpok's own losses at theta_old,
    with the term of Eq. 16 (later KLs as rewards of earlier steps) by hand. Without it the estimate is
    clearly off."""
    chain, truth = Chain(), Chain.truth(0.8, 1.0, 2.0)
    old, reward = chain.log_probs(0.8).flatten(), chain.reward.repeat_interleave(3)
    eq_9 = chain.gradients(lambda theta: 2 * chain.kl(theta).sum(1).mean() + chain.K * dpok.policy_loss(
        chain.log_probs(theta).flatten(), old, reward, 1e-4)[0])
    kl = chain.kl(0.8)
    later = kl.flip(1).cumsum(1).flip(1) - kl  # KLs of the steps after each step
    whole = eq_9 + chain.gradients(lambda theta: 2 * (later * chain.log_probs(theta)).sum(1).mean())
    error = whole.std().item() / 200**0.5
    assert abs(whole.mean().item() - truth) < 4 * error and abs(eq_9.mean().item() - truth) > 10 * error


def test_the_value_function_leaves_the_gradient_and_lowers_its_variance():
    """With the exact V(x_t, k) = E[r | x_t], known in closed form: x_0 given x_t is Gaussian (A.5)."""
    chain, values, old = Chain(), [], Chain().log_probs(0.8).flatten()
    for k in range(3):
        variance = sum(chain.theta ** (2 * j) for j in range(3 - k)) * chain.s**2
        values.append(-((chain.theta ** (3 - k) * chain.x[k][:, 0] - 1) ** 2) - variance)
    plain, with_value = (chain.gradients(lambda theta: chain.K * dpok.policy_loss(
        chain.log_probs(theta).flatten(), old, (chain.reward[:, None] - value).flatten(), 1e9)[0])
        for value in (torch.zeros(1, 3), torch.stack(values, 1)))
    error = (plain.var() / 200 + with_value.var() / 200) ** 0.5
    assert abs(plain.mean() - with_value.mean()) < 4 * error and with_value.var() < 0.6 * plain.var()


def test_the_value_network_learns_the_expected_reward_from_state_prompt_and_step():
    """The reward is plus or minus one number of x_t by the step, plus the prompt's, plus noise. Judged at
    states it has not seen; without the steps' gates its error there would be 1 at least."""
    torch.manual_seed(0)
    value = dpok.ValueNetwork((4, 2, 2), 2, steps=2)
    optimizer = torch.optim.AdamW(value.parameters(), 3e-3)
    x_t, which, k = torch.randn(2000, 4, 2, 2), torch.randint(2, (2000,)), torch.randint(2, (2000,))
    truth, states = x_t[:, 0, 0, 0] * (2 * k - 1) + which, (x_t, torch.eye(2)[which], k)
    for _ in range(100):
        reward = truth[:1000] + 0.1 * torch.randn(1000)
        (value(*(part[:1000] for part in states)) - reward).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (value(*(part[1000:] for part in states)) - truth[1000:]).square().mean() < 0.3


def test_kl_d_and_kl_o_of_a_worked_example():
    """Sigma 0.5 and 0.1 (1 / 2 sigma^2 = 2 and 50), x_0 = 0, f_theta = 1 and 0.2, f_pre = 0.5 and 0, r = 1
    and -0.5, gamma 1. KL-D: 2 * 2 * 1 = 4 and 0.5 * 50 * 0.04 = 1. KL-O: 2 (1 * 1 + 1 * 0.25) = 2.5 and 50
    (-0.5 * 0.04 + 1 * 0.04) = 1. A third with r = -1.5, so that r + gamma < 0, adds nothing but counts."""
    full = lambda *values: torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)  # noqa: E731
    x0, x0_pred, x0_pre = full(0.0, 0, 0), full(1.0, 0.2, 3.0), full(0.5, 0, 1)
    sigma, reward = torch.tensor([0.5, 0.1, 0.1]).view(3, 1, 1, 1), torch.tensor([1.0, -0.5, -1.5])
    loss, info = dpok.supervised_loss(x0_pred, x0, reward, sigma, 1.0)
    assert loss.item() == pytest.approx((4 + 1) / 3) and info["left_out"] == pytest.approx(1 / 3)
    assert dpok.supervised_loss(x0_pred, x0, reward, sigma, 1.0, x0_pre)[0].item() == pytest.approx(3.5 / 3)


def start_by_hand(c):
    """What both algorithms of dpok start from -> pipe, LoRA, its optimiser, the prompts."""
    pipe = dpok.load_pipeline(c)
    lora = dpok.add_lora(pipe.unet, c.rank, torch.Generator().manual_seed(c.seed))
    optimizer = torch.optim.AdamW(lora, c.lr, weight_decay=c.weight_decay)
    return pipe, lora, optimizer, dpok.load_prompts(c.prompts)


def test_two_epochs_of_dpok_are_algorithm_1_done_one_pair_at_a_time(dpok_config):
    """Eight samples of two prompts, two updates of 8 + 4 random pairs: alpha times the clipped ratio times r
    - V, centred and clipped, beta times the step's KL, then V is fitted. Every factor shows."""
    c = dataclasses.replace(
        dpok_config, alpha=3.0, beta=0.5, clip_range=0.05, max_grad_norm=1e9, eta=0.7, batch=8, lr=3e-3,
        weight_decay=0.5, value_lr=1e-2, value_steps=2, advantage_clip=0.05)
    trained, (pipe, lora, optimizer, texts), means = dpok.train(c), start_by_hand(c), []
    torch.manual_seed(c.seed)
    value = dpok.ValueNetwork((4, 8, 8), 16, c.steps)
    value_optimizer = torch.optim.AdamW(value.parameters(), c.value_lr)
    for epoch in (1, 2):
        rng, norms = dpok.generator(c.seed, epoch, 8), []
        prompts = [texts[i] for i in torch.randint(2, (8,), generator=rng)]
        rollout = dpok.sample(pipe, prompts, c, generators(c, 8, epoch))
        reward = rewards.load("jpeg")(rollout.images, prompts)
        z = pipe.text_encoder(pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids)
        z, (i, k) = z.pooler_output, torch.cartesian_prod(torch.arange(8), torch.arange(3)).T
        states, returns = (rollout.latents[i, k], z[i], k), reward[i]
        advantage = returns - value(*states).detach()
        advantage = advantage - advantage.mean()
        assert len(set(prompts)) == 2 and (advantage.abs() > 0.05).any() and (advantage.abs() < 0.05).any()
        advantage = advantage.clamp(-0.05, 0.05)
        for rows in torch.randperm(24, generator=rng).split(12):
            for row in rows:
                new, kl = at(pipe, rollout, i[row][None], k[row][None], c)
                ratio = (new - rollout.log_probs[i[row], k[row]]).exp()
                ratio = ratio.clamp(1 - c.clip_range, 1 + c.clip_range)
                ((c.beta * kl - c.alpha * advantage[row] * ratio) / 12).backward()
            norms.append(nn.utils.clip_grad_norm_(lora, 1e9).item())
            optimizer.step()
            optimizer.zero_grad()
        for _ in range(c.value_steps):
            (value(*states) - returns).square().mean().backward()
            value_optimizer.step()
            value_optimizer.zero_grad()
        means.append(np.mean(norms))
    same_lora(trained, lora, means, 1e-4)


@pytest.mark.parametrize("kl_d", [False, True])
def test_algorithm_2_is_a_weighted_regression_to_noised_images_of_the_pretrained_model(kl_d, dpok_config):
    """Sixteen images of two prompts, some with r + gamma < 0; twelve an update, at random steps but the last:
    x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise, f the guided prediction of x_0, sigma the sampler's."""
    c = dataclasses.replace(dpok_config, algo="sft", kl_d=kl_d, gamma=0.868, eta=0.7, lr=3e-3,
                            max_grad_norm=1e9)
    trained, (pipe, lora, optimizer, texts) = dpok.train_supervised(c), start_by_hand(c)
    x_0, reward, prompts, means, abar = [], [], [], [], pipe.scheduler.alphas_cumprod
    for epoch in (1, 2):  # LoRA is fresh: p_theta = p_pre
        prompts += [texts[i] for i in torch.randint(2, (8,), generator=dpok.generator(c.seed, epoch, 8))]
        rollout = dpok.sample(pipe, prompts[-8:], c, generators(c, 8, epoch))
        x_0, reward = x_0 + [*rollout.latents[:, -1]], reward + rewards.jpeg(rollout.images, None).tolist()
    assert 0 < sum(r + c.gamma < 0 for r in reward) < 16 and len(set(prompts)) == 2
    cond = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    for epoch in (1, 2):
        rng, norms = dpok.generator(c.seed, c.epochs + epoch, 0), []
        for rows in torch.randperm(32, generator=rng)[:24].split(12):
            for row, noise in zip(rows, torch.randn(12, 1, 4, 8, 8, generator=rng)):
                i, t = row // 2, rollout.timesteps[row % 2][None]
                x_t = abar[t].sqrt() * x_0[i] + (1 - abar[t]).sqrt() * noise

                def f():
                    eps = dpok.predict_noise(pipe.unet, x_t, t, cond[i][None], rollout.uncond, c.guidance)
                    return (x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()

                _, sigma = dpok.step_distribution(pipe.scheduler, x_t, t, x_t, c.eta)
                with torch.no_grad(), dpok.pretrained(pipe.unet):
                    f_pre = f()
                predicted = f()
                squares = (reward[i] + kl_d * c.gamma) * (x_0[i] - predicted) ** 2
                squares = squares + (not kl_d) * c.gamma * (f_pre - predicted) ** 2
                ((reward[i] + c.gamma >= 0) * (squares / (2 * sigma**2)).mean() / 12).backward()
            norms.append(nn.utils.clip_grad_norm_(lora, 1e9).item())
            optimizer.step()
            optimizer.zero_grad()
        means.append(np.mean(norms))
    same_lora(trained, lora, means, 1e-4)


def test_an_update_of_dpok_draws_no_pair_twice_before_all_had_their_turn(dpok_config):
    c = dataclasses.replace(dpok_config, updates_per_epoch=5, update_batch=7)
    pairs = torch.cat(dpok.draw_pairs(5, 3, c, torch.Generator().manual_seed(0))).tolist()
    every = sorted([i, k] for i in range(5) for k in range(3))
    assert len(pairs) == 35 and sorted(pairs[:15]) == every == sorted(pairs[15:30]) and pairs[:15] != every


def test_the_evaluation_compares_both_models_on_the_same_seeds(dpok_config):
    """Trained and unseen prompts; the pre-trained model is the run's own with LoRA off."""
    c = dataclasses.replace(dpok_config, epochs=1, evaluation_images=4)
    folder, pipe = dpok.train(c), dpok.load_pipeline(c)
    table = json.loads((folder / "evaluation.json").read_text())
    assert [(row["prompt"], row["trained"]) for row in table] == [
        ("a dog", True), ("a white cat", True), ("a cat", False)]
    for model in ("pretrained", "tuned"):
        reward = rewards.jpeg(dpok.sample(pipe, ["a cat"] * 4, c, generators(c, 4, 0)).images, None)
        expected = {"mean": reward.mean().item(), "standard_error": reward.std().item() / 2}
        assert table[2][model] == pytest.approx(expected, rel=1e-3)
        lora = nn.ParameterList(dpok.add_lora(pipe.unet, c.rank))
        lora.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["lora"])
    assert table[2]["pretrained"] != table[2]["tuned"]


# ---------- rewards (those that are models: experiments/test_rewards.py)

def test_jpeg_rewards_rank_an_empty_image_above_noise_and_are_minus_each_other():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    images, prompts = [Image.new("RGBA", (64, 64), "white"), noise], ["a", "b"]
    small, large = rewards.load("jpeg")(images, prompts), rewards.load("incompressibility")(images, prompts)
    assert small.dtype == torch.float32 and torch.equal(small, -large) and small[0] > small[1] + 4


def test_a_reward_of_ones_own_is_a_function_in_a_file_and_what_it_does_wrong_is_said(tmp_path):
    file = tmp_path / "own.py"

    def reward(name, text, **options):
        file.write_text(f"def f(images, prompts, scale=1):\n    {text}\n")
        return rewards.load(f"{file}:{name}", **options)([Image.new("L", (64, 64))] * 2, ["a cat", "a dog"])

    assert reward("f", "return [float(scale) * i.width for i in images]", scale="2").tolist() == [128, 128]
    for text, word in {
            "return [1.0, float('nan')]": "nan for the prompt 'a dog'", "return [1.0]": "shape",
            "return [[1.0], [2.0]]": "shape", "return 1 / 0": "'a cat'.*division.*line 2 of .*own.py",
            "raise SystemExit": "SystemExit", "return [1.0": "was never closed"}.items():
        with pytest.raises(ValueError, match=word):
            reward("f", text)
    for name, options in (("g", {}), ("f", {"colour": "red"})):
        with pytest.raises(ValueError, match="cannot be used"):
            reward(name, "return [0, 1]", **options)


# ---------- a run: prompts, refusals, what it leaves

def test_settings_are_flags_over_a_file_over_those_of_shapes_and_prompt_sets_are_the_papers(tmp_path):
    """Without CUDA and a model named, shapes/ comes first; each algorithm has settings of its own."""
    (tmp_path / "some.json").write_text('{"lr": 0.5, "rank": 3, "value": false}')
    given = dpok.parse(["--device=cpu", "--config", str(tmp_path / "some.json"), "--rank", "2", "--algo=sft"])
    assert (given.model, given.lr, given.rank, given.value, given.batch) == ("shapes", 0.5, 2, False, 64)
    assert [dpok.parse(["--model=x", f"--algo={algo}"]).lr for algo in ("rl", "sft")] == [1e-5, 2e-5]
    assert [ddpo.parse(["--model=x", f"--algo={algo}"]).updates_per_epoch for algo in ("is", "sf")] == [4, 1]
    assert not dpok.parse(["--device=cpu", "--no-value"]).value
    assert [len(ddpo.load_prompts(name)) for name in ("animals", "activities", "counting")] == [45, 135, 315]
    assert {"an ant playing chess", "a dolphin riding a bike"} <= set(ddpo.load_prompts("activities"))
    assert {"two mice", "eight butterflies", "three monkeys"} <= set(ddpo.load_prompts("counting"))


@pytest.mark.parametrize("script, line, word", [
    (ddpo, "--lr nan", "lr nan"), (dpok, "--steps 501", "steps 501"), (ddpo, "--eta 0", "eta 0.0"),
    (ddpo, "--seed -1", "seed -1"), (dpok, "--evaluation_images 1", "evaluation_images 1"),
    (ddpo, "--algo sf --updates_per_epoch 2", "updates_per_epoch 2"), (ddpo, "--batch 3", "batch 3"),
    (ddpo, "--algo ppo", "'ppo'"), (dpok, "--steps x", "'x'"), (ddpo, "--learning_rate 1", "--learning_rate"),
    (ddpo, "--prompts plants", "'plants'"), (dpok, "--prompts EMPTY", "empty.txt"),
    (ddpo, "--reward beauty", "'beauty'"), (ddpo, "--reward_options quality", "KEY=VALUE"),
    (dpok, "--device abacus", "'abacus'"), (ddpo, "--prompts shapes", "'shapes'"),
    (ddpo, "--config WRONG", "rank"), (ddpo, "--config EMPTY", "empty.txt"), (ddpo, "--out FULL", "full"),
    (ddpo, "--out EMPTY/run", "empty.txt"), (dpok, "--model CUT", "cut"), (ddpo, "--model MISFIT", "misfit"),
    (dpok, "--resume nowhere", "nowhere"), (ddpo, "--resume FULL --lr 1", "full")])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
        script, line, word, config, dpok_config, pipeline, tmp_path, monkeypatch, capsys):
    """Each stands for a rule: a number's bounds, what must divide what, choices, types, names, files."""
    bad = {"EMPTY": tmp_path / "empty.txt", "WRONG": tmp_path / "wrong.json", "FULL": tmp_path / "full"}
    bad |= {"CUT": tmp_path / "cut", "MISFIT": tmp_path / "misfit"}
    bad["EMPTY"].write_text("\n"), bad["WRONG"].write_text('{"rank": true}')
    (bad["FULL"] / "run").mkdir(parents=True)
    if "--model" in line:
        shutil.copytree(pipeline, bad["CUT"]), shutil.copytree(pipeline, bad["MISFIT"])
        weights = bad["CUT"] / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:9999])
        tiny_unet(cross_attention_dim=24).save_pretrained(bad["MISFIT"] / "unet")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = re.sub("[A-Z]{3,}", lambda name: str(bad[name[0]]), line).split()
    base = flags(config if script is ddpo else dpok_config, out="")
    assert script.main([*([] if "--resume" in line else base), *line]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"{script.__name__}.py: error: ") and word in last and "Traceback" not in error
    assert not list((tmp_path / "here").iterdir()) and not list((bad["FULL"] / "run").iterdir())


def contents(run):
    """A run's files, but for what says how long it took."""
    files = {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*")
             if file.is_file() and file.parent.name != "tensorboard"}
    log = [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(run)]
    return files | {"log.csv": log, "checkpoint.pt": len(log)}


@pytest.mark.parametrize("algo", ["is", "rl", "sft"])
def test_a_run_leaves_its_folder_and_its_config_repeats_it(algo, config, dpok_config, tmp_path):
    script, c = (ddpo, config) if algo == "is" else (dpok, dataclasses.replace(dpok_config, algo=algo))
    assert script.main(flags(c, sample_every=2)) == 0
    run = contents(Path(c.out))
    assert script.main(["--config", f"{c.out}/config.json", "--out", str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again") == run
    names = {"config.json", "log.csv", "checkpoint.pt", LORA, "comparison.png", "progress.png",
             "progress.gif", "samples/epoch_0000.png", "samples/epoch_0002.png"}
    names |= {"evaluation.json"} if script is dpok else set()
    assert run.keys() == names | ({f"data/epoch_000{i}.pt" for i in (1, 2)} if algo == "sft" else set())
    assert all(float(row["kl"]) > 0 < float(row["grad_norm"]) for row in run["log.csv"])
    assert algo == "sft" or all(float(row["ratio_deviation"]) < 1e-4 for row in run["log.csv"])


def test_a_run_stops_once_the_kl_passes_its_bound_and_a_penalty_on_it_holds_it_back(config, tmp_path):
    run, kl = ddpo.train(dataclasses.replace(config, epochs=5, max_kl=1e-9)), {}
    assert len(read_log(run)) == 1 and (run / "comparison.png").exists()
    assert ddpo.main(["--resume", str(run), "--epochs", "9"]) == 0 and len(read_log(run)) == 1
    assert not ddpo.finished([{"kl": 1.0}], dataclasses.replace(config, max_kl=0.5))  # one is noisy
    for weight in (0.0, 100.0):
        c = dataclasses.replace(config, epochs=4, kl_weight=weight, out=str(tmp_path / str(weight)))
        kl[weight] = float(read_log(ddpo.train(c))[-1]["kl"])
    assert kl[100.0] < 0.7 * kl[0.0]


def test_a_reward_that_fails_in_mid_run_stops_it_and_what_was_saved_stays(config, tmp_path, capsys):
    """Calls: the pictures before, epoch 1, epoch 2."""
    name = own_reward(tmp_path, """
        calls = []
        def reward(images, prompts):
            calls.append(1)
            return [float("nan") if len(calls) == 3 else image.getpixel((0, 0))[0] for image in images]""")
    assert ddpo.main(flags(config, reward=name)) == 2
    assert "nan for the prompt" in capsys.readouterr().err.splitlines()[-1]
    assert len(read_log(config.out)) == 1 and Path(config.out, LORA).exists()


def test_weights_that_are_no_numbers_stop_the_run_and_are_not_saved(config, monkeypatch):
    """Blank images are small files: without this check the reward would rise. The last update spoils them."""
    step, calls = torch.optim.AdamW.step, []

    def spoil(self, *arguments):
        step(self, *arguments)
        calls.append(1)
        if len(calls) == 4:
            self.param_groups[0]["params"][1].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(ValueError, match="the KL is nan"):
        ddpo.train(config)
    assert len(read_log(config.out)) == 1
    assert all(tensor.isfinite().all() for tensor in load_file(Path(config.out, LORA)).values())


def test_half_precision_keeps_lora_in_float32_and_skips_updates_that_overflow(config):
    """GradScaler begins at 65,536 and halves it at each overflow; in fp32 such a gradient stops the run."""
    c, lora = dataclasses.replace(config, precision="fp16"), [nn.Parameter(torch.zeros(3))]
    optimizer, scaler = torch.optim.AdamW(lora, 0.1), torch.amp.GradScaler("cpu")
    lora[0].grad = scaler.scale(torch.tensor([1.0, math.inf, 1.0]))
    assert not math.isfinite(ddpo.optimizer_step(lora, optimizer, scaler, c)) and not lora[0].any()
    lora[0].grad = scaler.scale(torch.tensor([3.0, 4.0, 0.0]))
    assert ddpo.optimizer_step(lora, optimizer, scaler, c) == pytest.approx(5) and scaler.get_scale() == 2**15
    assert lora[0].tolist() == pytest.approx([-0.1, -0.1, 0.0], abs=1e-3)
    lora[0].grad = torch.tensor([1.0, math.inf, 1.0])
    with pytest.raises(ValueError, match="gradient is inf.*lr below 0.01"):
        ddpo.optimizer_step(lora, optimizer, torch.amp.GradScaler("cpu", enabled=False), c)
    run = ddpo.train(c)
    assert {tensor.dtype for tensor in load_file(run / LORA).values()} == {torch.float32}
    assert torch.load(run / "checkpoint.pt", weights_only=True)["scaler"]["scale"] <= 2**16


# ---------- runs that survive

def run_and_exit(name, argv, environment, output):
    os.environ |= environment
    with open(output, "a") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(importlib.reload(sys.modules[name]).main(argv))


def child(script, argv, output, **environment):
    """A process that runs a script, forked where none has trained: autograd's threads of a GPU forbid it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, diffusers.StableDiffusionPipeline.__module__])
    process = context.Process(target=run_and_exit, args=(script.__name__, argv, environment, output))
    process.start()
    return process


@pytest.mark.parametrize("algo", ["is", "rl"])
def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_had_not(algo, config, dpok_config, tmp_path):
    script, c = (ddpo, config) if algo == "is" else (dpok, dataclasses.replace(dpok_config, algo=algo))
    c = dataclasses.replace(c, epochs=3, sample_every=2)
    assert script.main(flags(c)) == 0
    run, kills, status = tmp_path / "killed", 0, -signal.SIGKILL
    arguments = flags(c, out=str(run))
    while status == -signal.SIGKILL:
        process = child(script, arguments, tmp_path / "printed")
        time.sleep(0.5 * (1 + kills))
        process.kill()
        process.join()
        status, kills = process.exitcode, kills + 1
        if (run / "config.json").exists():
            arguments = ["--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)
    assert status == 0 and kills > 2 and contents(run) == contents(Path(c.out))


def test_a_resumed_run_of_algorithm_2_draws_no_image_of_its_data_again(dpok_config, tmp_path, capsys):
    """Interrupted in the third of four rounds of drawing: the first two are there."""
    name = own_reward(tmp_path, f"""
        import pathlib
        calls, once = [], pathlib.Path({str(tmp_path)!r}, "once")
        def reward(images, prompts):
            calls.append(len(images))
            if len(calls) == 4 and not once.exists():
                once.touch()
                raise KeyboardInterrupt
            return [float(len(prompt)) for prompt in prompts]""")
    c = dataclasses.replace(dpok_config, algo="sft", epochs=4, reward=name)
    assert dpok.main(flags(c)) == 130 and capsys.readouterr().err.strip().endswith("error: interrupted")
    assert sys.modules["reward_own"].calls == [16, 8, 8, 8]  # the pictures before, three rounds
    assert dpok.main(["--resume", c.out]) == 0  # the pictures, two rounds, the pictures, two models by prompt
    assert sys.modules["reward_own"].calls == [16, 8, 8, 16] + [2] * 6


def test_a_finished_run_can_be_made_longer_and_a_damaged_one_is_left_as_it_is(config, tmp_path, capsys):
    longer, at_once = str(tmp_path / "longer"), str(tmp_path / "at_once")
    assert ddpo.main(flags(config, out=longer)) == ddpo.main(flags(config, epochs=3, out=at_once)) == 0
    assert ddpo.main(["--resume", longer, "--epochs", "3"]) == 0
    assert contents(Path(longer))["log.csv"] == contents(Path(at_once))["log.csv"]
    assert Path(longer, LORA).read_bytes() == Path(at_once, LORA).read_bytes()
    file = Path(longer, "checkpoint.pt")
    saved = torch.load(file, weights_only=True)
    for damage in (lambda: file.write_bytes(file.read_bytes()[:5000]),
                   lambda: file.write_bytes(pickle.dumps({"log": Path})),
                   lambda: torch.save(saved | {"lora": {"0": torch.zeros(1)}}, file)):
        damage()
        before = {path: path.read_bytes() for path in Path(longer).rglob("*") if path.is_file()}
        assert ddpo.main(["--resume", longer]) == 2
        assert "checkpoint.pt' cannot be used" in capsys.readouterr().err.splitlines()[-1]
        assert before == {path: path.read_bytes() for path in Path(longer).rglob("*") if path.is_file()}


@pytest.mark.parametrize("algo", ["is", "rl"])
def test_two_processes_are_one_with_the_same_samples(algo, config, dpok_config, tmp_path):
    """With the environment that torchrun sets: the same log and LoRA, but for rounding. A smooth reward."""
    name = own_reward(tmp_path, """
        import numpy as np
        def reward(images, prompts):
            return [float(np.asarray(image).mean()) for image in images]""")
    script, c = (ddpo, config) if algo == "is" else (dpok, dataclasses.replace(dpok_config, algo=algo))
    c = dataclasses.replace(c, reward=name, batch=2, lr=1e-3, clip_range=0.1)
    assert script.main(flags(c)) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments, output = flags(c, out=str(tmp_path / "two")), tmp_path / "printed"
    processes = [child(script, arguments, output, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    statuses = [process.join() or process.exitcode for process in processes]
    assert statuses == [0, 0] and output.read_text().count("progress.png") == 1, output.read_text()
    for one, two in zip(read_log(c.out), read_log(tmp_path / "two"), strict=True):
        for name in one.keys() - {"seconds", "ratio_deviation"}:
            tolerance = {"abs": 2e-3 if "reward" in name else 1e-5, "rel": 1e-3}
            assert float(two[name]) == pytest.approx(float(one[name]), **tolerance), name
    for name, tensor in load_file(Path(c.out, LORA)).items():
        torch.testing.assert_close(load_file(tmp_path / "two" / LORA)[name], tensor, rtol=0, atol=1e-5)
