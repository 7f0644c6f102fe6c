"""The rewards that are models equal the original packages, on small checkpoints in their own formats.

    python -m pytest -q experiments/test_rewards.py                   without a network, within half a minute
    python -m pytest -q -s experiments/test_rewards.py -k operations  what scoring costs beside an epoch

The scores were recorded from the original packages on the checkpoints that `fill` makes of integers alone.
"""
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: a hub id that is not on this machine fails at once
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.convert_slow_tokenizer import bytes_to_unicode

import rewards

torch.set_num_threads(1)


def noise_image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def fill(key, shape, gain=3.0):
    """Weights from integers alone, the same on every version of torch: those of the recorded scores."""
    i = torch.arange(math.prod(shape)) + zlib.crc32(key.encode()) % 1_000_003
    x = ((i * i % 65521 * 7919 + i * 104729) % 65521).double() / 65521 - 0.5
    norm = "norm" in key.lower() and key.endswith("weight")
    x = x * gain / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else x / 2 + norm
    return x.float().reshape(shape)


def pattern(k):
    y, x, c = torch.meshgrid(torch.arange(96), torch.arange(96), torch.arange(3), indexing="ij")
    values = x * x * (k + 1) // 7 + y * y * (c + 1) // 5 + x * y * k // 3 + 40 * c * k
    return Image.fromarray((values % 256).to(torch.uint8).numpy())


def write_aesthetic(folder):
    """The whole of CLIP, as on the hub, and the head that the authors' code has."""
    sizes = {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config={**sizes, "hidden_size": 64, "patch_size": 14, "projection_dim": 768},
        text_config={**sizes, "hidden_size": 32, "vocab_size": 99}, projection_dim=768))
    clip.load_state_dict({key: fill(key, tensor.shape) for key, tensor in clip.state_dict().items()})
    clip.save_pretrained(folder)
    head = nn.ModuleDict({"layers": rewards.five_layers()}).state_dict()
    head = {key: fill(f"mlp.{key}", tensor.shape, 6.0) for key, tensor in head.items()}
    torch.save(head, folder / "aesthetic-model.pth")
    return {"clip": str(folder), "head": str(folder)}


def write_imagereward(folder):
    """BLIP and the head under the names of the original, position_ids and unused projections among them."""
    names = {"vision.post_layernorm": "vision.norm", "vision.embeddings.class_embedding": "vision.cls_token",
             "vision.embeddings.position_embedding": "vision.pos_embed", ".layer_norm": ".norm",
             "vision.embeddings.patch_embedding": "vision.patch_embed.proj", "self_attn.qkv": "attn.qkv",
             "vision.encoder.layers": "vision.blocks", "self_attn.projection": "attn.proj",
             "vision.": "blip.visual_encoder.", "text.": "blip.text_encoder.", "head.": "mlp.layers."}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 128}
    vision = transformers.BlipVisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                           intermediate_size=256, patch_size=16, image_size=224)
    text = transformers.BlipTextConfig(**sizes, vocab_size=21, encoder_hidden_size=64)
    model = nn.ModuleDict({"vision": transformers.BlipVisionModel(vision), "head": rewards.five_layers(),
                           "text": transformers.BlipTextModel(text, add_pooling_layer=False)})
    weights = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    weights |= {f"blip.{part}_proj.weight": torch.zeros(256, 64) for part in ("vision", "text")}
    for key, tensor in model.state_dict().items():
        for new, old in names.items():
            key = key.replace(new, old)
        weights[key] = fill(key, tensor.shape, 6.0 if key.startswith("mlp") else 3.0)
    torch.save(weights, folder / "ImageReward.pt")
    config = {**sizes, "layer_norm_eps": 1e-12, "vocab_size": 30524, "encoder_width": 768}
    (folder / "med_config.json").write_text(json.dumps(config))
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat riding bike ##s ! chess playing the of , on wolf"
    (folder / "vocab.txt").write_text(words.replace(" ", "\n") + "\n")
    return {"source": str(folder), "tokenizer": str(folder), "heads": "4"}


