"""Patches that leave a ViT: against the same computation by hand, the spec's conformance tests, hostile use."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import shiva_ext
from shiva_ext.vit import DynamicViTConfig, RandomPatchConfig, ShivaViTConfig, TNTConfig, drop_similar

from .tiny_vit import DEPTH, EVERY, PATCHES, WIDTH, make_images, make_pruner, make_vit

BOTH = pytest.mark.parametrize("deit", [False, True], ids=["vit", "deit"])


def embed(model, images):
    """Hidden states before the first block, and the model inside."""
    base = getattr(model, "vit", None) or model.deit
    return base.embeddings(images), base


def finish(model, base, hidden):
    """Logits of the last block's output."""
    return model.classifier(base.layernorm(hidden)[:, 0])


def by_hand(model, images, keep):
    """Logits; ``keep(index, hidden)`` gives the hidden states after each block."""
    hidden, base = embed(model, images)
    for index, layer in enumerate(base.layers):
        out = layer(hidden)
        hidden = keep(index, out[0] if isinstance(out, tuple) else out)
    return finish(model, base, hidden)


def best(pruner, layer, patches, k):
    """The k best patches by the head, without the package's ops."""
    return pruner.heads[str(layer)](patches).squeeze(-1).topk(k).indices.sort(dim=1).values


def pick(patches, kept):
    return patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))


# -------------------------------------------------------------------------------------------------------- in eval mode


@BOTH
@torch.no_grad()
def test_patches_go_for_good_after_each_layer(deit):
    model, images = make_vit(deit), make_images()
    pruner, prefix = make_pruner(DynamicViTConfig(0.6, (1, 3))), 2 if deit else 1

    def keep(index, hidden):
        if index not in (1, 3):
            return hidden
        patches = hidden[:, prefix:]
        kept = best(pruner, index, patches, int(patches.shape[1] * 0.6))
        return torch.cat([hidden[:, :prefix], pick(patches, kept)], dim=1)

    wanted = by_hand(model, images, keep)
    with shiva_ext.enable(model, pruner) as handle:
        torch.testing.assert_close(model(images).logits, wanted)
        assert handle.lengths == [16 + prefix] * 2 + [9 + prefix] * 2 + [5 + prefix] * 2
        assert handle.kept[1].shape == (3, 9) and handle.kept[3].shape == (3, 5)
        for row, before in zip(handle.kept[3].tolist(), handle.kept[1].tolist(), strict=True):
            assert set(row) <= set(before) and row == sorted(row)


@BOTH
@torch.no_grad()
def test_patches_that_pass_by_keep_their_value(deit):
    model, images = make_vit(deit), make_images()
    pruner, prefix = make_pruner(ShivaViTConfig(0.4, (1, 2))), 2 if deit else 1
    hidden, base = embed(model, images)
    for index, layer in enumerate(base.layers):
        if index not in (1, 2):
            hidden = layer(hidden)
            continue
        patches = hidden[:, prefix:].clone()
        kept = best(pruner, index, patches, 6)
        out = layer(torch.cat([hidden[:, :prefix], pick(patches, kept)], dim=1))
        patches.scatter_(1, kept[..., None].expand(-1, -1, WIDTH), out[:, prefix:])
        hidden = torch.cat([out[:, :prefix], patches], dim=1)
    wanted = finish(model, base, hidden)
    with shiva_ext.enable(model, pruner) as handle:
        torch.testing.assert_close(model(images).logits, wanted)
        assert handle.lengths == [16 + prefix, *[6 + prefix] * 2, *[16 + prefix] * 3]


