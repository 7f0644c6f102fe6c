"""Black-box rewards r(x_0, c) for ddpo.py and dpok.py: images and prompts in, one number an image out, higher is better.

    reward = rewards.load("aesthetic", "cuda")   # jpeg, incompressibility, aesthetic, imagereward, llava, or "path/to/file.py:function"
    reward(images, prompts)                      # list of PIL images, list of str -> float32 tensor (N,)

The policy-gradient methods need no gradient of the reward, so it may be anything that looks at the finished image: a file size, a
model's opinion, your own function. A file given as `path/to/file.py:function` is run as it is: read it first if it came from a stranger.

The models are the papers' checkpoints (of the VLM a smaller one) on today's transformers. Wherever a class below takes a hub id, it also takes a
folder that holds the same files: `--reward_options clip=FOLDER head=FOLDER`. Weights are read as safetensors or with weights_only=True.
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
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from transformers.utils import cached_file


def as_jpeg(image, quality):
    """The bytes of a PIL image of any mode as a JPEG file, in memory."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file


def jpeg_size(images):
    """Size of each image as a JPEG file in kB (1000 bytes), quality 95, as in the authors' code; DDPO section 5.1 gives none."""
    return torch.tensor([len(as_jpeg(image, 95).getvalue()) / 1000 for image in images])


def jpeg(images, prompts):
    """Compressibility: minus the JPEG size in kB (DDPO section 5.1). Gamed by an empty image."""
    return -jpeg_size(images)


def incompressibility(images, prompts):
    """The JPEG size in kB (DDPO section 5.1). Gamed by noise (DDPO Fig. 7)."""
    return jpeg_size(images)


# ---------------------------------------------------------------- reading checkpoints

@contextmanager
def loading(what, source, option):
    """Whatever goes wrong inside becomes one line that says which option takes another source."""
    try:
        yield
    except Exception as error:  # a hub, a file system, a foreign format: each has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} of {source!r} cannot be loaded ({reason:.300}); with a network a hub id will do, otherwise name a folder that "
                         f"holds it: --reward_options {option}=FOLDER") from error


def load_model(kind, source, option, unused="", **options):
    """kind.from_pretrained(source), frozen, float32 unless told otherwise. Every key must be there, of its shape, and used or match `unused`."""
    transformers.logging.set_verbosity_error()
    with loading("model", source, option):
        model, info = kind.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **{"dtype": torch.float32} | options)
        faults = {"missing": info["missing_keys"], "unexpected": [key for key in info["unexpected_keys"] if not re.fullmatch(unused, key)],
                  "of another shape": info["mismatched_keys"]}
        for fault, keys in faults.items():
            if keys:
                raise ValueError(f"{fault}: {', '.join(sorted(map(str, keys)))}")
    return model.eval().requires_grad_(False)


def with_vocabulary(tokenizer):
    """The tokenizer, unless it came without its vocabulary, which transformers does not mind."""
    if set(tokenizer("the").input_ids) <= set(tokenizer.all_special_ids):
        raise ValueError("the vocabulary is missing")
    return tokenizer


def read(source, file):
    """A state dict saved by torch.save, from a hub id or a folder."""
    return torch.load(cached_file(source, file), map_location="cpu", weights_only=True)


# ---------------------------------------------------------------- rewards that are models

def clip_pixels(images):
    """As CLIP and ImageReward see images: RGB, the shorter side 224 (bicubic), its middle, CLIP's mean and deviation -> (N, 3, 224, 224).
    By Pillow, as the originals did; image processors of transformers resize differently once torchvision is installed."""
    pixels = []
    for image in images:
        image = image.convert("RGB")
        image = image.resize([224 * side // min(image.size) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - 224) / 2) for side in image.size)
        image = image.crop((left, top, left + 224, top + 224))
        pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1) / 255)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).view(2, 3, 1, 1)
    return (torch.stack(pixels) - mean) / std