def write_llava(folder):
    """A random LLaVA that reads and writes a few words, and the BERT of the recorded scores."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:",
             *"a dog is riding bike the wolf cat red".split()]
    words = {word: i for i, word in enumerate(words)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**sizes, patch_size=14, image_size=28)
    text = transformers.LlamaConfig(**sizes, vocab_size=16, pad_token_id=0)
    llava = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    transformers.LlavaForConditionalGeneration(llava).save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**size), tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template="{% for m in messages %}USER: "
        "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }} {% endfor %}"
        "{% endfor %}ASSISTANT:").save_pretrained(folder)
    bert = transformers.DebertaForSequenceClassification(transformers.DebertaConfig(
        **sizes | {"num_hidden_layers": 4}, vocab_size=261, relative_attention=True, pos_att_type="c2p|p2c",
        position_biased_input=False, type_vocab_size=0))
    bert.config.save_pretrained(folder / "bert")
    weights = {key: fill(key, tensor.shape, 6.0) for key, tensor in bert.state_dict().items()}
    torch.save(weights, folder / "bert" / "pytorch_model.bin")
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted(bytes_to_unicode().values()), "[MASK]"]
    vocabulary = json.dumps({token: i for i, token in enumerate(vocabulary)})
    for name, text in {"vocab.json": vocabulary, "merges.txt": "#version: 0.2\n",
                       "tokenizer_config.json": '{"tokenizer_class": "DebertaTokenizer"}'}.items():
        (folder / "bert" / name).write_text(text)
    return {"vlm": str(folder), "bert": str(folder / "bert"), "layer": "3"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The options with which each reward model takes its small checkpoint."""
    return {write.__name__[6:]: write(tmp_path_factory.mktemp(write.__name__))
            for write in (write_aesthetic, write_imagereward, write_llava)}


@pytest.mark.parametrize("batch", ["32", "1"])
def test_aesthetic_score_and_imagereward_are_the_originals(batch, checkpoints):
    """Recorded on these checkpoints from the DDPO authors' AestheticScorer and from image-reward 1.5, whose
    text ends after 35 tokens: [CLS], 33 words, [SEP]."""
    images = [pattern(0), pattern(1)]
    found = rewards.load("aesthetic", **checkpoints["aesthetic"], batch=batch)(images, ["a", "b"])
    assert found.tolist() == pytest.approx([-2.1095240116119385, -1.9920618534088135], abs=1e-5)
    reward = rewards.load("imagereward", **checkpoints["imagereward"], batch=batch)
    found = reward(images * 2, ["a dog riding a bike!"] * 2 + ["cats, dogs playing chess"] * 2)
    recorded = [22.340423583984375, 21.866846084594727, 23.61871910095215, 22.268911361694336]
    assert found.tolist() == pytest.approx(recorded, abs=5e-5)  # vision's layer-norm eps moves it by 1.3e-4
    words = "a dog of the wolf ".split() * 9
    of_45, of_33, of_32 = reward([pattern(0)] * 3, [" ".join(words[:n]) for n in (45, 33, 32)])
    assert abs(of_45 - of_33) < 1e-4 < abs(of_45 - of_32)


def test_the_alignment_reward_is_bert_scores_recall_of_the_prompt_in_the_answer(checkpoints, monkeypatch):
    """Recall recorded from bert-score 0.3.13; an answer of no words scores 0. Each image gets its own answer,
    whatever batch it is in, after the JPEG at quality 80 that the authors' server was sent."""
    model = rewards.Alignment(**checkpoints["llava"], batch=2)
    images, sent = [pattern(0), noise_image(), pattern(2)], []
    prompts = ["The image contains a dog riding a bike", "The image contains a cat washing dishes", "a bat"]
    found = model.recall(["A dog is riding a bike.", "  a cat  ", ""], prompts)
    assert found.tolist() == pytest.approx([0.8923895955085754, 0.7223544716835022, 0.0], abs=1e-5)
    answers = model.answer(images)
    assert answers == [model.answer([image])[0] for image in images] and len(set(answers)) > 1
    prompts = ["a dog", "a cat", "a bat"]
    expected = model.recall(answers, [f"The image contains {prompt}" for prompt in prompts])
    assert model(images, prompts).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    monkeypatch.setattr(model, "processor", lambda images, **_: sent.extend(images) or {}[0])
    with pytest.raises(KeyError):
        model.answer([noise_image()])
    assert sent[0][0].tobytes() == Image.open(rewards.as_jpeg(noise_image(), 80)).tobytes()


@pytest.mark.parametrize("name", ["aesthetic", "imagereward", "llava"])
def test_model_rewards_take_images_of_any_size_and_mode(name, checkpoints):
    images = [Image.new("RGBA", (300, 40), "red"), Image.new("L", (17, 64)), Image.new("CMYK", (224, 225))]
    assert rewards.load(name, **checkpoints[name])(images, ["a dog"] * 3).dtype == torch.float32


def test_clip_sees_the_middle_of_the_image_with_its_shorter_side_at_224():
    image = Image.new("RGB", (600, 300), "black")
    image.paste((255, 0, 0), (150, 0, 450, 300))  # its middle square is red
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073]))
    red = (red / torch.tensor([0.26862954, 0.26130258, 0.27577711])).view(3, 1, 1).expand(3, 220, 220)
    torch.testing.assert_close(rewards.clip_pixels([image])[0, :, 2:-2, 2:-2], red)


