"""Which PEFT type is which method of ours, and under which names both keep the same tensors: data, one row each.

A tensor that both write alike stands in `tensors` and no more; where the arithmetic differs a row has a pair of small
functions. Settings that only steer training and have no counterpart (`rank_dropout`, `init_weights`) are passed over;
those that change what is computed and cannot be had here stand in `fixed` and are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.interop.peft.edits import (
    gather_ia3,
    is_bat,
    read_adalora,
    read_bat,
    read_beft,
    read_boft,
    read_fourier,
    read_gralora,
    read_hira,
    read_hra,
    read_ia3,
    read_loha,
    read_lokr,
    read_miss,
    read_oft,
    read_randlora,
    read_road,
    read_shira,
    read_vblora,
    read_vera,
    share_adalora,
    share_randlora,
    share_vera,
    unshare_randlora,
    write_adalora,
    write_beft,
    write_boft,
    write_fourier,
    write_gralora,
    write_ia3,
    write_lokr,
    write_miss,
    write_oft,
    write_randlora,
    write_road,
    write_shira,
    write_vblora,
)
from trimtab.interop.peft.row import Row

RANKS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}

ROWS: tuple[Row, ...] = (
    Row(
        *("ADALORA", "adalora"),
        {"lora_A": "Q", "lora_B": "P", "lora_E": "lambda_"},
        {"rank": "init_r", "target": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        read=read_adalora,
        share=share_adalora,
        write=write_adalora,
    ),
    Row(
        *("VERA", "vera"),
        {"vera_lambda_b": "b", "vera_lambda_d": "d"},
        {"rank": "r", "dropout": "vera_dropout"},
        shared={"vera_A": "A", "vera_B": "B"},
        constant={"save_projection": True},
        read=read_vera,
        share=share_vera,
    ),
    Row(*("IA3", "ia3"), {"ia3_l": "l"}, read=read_ia3, write=write_ia3, gather=gather_ia3),
    Row(
        *("LOHA", "loha"),
        {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"},
        {"rank": "r", "alpha": "alpha"},
        RANKS,
        fixed={"use_effective_conv2d": False},
        read=read_loha,
        conv1d=False,
    ),
    Row(
        *("LOKR", "lokr"),
        {"lokr_w1": "C", "lokr_w2": "D", "lokr_w2_a": "B", "lokr_w2_b": "A"},
        {"rank": "r", "alpha": "alpha"},
        RANKS,
        fixed={"use_effective_conv2d": False},
        read=read_lokr,
        write=write_lokr,
        conv1d=False,
        optional=frozenset({"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_w1_a", "lokr_w1_b"}),
        ignored=frozenset({"lokr_w1_a", "lokr_w1_b"}),
    ),
    Row(
        *("OFT", "oft"),
        {"oft_R.weight": "q"},
        {"block_size": "oft_block_size", "dropout": "module_dropout"},
        fixed={"coft": False},
        read=read_oft,
        write=write_oft,
        conv1d=False,
    ),
    Row(
        *("BOFT", "boft"),
        {"boft_R": "D", "boft_s": "s"},
        {"block_size": "boft_block_size"},
        read=read_boft,
        write=write_boft,
        conv1d=False,
    ),
    Row(
        *("HRA", "hra"),
        {"hra_u": "U"},
        {"rank": "r"},
        fixed={"apply_GS": False},
        read=read_hra,
        conv1d=False,
    ),
    Row(
        *("FOURIERFT", "fourier_ft"),
        {"fourierft_spectrum": "c"},
        {"coefficients": "n_frequency", "alpha": "scaling", "entry_seed": "random_loc_seed"},
        {"coefficients": "n_frequency_pattern"},
        read=read_fourier,
        write=write_fourier,
    ),
    Row(
        *("RANDLORA", "randlora"),
        {"randlora_lambda": "lambda_", "randlora_gamma": "gamma"},
        {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"},
        shared={"randlora_A": "A", "randlora_B": "B"},
        constant={"save_projection": True},
        read=read_randlora,
        write=write_randlora,
        share=share_randlora,
        unshare=unshare_randlora,
        ignored=frozenset({"randlora_A", "randlora_B"}),
    ),
    Row(
        *("VBLORA", "vb_lora"),
        {"vblora_logits_A": "a", "vblora_logits_B": "b"},
        {"rank": "r", "k": "topk", "vectors": "num_vectors", "length": "vector_length", "dropout": "vblora_dropout"},
        shared={"vblora_vector_bank": "bank"},
        constant={"save_only_topk_weights": False},
        read=read_vblora,
        write=write_vblora,
        optional=frozenset({"vblora_logits_A", "vblora_logits_B"}),
        ignored=frozenset(f"vblora_logits_{side}_topk_{kind}" for side in "AB" for kind in ("indices", "weights")),
    ),
    Row(
        *("SHIRA", "shira"),
        {"shira_weight": "value"},
        {"rank": "r"},
        read=read_shira,
        write=write_shira,
        conv1d=False,
        ignored=frozenset({"shira_indices"}),
    ),
    Row(
        *("C3A", "c3a"),
        {"c3a_kernel": "w"},
        {"block_size": "block_size"},
        {"block_size": "block_size_pattern"},
        constant={"init_weights": True},
        conv1d=False,
    ),
    Row(
        *("MISS", "bat"),
        {"miss_block": "D"},
        {"block_size": "r"},
        constant={"init_weights": "bat"},
        read=read_bat,
        conv1d=False,
        chosen=is_bat,
    ),
    Row(
        *("MISS", "miss"),
        {"miss_block": "D"},
        {"rank": "r", "dropout": "miss_dropout"},
        read=read_miss,
        write=write_miss,
        conv1d=False,
    ),
    Row(
        *("ROAD", "road"),
        {"road_theta": "theta", "road_alpha": "alpha"},
        {"group_size": "group_size"},
        read=read_road,
        write=write_road,
        conv1d=False,
    ),
    Row(
        *("HIRA", "hira"),
        {"hira_A": "A", "hira_B": "B"},
        {"rank": "r"},
        read=read_hira,
    ),
    Row(
        *("GRALORA", "gralora"),
        {"gralora_A": "A", "gralora_B": "B"},
        {"rank": "r", "alpha": "alpha", "blocks": "gralora_k", "dropout": "gralora_dropout"},
        fixed={"hybrid_r": 0},
        read=read_gralora,
        write=write_gralora,
    ),
    Row(*("BEFT", "output_bias"), {"beft_bias": "d"}, read=read_beft, write=write_beft, conv1d=False),
)
"""Everything that sits on weights and is no LoRA; LoRA, prompts and plain copies have files of their own."""

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")
COPIES = ("LN_TUNING", "TRAINABLE_TOKENS")


def row_of(config: Mapping[str, Any]) -> Row | None:
    """The row that a PEFT config means."""
    rows = [row for row in ROWS if row.peft == config.get("peft_type")]
    return next((row for row in rows if row.chosen and row.chosen(config)), rows[-1] if rows else None)


def row_for(method: str) -> Row | None:
    """The row of one of our methods."""
    return next((row for row in ROWS if row.method == method), None)


def known_types() -> list[str]:
    """Every PEFT type that is read."""
    return sorted({"LORA", *PROMPTS, *COPIES, *(row.peft for row in ROWS)})
