"""What can be wrong with the content of a recipe: an unknown key, a list where a mapping belongs, a number out of range."""

import difflib
import math
import re
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vlmoe.errors import UserError

# What a number must be, by the name of its setting, wherever that stands.
RANGES: dict[str, tuple[float, float]] = {
    name: bounds
    for bounds, names in {
        (0.0, 1.0): "image_mask_ratio text_mask_ratio pair_text_mask_ratio mask_ratio max_bad_fraction layer_decay "
        "drop_path ema_decay label_smoothing",
        (1e-3, 1.0): "crop_scale",
        (0.0, math.nextafter(1.0, 0.0)): "betas",
        (1e-15, 1.0): "eps",
        (1e-6, math.inf): "capacity_factor",
        (0.0, math.inf): "lr min_lr weight_decay warmup_steps clip_norm weight head_lr_scale color_jitter "
        "upsampling rand_augment workers batch_size held_out_images length_penalty load_balancing router_z commitment "
        "moe_every decoder_depth",
        (1, math.inf): "steps stop_at log_every eval_every checkpoint_every keep_checkpoints accumulate shuffle_shards "
        "dim depth attn_heads image_size patch_size dense_dim num_codes code_dim revive_after min_answer_count beam_size",
        (3, math.inf): "max_text_length",  # <s>, a token, </s>
        (0, 2**63 - 1): "seed",
    }.items()
    for name in names.split()
}


def check_keys(said: Any, hint: Any, where: str, key: str = "") -> None:
    """Raises UserError for an unknown key, and where a list, a mapping or a single value stands for another of them.

    Args:
        said: plain content, as YAML has it.
        hint: the dataclass that it shall fill, or the type of one of its fields.
        where: what the message names first: the recipe.
        key: of `said` in it.
    """
    if said is None or (isinstance(said, str) and said.startswith("${")):  # OmegaConf resolves and checks those
        return
    if isinstance(hint, UnionType):  # with None
        hint = next(each for each in get_args(hint) if each is not type(None))
    wanted = (
        "list" if get_origin(hint) in (list, tuple) else "mapping of keys" if is_dataclass(hint) else "single value"
    )
    found = {list: "list", dict: "mapping of keys"}.get(type(said), "single value")
    if wanted != found:
        raise UserError(f"{where}: {key} is {said!r}; it must be a {wanted}, not a {found}")
    if isinstance(said, list):
        for number, each in enumerate(said):
            check_keys(each, get_args(hint)[0], where, f"{key}[{number}]")
    elif isinstance(said, dict):
        hints = get_type_hints(hint)
        for name, each in said.items():
            full_key = f"{key}.{name}" if key else str(name)
            if name not in hints:
                raise UserError(f"{where}: unknown key {full_key!r}; {_advice(str(name), hint, is_top=not key)}")
            check_keys(each, hints[name], where, full_key)


def check_ranges(said: Any, where: str, key: str = "") -> None:
    """Raises UserError for a number, wherever it stands in `said`, that its setting cannot have."""
    if isinstance(said, dict):
        for name, value in said.items():
            check_ranges(value, where, f"{key}.{name}" if key else name)
    elif isinstance(said, (list, tuple)):
        for number, value in enumerate(said):
            check_ranges(value, where, f"{key}[{number}]")
    elif said is not None and (bounds := RANGES.get(re.sub(r".*\.|\[.*", "", key))):
        low, high = bounds
        if not low <= said <= high or said == math.inf:
            allowed = f"at least {low:g}, and finite" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"{where}: {key} is {said}; it must be {allowed}")


def _advice(name: str, block: Any, *, is_top: bool) -> str:
    """The nearest key of the same block; for a key without a block, the nearest one anywhere."""
    known = {each.rpartition(".")[2]: each for each in _paths(block)} if is_top else {}
    known |= {each.name: each.name for each in fields(block)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {known[near[0]]!r}?" if near else f"known keys: {', '.join(sorted(known))}"


def _paths(block: Any, prefix: str = "") -> list[str]:
    hints = get_type_hints(block)
    inner = [path for name, hint in hints.items() if is_dataclass(hint) for path in _paths(hint, f"{prefix}{name}.")]
    return [*inner, *(f"{prefix}{name}" for name in hints)]
