"""Both stages and the control: where gradients go, resuming bit for bit, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from shiva_ext.caf import CAFConfig, CAFPipeline, initial_velocity_model, predict, train_caf, train_rectified_flow
from shiva_ext.caf import train as training
from shiva_ext.training import checkpoint

from .networks import condition, filled, make_pairs_of, make_sd3, widen_input

pytestmark = pytest.mark.usefixtures("one_thread")  # the last bits of a sum depend on the number of threads
CONFIG = CAFConfig(
    velocity_steps=5, acceleration_steps=6, batch_size=4, lr=1e-3, warmup=2, precision="fp32", checkpoint_every=2
)


def weights(folder):
    """Of a CAF pipeline or a control."""
    return {f"{f.parent.name}.{k}": v for f in sorted(folder.rglob("*.safetensors")) for k, v in load_file(f).items()}


def assert_same(folder, other):
    got, wanted = weights(folder), weights(other)
    assert got.keys() == wanted.keys() and len(got) > 10
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    train_caf(make_sd3(), make_pairs_of(), condition, out, CONFIG)
    train_rectified_flow(make_sd3(), make_pairs_of(), condition, out / "control", CONFIG)
    torch.set_num_threads(before)
    return out


def example(count=3):
    x0, x1, labels = make_pairs_of().batch(count, torch.Generator().manual_seed(0))
    return x0, x1, torch.linspace(0.1, 0.9, count), condition(labels)


def test_stage_a_sends_no_gradient_to_the_velocity_network():
    velocity, acceleration = make_sd3(), filled(widen_input(make_sd3()))
    assert all(p.requires_grad for p in velocity.parameters())
    training.acceleration_loss(acceleration, velocity, *example(), CONFIG).backward()
    assert all(p.grad is None for p in velocity.parameters())
    assert all(p.grad is not None and p.grad.any() for p in acceleration.pos_embed.parameters())


def test_stage_a_asks_for_the_velocity_of_the_noise_at_time_0():
    velocity, acceleration = make_sd3(), filled(widen_input(make_sd3()))
    x0, x1, t, given = example()
    seen = []
    velocity.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    acceleration.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    loss = training.acceleration_loss(acceleration, velocity, x0, x1, t, given, CONFIG)
    first, second = seen
    assert torch.equal(first["hidden_states"], x0) and first["timestep"].tolist() == [1000] * 3
    torch.testing.assert_close(second["timestep"], 1000 * (1 - t**2 - 1.5 * (t - t**2)))
    with torch.no_grad():
        v0 = predict(velocity, x0, torch.zeros(3), given, 1.5)
        w = t.view(-1, 1, 1, 1)
        x = (1 - w**2) * x0 + w**2 * x1 + v0 * (w - w**2)
        torch.testing.assert_close(second["hidden_states"], torch.cat([x, v0], dim=1))
        a = predict(acceleration, x, t, given, 1.5, v0)
    D, error = x0[0].numel(), (a - (2 * (x1 - x0) - 2 * v0)).flatten(1).square().sum(1)
    c = 0.00054 * D
    torch.testing.assert_close(loss, (((error + c**2).sqrt() - c) / D).mean())


def test_stage_v_wants_h_times_the_way_on_the_curved_path():
    model, (x0, x1, t, given) = make_sd3(), example()
    loss = training.velocity_loss(model, x0, x1, t, given, replace(CONFIG, loss="l2"))
    w = t.view(-1, 1, 1, 1)
    x = x0 + (w**2 + 1.5 * (w - w**2)) * (x1 - x0)
    with torch.no_grad():
        wanted = torch.nn.functional.mse_loss(predict(model, x, t, given, 1.5), 1.5 * (x1 - x0))
    torch.testing.assert_close(loss, wanted)


def test_a_finished_run_is_a_pipeline_with_its_record(uninterrupted):
    pipe = CAFPipeline.from_pretrained(uninterrupted / "pipeline")
    assert pipe.acceleration.config.in_channels == 2 * pipe.velocity.config.in_channels
    record = json.loads((uninterrupted / "training.json").read_text())
    assert record["config"]["h"] == 1.5 and record["pairs"]["count"] == 12
    assert [record["loss"][stage][-1][0] for stage in ("velocity", "acceleration")] == [5, 6]
    assert not list(uninterrupted.glob(".*"))


def test_the_teacher_stays_as_it_is():
    teacher = make_sd3().requires_grad_(False)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    model = initial_velocity_model(teacher, 1.5)
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 3, 5, 7, 10])
def test_a_run_stopped_after_any_step_goes_on_as_if_nothing_had_happened(after, uninterrupted, tmp_path):
    calls = []

    def stopping(labels):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        return condition(labels)

    with pytest.raises(Stop):
        train_caf(make_sd3(), make_pairs_of(), stopping, tmp_path, CONFIG)
    assert not (tmp_path / "pipeline").exists()
    torch.manual_seed(99)  # what a new process has there
    train_caf(make_sd3(), make_pairs_of(), condition, tmp_path, CONFIG, resume=True)
    assert_same(tmp_path / "pipeline", uninterrupted / "pipeline")
    losses = [json.loads((each / "training.json").read_text())["loss"] for each in (tmp_path, uninterrupted)]
    assert losses[0] == losses[1]


def test_the_control_goes_on_bit_for_bit_too(uninterrupted, tmp_path):
    calls = []

    def stopping(labels):
        calls.append(1)
        if len(calls) > 7:
            raise Stop
        return condition(labels)

    with pytest.raises(Stop):
        train_rectified_flow(make_sd3(), make_pairs_of(), stopping, tmp_path, CONFIG)
    train_rectified_flow(make_sd3(), make_pairs_of(), condition, tmp_path, CONFIG, resume=True)
    assert_same(tmp_path / "transformer", uninterrupted / "control" / "transformer")


def test_the_control_takes_all_steps_with_constant_velocity(uninterrupted):
    record = json.loads((uninterrupted / "control" / "training.json").read_text())
    assert record["loss"]["rectified_flow"][-1][0] == 11 and record["config"]["h"] == 1


def test_the_control_has_the_sign_of_diffusers(tmp_path):
    """Untrained (a rate of 0) it is the teacher, bit for bit."""
    folder = train_rectified_flow(make_sd3(), make_pairs_of(), condition, tmp_path, replace(CONFIG, lr=0.0))
    got, wanted = SD3Transformer2DModel.from_pretrained(folder).state_dict(), make_sd3().state_dict()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def test_both_stages_learn_the_pairs(tmp_path):
    """A few pairs are learned by heart: one step from their noise gives about their data."""
    pairs = make_pairs_of(4)
    config = replace(CONFIG, velocity_steps=100, acceleration_steps=100, batch_size=8, lr=3e-3, ema=0.9)
    pipe = CAFPipeline.from_pretrained(train_caf(make_sd3(), pairs, condition, tmp_path, config))
    pipe.set_progress_bar_config(disable=True)
    given = condition(pairs.labels)
    for N in (1, 2):
        data = pipe(
            given["encoder_hidden_states"], given["pooled_projections"], latents=pairs.noise, num_inference_steps=N,
            output_type="latent",
        ).images  # fmt: skip
        assert (data - pairs.data).square().mean() < 0.35 * (pairs.noise - pairs.data).square().mean()
    loss = json.loads((tmp_path / "training.json").read_text())["loss"]
    assert loss["velocity"][-1][1] < 0.8 * loss["velocity"][0][1]


def test_half_precision_trains(tmp_path):
    config = replace(CONFIG, velocity_steps=2, acceleration_steps=2, precision="bf16")
    folder = train_caf(make_sd3(), make_pairs_of(), condition, tmp_path, config)
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in weights(folder).values())


def test_a_folder_with_a_run_is_not_started_in_again(uninterrupted):
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        train_caf(make_sd3(), make_pairs_of(), condition, uninterrupted, CONFIG)


def test_other_settings_and_other_pairs_are_refused(uninterrupted):
    other = replace(CONFIG, h=1.0)
    with pytest.raises(ValueError, match=r"started with other settings: h 1.5 \(now 1.0\)"):
        train_caf(make_sd3(), make_pairs_of(), condition, uninterrupted, other, resume=True)
    with pytest.raises(ValueError, match=r"count 12 \(now 8\)"):
        train_caf(make_sd3(), make_pairs_of(8), condition, uninterrupted, CONFIG, resume=True)
    foreign = make_pairs_of()._replace(identity=dict(teacher="other", chunk=12))
    with pytest.raises(ValueError, match="teacher tanh"):
        train_caf(make_sd3(), foreign, condition, uninterrupted, CONFIG, resume=True)
    with pytest.raises(ValueError, match="method caf"):
        train_rectified_flow(make_sd3(), make_pairs_of(), condition, uninterrupted, CONFIG, resume=True)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    calls = []

    def breaking(labels):
        calls.append(1)
        return {name: value * (float("nan") if len(calls) == 4 else 1) for name, value in condition(labels).items()}

    with pytest.raises(FloatingPointError, match="velocity has a loss that is not finite, at or shortly before step 4"):
        train_caf(make_sd3(), make_pairs_of(), breaking, tmp_path, CONFIG)
    tensors, record = checkpoint.latest(tmp_path / "checkpoints" / "velocity")
    assert record["step"] == 2 and all(torch.isfinite(value).all() for value in tensors.values())
    train_caf(make_sd3(), make_pairs_of(), condition, tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(velocity_steps=0), "velocity_steps is 0, wanted at least 1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(h=0.0), "h is 0.0, wanted a number above 0 and at most 2"),
        (dict(h=float("nan")), "h is nan"),
        (dict(loss="lpips"), "loss is 'lpips', wanted one of 'huber', 'l2'"),
        (dict(precision="fp16"), "precision is 'fp16'"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CAFConfig(**change)
