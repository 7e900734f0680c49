"""How a configuration is read: OmegaConf merges YAML and overrides and resolves interpolations, pydantic validates.

A configuration is any pydantic model whose fields are values or such models again, its sections. All wrong values are
told at once, each with its key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic.fields import FieldInfo

from ragjax.config.renamed import RENAMED
from ragjax.errors import InputError
from ragjax.files import shown

MUST_BE_GIVEN = "must be given"
MISSING = "???"  # OmegaConf's word for what must be given
DEEPEST = 5  # levels of sections and lists; a key that is known has fewer
EXPECTED = {  # by the type of pydantic's error
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text (in quotes where it looks like something else)",
    "string_too_short": "a text that is not empty",
    "string_unicode": "Unicode text",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:.10g}",
    "greater_than_equal": "{ge:.10g} or more",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
}
LARGEST = 2**31 - 1  # what NumPy, JAX and Grain can count to

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Strict(False)]  # a list in YAML
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


S = TypeVar("S", bound="Section")


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Checked(ModelMetaclass):
    """What a program gives is refused in the same words as what stands in a file."""

    def __call__(cls, **values: Any) -> Any:
        return validated(cls, values)  # type: ignore[arg-type]


class Section(BaseModel, metaclass=_Checked):
    """A part of the configuration. Its values cannot be changed; `replace` makes a copy with other ones.

    `Config(**tree)` makes one of a tree of values, as of YAML; it raises `InputError` for what is wrong in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def replace(self: S, **changes: object) -> S:
        """A copy with other values, checked as those of a file are. Raises `InputError`."""
        return validated(type(self), dict(self) | changes)


def template(*needed: str, also: str = "", or_word: str = "") -> Callable[[str], str]:
    """A check of texts with slots such as {title}: all the needed ones, perhaps `also`, and no others.

    Where a word may stand instead of a template, each needed slot stands in it only once.
    """
    slots = (*needed, also) if also else needed
    once = f" once (or be the word {or_word})" if or_word else ""

    def check(text: str) -> str:
        found = re.findall(r"\{[A-Za-z_]\w*\}", text)
        lacking = [slot for slot in needed if slot not in found or (once and found.count(slot) > 1)]
        problems = [f"must contain {slot}{once}" for slot in lacking]
        if unknown := sorted(set(found) - set(slots)):
            problems.append(f"has the unknown slot {', '.join(unknown)} (known are {', '.join(slots)})")
        if problems and text != or_word:
            raise ValueError(" and ".join(problems))
        return text

    return check


def read_model(model: type[S], path: Path, overrides: Sequence[str]) -> S:
    """Reads a YAML file into a model and applies overrides such as `train.steps=10`; the last of one key counts.

    Raises `InputError` for a missing file, an unknown or missing key, a wrong type or an impossible value.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file; the ready-made ones are in configs/")
    tree = _merged(_defaults(model), _loaded(str(path), OmegaConf.load, path))
    for override in overrides:
        if "=" not in override:
            raise InputError(f"{shown(override)}: an override is written key=value, for example train.steps=10")
        tree = _merged(tree, _loaded(f"{path}: {shown(override)}", OmegaConf.from_dotlist, [override]))
    problems: dict[str, str] = {}
    try:
        read = model.model_validate(_resolved(_container(path, tree), "", 0, problems))
    except ValidationError as error:
        problems = _explained(model, error) | problems
    if problems:
        raise InputError(f"{path}{_overridden(overrides, list(problems))}: {_message(problems)}")
    return read


def validated(model: type[S], values: dict[str, Any]) -> S:
    """A model of these values. Raises `InputError` that names each wrong one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{model.__name__}: {_message(_explained(model, error))}") from None


