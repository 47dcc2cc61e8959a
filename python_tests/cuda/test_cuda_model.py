"""A pruned SD3 transformer on a GPU: beside the CPU, moved there, offloaded, compiled."""

import pytest
import torch
from accelerate import cpu_offload_with_hook
from gpu_cases import CLOSE, GPU, on_gpu
from models.tiny import WIDTH, make_artifact, make_inputs, make_model

import shiva_ext
from shiva_ext.training.config import TrainConfig
from shiva_ext.training.trainer import STAGES, Batch, ShivaTrainer

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_precision():
    """Torch's convolutions in float32 round to TF32 on a GPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@torch.no_grad()
def test_a_pruned_sd3_transformer_does_not_wait_for_the_device():
    model, inputs = make_model().to(GPU), on_gpu(make_inputs())
    with shiva_ext.enable(model, make_artifact()).at(0.5):
        model(**inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_pruned_sd3_transformer_gives_what_it_gives_on_the_cpu():
    model = make_model()
    results, kept = [], []
    for device in (torch.device("cpu"), GPU):
        model.to(device)
        inputs = {name: a.to(device) if torch.is_tensor(a) else a for name, a in make_inputs().items()}
        with shiva_ext.enable(model, make_artifact()).at(0.5).record() as handle:
            results.append(model(**inputs)[0].cpu())
            kept.append(handle.records[0]["kept"])
    assert all(torch.equal(kept[0][layer], kept[1][layer]) for layer in kept[0]) and kept[0]
    torch.testing.assert_close(*results, **CLOSE)


@torch.no_grad()
def test_a_model_may_move_after_it_was_enabled():
    """As a pipeline does with .to("cuda"), and one step at a time with CPU offload."""
    model = make_model()
    shiva_ext.enable(model, make_artifact()).at(0.5)
    wanted = model(**make_inputs())[0]
    torch.testing.assert_close(model.to(GPU)(**on_gpu(make_inputs()))[0].cpu(), wanted, **CLOSE)
    torch.testing.assert_close(model.to("cpu")(**make_inputs())[0], wanted, **CLOSE)


@pytest.mark.parametrize("offloaded_first", [False, True])
@torch.no_grad()
def test_a_model_may_be_offloaded_to_the_cpu_between_its_calls(offloaded_first):
    model, inputs = make_model(), on_gpu(make_inputs())
    dense = model(**make_inputs())[0]
    with shiva_ext.enable(model, make_artifact()).at(0.5):
        wanted = model(**make_inputs())[0]
    if offloaded_first:
        offload = cpu_offload_with_hook(model, torch.device("cuda:0"))[1]
    handle = shiva_ext.enable(model, make_artifact()).at(0.5)
    if not offloaded_first:
        offload = cpu_offload_with_hook(model, torch.device("cuda:0"))[1]
    for _ in range(2):
        torch.testing.assert_close(model(**inputs)[0].cpu(), wanted, **CLOSE)
        offload.offload()
        assert next(model.parameters()).device.type == "cpu"
    handle.disable()
    torch.testing.assert_close(model(**inputs)[0].cpu(), dense, **CLOSE)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_a_pruned_sd3_transformer_compiles_into_one_graph(mode):
    torch.compiler.reset()
    # Two heads: torch 2.11's compiler hands a single one to an attention kernel that refuses its strides.
    model = make_model(num_layers=2, num_attention_heads=2, attention_head_dim=WIDTH // 2).to(GPU)
    inputs = on_gpu(make_inputs())
    shiva_ext.enable(model, make_artifact(num_layers=2)).at(0.5)
    wanted = model(**inputs)[0]
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):  # reduce-overhead warms up, captures and replays
        got = compiled(**inputs)[0].clone()
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_all_stages_train_on_the_gpu_and_their_artefact_can_be_enabled(tmp_path):
    def next_batch(count, generator):
        inputs = make_inputs(batch=count)
        conditions = {name: inputs[name] for name in ("encoder_hidden_states", "pooled_projections")}
        return Batch(inputs["hidden_states"], conditions)

    model = make_model().to(GPU)
    config = TrainConfig(batch_size=4, micro_batches=2, adapter_rank=4, output_weight=1.0)
    trainer = ShivaTrainer(model, config, next_batch)
    for stage in STAGES:
        trainer.run_stage(stage, 2)
    trainer.export(tmp_path)
    trainer.close()
    with torch.no_grad(), shiva_ext.enable(model, tmp_path).at(0.5):
        assert torch.isfinite(model(**on_gpu(make_inputs()))[0]).all()
