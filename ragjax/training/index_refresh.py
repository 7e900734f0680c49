"""What training does about the index after each step, where the passage encoder is trained too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.retrieval.index import Index
from ragjax.retrieval.refresh import IndexRefresher
from ragjax.training.loss import passage_params
from ragjax.training.state import TrainState


def restore_index(refresher: IndexRefresher, state: TrainState, saved: Mapping[str, Any]) -> None:
    """Goes on with the index as it was at the checkpoint of `state`, whose metadata are `saved` ({} at step 0).

    Raises `InputError` where the index that was searched then is gone.
    """
    train, done = refresher.rag.config.train, int(state.step)
    had_ended = done > 0 and saved.get("config", {}).get("train", {}).get("steps") == done < train.steps
    refresher.restore(saved.get("refresh", {}), done, None if had_ended else state.indexed)
    if had_ended or (train.start_from and done == 0):  # then the index belongs to the encoder as it is now
        refresher.begin_anew(done, passage_params(refresher.rag, state.params))


def refresh_index(
    refresher: IndexRefresher, state: TrainState, step: int, probe: Sequence[str]
) -> tuple[TrainState, dict[str, float]]:
    """Does what is due for the index after a step; returns the state and metrics to log.

    `probe` are the questions by whose top k the drift of the index is measured. `index_age` counts the steps since the
    index was encoded. Of the top k, `index_kept` is the share that would stay if the index were encoded now, and
    `index_overlap` the share that stayed when it was.
    """
    rag, kept, metrics = refresher.rag, None, dict[str, float]()
    settings, k, before = rag.config.refresh, rag.config.train.num_docs, refresher.index
    encoder = passage_params(rag, state.params)
    if settings.overlap_every is not None and step % settings.overlap_every == 0:
        kept = metrics["index_kept"] = refresher.overlap(state.params, encoder, probe, k)
    if refresher.should_start(step, kept):
        refresher.start(step)
        state = replace(state, indexed=jax.tree.map(jnp.copy, encoder))
    if step == rag.config.train.steps:
        refresher.start(step)  # `complete_index` does the rest
    else:
        refresher.advance(step, state.indexed)
    if refresher.index is not before:
        metrics["index_overlap"] = refresher.compare(before, state.params, probe, k)
        before.release()
    return state, metrics | {"index_age": float(step - (refresher.state.searched or 0))}


def complete_index(refresher: IndexRefresher, state: TrainState, probe: Sequence[str]) -> dict[str, float]:
    """Encodes the whole index by the encoder of the last step, as far as it is not there; metrics as above."""
    before: Index = refresher.index
    refresher.begin_anew(int(state.step), passage_params(refresher.rag, state.params))
    return {"index_overlap": refresher.compare(before, state.params, probe, refresher.rag.config.train.num_docs)}
