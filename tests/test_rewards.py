"""The rewards that are models equal the original packages, on small checkpoints in their formats.

    python -m pytest -q tests/test_rewards.py                   # half a minute
    python -m pytest -q -s tests/test_rewards.py -k operations  # what scoring costs, in operations

The scores were recorded from the original packages on the checkpoints that `fill` makes of
integers.
"""
import json
import math
import shutil
import zlib

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

MODELS = ("aesthetic", "imagereward", "llava")
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


# ---------- images

def noise_image():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels)


def pattern(k):
    """Make an image of integers alone, one of those of the recorded scores."""
    side = torch.arange(96)
    y, x, c = torch.meshgrid(side, side, torch.arange(3), indexing="ij")
    values = x * x * (k + 1) // 7 + y * y * (c + 1) // 5 + x * y * k // 3 + 40 * c * k
    return Image.fromarray((values % 256).to(torch.uint8).numpy())


# ---------- checkpoints

def fill(key, shape, gain=3.0):
    """Make weights of integers alone, those of the recorded scores with every version of torch."""
    i = torch.arange(math.prod(shape)) + zlib.crc32(key.encode()) % 1_000_003
    x = ((i * i % 65521 * 7919 + i * 104729) % 65521).double() / 65521 - 0.5
    if len(shape) > 1:
        x = x * gain / math.prod(shape[1:]) ** 0.5
    else:
        x = x / 2
        if "norm" in key.lower() and key.endswith("weight"):
            x = x + 1
    return x.float().reshape(shape)


def fill_all(weights, gain=3.0):
    return {key: fill(key, tensor.shape, gain) for key, tensor in weights.items()}


def write_aesthetic(folder):
    """Write the whole of CLIP, as on the hub, and the head that the authors' code has."""
    sizes = {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "hidden_size": 64, "patch_size": 14, "projection_dim": 768}
    text = {**sizes, "hidden_size": 32, "vocab_size": 99}
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=768))
    clip.load_state_dict(fill_all(clip.state_dict()))
    clip.save_pretrained(folder)

    head = nn.ModuleDict({"layers": rewards.five_layers()}).state_dict()
    weights = {}
    for key, tensor in head.items():
        weights[key] = fill(f"mlp.{key}", tensor.shape, 6.0)
    torch.save(weights, folder / "aesthetic-model.pth")
    return {"clip": str(folder), "head": str(folder)}


ORIGINAL_NAMES = {  # of BLIP in transformers, and in ImageReward's checkpoint; in this order
    "vision.post_layernorm": "vision.norm",
    "vision.embeddings.class_embedding": "vision.cls_token",
    "vision.embeddings.position_embedding": "vision.pos_embed",
    ".layer_norm": ".norm",
    "vision.embeddings.patch_embedding": "vision.patch_embed.proj",
    "self_attn.qkv": "attn.qkv",
    "vision.encoder.layers": "vision.blocks",
    "self_attn.projection": "attn.proj",
    "vision.": "blip.visual_encoder.",
    "text.": "blip.text_encoder.",
    "head.": "mlp.layers."}


