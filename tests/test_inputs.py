"""Inputs from users' bug reports: each is one member of a kind, and ends as a user would expect.

    python -m pytest -q tests/test_inputs.py   # three minutes
"""
import ast
import csv
import dataclasses
import datetime
import json
import math
import pickle
import shutil
import sys
import types
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import ddpo
import dpok
import rewards
from test_ddpo import (LORA, ROOT, config, contents, dpok_config, flags, last_error,  # noqa: F401
                       own_reward, pipeline, read_log)

torch.set_num_threads(1)


def changed_model(pipeline, folder, part, change):
    """Copy the random pipeline and change the weights of a part: change(weights) edits a dict."""
    shutil.copytree(pipeline, folder)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return folder


def changed_settings(pipeline, folder, **changes):
    """Copy the random pipeline and change the settings of its UNet."""
    shutil.copytree(pipeline, folder)
    file = folder / "unet" / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder


# ---------- 1, 2: numbers that are not finite

@pytest.mark.parametrize("part, layer", [("vae", "decoder.conv_out.weight"),
                                         ("unet", "conv_out.weight")])
def test_no_image_is_made_of_numbers_that_overflow_in_fp16(
        part, layer, pipeline, config, tmp_path, capsys):
    """A black image is a small file, which jpeg would reward most. The largest weight becomes
    60,000, which is in the range of fp16; what the layer gives is not."""
    def scale(weights):
        weights[layer] *= 60_000 / weights[layer].abs().max()
        assert weights[layer].half().isfinite().all()

    model = changed_model(pipeline, tmp_path / "model", part, scale)
    half = flags(config, model=str(model), precision="fp16", epochs=1)
    assert ddpo.main(half) == 2
    error = last_error(capsys)
    assert "infinite or NaN" in error and "--precision fp32" in error
    assert not list(Path(config.out, "samples").iterdir())
    assert not Path(config.out, "log.csv").exists()
    if part == "vae":
        assert ddpo.main([*half, "--precision=fp32"]) == 0


def test_weights_that_become_nan_stop_the_run_and_are_not_saved(config, monkeypatch):
    """The last update of the second epoch spoils LoRA. Without the check of the KL it would be
    saved."""
    step = torch.optim.AdamW.step
    calls = []

    def spoil(self, *arguments):
        step(self, *arguments)
        calls.append(1)
        if len(calls) == 4:
            self.param_groups[0]["params"][1].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(ValueError, match="the KL to the pre-trained model is nan"):
        ddpo.train(config)
    assert len(read_log(config.out)) == 1
    assert all(tensor.isfinite().all() for tensor in load_file(Path(config.out, LORA)).values())


