"""Black-box rewards r(x_0, c) for ddpo.py and dpok.py: one number for each image and its prompt.

    reward = rewards.load("aesthetic", "cuda")  # or jpeg, incompressibility, imagereward, llava,
    reward(images, prompts)                     # path/to/file.py:function -> float32 (N,)

The policy gradient needs no gradient of the reward, so a reward may be a file size, a model's
opinion, or a function of your own, whose file is executed: read it first if it is not yours. The
models are the papers', except for a smaller vision-language model. A hub id may also be a folder:
`--reward_options clip=FOLDER`. Weights are safetensors or read with weights_only=True. The scripts
share no other module, so their helpers for paths, files and error messages are here too.
"""
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import re
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageFont
from torch import Tensor, nn
from transformers.utils import cached_file

# Silence transformers' advice to install torchvision, which nothing here needs.
transformers.logging.get_logger("transformers.utils.import_utils").setLevel("ERROR")

def as_jpeg(image: Image.Image, quality: int) -> io.BytesIO:
    """Compress an image of any mode -> a JPEG file in memory."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file

def incompressibility(images: list, prompts: list) -> Tensor:
    """JPEG size in kB (DDPO 5.1), quality 95 as in the authors' code -> (N,). Noise scores high."""
    return torch.tensor([len(as_jpeg(image, 95).getvalue()) / 1000 for image in images])

def jpeg(images: list, prompts: list) -> Tensor:
    """Compressibility, minus the JPEG size in kB (DDPO 5.1) -> (N,). A blank image scores high."""
    return -incompressibility(images, prompts)

def load_model(kind, source: str, device: str, dtype=torch.float32, **options) -> nn.Module:
    """Load kind.from_pretrained(source), frozen. Raises ValueError where weights are missing."""
    model, info = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks {', '.join(sorted(info['missing_keys']))}")
    return model.to(device).eval().requires_grad_(False)

def load_weights(module: nn.Module, weights: dict) -> nn.Module:
    """Load a state dict and freeze the module. Raises ValueError where weights are missing."""
    missing, _ = module.load_state_dict(weights, strict=False)
    if missing:
        raise ValueError(f"these weights are missing: {', '.join(missing)}")
    return module.eval().requires_grad_(False)

def clip_pixels(images: list) -> Tensor:
    """Prepare images as CLIP and ImageReward expect them: RGB, shorter side 224 (bicubic), centre
    crop, CLIP's mean and deviation -> (N, 3, 224, 224). Pillow resizes like the originals."""
    pixels = []
    for image in images:
        image = image.convert("RGB")
        size = [224 * side // min(image.size) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
        image = image.crop((left, top, left + 224, top + 224))
        pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
    pixels = torch.stack(pixels).view(-1, 224, 224, 3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)

def five_layers() -> nn.Sequential:
    """Make the head of the aesthetic score and of ImageReward, with Identity for dropout."""
    return nn.Sequential(
        nn.Linear(768, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(),
        nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))

class Aesthetic:
    """LAION's aesthetic score, about 1 to 10 (DDPO 5.1): a linear head, trained on human ratings,
    on CLIP ViT-L/14's unit embedding. It ignores the prompt, so one style may win for all."""

    def __init__(self, device="cpu", clip="openai/clip-vit-large-patch14",
                 head="trl-lib/ddpo-aesthetic-predictor", batch=32):
        self.device = device
        self.batch = int(batch)  # images at a time
        self.clip = load_model(transformers.CLIPVisionModelWithProjection, clip, device)
        weights = torch.load(cached_file(head, "aesthetic-model.pth"), "cpu", weights_only=True)
        self.head = load_weights(nn.ModuleDict({"layers": five_layers()}), weights).to(device)

    def __call__(self, images: list, prompts: list) -> Tensor:
        embedding = self.clip(pixel_values=clip_pixels(images).to(self.device)).image_embeds
        return self.head["layers"](F.normalize(embedding, dim=-1))[:, 0]

class ImageReward:
    """ImageReward (arXiv:2304.05977), DPOK's reward: a head, trained on human preferences, scores
    BLIP's features; mean 0, deviation 1 on its data. Saturated images score high (DPOK 5.3)."""

    names = (  # in the checkpoint, as a regular expression, and in transformers
        ("^blip.visual_encoder", "vision"), ("^blip.text_encoder", "text"), ("^mlp.layers", "head"),
        (r"vision\.norm", "vision.post_layernorm"), ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"), (r"\.norm", ".layer_norm"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
        (r"vision\.blocks", "vision.encoder.layers"), (r"attn\.qkv", "self_attn.qkv"),
        (r"attn\.proj", "self_attn.projection"))
    unused = r"blip\.(vision|text)_proj\..*|.*position_ids"  # needed only to train BLIP

    def __init__(self, device="cpu", source="zai-org/ImageReward",
                 tokenizer="google-bert/bert-base-uncased", heads=16, batch=32):  # heads of ViT-L
        self.device = device
        self.batch = int(batch)
        self.tokenizer = transformers.BertTokenizer(cached_file(tokenizer, "vocab.txt"))
        file = cached_file(source, "ImageReward.pt")
        weights = {}
        for key, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
            if not re.fullmatch(self.unused, key):
                for old, new in self.names:
                    key = re.sub(old, new, key)
                weights[key] = tensor
        width = weights["vision.embeddings.class_embedding"].shape[-1]
        layers = len([key for key in weights if key.endswith("qkv.weight")])
        vision = transformers.BlipVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=int(heads),
            image_size=224, patch_size=16, layer_norm_eps=1e-6, num_hidden_layers=layers)
        med = json.loads(Path(cached_file(source, "med_config.json")).read_text("utf-8-sig"))
        sizes = {key: med[key] for key in ("hidden_size", "intermediate_size", "layer_norm_eps",
                                           "num_attention_heads", "num_hidden_layers")}
        words = len(weights["text.embeddings.word_embeddings.weight"])
        text = transformers.BlipTextConfig(**sizes, encoder_hidden_size=width, vocab_size=words)
        model = nn.ModuleDict({
            "vision": transformers.BlipVisionModel(vision), "head": five_layers(),
            "text": transformers.BlipTextModel(text, add_pooling_layer=False)})
        self.model = load_weights(model, weights).to(device)

    def __call__(self, images: list, prompts: list) -> Tensor:
        seen = self.model["vision"](clip_pixels(images).to(self.device)).last_hidden_state
        texts = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                               return_tensors="pt").to(self.device)
        tokens = self.model["text"](texts.input_ids, texts.attention_mask,
                                    encoder_hidden_states=seen).last_hidden_state
        score = self.model["head"](tokens[:, 0])[:, 0]
        return (score - 0.16717362830052426) / 1.0333394966054072

