"""Tests that teach: each name is a claim about the method, and each fails if the method is wrong.

    python -m pytest -q test_ddpo.py  # a tiny random UNet on a CPU, no network, two minutes

The first part is `Chain`, the smallest policy of the kind that DDPO and DPOK train. All of its
expectations are known in closed form, so the estimators can be compared with the truth.
"""
import ast
import csv
import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: an unknown hub id fails at once
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read on import: the tests are the same with a GPU

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

ROOT = Path(__file__).resolve().parent
LORA = "lora/pytorch_lora_weights.safetensors"
torch.set_num_threads(1)


# ---------- estimators, against the truth
class Chain:
    """A policy of three steps on one number x: x_3 ~ N(1, 1), then x_{k-1} ~ N(theta x_k, s^2) with
    s = 0.5. The reward is r = -(x_0 - 1)^2. The pre-trained policy has theta = 0.5.

    Everything is Gaussian. If x has mean m and variance v, the next x has mean theta m and variance
    theta^2 v + s^2. Hence, with the mean and variance of x_0,

        E[r] = -(m_0 - 1)^2 - v_0,

    and since a step's KL is (theta - 0.5)^2 x_k^2 / (2 s^2), its mean follows from
    E[x_k^2] = m_k^2 + v_k. The gradients of both are taken by autograd in double precision.
    """
    K = 3
    s = torch.tensor(0.5)
    pre = 0.5

    def __init__(self, theta=0.8, N=200_000, seed=0):
        """Sample N trajectories of the policy theta: x[0] = x_3, ..., x[3] = x_0, (N, 1) each."""
        generator = torch.Generator().manual_seed(seed)
        self.theta = theta
        self.x = [1 + torch.randn(N, 1, generator=generator)]
        for _ in range(self.K):
            noise = torch.randn(N, 1, generator=generator)
            self.x.append(theta * self.x[-1] + self.s * noise)
        self.reward = -(self.x[-1][:, 0] - 1) ** 2

    def log_probs(self, theta):
        """log p_theta of each step, by ddpo.log_prob; theta is a number or (N, 1) -> (N, K)."""
        steps = [ddpo.log_prob(self.x[k + 1], theta * self.x[k], self.s) for k in range(self.K)]
        return torch.stack(steps, 1)

    def kl(self, theta):
        """The KL of each step to the pre-trained policy, by dpok.kl_divergence -> (N, K)."""
        steps = [dpok.kl_divergence(theta * x, self.pre * x, self.s) for x in self.x[:self.K]]
        return torch.stack(steps, 1)

    def gradients(self, loss, theta=None):
        """Differentiate loss(thetas) in 200 independent blocks of the samples -> (200,).

        `loss` is a mean over the samples and takes thetas (N, 1), one parameter for each block."""
        parameter = torch.full((200,), theta or self.theta, requires_grad=True)
        thetas = parameter.repeat_interleave(len(self.reward) // 200)[:, None]
        return 200 * torch.autograd.grad(loss(thetas), parameter)[0]

    @classmethod
    def moments(cls, theta, steps):
        """The mean and variance of x after some steps."""
        m, v = torch.ones(2, dtype=torch.double)
        for _ in range(steps):
            m, v = theta * m, theta**2 * v + cls.s.double() ** 2
        return m, v

    @classmethod
    def objective(cls, theta, alpha=1.0, beta=0.0):
        """DPOK's objective (8), alpha E[-r] + beta sum_t E[KL_t], in closed form."""
        m, v = cls.moments(theta, cls.K)
        squares = 0
        for k in range(cls.K):
            m_k, v_k = cls.moments(theta, k)
            squares = squares + m_k**2 + v_k
        kl = (theta - cls.pre) ** 2 / (2 * cls.s.double() ** 2) * squares
        return alpha * ((m - 1) ** 2 + v) + beta * kl

    @classmethod
    def truth(cls, theta, alpha=1.0, beta=0.0):
        """The gradient of the objective."""
        theta = torch.tensor(theta, dtype=torch.double, requires_grad=True)
        return torch.autograd.grad(cls.objective(theta, alpha, beta), theta)[0].item()

def standard_errors(gradients, truth):
    """How many standard errors the mean of (200,) gradients is away from the truth."""
    return abs(gradients.mean().item() - truth) / (gradients.std().item() / len(gradients) ** 0.5)

@pytest.mark.parametrize("mistake", ["none", "a step dropped", "sign flipped", "sigma forgotten"])
def test_the_score_function_estimator_is_the_gradient_of_the_expected_reward(mistake):
    """The gradient of -E[r], from 200,000 trajectories, is within four standard errors of the
    truth. With a mistake in log p it is more than twelve away. The loss is a mean over K steps, so
    times K."""
    chain = Chain()
    reward = chain.reward.repeat_interleave(chain.K)
    factor = {"none": 1, "a step dropped": torch.tensor([1, 1, 0]), "sign flipped": -1,
              "sigma forgotten": chain.s**2}[mistake]

    def loss(thetas):
        log_prob = (chain.log_probs(thetas) * factor).flatten()
        return chain.K * ddpo.score_function_loss(log_prob, reward)[0]

    away = standard_errors(chain.gradients(loss), Chain.truth(0.8))
    if mistake == "none":
        assert away < 4
    else:
        assert away > 12

def test_importance_sampling_is_the_score_function_at_theta_old_and_a_surrogate_elsewhere():
    """The trajectories are sampled at 0.8. There all estimators agree, whatever the clip. At theta
    = 0.6, the ratio of the whole trajectory gives the true gradient; the ratio of each step, as in
    (DDPO_IS), does not."""
    chain = Chain()
    reward = chain.reward.repeat_interleave(chain.K)
    log_prob_old = chain.log_probs(0.8).flatten()

    def mean_gradient(loss_function, theta):
        def loss(thetas):
            return chain.K * loss_function(chain.log_probs(thetas).flatten())[0]
        return chain.gradients(loss, theta).mean().item()

    def score_function(log_prob):
        return ddpo.score_function_loss(log_prob, reward)

    for clip_range in (1e-4, 0.2, 1e9):
        for ratio_loss in (ddpo.importance_sampling_loss, dpok.policy_loss):
            def with_ratio(log_prob):
                return ratio_loss(log_prob, log_prob_old, reward, clip_range)
            expected = mean_gradient(score_function, 0.8)
            assert mean_gradient(with_ratio, 0.8) == pytest.approx(expected, rel=1e-3)

    whole_ratio = (chain.log_probs(0.6) - chain.log_probs(0.8)).sum(1).exp()

    def with_whole_ratio(log_prob):
        return ddpo.score_function_loss(log_prob, reward * whole_ratio.repeat_interleave(chain.K))

    def with_ratio_of_each_step(log_prob):
        return ddpo.importance_sampling_loss(log_prob, log_prob_old, reward, 1e9)

    truth = Chain.truth(0.6)
    assert mean_gradient(with_whole_ratio, 0.6) == pytest.approx(truth, abs=0.1)
    assert abs(mean_gradient(with_ratio_of_each_step, 0.6) - truth) > 0.3

@pytest.mark.parametrize("advantage, ratio, ppo_gradient",
                         [(1.0, 1.3, 0.0), (1.0, 0.7, -0.7), (-1.0, 1.3, 1.3), (-1.0, 0.7, 0.0)])
def test_ppos_clip_cuts_the_gradient_on_one_side_and_dpoks_on_both(advantage, ratio, ppo_gradient):
    """The clip range is 0.2. With PPO's min, what is good and already more likely, or bad and
    already less likely, gives no gradient; where the policy has moved the wrong way the gradient is
    whole, -advantage * ratio. Eq. 26 has no min: outside the band there is none for any
    advantage."""
    losses = {ddpo.importance_sampling_loss: ppo_gradient, dpok.policy_loss: 0.0}
    for loss_function, gradient_outside in losses.items():
        for r, gradient in ((ratio, gradient_outside), (1.1, -1.1 * advantage)):
            log_prob = torch.tensor([r]).log().requires_grad_()
            loss, info = loss_function(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
            loss.backward()
            assert log_prob.grad.item() == pytest.approx(gradient)
            expected = {"ratio_mean": r, "ratio_deviation": abs(r - 1),
                        "clipped": float(gradient == 0)}
            assert {name: number.item() for name, number in info.items()} == pytest.approx(expected)
            assert not any(number.requires_grad for number in info.values())

@pytest.mark.parametrize("algo, updates, rounds", [("sf", 1, 60), ("is", 4, 20)])
def test_both_estimators_climb_to_the_best_theta(algo, updates, rounds):
    """From theta = 0.2 to where the closed form is best; DDPO_IS makes four updates per round."""
    grid = torch.linspace(0, 1, 1001).tolist()
    best = min(grid, key=lambda theta: Chain.objective(theta).item())
    theta = torch.tensor(0.2, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.03)
    for i in range(rounds):
        chain = Chain(theta.item(), 500, seed=i)
        advantage = ddpo.PromptStatistics(500, 1).update(["c"] * 500, chain.reward)
        advantage = advantage.repeat_interleave(chain.K)
        log_prob_old = chain.log_probs(theta).flatten().detach()
        for _ in range(updates):
            log_prob_new = chain.log_probs(theta).flatten()
            if algo == "sf":
                loss, _ = ddpo.score_function_loss(log_prob_new, advantage)
            else:
                loss, _ = ddpo.importance_sampling_loss(log_prob_new, log_prob_old, advantage, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert 0.4 < best < 0.9
    assert theta.item() == pytest.approx(best, abs=0.08)

def test_lemma_4_2_the_kl_of_the_images_is_at_most_the_sum_of_the_kls_of_the_steps():
    """x_0 is Gaussian under both policies, so the KL of the images is known. The KL of the steps is
    estimated at states of p_theta."""
    chain = Chain()
    m, v = chain.moments(chain.theta, chain.K)
    m_pre, v_pre = chain.moments(chain.pre, chain.K)
    images = kl_divergence(Normal(m, v.sqrt()), Normal(m_pre, v_pre.sqrt())).item()
    steps = chain.objective(chain.theta, alpha=0, beta=1).item()
    assert chain.kl(chain.theta).sum(1).mean().item() == pytest.approx(steps, rel=0.02)
    assert 0.1 < images < steps

def test_eq_9_is_the_gradient_of_objective_8_except_for_the_dropped_term_of_eq_16():
    """alpha = 1, beta = 2, at theta_old. In the term that (9) drops, the KLs of later steps are
    rewards of earlier ones. With it the estimate is the true gradient; without it, clearly not."""
    chain = Chain()
    reward = chain.reward.repeat_interleave(chain.K)
    log_prob_old = chain.log_probs(0.8).flatten()
    kl = chain.kl(0.8)
    later_kl = kl.flip(1).cumsum(1).flip(1) - kl  # the sum over the steps after each step

    def loss_of_eq_9(thetas):
        log_prob = chain.log_probs(thetas).flatten()
        policy_loss, _ = dpok.policy_loss(log_prob, log_prob_old, reward, 1e-4)
        return chain.K * policy_loss + 2 * chain.kl(thetas).sum(1).mean()

    def dropped_term(thetas):
        return 2 * (later_kl * chain.log_probs(thetas)).sum(1).mean()

    eq_9 = chain.gradients(loss_of_eq_9)
    whole = eq_9 + chain.gradients(dropped_term)
    truth = Chain.truth(0.8, alpha=1.0, beta=2.0)
    assert standard_errors(whole, truth) < 4
    assert standard_errors(eq_9, truth) > 10

def test_the_value_function_leaves_the_gradient_and_lowers_its_variance():
    """With the exact V(x_k) = E[r | x_k] (A.5): given x_k, x_0 is Gaussian with mean theta^n x_k
    and variance s^2 (1 + theta^2 + ... + theta^(2n - 2)) after the n steps that are left."""
    chain = Chain()
    log_prob_old = chain.log_probs(0.8).flatten()
    values = []
    for k in range(chain.K):
        left = chain.K - k
        mean = chain.theta**left * chain.x[k][:, 0]
        variance = chain.s**2 * sum(chain.theta ** (2 * j) for j in range(left))
        values.append(-((mean - 1) ** 2) - variance)

    def gradients(value):
        advantage = (chain.reward[:, None] - value).flatten()

        def loss(thetas):
            log_prob = chain.log_probs(thetas).flatten()
            return chain.K * dpok.policy_loss(log_prob, log_prob_old, advantage, 1e9)[0]
        return chain.gradients(loss)

    plain = gradients(torch.zeros(1, chain.K))
    with_value = gradients(torch.stack(values, 1))
    error = ((plain.var() + with_value.var()) / 200) ** 0.5
    assert abs(plain.mean() - with_value.mean()) < 4 * error
    assert with_value.var() < 0.6 * plain.var()


# ---------- what the other tests run on
def tiny_unet(**changes):
    torch.manual_seed(0)
    settings = dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4)
    return diffusers.UNet2DConditionModel(**settings | changes).eval()

@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder with random parts like Stable Diffusion's and its PNDM scheduler. The tokenizer
    knows the letters a to z."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    ends = [letter + "</w>" for letter in letters]
    tokens = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=26)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=26, bos_token_id=52, eos_token_id=53,
        pad_token_id=53))
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1)
    diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, tiny_unet(), scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder

def small_config(pipeline, folder):
    """Settings of a run of ddpo.py on the random pipeline that takes seconds."""
    return ddpo.Config(
        model=str(pipeline), samples_per_epoch=8, updates_per_epoch=2, steps=3, epochs=2, batch=16,
        lr=1e-2, min_count=2, sample_every=9, device="cpu", out=folder / "run")

def small_dpok_config(pipeline, folder):
    """The same for dpok.py, on two prompts."""
    (folder / "prompts.txt").write_text("a dog\n\n a white cat \n", encoding="utf-8")
    return dpok.Config(
        model=str(pipeline), reward="jpeg", prompts=str(folder / "prompts.txt"), unseen="a cat",
        samples_per_epoch=8, updates_per_epoch=2, update_batch=12, steps=3, guidance=5.0, epochs=2,
        batch=16, lr=1e-2, weight_decay=1e-4, evaluation_images=2, sample_every=9, device="cpu",
        out=folder / "run")

@pytest.fixture
def config(pipeline, tmp_path):
    return small_config(pipeline, tmp_path)

@pytest.fixture
def dpok_config(pipeline, tmp_path):
    return small_dpok_config(pipeline, tmp_path)

def flags(config, **changes):
    """The command line that gives these settings."""
    settings = dataclasses.asdict(dataclasses.replace(config, **changes))
    return [f"--{name}={value}" for name, value in settings.items() if value not in ([], "")]