def test_half_precision_keeps_lora_in_float32_and_skips_updates_that_overflow(config):
    """GradScaler starts at 65,536 and halves it at each overflow. In fp32 such a gradient stops the
    run."""
    c = dataclasses.replace(config, precision="fp16")
    lora = [nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.AdamW(lora, 0.1)
    scaler = torch.amp.GradScaler("cpu")
    lora[0].grad = scaler.scale(torch.tensor([1.0, math.inf, 1.0]))
    assert not math.isfinite(ddpo.optimizer_step(lora, optimizer, scaler, c))
    assert not lora[0].any() and scaler.get_scale() == 2**15
    lora[0].grad = scaler.scale(torch.tensor([3.0, 4.0, 0.0]))
    assert ddpo.optimizer_step(lora, optimizer, scaler, c) == pytest.approx(5)
    assert lora[0].tolist() == pytest.approx([-0.1, -0.1, 0.0], abs=1e-3)
    lora[0].grad = torch.tensor([1.0, math.inf, 1.0])
    with pytest.raises(ValueError, match="gradient is inf.*lr below 0.01"):
        ddpo.optimizer_step(lora, optimizer, torch.amp.GradScaler("cpu", enabled=False), c)

    run = ddpo.train(c)
    assert {tensor.dtype for tensor in load_file(run / LORA).values()} == {torch.float32}
    assert torch.load(run / "checkpoint.pt", weights_only=True)["scaler"]["scale"] <= 2**16


# ---------- 3, 4: resuming

def test_a_run_with_a_log_or_a_lora_and_no_checkpoint_is_not_begun_again(config, capsys):
    run = ddpo.train(config)
    (run / "checkpoint.pt").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert ddpo.main(["--resume", str(run)]) == 2
    assert "has no checkpoint.pt" in last_error(capsys)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_without_a_first_checkpoint_starts_again_and_says_so(config, tmp_path, capsys):
    """It ends in the reward of its first epoch; its settings must stay, too."""
    name = own_reward(tmp_path, f"""
        import pathlib
        once = pathlib.Path({str(tmp_path)!r}, "once")
        def reward(images, prompts):
            if once.exists():
                return [float(len(prompt)) for prompt in prompts]
            if len(images) == 8:
                once.touch()
                raise KeyboardInterrupt
            return [0.0] * len(images)""")
    assert ddpo.main(flags(config, reward=name)) == 130
    assert ddpo.main(["--resume", config.out, "--rank=2"]) == 2
    assert "rank was 4" in last_error(capsys)
    assert ddpo.main(["--resume", config.out]) == 0
    assert "starts at epoch 1 of 2" in capsys.readouterr().out
    assert len(read_log(config.out)) == 2


@pytest.mark.parametrize("how", ["flag", "edit"])
def test_what_may_change_on_resuming_takes_effect_and_the_rest_is_refused(how, config, capsys):
    """AdamW's state would bring the old lr back."""
    run = ddpo.train(config)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))

    def resume(**changes):
        if how == "flag":
            return ddpo.main(["--resume", str(run), *(f"--{k}={v}" for k, v in changes.items())])
        (run / "config.json").write_text(json.dumps(settings | changes), encoding="utf-8")
        return ddpo.main(["--resume", str(run)])

    allowed = {"epochs": 3, "lr": 0.02, "batch": 3, "sample_every": 2, "max_kl": 100.0,
               "kl_weight": 0.5, "precision": "fp16"}
    assert resume(**allowed) == 0
    assert json.loads((run / "config.json").read_text(encoding="utf-8")) == settings | allowed
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.02
    assert saved["settings"] == settings | allowed and len(saved["log"]) == 3
    for name, value in {"guidance": 3.0, "rank": 2, "eta": 0.5, "seed": 1, "steps": 4}.items():
        settings = settings | allowed
        assert resume(**{name: value}) == 2
        error = last_error(capsys)
        assert name in error and "cannot change" in error
    assert len(read_log(run)) == 3


def test_algorithm_2_keeps_its_epochs_on_resuming_as_its_data_depend_on_them(dpok_config, capsys):
    run = dpok.train_supervised(dataclasses.replace(dpok_config, algo="sft"))
    assert dpok.main(["--resume", str(run), "--epochs=3"]) == 2
    assert "epochs was 2" in last_error(capsys)


def test_a_resumed_run_keeps_its_folder_and_its_file_of_settings(config, tmp_path, capsys):
    run = ddpo.train(config)
    assert ddpo.main(["--resume", str(run), "--out", str(tmp_path / "other")]) == 2
    assert "out was ''" in last_error(capsys) and not (tmp_path / "other").exists()
    assert ddpo.main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert "it has no config.json" in last_error(capsys)
    (tmp_path / "more.json").write_text('{"epochs": 3, "seed": 0}', encoding="utf-8")
    arguments = ["--resume", str(run), "--config", str(tmp_path / "more.json"), "--lr", "0.5"]
    assert [ddpo.parse(arguments).epochs, ddpo.parse(arguments).lr] == [3, 0.5]


