"""Programs at full size, compiled for TPUs that are not there: what fits, and where it lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install 'ragjax[tpu]'"),
]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
V5E_MEMORY = 15.75 * 2**30  # what XLA may use of its 16 GiB
EIGHT_BILLION: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
EIGHT_BILLION |= {"hidden_act": "silu", "tie_word_embeddings": False}
# config.json as the hub has them, as far as they are read
MODELS = {
    "dpr": {"model_type": "dpr", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2}
    | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "projection_dim": 0},
    "bart": {"model_type": "bart", "vocab_size": 50265, "d_model": 1024, "max_position_embeddings": 1024}
    | {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 12), ("ffn_dim", 4096))}
    | {"encoder_attention_heads": 16, "decoder_attention_heads": 16, "activation_function": "gelu"}
    | {"scale_embedding": False, "decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "bge": {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 2}
    | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0},
    "qwen3": EIGHT_BILLION
    | {"model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
    "llama3": EIGHT_BILLION
    | {"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    | {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192}
    },
}
ON_A_TPU = """
import json, sys
import jax
from ragjax.config import load_config
from ragjax.planning.program_cost import bytes_each, bytes_sent
from ragjax.planning.inputs import open_inputs
from ragjax.planning.plan import planned_mesh
from ragjax.training.state import abstract_state
from ragjax.training.step import trace_step
passages, path, *settings = sys.argv[1:]
config = load_config(path, settings)
mesh = planned_mesh(config, None, "v5e:2x4")
models = open_inputs(config, mesh).rag()
state = abstract_state(models, mesh)
compiled = trace_step(models, mesh, int(passages)).lower().compile()
memory, ((placed, *_), _) = compiled.memory_analysis(), compiled.input_shardings
same = jax.tree.map(lambda leaf, at: leaf.sharding.is_equivalent_to(at, len(leaf.shape)), state, placed)
print(json.dumps({
    "kind": mesh.devices.flat[0].device_kind,
    "platform": jax.default_backend(),
    "state": bytes_each(state),
    "as_asked": all(jax.tree.leaves(same)),
    "arguments": memory.argument_size_in_bytes,
    "kept": memory.alias_size_in_bytes,
    "needs": memory.argument_size_in_bytes + memory.temp_size_in_bytes
    + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "sent": bytes_sent(compiled.as_text()),
    "approximate": "PartialReduce" in compiled.as_text(),
}))
"""


def told(program: str, *arguments: str, effort: str = "O0") -> dict[str, Any]:
    """What a process prints.

    With the `effort` O0 XLA takes 40 % of the time that it takes as users have it, UNKNOWN, since it does little to
    make programs fast. Where an array lies does not hang on that. Temporaries differ: of Qwen3's training they are 20 %
    larger, of the paper's step 3 % smaller. So what fits must leave a tenth of the memory.
    """
    environment = os.environ | {"JAX_OPTIMIZATION_LEVEL": effort}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def write_models(folder: Path) -> None:
    for name, shape in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(shape))


# `ragjax plan`, but for what index takes, and for the row that counts in no total: it compiles the step a second time
PLAN = """
import json, sys
from ragjax.config import load_config
from ragjax.planning import train_rows
from ragjax.planning.evaluate_rows import evaluate_rows
from ragjax.planning.inputs import open_inputs
from ragjax.planning.plan import capacity, planned_mesh
from ragjax.planning.program_cost import NotCompiled
from ragjax.planning.rows import totals
path, *settings = sys.argv[1:]
config = load_config(path, settings)
compile_step = train_rows.compile_step
def compile_used(inputs, remat):
    if remat != config.train.remat:
        raise NotCompiled("not needed here")
    return compile_step(inputs, remat)
