"""Tokenizers of Hugging Face folders and of GGUF files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ragjax.checkpoints.gguf import GgufFields
from ragjax.errors import InputError, library_errors
from ragjax.files import read_json, shown
from ragjax.padding import Ids

# GGUF token types, as gguf.TokenType has them
CONTROL, USER_DEFINED = 3, 4
SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")  # T5's, XLM-RoBERTa's, Llama's
MOST_GAPS = 2**20  # among the numbers of a vocabulary


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special ids, read from a Hugging Face folder or a GGUF file.

    `fingerprint` is the SHA-256 of its serialised form; `adds_bos` says whether a prompt starts with `bos_id`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int,
        pad_id: int | None = None,
        bos_id: int | None = None,
        adds_bos: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        if (
            self.vocab_size > len(vocabulary) + MOST_GAPS
        ):  # the library would list all of them, whatever memory that takes
            raise ValueError(f"a token has the number {self.vocab_size - 1}, and there are {len(vocabulary)} tokens")
        serialised = _without_length_limits(backend).to_str()
        self._markup = tokenizers.Tokenizer.from_str(serialised)
        self._plain = tokenizers.Tokenizer.from_str(serialised)
        self._plain.encode_special_tokens = True  # "<|im_end|>" in a passage is ten characters
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.bos_id = bos_id
        self.chat_template = chat_template
        self.fingerprint = "sha256:" + hashlib.sha256(serialised.encode()).hexdigest()
        unigram = re.search(r'"type":"Unigram","unk_id":(\d+)', serialised)
        unknown = int(unigram[1]) if unigram else vocabulary.get(getattr(backend.model, "unk_token", None) or "")
        self._special_ids = {i for i, t in backend.get_added_tokens_decoder().items() if t.special} - {unknown}
        added = self._plain.encode("a").special_tokens_mask
        self._tokens_after = added[::-1].index(0) if 0 in added else 0
        if adds_bos is None:
            adds_bos = bos_id is not None and self._markup.encode("").ids[:1] == [bos_id]
        self.adds_bos = adds_bos and bos_id is not None

    @classmethod
    def load(cls, path: Path, writes: bool = True, lower: bool = False) -> Tokenizer:
        """Reads a folder with `tokenizer.json`, or the metadata of a `.gguf` file. Raises `InputError`.

        Args:
            path: the folder or file.
            writes: whether its model writes texts, for which a token must end them.
            lower: whether texts are read in lower case, whatever the tokenizer itself does.
        """
        path = Path(path)
        if path.is_dir():
            return _from_folder(path, writes, lower)._check(path)
        if not path.is_file():
            raise InputError(f"{path}: no such tokenizer; expected a Hugging Face folder or a .gguf file")
        if path.suffix != ".gguf":
            raise InputError(f"{path}: expected a Hugging Face folder with tokenizer.json, or a .gguf file")
        return _from_gguf(path)._check(path)

    def _check(self, path: Path) -> Tokenizer:
        for kind, i in (("end", self.eos_id), ("padding", self.pad_id), ("first", self.bos_id)):
            if i is not None and not 0 <= i < self.vocab_size:
                raise InputError(f"{path}: its {kind} token is number {i}; expected 0 to {self.vocab_size - 1}")
        return self

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which `load` and transformers read it again."""
        names = {"eos_token": self.eos_id, "pad_token": self.pad_id, "bos_token": self.bos_id}
        config: dict[str, Any] = {kind: self.token(i) for kind, i in names.items() if i is not None}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.adds_bos}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer.json").write_text(self._markup.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, texts: Sequence[str], special: bool = False, longest: int | None = None) -> list[list[int]]:
        """The tokens of user text, in which no special token is recognised; at most `longest` for each text.

        `special` adds the tokens that the tokenizer itself puts around a text, such as [CLS] … [SEP]; they stay when
        a text is cut.
        """
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=special)
        rows = [self._plain_ids(text, e, special) for text, e in zip(texts, encodings, strict=True)]
        if longest is None:
            return rows
        end = self._tokens_after if special else 0
        return [row if len(row) <= longest else row[: longest - end] + row[len(row) - end :] for row in rows]

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the tokenizer itself puts before and after a text."""
        [row] = self.encode([""], special=True)
        return tuple(row[: len(row) - self._tokens_after]), tuple(row[len(row) - self._tokens_after :])

    def encode_markup(self, text: str) -> list[int]:
        """The tokens of a piece of template, in which special tokens count."""
        return self._markup.encode(text, add_special_tokens=False).ids

    def split_special(self, template: str) -> list[str | int]:
        """A template cut at the special tokens in it: text and token ids in turn, text first and last."""
        special = {self.token(i): i for i in self._special_ids}
        pieces = re.split("|".join(f"({re.escape(token)})" for token in special) or r"(?!)", template)
        return [special.get(piece, piece) for piece in pieces if piece is not None]

    def decode(self, ids: Ids) -> str:
        """The text of tokens, without the special ones."""
        return self._markup.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, token_id: int | None) -> str:
        """The token of an id as the vocabulary writes it; none, for no id."""
        return "" if token_id is None else self._markup.id_to_token(token_id) or ""

    def _plain_ids(self, text: str, encoding: tokenizers.Encoding, special: bool) -> list[int]:
        # A Unigram model finds "</s>" among its ordinary pieces whatever `encode_special_tokens` says: cut it in two.
        if self._special_ids.isdisjoint(encoding.ids):
            return encoding.ids
        found = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        cuts = [start + 1 for i, added, (start, _) in found if i in self._special_ids and not added]
        if not cuts:
            return encoding.ids
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        again = self._plain.encode([p for p in pieces if p], is_pretokenized=True, add_special_tokens=special)
        kept = zip(again.ids, again.special_tokens_mask, strict=True)
        return [i for i, added in kept if added or i not in self._special_ids]


def _without_length_limits(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_folder(folder: Path, writes: bool, lower: bool) -> Tokenizer:
    file = folder / "tokenizer.json"
    with library_errors(f"{file if file.is_file() else folder}: not a tokenizer", "fetch it again"):
        backend = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else _convert(folder)
        if lower:
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    names, numbers = (
        {
            key: (folder / file, value)
            for file in files
            if (folder / file).is_file()
            for key, value in read_json(folder / file).items()
        }
        for files in (("special_tokens_map.json", "tokenizer_config.json"), ("config.json", "generation_config.json"))
    )

    def take(key: str, kind: Any, expected: str) -> Any:
        path, value = names.get(key, (folder, None))
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{path}: {key} is {shown(value)}; expected {expected}")
        return value

    def find(kind: str) -> int | None:
        path, name = names.get(f"{kind}_token", (folder, None))
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None:
            if not isinstance(name, str):
                raise InputError(f"{path}: {kind}_token is {shown(name)}; expected a token's text")
            return backend.token_to_id(name)
        path, number = numbers.get(f"{kind}_token_id", (folder, None))  # one, or all that end a text
        number = next(iter(number), None) if isinstance(number, list) else number
        if number is not None and type(number) is not int:
            raise InputError(f"{path}: {kind}_token_id is {shown(number)}; expected a token's number")
        return None if number == -1 else number  # older files' none

    eos_id = find("eos")
    eos_id = find("sep") if eos_id is None else eos_id
    pad_id = find("pad")
    bos_id, adds_bos = find("bos"), take("add_bos_token", bool, "true or false")
    ended = take("add_eos_token", bool, "true or false")
    if not writes:
        with library_errors(f"{file}: the tokenizer does not work", "fetch it again"):
            framed = backend.encode("").ids
            if ended and eos_id is not None and framed[-1:] != [eos_id]:
                _end_texts(backend, framed, eos_id)
        if eos_id is None:  # what stands after a text, or else any token: nobody asks for it
            eos_id = next(iter(framed[::-1]), pad_id or 0)
    if eos_id is None:
        raise InputError(f"{folder}: names no end token; give eos_token in tokenizer_config.json")
    template = _chat_template(folder, take("chat_template", str | list, "a text or a list of them"))
    with library_errors(f"{file}: the tokenizer does not work", "fetch it again"):
        return Tokenizer(
            backend, eos_id=eos_id, pad_id=pad_id, bos_id=bos_id, adds_bos=adds_bos, chat_template=template
        )


def _end_texts(backend: tokenizers.Tokenizer, framed: list[int], eos_id: int) -> None:
    """Puts the end token after every text, as transformers does for `add_eos_token`; `framed` is an empty text's."""
    used = {f"T{i}": (i, backend.id_to_token(i)) for i in (*framed, eos_id)}
    single = " ".join([*(f"T{i}" for i in framed), "$A", f"T{eos_id}"])
    special = [{"id": name, "ids": [i], "tokens": [token]} for name, (i, token) in used.items()]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _chat_template(folder: Path, given: str | list | None) -> str | None:
    """The one in tokenizer_config.json, of several named ones the default; else that of chat_template.jinja."""
    config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if isinstance(given, list):
        if not all(isinstance(one, dict) and isinstance(one.get("template"), str) for one in given):
            raise InputError(f'{config}: chat_template is {shown(given)}; expected a list of {{"name", "template"}}')
        given = next((one["template"] for one in given if one.get("name") == "default"), None)
    if given is None and file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error})") from None
    return given


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """What transformers makes of an older tokenizer: vocab.txt, vocab.json with merges.txt, a SentencePiece model."""
    pieces = next((name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if not pieces and not any((folder / name).is_file() for name in ("vocab.txt", "vocab.json")):
        raise InputError(f"has no tokenizer.json, vocab.txt, vocab.json or {', '.join(SENTENCEPIECE)} in {folder}")
    if pieces and not find_spec("sentencepiece"):
        raise InputError(
            f"{folder / pieces}: to read it, run: pip install 'ragjax[sentencepiece]'; or put a tokenizer.json beside "
            "it (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one)"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would complain that there is no torch
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).backend_tokenizer


def _from_gguf(file: Path) -> Tokenizer:
    read = GgufFields(file).take
    model, kind = read("tokenizer.ggml.model", str), read("tokenizer.ggml.pre", str)
    tokens, merges = read("tokenizer.ggml.tokens", list, str), read("tokenizer.ggml.merges", list, str)
    eos_id = read("tokenizer.ggml.eos_token_id", int)
    if model != "gpt2" or tokens is None or merges is None or eos_id is None:
        raise InputError(
            f"{file}: its tokenizer (tokenizer.ggml.model = {model!r}) is not a byte-level BPE with merges and an "
            "end token; give the Hugging Face folder, with tokenizer.json, instead"
        )
    backend = _byte_level_bpe(str(kind), tokens, merges, file)
    types = read("tokenizer.ggml.token_type", list, int) or []
    adds_bos = read("tokenizer.ggml.add_bos_token", bool)
    given = {
        "pad_id": read("tokenizer.ggml.padding_token_id", int),
        "bos_id": read("tokenizer.ggml.bos_token_id", int),
        "adds_bos": kind == "llama-bpe" if adds_bos is None else adds_bos,  # Llama 3 files leave the key out
        "chat_template": read("tokenizer.chat_template", str),
    }
    with library_errors(f"{file}: the tokenizer does not work", "fetch it again"):
        for special_type, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [t for t, type_ in zip(tokens, types, strict=False) if type_ == special_type]
            backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])
        return Tokenizer(backend, eos_id=eos_id, **given)