class VLMBertScore:
    """llava: prompt alignment (DDPO 5.1). A vision-language model describes the image; BERTScore's
    recall says how much of the prompt it covers. Text in the image scores high (appendix A)."""

    question = "Answer concisely: what is going on in this image?"  # the authors' code
    reference = "The image contains {}"

    def __init__(self, device="cpu", vlm="llava-hf/llava-1.5-7b-hf",
                 bert="microsoft/deberta-xlarge-mnli", layer=40, batch=16):  # layer 40 of 48
        self.device = device
        self.batch = int(batch)
        self.bert = load_model(transformers.AutoModel, bert, device, num_hidden_layers=int(layer))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
        self.vlm = load_model(transformers.AutoModelForImageTextToText, vlm, device, "auto")
        self.processor = transformers.AutoProcessor.from_pretrained(vlm)
        self.processor.tokenizer.padding_side = "left"  # all answers start at the same position
        for tokenizer in (self.tokenizer, self.processor.tokenizer):  # an empty one loads
            if set(tokenizer("the").input_ids) <= set(tokenizer.all_special_ids):
                raise ValueError("a tokenizer has no vocabulary")
        content = [{"type": "image"}, {"type": "text", "text": self.question}]
        self.prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(self, images: list) -> list[str]:
        """Describe each image, after JPEG compression at quality 80 as in the authors' code."""
        images = [[Image.open(as_jpeg(image, 80))] for image in images]
        inputs = self.processor(images=images, text=[self.prompt] * len(images), padding=True,
                                return_tensors="pt").to(self.device, self.vlm.dtype)
        ids = self.vlm.generate(**inputs, do_sample=False, max_new_tokens=64)
        new_ids = ids[:, inputs.input_ids.shape[1]:]
        return self.processor.batch_decode(new_ids, skip_special_tokens=True)

    def embed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Embed B texts -> unit vectors of the tokens (B, L, E), a mask of the tokens (B, L), and a
        mask of the words, which are the tokens other than [CLS] and [SEP] (B, L)."""
        inputs = self.tokenizer([text.strip() for text in texts], padding=True, truncation=True,
                                max_length=512, return_tensors="pt").to(self.device)
        ids = inputs.input_ids
        hidden = self.bert(ids, attention_mask=inputs.attention_mask).last_hidden_state
        is_token = inputs.attention_mask.bool()
        is_end = (ids == self.tokenizer.cls_token_id) | (ids == self.tokenizer.sep_token_id)
        return F.normalize(hidden, dim=-1), is_token, is_token & ~is_end

    def recall(self, answers: list[str], references: list[str]) -> Tensor:
        """Compute BERTScore's recall (arXiv:1904.09675), without idf or rescaling -> (B,): the mean
        similarity of the reference's words to the answer's most similar token; 0 without words."""
        answer, is_token, is_answer_word = self.embed(answers)
        reference, _, is_word = self.embed(references)
        similarity = reference @ answer.transpose(1, 2)  # (B, reference tokens, answer tokens)
        best = similarity.masked_fill(~is_token[:, None], -1).amax(2)
        recall = (best * is_word).sum(1) / is_word.sum(1)
        return recall * is_answer_word.any(1)

    def __call__(self, images: list, prompts: list) -> Tensor:
        return self.recall(self.answer(images), [self.reference.format(p) for p in prompts])

REWARDS = {"jpeg": jpeg, "incompressibility": incompressibility, "aesthetic": Aesthetic,
           "imagereward": ImageReward, "llava": VLMBertScore}

def check(name: str):
    """Check the name of a reward, loading and running nothing. Raises ValueError."""
    path, _, function = name.rpartition(":")
    if name not in REWARDS and not (path.endswith(".py") and function):
        raise ValueError(f"unknown reward {name!r}: give {', '.join(REWARDS)}, or FILE.py:FUNCTION")
    if name not in REWARDS and not resolve_path(path):
        raise ValueError(f"reward {name!r}: no such file")

def load(name: str, /, device: str = "cpu", **options):
    """Load a reward, its models on `device` -> a function of (images, prompts) that checks the
    result and returns float32 (N,). Raises ValueError."""
    check(name)
    path, _, attribute = name.rpartition(":")
    with user_error(f"cannot load reward {name!r}", "correct it or its --reward_options", path):
        if name in REWARDS:
            reward = REWARDS[name]
        else:
            file = resolve_path(path).resolve()
            sys.path.insert(0, str(file.parent))  # the file may import what lies next to it
            spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            reward = getattr(module, attribute)
        if inspect.isclass(reward):
            if int(options.get("batch", 1)) < 1:
                raise ValueError(f"batch ({options['batch']}) must be at least 1")
            reward = reward(device=device, **options)
        else:
            inspect.signature(reward).bind([], [], **options)
            reward = functools.partial(reward, **options)
    return functools.partial(score, reward, name, path)

@torch.no_grad()
def score(reward, name: str, file: str, images: list, prompts: list) -> Tensor:
    """Score copies of the images, a model's batch at a time -> float32 (N,) on the CPU. Raises
    ValueError, naming the prompt, unless there is one finite number for each image."""
    size = int(getattr(reward, "batch", len(images)))
    scores = []
    for start in range(0, len(images), size):
        copies = [image.copy() for image in images[start:start + size]]
        texts = list(prompts[start:start + size])
        failed = f"reward {name!r} failed on a batch that starts with the prompt {texts[0]!r}"
        with user_error(failed, "what was saved is kept", file):
            result = reward(copies, list(texts))
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
            result = result[0]  # (scores, info) is the convention of TRL and ddpo-pytorch
        with user_error(failed, "return one number for each image, in a list or a tensor"):
            values = torch.as_tensor(result).detach().to("cpu", torch.float32)
            if values.shape != (len(texts),):
                raise ValueError(f"its shape is {tuple(values.shape)} for {len(texts)} images")
        for text, value in zip(texts, values.tolist()):
            if not math.isfinite(value):
                raise ValueError(f"reward {name!r} is {value} for the prompt {text!r}")
        scores.append(values)
    return torch.cat(scores)


# ---------- helpers for the scripts
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
                "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")

@contextmanager
def user_error(problem: str, remedy: str, file: str = ""):
    """Turn any error inside into a ValueError of one line: the problem, the error, the line of
    `file` where it arose, and the remedy."""
    try:
        yield
    except (Exception, SystemExit) as error:  # hubs and file formats have errors of their own
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:300]
        for frame in traceback.extract_tb(error.__traceback__):
            if file and frame.filename == str(resolve_path(file).resolve()):
                reason += f", line {frame.lineno} of {file}"
        raise ValueError(f"{problem} ({reason}); {remedy}") from error

@contextmanager
def replacing(file: Path):
    """Yield a path to write to that then replaces `file`: a kill leaves the old one or the new."""
    with user_error(f"cannot write {str(file)!r}", "make room, then continue with --resume"):
        yield file.with_suffix(".part")
        os.replace(file.with_suffix(".part"), file)

@functools.cache
def caption_font(text: str):
    """Find the font of this machine with most of a text's characters; Pillow's own has ASCII."""
    best, best_count = ImageFont.load_default(15), sum(c.isascii() for c in text)
    for folder in FONT_FOLDERS:
        if best_count < len(text):
            for file in Path(folder).expanduser().rglob("*.[ot]t[fc]"):
                with suppress(OSError):  # some fonts have no such size
                    font = ImageFont.truetype(file, 15)
                    blank = bytes(font.getmask("\uffff"))  # stands for a missing character
                    count = sum(c.isprintable() and bytes(font.getmask(c)) != blank for c in text)
                    if count > best_count:
                        best, best_count = font, count
    return best

def resolve_path(path: str) -> Path | None:
    """Find a path in the working folder or, failing that, next to this file."""
    candidates = Path(path), Path(__file__).parent / path
    return next((candidate for candidate in candidates if os.path.exists(candidate)), None)
