"""LoRA files as people have them, read so that every tensor counts."""

import math
import os
import re

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from flow_sde import (
    DIFFUSERS_FILE,
    PEFT_FILE,
    check,
    die,
    first_line,
    json_object,
    linear_layers,
    listing,
    locate,
    read_header,
    read_json,
    say,
    transformer_folder,
)
from layouts import original


def read_lora_file(path, network, text=True):
    """A LoRA from a PEFT folder, a LoRA file or its folder, or a hub id, for `network`, a diffusers
    transformer, as {module: (A (r, in), B (out, r), alpha)}, float32 on the CPU. Every tensor in the file is
    used, but for text encoders' without `text`; otherwise it exits naming the key."""
    file = locate(path)
    check(not transformer_folder(file), f"{path}: a full fine-tune; here only a LoRA will do")
    if os.path.isdir(file):
        both = [os.path.join(file, name) for name in (PEFT_FILE, DIFFUSERS_FILE)]
        found = [name for name in both if os.path.exists(name)]
        advice = f"; did you mean {path}/lora?" if os.path.isdir(os.path.join(file, "lora")) else ""
        check(found, f"{path}: neither {PEFT_FILE} (PEFT) nor {DIFFUSERS_FILE} (diffusers) is in it{advice}")
        file = found[0]
    header, tensors, layers = read_header(file)[1], load_file(file), linear_layers(network)
    config = lora_config(file, header, tensors)
    for part, method in OTHER_METHODS.items():
        keys = [key for key in tensors if part in key]
        check(not keys, f"{path}: {method}; only plain LoRAs are read: {listing(keys)}")
    keys = [key for key in tensors if key.startswith(("lora_te", "text_encoder"))]
    what = f"{len(keys)} keys are for text encoders, which stay the base's here: {listing(keys)}"
    check(not keys or not text, f"{path}: {what}; {path},text=0 leaves them out")
    tensors = {key: tensor for key, tensor in tensors.items() if key not in keys}
    halves, alphas, strange = lora_halves(tensors, network)
    what = f"{len(strange)} keys belong to no LoRA of a linear layer in this model: {listing(strange)}"
    check(halves and not strange, f"{path}: {what}")

    default = None  # alpha
    if config is None:
        known = [header[key] for key in ("lora_alpha", "alpha", "ss_network_alpha") if key in header]
        default = float(known[0]) if known and known[0] != "None" else None
    lora, wrong = {}, []
    for n, (A, B) in halves.items():
        shape = layers[n].out_features, layers[n].in_features
        if A.ndim != 2 or B.ndim != 2 or (len(B), A.shape[1]) != shape or not 0 < len(A) == B.shape[1]:
            wrong.append(f"{n} has A {tuple(A.shape)} and B {tuple(B.shape)} for a weight of {shape}")
            continue
        rank, alpha = len(A), alphas.get(n, default)
        if config:
            expected = config.rank_pattern.get(get_pattern_key(config.rank_pattern, n), config.r)
            if rank != expected:
                wrong.append(f"{n} has rank {rank}, in its settings {expected}")
            pattern = get_pattern_key(config.alpha_pattern, n)
            alpha = alphas.get(n, config.alpha_pattern.get(pattern, config.lora_alpha))
            alpha *= math.sqrt(rank) if config.use_rslora else 1
        if alpha is None:
            alpha = rank
        if not A.isfinite().all() or not B.isfinite().all() or not math.isfinite(alpha):
            wrong.append(f"{n} has values that are not finite")
        lora[n] = A, B, alpha
    missing = [n for n in layers if config and n not in halves and check_target_module_exists(config, n)]
    if missing:
        wrong.append(f"{len(missing)} layers that its settings target have no weights: {listing(missing)}")
    check(not wrong, f"{path}: {listing(wrong)}")
    if not any(alpha and A.any() and B.any() for A, B, alpha in lora.values()):
        say(f"note: {path} changes nothing: its alpha is 0, or one of its matrices is")
    if config is None and default is None and not any(key.endswith(".alpha") for key in tensors):
        say(f"note: {path} does not give its alpha; taken as its rank, as diffusers does")
    return lora


