"""The noise level that each step's token counts are read at, whatever happens to the scheduler."""

import copy
import inspect

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import shiva_ext

from .test_pipeline import announced, counts
from .tiny import N, make_artifact, make_inputs, make_model, make_pipeline, pipeline_inputs, varying_table

TABLE = varying_table(12)
METHODS = ("set_timesteps", "set_begin_index", "step")
SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "euler, shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler, dynamic": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "euler, stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm++": lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "unipc": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}


class Stop(Exception):
    pass


def interrupt(pipe, after=0, **options):
    """Run the pipeline into an exception."""

    def stop(pipeline, step, timestep, tensors):
        if step == after:
            raise Stop
        return tensors

    with pytest.raises(Stop):
        pipe(**pipeline_inputs(steps=4, **options), callback_on_step_end=stop)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_keeps_what_the_table_says_for_its_timestep(name):
    pipe = make_pipeline(make_model(), scheduler=SCHEDULERS[name]())
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    for steps in (5, 3):
        handle.record()
        pipe(**pipeline_inputs(steps=steps))
        assert counts(handle) == announced(TABLE, pipe.scheduler.timesteps)
        assert handle.state.sigma is None  # nothing is carried over


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_announced_level_is_known_before_the_call(name):
    """A compiled transformer cannot read the timestep: the announcement alone has to be right."""
    pipe = make_pipeline(make_model(), scheduler=SCHEDULERS[name]())
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((handle.state.sigma, kwargs["timestep"][0].item() / 1000)),
        with_kwargs=True,
    )
    pipe(**pipeline_inputs(steps=5))
    assert len(seen) >= 4 and all(sigma == level for sigma, level in seen)


def test_custom_sigmas_count(pipe):
    handle = shiva_ext.enable(pipe, make_artifact(TABLE)).record()
    pipe(**pipeline_inputs(steps=3), sigmas=[0.95, 0.4, 0.1])
    assert [record["timestep"] for record in handle.records] == pytest.approx([950, 400, 100])
    assert counts(handle) == announced(TABLE, torch.tensor([950, 400, 100]))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_scheduler_replaced_after_enabling_is_followed(interrupted, pipe):
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    interrupt(pipe) if interrupted else pipe(**pipeline_inputs())
    old, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=5.0)
    handle.record()
    pipe(**pipeline_inputs(steps=4))
    assert counts(handle) == announced(TABLE, pipe.scheduler.timesteps)
    assert all(torch.equal(index[0], index[1]) for record in handle.records for index in record["kept"].values())
    shiva_ext.disable(pipe)
    assert not set(METHODS) & (set(vars(old)) | set(vars(pipe.scheduler)))


def test_a_run_after_an_interrupted_one_is_as_any_other(pipe):
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    wanted = pipe(**pipeline_inputs(steps=4))[0]
    for after in (0, 2):
        interrupt(pipe, after)
        handle.record()
        assert torch.equal(pipe(**pipeline_inputs(steps=4))[0], wanted)
        assert counts(handle) == announced(TABLE, pipe.scheduler.timesteps)


def test_a_bare_call_after_an_interrupted_run_reads_its_own_timestep(pipe):
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    interrupt(pipe)
    handle.record()
    pipe.transformer(**make_inputs(sigma=0.04))
    assert counts(handle) == announced(TABLE, torch.tensor([40.0]))


def test_a_bare_call_after_a_guided_run_is_not_a_pair(pipe):
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    pipe(**pipeline_inputs(guidance=4.0))
    handle.record()
    pipe.transformer(**make_inputs(batch=3))
    assert handle.records[0]["kept"][1].shape[0] == 3


def test_an_error_inside_the_transformer_leaves_a_usable_model(pipe):
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    wanted = pipe(**pipeline_inputs())[0]
    with pytest.raises(RuntimeError):
        pipe.transformer(**make_inputs() | {"encoder_hidden_states": torch.zeros(2, 3, 5)})
    assert handle.state.conditioning is None and handle.state.sigma is None
    assert torch.equal(pipe(**pipeline_inputs())[0], wanted)


def test_another_pipeline_on_the_same_transformer_reads_its_own_timesteps(pipe):
    other = make_pipeline(pipe.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0))
    handle = shiva_ext.enable(pipe, make_artifact(TABLE))
    interrupt(pipe, guidance=1.0)
    handle.record()
    other(**pipeline_inputs(steps=4, guidance=1.0))
    assert counts(handle) == announced(TABLE, other.scheduler.timesteps)


def test_a_method_that_somebody_else_put_on_the_scheduler_comes_back(pipe, artifact):
    calls, plain = [], pipe.scheduler.step

    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    pipe.scheduler.step = counted
    shiva_ext.enable(pipe, artifact)
    pipe(**pipeline_inputs(steps=3))
    assert len(calls) == 3
    shiva_ext.disable(pipe)
    assert vars(pipe.scheduler)["step"] is counted and "set_timesteps" not in vars(pipe.scheduler)


@pytest.mark.parametrize("first_off", [0, 1])
def test_pipelines_that_share_a_scheduler_are_disabled_in_any_order(first_off, artifact):
    pipes = [make_pipeline(make_model())]
    pipes.append(make_pipeline(make_model(), scheduler=pipes[0].scheduler))
    handles = [shiva_ext.enable(pipe, make_artifact(TABLE)) for pipe in pipes]
    handles[first_off].disable()
    handle, pipe = handles[1 - first_off], pipes[1 - first_off]
    pipe.scheduler.set_timesteps(4)
    assert handle.state.sigma == 1.0 and handles[first_off].state.sigma is None
    handle.disable()
    assert not set(METHODS) & set(vars(pipe.scheduler))


def test_a_copied_scheduler_is_on_its_own(pipe, artifact):
    shiva_ext.enable(pipe, artifact)
    pipe.scheduler.set_timesteps(4)
    copied = copy.deepcopy(pipe.scheduler)
    copied.set_timesteps(9)
    assert len(copied.timesteps) == 9 and len(pipe.scheduler.timesteps) == 4
    assert copied.config == pipe.scheduler.config


def test_the_schedulers_methods_keep_their_signatures(pipe, artifact):
    wanted = {name: inspect.signature(getattr(pipe.scheduler, name)) for name in METHODS}
    shiva_ext.enable(pipe, artifact)
    assert {name: inspect.signature(getattr(pipe.scheduler, name)) for name in METHODS} == wanted


def test_enabling_the_bare_transformer_leaves_the_scheduler_alone(pipe, artifact):
    handle = shiva_ext.enable(pipe.transformer, artifact, batched_guidance=True).record()
    assert not set(METHODS) & set(vars(pipe.scheduler))
    pipe(**pipeline_inputs(steps=4))
    assert [record["timestep"] for record in handle.records] == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert all(index.shape == (2, int(0.6 * N)) for record in handle.records for index in record["kept"].values())
