"""Tiny random checkpoints in Hugging Face's layout, for tests and for `configs/tiny.yaml` (sources `random:FAMILY`)."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from flax import nnx
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ragjax.config import InputError
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.layers import split_parameters
from ragjax.models.llama import Llama, LlamaConfig
from ragjax.weights import save_bert, save_generator

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
LLAMA = {
    "model_type": "llama",
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


def write_random_checkpoint(family: str, folder: Path, seed: int = 0) -> None:
    """Writes config.json, model.safetensors and a byte-level tokenizer. `family` is `bert` or `llama`."""
    if family == "bert":
        special = ["[PAD]", "[CLS]", "[SEP]"]
        bert_hf = {**BERT, "vocab_size": _write_tokenizer(folder, special), "pad_token_id": 0}
        config = BertConfig.from_hf(bert_hf, "mean", True)
        save_bert(folder, bert_hf, split_parameters(Bert(config, nnx.Rngs(seed)))[1])
    elif family == "llama":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        size = _write_tokenizer(folder, special)
        llama_hf = {**LLAMA, "vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        save_generator(folder, llama_hf, split_parameters(Llama(LlamaConfig.from_hf(llama_hf), nnx.Rngs(seed)))[1])
    else:
        raise InputError(f"random:{family}: expected random:bert or random:llama")


def _write_tokenizer(folder: Path, special: list[str]) -> int:
    """One token a byte, after the special ones; returns the size of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    names = {"pad_token": special[0]}
    if "[CLS]" in special:
        backend.normalizer = normalizers.Lowercase()
        pair = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names |= {"bos_token": special[1], "eos_token": special[2]}
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    return len(vocabulary)