def disturb(lora, scale=0.3):
    """Change LoRA as training might: B is no longer 0."""
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
    """Write a reward of one's own -> its name for --reward."""
    (folder / "own.py").write_text(textwrap.dedent(text), encoding="utf-8")
    return f"{folder}/own.py:reward"

def read_log(folder):
    with open(Path(folder, "log.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def last_error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---------- the MDP: one step is a Gaussian
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_the_policys_step_is_ddims_step_at_every_timestep(eta, config):
    """50 rows, each at its own timestep, with the scheduler that load_pipeline makes. Sigma is
    above 0 at the last step too, which it would not be without set_alpha_to_one=False."""
    scheduler = ddpo.load_pipeline(config).scheduler
    scheduler.set_timesteps(50)
    torch.manual_seed(0)
    x_t, eps, noise = torch.randn(3, 50, 4, 8, 8)
    mean, sigma = ddpo.step_distribution(scheduler, eps, scheduler.timesteps, x_t, eta)
    for k, t in enumerate(scheduler.timesteps):
        i = slice(k, k + 1)
        step = scheduler.step(eps[i], t, x_t[i], eta=eta, variance_noise=noise[i]).prev_sample
        torch.testing.assert_close(mean[i] + sigma[k] * noise[i], step, rtol=1e-5, atol=1e-5)
    assert scheduler.timesteps[0] == 981 and scheduler.timesteps[-1] == 1
    assert sigma.shape == (50, 1, 1, 1) and sigma.min() > 0.02 * eta

def test_log_prob_and_kl_are_means_over_the_latent_of_those_of_normal_distributions():
    torch.manual_seed(0)
    x_prev, mean, mean_pre = torch.randn(3, 3, 4, 8, 8)
    sigma = torch.tensor([0.02, 0.1, 0.4]).view(3, 1, 1, 1)
    expected = Normal(mean, sigma).log_prob(x_prev).mean((1, 2, 3))
    torch.testing.assert_close(ddpo.log_prob(x_prev, mean, sigma), expected)
    expected = kl_divergence(Normal(mean, sigma), Normal(mean_pre, sigma)).mean((1, 2, 3))
    torch.testing.assert_close(ddpo.kl_divergence(mean, mean_pre, sigma), expected)

def test_guidance_is_w_times_conditional_plus_one_minus_w_times_unconditional():
    """Rows may be at different timesteps. With guidance 1 the UNet sees each row once, not
    twice."""
    unet = tiny_unet()
    x_t, t, cond = unet_inputs()
    uncond = torch.randn(1, 5, 16)
    rows = []
    with torch.no_grad():
        eps_cond = torch.cat([unet(x_t[i:i + 1], t[i], cond[i:i + 1]).sample for i in range(3)])
        eps_uncond = torch.cat([unet(x_t[i:i + 1], t[i], uncond).sample for i in range(3)])
        unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
        guided = ddpo.predict_noise(unet, x_t, t, cond, uncond, 5.0)
        plain = ddpo.predict_noise(unet, x_t, t, cond, uncond, 1.0)
    torch.testing.assert_close(guided, 5 * eps_cond - 4 * eps_uncond, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, eps_cond, rtol=1e-4, atol=1e-5)
    assert rows == [6, 3]


# ---------- LoRA
def test_fresh_lora_changes_nothing_and_alone_gets_gradients():
    """A is Gaussian with deviation 1 / rank, as in the authors' code; B is 0."""
    unet = tiny_unet()
    inputs = unet_inputs()
    before = unet(*inputs).sample.detach()
    lora = ddpo.add_lora(unet, 4, torch.Generator().manual_seed(7))
    after = unet(*inputs).sample
    after.square().sum().backward()
    assert torch.equal(before, after)
    assert len(lora) == 8 * len(unet.attn_processors)  # A and B of q, k, v and out
    with_gradient = {id(parameter) for parameter in unet.parameters() if parameter.grad is not None}
    assert with_gradient == {id(parameter) for parameter in lora}
    processor = next(iter(unet.attn_processors.values()))
    expected = torch.randn(4, 8, generator=torch.Generator().manual_seed(7)) / 4
    assert torch.equal(processor.A["to_q"].data, expected)
    assert not processor.B["to_q"].any()

def test_with_lora_off_the_unet_is_the_pretrained_one_bit_for_bit():
    unet = tiny_unet()
    inputs = unet_inputs()
    with torch.no_grad():
        before = unet(*inputs).sample
        disturb(ddpo.add_lora(unet, 4))
        tuned = unet(*inputs).sample
        with pytest.raises(KeyError), ddpo.pretrained(unet):
            assert torch.equal(unet(*inputs).sample, before)
            raise KeyError  # LoRA also comes back when an error leaves the context
        assert not torch.allclose(tuned, before)
        assert torch.equal(unet(*inputs).sample, tuned)

def test_stock_diffusers_samples_the_same_images_with_the_saved_lora(config, tmp_path):
    """As in the README: through peft, whose LoRA is W + B A, DDIM with the same eta, the same
    generators. A kept LoRA in a folder next to the newest does not disturb it."""
    config.eta = 0.6
    pipe = load(config)
    prompts = ["cat", "dog"]
    ours = ddpo.sample(pipe, prompts, config, generators(config, 2)).images
    ddpo.save_lora(pipe.unet, tmp_path / "lora")
    ddpo.save_lora(pipe.unet, tmp_path / "lora" / "epoch_0001")
    stock = diffusers.StableDiffusionPipeline.from_pretrained(config.model, safety_checker=None)
    stock.scheduler = diffusers.DDIMScheduler.from_config(
        stock.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    stock.set_progress_bar_config(disable=True)

    def largest_difference():
        theirs = stock(prompts, num_inference_steps=config.steps, guidance_scale=config.guidance,
                       eta=config.eta, generator=generators(config, 2)).images
        difference = np.stack(ours).astype(int) - np.stack(theirs).astype(int)
        return np.abs(difference).max()

    without_lora = largest_difference()
    stock.load_lora_weights(tmp_path / "lora")
    assert largest_difference() <= 1 < without_lora


# ---------- trajectories
def test_a_sample_depends_on_its_seed_epoch_and_index_and_not_on_its_batch(config):
    """Five samples in chunks of two, two and one, and each alone."""
    pipe = load(config)
    prompts = ["cat", "dog", "cow", "bee", "ant"]
    two_at_a_time = dataclasses.replace(config, batch=2)
    together = ddpo.sample(pipe, prompts, two_at_a_time, generators(config, 5))
    for i, prompt in enumerate(prompts):
        alone = ddpo.sample(pipe, [prompt], config, [ddpo.generator(0, 1, i)])
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-4)
    starts = {ddpo.generator(*numbers).initial_seed() for numbers in np.ndindex(3, 3, 3)}
    assert len(starts) == 27
    assert ddpo.generator(2, 3, 4).initial_seed() == 1_016_904_239

def at(pipe, rollout, i, k, config):
    """Evaluate the policy at pairs (i, k) of a rollout -> log p of its actions, KL to the
    pre-trained policy, by torch.distributions."""
    state = rollout.latents[i, k], rollout.timesteps[k], rollout.cond[i], rollout.uncond
    mean, sigma = ddpo.policy(pipe, *state, config)
    with torch.no_grad(), ddpo.pretrained(pipe.unet):
        mean_pre, _ = ddpo.policy(pipe, *state, config)
    log_prob = Normal(mean, sigma).log_prob(rollout.latents[i, k + 1]).mean((1, 2, 3))
    return log_prob, kl_divergence(Normal(mean, sigma), Normal(mean_pre, sigma)).mean((1, 2, 3))

@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_ratio_is_one_before_the_first_update(eta, config):
    """log p, recomputed from the stored latents in another order, is the log p of sampling."""
    config = dataclasses.replace(config, eta=eta)
    pipe = load(config)
    rollout = ddpo.sample(pipe, ["cat", "dog", "cow", "bee"], config, generators(config, 4))
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(config.steps))[torch.randperm(12)]
    i, k = pairs.unbind(1)
    log_prob, _ = at(pipe, rollout, i, k, config)
    torch.testing.assert_close(log_prob, rollout.log_probs[i, k], rtol=0, atol=2e-5)

def test_the_logged_kl_is_the_mean_over_states_with_each_step_equally_often(config, monkeypatch):
    """Eight samples of three steps give nine pairs: three of each step, no sample left out. With
    fresh LoRA the KL is 0."""
    pipe = ddpo.load_pipeline(config)
    lora = ddpo.add_lora(pipe.unet, config.rank)
    rollout = ddpo.sample(pipe, ["cat"] * 8, config, generators(config, 8))

    def estimate(seed):
        rng = torch.Generator().manual_seed(seed)
        return ddpo.kl_to_pretrained(pipe, rollout, config, rng)

    assert estimate(0) == 0
    disturb(lora)
    i, k = torch.cartesian_prod(torch.arange(8), torch.arange(3)).unbind(1)
    exact = at(pipe, rollout, i, k, config)[1].mean().item()
    estimates = [estimate(seed) for seed in range(30)]
    assert exact > 1e-4
    assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / 30**0.5)

    policy = ddpo.policy
    states = []

    def spy(pipe, x_t, t, *others):
        if next(iter(pipe.unet.attn_processors.values())).enabled:  # not the pre-trained policy
            states.extend(zip(x_t, t.tolist()))
        return policy(pipe, x_t, t, *others)

    monkeypatch.setattr(ddpo, "policy", spy)
    estimate(0)
    assert sorted(t for _, t in states) == sorted(3 * rollout.timesteps.tolist())
    for sample in range(8):
        latents = rollout.latents[sample, :3]
        assert any(torch.equal(x_t, latent) for x_t, _ in states for latent in latents)