def escaped(value: Any) -> Any:
    """A tree in whose texts OmegaConf sees no interpolation."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def default_yaml(model: type[Section], indent: str = "") -> str:
    """All keys with their defaults, ??? where there is none, and what each means."""
    lines = []
    for name, field in model.model_fields.items():
        if section := _section(field):
            lines += ["", f"{indent}# {_summary(section)}", f"{indent}{name}:", default_yaml(section, f"{indent}  ")]
        else:
            value = MISSING if field.is_required() else json.dumps(field.default, ensure_ascii=False)
            lines.append(f"{indent}{name}: {value} # {field.description}")
    return "\n".join(lines)


def json_schema(model: type[Section]) -> dict[str, Any]:
    """The JSON Schema of a model's YAML."""
    from pydantic.json_schema import GenerateJsonSchema

    class Untitled(GenerateJsonSchema):
        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    schema = model.model_json_schema(schema_generator=Untitled)
    for _, section in _schema_sections(schema, schema):
        for spec in section["properties"].values():
            if "$ref" in spec:  # a section's own keys have its defaults
                spec.pop("default", None)
    return {"$schema": GenerateJsonSchema.schema_dialect} | schema


def reference_page(schema: dict[str, Any]) -> str:
    """All keys of a JSON Schema as Markdown: for each section a table of key, type, default and meaning."""
    lines = []
    for name, section in _schema_sections(schema, schema):
        title, meaning = (f"`{name}`", section["description"]) if name else ("Top level", "Keys outside any section.")
        lines += [f"## {title}", "", meaning, "", "| Key | Value | Default | Meaning |", "|---|---|---|---|"]
        for key, spec in section["properties"].items():
            if "$ref" not in spec:
                default = (
                    f"`{json.dumps(spec['default'], ensure_ascii=False)}`" if "default" in spec else "must be given"
                )
                meaning = spec["description"].replace("<", "&lt;")
                cells = (f"`{name}.{key}`" if name else f"`{key}`", _kind(spec), default, meaning)
                lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _schema_sections(schema: dict[str, Any], section: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """A section of a JSON Schema and those in it, each with its key."""
    yield name, section
    for key, spec in section["properties"].items():
        if "$ref" in spec:
            yield from _schema_sections(schema, schema["$defs"][spec["$ref"].rpartition("/")[2]], _joined(name, key))


def _kind(spec: dict[str, Any]) -> str:
    """What a value may be, from its JSON Schema."""
    if "anyOf" in spec:
        return " or ".join(map(_kind, spec["anyOf"]))
    if "enum" in spec:
        return ", ".join(f"`{choice}`" for choice in spec["enum"])
    names = {"integer": "whole number", "string": "text", "boolean": "true or false", "array": "list of texts"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {spec[bound]:.10g}" for bound, sign in signs.items() if spec.get(bound, LARGEST) != LARGEST]
    return ", ".join([names.get(spec["type"], spec["type"]), *bounds])


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").splitlines()[0]


def _defaults(model: type[Section]) -> dict[str, Any]:
    """All keys of a model, ??? where one must be given."""
    return {
        name: _defaults(section) if (section := _section(field)) else MISSING if field.is_required() else field.default
        for name, field in model.model_fields.items()
    }


def _keys(model: type[Section], before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield before + name
        if section := _section(field):
            yield from _keys(section, f"{before}{name}.")


def _loaded(where: str, load: Callable[[Any], Any], source: Any) -> dict[Any, Any]:
    """What OmegaConf reads, as it stands there."""
    try:
        tree = OmegaConf.to_container(load(source), resolve=False)
    except Exception as error:  # a YAML syntax error carries its own line number
        raise InputError(f"{where}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{where}: holds a list; expected keys with values, such as output: runs/mine")
    return tree


def _container(path: Path, tree: dict[Any, Any]) -> Any:
    try:
        return OmegaConf.create(tree)
    except Exception as error:  # a value that it cannot hold, or half an interpolation
        raise InputError(f"{path}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OmegaConfBaseException):  # lines about its own objects follow
        key = getattr(error, "full_key", None)
        text = (f"{key}: " if key else "") + text.partition("\n")[0]
    return " ".join(text.split()) or type(error).__name__


def _merged(tree: Any, more: Any) -> Any:
    if not (isinstance(tree, dict) and isinstance(more, dict)):
        return more
    return tree | {key: _merged(tree.get(key), value) for key, value in more.items()}


def _resolved(node: Any, at: str, depth: int, problems: dict[str, str]) -> Any:
    """Plain values without interpolations. Adds the keys that are ???, and interpolations that fail, to `problems`."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    if depth == DEEPEST:  # an interpolation of what holds it has no end
        return "…"
    found = {}
    for name in node if isinstance(node, DictConfig) else range(len(node)):
        key = _joined(at, name)
        try:
            value = node[name]
        except MissingMandatoryValue:
            problems[key] = MUST_BE_GIVEN
        except InterpolationToMissingValueError:
            problems[key] = ""  # the other key is told
        except OmegaConfBaseException as error:
            problems[key] = _one_line(error)
        else:
            found[name] = _resolved(value, key, depth + 1, problems)
    return found if isinstance(node, DictConfig) else list(found.values())


def _joined(at: str, *names: Any) -> str:
    for name in names:
        at += f"[{name}]" if isinstance(name, int) else f".{name}" if at else str(name)
    return at


def _overridden(overrides: Sequence[str], problems: Sequence[str]) -> str:
    """Names the overrides that may have brought the problems of these keys."""
    by_key = {override: override.partition("=")[0] for override in overrides}
    mine = [shown(o) for o, key in by_key.items() if any(not p or f"{p}.".startswith(f"{key}.") for p in problems)]
    return f" with {', '.join(mine)}" if mine else ""


def _message(problems: dict[str, str]) -> str:
    """One line. What does not go together, under the empty key, is told when each value by itself is right."""
    missing = sorted(key for key, text in problems.items() if text == MUST_BE_GIVEN)
    parts = [f"{', '.join(missing)} {MUST_BE_GIVEN}"] if missing else []
    parts += [t for key, t in problems.items() if t not in ("", MUST_BE_GIVEN) and (key or len(problems) == 1)]
    return "; ".join(parts)


def _explained(model: type[Section], error: ValidationError) -> dict[str, str]:
    """By key what is wrong with it."""
    problems = {}
    for problem in error.errors(include_url=False):
        kind, context, key = problem["type"], problem.get("ctx", {}), _joined("", *problem["loc"])
        if kind == "missing":
            problems[key] = MUST_BE_GIVEN
        elif kind in ("extra_forbidden", "invalid_key"):
            problems[key] = _unknown(model, problem["loc"])
        elif kind == "value_error":
            problems[key] = f"{key} {context['error']}".strip()
        else:
            value = _quoted(problem["input"])
            problems[key] = f"{key} is {value}; expected {_expected(model, kind, context, problem['loc'])}"
    return problems


def _expected(model: type[Section], kind: str, context: dict[str, Any], at: Sequence[Any]) -> str:
    if kind == "literal_error":
        return "one of " + ", ".join(re.findall(r"'(\w+)'", context["expected"]))
    if kind == "model_type":
        return f"a section of keys: {', '.join(_section_at(model, at).model_fields)}"
    return EXPECTED[kind].format(**context)


def _quoted(value: object) -> str:
    """As YAML has it, short."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return shown(value)
    except ValueError:  # Python's own bound on what it writes
        return "a number of thousands of digits"


def _unknown(model: type[Section], at: Sequence[Any]) -> str:
    """Names the keys there that have it as a word, or the nearest, or the same elsewhere, or else all keys there."""
    section, key, name = _section_at(model, at[:-1]), _joined("", *at), str(at[-1])
    if key in RENAMED:
        hint = f"it is now {RENAMED[key]}"
    elif name and (near := [field for field in section.model_fields if f"_{name}_" in f"_{field}_"]):
        hint = f"did you mean {' or '.join(_joined('', *at[:-1], field) for field in near)}?"
    elif near := difflib.get_close_matches(name, section.model_fields, 1):
        hint = f"did you mean {_joined('', *at[:-1], *near)}?"
    elif near := [other for other in _keys(model) if other.rpartition(".")[2] == name]:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"known here: {', '.join(section.model_fields)}"
    return f"unknown key {shown(key)}; {hint}"


def _section_at(model: type[Section], at: Sequence[Any]) -> type[Section]:
    for name in at:
        model = _section(model.model_fields[name]) or model
    return model
