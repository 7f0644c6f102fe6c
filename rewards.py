"""Black-box rewards r(x_0, c) for ddpo.py and dpok.py: images and prompts in, one number an image out.

    reward = rewards.load("aesthetic", "cuda")   # jpeg, incompressibility, aesthetic, imagereward, llava, or
    reward(images, prompts)                      # path/to/file.py:function; PIL images, texts -> float32 (N,)

The policy gradient needs no gradient of the reward, so it may be anything that looks at the finished image:
a file size, a model's opinion, your own function (its file is executed: read a stranger's first). Models
are the papers' checkpoints, but for a smaller VLM. Where a class takes a hub id it also takes a folder:
`--reward_options clip=FOLDER head=FOLDER`. Weights are safetensors, or read with weights_only=True.
"""
import functools
import importlib.util
import inspect
import io
import json
import os
import re
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from transformers.utils import cached_file

transformers.logging.get_logger("transformers.utils.import_utils").setLevel("ERROR")  # no torchvision needed


def as_jpeg(image, quality):
    """A PIL image of any mode as a JPEG file, in memory."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file


def incompressibility(images, prompts):
    """Size as a JPEG file in kB (1000 bytes; DDPO section 5.1), quality 95 as in its code. Gamed by noise."""
    return torch.tensor([len(as_jpeg(image, 95).getvalue()) / 1000 for image in images])


def jpeg(images, prompts):
    """Compressibility: minus the JPEG size in kB (DDPO section 5.1). Gamed by an empty image."""
    return -incompressibility(images, prompts)


# ---------- rewards that are models

def load_model(kind, source, **options):
    """kind.from_pretrained(source), frozen, in float32 by default. Raises ValueError for missing weights."""
    model, info = kind.from_pretrained(source, output_loading_info=True, **{"dtype": torch.float32} | options)
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks {', '.join(sorted(info['missing_keys']))}")
    return model.eval().requires_grad_(False)


def load_weights(module, weights):
    """A state dict into a module, frozen. Raises ValueError for weights that are missing."""
    missing, unused = module.load_state_dict(weights, strict=False)
    if missing:
        raise ValueError(f"weights are missing: {', '.join(missing)}")
    if unused:
        warnings.warn(f"weights are not used: {', '.join(unused)}")
    return module.eval().requires_grad_(False)


def clip_pixels(images):
    """As CLIP and ImageReward see images: RGB, the shorter side 224 (bicubic), centre crop, CLIP's mean
    and deviation -> (N, 3, 224, 224). By Pillow, as in the originals; transformers' resizes differ."""
    pixels = []
    for image in images:
        image = image.convert("RGB")
        image = image.resize([224 * side // min(image.size) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - 224) / 2) for side in image.size)
        image = image.crop((left, top, left + 224, top + 224))
        pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3))
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    return ((torch.stack(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)


def five_layers():
    """The head of the aesthetic score and of ImageReward: linear layers, Identity where dropout was."""
    return nn.Sequential(nn.Linear(768, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(),
                         nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))


class Aesthetic:
    """LAION's aesthetic score, about 1 to 10 (DDPO section 5.1): a linear head, trained on people's ratings,
    on CLIP ViT-L/14's unit embedding; blind to the prompt. Gamed by a style it likes."""

    def __init__(self, device="cpu", clip="openai/clip-vit-large-patch14",
                 head="trl-lib/ddpo-aesthetic-predictor", batch=32):
        self.device, self.batch = device, int(batch)
        self.clip = load_model(transformers.CLIPVisionModelWithProjection, clip).to(device)
        weights = torch.load(cached_file(head, "aesthetic-model.pth"), map_location="cpu", weights_only=True)
        self.head = load_weights(nn.ModuleDict({"layers": five_layers()}), weights)["layers"].to(device)

    def __call__(self, images, prompts):
        embedding = self.clip(pixel_values=clip_pixels(images).to(self.device)).image_embeds
        return self.head(F.normalize(embedding, dim=-1))[:, 0]


class ImageReward:
    """ImageReward (arXiv:2304.05977), DPOK's reward: a head trained on people's preferences scores what BLIP
    makes of prompt and image; mean 0, deviation 1 on its data. Gamed by over-saturated colours (DPOK 5.3)."""

    names = (("^blip.visual_encoder", "vision"), ("^blip.text_encoder", "text"), ("^mlp.layers", "head"),
             (r"vision\.norm", "vision.post_layernorm"), ("cls_token", "embeddings.class_embedding"),
             ("pos_embed", "embeddings.position_embedding"), (r"\.norm", ".layer_norm"),
             ("patch_embed.proj", "embeddings.patch_embedding"), (r"vision\.blocks", "vision.encoder.layers"),
             (r"attn\.qkv", "self_attn.qkv"), (r"attn\.proj", "self_attn.projection"))  # old, new
    unused = r"blip\.(vision|text)_proj\..*|.*position_ids"  # of BLIP's own training

    def __init__(self, device="cpu", source="zai-org/ImageReward", tokenizer="google-bert/bert-base-uncased",
                 heads=16, batch=32):  # heads of the vision model (ViT-L), which no file of the model names
        self.device, self.batch = device, int(batch)
        self.tokenizer = transformers.BertTokenizer(cached_file(tokenizer, "vocab.txt"))
        weights = torch.load(cached_file(source, "ImageReward.pt"), map_location="cpu", weights_only=True)
        weights = {key: tensor for key, tensor in weights.items() if not re.fullmatch(self.unused, key)}
        for old, new in self.names:
            weights = {re.sub(old, new, key): tensor for key, tensor in weights.items()}
        width = weights["vision.embeddings.class_embedding"].shape[-1]
        layers = sum(key.endswith("qkv.weight") for key in weights)
        vision = transformers.BlipVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=int(heads), image_size=224,
            patch_size=16, layer_norm_eps=1e-6, num_hidden_layers=layers)
        text = json.loads(Path(cached_file(source, "med_config.json")).read_text())
        text = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads",
                                           "num_hidden_layers", "layer_norm_eps")}
        words = len(weights["text.embeddings.word_embeddings.weight"])
        text = transformers.BlipTextConfig(**text, encoder_hidden_size=width, vocab_size=words)
        self.model = load_weights(nn.ModuleDict({
            "vision": transformers.BlipVisionModel(vision), "head": five_layers(),
            "text": transformers.BlipTextModel(text, add_pooling_layer=False)}), weights).to(device)

    def __call__(self, images, prompts):
        seen = self.model["vision"](clip_pixels(images).to(self.device)).last_hidden_state
        texts = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                               return_tensors="pt")
        ids, mask = texts.input_ids.to(self.device), texts.attention_mask.to(self.device)
        tokens = self.model["text"](ids, mask, encoder_hidden_states=seen).last_hidden_state
        return (self.model["head"](tokens[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


class Alignment:
    """llava: prompt alignment (DDPO section 5.1). A vision-language model says what it sees, BERTScore's
    recall how much of the prompt it says. Gamed by text in the image that it reads out (appendix A)."""

    question = "Answer concisely: what is going on in this image?"  # the released code's
    reference = "The image contains {}"

    def __init__(self, device="cpu", vlm="llava-hf/llava-1.5-7b-hf", bert="microsoft/deberta-xlarge-mnli",
                 layer=40, batch=16):
        """vlm: any image-text-to-text model with a chat template, in its checkpoint's precision.
        layer: of the BERT's 48, the one whose output is compared."""
        self.device, self.batch = device, int(batch)
        self.bert = load_model(transformers.AutoModel, bert, num_hidden_layers=int(layer)).to(device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
        self.vlm = load_model(transformers.AutoModelForImageTextToText, vlm, dtype="auto").to(device)
        self.processor = transformers.AutoProcessor.from_pretrained(vlm)
        self.processor.tokenizer.padding_side = "left"  # all answers begin at the same place
        for tokenizer in (self.tokenizer, self.processor.tokenizer):  # which transformers accepts
            if set(tokenizer("the").input_ids) <= set(tokenizer.all_special_ids):
                raise ValueError("a tokenizer has no vocabulary")
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question}]}]
        self.prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)

    def answer(self, images):
        """What the model sees in each image, after JPEG compression at quality 80, the released code's."""
        images = [[Image.open(as_jpeg(image, 80))] for image in images]
        inputs = self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt",
                                padding=True).to(self.device, self.vlm.dtype)
        tokens = self.vlm.generate(**inputs, do_sample=False, max_new_tokens=64)
        return self.processor.batch_decode(tokens[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)

    def embed(self, texts):
        """-> unit vectors of the tokens (B, L, E), which are tokens (B, L), and which words (B, L)."""
        texts = [text.strip() for text in texts]
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        ids, mask = inputs.input_ids.to(self.device), inputs.attention_mask.to(self.device)
        vectors = F.normalize(self.bert(ids, attention_mask=mask).last_hidden_state, dim=-1)
        ends = (ids == self.tokenizer.cls_token_id) | (ids == self.tokenizer.sep_token_id)
        return vectors, mask.bool(), mask.bool() & ~ends

    def recall(self, answers, references):
        """BERTScore recall (arXiv:1904.09675, R_BERT) -> (B,): each word of the reference finds its most
        similar token in the answer; mean similarity. No idf or rescaling; one without words scores 0."""
        a, tokens, words = self.embed(answers)
        b, _, wanted = self.embed(references)
        best = (b @ a.transpose(1, 2)).masked_fill(~tokens[:, None], -1).amax(2)
        return (best * wanted).sum(1) / wanted.sum(1) * words.any(1)

    def __call__(self, images, prompts):
        return self.recall(self.answer(images), [self.reference.format(prompt) for prompt in prompts])


REWARDS = {"jpeg": jpeg, "incompressibility": incompressibility, "aesthetic": Aesthetic,
           "imagereward": ImageReward, "llava": Alignment}


@contextmanager
def one_line(what, remedy, file=None):
    """Whatever goes wrong inside ends as a ValueError of one line: what, why, where in `file`, the remedy."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a hub, a file system, a foreign format: each has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        places = traceback.extract_tb(error.__traceback__) if file else ()
        reason += "".join(f", line {p.lineno} of {file}" for p in places if p.filename.endswith(file))
        raise ValueError(f"{what} ({reason}); {remedy}") from error


def find(path):
    """A path in the working folder or, failing that, beside this file; None if it is in neither."""
    return next((p for p in (Path(path), Path(__file__).parent / path) if os.path.exists(p)), None)


def check(name):
    """Raises ValueError for an unusable reward name, before anything is loaded or run."""
    path, _, function = name.rpartition(":")
    if name not in REWARDS and not (path.endswith(".py") and function and find(path)):
        raise ValueError(f"reward {name!r} is unknown; choose {', '.join(REWARDS)}, or give file.py:function")


def load(name, device="cpu", **options):
    """The reward `name`, its models on `device`, as a function that checks its result. Raises ValueError."""
    check(name)
    path, _, attribute = name.rpartition(":")
    with one_line(f"reward {name!r} cannot be used", "correct it or its --reward_options", path):
        if path:
            spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", find(path))
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        function = getattr(module, attribute) if path else REWARDS[name]
        if inspect.isclass(function):
            function = function(device=device, **options)
        else:
            inspect.signature(function).bind([], [], **options)
            function = functools.partial(function, **options)
    return functools.partial(score, function, name)


@torch.no_grad()
def score(function, name, images, prompts):
    """function(images, prompts), a model's batch at a time -> float32 (N,) on the CPU. Raises ValueError,
    naming the prompt, unless it is one finite number an image."""
    B = getattr(function, "batch", len(images))
    with one_line(f"reward {name!r} failed on the prompts from {prompts[:1]} on", "give one number an image",
                  name.rpartition(":")[0]):
        parts = [function(images[i:i + B], prompts[i:i + B]) for i in range(0, len(images), B)]
        reward = torch.cat([torch.as_tensor(part) for part in parts]).to("cpu", torch.float32)
        if reward.shape != (len(prompts),):
            raise ValueError(f"its shape is {tuple(reward.shape)} for {len(prompts)} prompts")
        for i in (~reward.isfinite()).nonzero():
            raise ValueError(f"{reward[i].item()} for the prompt {prompts[i]!r}")
    return reward
