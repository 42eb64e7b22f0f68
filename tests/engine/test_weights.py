"""Loading weights: every form of checkpoint, every share of a rank, and an error for every way to be wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.model_config import Architecture, DType, ModelConfig
from engine.models import build_model
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from engine.weight_layout import rank_weight_bytes
from engine.weights import check_checkpoint, checkpoint_bytes, load_weights

CPU = torch.device("cpu")
WHOLE = TensorParallel()
SPARSE = sized_config(Architecture.QWEN3_MOE, num_layers=2, num_dense_layers=1, vocab_size=301, attention_bias=True)


def _engine_config(path: Path, size: int = 1, dtype: DType | None = None) -> EngineConfig:
    model = ModelConfig.from_checkpoint(path)
    return EngineConfig(model=model, checkpoint=path, dtype=dtype or model.dtype, tensor_parallel=size)


def _loaded(path: Path, tensor_parallel: TensorParallel = WHOLE, dtype: DType | None = None) -> nn.Module:
    config = _engine_config(path, tensor_parallel.size, dtype)
    model = build_model(config.model, tensor_parallel, getattr(torch, config.dtype.value), CPU)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    load_weights(model, config, tensor_parallel)
    return model


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A checkpoint with experts, a dense layer, biases, and a vocabulary that two does not divide."""
    write_random_checkpoint(tmp_path / "sparse", SPARSE)
    return tmp_path / "sparse"


