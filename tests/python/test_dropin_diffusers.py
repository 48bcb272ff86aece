"""A whole diffusion pipeline whose transformer is offloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torch_offload
from tests.python import expect
from tests.python.dropin import assert_equal, streamed

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(deprecated|will be removed).*:FutureWarning",
    "ignore:.*(deprecated|will be removed).*:DeprecationWarning",
)


def _pipeline() -> Any:
    """A DiT pipeline of random weights: transformer, VAE and scheduler. The same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(31)
        transformer = diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=3,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            latent_channels=4,
        )
        with torch.no_grad():
            for parameter in transformer.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    for part in (transformer, vae):
        torch_offload.align(part.eval())
    pipe = diffusers.DiTPipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    return pipe(
        class_labels=[1, 2], generator=generator, num_inference_steps=3, output_type="np"
    ).images.tobytes()


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_pipeline_with_an_offloaded_transformer_equals_plain(
    device: torch.device, when: str
) -> None:
    must = _run(_pipeline().to(device))
    pipe = _pipeline()
    if when in ("before", "both"):
        pipe = pipe.to(device)
    # The model calls this embedding itself, outside the call of the unit around it.
    outside = ["transformer_blocks.0.norm1.emb"]
    with streamed(pipe.transformer, device, resident=outside) as handle:
        if when in ("after", "both"):
            assert pipe.to(device) is pipe
        assert pipe.device == device
        with expect.watch(handle) as calls:
            for _ in range(2):
                assert_equal(_run(pipe), must)
        assert len(calls.passes) == 6
        expect.assert_streams_exactly(calls)
        assert handle.stats.onloads > 6 * len(handle.units) - 6
    assert_equal(_run(pipe.to(device)), must)


def test_pipeline_to_another_dtype_fails(device: torch.device) -> None:
    pipe = _pipeline().to(device)
    refused = pytest.raises(torch_offload.StateError, match=r"handle\.remove\(\)")
    with streamed(pipe.transformer, device), refused:
        pipe.to(torch.float64)


def test_pipeline_with_hooks_of_its_own_fails(device: torch.device) -> None:
    pipe = _pipeline()
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )
    with pytest.raises(torch_offload.StateError, match="diffusers"):
        torch_offload.offload(pipe.transformer, device)


@pytest.mark.needs_cuda
def test_pipeline_that_is_offloaded_by_its_own_means_afterwards_fails(device: torch.device) -> None:
    pipe = _pipeline().to(device)
    refused = pytest.raises(torch_offload.StateError, match=r"handle\.remove\(\)")
    with streamed(pipe.transformer, device) as handle, refused:
        pipe.enable_model_cpu_offload()
    assert handle.is_removed


def test_pipeline_given_whole_fails(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"offload\(pipe\.transformer\)"):
        torch_offload.offload(_pipeline(), device)
