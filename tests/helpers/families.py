"""Small checkpoints of every family in the layouts that people have, read by ragjax and by transformers.

    python tests/helpers/families.py        # needs the extra torch

writes what transformers computes into tests/golden/families.json.gz and the table of docs/model_families.md. Every
tensor is drawn from its name (`drawn`), so that the golden file needs no weights.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from ragjax.checkpoints.pretrained import PretrainedModel, open_encoder, open_generator
from ragjax.checkpoints.sentence_transformers import resolve_encoding
from ragjax.config import Retriever
from ragjax.models.generator import score
from ragjax.padding import pad_sequences

ROOT = Path(__file__).parents[2]
GOLDEN, TABLE = ROOT / "tests/golden/families.json.gz", ROOT / "docs/model_families.md"
VOCABULARY, ANSWER = 60, 6
TOLERANCE = 1e-4
Tensors = dict[str, np.ndarray]


class Case(NamedTuple):
    """A checkpoint: `kind` is its class in transformers, `config` what is special about it."""

    family: str
    layout: str
    kind: str
    config: dict[str, Any] = {}  # noqa: RUF012  # never changed
    pooling: str = "mean"  # of an encoder; none of a generator
    files: str = "plain"  # how they are laid out, see `write` and `make`

    @property
    def name(self) -> str:
        return f"{self.family}: {self.layout}"


DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40,
}  # fmt: skip
MODERNBERT = ENCODER | {
    "num_hidden_layers": 4, "local_attention": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 24}
BART = {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 40} | {
    f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIDES.items()
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
GEMMA = DECODER | {"head_dim": 8, "query_pre_attn_scalar": 12}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip

CASES = [
    Case("BERT", "BertModel", "BertModel", ENCODER),
    Case("BERT", "BertForMaskedLM", "BertForMaskedLM", ENCODER),
    Case("BERT", "LayerNorm gamma and beta", "BertForPreTraining", ENCODER, "cls", "gamma"),
    Case("BERT", "bfloat16 in two shards", "BertModel", ENCODER, "mean", "shards"),
    Case("BERT", "sentence-transformers, cls, normalised (BGE)", "BertModel", ENCODER, "cls", "sentence"),
    Case("BERT", "sentence-transformers, max", "BertModel", ENCODER, "max", "sentence"),
    Case("BERT", "sentence-transformers, cls, Dense (LaBSE)", "BertModel", ENCODER, "cls", "dense"),
    Case("DPR", "DPRQuestionEncoder", "DPRQuestionEncoder", ENCODER | {"projection_dim": 12}, "cls"),
    Case("DPR", "DPRContextEncoder", "DPRContextEncoder", ENCODER, "cls"),
    Case("RoBERTa", "RobertaModel", "RobertaModel", ENCODER | {"pad_token_id": 1, "type_vocab_size": 1}),
    Case("RoBERTa", "RobertaForMaskedLM", "RobertaForMaskedLM", ENCODER | {"pad_token_id": 1}, "cls"),
    Case("XLM-RoBERTa", "XLMRobertaModel (E5)", "XLMRobertaModel", ENCODER | {"pad_token_id": 1}),
    Case("XLM-RoBERTa", "sentence-transformers, cls (BGE-M3)", "XLMRobertaModel", ENCODER, "cls", "sentence"),
    Case("CamemBERT", "CamembertModel", "CamembertModel", ENCODER),
    Case("DistilBERT", "DistilBertModel", "DistilBertModel", DISTILBERT),
    Case("DistilBERT", "DistilBertForMaskedLM", "DistilBertForMaskedLM", DISTILBERT, "cls"),
    Case("MPNet", "MPNetModel", "MPNetModel", ENCODER),
    Case("MPNet", "MPNetForMaskedLM", "MPNetForMaskedLM", ENCODER, "cls"),
    Case("ModernBERT", "ModernBertModel", "ModernBertModel", MODERNBERT),
    Case(
        "ModernBERT",
        "ModernBertForMaskedLM, biases",
        "ModernBertForMaskedLM",
        MODERNBERT | {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
        "cls",
    ),
    Case("Qwen3", "Qwen3Model (Qwen3-Embedding)", "Qwen3Model", DECODER | {"head_dim": 8}, "last"),
    Case("Qwen3", "sentence-transformers, last", "Qwen3ForCausalLM", DECODER | {"head_dim": 8}, "last", "sentence"),
    Case("Mistral", "MistralModel (E5-Mistral)", "MistralModel", DECODER | {"sliding_window": 5}, "last"),
    Case("Llama", "LlamaForCausalLM", "LlamaForCausalLM", DECODER, ""),
    Case(
        "Llama",
        "tied, bfloat16 in two shards",
        "LlamaForCausalLM",
        DECODER | {"tie_word_embeddings": True},
        "",
        "shards",
    ),
    Case("Llama", "Llama 3's rope", "LlamaForCausalLM", DECODER | {"rope_parameters": LLAMA3}, ""),
    Case(
        "Llama",
        "linear rope",
        "LlamaForCausalLM",
        DECODER | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
        "",
    ),
    Case("Llama", "yarn rope", "LlamaForCausalLM", DECODER | {"head_dim": 8, "rope_parameters": YARN}, ""),
    Case("Mistral", "no window", "MistralForCausalLM", DECODER | {"sliding_window": None}, ""),
    Case("Mistral", "a window shorter than the prompt", "MistralForCausalLM", DECODER | {"sliding_window": 5}, ""),
    Case("Qwen2", "Qwen2ForCausalLM", "Qwen2ForCausalLM", DECODER, ""),
    Case(
        "Qwen2",
        "a window in its last layers",
        "Qwen2ForCausalLM",
        DECODER | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "",
    ),
    Case("Qwen3", "Qwen3ForCausalLM", "Qwen3ForCausalLM", DECODER | {"head_dim": 8}, ""),
    Case("Phi-3", "Phi3ForCausalLM, a window", "Phi3ForCausalLM", DECODER | {"sliding_window": 7}, ""),
    Case(
        "Phi-4-mini",
        "longrope on three quarters of a head",
        "Phi3ForCausalLM",
        DECODER
        | {"hidden_size": 32, "rope_parameters": LONGROPE | {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0] * 3}}
        | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "original_max_position_embeddings": 32},
        "",
    ),
    Case("Gemma 2", "Gemma2ForCausalLM", "Gemma2ForCausalLM", GEMMA | {"sliding_window": 5}, ""),
    Case(
        "Gemma 2",
        "other caps",
        "Gemma2ForCausalLM",
        GEMMA | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "",
    ),
    Case("Gemma 3", "Gemma3ForCausalLM (text)", "Gemma3ForCausalLM", GEMMA | ALTERNATING, ""),
    Case("Gemma 3", "config.json of the hub", "Gemma3ForCausalLM", GEMMA | ALTERNATING, "", "older gemma"),
    Case("BART", "BartForConditionalGeneration", "BartForConditionalGeneration", BART, ""),
    Case("T5", "v1.0", "T5ForConditionalGeneration", T5, ""),
    Case("T5", "v1.1, Flan", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, "", "own head"),
    Case("mT5", "MT5ForConditionalGeneration", "MT5ForConditionalGeneration", T5, "", "own head"),
    Case("mT5", "tied", "MT5ForConditionalGeneration", T5, ""),
    Case("UMT5", "UMT5ForConditionalGeneration", "UMT5ForConditionalGeneration", T5, "", "own head"),
]

# by model_type; what nobody has asked for yet, or has code of its own
REFUSED = {
    "ELECTRA": ("encoder", "electra"),
    "DeBERTa": ("encoder", "deberta-v2"),
    "Nomic BERT": ("encoder", "nomic_bert"),
    "GTE (new)": ("encoder", "new"),
    "GPT-2": ("generator", "gpt2"),
    "OPT": ("generator", "opt"),
    "Granite": ("generator", "granite"),
    "OLMo 2": ("generator", "olmo2"),
    "SmolLM3": ("generator", "smollm3"),
    "Qwen3-MoE": ("generator", "qwen3_moe"),
    "Gemma 3 with images": ("generator", "gemma3"),
    "mBART": ("generator", "mbart"),
    "Pegasus": ("generator", "pegasus"),
}


# checkpoints


def drawn(name: str, shape: tuple[int, ...], seed: str = "") -> np.ndarray:
    """Random values that depend on a tensor's name and shape and the seed: biases are not 0, norms not 1."""
    count = math.prod(shape)
    bits = np.frombuffer(hashlib.shake_256(f"{name} {shape}{seed}".encode()).digest(4 * count), "<u4")
    noise = ((bits / 2**31 - 1) * math.sqrt(3)).reshape(shape)  # of variance 1
    if len(shape) == 1:
        noise = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)
    elif any(part in name for part in ("embed", "shared", "lm_head", "relative_attention_bias", "logits_bias")):
        noise = 0.5 * noise
    else:
        noise = noise * 1.5 / math.sqrt(shape[1])
    return noise.astype(np.float32)


