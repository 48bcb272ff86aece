"""Models straight from their checkpoint: the same model, the same bits, no copy of the weights."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import torch_offload
from tests.python import models
from tests.python.checkpoints import (
    assert_streams_the_same,
    bytes_in_files,
    handle_of,
    load,
    load_plain,
    save_llama,
    streamed_bytes,
)
from tests.python.dropin import assert_equal, tokens
from torch_offload import _C, CheckpointError

FAMILIES = [
    case
    for case in models.CASES.values()
    if case.kind not in ("diffusion", "plain") and not case.name.endswith("lora")
]

#: What a load replaces in transformers meanwhile.
REPLACED = ("safe_open", "convert_and_load_state_dict_in_model")


def _inputs(device: torch.device) -> dict[str, Any]:
    return {"input_ids": tokens(device)}


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_family_is_read_in_place(case: Any, tmp_path: Path, device: torch.device) -> None:
    source = case.build()
    source.save_pretrained(tmp_path)
    plain = load_plain(type(source), tmp_path, device)
    model = load(type(source), tmp_path, device, resident=list(case.cure))
    handle = handle_of(model)
    assert bytes_in_files(handle) == streamed_bytes(handle) > 0
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in case.inputs().items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch_offload. the first forward called")
        assert_streams_the_same(model, plain, inputs)
    handle.remove()
    for (name, parameter), expected in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected.to(parameter.device)), name
    with torch.inference_mode():
        assert_equal(torch_offload.align(model).to(device)(**inputs), plain(**inputs))


@pytest.mark.parametrize("masters", ["auto", "mmap", "arena", "packed"])
def test_model_loaded_in_inference_mode_is_an_ordinary_one(
    tmp_path: Path, device: torch.device, masters: str
) -> None:
    source = save_llama(tmp_path, torch.bfloat16)
    options = {"transport": "packed"} if masters == "packed" else {}
    with torch.inference_mode():
        model = load(type(source), tmp_path, device, masters=masters, **options)
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    plain = load_plain(type(source), tmp_path, device)
    with torch.no_grad():
        for _ in range(2):
            assert_equal(model(**_inputs(device)), plain(**_inputs(device)))
        handle_of(model).remove()
        for parameter in model.parameters():
            assert not parameter.is_inference()
            assert parameter.requires_grad
            parameter.mul_(2)  # as an inference tensor could not be


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
@pytest.mark.parametrize("mode", ["pipeline", "sync"])
def test_options_of_offload_hold(
    tmp_path: Path, device: torch.device, granularity: str, mode: str
) -> None:
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device, granularity=granularity, mode=mode)
    plain = load_plain(type(source), tmp_path, device)
    with torch.inference_mode():
        for _ in range(3):
            assert_equal(model(**_inputs(device)), plain(**_inputs(device)))
    handle = handle_of(model)
    assert handle.config.granularity == granularity
    assert bytes_in_files(handle) == streamed_bytes(handle) > 0


def test_neighbours_of_the_file_are_one_copy(tmp_path: Path, device: torch.device) -> None:
    model = load(type(save_llama(tmp_path)), tmp_path, device)
    assert [unit.copies for unit in handle_of(model).units] == [1] * 6


def test_experts_are_one_copy_each(tmp_path: Path, device: torch.device) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
    )
    source = MixtralForCausalLM(config).eval()
    source.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(".experts.0." in name for name in stored), "the checkpoint holds them one by one"
    model = load(MixtralForCausalLM, tmp_path, device)
    experts = [unit for unit in handle_of(model).units if unit.name.endswith("mlp")]
    assert all(unit.bytes_in_files and 8 < unit.copies <= 13 for unit in experts)
    plain = load_plain(MixtralForCausalLM, tmp_path, device)
    assert_streams_the_same(model, plain, _inputs(device))


def test_cast_weights_come_from_the_arena(tmp_path: Path, device: torch.device) -> None:
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device, dtype=torch.bfloat16)
    assert bytes_in_files(handle_of(model)) == 0
    assert model.dtype == torch.bfloat16
    plain = load_plain(type(source), tmp_path, device, dtype=torch.bfloat16)
    assert_streams_the_same(model, plain, _inputs(device))


def test_parts_of_a_checkpoint_are_read_by_their_index(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path, torch.bfloat16, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load(type(source), tmp_path, device, dtype=torch.bfloat16)
    assert bytes_in_files(handle_of(model)) == streamed_bytes(handle_of(model))
    plain = load_plain(type(source), tmp_path, device, dtype=torch.bfloat16)
    assert_streams_the_same(model, plain, _inputs(device))


def test_what_transformers_loads_beside_weights_is_there(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path)
    source.generation_config.max_new_tokens = 3
    source.generation_config.save_pretrained(tmp_path)
    model = load(type(source), tmp_path, device)
    plain = load_plain(type(source), tmp_path, device)
    assert model.generation_config.max_new_tokens == 3
    assert not model.training
    assert model.name_or_path == str(tmp_path)
    ids = tokens(device)
    got = model.generate(ids, do_sample=False)
    assert torch.equal(got, plain.generate(ids, do_sample=False))
    assert got.shape[1] == ids.shape[1] + 3


def test_tied_weights_stay_tied(tmp_path: Path, device: torch.device) -> None:
    from tests.python.dropin import tiny_llama

    source = tiny_llama(hidden_size=128, tie_word_embeddings=True)
    source.save_pretrained(tmp_path)
    model = load(type(source), tmp_path, device)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = load_plain(type(source), tmp_path, device)
    assert_streams_the_same(model, plain, _inputs(device))


def test_missing_and_surplus_weights_are_reported_as_by_transformers(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored["model.layers.1.mlp.up_proj.weight"]
    stored["something.else"] = torch.ones(3)
    save_file(stored, file, metadata={"format": "pt"})
    _, expected = type(source).from_pretrained(tmp_path, output_loading_info=True)
    model, got = load(type(source), tmp_path, device, output_loading_info=True)
    assert got == expected
    assert got["missing_keys"] == {"model.layers.1.mlp.up_proj.weight"}
    assert got["unexpected_keys"] == {"something.else"}
    made = model.model.layers[1].mlp.up_proj.weight
    assert bytes_in_files(handle_of(model)) == streamed_bytes(handle_of(model)) - made.nbytes


def test_saving_writes_an_equal_checkpoint(tmp_path: Path, device: torch.device) -> None:
    source = save_llama(tmp_path / "first", torch.bfloat16)
    model = load(type(source), tmp_path / "first", device, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "second")
    with torch.inference_mode():
        model(**_inputs(device))
    model.save_pretrained(tmp_path / "third")
    expected = load_file(tmp_path / "first/model.safetensors")
    for folder in ("second", "third"):
        got = load_file(tmp_path / folder / "model.safetensors")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_saving_over_the_checkpoint_it_streams_from_is_safe(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device)
    model.save_pretrained(tmp_path)
    plain = load_plain(type(source), tmp_path, device)
    assert_streams_the_same(model, plain, _inputs(device))


def test_arena_holds_all_if_asked_for(tmp_path: Path, device: torch.device) -> None:
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device, masters="arena")
    plain = load_plain(type(source), tmp_path, device)
    assert bytes_in_files(handle_of(model)) == 0
    assert handle_of(model).stats.host_bytes >= streamed_bytes(handle_of(model))
    assert_streams_the_same(model, plain, _inputs(device))


@pytest.mark.parametrize("masters", ["auto", "mmap"])
def test_pages_that_cannot_be_locked(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, masters: str
) -> None:
    source = save_llama(tmp_path)

    def refuse(engine: _C.Engine, unit: int) -> None:
        if engine.bytes_in_files(unit):
            raise MemoryError("the driver refuses")

    monkeypatch.setattr(_C.Engine, "lock_files", refuse)
    if masters == "mmap":
        with pytest.raises(MemoryError, match="the driver refuses"):
            load(type(source), tmp_path, device, masters=masters)
        return
    with pytest.warns(UserWarning, match=r"copied into page-locked memory.*the driver refuses"):
        model = load(type(source), tmp_path, device)
    assert bytes_in_files(handle_of(model)) == 0
    plain = load_plain(type(source), tmp_path, device)
    assert_streams_the_same(model, plain, _inputs(device))


def test_version_of_transformers_that_loads_otherwise(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_offload import pretrained

    source = save_llama(tmp_path)
    monkeypatch.setattr(pretrained, "_loading_module", object)
    with pytest.warns(UserWarning, match="loads otherwise"):
        model = load(type(source), tmp_path, device)
    assert bytes_in_files(handle_of(model)) == 0
    plain = load_plain(type(source), tmp_path, device)
    assert_streams_the_same(model, plain, _inputs(device))
    with pytest.raises(ValueError, match="masters='mmap' to be possible"):
        load(type(source), tmp_path, device, masters="mmap")


def test_operator_that_no_tensor_on_disk_knows_is_done_in_memory(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.core_model_loading as loading

    source = models.CASES["mixtral"].build()
    source.save_pretrained(tmp_path)
    plain = load_plain(type(source), tmp_path, device)
    convert = loading.MergeModulelist.convert

    def convert_in_place(self: Any, *args: Any, **kwargs: Any) -> Any:
        merged = convert(self, *args, **kwargs)
        for tensor in merged.values():
            tensor.add_(0)
        return merged

    monkeypatch.setattr(loading.MergeModulelist, "convert", convert_in_place)
    model = load(type(source), tmp_path, device)
    assert_streams_the_same(model, plain, _inputs(device))


def test_other_threads_load_as_always(tmp_path: Path, device: torch.device) -> None:
    import transformers.modeling_utils as loading

    save_llama(tmp_path)
    found: list[Any] = []
    opens = loading.safe_open

    def open_elsewhere() -> None:
        with loading.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            found.append(file.get_slice("model.norm.weight")[...])

    class Loads:
        @staticmethod
        def from_pretrained(folder: Path, **kwargs: Any) -> Any:
            assert loading.safe_open is not opens
            thread = threading.Thread(target=open_elsewhere)
            thread.start()
            thread.join()
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        load(Loads, tmp_path, device)
    assert type(found[0]) is torch.Tensor
    assert loading.safe_open is opens


def test_load_that_waits_for_another_threads_leaves_transformers_as_it_was(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_utils as loading

    from torch_offload import pretrained

    source = save_llama(tmp_path)
    before = [getattr(loading, name) for name in REPLACED]
    is_waiting = threading.Event()
    lock = threading.RLock()

    class Patching:
        def __enter__(self) -> None:
            if threading.current_thread() is second:
                is_waiting.set()
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()

    class Loads:
        @staticmethod
        def from_pretrained(folder: Path, **kwargs: Any) -> Any:
            second.start()
            assert is_waiting.wait(60)
            return type(source).from_pretrained(folder, **kwargs)

    loaded: list[Any] = []
    second = threading.Thread(target=lambda: loaded.append(load(type(source), tmp_path, device)))
    monkeypatch.setattr(pretrained, "_patching", Patching())
    loaded.append(load(Loads, tmp_path, device))
    second.join()
    assert [getattr(loading, name) for name in REPLACED] == before
    for model in loaded:
        assert bytes_in_files(handle_of(model)) == streamed_bytes(handle_of(model)) > 0


def test_load_inside_another_reads_its_own_files_in_place(
    tmp_path: Path, device: torch.device
) -> None:
    import transformers.modeling_utils as loading

    source = save_llama(tmp_path / "whole")
    draft = save_llama(tmp_path / "draft")
    before = [getattr(loading, name) for name in REPLACED]

    class Loads:
        @staticmethod
        def from_pretrained(folder: Path, **kwargs: Any) -> Any:
            ours = [getattr(loading, name) for name in REPLACED]
            part = load(type(draft), tmp_path / "draft", device)
            assert [getattr(loading, name) for name in REPLACED] == ours != before
            return type(source).from_pretrained(folder, **kwargs), part

    for model, folder in zip(
        load(Loads, tmp_path / "whole", device), ("whole", "draft"), strict=True
    ):
        assert bytes_in_files(handle_of(model)) == streamed_bytes(handle_of(model)) > 0
        plain = load_plain(type(source), tmp_path / folder, device)
        assert_streams_the_same(model, plain, _inputs(device))
    assert [getattr(loading, name) for name in REPLACED] == before


# --- what is refused ---------------------------------------------------------------------------


def test_pickled_weights_are_refused(tmp_path: Path, device: torch.device) -> None:
    source = save_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle.*can run any code"):
        load(type(source), tmp_path, device)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device_map": "auto"}, ValueError, "expected no device_map"),
        ({"tp_plan": "auto"}, ValueError, "expected no tp_plan"),
        ({"use_safetensors": False}, CheckpointError, "can run any code"),
        ({"masters": "disk"}, ValueError, "expected masters to be one of .*, got 'disk'$"),
        ({"masters": "plain"}, ValueError, "got 'plain': offload.*'auto' .*'arena' copies them"),
        ({"host_budget": "much"}, ValueError, "expected host_budget as"),
        ({"mode": "fast"}, ValueError, "expected mode to be"),
    ],
)
def test_option_that_cannot_be_fails(
    tmp_path: Path, device: torch.device, options: Any, error: Any, message: str
) -> None:
    source = save_llama(tmp_path)
    with pytest.raises(error, match=message):
        load(type(source), tmp_path, device, **options)


def test_what_loads_nothing_fails(tmp_path: Path, device: torch.device) -> None:
    with pytest.raises(TypeError, match="expected a class with from_pretrained"):
        load(object, tmp_path, device)


def test_folder_without_weights_fails(tmp_path: Path, device: torch.device) -> None:
    source = save_llama(tmp_path / "model")
    shutil.copy(tmp_path / "model/config.json", tmp_path)
    with pytest.raises(CheckpointError, match="got neither"):
        load(type(source), tmp_path, device)


def test_broken_part_is_an_error_before_anything_is_loaded(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_llama(tmp_path, max_shard_size="400KB")
    part = sorted(tmp_path.glob("*.safetensors"))[-1]
    part.write_bytes(part.read_bytes()[:-5])

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(type(source), "from_pretrained", never)
    with pytest.raises(CheckpointError, match=r"cut short or written over.*again"):
        load(type(source), tmp_path, device)


def test_index_that_names_a_file_that_is_not_there_fails(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path, max_shard_size="400KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "gone.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"gone.safetensors, got No such file"):
        load(type(source), tmp_path, device)