def write_imagereward(folder):
    """Write BLIP and the head under the original names, with position_ids and the projections that
    the reward does not use."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 12, "hidden_size": 768,
             "intermediate_size": 128}
    vision = transformers.BlipVisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        patch_size=16, image_size=224)
    text = transformers.BlipTextConfig(**sizes, vocab_size=21, encoder_hidden_size=64)
    model = nn.ModuleDict({
        "vision": transformers.BlipVisionModel(vision), "head": rewards.five_layers(),
        "text": transformers.BlipTextModel(text, add_pooling_layer=False)})
    weights = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
               "blip.vision_proj.weight": torch.zeros(256, 64),
               "blip.text_proj.weight": torch.zeros(256, 64)}
    for key, tensor in model.state_dict().items():
        for name, original_name in ORIGINAL_NAMES.items():
            key = key.replace(name, original_name)
        gain = 6.0 if key.startswith("mlp") else 3.0
        weights[key] = fill(key, tensor.shape, gain)
    torch.save(weights, folder / "ImageReward.pt")

    config = {**sizes, "layer_norm_eps": 1e-12, "vocab_size": 30524, "encoder_width": 768}
    (folder / "med_config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ("[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat riding bike ##s ! chess playing the of , on "
             "wolf")
    (folder / "vocab.txt").write_text(words.replace(" ", "\n") + "\n", encoding="utf-8")
    return {"source": str(folder), "tokenizer": str(folder), "heads": "4"}


CHAT_TEMPLATE = (
    "{% for m in messages %}USER: "
    "{% for c in m['content'] %}"
    "{{ '<image> ' if c['type'] == 'image' else c['text'] }} "
    "{% endfor %}{% endfor %}ASSISTANT:")


def llava_tokenizer():
    """Make a tokenizer of a few words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:",
             "a", "dog", "is", "riding", "bike", "the", "wolf", "cat", "red"]
    numbers = {word: number for number, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"])


def write_llava(folder):
    """Write a random LLaVA that reads and writes a few words, and the BERT of the recorded
    scores."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**sizes, patch_size=14, image_size=28)
    text = transformers.LlamaConfig(**sizes, vocab_size=16, pad_token_id=0)
    llava = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    transformers.LlavaForConditionalGeneration(llava).save_pretrained(folder)
    image_processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        image_processor, llava_tokenizer(), patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    write_bert(folder / "bert", {**sizes, "num_hidden_layers": 4})
    return {"vlm": str(folder), "bert": str(folder / "bert"), "layer": "3"}


def write_bert(folder, sizes):
    """Write a DeBERTa and a tokenizer of single bytes."""
    bert = transformers.DebertaForSequenceClassification(transformers.DebertaConfig(
        **sizes, vocab_size=261, relative_attention=True, pos_att_type="c2p|p2c",
        position_biased_input=False, type_vocab_size=0))
    bert.config.save_pretrained(folder)
    torch.save(fill_all(bert.state_dict(), 6.0), folder / "pytorch_model.bin")

    characters = sorted(bytes_to_unicode().values())
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *characters, "[MASK]"]
    numbers = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "DebertaTokenizer"}', encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The options with which each reward loads its small checkpoint."""
    return {"aesthetic": write_aesthetic(tmp_path_factory.mktemp("aesthetic")),
            "imagereward": write_imagereward(tmp_path_factory.mktemp("imagereward")),
            "llava": write_llava(tmp_path_factory.mktemp("llava"))}


# ---------- the scores

@pytest.mark.parametrize("batch", ["32", "1"])
def test_the_aesthetic_score_is_that_of_the_authors(batch, checkpoints):
    """Recorded from the DDPO authors' AestheticScorer."""
    reward = rewards.load("aesthetic", **checkpoints["aesthetic"], batch=batch)
    recorded = [-2.1095240116119385, -1.9920618534088135]
    found = reward([pattern(0), pattern(1)], ["a", "b"])
    assert found.tolist() == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize("batch", ["32", "1"])
def test_imagereward_is_that_of_its_package(batch, checkpoints):
    """Recorded from image-reward 1.5. The wrong eps of vision's layer norms moves it by 1.3e-4."""
    reward = rewards.load("imagereward", **checkpoints["imagereward"], batch=batch)
    images = [pattern(0), pattern(1), pattern(0), pattern(1)]
    prompts = ["a dog riding a bike!", "a dog riding a bike!",
               "cats, dogs playing chess", "cats, dogs playing chess"]
    recorded = [22.340423583984375, 21.866846084594727, 23.61871910095215, 22.268911361694336]
    assert reward(images, prompts).tolist() == pytest.approx(recorded, abs=5e-5)


def test_imagereward_reads_35_tokens_as_its_package_does(checkpoints):
    """They are [CLS], 33 words and [SEP]."""
    reward = rewards.load("imagereward", **checkpoints["imagereward"])
    words = "a dog of the wolf".split() * 9
    prompts = [" ".join(words[:count]) for count in (45, 33, 32)]
    of_45, of_33, of_32 = reward([pattern(0)] * 3, prompts).tolist()
    assert abs(of_45 - of_33) < 1e-4
    assert abs(of_45 - of_32) > 1e-4


def test_the_recall_is_that_of_bert_score(checkpoints):
    """Recorded from bert-score 0.3.13. An answer of no words scores 0."""
    model = rewards.VLMBertScore(**checkpoints["llava"], batch=2)
    answers = ["A dog is riding a bike.", "  a cat  ", ""]
    references = ["The image contains a dog riding a bike",
                  "The image contains a cat washing dishes", "a bat"]
    recorded = [0.8923895955085754, 0.7223544716835022, 0.0]
    assert model.recall(answers, references).tolist() == pytest.approx(recorded, abs=1e-5)


def test_each_image_gets_its_own_answer_whatever_batch_it_is_in(checkpoints):
    model = rewards.VLMBertScore(**checkpoints["llava"], batch=2)
    images = [pattern(0), noise_image(), pattern(2)]
    answers = model.answer(images)
    alone = [model.answer([image])[0] for image in images]
    assert answers == alone
    assert len(set(answers)) > 1


def test_llava_is_the_recall_of_the_prompt_in_the_answer(checkpoints):
    model = rewards.VLMBertScore(**checkpoints["llava"], batch=2)
    images = [pattern(0), noise_image(), pattern(2)]
    references = ["The image contains a dog", "The image contains a cat",
                  "The image contains a bat"]
    expected = model.recall(model.answer(images), references)
    found = model(images, ["a dog", "a cat", "a bat"])
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


class Sent(Exception):
    """Carries the images that a processor was called with."""

    def __init__(self, images):
        self.images = images


def send_nothing(images, **options):
    raise Sent(images)


def test_the_language_model_sees_the_jpeg_that_the_authors_server_was_sent(
        checkpoints, monkeypatch):
    """Its quality is 80."""
    model = rewards.VLMBertScore(**checkpoints["llava"])
    monkeypatch.setattr(model, "processor", send_nothing)
    with pytest.raises(Sent) as sent:
        model.answer([noise_image()])
    [[image]] = sent.value.images
    expected = Image.open(rewards.as_jpeg(noise_image(), 80))
    assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_model_rewards_take_images_of_any_size_and_mode(name, checkpoints):
    reward = rewards.load(name, **checkpoints[name])
    images = [Image.new("RGBA", (300, 40), "red"), Image.new("L", (17, 64)),
              Image.new("CMYK", (224, 225))]
    assert reward(images, ["a dog"] * 3).dtype == torch.float32


def test_clip_sees_the_middle_of_the_image_with_its_shorter_side_at_224():
    image = Image.new("RGB", (600, 300), "black")
    image.paste((255, 0, 0), (150, 0, 450, 300))  # its middle square is red
    red = (torch.tensor([1.0, 0.0, 0.0]) - CLIP_MEAN) / CLIP_STD
    expected = red.view(3, 1, 1).expand(3, 220, 220)
    found = rewards.clip_pixels([image])[0, :, 2:-2, 2:-2]
    torch.testing.assert_close(found, expected)


# ---------- damaged checkpoints

def copy_checkpoint(options, folder):
    """Copy a checkpoint -> the options that load the copy."""
    source = next(iter(options.values()))
    shutil.copytree(source, folder)
    return {name: value.replace(source, str(folder)) for name, value in options.items()}


def read_weights(file):
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, weights_only=True)


