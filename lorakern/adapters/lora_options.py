"""Which options of a LoRA go together: what no source has is refused, with the reason."""

from lorakern.adapters.lora_start import STARTS
from lorakern.adapters.masks import MODES


def refusal(lora) -> str | None:
    """Why these options of a Lora cannot be; None when they can."""
    p, rank_p, mode = lora.dropout, lora.rank_dropout, lora.dropout_mode
    started, embedding = lora.init != "default", lora.kind == "embedding"
    if lora.init not in STARTS:
        return f"init is {' or '.join(STARTS)}, got {lora.init!r}"
    if not 0 <= p < 1:
        return f"dropout is a probability from 0 to below 1, got {p!r}"
    if mode not in MODES:
        return f"dropout_mode is {' or '.join(MODES)}, got {mode!r}"
    if p and mode == "peft" and embedding:
        return 'an embedding has indices for input; use dropout_mode="kohya"'
    if p and mode == "lycoris":
        return 'LyCORIS drops nothing here without bypass_mode; use dropout_mode="bypass"'
    if rank_p and mode == "peft":
        return "PEFT's LoRA has no rank_dropout; choose another dropout_mode"
    if rank_p and embedding:
        return "no source defines rank_dropout on an embedding"
    if (p or rank_p) and mode in ("kohya", "bypass") and (lora.dora or "core" in lora.factors):
        return f"dora and tucker go with dropout_mode peft or lycoris, not {mode}"
    if started and (p or lora.use_scalar or lora.tucker or embedding):
        return f"init={lora.init!r} goes without dropout, scalar, tucker and embeddings"
    if lora.freeze_down and (started or embedding):
        return "freeze_down goes without another init and on no embedding: its down is 0"
    if lora.recompute and (lora.freeze_down or embedding):
        return "recompute goes without freeze_down, which keeps no input, and on no embedding"
    return None