@pytest.mark.parametrize("script", [ddpo, dpok])
def test_a_run_from_before_a_setting_goes_on_with_its_default(script, config, dpok_config):
    """On shapes/ too, whose settings are those of new runs."""
    run = script.train(config if script is ddpo else dpok_config)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    del settings["noise_aware"]
    (run / "config.json").write_text(json.dumps(settings | {"model": "shapes"}), encoding="utf-8")
    assert not script.parse(["--resume", str(run)]).noise_aware
    assert script.parse(["--model", "shapes"]).noise_aware

    (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved["settings"]["noise_aware"]
    torch.save(saved, run / "checkpoint.pt")
    later = script.parse(["--resume", str(run), "--epochs", "3", "--noise_aware"])
    with pytest.raises(ValueError, match="noise_aware was False"):
        script.train(later)
    assert len(read_log(script.train(dataclasses.replace(later, noise_aware=False)))) == 3


# ---------- 5, 12: folders

def test_two_runs_that_start_at_once_have_own_folders(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    c = dataclasses.replace(config, out="", epochs=1)
    folders = {ddpo.train(c), ddpo.train(c)}
    assert len(folders) == 2 and all(folder.parent.name == "runs" for folder in folders)

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1)

    monkeypatch.setattr(ddpo, "datetime", Frozen)
    first = contents(ddpo.train(c))
    assert ddpo.main(flags(c)) == 2
    assert "cannot make" in last_error(capsys)
    assert contents(Path("runs/ddpo-jpeg-20260101-000000-000000")) == first


def test_what_a_failed_run_left_may_be_used_again_and_other_folders_not(config, tmp_path, capsys):
    failing = own_reward(tmp_path, "def reward(images, prompts):\n    return 1 / 0")
    assert ddpo.main(flags(config, reward=failing)) == 2
    assert Path(config.out, "config.json").exists()
    Path(config.out, "evaluation.part").touch()  # of a write that a kill has cut short
    assert ddpo.main(flags(config)) == 0
    assert ddpo.main(flags(config)) == 2  # it has a checkpoint now
    assert "not an empty folder" in last_error(capsys)
    for names in (["notes.txt"], ["config.json", "prompts.txt"], ["samples/mine.png", "notes.txt"]):
        folder = tmp_path / "-".join(names).replace("/", "-")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("mine", encoding="utf-8")
        assert ddpo.main(flags(config, out=folder)) == 2
        assert "not an empty folder" in last_error(capsys)
        assert {(folder / name).read_text(encoding="utf-8") for name in names} == {"mine"}


def test_a_failed_run_of_algorithm_2_leaves_no_data_to_its_successor(dpok_config, tmp_path):
    """Other settings make other images."""
    name = own_reward(tmp_path, f"""
        import pathlib
        calls, once = [], pathlib.Path({str(tmp_path)!r}, "once")
        def reward(images, prompts):
            calls.append(1)
            if len(calls) == 3 and not once.exists():
                once.touch()
                raise KeyboardInterrupt
            return [float(image.getpixel((0, 0))[0]) for image in images]""")
    c = dataclasses.replace(dpok_config, algo="sft", reward=name)
    assert dpok.main(flags(c)) == 130
    data = Path(c.out, "data", "epoch_0001.pt")
    before = torch.load(data, weights_only=True)
    assert dpok.main(flags(c, guidance=2.0)) == 0
    assert not torch.equal(torch.load(data, weights_only=True)[0], before[0])


# ---------- 6, 7: settings from Python and from files

@pytest.mark.parametrize("change", [
    {"algo": "ppo"}, {"precision": "bf16"}, {"lr": "3e-4"}, {"lr": None}, {"epochs": 2.5},
    {"rank": True}, {"compile": "yes"}, {"prompts": 3}, {"reward_options": "a=b"},
    {"reward_options": None}, {"eta": float("nan")}, {"steps": 334}, {"batch": 0}])
def test_python_and_json_are_checked_as_strictly_as_flags(change, config, tmp_path, capsys):
    (name, value), = change.items()
    with pytest.raises(ValueError, match=name):
        ddpo.train(dataclasses.replace(config, **change))
    file = tmp_path / "settings.json"
    settings = dataclasses.asdict(config) | change
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert ddpo.main(["--config", str(file)]) == 2
    assert name in last_error(capsys)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("text, word", [('["lr"]', "settings file"), ("{", "settings file"),
                                        ('{"learning_rate": 1}', "learning_rate")])
def test_a_file_of_settings_that_cannot_be_used_is_refused(text, word, tmp_path, capsys):
    file = tmp_path / "settings.json"
    file.write_text(text, encoding="utf-8")
    assert ddpo.main(["--config", str(file)]) == 2
    assert word in last_error(capsys)


def test_the_model_in_shapes_brings_its_settings_by_name_and_other_folders_bring_none(
        tmp_path, monkeypatch):
    by_name = ddpo.parse(["--model", "shapes"])
    assert by_name == ddpo.parse(["--device", "cpu"])
    assert (by_name.clip_range, by_name.steps) == (0.0064, 10)
    assert ddpo.parse(["--model", str(ROOT / "shapes")]).steps == 10
    downloaded = tmp_path / "shapes"
    downloaded.mkdir()
    (downloaded / "ddpo.json").write_text('{"reward": "evil.py:run"}', encoding="utf-8")
    assert ddpo.parse(["--model", str(downloaded)]).reward == "jpeg"
    assert ddpo.parse(["--model", str(downloaded)]).steps == 50
    monkeypatch.chdir(ROOT / "shapes")
    assert ddpo.parse(["--device", "cuda"]).model == ddpo.Config.model
    assert ddpo.parse(["--device", "cuda"]).steps == 50


def test_files_are_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "settings.json"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text('{"prompts": "a täst"}', encoding=encoding)
        assert ddpo.parse(["--config", str(file), "--model=x"]).prompts == "a täst"
        (tmp_path / "prompts.txt").write_text("a Bär\r\nкот\n", encoding=encoding)
        assert ddpo.load_prompts(str(tmp_path / "prompts.txt")) == ["a Bär", "кот"]


def text_without_encoding(file):
    """Find the calls in a Python file that read or write text in the encoding of the machine."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        has_encoding = "encoding=" in ast.unparse(node) or "utf-8-sig" in ast.unparse(node)
        is_binary = owner == "Image" or "'wb'" in ast.unparse(node) or "'rb'" in ast.unparse(node)
        if name in ("read_text", "write_text", "open") and not has_encoding and not is_binary:
            yield f"{file.name}:{node.lineno}"


def test_every_file_is_opened_with_its_encoding():
    """Otherwise it would be that of the machine, cp1252 on Windows."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    lacking = []
    for file in files:
        lacking += text_without_encoding(file)
    assert len(files) > 15 and lacking == []


# ---------- 8: prompts

@pytest.mark.parametrize("name, reason", [
    ("twoo.txt", "no such file"), ("my prompts.txt", "no such file"), ("lists/two", "no such file"),
    ("cat", "a quoted phrase of several words"), ("", "cannot read"), ("shapes", "cannot read")])
def test_prompts_that_are_not_there_are_named_with_what_is_expected(name, reason):
    with pytest.raises(ValueError, match=reason):
        ddpo.load_prompts(name)


def test_a_resumed_run_keeps_the_text_of_its_prompts(dpok_config, tmp_path, monkeypatch):
    """It is resumed in another folder, and its files of prompts are gone."""
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    Path("mine.txt").write_text("a dog\n a white cat \n", encoding="utf-8")
    Path("unseen.txt").write_text("a cow\n", encoding="utf-8")
    c = dataclasses.replace(dpok_config, prompts="mine.txt", unseen="unseen.txt", epochs=1)
    assert dpok.main(flags(c)) == 0
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "second")
    assert dpok.main(["--resume", c.out, "--epochs=2"]) == 0
    table = json.loads(Path(c.out, "evaluation.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in table] == ["a dog", "a white cat", "a cow"]


# ---------- 9, 10, 11: models

@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("fp16", torch.float16)])
def test_a_folder_that_has_only_fp16_files_is_loaded(precision, dtype, pipeline, config, tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    files = [file.name for file in (tmp_path / "half" / "unet").glob("*.safetensors")]
    assert files == ["diffusion_pytorch_model.fp16.safetensors"]
    c = dataclasses.replace(config, model=str(tmp_path / "half"), precision=precision)
    loaded = ddpo.load_pipeline(c)
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {dtype}
    assert torch.equal(loaded.unet.conv_in.weight.float(), pipe.unet.conv_in.weight.float())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_as_model_is_refused_with_the_way_to_make_a_folder_of_it(
        suffix, config, tmp_path, capsys):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"weights")
    assert ddpo.main(flags(config, model=str(file))) == 2
    error = last_error(capsys)
    assert "from_single_file" in error and "save_pretrained" in error and "PosixPath" not in error