@BOTH
@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_disabled_is_bit_for_bit_what_it_was(config, deit):
    model, images = make_vit(deit), make_images()
    dense, names = model(images).logits, list(model.state_dict())
    with shiva_ext.enable(model, make_pruner(config)):
        assert not torch.equal(model(images).logits, dense) and list(model.state_dict()) == names
        with pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError
    assert torch.equal(model(images).logits, dense)
    assert all("forward" not in layer.__dict__ for layer in model.modules())


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_all_patches_kept_is_the_model(config):
    model, images = make_vit(), make_images()
    dense = model(images).logits
    changes = {"keep": 1.0} | ({"similar": 0, "norm_in_eval": False} if isinstance(config, TNTConfig) else {})
    with shiva_ext.enable(model, make_pruner(replace(config, **changes))):
        torch.testing.assert_close(model(images).logits, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_a_sample_gives_what_it_gives_alone_and_twice(config):
    model, images = make_vit(), make_images(4)
    with shiva_ext.enable(model, make_pruner(config)):
        together = model(images).logits
        assert torch.equal(model(images).logits, together)
        alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ TNT


def test_the_noise_of_training_and_the_class_token(monkeypatch):
    """Spec 6.2: a sums to 1, the class token has the norm alone, the noise .02 (1 - a) on every patch."""
    model, pruner = make_vit(), make_pruner(TNTConfig(0.5, (0,), sites=1))
    model.train()
    seen = {}
    hidden, base = embed(model, make_images(2).double().float())
    clean = base.layers[0](hidden)
    normed = F.layer_norm(clean, (WIDTH,), pruner.norm.weight, pruner.norm.bias, pruner.norm.eps)
    share = torch.softmax(pruner.heads["0"](clean[:, 1:]).squeeze(-1), dim=-1)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(2))
    base.layers[1].register_forward_pre_hook(lambda module, args: seen.setdefault("drawn", []).append(args[0]))
    torch.manual_seed(3)
    with shiva_ext.enable(model, pruner), torch.no_grad():
        for _ in range(320):  # times 32 channels: 10,240 draws a patch
            model(make_images(2))
    drawn = torch.stack(seen["drawn"])
    torch.testing.assert_close(drawn[:, :, :1], normed[:, :1].expand_as(drawn[:, :, :1]))
    spread = (drawn[:, :, 1:] - normed[:, 1:]).square().mean(dim=(0, 3)).sqrt()
    wanted = 0.02 * (1 - share)
    assert ((spread - wanted).abs() <= 0.03 * wanted.clamp_min(1e-4)).all()


def test_the_rescaled_noise_spares_the_best_patch_entirely():
    model, pruner = make_vit(), make_pruner(TNTConfig(0.5, (0,), sites=1, rescaled=True, noise=1.0))
    model.train()
    seen = []
    hidden, base = embed(model, make_images(1))
    clean = base.layers[0](hidden)
    normed = F.layer_norm(clean, (WIDTH,))
    first = pruner.heads["0"](clean[:, 1:]).argmax().item()
    base.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with shiva_ext.enable(model, pruner):
        model(make_images(1))
    moved = (seen[0] - normed)[0, 1:].abs().amax(dim=1)
    assert moved[first] < 1e-5 and (moved > 0.01).sum() >= PATCHES // 2


def test_the_released_code_tests_another_model_than_it_trained_and_the_default_does_not():
    model, images = make_vit(), make_images()
    options = dict(keep=1.0, layers=(1,), sites=2, noise=0.0)
    with torch.no_grad():
        dense = model(images).logits
        found = {}
        for norm in (True, False):
            pruner = make_pruner(TNTConfig(**options, norm_in_eval=norm))
            with shiva_ext.enable(model, pruner):
                found[norm] = model(images).logits
                model.train()
                trained = model(images).logits  # without noise training and eval differ by the norm alone
                model.eval()
            assert torch.allclose(found[norm], trained, atol=1e-5) == norm
    torch.testing.assert_close(found[False], dense, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[True], dense, atol=1e-2)


@torch.no_grad()
def test_similar_patches_go_after_the_best_are_kept():
    model, images = make_vit(), make_images()
    pruner = make_pruner(TNTConfig(0.5, (2,), similar=3, norm_in_eval=False))
    with shiva_ext.enable(model, make_pruner(TNTConfig(11 / 16, (2,), norm_in_eval=False))) as handle:
        model(images)
        candidates = handle.kept[2]
    with shiva_ext.enable(model, pruner) as handle:
        model(images)
        kept = handle.kept[2]
    assert kept.shape == (3, 8) and candidates.shape == (3, 11)
    assert all(set(few) <= set(many) for few, many in zip(kept.tolist(), candidates.tolist(), strict=True))


