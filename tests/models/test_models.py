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


def padded(rows: list[list[int]], width: int) -> tuple[jax.Array, jax.Array]:
    tokens, mask = pad_sequences(rows, width, 0)
    return jnp.asarray(tokens), jnp.asarray(mask)


def prefilled(small: Small, source: jax.Array, mask: jax.Array) -> DocumentMemory:
    return _prefilled(small.graphdef, small.params, source, mask)


def scored(small: Small, memory: DocumentMemory, answers: jax.Array) -> jax.Array:
    return _scored(small.graphdef, small.params, memory, answers)


@partial(jax.jit, static_argnums=0)
def _prefilled(graph: nnx.GraphDef, params: Any, source: jax.Array, mask: jax.Array) -> DocumentMemory:
    return nnx.merge(graph, params).prefill(source, mask)


@partial(jax.jit, static_argnums=0)
def _scored(graph: nnx.GraphDef, params: Any, memory: DocumentMemory, answers: jax.Array) -> jax.Array:
    return score(nnx.merge(graph, params), memory, answers)


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

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(
        {"encoder": encoder.load_params(), "generator": generator.load_params()}
    )


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
    embeddings = nnx.merge(encoder.graphdef, encoder.load_params())(jnp.asarray(tokens), jnp.asarray(mask, bool))
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
    logp = scored(model, prefilled(model, *padded(PROMPTS, 9)), jnp.asarray(ANSWERS))
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
    rows = [[*PROMPTS[0], *map(int, y[:t])] for t in range(len(y))]
    one_by_one = scored(small, prefilled(small, *padded(rows, 11)), jnp.asarray(y)[:, None, None])
    together = scored(small, prefilled(small, *padded(PROMPTS, 9)), jnp.asarray(ANSWERS))[0, 0]
    np.testing.assert_allclose(one_by_one[:, 0, 0], together, atol=1e-4)


def test_padding_changes_nothing(small: Small) -> None:
    answers = jnp.asarray(ANSWERS)
    batch = scored(small, prefilled(small, *padded(PROMPTS, 9)), answers)
    tokens, mask = padded(PROMPTS, 14)
    garbage = jnp.where(mask, tokens, 33)
    found = scored(small, prefilled(small, garbage, mask), answers)
    np.testing.assert_allclose(found, batch, atol=rounding(batch))
    for i, prompt in ((0, PROMPTS[0]), (2, PROMPTS[2])):
        alone = scored(small, prefilled(small, *padded([prompt], len(prompt))), answers[i : i + 1])
        np.testing.assert_allclose(alone[0], batch[i], atol=rounding(batch))


def test_a_row_without_tokens_is_harmless(small: Small) -> None:
    tokens, mask = padded([PROMPTS[0], []], 9)
    logp = scored(small, prefilled(small, tokens, mask), jnp.asarray(ANSWERS[:2]))
    chex.assert_tree_all_finite(logp)


def test_groups_are_independent(small: Small) -> None:
    memory, answers = prefilled(small, *padded(PROMPTS, 9)), jnp.asarray(ANSWERS)
    together = scored(small, memory, answers)
    for c in range(answers.shape[1]):
        alone = scored(small, memory, answers[:, c : c + 1])[:, 0]
        np.testing.assert_allclose(alone, together[:, c], atol=rounding(together))