@pytest.mark.parametrize("size", [[8, 12], None])
def test_latents_that_are_not_square_are_refused(size, pipeline, config, tmp_path, capsys):
    model = changed_settings(pipeline, tmp_path / "model", sample_size=size)
    assert ddpo.main(flags(config, model=str(model))) == 2
    assert "sample_size" in last_error(capsys)


# ---------- 13: rewards

def test_a_reward_may_import_what_lies_next_to_it_and_return_scores_with_info(tmp_path):
    (tmp_path / "my_helper.py").write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    name = own_reward(tmp_path, """
        import my_helper
        def reward(images, prompts):
            scores = [my_helper.double(image.width) for image in images]
            return scores, {"what": "the convention of TRL"}""")
    assert rewards.load(name)([Image.new("L", (64, 64))], ["a"]).tolist() == [128]


def test_a_reward_cannot_change_the_pictures_or_the_prompts(config, tmp_path):
    """The pictures of a run are those of a run with a reward that does not touch its images."""
    touching = own_reward(tmp_path, """
        def reward(images, prompts):
            for image in images:
                image.thumbnail((2, 2))
                image.paste(0, (0, 0, 2, 2))
            prompts.sort()
            return [0.0] * len(images)""")
    touched = contents(ddpo.train(dataclasses.replace(config, reward=touching)))
    plain = own_reward(tmp_path, "def reward(images, prompts):\n    return [0.0] * len(images)")
    c = dataclasses.replace(config, reward=plain, out=tmp_path / "plain")
    untouched = contents(ddpo.train(c))
    assert touched["samples/epoch_0002.png"] == untouched["samples/epoch_0002.png"]