# ---------- advantages, and an epoch of DDPO
def test_advantages_of_a_worked_example():
    """Cats got 1 and 3, dogs 10 and 20: each is standardised among its own. One fish, fewer than
    min_count = 2, is standardised by the epoch's 1, 3, 10, 20, 6: mean 8, variance (49 + 25 + 4 +
    144 + 4) / 5 = 45.2, so (6 - 8) / 6.723 = -0.2975."""
    def advantages(statistics, prompts, *reward):
        return statistics.update(prompts, torch.tensor(reward)).tolist()

    statistics = ddpo.PromptStatistics(buffer_size=4, min_count=2)
    found = advantages(statistics, ["cat", "cat", "dog", "dog", "fish"], 1.0, 3.0, 10.0, 20.0, 6.0)
    assert found == pytest.approx([-1, 1, -1, 1, -0.2975], abs=1e-4)
    # The cats' next reward is 5, their rewards are 1, 3, 5: mean 3, deviation 1.63299.
    assert advantages(statistics, ["cat"], 5.0) == pytest.approx([2 / 1.63299], abs=1e-4)
    # The buffer holds the last four, 3, 5, 7, 7: mean 5.5, deviation 1.6583, also after resuming.
    resumed = ddpo.PromptStatistics(4, 2)
    resumed.load_state_dict(json.loads(json.dumps(statistics.state_dict())))
    for one in (statistics, resumed):
        advantages(one, ["cat"], 7.0)
        assert advantages(one, ["cat"], 7.0) == pytest.approx([1.5 / 1.6583], abs=1e-4)
    # Equal rewards teach nothing.
    prompts = ["cat"] * 16 + ["dog"] * 4
    assert advantages(ddpo.PromptStatistics(32, 16), prompts, *[0.1] * 20) == [0.0] * 20

