"""Tiny random checkpoints in Hugging Face's layout, for tests and for `configs/tiny.yaml` (sources `random:FAMILY`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from flax import nnx
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ragjax.checkpoints.name_tables import GENERATORS
from ragjax.checkpoints.pretrained import save_encoder, save_generator
from ragjax.errors import InputError
from ragjax.models.encoders.bert import Bert, BertConfig
from ragjax.models.layers import split_parameters

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
LLAMA = {
    "model_type": "llama",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
BART = {
    "model_type": "bart",
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# config.json, the special tokens in the order of their ids, and what the tokenizer puts around a text
FAMILIES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "bert": (BERT, "[PAD] [CLS] [SEP]", "[CLS] $A [SEP]"),
    "llama": (LLAMA, "<|endoftext|> <|im_start|> <|im_end|>", None),
    "bart": (BART, "<s> <pad> </s>", "<s> $A </s>"),
    "t5": (T5, "<pad> </s>", "$A </s>"),
}
NAMES = {
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "llama": {"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "bart": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
    "t5": {"pad_token": "<pad>", "eos_token": "</s>"},
}


def write_random_checkpoint(family: str, folder: Path, seed: int = 0) -> None:
    """Writes config.json, model.safetensors and a byte-level tokenizer of `bert`, `llama`, `bart` or `t5`.

    Raises `InputError` for another family.
    """
    if family not in FAMILIES:
        raise InputError(f"random:{family}: expected {' or '.join(f'random:{name}' for name in FAMILIES)}")
    hf = {**FAMILIES[family][0], "vocab_size": _write_tokenizer(family, folder)}
    if family == "bert":
        bert = Bert(BertConfig.from_hf(hf, "mean", True), nnx.Rngs(seed))
        save_encoder(folder, hf, split_parameters(bert)[1])
        return
    generator = GENERATORS[family]
    module = generator.module(generator.config.from_hf(hf), nnx.Rngs(seed))
    save_generator(folder, hf, split_parameters(module)[1])


def _write_tokenizer(family: str, folder: Path) -> int:
    """One token a byte, after the special ones; returns the size of the vocabulary."""
    _, names, frame = FAMILIES[family]
    special = names.split()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if family == "bert":
        backend.normalizer = normalizers.Lowercase()
    if frame:
        used = [(token, vocabulary[token]) for token in special if token in frame.split()]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES[family], indent=1) + "\n", encoding="utf-8")
    return len(vocabulary)