def test_a_reward_that_fails_is_told_apart_from_one_that_returns_something_else(tmp_path):
    images = [Image.new("L", (64, 64))]
    down = own_reward(tmp_path, """
        def reward(images, prompts):
            raise ConnectionError("server down")""")
    with pytest.raises(ValueError, match="'a cat'.*server down") as error:
        rewards.load(down)(images, ["a cat"])
    assert "one number" not in str(error.value)
    (tmp_path / "module.py").write_text(
        "import torch\ndef reward(images, prompts):\n    return torch.nn.Linear(2, 2)(images)",
        encoding="utf-8")  # torch has a module.py too
    with pytest.raises(ValueError, match="line 3 of .*module.py") as error:
        rewards.load(f"{tmp_path / 'module.py'}:reward")(images, ["a cat"])
    assert str(error.value).count("module.py") == 2
    nothing = own_reward(tmp_path, "def reward(images, prompts):\n    return None")
    with pytest.raises(ValueError, match="one number for each image"):
        rewards.load(nothing)(images, ["a cat"])


def test_a_reward_of_ones_own_may_name_its_batch_by_an_option(tmp_path):
    name = own_reward(tmp_path, """
        class reward:
            def __init__(self, device, batch):
                self.batch = batch  # text, as the command line has it
            def __call__(self, images, prompts):
                return [len(images)] * len(images)""")
    images = [Image.new("L", (64, 64))] * 3
    assert rewards.load(name, batch="2")(images, ["a", "b", "c"]).tolist() == [2, 2, 1]