def test_cached_equals_uncached(small: Small) -> None:
    """Stepping through a pool, each beam seeing the slots of its own past, equals scoring the whole answers."""
    answers = jnp.asarray(ANSWERS)
    memory = prefilled(small, *padded(PROMPTS, 9))
    n, width, longest = answers.shape
    read, last = (
        empty_prefix_cache(small.model, memory, width * longest),
        jnp.broadcast_to(memory.start[:, None], (n, width)),
    )
    slot = jnp.arange(width * longest)
    found = []

    @jax.jit
    def follow(params: Any, *given: Any) -> Any:
        return beam_step(nnx.merge(small.graphdef, params), *given)

    for t in range(longest):
        own = (slot % width == jnp.arange(width)[:, None]) & (slot // width <= t)
        seen = jnp.broadcast_to(own, (n, *own.shape))
        logp, read = follow(small.params, memory, read, last, jnp.asarray(t), seen)
        last = answers[:, :, t]
        found.append(jnp.take_along_axis(logp, last[..., None], axis=-1)[..., 0])
    assert int(read.past.filled) == width * longest
    expected = scored(small, memory, answers)
    np.testing.assert_allclose(jnp.stack(found, axis=-1), expected, atol=rounding(expected))


def test_prefix_tree_equals_separate_answers(small: Small) -> None:
    """Answers that share a beginning, as one group whose tokens see their ancestors only."""
    model, memory = small.model, prefilled(small, *padded(PROMPTS, 9))
    answers = np.array([[3, 4, 2, 20], [3, 4, 7, 2], [3, 8, 9, 2]])
    nodes: list[tuple[int, ...]] = sorted({tuple(y[:t]) for y in answers for t in range(answers.shape[1])}, key=len)
    sees = np.array([[node[: len(other)] == other for other in nodes] for node in nodes])
    start = np.asarray(memory.start)
    tokens = np.array([[[node[-1] if node else first for node in nodes]] for first in start])
    depth = np.array([[[len(node) for node in nodes]]])
    hidden, _ = jax.jit(lambda *given: model.forward_with_cache(memory, None, *given))(
        jnp.asarray(tokens), jnp.asarray(depth), jnp.asarray(sees)[None, None]
    )
    logp = jax.nn.log_softmax(model.vocab_head().logits(hidden[:, 0]))
    tree = jnp.array(
        [
            [[logp[i, nodes.index(tuple(y[:t])), y[t]] for t in range(len(y))] for y in answers]
            for i in range(len(start))
        ]
    )
    assert len(nodes) < answers.size
    separate = scored(small, memory, jnp.broadcast_to(jnp.asarray(answers), (len(start), *answers.shape)))
    np.testing.assert_allclose(tree, separate, atol=rounding(separate))


@pytest.mark.parametrize("vocabulary", [2500, 2048, 30])
def test_blocks_of_the_vocabulary(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that overlap, that do not, and only one: values, smoothing means and both gradients as of log_softmax."""
    monkeypatch.setattr(vocab_head, "LOGIT_BUDGET", 1)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(vocabulary, 8)) * 2, jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocabulary, (2, 3)).tolist())
    targets = targets.at[0].set(jnp.array([0, vocabulary - 1, min(1500, vocabulary - 2)]))
    weights = jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32)

    def whole(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = jax.nn.log_softmax(jnp.einsum("...d,vd->...v", hidden, head))
        return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], logp.mean(axis=-1)

    def blocks(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole_head = vocab_head.VocabHead(head)
        logsumexp, mean = whole_head.logsumexp_and_mean(hidden)
        return whole_head.target_logits(hidden, targets) - logsumexp, mean - logsumexp

    def weighted(function: Any) -> Any:
        return lambda *args: sum((w * out).sum() for w, out in zip(weights, function(*args), strict=True))

    chex.assert_trees_all_close(jax.jit(blocks)(hidden, head), whole(hidden, head), rtol=1e-5, atol=2e-5)
    chex.assert_trees_all_close(
        jax.jit(jax.grad(weighted(blocks), (0, 1)))(hidden, head),
        jax.grad(weighted(whole), (0, 1))(hidden, head),
        rtol=1e-4,
        atol=2e-5,
    )


@pytest.mark.devices(8)
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
    compiled = jax.jit(on_mesh).lower(*placed).compile()
    chex.assert_trees_all_close(compiled(*placed), jax.jit(logp)(hidden, table), rtol=1e-5, atol=2e-5)
    assert 0 < sum(bytes_sent(compiled.as_text() or "").values()) < 2000 < table.nbytes / 8

    def gradient(function: Any) -> Any:
        return jax.jit(jax.grad(lambda *given: jnp.cos(function(*given)).sum(), (0, 1)))

    chex.assert_trees_all_close(gradient(on_mesh)(*placed), gradient(logp)(hidden, table), rtol=1e-4, atol=2e-5)


def test_dropout_follows_its_row(small: Small) -> None:
    """Rows with their keys may stand anywhere; other keys, other values; without keys, no dropout."""

    @jax.jit
    def run(params: Any, source: jax.Array, mask: jax.Array, answers: jax.Array, rngs: Any) -> jax.Array:
        model = nnx.merge(small.graphdef, params)
        return score(model, model.prefill(source, mask, rngs), answers, rngs)

    tokens, mask = padded(PROMPTS, 9)
    answers, order = jnp.asarray(ANSWERS), jnp.array([2, 0, 1])
    rngs = layers.row_rngs(jax.random.key(0), jnp.arange(3))
    dropped = run(small.params, tokens, mask, answers, rngs)
    np.testing.assert_allclose(
        run(small.params, tokens[order], mask[order], answers[order], rngs[order]),
        dropped[order],
        atol=rounding(dropped),
    )
    other = run(small.params, tokens, mask, answers, layers.row_rngs(jax.random.key(1), jnp.arange(3)))
    plain = run(small.params, tokens, mask, answers, None)
    assert np.abs(other - dropped).max() > 0.1 and np.abs(plain - dropped).max() > 0.1


def test_bert_dropout_follows_its_row(tmp_path: Path) -> None:
    bert = random_bert(tmp_path, "mean", False, dropout=0.3)
    run = jax.jit(lambda params, *given: nnx.merge(bert.graphdef, params)(*given))
    tokens, mask = padded(PROMPTS, 9)
    rngs, order = layers.row_rngs(jax.random.key(0), jnp.arange(3)), jnp.array([2, 0, 1])
    dropped = run(bert.params, tokens, mask, rngs)
    again = run(bert.params, tokens[order], mask[order], rngs[order])
    np.testing.assert_allclose(again, dropped[order], atol=rounding(dropped))
    assert np.abs(run(bert.params, tokens, mask) - dropped).max() > 0.1


def test_dropout_keeps_the_mean() -> None:
    rows = jnp.ones((4, 20_000))
    dropped = layers.dropout(rows, layers.row_rngs(jax.random.key(0), jnp.arange(4)), 0.25)
    np.testing.assert_allclose(dropped.mean(axis=1), 1.0, atol=0.02)
    np.testing.assert_allclose((dropped == 0).mean(axis=1), 0.25, atol=0.02)


def test_remat_changes_nothing(small: Small) -> None:
    tokens, mask = padded(PROMPTS, 9)
    rngs, answers = layers.row_rngs(jax.random.key(0), jnp.arange(3)), jnp.asarray(ANSWERS)

    def loss(params: Any, remat: bool) -> jax.Array:
        model = nnx.merge(small.graphdef, params)
        return score(model, model.prefill(tokens, mask, rngs, remat), answers, rngs, remat).sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    chex.assert_trees_all_close(run(small.params, True), run(small.params, False), rtol=1e-4, atol=1e-3)


def test_bfloat16_gives_float32_close_by(small: Small) -> None:
    pretrained = open_generator(small.folder, dtype="bfloat16")
    half = dataclasses.replace(small, graphdef=pretrained.graphdef, params=pretrained.load_params())
    memory = prefilled(half, *padded(PROMPTS, 9))
    assert memory.keys.dtype == jnp.bfloat16
    logp = scored(half, memory, jnp.asarray(ANSWERS))
    exact = scored(small, prefilled(small, *padded(PROMPTS, 9)), jnp.asarray(ANSWERS))
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
    embeddings = run(small.params, jnp.where(mask, tokens, 33), mask)
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