def write_weights(file, weights):
    if file.suffix == ".safetensors":
        save_file(weights, file, {"format": "pt"})
    else:
        torch.save(weights, file)


def assert_refused(name, options, reason):
    with pytest.raises(ValueError, match=f"reward '{name}'.*{reason}.*--reward_options") as error:
        rewards.load(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, file, key", [
    ("aesthetic", "model.safetensors", "visual_projection.weight"),
    ("aesthetic", "aesthetic-model.pth", "layers.7.bias"),
    ("imagereward", "ImageReward.pt", "mlp.layers.7.bias"),
    ("llava", "bert/pytorch_model.bin", "deberta.encoder.rel_embeddings.weight")])
def test_a_missing_weight_is_refused_by_name_and_one_too_many_is_ignored(
        name, file, key, checkpoints, tmp_path):
    options = copy_checkpoint(checkpoints[name], tmp_path / "copy")
    file = tmp_path / "copy" / file
    weights = read_weights(file)
    expected = rewards.load(name, **options)([pattern(0)], ["a dog"])

    write_weights(file, {**weights, "other.weight": torch.zeros(2)})
    found = rewards.load(name, **options)([pattern(0)], ["a dog"])
    torch.testing.assert_close(found, expected)

    del weights[key]
    write_weights(file, weights)
    own_name = key.replace("mlp.layers", "head").removeprefix("deberta.")
    assert_refused(name, options, own_name)