def test_a_reward_that_fails_stops_the_run_and_what_was_saved_is_kept(config, tmp_path, capsys):
    """The reward is called for the first pictures, for epoch 1, and fails in epoch 2."""
    name = own_reward(tmp_path, """
        calls = []
        def reward(images, prompts):
            calls.append(1)
            if len(calls) == 3:
                return [float("nan")] * len(images)
            return [image.getpixel((0, 0))[0] for image in images]""")
    assert ddpo.main(flags(config, reward=name)) == 2
    assert "nan for the prompt" in last_error(capsys)
    assert len(read_log(config.out)) == 1 and Path(config.out, LORA).exists()


def test_options_of_a_reward_are_refused_before_a_model_is_loaded(config, capsys):
    for option in ("batch=0", "batch=many", "quality=3", "name=x"):
        reward = "aesthetic" if "batch" in option else "jpeg"
        assert ddpo.main([*flags(config, reward=reward), "--reward_options", option]) == 2
        assert reward in last_error(capsys)
        assert not Path(config.out).exists()


# ---------- 14, 15: what the machine does

def test_a_broken_tensorboard_is_a_warning_and_a_run_has_one_file_of_curves(
        config, tmp_path, monkeypatch, capsys):
    run = ddpo.train(dataclasses.replace(config, epochs=3))
    assert len(list((run / "tensorboard").iterdir())) == 1
    broken = types.ModuleType("torch.utils.tensorboard")

    def fail(name):
        raise RuntimeError("protobuf is too new")

    broken.__getattr__ = fail
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    run = ddpo.train(dataclasses.replace(config, out=tmp_path / "without"))
    assert "no curves for TensorBoard: protobuf is too new" in capsys.readouterr().out
    assert len(read_log(run)) == 2


SAVE_IMAGE = Image.Image.save


def no_space(*arguments, **named):
    raise RuntimeError("PytorchStreamWriter failed writing file")


def no_space_for_pictures(image, file, *others, **named):
    if isinstance(file, Path):  # not the JPEG in memory of a reward
        no_space()
    SAVE_IMAGE(image, file, *others, **named)


@pytest.mark.parametrize("algo", ["is", "rl", "sft"])
@pytest.mark.parametrize("owner, name", [
    (torch, "save"), (Image.Image, "save"),
    (diffusers.StableDiffusionPipeline, "save_lora_weights"), (Path, "mkdir"),
    (Path, "write_text"), (csv.DictWriter, "writerows")])
def test_a_full_disk_ends_in_one_line_wherever_it_happens(
        owner, name, algo, config, dpok_config, monkeypatch, capsys):
    script = ddpo if algo == "is" else dpok
    c = config if algo == "is" else dataclasses.replace(dpok_config, algo=algo)
    fail = no_space_for_pictures if owner is Image.Image else no_space
    monkeypatch.setattr(owner, name, fail)
    assert script.main(flags(c)) == 2
    error = last_error(capsys)
    assert "cannot" in error and "PytorchStreamWriter" in error


# ---------- 16: the evaluation

def test_the_evaluation_is_announced_can_be_skipped_and_keeps_what_is_finished(
        dpok_config, tmp_path, capsys):
    """The reward is interrupted at the second model of the second prompt; two of three prompts are
    left to the resumed run."""
    name = own_reward(tmp_path, f"""
        import pathlib
        calls, once = [], pathlib.Path({str(tmp_path)!r}, "once")
        def reward(images, prompts):
            calls.append(len(images))
            if calls.count(2) == 4 and not once.exists():
                once.touch()
                raise KeyboardInterrupt
            return [float(len(prompt)) for prompt in prompts]""")
    c = dataclasses.replace(dpok_config, reward=name)
    assert dpok.main(flags(c)) == 130
    printed = capsys.readouterr().out
    announced = printed.index("evaluation at the end: 12 images of 3 prompts")
    assert announced < printed.index("epoch 1/2")
    assert dpok.main(["--resume", c.out]) == 0
    assert sys.modules["reward_own"].calls == [2] * 4
    table = json.loads(Path(c.out, "evaluation.json").read_text(encoding="utf-8"))
    assert all(row["tuned"]["mean"] == len(row["prompt"]) for row in table)

    skipped = dpok.train(dataclasses.replace(c, evaluation_images=0, out=tmp_path / "skipped"))
    assert not (skipped / "evaluation.json").exists() and (skipped / "progress.png").exists()