def five_layers():
    """The head of the aesthetic score and of ImageReward: five linear layers without activations; Identity where training had dropout."""
    return nn.Sequential(nn.Linear(768, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(), nn.Linear(128, 64), nn.Identity(),
                         nn.Linear(64, 16), nn.Linear(16, 1))


def whole(option, value):
    """An option as a number above 0; from the command line it comes as text."""
    if not str(value).isdecimal() or int(value) == 0:
        raise ValueError(f"reward_options {option}={value} must be a whole number above 0")
    return int(value)


def batched(model, images, prompts):
    """model(images, prompts), model.batch at a time."""
    return torch.cat([model(images[i:i + model.batch], prompts[i:i + model.batch]) for i in range(0, len(images), model.batch)])


class Aesthetic:
    """LAION's aesthetic score, about 1 to 10 (DDPO section 5.1): CLIP ViT-L/14's embedding at length 1, and a linear head trained on people's
    ratings. The prompt is not looked at. Gamed by a style of its liking, whatever the subject."""

    def __init__(self, device="cpu", clip="openai/clip-vit-large-patch14", head="trl-lib/ddpo-aesthetic-predictor", batch=32):
        self.device, self.batch = device, whole("batch", batch)
        self.clip = load_model(transformers.CLIPVisionModelWithProjection, clip, "clip", r"(text_model|text_projection)\..*|logit_scale").to(device)
        self.head = nn.ModuleDict({"layers": five_layers()}).eval().requires_grad_(False).to(device)
        with loading("aesthetic-model.pth", head, "head"):
            self.head.load_state_dict(read(head, "aesthetic-model.pth"))

    def __call__(self, images, prompts):
        embedding = self.clip(pixel_values=clip_pixels(images).to(self.device)).image_embeds
        return self.head["layers"](F.normalize(embedding, dim=-1))[:, 0]


class ImageReward:
    """ImageReward (Xu et al., arXiv:2304.05977), DPOK's reward: BLIP reads the prompt with the image in its cross-attention, and a head trained on
    people's preferences scores the first token, [CLS]; mean 0 and deviation 1 on its own data. Gamed by over-saturated colours (DPOK section 5.3)."""

    names = (("^blip.visual_encoder", "vision"), ("^blip.text_encoder", "text"), ("^mlp.layers", "head"), (r"vision\.norm", "vision.post_layernorm"),
             ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"), (r"\.norm", ".layer_norm"),
             ("patch_embed.proj", "embeddings.patch_embedding"), (r"vision\.blocks", "vision.encoder.layers"),
             (r"attn\.qkv", "self_attn.qkv"), (r"attn\.proj", "self_attn.projection"))  # timm's and BLIP's names, transformers'
    unused = r"blip\.(vision|text)_proj\..*|.*position_ids"  # of BLIP's own training

    def __init__(self, device="cpu", source="zai-org/ImageReward", tokenizer="google-bert/bert-base-uncased", heads=16, batch=32):
        """heads: attention heads of the vision model (ViT-L), which no file of the checkpoint names."""
        self.device, self.batch = device, whole("batch", batch)
        with loading("vocab.txt", tokenizer, "tokenizer"):
            self.tokenizer = transformers.BertTokenizer(cached_file(tokenizer, "vocab.txt"))
        with loading("ImageReward.pt or med_config.json", source, "source"):
            text = json.loads(Path(cached_file(source, "med_config.json")).read_text(encoding="utf-8"))
            text = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "layer_norm_eps")}
            weights = {key: tensor for key, tensor in read(source, "ImageReward.pt").items() if not re.fullmatch(self.unused, key)}
            for old, new in self.names:
                weights = {re.sub(old, new, key): tensor for key, tensor in weights.items()}
            width = weights["vision.embeddings.class_embedding"].shape[-1]
            vision = transformers.BlipVisionConfig(
                hidden_size=width, intermediate_size=4 * width, num_attention_heads=whole("heads", heads), image_size=224, patch_size=16,
                layer_norm_eps=1e-6, num_hidden_layers=sum(key.endswith("qkv.weight") for key in weights))
            text = transformers.BlipTextConfig(**text, vocab_size=len(weights["text.embeddings.word_embeddings.weight"]), encoder_hidden_size=width)
            self.model = nn.ModuleDict({"vision": transformers.BlipVisionModel(vision), "head": five_layers(),
                                        "text": transformers.BlipTextModel(text, add_pooling_layer=False)}).eval().requires_grad_(False)
            self.model.load_state_dict(weights)
        self.model.to(device)

    def __call__(self, images, prompts):
        seen = self.model["vision"](clip_pixels(images).to(self.device)).last_hidden_state
        texts = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt").to(self.device)
        tokens = self.model["text"](texts.input_ids, attention_mask=texts.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return (self.model["head"](tokens[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


class Alignment:
    """llava: prompt alignment (DDPO section 5.1). A vision-language model says what it sees, and BERTScore's recall says how much of the prompt is in
    its answer. Gamed by text in the image that the model reads out (DDPO appendix A)."""

    question, reference = "Answer concisely: what is going on in this image?", "The image contains {}"  # the released code's

    def __init__(self, device="cpu", vlm="llava-hf/llava-1.5-7b-hf", bert="microsoft/deberta-xlarge-mnli", layer=40, batch=16):
        """vlm: any image-text-to-text model with a chat template; on a GPU in its checkpoint's precision (LLaVA's is half, as the authors').
        layer: of the BERT's 48, the one whose output is compared."""
        self.device, self.batch, layer = device, whole("batch", batch), whole("layer", layer)
        above = "|".join(map(str, range(layer, 99)))  # the layers that are not needed
        unused = rf"(\w+\.)?(encoder\.layer\.({above})\.|pooler\.|embeddings\.position_ids).*|classifier\..*"
        self.bert = load_model(transformers.AutoModel, bert, "bert", unused, num_hidden_layers=layer).to(device)
        with loading("tokenizer", bert, "bert"):
            self.tokenizer = with_vocabulary(transformers.AutoTokenizer.from_pretrained(bert))
        dtype = "auto" if str(device).startswith("cuda") else torch.float32
        self.vlm = load_model(transformers.AutoModelForImageTextToText, vlm, "vlm", dtype=dtype).to(device)
        with loading("processor", vlm, "vlm"):
            self.processor = transformers.AutoProcessor.from_pretrained(vlm)
            with_vocabulary(self.processor.tokenizer).padding_side = "left"  # so that every answer begins at the same place
            self.prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question}]}], add_generation_prompt=True)

    def answer(self, images):
        """What the model sees in each image, after JPEG compression at quality 80 (the released code's) -> list of str."""
        inputs = self.processor(images=[[Image.open(as_jpeg(image, 80))] for image in images], text=[self.prompt] * len(images), return_tensors="pt",
                                padding=True).to(self.device, self.vlm.dtype)
        tokens = self.vlm.generate(**inputs, do_sample=False, max_new_tokens=64)
        return self.processor.batch_decode(tokens[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)

    def embed(self, texts):
        """-> unit vectors of every token (B, L, E), which are tokens (B, L), which count as words (B, L): not [CLS], not [SEP]."""
        inputs = self.tokenizer([text.strip() for text in texts], padding=True, truncation=True, max_length=512, return_tensors="pt").to(self.device)
        ids, mask = inputs.input_ids, inputs.attention_mask.bool()
        vectors = self.bert(ids, attention_mask=inputs.attention_mask).last_hidden_state
        return F.normalize(vectors, dim=-1), mask, mask & (ids != self.tokenizer.cls_token_id) & (ids != self.tokenizer.sep_token_id)

    def recall(self, answers, references):
        """BERTScore recall (Zhang et al., arXiv:1904.09675, R_BERT): each word of the reference finds its most similar token in the
        answer; the mean of the similarities. Without idf weights and rescaling; an answer without words scores 0. -> (B,)"""
        a, tokens, words = self.embed(answers)
        b, _, wanted = self.embed(references)
        best = (b @ a.transpose(1, 2)).masked_fill(~tokens[:, None], -1).amax(2)
        return (best * wanted).sum(1) / wanted.sum(1) * words.any(1)

    def __call__(self, images, prompts):
        return self.recall(self.answer(images), [self.reference.format(prompt) for prompt in prompts])


REWARDS = {"jpeg": jpeg, "incompressibility": incompressibility, "aesthetic": Aesthetic, "imagereward": ImageReward, "llava": Alignment}


# ---------------------------------------------------------------- finding, checking and calling a reward

def find(path):
    """A file or folder given relative to the working folder or, failing that, to the folder of these scripts; None if in neither."""
    return next((p for p in (Path(path), Path(__file__).parent / path) if os.path.exists(p)), None)


def check(name):
    """Refuse an unusable reward name before anything is loaded or run. Raises ValueError."""
    path, colon, function = name.rpartition(":")
    if name in REWARDS:
        return
    if not colon or not path.endswith(".py"):
        raise ValueError(f"reward {name!r} is unknown; choose {', '.join(REWARDS)}, or give path/to/file.py:function")
    if find(path) is None:
        raise ValueError(f"reward file {path!r} is neither in the working folder nor beside the script; check the path")
    try:
        names = compile(find(path).read_bytes(), path, "exec").co_names
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"reward file {path!r} cannot be read as Python ({error}); correct it") from error
    if function not in names:
        raise ValueError(f"reward file {path!r} defines no {function!r}; name a function of that file")


def load(name, device="cpu", **options):
    """The reward called `name` (module docstring), as a function that also checks what goes in and comes out; `device` is where reward
    models run; options go to the reward. Raises ValueError for an unusable name, file or option."""
    check(name)
    if name in REWARDS:
        function = REWARDS[name]
    else:
        path, _, attribute = name.rpartition(":")
        spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", find(path))
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            function = getattr(module, attribute)
        except (Exception, SystemExit) as error:  # whatever that file does
            raise ValueError(f"reward file {path!r} fails when it is run ({where(error)}); correct it") from error
    model = inspect.isclass(function)
    try:
        inspect.signature(function).bind(*(() if model else ([], [])), **options)
    except TypeError as error:
        raise ValueError(f"reward {name!r} cannot be called with images, prompts and the reward_options {options} ({error}); correct them") from error
    function = functools.partial(batched, function(device=device, **options)) if model else functools.partial(function, **options)
    return functools.partial(score, function, name)


def where(error):
    """What went wrong, and where, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, line {place.lineno} of {place.filename}".replace("\n", " ")


@torch.no_grad()
def score(function, name, images, prompts):
    """function(images, prompts) -> float32 (N,) on the CPU. Raises ValueError, naming the prompt, unless it is one finite number an image."""
    if len(images) != len(prompts) or not images:
        raise ValueError(f"reward {name!r} was given {len(images)} images and {len(prompts)} prompts; give one prompt for each image")
    try:
        reward = torch.as_tensor(function(images, prompts)).detach().to("cpu", torch.float32)
    except (Exception, SystemExit) as error:  # whatever that function does
        raise ValueError(f"reward {name!r} failed on the prompts from {prompts[0]!r} on ({where(error)}); it must give one number an image") from error
    if reward.shape != (len(images),):
        raise ValueError(f"reward {name!r} gave a result of shape {tuple(reward.shape)} for the {len(images)} images of the prompts from "
                         f"{prompts[0]!r} on; it must give one number an image, shape ({len(images)},)")
    for prompt, value in zip(prompts, reward.tolist()):
        if not -float("inf") < value < float("inf"):
            raise ValueError(f"reward {name!r} gave {value} for the prompt {prompt!r}; it must be a finite number")
    return reward