@pytest.mark.parametrize("name, file, reason", [
    ("aesthetic", "aesthetic-model.pth", "PytorchStreamReader"),
    ("llava", "model.safetensors", "header")])
def test_a_file_that_was_cut_short_is_refused_in_one_line(
        name, file, reason, checkpoints, tmp_path):
    options = copy_checkpoint(checkpoints[name], tmp_path / "copy")
    file = tmp_path / "copy" / file
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])
    assert_refused(name, options, reason)


@pytest.mark.parametrize("name, files, reason", [
    ("llava", ["bert/vocab.json", "bert/merges.txt"], "vocabulary"),
    ("imagereward", ["vocab.txt"], "vocab.txt")])
def test_a_tokenizer_without_a_vocabulary_is_refused_in_one_line(
        name, files, reason, checkpoints, tmp_path):
    """transformers would make every word the same token."""
    options = copy_checkpoint(checkpoints[name], tmp_path / "copy")
    for file in files:
        (tmp_path / "copy" / file).unlink()
    assert_refused(name, options, reason)


# ---------- what scoring costs

def operations(module, *inputs, **named):
    """Count the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs, **named)
    return counter.get_total_flops()


def count_bytes(bytes_per_weight, *models):
    return bytes_per_weight * sum(model.num_parameters() for model in models)


def full_size_costs():
    """Count, on models of full size without weights -> operations of an epoch of Stable Diffusion,
    {reward: operations per image}, {reward: bytes of weights}."""
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
             "num_attention_heads": 16}
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    call = operations(unet, torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    with_and_without_prompt = 2
    passes = 3  # to sample, forward to learn, backward to learn
    epoch = call * 256 * 50 * with_and_without_prompt * passes

    clip = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**large, patch_size=14))
    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**large, image_size=224))
    text = transformers.BlipTextModel(
        transformers.BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12),
        add_pooling_layer=False)
    eye = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**large, patch_size=14, image_size=336))
    llama = transformers.LlamaModel(transformers.LlamaConfig())
    bert = transformers.DebertaModel(transformers.DebertaConfig(
        **{**large, "num_hidden_layers": 40}, vocab_size=50265, relative_attention=True,
        pos_att_type="c2p|p2c", position_biased_input=False, type_vocab_size=0))

    image = torch.empty(1, 3, 224, 224)
    tokens = torch.empty(1, 35).long()
    reading = operations(text, tokens, encoder_hidden_states=torch.empty(1, 197, 1024))
    answering = 2 * llama.num_parameters() * (576 + 32 + 64)  # tokens of image, question, answer
    comparing = 2 * bert.num_parameters() * (64 + 32)  # tokens of answer and prompt
    cost = {"aesthetic": operations(clip, image),
            "imagereward": operations(vision, image) + reading,
            "llava": operations(eye, torch.empty(1, 3, 336, 336)) + answering + comparing}
    memory = {"aesthetic": count_bytes(4, clip),
              "imagereward": count_bytes(4, vision, text),
              "llava": count_bytes(2, eye, llama) + count_bytes(4, bert)}
    return epoch, cost, memory


def test_scoring_is_at_most_a_tenth_of_an_epochs_operations():
    """Counted, not timed: an epoch of Stable Diffusion is 256 samples of 50 steps, each with and
    without the prompt, once to sample, once forward and once backward to learn. LoRA's own share
    and the VAE's are left out."""
    with torch.device("meta"), torch.no_grad():
        epoch, cost, memory = full_size_costs()
    print(f"\nan epoch: {epoch / 1e15:.1f} PFLOP")
    for name, count in cost.items():
        share = 256 * count / epoch
        print(f"\n{name}: {share:.2%} of an epoch's operations, "
              f"weights of {memory[name] / 1e9:.1f} GB")
        assert share < 0.1