@torch.no_grad()
def test_with_several_layers_similar_patches_go_before_the_first_block():
    with shiva_ext.enable(make_vit(), make_pruner(TNTConfig(0.5, (1, 3), similar=4))) as handle:
        handle.model(make_images())
    assert handle.lengths == [13, 13, 7, 7, 4, 4] and handle.kept[-1].shape == (3, 12)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_drop_similar_removes_from_the_first_half_alone(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, n, 4, generator=generator)
    order = torch.randperm(n, generator=generator)
    for count in range(n // 2 + 1):
        kept = drop_similar(x, count, order)
        assert kept.shape == (5, n - count) and (kept.diff(dim=1) > 0).all()
        assert all(set(order[n // 2 :].tolist()) <= set(row) for row in kept.tolist())
    with pytest.raises(ValueError, match=f"count is {n // 2 + 1}, wanted 0 to {n // 2}"):
        drop_similar(x, n // 2 + 1, order)


def test_drop_similar_drops_a_copy_first():
    x = torch.eye(6)[None].clone()
    order = torch.tensor([4, 0, 2, 1, 3, 5])
    x[0, 2] = 7 * x[0, 5]  # the same direction
    assert drop_similar(x, 1, order).tolist() == [[0, 1, 3, 4, 5]]


# ------------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def test_a_hidden_patch_is_a_patch_that_is_not_there(monkeypatch):
    """DynamicViT's masked training forward against the same model without the patches that were hidden."""
    model, images = make_vit(), make_images(1)
    shown = torch.tensor([1.0, 0.0] * (PATCHES // 2))
    monkeypatch.setattr(F, "gumbel_softmax", lambda logits, tau, hard: torch.stack([shown[None], 1 - shown[None]], -1))
    pruner = make_pruner(DynamicViTConfig(0.7, (2,), ratio_weight=3.0))

    def keep(index, hidden):
        return torch.cat([hidden[:, :1], hidden[:, 1:][:, shown.bool()]], dim=1) if index == 2 else hidden

    wanted = by_hand(model, images, keep)
    model.train()
    with shiva_ext.enable(model, pruner) as handle:
        torch.testing.assert_close(model(images).logits, wanted, rtol=1e-4, atol=1e-4)
        assert handle.loss().item() == pytest.approx(3 * (0.5 - 0.7) ** 2)
        assert handle.lengths == [PATCHES + 1] * DEPTH


@pytest.mark.parametrize("config", [config for config in EVERY if config.scored()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_reaches_every_head(config, attention):
    model, pruner = make_vit(attn_implementation=attention).train(), make_pruner(config).train()
    with shiva_ext.enable(model, pruner) as handle:
        (model(make_images()).logits.square().sum() + handle.loss()).backward()
    for name, parameter in pruner.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name.endswith("weight"):
            assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_random_patches_are_others_in_every_call_of_training_and_the_same_in_eval():
    model, pruner = make_vit(), make_pruner(RandomPatchConfig(0.5, (2,)))
    with shiva_ext.enable(model, pruner) as handle:

        def drawn():
            model(make_images())
            return handle.kept[2]

        assert torch.equal(drawn(), drawn()) and (drawn() == drawn()[0]).all()
        model.train()
        assert len({tuple(drawn()[0].tolist()) for _ in range(8)}) > 4


def test_a_released_config_without_pruner_is_random_alone():
    model = make_vit()
    with torch.no_grad(), shiva_ext.enable(model, RandomPatchConfig(0.5)):
        model(make_images())
    with pytest.raises(TypeError, match="TNTConfig has heads that are learned, got its settings alone"):
        shiva_ext.enable(model, TNTConfig())