def test_a_run_that_is_made_longer_is_evaluated_again(dpok_config):
    run = dpok.train(dataclasses.replace(dpok_config, epochs=1))
    before = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert dpok.main(["--resume", str(run), "--epochs=2"]) == 0
    after = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["epoch"] for row in before] == [1, 1, 1]
    assert [row["epoch"] for row in after] == [2, 2, 2]
    assert before[0]["pretrained"] == after[0]["pretrained"]
    assert before[0]["tuned"] != after[0]["tuned"]


def test_a_run_whose_checkpoint_is_damaged_is_refused_and_left_as_it_is(config, capsys):
    folder = Path(config.out)
    assert ddpo.main(flags(config)) == 0
    file = folder / "checkpoint.pt"
    whole = file.read_bytes()
    saved = torch.load(file, weights_only=True)

    def cut():
        file.write_bytes(whole[:5000])

    def other_pickle():
        file.write_bytes(pickle.dumps({"log": Path}, protocol=2))

    def other_shape():
        torch.save(saved | {"lora": {"0": torch.zeros(1)}}, file)

    for damage in (cut, other_pickle, other_shape):
        damage()
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert ddpo.main(["--resume", str(folder)]) == 2
        assert "cannot resume from" in last_error(capsys)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------- 17: captions

@pytest.mark.skipif(not any(Path(folder).expanduser().exists() for folder in rewards.FONT_FOLDERS),
                    reason="no fonts on this machine")
@pytest.mark.parametrize("text", ["a plain cat", "ein süßer Bär", "кот\tна луне"])
def test_captions_are_letters_wherever_the_machine_has_a_font_for_them(text, config, tmp_path):
    font = rewards.caption_font(text)
    missing = bytes(font.getmask("\uffff"))
    assert [c for c in text if c.isprintable() and bytes(font.getmask(c)) == missing] == []
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    c = dataclasses.replace(config, prompts=str(tmp_path / "prompts.txt"), epochs=1)
    assert (ddpo.train(c) / "progress.png").exists()


# ---------- a run shows where it is

def test_the_line_of_an_epoch_begins_with_how_many_and_ends_with_the_time_left(config, capsys):
    ddpo.train(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert all(line.endswith(" left") for line in lines) and lines[1].endswith("0:00:00 left")
    assert "reward_mean" in lines[0] and "skipped" not in lines[0] and "gpu_gb" not in lines[0]
    assert {"skipped", "gpu_gb", "seconds"} <= read_log(config.out)[0].keys()


def test_sampling_updates_data_pictures_and_evaluation_have_a_bar(dpok_config, capsys):
    for algo, titles in {"rl": ["sampling", "updates", "pictures", "evaluation"],
                         "sft": ["data", "sampling", "updates"]}.items():
        out = f"{dpok_config.out}-{algo}"
        assert dpok.main(flags(dataclasses.replace(dpok_config, algo=algo, out=out, epochs=1))) == 0
        printed = capsys.readouterr().err
        assert [title for title in titles if f"{title}:" not in printed] == []


def test_the_lora_of_each_picture_is_kept(config):
    """So that the last good one can be picked by hand after a collapse (appendix A)."""
    run = ddpo.train(dataclasses.replace(config, epochs=3, sample_every=2))
    kept = sorted(path.parent.name for path in (run / "lora").glob("*/*.safetensors"))
    assert kept == ["epoch_0002", "epoch_0003"]
    newest = (run / LORA).read_bytes()
    assert (run / "lora/epoch_0003/pytorch_lora_weights.safetensors").read_bytes() == newest
    assert (run / "lora/epoch_0002/pytorch_lora_weights.safetensors").read_bytes() != newest