train_rows.compile_step = compile_used
mesh = planned_mesh(config, None, "v5e:2x4")
inputs = open_inputs(config, mesh)
rows = [*train_rows.train_rows(inputs, None), *evaluate_rows(inputs, None)]
sums = [total for total in totals(rows, capacity(config, mesh)) if total.place == "device"]
print(json.dumps({
    "rows": {f"{row.command}: {row.what}": row.size for row in rows if row.place == "device"},
    "totals": {total.command: [total.size, total.has, total.fits] for total in sums},
}))
"""


@pytest.mark.parametrize(
    ("name", "generator", "parameters"),
    [("qwen3_8b_tpu", "qwen3", 8_190_735_360), ("llama3_8b_lora", "llama3", 8_030_261_248)],
)
def test_eight_billion_parameters_fit_eight_tpus(tmp_path: Path, name: str, generator: str, parameters: int) -> None:
    """To train, frozen or with adapters, and to answer; in bfloat16, a quarter of the generator on each."""
    write_models(tmp_path)
    settings = [f"retriever.source={tmp_path}/bge", f"generator.source={tmp_path}/{generator}"]
    found = told(PLAN, str(CONFIGS / f"{name}.yaml"), *settings)
    # with adapters of Llama's, in float32
    assert found["rows"]["train: generator parameters"] == pytest.approx(parameters * 2 / 4, rel=0.03)
    assert found["totals"].keys() == {"train", "evaluate"}
    for command, (size, has, fits) in found["totals"].items():
        assert fits and size < 0.9 * has and has == V5E_MEMORY, command


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_wikipedia_lies_on_eight_tpus_inside_the_step(world: Path, tmp_path: Path, kind: str) -> None:
    """Embeddings and tokens of all passages are split over the devices, and no temporary is as large as a part of them.

    The models are small, but the embeddings as wide as the paper's.
    """
    (tmp_path / "config.json").write_text(json.dumps(MODELS["dpr"] | {"num_hidden_layers": 2}))
    settings = [
        "train.fused_retrieval=true",
        "index.dtype=bfloat16",
        f"index.kind={kind}",
        f"retriever.source={tmp_path}",
    ]
    found = told(ON_A_TPU, "21015324", str(world / "config.yaml"), *settings)
    rows, source = -(-21_015_324 // 8), 128
    held = rows * (768 * 2 + source * 2 + 4)
    assert found["as_asked"] and found["arguments"] == pytest.approx(found["state"] + held, rel=0.05)
    assert found["needs"] - found["arguments"] < 2**30
    assert found["approximate"] == (kind == "approximate")


def test_the_papers_step_fits_a_tpu_that_is_not_there(tmp_path: Path) -> None:
    """Compiled for eight TPU v5e, at the paper's size; XLA says what a device needs and where its arguments lie."""
    write_models(tmp_path)
    models = [f"retriever.source={tmp_path}/dpr", f"retriever.passage_encoder={tmp_path}/dpr"]
    settings = [*models, f"generator.source={tmp_path}/bart", "mesh.fsdp=true"]
    config = str(CONFIGS / "rag_sequence_nq.yaml")
    found = told(ON_A_TPU, "1", config, *settings)
    assert (found["kind"], found["platform"]) == ("TPU v5 lite", "cpu")
    assert found["as_asked"]
    whole = 3 * 4 * (108_891_648 + 406_341_721)  # parameters and two moments
    assert found["state"] == pytest.approx(whole / 8, rel=0.001)
    assert found["arguments"] == pytest.approx(found["state"], rel=0.01)  # TPUs pad some arrays
    assert found["kept"] == pytest.approx(found["state"], rel=0.01)  # the new state lies where the old one did
    assert found["needs"] < 0.9 * V5E_MEMORY
    assert sum(found["sent"].values()) > whole / 3  # the parameters, at least, and their gradients


WEIGHTS_ON_A_TPU = """
import json
import jax, jax.numpy as jnp
from flax import nnx
from ragjax.decoding.propose import prefill_documents
from ragjax.checkpoints.pretrained import generator_shape
from ragjax.checkpoints.quantization import with_int8_kernels
from ragjax.parallel.mesh import make_mesh
from ragjax.parallel.sharding import abstract_with_sharding
from ragjax.planning.plan import _tpu_devices
from pathlib import Path
from typing import Any
import sys
mesh = make_mesh(devices=_tpu_devices("v5e:2x2")[:1])
model, told = generator_shape(Path(sys.argv[1]), dtype="bfloat16"), {}
int8 = with_int8_kernels(model)
for kind, model, params in (
    ("trained", model, model.abstract_params),
    ("untrained", model, model.untrained_types(mesh)),
    ("int8", int8, int8.untrained_types(mesh)),
):
    prompts = jax.ShapeDtypeStruct((4, 128), jnp.int32), jax.ShapeDtypeStruct((4, 128), jnp.bool)
    given = abstract_with_sharding(mesh, (params, *prompts))
    read = jax.jit(lambda *given: jax.tree.leaves(prefill_documents(model.graphdef, *given)))
    analysis = read.lower(*given).compile().memory_analysis()
    told[kind] = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
print(json.dumps(told))
"""