@pytest.mark.parametrize("name, file, key, word", [
    ("aesthetic", "aesthetic-model.pth", None, "PytorchStreamReader"),
    ("llava", "model.safetensors", None, "header"),
    ("aesthetic", "model.safetensors", "visual_projection.weight", "lacks visual_projection.weight"),
    ("imagereward", "ImageReward.pt", "mlp.layers.7.bias", "missing: head.7.bias"),
    ("llava", "bert/vocab.json", "gone", "vocabulary"), ("imagereward", "vocab.txt", "gone", "vocab.txt")])
def test_a_damaged_checkpoint_is_one_line_and_a_key_too_many_a_warning(
        name, file, key, word, checkpoints, tmp_path, recwarn):
    """Cut short, without a key, without its vocabulary."""
    source = Path(next(iter(checkpoints[name].values())))
    shutil.copytree(source, tmp_path / "copy")
    options = {k: v.replace(str(source), str(tmp_path / "copy")) for k, v in checkpoints[name].items()}
    path = tmp_path / "copy" / file
    if key == "gone":
        path.unlink()
        path.with_name("merges.txt").unlink(missing_ok=True)
    elif key:
        binary = path.suffix == ".safetensors"
        weights = load_file(path) if binary else torch.load(path, weights_only=True)
        fewer = {k: v for k, v in weights.items() if k != key}
        for changed in (weights | {"other.weight": torch.zeros(2)}, fewer):
            save_file(changed, path, {"format": "pt"}) if binary else torch.save(changed, path)
            if "other.weight" in changed:
                rewards.load(name, **options)
                assert binary or "not used: other.weight" in str(recwarn.pop().message)
    else:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"(?s)reward '{name}'.*{word}.*--reward_options") as error:
        rewards.load(name, **options)
    assert "\n" not in str(error.value)


def test_scoring_is_at_most_a_tenth_of_an_epochs_operations():
    """Counted, not timed, for models of full size without weights: an epoch of Stable Diffusion is 256
    samples of 50 steps, each with and without the prompt, once to sample, once forward and once backward to
    learn (LoRA's own share left out, as the VAE's)."""
    def operations(module, *inputs, **named):
        with FlopCounterMode(display=False) as counter:
            module(*inputs, **named)
        return counter.get_total_flops()

    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    large |= {"num_attention_heads": 16}
    with torch.device("meta"), torch.no_grad():
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        epoch = operations(unet, torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
        epoch *= 256 * 50 * 2 * 3
        clip = transformers.CLIPVisionConfig(**large, patch_size=14)
        clip = transformers.CLIPVisionModelWithProjection(clip)
        vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**large, image_size=224))
        text = transformers.BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
        text = transformers.BlipTextModel(text, add_pooling_layer=False)
        eye = transformers.CLIPVisionConfig(**large, patch_size=14, image_size=336)
        eye, llama = transformers.CLIPVisionModel(eye), transformers.LlamaModel(transformers.LlamaConfig())
        bert = transformers.DebertaModel(transformers.DebertaConfig(
            **large | {"num_hidden_layers": 40}, vocab_size=50265, relative_attention=True,
            pos_att_type="c2p|p2c", position_biased_input=False, type_vocab_size=0))
        image, tokens = torch.empty(1, 3, 224, 224), torch.empty(1, 35).long()
        read = operations(text, tokens, encoder_hidden_states=torch.empty(1, 197, 1024))
        written = 2 * llama.num_parameters() * (576 + 32 + 64)  # image, question, answer
        written += 2 * bert.num_parameters() * (64 + 32)  # answer and prompt, compared
        cost = {"aesthetic": operations(clip, image), "imagereward": operations(vision, image) + read,
                "llava": operations(eye, torch.empty(1, 3, 336, 336)) + written}
    bytes_of = lambda width, *models: width * sum(model.num_parameters() for model in models)  # noqa: E731
    memory = {"aesthetic": bytes_of(4, clip), "imagereward": bytes_of(4, vision, text),
              "llava": bytes_of(2, eye, llama) + bytes_of(4, bert)}
    print(f"\nan epoch: {epoch / 1e15:.1f} PFLOP")
    for name, count in cost.items():
        share, weights = 256 * count / epoch, memory[name] / 1e9
        print(f"\n{name}: {share:.2%} of an epoch's operations, weights of {weights:.1f} GB")
        assert share < 0.1
