"""Hugging Face's RAG checkpoints ↔ a retriever and a generator in folders of their own, with a configuration.

A RAG checkpoint holds `rag.question_encoder.*` and `rag.generator.*` in one file and two tokenizers in subfolders; its
passages were embedded by another encoder (DPR's context encoder), which it does not hold.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    dpr_prefix,
    merge_peft,
    peft_base,
    peft_config,
    peft_tensors,
)
from ragjax.checkpoints.hub import checkpoint_folder, fetch
from ragjax.checkpoints.pretrained import PretrainedModel, encoder_tensors, generator_tensors
from ragjax.checkpoints.safetensors import SafetensorsReader, write_safetensors
from ragjax.checkpoints.sentence_transformers import copy_sentence_modules, write_sentence_modules
from ragjax.checksums import write_checksums
from ragjax.config import Config, Lora, adapted_maps
from ragjax.data.tokenizer import Tokenizer
from ragjax.errors import InputError
from ragjax.evaluation.model_card import CARD, model_card
from ragjax.files import partial_folder, read_json, shown
from ragjax.models.hf_config import Fields, naming
from ragjax.models.layers import Params
from ragjax.rag import RagPipeline, generation_config, load_pipeline
from ragjax.runs.restore import export_params
from ragjax.runs.run_dir import load_run_config
from ragjax.terminal import terminal

PARTS = {"question_encoder": "question_encoder_tokenizer", "generator": "generator_tokenizer"}
GENERATION = "generation_config.json"
RAG_SETTINGS = "rag.json"  # the RAG checkpoint's own settings, kept for the way back
CONFIG = """\
# {title}, imported. What must still be given: a corpus, questions, and what encodes passages.
#
#   ragjax index config.yaml corpus.source=psgs_w100.tsv retriever.passage_encoder=hf:ORG/CONTEXT-ENCODER
output: {run}
model: {model}
hf_compatible: false # true repeats transformers' numbers to the letter (docs/from_hugging_face.md)
corpus: {{source: "???", format: dpr}}
questions: {{train: "???", dev: "???", test: "???"}}
retriever:
  source: {question_encoder}
  # The checkpoint has no encoder of passages: name the one that was trained together with its question encoder, such as
  # hf:facebook/dpr-ctx_encoder-single-nq-base for facebook/rag-sequence-nq and facebook/rag-token-nq.
  passage_encoder: "???"
  pooling: cls
  normalize: false
  logit_scale: 1.0
  prior: top_k
  passage_template: "{{title}} [SEP] {{text}}" # as DPR's encoders read one
generator:
  source: {generator}
  prompt_template: {prompt}
  passage_template: {passage}
  answer_template: "{{answer}}"
  max_prompt_tokens: {source_tokens}
  max_answer_tokens: {answer_tokens}