def test_no_second_copy_of_weights_that_are_not_trained(tmp_path: Path) -> None:
    """Of float32 ones many are rounded before the loop over the layers; those in bfloat16 are used as they are."""
    shape = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096}
    shape |= {"num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = told(WEIGHTS_ON_A_TPU, str(tmp_path / "config.json"), effort="UNKNOWN")
    (whole, copied), (half, none), (int8, nothing) = (found[kind] for kind in ("trained", "untrained", "int8"))
    assert half == pytest.approx(whole / 2, rel=0.01)
    assert copied > 0.3 * half and none < 0.05 * half
    table = 2 * 32000 * 1024  # reading a prompt takes no head
    assert int8 - table == pytest.approx((half - table) / 2, rel=0.01)
    assert nothing < 0.05 * int8


ATTENTION_ON_A_TPU = """
import json
from benchmarks.attention import LENGTHS, MODELS, attention_temporaries
from ragjax.parallel.mesh import make_mesh
from ragjax.planning.plan import _tpu_devices
devices = _tpu_devices("v5e:2x2")
alone, four = make_mesh(devices=devices[:1]), make_mesh(2, devices)
(llama, _), (gemma, capped) = (MODELS[name] for name in list(MODELS)[:2])
print(json.dumps({
    "all logits": attention_temporaries(alone, llama, 2048, kernel=False),
    "kernel": [attention_temporaries(alone, llama, length, kernel=True) for length in LENGTHS],
    "capped": attention_temporaries(alone, gemma, 8192, kernel=True, **capped),
    "four": attention_temporaries(four, llama, 8192, kernel=True),
}))
"""


def test_long_prompts_are_read_without_their_logits() -> None:
    """To 8,192 tokens, forward and backward: what a kernel takes is some times the queries, and follows the length."""
    found = told(ATTENTION_ON_A_TPU)
    queries = 2 * 32 * 128  # bytes a token, in bfloat16
    assert found["all logits"] > 4 * 32 * 2048**2
    for length, temporaries in zip((1024, 2048, 4096, 8192), found["kernel"], strict=True):
        assert temporaries < 12 * queries * length
    assert found["capped"] < 12 * 2 * 16 * 256 * 8192
    assert found["four"] < found["kernel"][-1]  # each has one prompt, and half of its heads


OVER_PROCESSES = """
import json, sys
from ragjax.config import load_config
from ragjax.planning.inputs import open_inputs
from ragjax.planning.plan import planned_mesh
from ragjax.planning.shared_rows import search_row
config = load_config(sys.argv[1], sys.argv[2:])
inputs = open_inputs(config, planned_mesh(config, None, "v5e:4x4"))
devices = list(inputs.mesh.devices.flat)
print(json.dumps({
    "processes": len({device.process_index for device in devices}),
    "answers": dict(inputs.mesh_of("evaluate").shape),
    "each": [search_row(inputs, command).size for command in ("train", "evaluate")],
}))
"""


def test_processes_answer_apart_and_share_the_index(tmp_path: Path) -> None:
    """Sixteen TPUs are four machines: each answers by itself, and all hold a sixteenth of the embeddings."""
    write_models(tmp_path)
    settings = [f"retriever.source={tmp_path}/bge", f"generator.source={tmp_path}/qwen3"]
    found = told(OVER_PROCESSES, str(CONFIGS / "qwen3_8b_tpu.yaml"), *settings)
    assert (found["processes"], found["answers"]) == (4, {"data": 1, "model": 4})
    assert found["each"] == [-(-21_015_324 // 16) * 384 * 2] * 2
