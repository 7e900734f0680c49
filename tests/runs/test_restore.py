"""What a run has trained, restored for answering: in the types that are asked for, wherever it is to lie."""

from __future__ import annotations

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ragjax.checkpoints import pretrained
from ragjax.commands import evaluate as evaluate_module
from ragjax.errors import InputError
from ragjax.models.layers import Params
from ragjax.parallel.mesh import make_mesh
from ragjax.planning.program_cost import bytes_each
from ragjax.rag import RagModel, load_pipeline
from ragjax.resources import size_text
from ragjax.runs.restore import check_answering_fits, pretrained_params, restore_params
from ragjax.runs.run_dir import load_run_config
from ragjax.training.state import inference_params, training_types

pytestmark = pytest.mark.devices(8)


def rounded(params: Params, like: Params) -> Params:
    return jax.tree.map(lambda x, leaf: np.asarray(x).astype(leaf.dtype), params, like)


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the devices computed bfloat16 as it is."""
    monkeypatch.setattr(pretrained, "widens_bfloat16", lambda mesh: False)


def test_trained_in_one_type_and_answered_in_another(run: Path, accelerators: None) -> None:
    """A run in float32, restored in bfloat16 on a mesh of another shape; `exact` is what was trained."""
    config = load_run_config(run)
    half = load_pipeline(config.replace(dtype="bfloat16", mesh=config.mesh.replace(model=2)))
    mesh = make_mesh(2, jax.devices()[:4])
    trained, exact = restore_params(load_pipeline(config)), restore_params(half, mesh, exact=True)
    assert trained is not None and exact is not None and trained[1] == exact[1]
    chex.assert_trees_all_equal(*(jax.device_get(params) for params in (trained[0], exact[0])))
    found, like = restore_params(half, mesh), inference_params(half, mesh)
    assert found is not None
    chex.assert_trees_all_equal_shapes_and_dtypes(found[0], like)
    assert jax.tree.map(lambda x: x.sharding, found[0]) == jax.tree.map(lambda leaf: leaf.sharding, like)
    chex.assert_trees_all_equal(jax.device_get(found[0]), rounded(trained[0], like))
    assert found[0]["generator"]["layers"]["query"]["kernel"].dtype == jnp.bfloat16
    assert found[0]["generator"]["norm"]["scale"].dtype == jnp.float32


def test_cpus_compute_bfloat16_in_float32(run: Path) -> None:
    half = load_pipeline(load_run_config(run).replace(dtype="bfloat16"))
    for tree in (inference_params(half, make_mesh()), training_types(half, make_mesh())):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pretrained_parameters_lie_where_they_answer(run: Path, dtype: str, accelerators: None) -> None:
    config = load_run_config(run)
    rag = load_pipeline(config.replace(dtype=dtype, mesh=config.mesh.replace(model=2)))
    mesh = make_mesh(2)
    found, like = pretrained_params(rag, mesh), inference_params(rag, mesh)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, like)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, like)
    chex.assert_trees_all_equal(jax.device_get(found), rounded(rag.initial_params(), like))


def test_contrastive_runs_answer_with_the_generator_as_it_came(run: Path, accelerators: None) -> None:
    """It is read from its own files, in the type that is asked for."""
    config = load_run_config(run)
    contrastive = config.replace(dtype="bfloat16", train=config.train.replace(objective="contrastive"))
    rag = load_pipeline(contrastive)
    found = restore_params(rag)
    assert found is not None
    like = rag.generator.compute_params
    chex.assert_trees_all_equal(jax.device_get(found[0]["generator"]), rounded(rag.generator.load_params(), like))


def test_what_answers_must_fit_its_devices(run: Path) -> None:
    """With FSDP, too, each has whole parameters; the advice tells what each would have of them."""
    config = load_run_config(run)
    rag, mesh = load_pipeline(config.replace(mesh=config.mesh.replace(fsdp=True))), make_mesh()
    whole, split = (bytes_each(inference_params(rag, on)) for on in (mesh, make_mesh(2)))
    check_answering_fits(rag, mesh, whole)
    check_answering_fits(rag, mesh)  # a CPU does not tell what it has
    advice = f"mesh.model=2 ({size_text(split)}; mesh.fsdp splits them in training only); a smaller generator"
    with pytest.raises(InputError, match=re.escape(f"dtype=bfloat16; {advice}")) as refused:
        check_answering_fits(rag, mesh, whole - 1)
    assert f"parameters take {size_text(whole)} of a device" in str(refused.value) and split < whole
    # an evaluation measures the models before and after training
    check_answering_fits(rag, mesh, 2 * whole, untrained=True)
    advice = "evaluate.max_untrained_questions=0; dtype=bfloat16; mesh.model"
    with pytest.raises(InputError, match=re.escape(advice)) as refused:
        check_answering_fits(rag, mesh, 2 * whole - 1, untrained=True)
    assert f"before and after training, take {size_text(2 * whole)} of a device" in str(refused.value)


def test_an_evaluation_has_room_for_the_models_before_and_after(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rag: RagModel, mesh: Mesh, untrained: bool) -> None:
        raise InputError(f"both: {untrained}")

    monkeypatch.setattr(evaluate_module, "check_answering_fits", refuse)
    config = load_run_config(run)
    alone = config.replace(evaluate=config.evaluate.replace(max_untrained_questions=0))
    for of, both in ((config, True), (alone, False), (config.replace(output=str(tmp_path)), False)):
        with pytest.raises(InputError, match=f"both: {both}"):
            evaluate_module.evaluate(of)