train: {{num_docs: {k}, label_smoothing: {label_smoothing}, exclude_bos: {exclude_bos}}}
decode: {decode}
"""
# settings of transformers' search that ragjax has not, and their value where they do nothing
UNSUPPORTED = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "num_beam_groups": 1, "do_sample": False}
CLASSES = {"rag_sequence": "RagSequenceForGeneration", "rag_token": "RagTokenForGeneration"}


def import_rag(source: str, out: Path, base: str | None = None) -> Path:
    """Writes question_encoder/, generator/ and config.yaml into the new folder `out`, and returns it.

    Of PEFT's adapters it writes the model that they make: see `import_adapters`, which `base` is for. Raises
    `InputError` for a source that holds no RAG checkpoint or tensors of neither part, and if `out` exists.
    """
    path = fetch(source).path
    if (path / ADAPTER_CONFIG).is_file():
        return import_adapters(path, base, out)
    if base is not None:
        raise InputError(f"--base is for PEFT's adapters, and {path} has no {ADAPTER_CONFIG}; leave it out")
    checkpoint = checkpoint_folder(path)
    hf = read_json(checkpoint / "config.json")
    if hf.get("model_type") != "rag" or not all(isinstance(hf.get(part), dict) for part in PARTS):
        raise InputError(f"{checkpoint}: not a RAG checkpoint: its config.json has model_type {hf.get('model_type')!r}")
    tensors = _split(checkpoint)
    generation = read_json(checkpoint / GENERATION) if (checkpoint / GENERATION).is_file() else {}
    with _writing(out) as partial:
        for part, tokenizer in PARTS.items():
            (partial / part).mkdir()
            write_safetensors(partial / part / "model.safetensors", tensors[part])
            _write_json(partial / part / "config.json", hf[part])
            if (checkpoint / tokenizer).is_dir():
                for file in (checkpoint / tokenizer).iterdir():
                    if file.suffix in (".json", ".txt", ".model") and file.name != "config.json":
                        shutil.copy(file, partial / part / file.name)
            else:
                terminal.print(f"no {tokenizer}/ in {checkpoint}: put the tokenizer's files into {out / part}")
        if generation:
            _write_json(partial / "generator" / GENERATION, generation)
        _write_json(partial / RAG_SETTINGS, {key: value for key, value in hf.items() if key not in PARTS})
        with naming(checkpoint / "config.json"):
            configuration = _configuration(source, hf, generation, out)
        (partial / "config.yaml").write_text(configuration, encoding="utf-8")
    return out


def import_adapters(folder: Path, base: str | None, out: Path) -> Path:
    """Writes into the new folder `out` the model that PEFT's adapters were trained for, W + s·B·A for W, in float32.

    `base` is its source, by default the one that adapter_config.json names. Raises `InputError` for adapters that are
    not plain LoRA or belong to another model, and if `out` exists.
    """
    whole = checkpoint_folder(fetch(base or peft_base(folder)).path)
    if whole.is_file():
        raise InputError(f"{whole}: adapters are not merged into GGUF; give the Hugging Face folder as --base")
    tensors = dict(merge_peft(folder, SafetensorsReader(whole)))
    with _writing(out) as partial:
        write_safetensors(partial / "model.safetensors", tensors)
        for file in whole.iterdir():
            if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
                shutil.copy(file, partial / file.name)
        copy_sentence_modules(whole, partial)
    return out


def export_rag(run: Path, out: Path, merge: bool = False) -> Path:
    """Writes a run's newest checkpoint (or else its pretrained models) into the new folder `out`, and returns it.

    With BART or T5, `out` is a folder that Hugging Face's RagSequenceForGeneration loads; otherwise it holds a folder
    for each model, question_encoder/ and generator/, that transformers loads by itself, and sentence-transformers the
    encoder as it was used (but for DPR's). Contrastive training leaves no generator; passages' own encoder, where it
    was trained, is in passage_encoder/. Of a model with adapters its folder holds these, as PEFT writes them, or with
    `merge` the whole model. README.md is a model card, checksums.json for `ragjax verify`. Raises `InputError`.
    """
    config = load_run_config(run)
    rag, lora = load_pipeline(config), config.train.lora
    if merge and lora.rank is None:
        raise InputError(f"{run}: has no adapters to merge; leave out --merge")
    params, step = export_params(rag, merge)
    peft = {} if merge else _peft_bases(config)
    whole = rag.generator.config.encoder_decoder and config.train.objective == "marginal" and not peft
    if whole:
        _check_expressible(rag)
    encoders = {"question_encoder": (rag.retriever, params["retriever"], rag.retriever_tokenizer)}
    if config.train.passage_encoder == "own":
        encoders["passage_encoder"] = (rag.passage_encoder, params["passage_encoder"], rag.passage_tokenizer)
    models = {name: (model, own, tokenizer, peft.get(name)) for name, (model, own, tokenizer) in encoders.items()}
    if "generator" in peft:
        models["generator"] = rag.generator, params["generator"], rag.generator_tokenizer, peft["generator"]
    parts = {
        name: _Part(model.hf_config, _tensors(model, own), tokenizer)
        if base is None
        else _adapters_part(model, lora, base, own, tokenizer)
        for name, (model, own, tokenizer, base) in models.items()
    }
    if config.train.objective == "marginal" and "generator" not in peft:
        tensors = generator_tensors(rag.generator.hf_config, params["generator"])
        parts["generator"] = _Part(rag.generator.hf_config, tensors, rag.generator_tokenizer, _generation(rag))
    with _writing(out) as partial:
        joined = PARTS if whole else {}
        if whole:
            tensors = {f"rag.{part}.{name}": value for part in joined for name, value in parts[part].tensors.items()}
            write_safetensors(partial / "model.safetensors", tensors)
            _write_json(partial / "config.json", _rag_config(rag, {part: parts[part].hf_config for part in joined}))
        for name, part in parts.items():
            place = partial / joined.get(name, name)
            place.mkdir()
            part.tokenizer.save(place)
            if name not in joined:
                write_safetensors(place / (ADAPTER_WEIGHTS if name in peft else "model.safetensors"), part.tensors)
                _write_json(place / (ADAPTER_CONFIG if name in peft else "config.json"), part.hf_config)
                if part.generation:
                    _write_json(place / GENERATION, part.generation)
            if name in encoders and name not in peft and part.hf_config.get("model_type") != "dpr":
                model, own, _ = encoders[name]
                write_sentence_modules(place, model.config, own, rag.question_template, rag.passage_template)
        card = model_card(run, config, step, [path.name for path in sorted(partial.iterdir()) if path.is_dir()])
        (partial / CARD).write_text(card, encoding="utf-8")
        write_checksums(partial)
    return out


@dataclass(frozen=True)
class _Part:
    """One model of an exported folder."""

    hf_config: Mapping[str, Any]  # its config.json, or adapter_config.json
    tensors: dict[str, np.ndarray]
    tokenizer: Tokenizer
    generation: Mapping[str, Any] | None = None  # its generation_config.json


def _peft_bases(config: Config) -> dict[str, str]:
    """The folder of each model that has adapters, and the source of the weights beside them."""
    r = config.retriever
    sources = {
        "question_encoder": ("retriever", r.source),
        "passage_encoder": ("passage_encoder", r.passage_encoder or r.source),
        "generator": ("generator", config.generator.source),
    }
    return {name: source for name, (model, source) in sources.items() if adapted_maps(config, model) is not None}


def _adapters_part(model: PretrainedModel, lora: Lora, base: str, params: Params, tokenizer: Tokenizer) -> _Part:
    try:
        tensors = peft_tensors(model, params)
    except InputError as error:
        raise InputError(f"{base}: {error}; export it with --merge") from None
    return _Part(peft_config(model, lora, base, tensors), tensors, tokenizer)


def _generation(rag: RagPipeline) -> dict[str, Any]:
    """What the generator's own checkpoint says of generating, and its end tokens where there are several."""
    ends = {"eos_token_id": list(rag.special.ends)} if rag.special.other_ends else {}
    return generation_config(rag.generator)[1] | ends


def _tensors(encoder: PretrainedModel, params: Params) -> dict[str, np.ndarray]:
    """An encoder's tensors under the names that its own checkpoint has."""
    hf = encoder.hf_config
    return encoder_tensors(hf, params, dpr_prefix(hf) if hf.get("model_type") == "dpr" else "")


def _check_expressible(rag: RagPipeline) -> None:
    """Raises `InputError` for a retriever that Hugging Face's RAG cannot have; prints which prompt it cannot have."""
    r, prompt, kind = (
        rag.config.retriever,
        rag.config.generator.prompt_template,
        rag.retriever.hf_config.get("model_type"),
    )
    if kind != "dpr":
        raise InputError(f"{r.source}: Hugging Face's RAG needs a DPR question encoder, not a {kind!r}")
    encoder = rag.retriever.config
    if (encoder.pooling, encoder.normalize, r.logit_scale, r.prior) != ("cls", False, 1.0, "top_k"):
        raise InputError(
            f"{r.source}: Hugging Face's RAG has retriever.pooling=cls, normalize=false, scale=1.0 and prior=top_k; "
            f"this run has {encoder.pooling}, {str(encoder.normalize).lower()}, {r.logit_scale} and {r.prior}"
        )
    if _separators(rag.config) is None:
        terminal.print(
            f"the prompt {prompt!r} with passages {rag.config.generator.passage_template!r} and answers "
            f"{rag.config.generator.answer_template!r} is lost: Hugging Face's is prefix + title + title_sep + text + "
            "doc_sep + question, and an answer stands by itself",
            soft_wrap=True,
        )


def _separators(config: Config) -> tuple[str, str, str] | None:
    """`prefix`, `title_sep` and `doc_sep`, if that is all there is in the prompt besides passage and question."""
    passage = re.fullmatch(r"([^{}]*)\{title\}([^{}]*)\{text\}", config.generator.passage_template)
    prompt = re.fullmatch(r"([^{}]*)\{passage\}([^{}]*)\{question\}", config.generator.prompt_template)
    if passage is None or prompt is None or config.generator.answer_template != "{answer}":
        return None
    return prompt[1] + passage[1], passage[2], prompt[2]


def _split(checkpoint: Path) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of each part, under the names that the part alone has."""
    tensors: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
    unknown = []
    reader = SafetensorsReader(checkpoint)
    for name in sorted(reader.names):
        part, _, rest = name.removeprefix("rag.").partition(".")
        if part in tensors and rest:
            tensors[part][rest] = reader.read(name)
        else:
            unknown.append(name)
    if unknown or not all(tensors.values()):
        wrong = ", ".join(unknown[:20]) or f"no tensors of {', '.join(p for p in PARTS if not tensors[p])}"
        raise InputError(
            f"{checkpoint}: not the tensors of a RAG checkpoint (question_encoder.* and generator.*): {wrong}"
        )
    return tensors


def _configuration(source: str, hf: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> str:
    """config.yaml for the parts in `folder`, from a RAG checkpoint's config.json and generation_config.json."""

    def quoted(text: str | Path) -> str:
        return json.dumps(str(text), ensure_ascii=False)

    fields = Fields(hf)
    title, doc, k = fields.text("title_sep", " / "), fields.text("doc_sep", " // "), fields.count("n_docs", 5)
    fields.check_class("Rag")
    rag_token = CLASSES["rag_token"] in (hf.get("architectures") or ())
    search = _search_settings(hf, generation, rag_token)
    decode = {"num_docs": k} | _decode(search)
    others = [f"{key}={shown(search[key])}" for key, off in UNSUPPORTED.items() if search.get(key, off) != off]
    comment = f"# Not carried over, since ragjax has nothing like it: {', '.join(others)}\n" if others else ""
    # transformers 5 reads the generator's, older ones this, too
    generator = hf["generator"]
    prefix = Fields(generator if generator.get("prefix") is not None else hf).text("prefix", "")
    # a mere space belongs to the passage, with which it is tokenised
    prompt_prefix, passage_prefix = (prefix, "") if prefix.strip() else ("", prefix)
    return comment + CONFIG.format(
        title=" ".join(source.split()),
        run=quoted(folder.absolute() / "run"),
        question_encoder=quoted(folder.absolute() / "question_encoder"),
        generator=quoted(folder.absolute() / "generator"),
        model="rag_token" if rag_token else "rag_sequence",
        prompt=quoted(f"{prompt_prefix}{{passage}}{doc}{{question}}"),
        passage=quoted(f"{passage_prefix}{{title}}{title}{{text}}"),
        source_tokens=fields.count("max_combined_length", 300),
        answer_tokens=max(25, decode["max_new_tokens"]),
        k=k,
        label_smoothing=fields.number("label_smoothing", 0.0, least=0.0),
        exclude_bos=json.dumps(bool(hf.get("exclude_bos_score")) and not rag_token),
        decode=json.dumps(decode).replace('"', ""),
    )


def _search_settings(hf: Mapping[str, Any], generation: Mapping[str, Any], rag_token: bool) -> dict[str, Any]:
    """What transformers searches by.

    RAG-Sequence takes the number of beams from the RAG's own configuration, and the rest from the generator's;
    RAG-Token takes all from its own and its generation_config.json, which win over the generator's.
    """
    generator, rag = (
        {key: value for key, value in part.items() if value is not None}
        for part in (hf["generator"], {**hf, **generation})
    )
    return generator | (rag if rag_token else {"num_beams": rag.get("num_beams", 1)})


def _decode(search: Mapping[str, Any]) -> dict[str, Any]:
    """The section `decode`, but for the number of documents; transformers counts the start token, ragjax does not."""
    fields = Fields(search)
    longest = max(1, fields.count("max_length", 20) - 1)
    return {
        "num_beams": fields.count("num_beams", 1),
        "max_new_tokens": longest,
        "min_new_tokens": min(longest - 1, max(0, fields.count("min_length", 0, least=0) - 1)),
        "length_penalty": fields.number("length_penalty", 1.0, least=-1e6),
        "early_stopping": search.get("early_stopping") is True,
    }


def _rag_config(rag: RagPipeline, parts: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the whole: what the run's configuration says, the rest as in the RAG checkpoint it came from."""
    imported, generator, config = rag.retriever.files[0].parent.parent / RAG_SETTINGS, parts["generator"], rag.config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    settings = {name: generator[name] for name in names if name in generator}
    settings |= {"is_encoder_decoder": True} | (read_json(imported) if imported.is_file() else {})
    prefix, title_sep, doc_sep = _separators(config) or ("", " / ", " // ")
    if prefix != (generator.get("prefix", settings.get("prefix")) or ""):
        generator = generator | {"prefix": prefix}
    for kind in ("bos", "eos"):  # they may have been in a generation_config.json, which RAG checkpoints do not have
        forced, key = getattr(rag.special, f"forced_{kind}"), f"forced_{kind}_token_id"
        by_default = rag.special.eos if (kind, generator.get("model_type")) == ("eos", "bart") else None
        if forced != generator.get(key, by_default):
            generator = generator | {key: forced}
    if rag.special.other_ends:
        generator = generator | {"eos_token_id": list(rag.special.ends)}
    generator = {"bos_token_id": None} | generator  # T5's has none, and transformers' RAG fails where it is not said
    if config.model == "rag_sequence":  # RAG-Token has no use for it, and may have it all the same
        settings["exclude_bos_score"] = config.train.exclude_bos
    return settings | {
        "model_type": "rag",
        "architectures": [CLASSES[config.model]],
        "n_docs": config.train.num_docs,
        "title_sep": title_sep,
        "doc_sep": doc_sep,
        "max_combined_length": config.generator.max_prompt_tokens,
        "retrieval_vector_size": rag.retriever.config.embedding_dim,
        "label_smoothing": config.train.label_smoothing,
        "question_encoder": parts["question_encoder"],
        "generator": generator,
    }


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` once it is filled. Raises `InputError` where that fails, as on a full disk."""
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder")
    try:
        with partial_folder(out) as partial:
            yield partial
            partial.rename(out)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{out}: cannot be written ({why}); free some space, or choose another folder") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