@pytest.fixture
def edit(sparse: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """Rewrites the checkpoint's tensors."""

    def rewrite(change: Callable[[dict[str, Tensor]], None]) -> Path:
        tensors = load_file(sparse / "model.safetensors")
        change(tensors)
        save_file(tensors, sparse / "model.safetensors")
        return sparse

    return rewrite


def _heads(rows: Tensor, head_dim: int) -> Tensor:
    return rows.reshape(-1, head_dim, *rows.shape[1:])


def _split(path: Path) -> None:
    """Turn the single file into two and an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (path / "model.safetensors").unlink()


def test_every_parameter_is_filled(sparse: Path) -> None:
    for name, parameter in _parameters(_loaded(sparse)).items():
        assert parameter.isfinite().all(), name


def test_the_shares_of_the_ranks_are_the_whole(sparse: Path) -> None:
    whole = _parameters(_loaded(sparse))
    ranks = [_parameters(_loaded(sparse, TensorParallel(rank, 2))) for rank in range(2)]
    joined = {name: [rank[name] for rank in ranks if name in rank] for name in whole}
    for name in ("attention.o_proj.weight", "feed_forward.down_proj.weight"):
        assert torch.equal(torch.cat(joined[f"layers.0.{name}"], dim=1), whole[f"layers.0.{name}"])
    name = "layers.1.feed_forward.experts.down_proj"
    assert torch.equal(torch.cat(joined[name], dim=2), whole[name])
    name = "layers.1.feed_forward.experts.gate_up_proj"
    gates, ups = zip(*(share.chunk(2, dim=1) for share in joined[name]), strict=True)
    assert torch.equal(torch.cat((*gates, *ups), dim=1), whole[name])
    for name in ("attention.qkv_proj.weight", "attention.qkv_proj.bias"):
        heads = [_heads(share, SPARSE.head_dim) for share in joined[f"layers.0.{name}"]]
        parts = [torch.cat([share[part] for share in heads]) for part in (slice(0, 2), slice(2, 3), slice(3, 4))]
        assert torch.equal(torch.cat(parts).flatten(0, 1), whole[f"layers.0.{name}"])
    assert torch.equal(torch.cat(joined["lm_head.shard.weight"])[:301], whole["lm_head.shard.weight"])
    assert len(joined["layers.0.attention.o_proj.bias"]) == 1


def test_ranks_beyond_the_key_value_heads_hold_copies(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, sized_config(Architecture.LLAMA, num_kv_heads=2))
    name = "layers.0.attention.qkv_proj.weight"
    whole = _heads(_parameters(_loaded(tmp_path))[name], 16)
    for rank in range(4):
        share = _heads(_parameters(_loaded(tmp_path, TensorParallel(rank, 4)))[name], 16)
        assert torch.equal(share, torch.stack((whole[rank], whole[4 + rank // 2], whole[6 + rank // 2])))


def test_a_checkpoint_of_several_files(sparse: Path) -> None:
    single = _parameters(_loaded(sparse))
    num_bytes = checkpoint_bytes(sparse)
    _split(sparse)
    assert checkpoint_bytes(sparse) == num_bytes
    several = _parameters(_loaded(sparse))
    assert all(torch.equal(single[name], several[name]) for name in single)


@pytest.mark.parametrize("size", [1, 2])
def test_experts_in_one_tensor(sparse: Path, edit: Callable[..., Path], size: int) -> None:
    shares = [TensorParallel(rank, size) for rank in range(size)]
    apart = [_parameters(_loaded(sparse, share)) for share in shares]

    def fuse(tensors: dict[str, Tensor]) -> None:
        prefix = "model.layers.1.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        tensors[f"{prefix}.down_proj"] = down

    edit(fuse)
    for share, expected in zip(shares, apart, strict=True):
        fused = _parameters(_loaded(sparse, share))
        assert all(torch.equal(fused[name], expected[name]) or "shard" in name for name in expected)


@pytest.mark.parametrize("architecture", [Architecture.MIXTRAL, Architecture.QWEN3_MOE])
def test_what_transformers_writes_loads_as_what_it_read(architecture: Architecture, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_random_checkpoint(tmp_path / "ours", sized_config(architecture))
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = _parameters(_loaded(tmp_path / "ours")), _parameters(_loaded(tmp_path / "theirs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_are_cast(sparse: Path) -> None:
    wide, narrow = _parameters(_loaded(sparse)), _parameters(_loaded(sparse, dtype=DType.BFLOAT16))
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    config = sized_config(Architecture.LLAMA, tie_word_embeddings=True)
    write_random_checkpoint(tmp_path, config)
    model = _loaded(tmp_path)
    assert model.get_parameter("lm_head.shard.weight") is model.get_parameter("embed_tokens.shard.weight")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("rank", [0, 1])
def test_progress_counts_the_bytes_that_a_rank_reads(sparse: Path, rank: int) -> None:
    config, tensor_parallel = _engine_config(sparse, 2, DType.BFLOAT16), TensorParallel(rank, 2)
    model = build_model(config.model, tensor_parallel, torch.bfloat16, CPU)
    calls: list[tuple[int, int]] = []
    load_weights(model, config, tensor_parallel, lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {calls[-1][0]}
    if rank == 0:
        assert calls[-1][0] == rank_weight_bytes(config.model, DType.FLOAT32, 2)  # the file's dtype


@pytest.mark.parametrize("config", [SPARSE, sized_config(Architecture.LLAMA, tie_word_embeddings=True)])
@pytest.mark.parametrize("size", [1, 2])
def test_the_predicted_size_of_a_rank_is_what_it_holds(config: ModelConfig, size: int) -> None:
    model = build_model(config, TensorParallel(0, size), torch.bfloat16, CPU)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert rank_weight_bytes(config, DType.BFLOAT16, size) == held


def test_checkpoint_bytes(sparse: Path) -> None:
    assert checkpoint_bytes(sparse) == rank_weight_bytes(SPARSE, DType.FLOAT32)


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.2.up_proj.weight"]


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:300].clone()


def _quantise(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (_drop, ["model.norm.weight is missing", "experts.2.up_proj.weight is missing"]),
        (_reshape, [r"lm_head.weight has shape \[300, 64\] instead of \[301, 64\]"]),
        (_quantise, ["lm_head.weight is stored as I8"]),
    ],
)
def test_wrong_tensors_are_named_together(edit: Callable[..., Path], change: Any, messages: list[str]) -> None:
    config = _engine_config(edit(change))
    for message in messages:
        with pytest.raises(CheckpointError, match=message):
            check_checkpoint(config)


def test_many_wrong_tensors_are_counted(sparse: Path) -> None:
    config = _engine_config(sparse)
    deeper = replace(config, model=replace(config.model, num_layers=4, sparse_layers=(False, True, True, True)))
    with pytest.raises(CheckpointError, match=r"; and \d+ more\."):
        check_checkpoint(deeper)


def test_a_file_that_is_cut_short(sparse: Path) -> None:
    file = sparse / "model.safetensors"
    content = file.read_bytes()
    for length, message in ((len(content) - 1, "is cut short"), (100, "does not fit"), (3, "does not fit")):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=message):
            check_checkpoint(_engine_config(sparse))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "its header is not JSON"),
        (b"[1, 2]", "its header is not a JSON object"),
        (b'{"a": {"dtype": "F32"}}', "the header's entry of a"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"a of shape \[2\] in F32 cannot be"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}', "a ends at byte 800"),
    ],
)
def test_a_malformed_header(sparse: Path, header: bytes, message: str) -> None:
    (sparse / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(_engine_config(sparse))


def test_pickled_weights_only(sparse: Path) -> None:
    (sparse / "model.safetensors").rename(sparse / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin: pickled weights are not loaded"):
        check_checkpoint(_engine_config(sparse))


def test_no_weights_at_all(sparse: Path) -> None:
    (sparse / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        check_checkpoint(_engine_config(sparse))


def test_an_index_that_names_an_absent_file(sparse: Path) -> None:
    _split(sparse)
    (sparse / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        check_checkpoint(_engine_config(sparse))


def test_an_index_that_leaves_the_folder(sparse: Path) -> None:
    _split(sparse)
    (sparse / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
        check_checkpoint(_engine_config(sparse))


def test_loading_checks_before_it_reads(edit: Callable[..., Path]) -> None:
    config = _engine_config(edit(_drop))
    model = build_model(config.model, WHOLE, torch.float32, CPU)
    before = model.get_parameter("embed_tokens.shard.weight").fill_(7.0).clone()
    with pytest.raises(CheckpointError, match="is missing"):
        load_weights(model, config, WHOLE)
    assert torch.equal(model.get_parameter("embed_tokens.shard.weight"), before)


def test_checking_needs_no_torch(sparse: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.weights import check_checkpoint
path = Path({str(sparse)!r})
model = ModelConfig.from_checkpoint(path)
check_checkpoint(EngineConfig(model=model, checkpoint=path, dtype=model.dtype))
assert not {{"torch", "safetensors"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
