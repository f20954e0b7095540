"""HPSv3 (arXiv 2508.03789): what people prefer, by a Qwen2-VL that reads picture and prompt."""

import ast
import importlib.util
import math
import pathlib

import numpy as np
import torch
from PIL import Image

from rewards import Unavailable, pil, remembered
from scorers.preference import MEAN, STD, fill, load, load_state, normalize, renamed, tokens

HPSV3, QWEN = "MizzenAI/HPSv3/HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28  # of a picture; Qwen makes a token of 28 x 28
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # of Qwen2-VL's chat template


def hpsv3(images, prompts, metadata=None, weights=HPSV3, base=QWEN):
    """Human Preference Score v3 (arXiv 2508.03789; code MIT, weights Apache-2.0): mu of the (mu, sigma) that
    three layers make of the state of the token <|Reward|>. Unbounded; its authors' means of models run from
    -0.2 (SD 2) to 10.6 (Kolors). As their code (MizzenAI/HPSv3) has it, but for one rounding of the angles in
    the vision tower: 448 x 448 pixels or as many, positions that count on through the picture, where
    Qwen2-VL's own have three dimensions, bfloat16 as in the file, and float32 for the three layers. Tokenizer
    and sizes are `base`'s (Apache-2.0). Needs `pip install --no-deps hpsv3` and 17 GB."""
    instruction, end = official_texts()
    qwen, head, tokenizer = load_hpsv3(weights, base, images.device)
    patches, rows, columns = qwen_patches(pil(images))
    picture = "<|vision_start|>" + "<|image_pad|>" * (rows * columns // 4) + "<|vision_end|>"
    end = end.partition("<|Reward|>")[0] + "<|Reward|>"  # what comes after cannot change this token's state
    texts = []
    for prompt in prompts:
        words = instruction.replace("{text_prompt}", prompt) + end
        texts.append(SYSTEM + "<|im_start|>user\n" + picture + words)
    read = tokens(tokenizer, texts, images.device, 32768)
    count, length = read["input_ids"].shape
    seen = {"pixel_values": patches.to(images.device)}
    seen["image_grid_thw"] = torch.tensor([[1, rows, columns]] * count, device=images.device)
    positions = torch.arange(length, device=images.device).expand(3, count, length)
    states = qwen(**read, **seen, position_ids=positions, use_cache=False).last_hidden_state
    last = read["attention_mask"].sum(1) - 1
    return head(states[torch.arange(count), last].float())[:, 0]


def qwen_patches(pictures):
    """PIL pictures of one size -> Qwen2-VL's patches of 14 x 14 pixels, and how many rows and columns of them
    a picture has. (B x rows x columns, 3 x 2 x 14 x 14): the four that make a token follow each other, and
    each is there twice, as in a film of two frames."""
    width, height = qwen_size(*pictures[0].size)
    pixels = [np.array(picture.resize((width, height), Image.Resampling.BICUBIC)) for picture in pictures]
    pixels = torch.from_numpy(np.stack(pixels)).movedim(-1, 1).float() / 255
    blocks = normalize(pixels, MEAN, STD).unflatten(3, (-1, 2, 14)).unflatten(2, (-1, 2, 14))
    patches = blocks.permute(
        0, 2, 5, 3, 6, 1, 4, 7
    )  # picture, block's row and column, patch's, colour, pixels
    film = patches.unsqueeze(6).expand(*patches.shape[:6], 2, 14, 14)
    return film.reshape(-1, 3 * 2 * 14 * 14), height // 14, width // 14


def qwen_size(*sides):
    """Qwen2-VL's rule for width and height: multiples of 28, of about `PIXELS` pixels, not more of a large
    picture, not less of a small one."""
    new = [max(28, round(side / 28) * 28) for side in sides]
    if math.prod(new) > PIXELS:
        scale = math.sqrt(math.prod(sides) / PIXELS)
        return [math.floor(side / scale / 28) * 28 for side in sides]
    if math.prod(new) < PIXELS:
        scale = math.sqrt(PIXELS / math.prod(sides))
        return [math.ceil(side * scale / 28) * 28 for side in sides]
    return new


NAMES = {  # of transformers 4.45, with which the file was made -> transformers 5's
    r"^visual\.": "model.visual.",
    r"^model\.(?!visual\.|language_model\.)": "model.language_model.",
}


@remembered
def load_hpsv3(weights, base, device):
    """Qwen2-VL without its language head, the score's head, and the tokenizer with the new token."""
    from accelerate import init_empty_weights
    from torch.nn import Dropout, Linear, ModuleDict, ReLU, Sequential
    from transformers import Qwen2VLModel

    tokenizer, config = load("AutoTokenizer", base), load("AutoConfig", base)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    tokenizer.padding_side = "right"
    config.text_config.vocab_size = len(tokenizer)
    state = {renamed(key, NAMES): value for key, value in load_state(weights).items()}
    state.pop("lm_head.weight", None)
    with init_empty_weights():
        head = [Linear(config.text_config.hidden_size, 1024), ReLU(), Dropout(), Linear(1024, 16), ReLU()]
        head = Sequential(*head, Linear(16, 2))
        model = ModuleDict({"model": Qwen2VLModel(config), "rm_head": head})
    model = fill(model, state, weights, device)
    qwen = model["model"].to(model["model"].dtype)  # rounds the frequencies of its positions, as in training
    return qwen, model["rm_head"].float(), tokenizer


@remembered
def official_texts():
    """What the weights were trained to read after the picture: the instruction with {text_prompt} in it, and
    the line with <|Reward|>. They are read from the authors' package, which need not run here."""
    spec = importlib.util.find_spec("hpsv3")
    if spec is None:
        raise Unavailable("pip install --no-deps hpsv3 (its instruction is read, and nothing of it is run)")
    source = pathlib.Path(spec.submodule_search_locations[0], "dataset/data_collator_qwen.py").read_text()
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            texts[node.targets[0].id] = node.value.value
    return texts["INSTRUCTION"], texts["prompt_with_special_token"]


hpsv3.package = "hpsv3"