@pytest.mark.parametrize("noise_aware", [False, True])
@pytest.mark.parametrize("algo, updates", [("is", 2), ("sf", 1)])
def test_an_epoch_of_training_is_the_algorithm_done_one_pair_at_a_time(
        algo, updates, noise_aware, config):
    """Eight samples of three steps. An update sees all steps of its block of samples, in chunks of
    which the last is smaller. The settings make every factor show; with seed 2 no gradient is so
    small that its sign is a rounding error."""
    c = dataclasses.replace(
        config, algo=algo, updates_per_epoch=updates, epochs=1, kl_weight=0.5, seed=2, eta=0.6,
        advantage_clip=0.8, clip_range=1e-3, weight_decay=0.5, batch=5, noise_aware=noise_aware)
    trained = ddpo.train(c)

    # Setup: the same model, LoRA, prompts and trajectories
    pipe = ddpo.load_pipeline(c)
    lora = ddpo.add_lora(pipe.unet, c.rank, torch.Generator().manual_seed(c.seed))
    optimizer = torch.optim.AdamW(lora, c.lr, weight_decay=c.weight_decay)
    numbers = torch.randint(45, (8,), generator=ddpo.generator(c.seed, 1, 8))
    prompts = [ddpo.PROMPTS["animals"][j] for j in numbers]
    rollout = ddpo.sample(pipe, prompts, c, generators(c, 8))

    # Reference: advantages, and the gradient of each pair by its formula
    reward = rewards.load("jpeg")(rollout.images, prompts)
    advantage = ddpo.PromptStatistics(c.buffer_size, c.min_count).update(prompts, reward)
    assert (advantage.abs() > 0.8).any()
    advantage = advantage.clamp(-0.8, 0.8)
    weights = step_weights(pipe, c)
    norms = []
    for block in torch.arange(8).chunk(updates):
        pairs = torch.cartesian_prod(block, torch.arange(3))
        for i, k in pairs:
            log_prob, kl = at(pipe, rollout, i[None], k[None], c)
            A = advantage[i] * weights[k]
            gain = A * log_prob
            if algo == "is":
                ratio = (log_prob - rollout.log_probs[i, k]).exp()
                clipped = ratio.clamp(1 - c.clip_range, 1 + c.clip_range)
                gain = torch.min(ratio * A, clipped * A)
            ((c.kl_weight * kl - gain) / len(pairs)).backward()
        norms.append(nn.utils.clip_grad_norm_(lora, c.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()

    # Comparison: Adam moves each weight by about lr = 0.01
    assert_same_lora(trained, lora, [np.mean(norms)], 3e-4)

def step_weights(pipe, c):
    """The weights of the steps: 1 or, noise-aware, proportional to sigma (its formula) -> (K,)."""
    if not c.noise_aware:
        return torch.ones(c.steps)
    abar = pipe.scheduler.alphas_cumprod
    t = pipe.scheduler.timesteps
    abar_t, abar_prev = abar[t], abar[(t - 1000 // c.steps).clamp(min=0)]
    sigma = ((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)).sqrt()
    return sigma / sigma.mean()

def assert_same_lora(folder, lora, norms, tolerance):
    """The LoRA of a run and its mean gradient norms are those of the reference."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert [row["grad_norm"] for row in saved["log"]] == pytest.approx(norms, rel=2e-3)
    for a, b in zip(saved["lora"].values(), lora, strict=True):
        torch.testing.assert_close(a, b.data, rtol=0, atol=tolerance)

def test_the_log_averages_over_pairs_and_looks_at_the_ratio_before_the_first_update():
    """Chunks of 64, 64 and 32 pairs. An update that overflowed is not in the mean of the norms."""
    infos = [{"update": 0, "pairs": 64, "clipped": 0.5, "ratio_deviation": 0.1},
             {"update": 0, "pairs": 64, "clipped": 0.25, "ratio_deviation": 0.3},
             {"update": 1, "pairs": 32, "clipped": 1.0, "ratio_deviation": 9.0}]
    row = ddpo.summary(infos, [1.0, math.inf, 2.0], time.time())
    assert row["clipped"] == (32 + 16 + 32) / 160
    assert row["ratio_deviation"] == pytest.approx(0.3)
    assert (row["grad_norm"], row["skipped"]) == (1.5, 1)
    assert not {"update", "pairs"} & row.keys()


# ---------- DPOK
def test_functions_of_one_name_have_one_text_in_both_scripts():
    """Except Config, train and main; so `diff ddpo.py dpok.py` shows what DPOK changes."""
    texts = []
    for script in (ddpo, dpok):
        text = Path(script.__file__).read_text(encoding="utf-8")
        definitions = [node for node in ast.parse(text).body if hasattr(node, "name")]
        texts.append({node.name: ast.get_source_segment(text, node) for node in definitions})
    shared = texts[0].keys() & texts[1].keys() - {"Config", "train", "main"}
    assert len(shared) > 25
    assert [name for name in sorted(shared) if texts[0][name] != texts[1][name]] == []

def test_the_value_network_learns_the_expected_reward_from_state_prompt_and_step():
    """The reward is plus or minus one number of x_t, by the step, plus the prompt's number, plus
    noise. Its error at new states would be at least 1 without the gates of the steps."""
    torch.manual_seed(0)
    value_network = dpok.ValueNetwork((4, 2, 2), 2, steps=2)
    optimizer = torch.optim.AdamW(value_network.parameters(), 3e-3)
    x_t = torch.randn(2000, 4, 2, 2)
    prompt = torch.randint(2, (2000,))
    k = torch.randint(2, (2000,))
    z = torch.eye(2)[prompt]
    expected = x_t[:, 0, 0, 0] * (2 * k - 1) + prompt
    seen = slice(0, 1000)
    new = slice(1000, 2000)
    for _ in range(100):
        reward = expected[seen] + 0.1 * torch.randn(1000)
        loss = (value_network(x_t[seen], z[seen], k[seen]) - reward).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    error = value_network(x_t[new], z[new], k[new]) - expected[new]
    assert error.square().mean() < 0.3

def test_kl_d_and_kl_o_of_a_worked_example():
    """Sigma is 0.5 and 0.1, so 1 / (2 sigma^2) is 2 and 50. x_0 = 0, f_theta = 1 and 0.2, f_pre =
    0.5 and 0, r = 1 and -0.5, gamma = 1. KL-D: 2 * 2 * 1 = 4 and 0.5 * 50 * 0.04 = 1. KL-O: 2 (1 *
    1 + 1 * 0.25) = 2.5 and 50 (-0.5 * 0.04 + 1 * 0.04) = 1. A third pair with r + gamma < 0 counts
    as 0."""
    def latents(*values):
        return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)

    x0, x0_pred, x0_pre = latents(0.0, 0.0, 0.0), latents(1.0, 0.2, 3.0), latents(0.5, 0.0, 1.0)
    sigma = torch.tensor([0.5, 0.1, 0.1]).view(3, 1, 1, 1)
    reward = torch.tensor([1.0, -0.5, -1.5])
    kl_d, info = dpok.supervised_loss(x0_pred, x0, reward, sigma, 1.0)
    kl_o, _ = dpok.supervised_loss(x0_pred, x0, reward, sigma, 1.0, x0_pre)
    assert kl_d.item() == pytest.approx((4 + 1) / 3)
    assert kl_o.item() == pytest.approx((2.5 + 1) / 3)
    assert info["left_out"] == pytest.approx(1 / 3)

def start_by_hand(c):
    """What both algorithms of dpok.py start from -> pipe, LoRA, its optimiser, the prompts."""
    pipe = dpok.load_pipeline(c)
    lora = dpok.add_lora(pipe.unet, c.rank, torch.Generator().manual_seed(c.seed))
    optimizer = torch.optim.AdamW(lora, c.lr, weight_decay=c.weight_decay)
    return pipe, lora, optimizer, dpok.load_prompts(c.prompts)

@pytest.mark.parametrize("noise_aware", [False, True])
def test_two_epochs_of_dpok_are_algorithm_1_done_one_pair_at_a_time(noise_aware, dpok_config):
    """Eight samples of two prompts, two updates of 12 random pairs in chunks of 5, 5 and 2: alpha
    times the clipped ratio times r - V, centred, and beta times the step's KL; then V is fitted."""
    c = dataclasses.replace(
        dpok_config, alpha=3.0, beta=0.5, clip_range=0.05, max_grad_norm=1e9, eta=0.7, batch=5,
        lr=3e-3, weight_decay=0.5, value_lr=1e-2, value_steps=2, noise_aware=noise_aware)
    trained = dpok.train(c)

    # Setup: the same model, LoRA and value network
    pipe, lora, optimizer, texts = start_by_hand(c)
    torch.manual_seed(c.seed)
    value_network = dpok.ValueNetwork((4, 8, 8), 16, c.steps)
    value_optimizer = torch.optim.AdamW(value_network.parameters(), c.value_lr)

    # Reference: both epochs, with the gradient of each pair by its formula
    mean_norms = []
    for epoch in (1, 2):
        rng = dpok.generator(c.seed, epoch, 8)
        prompts = [texts[j] for j in torch.randint(2, (8,), generator=rng)]
        assert len(set(prompts)) == 2
        rollout = dpok.sample(pipe, prompts, c, generators(c, 8, epoch))
        reward = rewards.load("jpeg")(rollout.images, prompts)
        tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt")
        z = pipe.text_encoder(tokens.input_ids).pooler_output
        i, k = torch.cartesian_prod(torch.arange(8), torch.arange(3)).unbind(1)
        states = rollout.latents[i, k], z[i], k
        returns = reward[i]
        advantage = returns - value_network(*states).detach()
        advantage = (advantage - advantage.mean()) * step_weights(pipe, c)[k]
        norms = []
        for rows in torch.randperm(24, generator=rng).split(12):
            for row in rows:
                log_prob, kl = at(pipe, rollout, i[row][None], k[row][None], c)
                ratio = (log_prob - rollout.log_probs[i[row], k[row]]).exp()
                ratio = ratio.clamp(1 - c.clip_range, 1 + c.clip_range)
                ((c.beta * kl - c.alpha * advantage[row] * ratio) / 12).backward()
            norms.append(nn.utils.clip_grad_norm_(lora, 1e9).item())
            optimizer.step()
            optimizer.zero_grad()
        for _ in range(c.value_steps):
            (value_network(*states) - returns).square().mean().backward()
            value_optimizer.step()
            value_optimizer.zero_grad()
        mean_norms.append(np.mean(norms))

    assert_same_lora(trained, lora, mean_norms, 1e-4)

@pytest.mark.parametrize("kl_d", [False, True])
def test_algorithm_2_is_a_weighted_regression_to_noised_images_of_p_pre(kl_d, dpok_config):
    """Sixteen images of two prompts, some with r + gamma < 0. An update has twelve pairs of image
    and step, without the last step: x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise. f is the guided
    prediction of x_0."""
    c = dataclasses.replace(dpok_config, algo="sft", kl_d=kl_d, gamma=0.868, eta=0.7, lr=3e-3,
                            max_grad_norm=1e9, batch=5)
    trained = dpok.train_supervised(c)

    # Setup: the images of the pre-trained model; LoRA is fresh, so p_theta = p_pre
    pipe, lora, optimizer, texts = start_by_hand(c)
    prompts, x_0, reward = [], [], []
    for epoch in (1, 2):
        numbers = torch.randint(2, (8,), generator=dpok.generator(c.seed, epoch, 8))
        new_prompts = [texts[j] for j in numbers]
        rollout = dpok.sample(pipe, new_prompts, c, generators(c, 8, epoch))
        prompts += new_prompts
        x_0 += [*rollout.latents[:, -1]]
        reward += rewards.jpeg(rollout.images, new_prompts).tolist()
    left_out = [r + c.gamma < 0 for r in reward]
    assert 0 < sum(left_out) < 16 and len(set(prompts)) == 2
    cond = dpok.encode_prompts(pipe, prompts)
    abar = pipe.scheduler.alphas_cumprod

    # Reference: both epochs, with the gradient of each pair by its formula
    def predict(x_t, t, i):
        eps = dpok.predict_noise(pipe.unet, x_t, t, cond[i][None], rollout.uncond, c.guidance)
        return (x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()

    mean_norms = []
    for epoch in (1, 2):
        rng = dpok.generator(c.seed, c.epochs + epoch, 0)
        norms = []
        for rows in torch.randperm(32, generator=rng)[:24].split(12):
            noises = torch.randn(12, 1, 4, 8, 8, generator=rng)
            for row, noise in zip(rows, noises):
                i = row // 2
                t = rollout.timesteps[row % 2][None]
                if left_out[i]:
                    continue
                x_t = abar[t].sqrt() * x_0[i] + (1 - abar[t]).sqrt() * noise
                _, sigma = dpok.step_distribution(pipe.scheduler, x_t, t, x_t, c.eta)
                with torch.no_grad(), dpok.pretrained(pipe.unet):
                    f_pre = predict(x_t, t, i)
                f_theta = predict(x_t, t, i)
                if kl_d:
                    squares = (reward[i] + c.gamma) * (x_0[i] - f_theta) ** 2
                else:
                    squares = reward[i] * (x_0[i] - f_theta) ** 2 + c.gamma * (f_pre - f_theta) ** 2
                ((squares / (2 * sigma**2)).mean() / 12).backward()
            norms.append(nn.utils.clip_grad_norm_(lora, 1e9).item())
            optimizer.step()
            optimizer.zero_grad()
        mean_norms.append(np.mean(norms))

    assert_same_lora(trained, lora, mean_norms, 1e-4)

def test_the_updates_of_an_epoch_use_no_pair_twice_before_all_had_their_turn(dpok_config):
    c = dataclasses.replace(dpok_config, updates_per_epoch=5, update_batch=7)
    pairs = torch.cat(dpok.choose_pairs(5, 3, c, torch.Generator().manual_seed(0))).tolist()
    every_pair = torch.cartesian_prod(torch.arange(5), torch.arange(3)).tolist()
    assert len(pairs) == 35
    assert sorted(pairs[:15]) == every_pair and sorted(pairs[15:30]) == every_pair
    assert pairs[:15] != every_pair

def test_the_evaluation_compares_both_models_on_the_same_seeds(dpok_config):
    """Prompts that are trained on and an unseen one. The pre-trained model is the run's with LoRA
    off."""
    c = dataclasses.replace(dpok_config, epochs=1, evaluation_images=4)
    folder = dpok.train(c)
    table = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert [(row["prompt"], row["trained"]) for row in table] == [
        ("a dog", True), ("a white cat", True), ("a cat", False)]
    pipe = dpok.load_pipeline(c)
    for model in ("pretrained", "tuned"):
        images = dpok.sample(pipe, ["a cat"] * 4, c, generators(c, 4, 0)).images
        reward = rewards.jpeg(images, ["a cat"] * 4)
        expected = {"mean": reward.mean().item(), "standard_error": reward.std().item() / 2}
        assert table[2][model] == pytest.approx(expected, rel=1e-3)
        lora = nn.ParameterList(dpok.add_lora(pipe.unet, c.rank))
        lora.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["lora"])
    assert table[2]["pretrained"] != table[2]["tuned"]


# ---------- rewards (those that are models: tests/test_rewards.py)
def test_jpeg_rewards_rank_an_empty_image_above_noise_and_are_minus_each_other():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    images = [Image.new("RGBA", (64, 64), "white"), Image.fromarray(pixels)]
    small = rewards.load("jpeg")(images, ["a", "b"])
    large = rewards.load("incompressibility")(images, ["a", "b"])
    assert small.dtype == torch.float32
    assert torch.equal(small, -large)
    assert small[0] > small[1] + 4

def test_a_reward_of_ones_own_is_a_function_in_a_file_and_its_mistakes_are_named(tmp_path):
    file = tmp_path / "own.py"
    images = [Image.new("L", (64, 64))] * 2

    def reward(name, text, **options):
        file.write_text(f"def f(images, prompts, scale=1):\n    {text}\n", encoding="utf-8")
        return rewards.load(f"{file}:{name}", **options)(images, ["a cat", "a dog"])

    scaled = reward("f", "return [float(scale) * image.width for image in images]", scale="2")
    assert scaled.tolist() == [128, 128]
    mistakes = {
        "return [1.0, float('nan')]": "nan for the prompt 'a dog'",
        "return [1.0]": "shape.*one number for each image",
        "return [[1.0], [2.0]]": "shape.*one number for each image",
        "return 1 / 0": "'a cat'.*division.*line 2 of .*own.py",
        "raise SystemExit": "SystemExit",
        "return [1.0": "was never closed"}
    for text, message in mistakes.items():
        with pytest.raises(ValueError, match=message):
            reward("f", text)
    with pytest.raises(ValueError, match="cannot load"):
        reward("g", "return [0, 1]")
    with pytest.raises(ValueError, match="cannot load"):
        reward("f", "return [0, 1]", colour="red")


# ---------- a run: settings, refusals, what it leaves
def test_settings_are_flags_over_a_file_over_those_of_shapes_over_the_published_ones(tmp_path):
    """shapes/ is the model if none is named and no GPU is used. Each algorithm has its own
    defaults."""
    file = tmp_path / "some.json"
    file.write_text('{"lr": 0.5, "rank": 3, "value": false}', encoding="utf-8")
    given = dpok.parse(["--device=cpu", "--config", str(file), "--rank", "2", "--algo=sft"])
    assert (given.rank, given.lr, given.value, given.batch) == (2, 0.5, False, 64)
    assert given.model == "shapes" and given.max_grad_norm == 0.1
    assert ddpo.parse(["--device=cpu"]).clip_range == 0.0064
    assert ddpo.parse(["--model=shapes"]).clip_range == 0.0064
    assert ddpo.parse(["--model=x"]).clip_range == 1e-4
    assert dpok.parse(["--model=x"]).lr == 1e-5
    assert dpok.parse(["--model=x", "--algo=sft"]).lr == 2e-5
    assert ddpo.parse(["--model=x"]).updates_per_epoch == 4
    assert ddpo.parse(["--model=x", "--algo=sf"]).updates_per_epoch == 1

def test_prompt_sets_are_those_of_the_papers():
    sizes = [len(ddpo.load_prompts(name)) for name in ("animals", "activities", "counting")]
    assert sizes == [45, 135, 315]
    assert "an ant playing chess" in ddpo.load_prompts("activities")
    assert {"two mice", "eight butterflies", "three monkeys"} <= set(ddpo.load_prompts("counting"))
    assert dpok.load_prompts("color") == ["A green colored rabbit"]

REFUSED = {  # flags: a word of the reason
    "ddpo": {
        "--lr nan": "lr (nan)", "--eta 0": "eta (0.0)", "--seed -1": "seed (-1)",
        "--steps 334": "steps (334)", "--algo sf --updates_per_epoch 2": "updates_per_epoch (2)",
        "--samples_per_epoch 9": "samples_per_epoch (9)", "--min_count 33": "min_count (33)",
        "--algo ppo": "'ppo'", "--learning_rate 1": "--learning_rate",
        "--prompts plants": "'plants'", "--prompts plants.txt": "no such file",
        "--prompts shapes": "'shapes'",
        "--reward beauty": "'beauty'", "--reward_options quality": "KEY=VALUE",
        "--config WRONG": "learning_rate", "--config EMPTY": "empty.txt", "--out FULL": "full",
        "--out EMPTY/run": "empty folder", "--model MISFIT": "misfit",
        "--model some.safetensors": "from_single_file", "--resume FULL": "config.json"},
    "dpok": {
        "--steps 501": "steps (501)", "--evaluation_images 1": "evaluation_images (1)",
        "--steps x": "'x'", "--prompts EMPTY": "empty.txt", "--unseen nothing": "'nothing'",
        "--device abacus": "'abacus'", "--model CUT": "cut", "--resume nowhere": "nowhere"}}
CASES = [(script, line) for script, lines in REFUSED.items() for line in lines]

@pytest.mark.parametrize("script, line", CASES)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
        script, line, config, dpok_config, pipeline, tmp_path, monkeypatch, capsys):
    """Each stands for a rule: the range of a number, what must divide what, choices, types, names,
    files. The reason is the last line of stderr."""
    files = {"EMPTY": tmp_path / "empty.txt", "WRONG": tmp_path / "wrong.json",
             "FULL": tmp_path / "full", "CUT": tmp_path / "cut", "MISFIT": tmp_path / "misfit"}
    files["EMPTY"].write_text("\n", encoding="utf-8")
    files["WRONG"].write_text('{"learning_rate": 1}', encoding="utf-8")
    (files["FULL"] / "run").mkdir(parents=True)
    if "CUT" in line:
        shutil.copytree(pipeline, files["CUT"])
        weights = files["CUT"] / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:9999])
    if "MISFIT" in line:
        shutil.copytree(pipeline, files["MISFIT"])
        tiny_unet(cross_attention_dim=24).save_pretrained(files["MISFIT"] / "unet")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reason = REFUSED[script][line]
    for name, file in files.items():
        line = line.replace(name, str(file))
    module, c = (ddpo, config) if script == "ddpo" else (dpok, dpok_config)
    settings = [] if "--resume" in line else flags(c, out="")

    status = module.main([*settings, *line.split()])

    error = last_error(capsys)
    assert status == 2
    assert error.startswith(f"{script}.py: error: ") and reason in error
    assert not list((tmp_path / "here").iterdir()) and not list((files["FULL"] / "run").iterdir())

def contents(run):
    """The files of a run, without its seconds and curves; of the checkpoint, the number of rows."""
    files = {}
    for file in run.rglob("*"):
        if file.is_file() and file.parent.name != "tensorboard":
            files[file.relative_to(run).as_posix()] = file.read_bytes()
    log = read_log(run)
    for row in log:
        del row["seconds"]
    return files | {"log.csv": log, "checkpoint.pt": len(log)}

@pytest.mark.parametrize("algo", ["is", "rl", "sft"])
def test_a_run_leaves_its_folder_and_its_config_repeats_it(algo, config, dpok_config, tmp_path):
    script = ddpo if algo == "is" else dpok
    c = config if algo == "is" else dataclasses.replace(dpok_config, algo=algo)
    assert script.main(flags(c, sample_every=2)) == 0
    run = contents(Path(c.out))
    assert script.main(["--config", f"{c.out}/config.json", "--out", str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again") == run
    expected = {"config.json", "prompts.txt", "log.csv", "checkpoint.pt", "comparison.png",
                "progress.png", "progress.gif", "samples/epoch_0000.png", "samples/epoch_0002.png",
                LORA, LORA.replace("lora/", "lora/epoch_0002/")}
    if script is dpok:
        expected.add("evaluation.json")
    if algo == "sft":
        expected |= {"data/epoch_0001.pt", "data/epoch_0002.pt"}
    assert run.keys() == expected
    for row in run["log.csv"]:
        assert float(row["kl"]) > 0 and float(row["grad_norm"]) > 0
        assert float(row.get("ratio_deviation", 0)) < 1e-4

def test_a_run_stops_when_the_kl_passes_its_bound_and_a_penalty_holds_the_kl_back(config, tmp_path):
    run = ddpo.train(dataclasses.replace(config, epochs=5, max_kl=1e-9))
    assert len(read_log(run)) == 1 and (run / "comparison.png").exists()
    assert not ddpo.finished([{"kl": 1.0}], dataclasses.replace(config, max_kl=0.5))  # of five
    kl = {}
    for weight in (0.0, 100.0):
        c = dataclasses.replace(config, epochs=3, kl_weight=weight, out=str(tmp_path / str(weight)))
        kl[weight] = float(read_log(ddpo.train(c))[-1]["kl"])
    assert kl[100.0] < 0.7 * kl[0.0]



# ---------- runs that continue
def test_a_resumed_run_of_algorithm_2_keeps_its_data(dpok_config, tmp_path, capsys):
    """It is interrupted in the third of four epochs of data: the first two are kept."""
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
    pictures, data, evaluation = 16, 8, 2
    assert dpok.main(flags(c)) == 130
    assert last_error(capsys).endswith("error: interrupted")
    assert sys.modules["reward_own"].calls == [pictures, data, data, data]
    assert dpok.main(["--resume", c.out]) == 0
    expected = [pictures, data, data, pictures] + [evaluation] * 6  # three prompts, two models
    assert sys.modules["reward_own"].calls == expected

def test_a_finished_run_can_be_made_longer(config, tmp_path):
    longer = tmp_path / "longer"
    at_once = tmp_path / "at_once"
    assert ddpo.main(flags(config, out=longer)) == 0
    assert ddpo.main(flags(config, epochs=3, out=at_once)) == 0
    assert ddpo.main(["--resume", str(longer), "--epochs", "3"]) == 0
    assert contents(longer)["log.csv"] == contents(at_once)["log.csv"]
    assert (longer / LORA).read_bytes() == (at_once / LORA).read_bytes()


# ---------- runs in processes of their own, which are started before all tests
def start(script, arguments, output, **environment):
    """Start a script in a process of its own, its output going to a file."""
    with open(output, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, script, *arguments], cwd=ROOT, stdout=file, stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)

def run_and_kill(script, c, moment):
    """Run a script and kill it some seconds after its first checkpoint -> its exit status."""
    checkpoint = Path(c.out, "checkpoint.pt")
    output = Path(c.out).with_suffix(".txt")
    process = start(script, flags(c), output)
    while process.poll() is None:
        if checkpoint.exists():
            time.sleep(moment)
            process.kill()
        time.sleep(0.01)
    return process.wait()

def run_on_two_processes(script, c):
    """Run a script on two processes, with the environment that torchrun sets -> their exit
    statuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    output = Path(c.out).with_suffix(".txt")
    processes = []
    for rank in ("0", "1"):
        processes.append(start(script, flags(c), output, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    return [process.wait() for process in processes]

@pytest.fixture(scope="session", autouse=True)
def started(request, pipeline, tmp_path_factory):
    """Start what the tests below compare -> {(what, script): (its settings, a future status)}."""
    if not any("process" in item.name for item in request.session.items):
        yield {}
        return
    runs = {}
    with ThreadPoolExecutor(1) as background:
        for script, make_config, moment in (("ddpo.py", small_config, 0),
                                            ("dpok.py", small_dpok_config, 0.3)):
            folder = tmp_path_factory.mktemp("started")
            c = dataclasses.replace(make_config(pipeline, folder), epochs=4, sample_every=2,
                                    noise_aware=script == "dpok.py")
            runs["killed", script] = c, background.submit(run_and_kill, script, c, moment)
            folder = tmp_path_factory.mktemp("started")
            name = own_reward(folder, """
                import numpy as np
                def reward(images, prompts):
                    return [float(np.asarray(image).mean()) for image in images]""")
            c = make_config(pipeline, folder)
            c = dataclasses.replace(c, reward=name, batch=3, lr=3e-4, clip_range=0.1,
                                    noise_aware=script == "ddpo.py")
            runs["two", script] = c, background.submit(run_on_two_processes, script, c)
        yield runs

@pytest.mark.parametrize("script", [ddpo, dpok])
def test_a_killed_process_continues_as_if_it_had_not_been_killed(script, started, tmp_path, capsys):
    """Log, pictures, LoRA and evaluation are the same, bit for bit."""
    c, status = started["killed", f"{script.__name__}.py"]
    assert script.main(flags(c, out=tmp_path / "whole")) == 0
    assert status.result() != 0 and len(read_log(c.out)) < 4
    assert script.main(["--resume", c.out]) == 0
    printed = capsys.readouterr().out
    assert any(f"starts at epoch {epoch} of 4" in printed for epoch in (2, 3, 4))
    assert contents(Path(c.out)) == contents(tmp_path / "whole")

@pytest.mark.parametrize("script", [ddpo, dpok])
def test_two_processes_are_one_with_the_same_samples(script, started, tmp_path):
    """The same LoRA and log, except for ratio_deviation, up to rounding, with a smooth reward.
    Process 0 alone speaks."""
    c, statuses = started["two", f"{script.__name__}.py"]
    assert script.main(flags(c, out=tmp_path / "one")) == 0
    assert statuses.result() == [0, 0]
    for one, two in zip(read_log(tmp_path / "one"), read_log(c.out), strict=True):
        for name in one.keys() - {"seconds", "ratio_deviation"}:
            tolerance = {"abs": 2e-3 if "reward" in name else 1e-5, "rel": 1e-3}
            assert float(two[name]) == pytest.approx(float(one[name]), **tolerance), name
    two = load_file(Path(c.out, LORA))
    for name, tensor in load_file(tmp_path / "one" / LORA).items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=3e-6)
    printed = Path(c.out).with_suffix(".txt").read_text(encoding="utf-8")
    assert printed.count("epoch 2/2") == printed.count("progress.png") == 1
