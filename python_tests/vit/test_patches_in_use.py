"""Pruned vision transformers in use: files, copies, compilers, threads, what is refused."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import ViTConfig, ViTForMaskedImageModeling

import shiva_ext
from shiva_ext import vit
from shiva_ext.vit import DynamicViTConfig, RandomPatchConfig, ShivaViTConfig, TNTConfig

from .tiny_vit import EVERY, WIDTH, make_images, make_pruner, make_vit


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_files(config, tmp_path):
    model, images, pruner = make_vit(), make_images(), make_pruner(config)
    pruner.save(tmp_path)
    again = vit.load(tmp_path)
    assert again.config == config and sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    with shiva_ext.enable(model, pruner):
        wanted = model(images).logits
    with shiva_ext.enable(model, again):
        assert torch.equal(model(images).logits, wanted)
    assert vit.load(tmp_path, keep=0.25).config == replace(config, keep=0.25)


def test_files_that_are_missing_or_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no patches.json"):
        vit.load(tmp_path)
    make_pruner(DynamicViTConfig(0.5, (1,))).save(tmp_path)
    with pytest.raises(ValueError, match="do not make a DynamicViTConfig"):
        vit.load(tmp_path, sites=3)
    with pytest.raises(ValueError, match="keep is 1.5"):
        vit.load(tmp_path, keep=1.5)
    with pytest.raises(ValueError, match="patches.safetensors has no heads for"):
        vit.load(tmp_path, layers=(2,))
    (tmp_path / "patches.json").write_text('{"method": "TNTConfig"}')
    with pytest.raises(ValueError, match="KeyError"):
        vit.load(tmp_path)
    (tmp_path / "patches.json").write_text('{"method": "Magic"}')
    with pytest.raises(ValueError, match="no method that is known, wanted one of TNTConfig"):
        vit.load(tmp_path)


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_a_copy_of_an_enabled_model_is_pruned_by_itself(config):
    model, images = make_vit(), make_images()
    dense = model(images).logits
    shiva_ext.enable(model, make_pruner(config))
    pruned, other = model(images).logits, copy.deepcopy(model)
    shiva_ext.disable(model)
    assert torch.equal(model(images).logits, dense) and torch.equal(other(images).logits, pruned)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model(images).logits, dense)
    shiva_ext.disable(other)
    assert all("forward" not in layer.__dict__ for layer in other.modules())


@torch.no_grad()
def test_another_pruner_replaces_the_first_and_two_models_do_not_meet():
    model, other, images = make_vit(), make_vit(seed=5), make_images()
    first = shiva_ext.enable(model, make_pruner(RandomPatchConfig(0.5, (2,))))
    second = shiva_ext.enable(model, make_pruner(DynamicViTConfig(0.25, (2,))))
    shiva_ext.enable(other, make_pruner(ShivaViTConfig(0.5, (1,))))
    wanted = [each(images).logits for each in (model, other)]
    assert second.lengths[-1] == 5 and first.lengths == []
    found = [[], []]

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                found[i].append((model, other)[i](images).logits)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, wanted[i]) for i in (0, 1) for each in found[i])
    first.disable()  # replaced long ago: harmless
    assert torch.equal(model(images).logits, wanted[0])


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_one_graph_for_every_batch_size(config):
    model = make_vit(num_hidden_layers=12)
    graphs = CompileCounter()
    torch._dynamo.reset()
    with shiva_ext.enable(model, make_pruner(config)):
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        for batch in (3, 5, 4):
            images = make_images(batch)
            torch.testing.assert_close(compiled(images).logits, model(images).logits)
    assert graphs.frame_count <= 2  # one for the first size, one for all


@pytest.mark.parametrize("config", [c for c in EVERY if c.scored()], ids=lambda config: type(config).__name__)
def test_compiled_training_with_a_last_batch_that_is_smaller(config):
    model, pruner = make_vit().train(), make_pruner(config).train()
    torch._dynamo.reset()
    with shiva_ext.enable(model, pruner):
        compiled = torch.compile(model, backend="eager")
        for batch in (4, 3, 2):
            compiled(make_images(batch)).logits.sum().backward()
    assert all(head.weight.grad.isfinite().all() for head in pruner.heads.values())


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_bfloat16(config):
    model, images, pruner = make_vit().bfloat16(), make_images(), make_pruner(config).bfloat16()
    with shiva_ext.enable(model, pruner):
        found = model(images.bfloat16()).logits
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()


def test_scores_are_float32_under_autocast():
    pruner, x = make_pruner(DynamicViTConfig(0.5, (1,))), torch.randn(1, 196, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        scores = pruner.scores(1, x.bfloat16())
    assert scores.dtype == torch.float32 and len(scores[0].unique()) == 196


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
def test_a_copy_after_a_training_step(config):
    model = make_vit().train()
    handle = shiva_ext.enable(model, make_pruner(config))
    handle_loss = model(make_images()).logits.sum() + handle.loss()
    handle_loss.backward()
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = model.eval()(make_images()).logits
        assert torch.equal(other(make_images()).logits, wanted)


def test_the_loss_is_of_the_last_call_in_training_mode():
    model = make_vit().train()
    with shiva_ext.enable(model, make_pruner(DynamicViTConfig(0.2, (1,)))) as handle, torch.no_grad():
        model(make_images())
        before = handle.loss()
        model.eval()(make_images())
        assert torch.equal(handle.loss(), before) and before > 0


@torch.no_grad()
def test_a_wrapper_and_the_model_inside_are_one():
    model, images = make_vit(), make_images()
    dense = model(images).logits
    first = shiva_ext.enable(model, make_pruner(DynamicViTConfig(0.5, (2,))))
    second = shiva_ext.enable(model.vit, make_pruner(DynamicViTConfig(0.25, (2,))))
    model(images)
    assert second.lengths == [17] * 3 + [5] * 3 and first.lengths == []
    shiva_ext.disable(model)
    second.disable()
    assert torch.equal(model(images).logits, dense)
    shiva_ext.enable(model, make_pruner(DynamicViTConfig(0.5, (2,))))
    shiva_ext.disable(model.vit)
    assert torch.equal(model(images).logits, dense)


def test_two_transformers_in_one_model_are_not_guessed_at():
    two = torch.nn.ModuleDict({"a": make_vit(), "b": make_vit()})
    with pytest.raises(ValueError, match="holds 2 vision transformers, a.vit, b.vit: enable one"):
        shiva_ext.enable(two, make_pruner(DynamicViTConfig()))


@torch.no_grad()
def test_a_model_that_needs_all_patches_gets_them():
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64)
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, encoder_stride=2)
    model = ViTForMaskedImageModeling(config).eval()
    with pytest.raises(TypeError, match="makes a picture of all patches"):
        shiva_ext.enable(model, make_pruner(DynamicViTConfig(0.6, (2,))))
    with shiva_ext.enable(model, make_pruner(ShivaViTConfig(0.5, (2,)))):
        assert model(make_images()).reconstruction.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("config", [c for c in EVERY if c.scored()], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(config, reentrant):
    found = []
    for checkpointing in (False, True):
        model, pruner = make_vit().train(), make_pruner(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        if checkpointing and reentrant and isinstance(config, DynamicViTConfig):
            with pytest.raises(RuntimeError, match="reentrant checkpoints lose"), shiva_ext.enable(model, pruner):
                model(make_images().requires_grad_())
            return
        with shiva_ext.enable(model, pruner) as handle:
            (model(make_images().requires_grad_()).logits.sum() + handle.loss()).backward()
        found.append([p.grad for p in (*model.parameters(), *pruner.heads.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_one_model_in_two_threads():
    model, images, wanted = make_vit(), {n: make_images(n) for n in (1, 3)}, {}
    shiva_ext.enable(model, make_pruner(DynamicViTConfig(0.5, (1, 3))))
    for n, batch in images.items():
        wanted[n] = model(batch).logits
    wrong = []

    def work(n):
        with torch.no_grad():
            for _ in range(40):
                if not torch.equal(model(images[n]).logits, wanted[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DynamicViTConfig(0.0), "keep is 0.0, wanted a share above 0"),
        (lambda: DynamicViTConfig(float("nan")), "keep is nan"),
        (lambda: DynamicViTConfig(0.5, ()), "wanted one or more blocks"),
        (lambda: DynamicViTConfig(0.5, (3, 1)), "ascending"),
        (lambda: DynamicViTConfig(0.5, 2), "layers is 2, wanted a sequence of whole numbers"),
        (lambda: DynamicViTConfig(0.5, (2.0,)), "wanted a sequence of whole numbers"),
        (lambda: DynamicViTConfig(0.5, (2,), tau=0), "tau is 0"),
        (lambda: TNTConfig(noise=-1.0), "noise is -1.0"),
        (lambda: ShivaViTConfig(0.5, (-1,)), "from 0 on"),
        (lambda: TNTConfig(0.5, (5,)), "wanted some of the first 5 blocks"),
        (lambda: TNTConfig(similar=-1), "similar is -1"),
        (lambda: shiva_ext.enable(make_vit(), make_pruner(DynamicViTConfig(0.5, (5,)))), "blocks 0 to 5"),
        (lambda: shiva_ext.enable(make_vit(), make_pruner(TNTConfig(0.5, (1,), sites=6))), "blocks 0 to 5"),
        (
            lambda: shiva_ext.enable(make_vit(), make_pruner(DynamicViTConfig(), width=8)),
            "is for 8 channels, the model",
        ),
        (lambda: shiva_ext.enable(make_vit(), make_pruner(DynamicViTConfig()), ratio=0.5), "has all of its settings"),
        (lambda: vit.PatchPruner(ShivaViTConfig(estimator="magic"), 8), "got 'magic', wanted one of"),
    ],
)
def test_what_is_wrong_is_said(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_cannot_be_pruned_is_said():
    with pytest.raises(TypeError, match="Linear holds no ViTModel or DeiTModel"):
        shiva_ext.enable(torch.nn.Linear(2, 2), make_pruner(DynamicViTConfig()))
    model = make_vit()
    with shiva_ext.enable(model, make_pruner(TNTConfig(0.9, (2,), similar=4))):
        with pytest.raises(ValueError, match="14 patches and similar=4 are wanted of 16"), torch.no_grad():
            model(make_images())
    with torch.no_grad():
        model(make_images())