def _byte_level_bpe(kind: str, tokens: list[str], merges: list[str], file: Path) -> tokenizers.Tokenizer:
    """The BPE of a GGUF file; `kind` (tokenizer.ggml.pre) names how text is split into words before it."""
    # The regular expression of Llama 3 and Qwen 2, which differ in how many digits stand together.
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    pre = pre_tokenizers
    split: pre_tokenizers.PreTokenizer
    gpt2 = pre.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        split = pre.Sequence([pre.Digits(individual_digits=True), gpt2])
    elif kind == "gpt-2":
        split = gpt2
    elif kind in ("llama-bpe", "qwen2"):
        pattern = Regex(words.replace("DIGITS", "{1,3}" if kind == "llama-bpe" else ""))
        bytes_only = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre.Sequence([pre.Split(pattern, "isolated"), bytes_only])
    else:
        raise InputError(
            f"{file}: how it splits text (tokenizer.ggml.pre = {kind!r}) is unknown here; known are smollm, gpt-2, "
            "llama-bpe and qwen2; give the Hugging Face folder, with tokenizer.json, instead"
        )
    pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
    with library_errors(f"{file}: its tokenizer's merges do not fit its tokens", "fetch it again"):
        vocabulary = {t: i for i, t in enumerate(tokens)}
        bpe = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=kind == "llama-bpe")
    backend = tokenizers.Tokenizer(bpe)
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend
