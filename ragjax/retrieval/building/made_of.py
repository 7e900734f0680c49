"""made_of.json: what an index is made of, kept from the beginning of a build for one that goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from ragjax.checksums import read_sealed, write_sealed
from ragjax.data.corpus import CorpusStats
from ragjax.errors import InputError
from ragjax.rag import RagPipeline
from ragjax.retrieval.building.shard_plan import ShardPlan, equal_shards
from ragjax.retrieval.index import MADE_OF


@dataclass(frozen=True)
class MadeOf:
    """What made_of.json says of a build, beside the recipe: all that one which goes on with it need not find anew."""

    stats: CorpusStats
    plan: ShardPlan
    vectors: dict[str, Any] | None = None  # where the embeddings come from, if not from the encoder


def write_made_of(folder: Path, recipe: Mapping[str, Any], made_of: MadeOf) -> None:
    """Writes what `read_made_of` reads."""
    value = {"made_of": recipe, "scan": asdict(made_of.stats), "plan": made_of.plan.as_json()}
    write_sealed(folder / MADE_OF, value | ({"vectors": made_of.vectors} if made_of.vectors else {}))


def index_recipe(rag: RagPipeline, content: str) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on; index.kind is not among it."""
    config = rag.config
    return {
        "content": content,
        "fingerprints": {name: value for name, value in rag.fingerprints.items() if name != "kind"},
        "dtype": config.dtype,
        "index": {name: getattr(config.index, name) for name in ("dtype", "batch_size", "shard_size")},
        "jax": jax.__version__,
        "device": f"{jax.default_backend()} {jax.local_devices()[0].device_kind}",
    }


def read_made_of(folder: Path, recipe: Mapping[str, Any]) -> MadeOf | None:
    """What FOLDER/made_of.json says; None unless it is there, whole, and of this recipe."""
    try:
        building = read_sealed(folder / MADE_OF)
        if building["made_of"] != recipe:
            return None
        stats, vectors = CorpusStats(**building["scan"]), building.get("vectors")
        if not (type(stats.count) is type(stats.size) is int and min(stats.count, stats.size) > 0):
            return None
        if "plan" in building:
            plan = ShardPlan.from_json(building["plan"])
        else:  # an older ragjax knew shards of one size alone
            plan = equal_shards(stats.count, recipe["index"]["shard_size"])
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return None
    whole = isinstance(stats.fingerprint, str) and isinstance(vectors, dict | None) and sum(plan.counts) == stats.count
    return MadeOf(stats, plan, vectors) if whole else None
