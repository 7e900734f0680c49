"""What a sentence-transformers folder says of pooling, normalisation and prompts, held against the configuration.

modules.json names what comes after the encoder, each module's config.json how it is set; prompts stand in
config_sentence_transformers.json. What ragjax does not have yet, such as a Dense layer, is refused.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ragjax.config import Retriever
from ragjax.errors import InputError
from ragjax.files import read_json, shown, unicode_json

POOLINGS = {"mean": "mean", "cls": "cls", "mean_tokens": "mean", "cls_token": "cls"}  # theirs: ours
OLDER = "pooling_mode_"  # before each kind's own true or false
SUPPORTED = ("Transformer", "Pooling", "Normalize")


def check_sentence_transformers(encoder: Path, settings: Retriever, questions: bool, passages: bool) -> None:
    """Raises `InputError` where the folder of an encoder contradicts `settings`, naming the setting that mends it.

    `questions` and `passages` say what the encoder is there for. A folder without modules.json says nothing.
    """
    root = next((folder for folder in (encoder, encoder.parent) if (folder / "modules.json").is_file()), None)
    if root is None:
        return
    modules = _modules(root / "modules.json")
    kinds = [kind for kind, _ in modules]
    if root != encoder and ("Transformer", encoder.name) not in modules:
        return  # of another model, beside this one
    if unknown := [kind for kind in kinds if kind not in SUPPORTED]:
        raise InputError(f"{root / 'modules.json'}: a {unknown[0]} module is not supported; give an encoder without it")
    for kind, path in modules:
        if kind == "Pooling":
            _check_pooling(root / path / "config.json", settings)
    about = root / "config_sentence_transformers.json"
    details = read_json(about) if about.is_file() else {}
    normalize = {"cosine": True, "dot": False}.get(str(details.get("similarity_fn_name")))
    normalize = True if "Normalize" in kinds else normalize
    if normalize not in (None, settings.normalize):
        problem = f"{root / 'modules.json'}: its embeddings are {'L2-normalised' if normalize else 'not normalised'}"
        raise InputError(f"{problem}; set retriever.normalize={str(normalize).lower()}")
    _check_prompts(about, details, settings, questions, passages)


def _modules(path: Path) -> list[tuple[str, str]]:
    """The kind of each module and its folder."""
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


def _check_pooling(path: Path, settings: Retriever) -> None:
    entries = read_json(path, "modules.json names it; fetch it again")
    older = [key.removeprefix(OLDER) for key, value in entries.items() if key.startswith(OLDER) and value]
    mode = entries.get("pooling_mode", older)
    kinds: list[Any] = mode if isinstance(mode, list) else [mode]
    if len(kinds) != 1 or not isinstance(kinds[0], str) or kinds[0] not in POOLINGS:
        raise InputError(f"{path}: it pools by {shown(mode)}; supported are mean and cls, one of them")
    if (pooling := POOLINGS[kinds[0]]) != settings.pooling:
        raise InputError(f"{path}: it pools by {pooling}, not {settings.pooling}; set retriever.pooling={pooling}")


def _check_prompts(path: Path, details: dict[str, Any], settings: Retriever, questions: bool, passages: bool) -> None:
    prompts, usual = details.get("prompts") or {}, details.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise InputError(f"{path}: prompts is {shown(prompts)}; expected texts by name")

    def prompt(*names: str) -> str:
        return next((prompts[name] for name in (*names, str(usual)) if name in prompts), "")

    if questions and (before := prompt("query")):
        raise InputError(
            f"{path}: questions begin with {shown(before)}, which is not supported yet; give an encoder without prompts"
        )
    if passages and not settings.passage_template.startswith(before := prompt("document", "passage", "corpus")):
        raise InputError(
            f"{path}: passages begin with {shown(before)}; "
            f"set retriever.passage_template={shown(before + settings.passage_template)}"
        )
