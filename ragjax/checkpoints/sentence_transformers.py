"""What a sentence-transformers folder says of pooling, Dense layers, unit length and prompts: the retriever's defaults.

modules.json names what comes after the encoder, each module's config.json how it is set; prompts stand in
config_sentence_transformers.json, and whether texts are lowered in sentence_bert_config.json. A module that ragjax does
not have is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ragjax.checkpoints.safetensors import write_safetensors
from ragjax.config import Retriever
from ragjax.errors import InputError
from ragjax.files import read_json, shown, unicode_json
from ragjax.models.encoders.pooling import Dense
from ragjax.models.hf_config import Fields, naming
from ragjax.models.layers import Params
from ragjax.terminal import terminal

POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}  # theirs: ours
OLDER = "pooling_mode_"  # before each kind's own true or false, such as pooling_mode_mean_tokens
AFTER = ("Pooling", "Dense", "Normalize")  # the encoder
SUPPORTED = ("Transformer", *AFTER)
ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}  # theirs: ours
PROMPTS, SETTINGS = "config_sentence_transformers.json", "sentence_bert_config.json"
TEMPLATE = "{title}: {text}"  # of a passage, after its prompt


@dataclass(frozen=True)
class SentenceModules:
    """What a folder says; of what is None it says nothing."""

    file: Path  # its modules.json
    pooling: str | None
    normalize: bool | None
    dense: tuple[tuple[Path, Dense], ...]  # each with its folder
    prompts: dict[str, str]
    usual: str  # the prompt of what has none of its own

    def prompt(self, *names: str) -> str:
        """The prompt of the first of these names that there is."""
        return next((self.prompts[name] for name in names if name in self.prompts), self.usual)


class Encoding(NamedTuple):
    """How questions and passages become embeddings: the configuration, and where it is silent the folders."""

    pooling: str
    normalize: bool
    question_template: str
    passage_template: str


def read_sentence_modules(encoder: Path) -> SentenceModules | None:
    """What the folder of an encoder says, None where it has no modules.json.

    Raises `InputError` for a module, an order, a pooling or an activation that is not supported.
    """
    root = next((folder for folder in (encoder, encoder.parent) if (folder / "modules.json").is_file()), None)
    if root is None:
        return None
    file = root / "modules.json"
    modules = module_list(file)
    if root != encoder and ("Transformer", encoder.name) not in modules:
        return None  # of another model, beside this one
    kinds = [kind for kind, _ in modules]
    if unknown := [kind for kind in kinds if kind not in SUPPORTED]:
        raise InputError(f"{file}: a {unknown[0]} module is not supported; give an encoder without it")
    if kinds != sorted(kinds, key=SUPPORTED.index) or any(kinds.count(kind) > 1 for kind in kinds if kind != "Dense"):
        raise InputError(f"{file}: its modules are {', '.join(kinds)}; expected the order {', '.join(SUPPORTED)}")
    folders: dict[str, list[Path]] = {kind: [root / path for k, path in modules if k == kind] for kind in SUPPORTED}
    about = root / PROMPTS
    details = read_json(about) if about.is_file() else {}
    prompts, usual = details.get("prompts") or {}, details.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise InputError(f"{about}: prompts is {shown(prompts)}; expected texts by name")
    pooling = [_pooling(folder / "config.json", any(prompts.values())) for folder in folders["Pooling"]]
    similarity = details.get("similarity_fn_name")  # without one, sentence-transformers takes the cosine
    if similarity in ("euclidean", "manhattan") and not folders["Normalize"]:
        raise InputError(
            f"{about}: similarity_fn_name is {shown(similarity)}, which inner products do not give; give an encoder "
            "for cosine or dot"
        )
    compared = {"cosine": True, "dot": False}.get(str(similarity))
    return SentenceModules(
        file,
        pooling[0] if pooling else None,
        True if folders["Normalize"] else compared,
        tuple((folder, _dense(folder / "config.json")) for folder in folders["Dense"]),
        prompts,
        prompts.get(str(usual), ""),
    )


def resolve_encoding(settings: Retriever, questions: Path, passages: Path) -> Encoding:
    """The configuration, and where it says nothing what the folders of both encoders say; what contradicts is told.

    Raises `InputError` as `read_sentence_modules` does, and where the configuration is silent and the folders differ.
    """
    folders = [read_sentence_modules(path) for path in dict.fromkeys((questions, passages))]
    speaking = [folder for folder in folders if folder is not None]
    pooling = _resolve("pooling", settings.pooling, [(m.file, m.pooling) for m in speaking], "mean")
    normalize = _resolve("normalize", settings.normalize, [(m.file, m.normalize) for m in speaking], True)
    query, document = (
        modules.prompt(*names) if modules else ""
        for modules, names in ((folders[0], ("query",)), (folders[-1], ("document", "passage", "corpus")))
    )
    templates = []
    for key, text, modules, prompt, usual in (
        ("question_template", settings.question_template, folders[0], query, "{question}"),
        ("passage_template", settings.passage_template, folders[-1], document, TEMPLATE),
    ):
        templates.append(prompt + usual if text is None else text)
        if modules and not templates[-1].startswith(prompt):
            _tell(modules.file.with_name(PROMPTS), f"prompt {shown(prompt)}", key, text)
    return Encoding(pooling, normalize, *templates)


def reads_lower_case(encoder: Path) -> bool:
    """Whether sentence-transformers lowers texts before the tokenizer of an encoder reads them; it may do so as well.

    Raises `InputError` where its file does not say so rightly.
    """
    path = encoder / SETTINGS
    if not path.is_file():
        return False
    settings = read_json(path)
    with naming(path):
        return Fields(settings).flag("do_lower_case", False)


def write_sentence_modules(
    folder: Path, config: Any, params: Params, question_template: str, passage_template: str
) -> None:
    """Writes what comes after an encoder in `folder`, so that sentence-transformers and ragjax read it as it was used.

    `config` is the encoder's, and `params` hold its Dense layers. A template is kept as far as it is a prompt.
    """
    dense = [(f"{number + 2}_Dense", f"dense_{number}", shape) for number, shape in enumerate(config.dense)]
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *(("Dense", name) for name, _, _ in dense)]
    modules += [("Normalize", f"{len(modules)}_Normalize")] if config.normalize else []
    for _, name in modules[1:]:
        (folder / name).mkdir()
    listed = [
        {"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, name) in enumerate(modules)
    ]
    theirs = {ours: name for name, ours in POOLINGS.items()}[config.pooling]
    mode = theirs + {"cls": "_token", "last": ""}.get(config.pooling, "_tokens")
    pooling = {"word_embedding_dimension": config.hidden_size, f"{OLDER}mean_tokens": False, OLDER + mode: True}
    _write_json(folder / "modules.json", listed)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    for name, ours, shape in dense:
        kind = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[shape.activation]
        module = "linear" if kind == "Identity" else "activation"
        settings = {"in_features": shape.size_in, "out_features": shape.size_out, "bias": shape.bias}
        settings |= {"activation_function": f"torch.nn.modules.{module}.{kind}"}
        _write_json(folder / name / "config.json", settings)
        tensors = {"linear.weight": np.ascontiguousarray(np.asarray(params[ours]["kernel"]).T)}
        tensors |= {"linear.bias": np.asarray(params[ours]["bias"])} if shape.bias else {}
        write_safetensors(folder / name / "model.safetensors", tensors)
    ends = {"query": (question_template, "{question}"), "document": (passage_template, TEMPLATE)}
    prompts = {name: text.removesuffix(end) for name, (text, end) in ends.items() if text.endswith(end)}
    similarity = "cosine" if config.normalize else "dot"
    _write_json(folder / PROMPTS, {"prompts": prompts, "similarity_fn_name": similarity})


def copy_sentence_modules(encoder: Path, out: Path) -> None:
    """Puts into `out`, the folder of another encoder of that shape, what comes after the one in `encoder`, if anything.

    Raises `InputError` as `read_sentence_modules` does.
    """
    if (modules := read_sentence_modules(encoder)) is None:
        return
    root, entries = modules.file.parent, unicode_json(modules.file.read_bytes(), modules.file)
    for entry in entries:
        if entry["type"].endswith("Transformer"):
            entry["path"] = ""
        elif (root / entry["path"]).is_dir() and root / entry["path"] != root:  # of Normalize there may be none
            shutil.copytree(root / entry["path"], out / entry["path"])
    _write_json(out / "modules.json", entries)
    if (root / PROMPTS).is_file():
        shutil.copy(root / PROMPTS, out)


def module_list(path: Path) -> list[tuple[str, str]]:
    """The kind of each module in a modules.json, and its folder. Raises `InputError`."""
    try:
        entries = unicode_json(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    wrong = InputError(f'{path}: expected a list of modules, each with a "type" and a "path"; fetch it again')
    if not isinstance(entries, list):
        raise wrong
    modules = []
    for entry in entries:
        kind, place = (entry.get(key) for key in ("type", "path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str) or "\0" in place:
            raise wrong
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise wrong
        modules.append((kind.rpartition(".")[2], place))
    return modules


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _resolve(key: str, given: Any, said: Sequence[tuple[Path, Any]], usual: Any) -> Any:
    """The setting `retriever.KEY` if it is given, else what a folder says, else the usual value."""
    values = [(file, value) for file, value in said if value is not None]
    if given is not None:
        for file, value in values:
            if value != given:
                _tell(file, f"{key} {shown(value)}", key, given)
        return given
    if any(value != values[0][1] for _, value in values):
        claims = " and ".join(f"{shown(value)} in {file}" for file, value in values)
        raise InputError(f"the encoders of questions and passages differ: {key} is {claims}; set retriever.{key}")
    return values[0][1] if values else usual


def _tell(file: Path, theirs: str, key: str, ours: Any) -> None:
    terminal.print(f"{file}: says {theirs}; retriever.{key}={shown(ours)} is what counts", soft_wrap=True)


def _pooling(path: Path, prompted: bool) -> str:
    entries = read_json(path, "modules.json names it; fetch it again")
    older = [key.removeprefix(OLDER) for key, value in entries.items() if key.startswith(OLDER) and value]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in older]
    mode = entries.get("pooling_mode", modes)
    kinds: list[Any] = mode if isinstance(mode, list) else [mode]
    if len(kinds) != 1 or not isinstance(kinds[0], str) or kinds[0] not in POOLINGS:
        raise InputError(f"{path}: it pools by {shown(mode)}; supported are {', '.join(POOLINGS)}, one of them")
    if prompted and entries.get("include_prompt") is False:
        raise InputError(
            f"{path}: include_prompt is false, and pooling without the prompt is not supported; give an encoder that "
            "pools with it"
        )
    return POOLINGS[kinds[0]]


def _dense(path: Path) -> Dense:
    entries = read_json(path, "modules.json names it; fetch it again")
    with naming(path):
        fields = Fields(entries)
        name = fields.text("activation_function", "Tanh").rpartition(".")[2]
        if name not in ACTIVATIONS:
            raise InputError(f"activation_function is {shown(name)}; expected one of {', '.join(ACTIVATIONS)}")
        for key in ("module_input_name", "module_output_name"):
            fields.text(key, "sentence_embedding", among=("sentence_embedding",))
        return Dense(
            fields.count("in_features"), fields.count("out_features"), fields.flag("bias", True), ACTIVATIONS[name]
        )
