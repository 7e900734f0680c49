"""The models against Hugging Face's golden values and against NumPy; memory, pool, groups, padding, dropout, blocks."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh
from reference import (
    GOLDEN,
    Small,
    answer_logp,
    bert_embedding,
    bert_hidden,
    random_bert,
    random_llama,
    rope_frequencies,
    rounding,
)
from safetensors.numpy import load_file

from ragjax.checkpoints.pretrained import PretrainedModel, open_encoder, open_generator
from ragjax.checkpoints.random_init import LLAMA
from ragjax.decoding.prefix_cache import beam_step, empty_prefix_cache
from ragjax.errors import InputError
from ragjax.marginal import log_prior, marginal_logp
from ragjax.models import layers, vocab_head
from ragjax.models.encoders.bert import BertConfig
from ragjax.models.generator import score
from ragjax.models.generators.llama import LlamaConfig
from ragjax.models.kv_cache import DocumentMemory
from ragjax.padding import pad_sequences
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import parameter_spec
from ragjax.planning.program_cost import bytes_sent

FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_theta": 50.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 4, "tie_word_embeddings": False},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15]]  # the last has nothing but its start token
ANSWERS = np.array([[[3, 4, 2, 20], [21, 3, 3, 2]], [[22, 4, 2, 20], [1, 3, 3, 2]], [[9, 9, 9, 2], [3, 4, 2, 20]]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return random_llama(tmp_path_factory.mktemp("llama"), dropout=0.3)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="module")
def generator() -> PretrainedModel:
    return open_generator(GOLDEN / "generator")


@pytest.fixture(scope="module")
def encoder() -> PretrainedModel:
    return open_encoder(GOLDEN / "question_encoder", "cls", normalize=False)


def padded(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    return pad_sequences(rows, width, 0)


def prefilled(small: Small, source: np.ndarray, mask: np.ndarray) -> DocumentMemory:
    return _prefilled(small.graphdef, small.params, source, mask)


def scored(small: Small, memory: DocumentMemory, answers: np.ndarray) -> np.ndarray:
    return np.asarray(_scored(small.graphdef, small.params, memory, answers))


@partial(jax.jit, static_argnums=0)
def _prefilled(graph: nnx.GraphDef, params: Any, source: jax.Array, mask: jax.Array) -> DocumentMemory:
    return nnx.merge(graph, params).prefill(source, mask)


@partial(jax.jit, static_argnums=0)
def _scored(graph: nnx.GraphDef, params: Any, memory: DocumentMemory, answers: jax.Array) -> jax.Array:
    return score(nnx.merge(graph, params), memory, answers)


@partial(jax.jit, static_argnums=0)
def _read_and_scored(
    graph: nnx.GraphDef, params: Any, source: jax.Array, mask: jax.Array, answers: jax.Array
) -> jax.Array:
    return _scored(graph, params, _prefilled(graph, params, source, mask), answers)


@partial(jax.jit, static_argnums=(0, 4))
def _with_dropout(
    graph: nnx.GraphDef, params: Any, given: tuple[jax.Array, ...], rngs: layers.RowRngs, remat: bool
) -> tuple[jax.Array, Any]:
    """The log-probabilities of answers, and the gradient of their sum, of sources, their mask, and answers."""
    source, mask, answers = given

    def total(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        logp = score(model, model.prefill(source, mask, rngs, remat), answers, rngs, remat)
        return logp.sum(), logp

    gradient, logp = jax.grad(total, has_aux=True)(params)
    return logp, gradient


@jax.jit
def row_rngs(seed: int) -> layers.RowRngs:
    """Of three rows."""
    return layers.row_rngs(jax.random.key(seed), jnp.arange(3))


def golden_logp(model: Any, golden: dict[str, np.ndarray]) -> jax.Array:
    """Token log-probabilities [B,K,A,T] of the golden answers, 0 after their ends."""
    ids = jnp.asarray(golden["in/prompt_ids_right"], jnp.int32)
    memory = model.prefill(ids, jnp.asarray(golden["in/prompt_mask_right"], bool))
    answers, lengths = golden["in/answers"], golden["in/answer_length"]
    questions, count, longest = answers.shape
    documents = ids.shape[0] // questions
    rows = jnp.asarray(np.repeat(np.maximum(answers, 0), documents, axis=0), jnp.int32)
    logp = score(model, memory, rows).reshape(questions, documents, count, longest)
    return jnp.where((np.arange(longest) < lengths[..., None])[:, None], logp, 0.0)


@pytest.fixture(scope="module")
def golden_run(generator: PretrainedModel, encoder: PretrainedModel, golden: dict[str, np.ndarray]) -> Any:
    """((loss, log-probabilities [B,K,A,T]), gradients): the sum over questions of −log p of the first answer."""
    tokens, mask = jnp.asarray(golden["in/input_ids"]), jnp.asarray(golden["in/attention_mask"], bool)
    documents = jnp.asarray(golden["in/doc_embeds"])

    def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        questions = nnx.merge(encoder.graphdef, params["encoder"])(tokens, mask)
        prior = log_prior(jnp.einsum("bd,bkd->bk", questions, documents), jnp.ones(documents.shape[:2], bool))
        logp = golden_logp(nnx.merge(generator.graphdef, params["generator"]), golden)
        return -marginal_logp(prior, logp.sum(axis=-1))[:, 0].sum(), logp

    given = {"encoder": encoder.load_params(), "generator": generator.load_params()}
    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(given))


def test_llama_equals_hugging_face(golden_run: Any, golden: dict[str, np.ndarray]) -> None:
    (_, logp), _ = golden_run
    expected = np.nan_to_num(golden["score/token_logp"])
    np.testing.assert_allclose(logp.transpose(0, 2, 1, 3), expected, atol=rounding(expected))
    answers = logp.sum(axis=-1)
    np.testing.assert_allclose(answers.transpose(0, 2, 1), golden["score/answer_logp"], atol=rounding(answers))
    nll = -marginal_logp(jnp.asarray(golden["score/doc_logprobs"]), answers)
    np.testing.assert_allclose(nll, golden["score/nll"], atol=rounding(answers))


def test_bert_equals_hugging_face(encoder: PretrainedModel, golden: dict[str, np.ndarray]) -> None:
    tokens, mask = golden["in/input_ids"], golden["in/attention_mask"]
    embed = jax.jit(lambda params, *given: nnx.merge(encoder.graphdef, params)(*given))
    embeddings = embed(encoder.load_params(), tokens, mask == 1)
    np.testing.assert_allclose(embeddings, golden["score/question_embeds"], atol=1e-4)
    hf = {"num_attention_heads": 4, "num_hidden_layers": 2}
    tensors = load_file(GOLDEN / "question_encoder" / "model.safetensors")
    prefix = next(n for n in tensors if n.endswith("embeddings.word_embeddings.weight")).split("embeddings.")[0]
    bare = {name.removeprefix(prefix): array for name, array in tensors.items()}
    alone = [int(t) for t in tokens[0, : mask[0].sum()]]
    np.testing.assert_allclose(bert_hidden(bare, hf, alone)[0], golden["score/question_embeds"][0], atol=1e-4)


def test_gradients_equal_hugging_face(golden_run: Any, golden: dict[str, np.ndarray]) -> None:
    """The loss reaches both models: the generator, and through the prior the question encoder."""
    (value, _), grads = golden_run
    np.testing.assert_allclose(value, golden["grad/loss"], rtol=1e-5)
    for part, hf_part in (("encoder", "question_encoder"), ("generator", "generator")):
        norm = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(grads[part])))
        np.testing.assert_allclose(norm, golden[f"grad/{hf_part}/norm"], rtol=1e-3)
    theirs = {name.split("/array/")[1]: a for name, a in golden.items() if "/array/" in name}
    ours = {
        "model.embed_tokens.weight": grads["generator"]["embed"]["embedding"],
        "model.layers.0.self_attn.q_proj.weight": grads["generator"]["layers"]["query"]["kernel"][0].T,
        "model.layers.0.self_attn.k_proj.weight": grads["generator"]["layers"]["key"]["kernel"][0].T,
        "model.layers.1.mlp.down_proj.weight": grads["generator"]["layers"]["down"]["kernel"][1].T,
        "model.norm.weight": grads["generator"]["norm"]["scale"],
        "lm_head.weight": grads["generator"]["head"]["embedding"],
        "question_encoder.bert_model.embeddings.word_embeddings.weight": grads["encoder"]["words"]["embedding"],
    }
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=1e-3 * np.abs(theirs[name]).max(), err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_family_equals_numpy(family: str, tmp_path: Path) -> None:
    """One padded pass over shared memories equals whole unpadded rows, one by one."""
    model = random_llama(tmp_path, seed=3, **FAMILIES[family])
    logp = np.asarray(_read_and_scored(model.graphdef, model.params, *padded(PROMPTS, 9), ANSWERS))
    expected = [
        [answer_logp(model.tensors, model.hf_config, x, y) for y in ys] for x, ys in zip(PROMPTS, ANSWERS, strict=True)
    ]
    np.testing.assert_allclose(logp, expected, atol=rounding(expected))
    assert -logp.mean() > 1, "sharp enough to tell"


def test_llama3_scaling_is_at_work() -> None:
    """The three bands all occur in the family test: kept, interpolated, divided."""
    plain = rope_frequencies({"rope_theta": 50.0}, 8)
    ratio = rope_frequencies(FAMILIES["llama3"], 8) / plain
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8) and ((ratio > 0.13) & (ratio < 0.99)).any()


def test_score_equals_plain_prefill(small: Small) -> None:
    """Every token as the first one after a longer prompt."""
    y = ANSWERS[0, 0]
    rows = [[*PROMPTS[0], *map(int, y[:t])] for t in range(1, len(y))]
    following = np.array([[np.resize(y[t:], len(y))] for t in range(1, len(y))])
    one_by_one = scored(small, prefilled(small, *padded(rows, 14)), following)
    together = scored(small, prefilled(small, *padded(PROMPTS, 9)), ANSWERS)[0, 0]
    np.testing.assert_allclose(one_by_one[:, 0, 0], together[1:], atol=1e-4)


def test_padding_changes_nothing(small: Small) -> None:
    """Nor does what stands there; and what is not padded at all, a start token alone, is as it is in a batch."""
    batch = scored(small, prefilled(small, *padded(PROMPTS, 9)), ANSWERS)
    tokens, mask = padded(PROMPTS, 14)
    garbage = np.where(mask, tokens, 33)
    found = scored(small, prefilled(small, garbage, mask), ANSWERS)
    np.testing.assert_allclose(found, batch, atol=rounding(batch))
    alone = scored(small, prefilled(small, *padded(PROMPTS[2:], 1)), ANSWERS[2:])
    np.testing.assert_allclose(alone[0], batch[2], atol=rounding(batch))


def test_a_row_without_tokens_is_harmless(small: Small) -> None:
    tokens, mask = padded([PROMPTS[0], [], []], 9)
    assert np.isfinite(scored(small, prefilled(small, tokens, mask), ANSWERS)).all()


def test_groups_are_independent(small: Small) -> None:
    memory = prefilled(small, *padded(PROMPTS, 14))
    together = scored(small, memory, ANSWERS)
    for c in range(ANSWERS.shape[1]):
        alone = scored(small, memory, ANSWERS[:, c : c + 1])[:, 0]
        np.testing.assert_allclose(alone, together[:, c], atol=rounding(together))


def test_cached_equals_uncached(small: Small) -> None:
    """Stepping through a pool, each beam seeing the slots of its own past, equals scoring the whole answers."""
    memory, (n, width, longest) = prefilled(small, *padded(PROMPTS, 9)), ANSWERS.shape
    read = jax.jit(lambda memory: empty_prefix_cache(small.model, memory, width * longest))(memory)
    read = jax.device_put(read, memory.start.sharding)  # else the first step would be another program
    last, slot = np.repeat(np.asarray(memory.start)[:, None], width, axis=1), np.arange(width * longest)
    found = []

    @jax.jit
    def follow(params: Any, *given: Any) -> Any:
        return beam_step(nnx.merge(small.graphdef, params), *given)

    for t in range(longest):
        own = (slot % width == np.arange(width)[:, None]) & (slot // width <= t)
        seen = np.broadcast_to(own, (n, *own.shape))
        logp, read = follow(small.params, memory, read, last, np.int32(t), seen)
        last = ANSWERS[:, :, t].astype(np.int32)
        found.append(np.take_along_axis(np.asarray(logp), last[..., None], axis=-1)[..., 0])
    assert int(read.past.filled) == width * longest
    expected = scored(small, memory, ANSWERS)
    np.testing.assert_allclose(np.stack(found, axis=-1), expected, atol=rounding(expected))


def test_prefix_tree_equals_separate_answers(small: Small) -> None:
    """Answers that share a beginning, as one group whose tokens see their ancestors only."""
    memory = prefilled(small, *padded(PROMPTS, 9))
    answers = np.array([[3, 4, 2, 20], [3, 4, 7, 2], [3, 8, 9, 2], [3, 8, 9, 5]])
    nodes: list[tuple[int, ...]] = sorted({tuple(y[:t]) for y in answers for t in range(answers.shape[1])}, key=len)
    sees = np.array([[node[: len(other)] == other for other in nodes] for node in nodes])
    start = np.asarray(memory.start)
    tokens = np.array([[[node[-1] if node else first for node in nodes]] for first in start])
    depth = np.array([[[len(node) for node in nodes]]])

    @jax.jit
    def follow(params: Any, memory: DocumentMemory) -> jax.Array:
        model = nnx.merge(small.graphdef, params)
        given = (jnp.asarray(tokens), jnp.asarray(depth), jnp.asarray(sees)[None, None])
        hidden, _ = model.forward_with_cache(memory, None, *given)
        return jax.nn.log_softmax(model.vocab_head().logits(hidden[:, 0]))

    logp = np.asarray(follow(small.params, memory))
    tree = np.array(
        [
            [[logp[i, nodes.index(tuple(y[:t])), y[t]] for t in range(len(y))] for y in answers]
            for i in range(len(start))
        ]
    )
    assert len(nodes) < answers.size
    for two in (slice(2), slice(2, 4)):
        separate = scored(small, memory, np.broadcast_to(answers[two], (len(start), 2, 4)))
        np.testing.assert_allclose(tree[:, two], separate, atol=rounding(separate))


@pytest.mark.parametrize("vocabulary", [2500, 2048, 30])
def test_blocks_of_the_vocabulary(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that overlap, that do not, and only one: values, smoothing means and both gradients as of log_softmax."""
    monkeypatch.setattr(vocab_head, "LOGIT_BUDGET", 1)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(vocabulary, 8)) * 2, jnp.float32)
    targets = rng.integers(0, vocabulary, (2, 3))
    targets[0] = 0, vocabulary - 1, min(1500, vocabulary - 2)
    weights = jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32)

    def whole(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = jax.nn.log_softmax(jnp.einsum("...d,vd->...v", hidden, head))
        return jnp.take_along_axis(logp, jnp.asarray(targets)[..., None], axis=-1)[..., 0], logp.mean(axis=-1)

    def blocks(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole_head = vocab_head.VocabHead(head)
        logsumexp, mean = whole_head.logsumexp_and_mean(hidden)
        return whole_head.target_logits(hidden, jnp.asarray(targets)) - logsumexp, mean - logsumexp

    def with_gradients(function: Any) -> Any:
        values, pull_back = jax.vjp(function, hidden, head)
        return values, pull_back((weights[0], weights[1]))

    (found, gradients), (values, expected) = (
        jax.device_get(jax.jit(partial(with_gradients, f))()) for f in (blocks, whole)
    )
    chex.assert_trees_all_close(found, values, rtol=1e-5, atol=2e-5)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.devices(8)
@pytest.mark.parametrize("model", [2, 4])
def test_a_vocabulary_that_devices_share(model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and both gradients of a table that lies whole; each device sends sums of its rows, and no part of it."""
    monkeypatch.setattr(vocab_head, "LOGIT_BUDGET", 1)
    mesh, rng = make_mesh(model), np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 3, 8)), jnp.float32)
    table, bias = jnp.asarray(rng.normal(size=(5000, 8)) * 2, jnp.float32), jnp.asarray(rng.normal(size=5000))
    targets = jnp.asarray(rng.integers(0, 5000, (8, 3)))

    def logp(hidden: jax.Array, table: jax.Array) -> jax.Array:
        head = vocab_head.VocabHead(table, bias.astype(jnp.float32), softcap=30.0)
        logsumexp, mean = head.logsumexp_and_mean(hidden)
        return head.target_logits(hidden, targets) - 1.5 * logsumexp + mean

    def on_mesh(hidden: jax.Array, table: jax.Array) -> jax.Array:
        with use_abstract_mesh(mesh.abstract_mesh):
            return logp(hidden, table)

    spec = parameter_spec(mesh, ("generator", "head", "embedding"), table.shape, None, fsdp=False)
    assert spec == PartitionSpec("model", None)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((hidden, PartitionSpec("data")), (table, spec))]

    def with_gradients(function: Any) -> Any:
        return jax.jit(
            jax.value_and_grad(lambda *given: (jnp.cos(x := function(*given)).sum(), x), (0, 1), has_aux=True)
        )

    (_, expected), gradients = with_gradients(logp)(hidden, table)
    compiled = jax.jit(on_mesh).lower(*placed).compile()
    chex.assert_trees_all_close(compiled(*placed), expected, rtol=1e-5, atol=2e-5)
    assert 0 < sum(bytes_sent(compiled.as_text() or "").values()) < 2000 < table.nbytes / 8
    chex.assert_trees_all_close(with_gradients(on_mesh)(*placed)[1], gradients, rtol=1e-4, atol=2e-5)


def test_dropout_follows_its_row(small: Small) -> None:
    """Rows with their keys may stand anywhere; other keys, other values; without keys, no dropout."""

    def run(rngs: Any, *given: np.ndarray) -> np.ndarray:
        return np.asarray(_with_dropout(small.graphdef, small.params, given, rngs, False)[0])

    tokens, mask = padded(PROMPTS, 9)
    order, rngs = np.array([2, 0, 1]), row_rngs(0)
    dropped = run(rngs, tokens, mask, ANSWERS)
    again = run(rngs[order], tokens[order], mask[order], ANSWERS[order])
    np.testing.assert_allclose(again, dropped[order], atol=rounding(dropped))
    other = run(row_rngs(1), tokens, mask, ANSWERS)
    plain = scored(small, prefilled(small, tokens, mask), ANSWERS)
    assert np.abs(other - dropped).max() > 0.1 and np.abs(plain - dropped).max() > 0.1


def test_bert_dropout_follows_its_row(tmp_path: Path) -> None:
    bert = random_bert(tmp_path, "mean", False, dropout=0.3)
    run = jax.jit(lambda params, *given: nnx.merge(bert.graphdef, params)(*given))
    tokens, mask = padded(PROMPTS, 9)
    rngs, order = row_rngs(0), np.array([2, 0, 1])
    dropped = np.asarray(run(bert.params, tokens, mask, rngs))
    again = run(bert.params, tokens[order], mask[order], rngs[order])
    np.testing.assert_allclose(again, dropped[order], atol=rounding(dropped))
    assert np.abs(run(bert.params, tokens, mask) - dropped).max() > 0.1


def test_dropout_keeps_the_mean() -> None:
    drop = jax.jit(lambda rngs: layers.dropout(jnp.ones((3, 20_000)), rngs, 0.25))
    dropped = np.asarray(drop(row_rngs(0)))
    np.testing.assert_allclose(dropped.mean(axis=1), 1.0, atol=0.02)
    np.testing.assert_allclose((dropped == 0).mean(axis=1), 0.25, atol=0.02)


def test_remat_changes_nothing(small: Small) -> None:
    given, rngs = (*padded(PROMPTS, 9), ANSWERS), row_rngs(0)
    again, kept = (_with_dropout(small.graphdef, small.params, given, rngs, remat) for remat in (True, False))
    chex.assert_trees_all_close(again, kept, rtol=1e-4, atol=1e-3)


def test_bfloat16_gives_float32_close_by(small: Small) -> None:
    pretrained = open_generator(small.folder, dtype="bfloat16")
    half = dataclasses.replace(small, graphdef=pretrained.graphdef, params=pretrained.load_params())
    memory = prefilled(half, *padded(PROMPTS, 9))
    assert memory.keys.dtype == jnp.bfloat16
    logp = scored(half, memory, ANSWERS)
    exact = scored(small, prefilled(small, *padded(PROMPTS, 9)), ANSWERS)
    assert logp.dtype == jnp.float32
    np.testing.assert_allclose(logp, exact, atol=0.5)
    assert np.abs(logp - exact).mean() < 0.1


@pytest.mark.parametrize(
    ("pooling", "normalize", "projection"),
    [("mean", True, 0), ("cls", True, 12), ("mean", False, 12), ("cls", False, 0)],
)
def test_bert_equals_numpy(pooling: str, normalize: bool, projection: int, tmp_path: Path) -> None:
    small = random_bert(tmp_path, pooling, normalize, projection_dim=projection)
    tokens, mask = padded(PROMPTS, 9)
    run = jax.jit(lambda params, *given: nnx.merge(small.graphdef, params)(*given))
    embeddings = run(small.params, np.where(mask, tokens, 33), mask)
    expected = [bert_embedding(small.tensors, small.hf_config, row, pooling, normalize) for row in PROMPTS]
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    chex.assert_shape(embeddings, (3, projection or 32))


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, (64, 64)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "mistral"}, (4096, 4096)),  # transformers' own default
        ({"model_type": "mistral", "sliding_window": 10_000}, ()),  # no longer than all positions
        ({"model_type": "qwen2", "sliding_window": 64}, ()),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, ()),  # from layer 28
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            (0, 64),
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (64, 0),
        ),
        ({"model_type": "phi3", "sliding_window": 64}, (64, 64)),
        ({"model_type": "phi3"}, ()),
        ({"model_type": "llama", "sliding_window": 64}, ()),
    ],
)
def test_each_layer_has_its_window(changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    hf = {**LLAMA, "vocab_size": 40, "max_position_embeddings": 9000, **changes}
    config = LlamaConfig.from_hf(hf)
    assert (config.windows, config.max_positions) == (windows, 9000)


def test_other_families_are_refused() -> None:
    llama = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    for changes, said in (
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; expected one of llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected one of silu"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'; expected one of default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1, or less of a Phi-3"),
        ({"attention_bias": True}, "biases"),
    ):
        with pytest.raises(InputError, match=said):
            LlamaConfig.from_hf({**llama, **changes})
    bert = {key: llama[key] for key in llama} | {"model_type": "bert", "max_position_embeddings": 8}
    for changes, said in (
        ({"model_type": "electra"}, "model_type is 'electra'; expected one of bert, dpr"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'; expected one of absolute"),
        ({"hidden_act": "swish"}, "'swish'; expected one of gelu"),
    ):
        with pytest.raises(InputError, match=said):
            BertConfig.from_hf(bert | changes, "mean", True)
