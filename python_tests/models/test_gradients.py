"""Gradients through an enabled model, and with gradient checkpointing."""

import pytest
import torch

import shiva_ext
from shiva_ext import hooks
from shiva_ext.models import adapter_for
from shiva_ext.selection import LargestNormSelector, RandomSelector, get_estimator
from shiva_ext.training.stages import run_student, run_teacher

from .tiny import LAYERS, make_artifact, make_inputs, make_model, varying_table


def gradients(loss, *modules) -> dict:
    loss.backward()
    named = [(f"{i}.{key}", p) for i, module in enumerate(modules) for key, p in module.named_parameters()]
    return {key: p.grad.clone() for key, p in named if p.grad is not None}


def assert_same(got: dict, wanted: dict):
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


class FirstChannel:
    """A selector in a few lines: half of the tokens, by their first channel."""

    def ratios(self, sigma):
        return (1.0,) + (0.5,) * (LAYERS - 1)

    def scores(self, layer, x, sigma, conditioning):
        return x[..., 0]


def test_gradients_are_the_slopes_of_the_output():
    # Diffusers computes the qk norm in float32, which is too coarse for a difference quotient.
    model, inputs = make_model(qk_norm=None).double().requires_grad_(False), make_inputs(dtype=torch.float64)
    latents = inputs["hidden_states"].requires_grad_()
    direction = torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with shiva_ext.enable(model, FirstChannel()):

        def loss(x):
            return model(**inputs | {"hidden_states": x})[0].square().mean()

        (gradient,) = torch.autograd.grad(loss(latents), latents)
        with torch.no_grad():
            slope = (loss(latents + 1e-6 * direction) - loss(latents - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "source",
    [make_artifact(varying_table()), RandomSelector(0.5), LargestNormSelector(0.5)],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("calls", [1, 2])
def test_gradient_checkpointing_gives_the_same_gradients(source, calls):
    results = []
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with shiva_ext.enable(model, source) as handle:
            handle.record()
            loss = sum(
                model(**make_inputs(sigma=sigma, seed=seed))[0].square().mean()
                for seed, sigma in ((1, 0.2), (2, 0.9))[:calls]
            )
            results.append(gradients(loss, model))
        assert len(handle.records) == calls and all(list(r["kept"]) == [1, 2, 3] for r in handle.records)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("estimator", ["counterfactual", "residual"])
def test_training_with_gradient_checkpointing_gives_the_same_gradients(estimator):
    results = []
    for checkpointing in (False, True):
        model, source = make_model(), make_artifact()
        source.router.requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        state = hooks.SelectionState(source, adapter_for(model))
        hooks.attach(model, state)
        inputs = {k: v for k, v in make_inputs().items() if k != "return_dict"}
        teacher = run_teacher(model, state, **inputs)
        ratios = torch.tensor([1.0] + [0.6] * (LAYERS - 1), requires_grad=True)
        torch.manual_seed(0)
        output, student = run_student(model, state, get_estimator(estimator), ratios, teacher, **inputs)
        loss = (output - teacher.output).square().mean() + sum(y.square().mean() for y in student.outputs.values())
        results.append(gradients(loss, model, source.router) | {"ratios": ratios.grad})
        assert torch.count_nonzero(results[-1]["ratios"]) == LAYERS - 1
    assert_same(results[1], results[0])


def test_nothing_of_a_call_is_kept_alive_after_it(model, inputs, artifact):
    handle = shiva_ext.enable(model, artifact)
    model(**inputs)
    assert handle.state.conditioning is None and handle.state.sigma is None
