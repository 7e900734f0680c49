"""README.md of an exported run, as hubs show it: what the models are, their data, their figures, their configuration.

Of paths on this machine only the last part is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ragjax.config import Config
from ragjax.config.reading import escaped
from ragjax.errors import InputError
from ragjax.evaluation.metrics_table import metric_rows
from ragjax.evaluation.predictions import METRICS
from ragjax.evaluation.run_results import read_metrics
from ragjax.pages.wording import rounded
from ragjax.runs.run_dir import read_run_manifest

CARD = "README.md"
KINDS = {"rag_sequence": "RAG-Sequence", "rag_token": "RAG-Token"}
TEXT = """\
---
library_name: ragjax
tags: [{model}, retrieval-augmented-generation]
base_model: {bases}
---
# {name}

A retriever p(z|x) and a generator p(y|x,z), which answer a question x together as {kind}: {training}.

{folders}

## Data

{data}

## Figures

{figures}

## Configuration

```yaml
{config}```
"""


def model_card(run: Path, config: Config, step: int, folders: Sequence[str]) -> str:
    """The card of a run's models after `step` steps, which lie in these folders. Raises `InputError`."""
    together = "the retriever" if config.train.objective == "contrastive" else "both"
    sources = (config.retriever.source, config.retriever.passage_encoder or "", config.generator.source)
    bases = dict.fromkeys(source[3:].partition("@")[0] for source in sources if source.startswith("hf:"))
    return TEXT.format(
        model=config.model.replace("_", "-"),
        kind=KINDS[config.model],
        bases=json.dumps(list(bases)),
        name=_line(run.resolve().name),
        training=f"{together} trained by ragjax in {step} steps" if step else "pretrained, and not trained further",
        folders=_list(f"`{folder}/`" for folder in folders) or "All is in one checkpoint of transformers.",
        data=_data(run, config),
        figures=_figures(run),
        config=OmegaConf.to_yaml(OmegaConf.create(escaped(_public(config.model_dump(mode="json"))))),
    )


def _data(run: Path, config: Config) -> str:
    """What was trained on; how many passages, and which code, a run's manifest tells."""
    split = {name: getattr(config.questions, name) for name in ("train", "dev", "test")}
    facts = [f"passages: `{_line(_public(config.corpus.source))}`"]
    facts += [f"questions, {name}: `{_line(_public(source))}`" for name, source in split.items()]
    if (path := run / "manifest.json").is_file():
        manifest = read_run_manifest(run)
        try:
            facts[0] += f", {manifest['index']['N']} in the index"
            versions, devices = manifest["versions"], ", ".join(manifest["devices"])
            facts.append(f"ragjax {versions['ragjax']}, JAX {versions['jax']}, on {_line(devices)}")
        except (KeyError, TypeError):
            raise InputError(f"{path}: damaged; train the run anew") from None
    return _list(facts)


def _figures(run: Path) -> str:
    """The table of `ragjax evaluate`, where it was run."""
    if not (run / METRICS).is_file():
        return "Not evaluated."
    report = read_metrics(run)
    models = report["models"]
    heads = [name if m["step"] is None else f"{name}, step {m['step']}" for name, m in models.items()]
    first = next(iter(models.values()))
    rows = [[f"{first['questions']} questions of the {report['split']} split", *heads], ["---"] * (1 + len(heads))]
    rows += [[row.label, *map(rounded, row.values)] for row in metric_rows(list(models.values()))]
    return "\n".join(f"| {' | '.join(map(_line, row))} |" for row in rows)


def _public(value: Any) -> Any:
    """A tree of settings without the folders of this machine."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _line(text: Any) -> str:
    """In one line, and without what would end a piece of code."""
    return " ".join(str(text).replace("`", "'").split())