LORA_SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
LORA_SETTINGS += ("exclude_modules", "layers_to_transform", "layers_pattern")
NO_EFFECT = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
NO_EFFECT += ("inference_mode", "lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights", "eva_config")
NO_EFFECT += ("megatron_core", "qalora_group_size", "runtime_config")


def lora_config(file, header, keys):
    """A LoRA file's settings, peft's LoraConfig, or None if it has none; more than alpha/r B A is refused."""
    is_peft = any(key.startswith("base_model.model.") for key in keys) or os.path.basename(file) == PEFT_FILE
    source = os.path.join(os.path.dirname(file), "adapter_config.json")
    if "lora_adapter_metadata" in header:  # diffusers'
        config, source = json_object(header["lora_adapter_metadata"], file), file
    elif is_peft:
        check(os.path.exists(source), f"{file}: a PEFT LoRA without its adapter_config.json")
        config = read_json(source)
    else:
        return None
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    start = config.get("init_lora_weights", True)
    if start not in (True, False, None, "gaussian", "eva", "orthogonal"):
        reason = "changes the base too, so this LoRA is no difference to the base given"
        way = "peft's save_pretrained(path_initial_model_for_weight_conversion=...) converts it"
        die(f'{source}: "init_lora_weights": "{start}" {reason}; {way}')
    more = sorted(key for key, value in config.items() if value and key not in LORA_SETTINGS + NO_EFFECT)
    check(not more, f"{source}: more than a plain LoRA: it sets {listing(more)}")
    found = {key: config[key] for key in LORA_SETTINGS if config.get(key) is not None}
    is_lora = config.get("peft_type", "LORA") == "LORA" and "target_modules" in found
    numeric = isinstance(found.get("r"), int) and isinstance(found.get("lora_alpha"), (int, float))
    seen = ", ".join(f"{k} {config.get(k)!r}" for k in ("peft_type", "r", "lora_alpha", "target_modules"))
    check(is_lora and numeric, f"{source}: not the settings of a plain LoRA: {seen}")
    try:
        return LoraConfig(**found)
    except Exception as error:
        die(f"{source}: not the settings of a LoRA ({first_line(error)})")


OTHER_METHODS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "dora_scale": "DoRA", "magnitude": "DoRA"}
LORA_KEY = re.compile(  # PEFT's and diffusers' names, and those of programs that write a module's dots as _
    r"(?:transformer\.|diffusion_model\.|lora_transformer_|lora_unet_|lycoris_)?(?:base_model\.model\.)?(.+?)"
    r"\.(?:(lora_A|lora_down|lora\.down|down)|(lora_B|lora_up|lora\.up|up)|alpha)(?:\.default)?(?:\.weight)?"
)


def lora_halves(tensors, network):
    """({module: (A, B)}, {module: alpha}, [keys that belong to neither]) of a LoRA file's tensors."""
    ours = {n.replace(".", "_"): [n] for n in linear_layers(network)}
    theirs = {name.replace(".", "_"): places for name, places in original.names(network).items()}
    halves, alphas, strange = {}, {}, []
    for key, tensor in tensors.items():
        name, down, up = LORA_KEY.fullmatch(key).groups() if LORA_KEY.fullmatch(key) else ("", None, None)
        kind, flat = "A" if down else "B" if up else "alpha", name.replace(".", "_")
        places = ours.get(flat) or theirs.get(flat, [])
        taken = any(n in alphas if kind == "alpha" else kind in halves.get(n, ()) for n in places)
        if not places or taken or kind == "alpha" and tensor.numel() != 1:
            strange.append(key)
        elif kind == "alpha":
            alphas |= dict.fromkeys(places, tensor.item())
        else:
            pieces = [tensor] * len(places)
            if kind == "B" and flat not in ours:
                pieces = original.parts(tensor, places, network)
            for n, piece in zip(places, pieces, strict=True):
                halves.setdefault(n, {})[kind] = piece.float()
    strange += [f"{n} (only lora_{'/'.join(half)})" for n, half in halves.items() if len(half) == 1]
    strange += [f"{n} (only alpha)" for n in alphas if n not in halves]
    return {n: (half["A"], half["B"]) for n, half in halves.items() if len(half) == 2}, alphas, strange