def write(folder: Path, case: Case, config: Mapping[str, Any], shapes: Mapping[str, list[int]], seed: str = "") -> Path:
    """Writes config.json and the tensors, laid out as the case says."""
    folder.mkdir(parents=True)
    files, tensors = case.files, {name: drawn(name, tuple(shape), seed) for name, shape in shapes.items()}
    if files == "gamma":
        ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in ends.items():
            tensors = {name.replace(new, old): value for name, value in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config))
    if files == "shards":
        names, where = sorted(tensors), dict[str, str]()
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-0000{number}-of-00002.safetensors"
            halves = {name: tensors[name].astype(ml_dtypes.bfloat16) for name in part}
            save_file(halves, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if files in ("sentence", "dense"):
        write_modules(folder, case.pooling, config["hidden_size"], dense=files == "dense")
    return folder


def write_modules(folder: Path, pooling: str, width: int, dense: bool) -> None:
    """What sentence-transformers puts around an encoder: pooling, a Dense layer or unit length."""
    mode = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}[pooling]
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense") if dense else ("Normalize", "2_N")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": False, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    (folder / modules[2][1]).mkdir()
    if dense:
        shape = {"in_features": width, "out_features": 10, "bias": True}
        tanh = {"activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(shape | tanh))
        tensors = {"linear.weight": drawn("dense", (10, width)), "linear.bias": drawn("dense.bias", (10,))}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
        about = {"similarity_fn_name": "dot"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(about))


def rows(pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of three texts, padded, their mask, and an answer to each. No token is a padding one."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, VOCABULARY, size) for size in (21, 9, 4)]
    tokens, mask = pad_sequences([text.astype(np.int32) for text in texts], 24, pad)
    return tokens, mask, rng.integers(3, VOCABULARY, (3, ANSWER)).astype(np.int32)


# ragjax


def opened(case: Case, folder: Path, dtype: str = "float32") -> PretrainedModel:
    if not case.pooling:
        return open_generator(folder, dtype=dtype)
    if not (folder / "modules.json").is_file():
        return open_encoder(folder, case.pooling, False, dtype=dtype)
    encoding = resolve_encoding(Retriever(source=str(folder)), folder, folder)
    return open_encoder(folder, encoding.pooling, encoding.normalize, dtype=dtype)


def ours(case: Case, model: PretrainedModel, params: Any = None) -> np.ndarray:
    """Embeddings [n,D] of an encoder, or log-probabilities [n,T] of a generator's answers, by its own parameters."""
    pad = model.hf_config.get("pad_token_id") or 0
    tokens, mask, answers = rows(pad)
    params = model.load_params() if params is None else params
    return np.asarray(_run(model.graphdef, params, tokens, mask, None if case.pooling else answers[:, None]))


@partial(jax.jit, static_argnums=0)
def _run(graph: nnx.GraphDef, params: Any, tokens: jax.Array, mask: jax.Array, answers: jax.Array | None) -> jax.Array:
    """One program for all cases of one network, however their tensors are named."""
    module = nnx.merge(graph, params)
    if answers is None:
        return module(tokens, mask)
    return score(module, module.prefill(tokens, mask), answers)[:, 0]


# transformers


def make(case: Case, folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json and the shapes of all tensors of a checkpoint as transformers saves it."""
    import transformers

    cls = getattr(transformers, case.kind)
    model = cls(cls.config_class(**case.config))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: list(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    if case.files == "own head":
        config["tie_word_embeddings"] = False  # as on the hub
        config.pop("scale_decoder_outputs", None)
        shapes["lm_head.weight"] = shapes["shared.weight"]
    if case.files == "older gemma":
        config.pop("rope_parameters")
        config |= {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 3}
        config |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        config.pop("layer_types")
    return config, shapes


def theirs(case: Case, folder: Path) -> np.ndarray:
    """What transformers, or sentence-transformers where the folder is its own, computes of the same."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    tokens, mask, answers = rows(config.get("pad_token_id") or 0)
    cls = getattr(transformers, case.kind)
    if case.pooling and not case.kind.startswith("DPR"):
        cls = transformers.AutoModel
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    given = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        if case.kind.startswith("DPR"):
            return model(**given).pooler_output.numpy()
        if case.pooling:
            return _embeddings(case, folder, model(**given).last_hidden_state, torch.tensor(mask))
        if config.get("is_encoder_decoder"):
            start = np.full((3, 1), config["decoder_start_token_id"])
            inputs = torch.tensor(np.concatenate([start, answers[:, :-1]], axis=1)).long()
            logits = [model(**given, decoder_input_ids=inputs).logits]
        else:  # one unpadded row after the other
            whole = [[*row[seen], *answer] for row, seen, answer in zip(tokens, mask, answers, strict=True)]
            logits = [model(torch.tensor([row]).long()).logits[:, -ANSWER - 1 : -1] for row in whole]
        logp = torch.log_softmax(torch.cat(logits), dim=-1)
        return torch.gather(logp, 2, torch.tensor(answers).long()[:, :, None])[:, :, 0].numpy()


def _embeddings(case: Case, folder: Path, states: Any, mask: Any) -> np.ndarray:
    import torch

    if (folder / "modules.json").is_file():
        from sentence_transformers.sentence_transformer import modules

        listed = json.loads((folder / "modules.json").read_text())[1:]
        features = {"token_embeddings": states, "attention_mask": mask.long()}
        for module in listed:
            kind = getattr(modules, module["type"].rpartition(".")[2])
            features = kind.load(str(folder / module["path"]))(features)
        return features["sentence_embedding"].numpy()
    if case.pooling == "mean":
        weights = mask[:, :, None].float()
        return ((states * weights).sum(1) / weights.sum(1)).numpy()
    place = torch.zeros(3).long() if case.pooling == "cls" else mask.sum(1) - 1
    return states[torch.arange(3), place].numpy()


def main() -> int:
    """Writes the golden file and the table; 1 if a family is farther off than `TOLERANCE`."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    golden, lines, worst = {}, [], 0.0
    for case in CASES:
        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, shapes = make(case, Path(temporary) / "made")
            folder = write(Path(temporary) / "folder", case, config, shapes)
            expected = theirs(case, folder)
            error = float(np.abs(ours(case, opened(case, folder)) - expected).max())
        worst = max(worst, error)
        print(f"{case.name:60} {error:.1e} of {np.abs(expected).max():.2f}", flush=True)
        kind = "encoder" if case.pooling else "generator"
        lines.append(f"| {case.family} | {kind} | {case.layout} | yes | {error:.0e} |")
        golden[case.name] = {"config": config, "shapes": shapes, "expected": expected.astype(float).round(6).tolist()}
    lines += [f"| {family} | {part} | `{kind}` | refused by name | |" for family, (part, kind) in REFUSED.items()]
    text = json.dumps(golden, sort_keys=True)
    GOLDEN.write_bytes(gzip.compress(text.encode(), mtime=0))
    page = TABLE.read_text(encoding="utf-8")
    head = page[: page.index("| family |")] if "| family |" in page else page
    table = ["| family | | layout | loads | largest error |", "|---|---|---|---|---|", *lines]
    TABLE.write_text(head + "\n".join(table) + "\n", encoding="utf-8")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
