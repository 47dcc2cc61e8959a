"""Pruning a tiny model: what is kept, against a forward by hand; the cache; batches; what is refused."""

import copy

import pytest
import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import shiva_ext
from shiva_ext.vlm import FastVConfig, FeatherConfig, grid_tokens
from shiva_ext.vlm.score import attention_of_last

from .tiny_vlm import FAMILIES, IMAGE, LAYERS, TEXT, N, make_prompt, make_vlm

CONFIG = FeatherConfig(ratio=0.5, layers=(2, 4))


@torch.no_grad()
def by_hand(model, prompt: dict, kept: list[list[torch.Tensor]], layers=(2, 4)) -> torch.Tensor:
    """Logits of the last token: every sample alone, without a cache, tokens taken out by indexing."""
    found = []
    text = model.model.language_model
    for b in range(len(prompt["input_ids"])):
        real = prompt["attention_mask"][b].bool()
        ids = prompt["input_ids"][b][real][None]
        pixels = prompt["pixel_values"].chunk(len(prompt["input_ids"]))[b]
        features = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
        embeds = model.get_input_embeddings()(ids)
        where = (ids[0] == IMAGE).nonzero()[:, 0]
        embeds[0, where] = features
        position = torch.arange(ids.shape[1])[None] + (0 if real.all() else int((~real).sum()))
        left = torch.arange(ids.shape[1])
        hidden = embeds
        for index, layer in enumerate(text.layers):
            if index in layers:
                mine = where[kept[layers.index(index)][b]]
                stays = torch.cat([(ids[0] != IMAGE).nonzero()[:, 0], mine]).sort().values
                inside = torch.isin(left, stays)
                hidden, left = hidden[:, inside], left[inside]
            rope = text.rotary_emb(hidden, position_ids=position[:, left])
            n = len(left)  # what eager attention needs; the others see to it themselves
            mask = torch.full((1, 1, n, n), torch.finfo(hidden.dtype).min).triu(1)
            output = layer(hidden, attention_mask=mask, position_embeddings=rope, position_ids=position[:, left])
            hidden = output[0] if isinstance(output, tuple) else output
        found.append(model.lm_head(text.norm(hidden))[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_read_as_by_hand(family, attention):
    model, prompt = make_vlm(family, attention=attention), make_prompt()
    handle = shiva_ext.enable(model, CONFIG)
    with torch.no_grad():
        logits = model(**prompt).logits
    assert logits.shape[1] == prompt["input_ids"].shape[1]  # all tokens are there again
    torch.testing.assert_close(logits[:, -1], by_hand(model, prompt, handle.kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_is_read_as_each_sample_alone(attention):
    model, prompt = make_vlm(attention=attention), make_prompt(3, padding=4)
    handle = shiva_ext.enable(model, CONFIG)
    position = (prompt["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(**prompt, position_ids=position).logits[:, -1]
    together = [[own.clone() for own in stage] for stage in handle.kept]
    sizes = {len(own) for own in together[0]}
    assert len(sizes) > 1  # the union has its own size in every sample
    for b in range(3):
        real = prompt["attention_mask"][b].bool()
        alone = dict(input_ids=prompt["input_ids"][b][real][None], pixel_values=prompt["pixel_values"][b : b + 1])
        with torch.no_grad():
            wanted = model(**alone).logits[0, -1]
        for stage, mine in zip(together, handle.kept, strict=True):
            assert torch.equal(stage[b], mine[0])
        torch.testing.assert_close(logits[b], wanted, rtol=1e-4, atol=1e-4)


def test_the_first_stage_is_the_union_and_the_second_a_share_of_it():
    model, prompt = make_vlm(), make_prompt()
    handle = shiva_ext.enable(model, CONFIG)
    seen = {}
    model.model.language_model.layers[1].register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0]))
    with torch.no_grad():
        model(**prompt)
    where = (prompt["input_ids"] == IMAGE).nonzero()[:, 1].view(2, N)
    image = prompt["input_ids"] == IMAGE
    score = attention_of_last(model.model.language_model.layers[1], seen["hidden"], where, image, None)
    for b in range(2):
        wanted = set(score[b].topk(int(0.5 * N)).indices.tolist()) | set(grid_tokens(9, 9, 3))
        assert handle.kept[0][b].tolist() == sorted(wanted)
        second = handle.kept[1][b].tolist()
        assert len(second) == int(0.25 * len(wanted)) and set(second) <= wanted and second == sorted(second)
    assert handle.lengths[0] == prompt["input_ids"].shape[1]
    assert 0 < handle.flops_reduction() < 1


@torch.no_grad()
def test_the_score_without_rope_is_the_attention_of_a_model_without_positions():
    model = make_vlm(attention="eager")
    layer, hidden = model.model.language_model.layers[0], torch.randn(2, 20, 64)
    cos, sin = torch.ones(1, 20, 16), torch.zeros(1, 20, 16)
    _, weights = layer.self_attn(
        layer.input_layernorm(hidden), position_embeddings=(cos, sin), attention_mask=None, past_key_values=None
    )
    every = torch.arange(20).expand(2, -1)
    got = attention_of_last(layer, hidden, every, torch.ones(2, 20, dtype=torch.bool), None)
    torch.testing.assert_close(got, weights[:, :, -1].mean(dim=1))
    some = torch.zeros(2, 20, dtype=torch.bool)
    some[:, 3:9] = True
    got = attention_of_last(layer, hidden, every[:, 3:9], some, None)
    wanted = weights[:, :, -1, 3:9]
    torch.testing.assert_close(got, (wanted / wanted.sum(dim=-1, keepdim=True)).mean(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_fastv_takes_the_tokens_that_the_layer_before_attends_to(family):
    model, prompt = make_vlm(family, attention="eager"), make_prompt(padding=3)
    attentions = model(**prompt, output_attentions=True).attentions
    with shiva_ext.enable(model, FastVConfig(ratio=0.75, layer=3)) as handle:
        model(**prompt)
    where = (prompt["input_ids"] == IMAGE).nonzero()[:, 1].view(2, N)
    paid = attentions[2][:, :, -1].mean(dim=1).gather(1, where)
    for b in range(2):
        assert set(handle.kept[0][b].tolist()) == set(paid[b].topk(int(0.25 * N)).indices.tolist())


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_the_cache_equals_reading_everything_again(attention, padding):
    """Token by token from the pruned cache, against no cache and the same choice."""
    model, prompt = make_vlm(attention=attention), make_prompt(3, padding=padding)
    handle = shiva_ext.enable(model, CONFIG)
    with torch.no_grad():
        out = model.generate(
            **prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True,
            suppress_tokens=[IMAGE, 2],
        )  # fmt: skip
    kept = [[own.clone() for own in stage] for stage in handle.kept]
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    prompt_length = prompt["input_ids"].shape[1]
    assert lengths[0] == lengths[1] == prompt_length + 5 > lengths[2] == lengths[3] > lengths[4] == lengths[5]
    text = prompt_length - N
    assert lengths[2] == max(len(own) for own in kept[0]) + text + 5
    new = out.sequences[:, prompt_length:]
    for step in range(1, 6):
        longer = dict(prompt)
        longer["input_ids"] = torch.cat([prompt["input_ids"], new[:, :step]], dim=1)
        longer["attention_mask"] = torch.nn.functional.pad(prompt["attention_mask"], (0, step), value=1)
        torch.testing.assert_close(out.logits[step], by_hand_shifted(model, longer, kept), rtol=1e-3, atol=1e-3)


def by_hand_shifted(model, prompt, kept):
    """generate counts positions from the first real token."""
    found = []
    for b in range(len(prompt["input_ids"])):
        real = prompt["attention_mask"][b].bool()
        one = dict(
            input_ids=prompt["input_ids"][b][real][None],
            attention_mask=prompt["attention_mask"][b][real][None],
            pixel_values=prompt["pixel_values"][b : b + 1],
        )
        found.append(by_hand(model, one, [[stage[b]] for stage in kept]))
    return torch.cat(found)


@torch.no_grad()
def test_at_a_ratio_of_zero_everything_is_bit_identical():
    model, prompt = make_vlm(), make_prompt(padding=2)
    logits, text = model(**prompt).logits, model.generate(**prompt, max_new_tokens=5, do_sample=False)
    with shiva_ext.enable(model, FeatherConfig(ratio=0.0, layers=(2, 4))):
        assert torch.equal(model(**prompt).logits, logits)
        assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), text)


@torch.no_grad()
def test_disabled_it_is_bit_identical_again():
    model, prompt = make_vlm(), make_prompt()
    logits = model(**prompt).logits
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    shiva_ext.enable(model, CONFIG)
    shiva_ext.enable(model, FastVConfig(layer=2))  # takes the place of the first
    assert not torch.equal(model(**prompt).logits, logits)
    shiva_ext.disable(model)
    assert torch.equal(model(**prompt).logits, logits)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    shiva_ext.disable(model)


@torch.no_grad()
def test_prompts_without_images_are_not_touched():
    model, ids = make_vlm(), torch.randint(3, 80, (2, 9))
    wanted = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with shiva_ext.enable(model, CONFIG) as handle:
        model(**make_prompt())
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), wanted)
        with pytest.raises(RuntimeError, match="no prompt with visual"):
            shiva_ext.enable(model, CONFIG).flops_reduction()
    assert handle is not None


@torch.no_grad()
def test_two_images_have_a_grid_each():
    model, prompt = make_vlm(), make_prompt(images=2)
    with shiva_ext.enable(model, FeatherConfig(ratio=0.9, layers=(2,), stride=3)) as handle:
        logits = model(**prompt).logits[:, -1]
        torch.testing.assert_close(logits, by_hand(model, prompt, handle.kept, (2,)), rtol=1e-4, atol=1e-4)
    grid = grid_tokens(9, 9, 3)
    for own in handle.kept[0]:
        assert {*grid, *(N + t for t in grid)} <= set(own.tolist())


@torch.no_grad()
def test_beams_go_on_from_the_pruned_prompt():
    """The score of the best beam is the sum of its tokens' log-probabilities, by hand."""
    model, prompt = make_vlm(), make_prompt(3, padding=3)
    handle = shiva_ext.enable(model, CONFIG)
    out = model.generate(
        **prompt, max_new_tokens=5, do_sample=False, num_beams=3, return_dict_in_generate=True, output_scores=True,
        length_penalty=0.0, eos_token_id=None, suppress_tokens=[IMAGE],
    )  # fmt: skip
    kept = [[stage[3 * b] for b in range(3)] for stage in handle.kept]
    assert len({len(own) for own in kept[0]}) > 1
    new, total = out.sequences[:, prompt["input_ids"].shape[1] :], torch.zeros(3)
    for step in range(new.shape[1]):
        longer = dict(prompt, input_ids=torch.cat([prompt["input_ids"], new[:, :step]], dim=1))
        longer["attention_mask"] = torch.nn.functional.pad(prompt["attention_mask"], (0, step), value=1)
        logits = by_hand_shifted(model, longer, kept)
        total += logits.log_softmax(dim=-1).gather(1, new[:, step : step + 1])[:, 0]
    torch.testing.assert_close(out.sequences_scores, total, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_cache_that_is_used_again_begins_afresh():
    model, prompt = make_vlm(), make_prompt()
    with shiva_ext.enable(model, CONFIG) as handle:
        cache = DynamicCache(config=model.config.text_config)
        first = model(**prompt, past_key_values=cache, use_cache=True).logits
        with pytest.raises(RuntimeError, match="3 tokens go on from a prompt whose visual tokens were pruned"):
            model(input_ids=torch.full((2, 3), 5), past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        text = torch.randint(3, 80, (2, 9))
        wanted = model(input_ids=text).logits
        assert handle.kept == [] and handle.lengths == []
        assert torch.equal(model(input_ids=text, past_key_values=cache, use_cache=True).logits, wanted)
        assert torch.equal(model(**prompt, past_key_values=DynamicCache(), use_cache=True).logits, first)


@torch.no_grad()
def test_a_picture_after_a_prefix_is_refused_and_so_are_embeddings_alone():
    model, prompt = make_vlm(), make_prompt()
    with shiva_ext.enable(model, CONFIG):
        cache = DynamicCache(config=model.config.text_config)
        model(input_ids=torch.full((2, 4), 7), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="picture comes after what the cache holds"):
            model(**prompt | {"attention_mask": None}, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="found by input_ids"):
            model(inputs_embeds=torch.randn(2, 9, 64))


@torch.no_grad()
def test_pictures_that_touch_have_a_grid_each():
    model, prompt = make_vlm(), make_prompt(images=2)
    order = torch.cat([torch.arange(1 + N), torch.arange(2 + N, 2 + 2 * N), torch.tensor([1 + N])])
    ids = prompt["input_ids"]
    prompt["input_ids"] = torch.cat([ids[:, order], ids[:, len(order) :]], dim=1)
    assert (prompt["input_ids"][0, 1 : 1 + 2 * N] == IMAGE).all()
    grid = grid_tokens(9, 9, 3)
    for given in (None, (9, 9)):
        with shiva_ext.enable(model, FeatherConfig(ratio=0.9, layers=(2,), stride=3, grid=given)) as handle:
            model(**prompt)
        for own in handle.kept[0]:
            assert {*grid, *(N + t for t in grid)} <= set(own.tolist())


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 4])
def test_flash_attention_gets_the_mask_that_it_takes(padding):
    """[B,S] of the tokens that are there, or none; played by sdpa."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def flash(module, query, key, value, attention_mask, **kwargs):
        n, m = query.shape[2], key.shape[2]
        allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None]
        if attention_mask is not None:
            assert attention_mask.shape == (len(key), m)
            allowed = allowed & attention_mask.bool()[:, None, None]
            if n > 1:
                allowed = allowed | torch.eye(n, m, dtype=torch.bool)  # padding looks at itself
        return sdpa_attention_forward(module, query, key, value, allowed, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("flash_played", flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_played", flash_attention_mask)
    prompt, texts = make_prompt(3, padding=padding), []
    for attention in ("sdpa", "flash_played"):
        model = make_vlm()
        model.model.language_model.config._attn_implementation = attention
        with shiva_ext.enable(model, CONFIG) as handle:
            out = model.generate(
                **prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
                suppress_tokens=[IMAGE, 2],
            )  # fmt: skip
        assert len({len(own) for own in handle.kept[0]}) > 1
        texts.append(torch.stack(out.logits))
    torch.testing.assert_close(*texts, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_copy_is_pruned_and_undone_by_itself():
    model, prompt = make_vlm(), make_prompt()
    dense = model(**prompt).logits
    handle = shiva_ext.enable(model, CONFIG)
    pruned = model(**prompt).logits
    copied = copy.deepcopy(model)
    handle.kept = "mine"
    assert torch.equal(copied(**prompt).logits, pruned) and handle.kept == "mine"
    shiva_ext.disable(copied)
    assert torch.equal(copied(**prompt).logits, dense) and torch.equal(model(**prompt).logits, pruned)


@torch.no_grad()
def test_729_tokens_keep_between_218_and_299_and_each_its_position():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=108, patch_size=4
    )
    text = LlamaConfig(**TEXT | {"max_position_embeddings": 1024, "num_hidden_layers": 18})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=729)
    model, seen = LlavaForConditionalGeneration(config).eval(), {}
    for layer in (8, 16):
        model.model.language_model.layers[layer].self_attn.register_forward_pre_hook(
            lambda m, args, kwargs, layer=layer: seen.update({layer: kwargs["position_embeddings"]}), with_kwargs=True
        )
    tail = torch.randint(3, 80, (1, 6))
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, 729), IMAGE), tail], dim=1)
    with shiva_ext.enable(model, FeatherConfig()) as handle:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 108, 108))
    (first,), (second,) = handle.kept
    assert 218 <= len(first) <= 299 and len(second) == int(0.3**2 * len(first))
    for own in (first, second):
        assert torch.equal(own, own.unique())
    rotary = model.model.language_model.rotary_emb(torch.zeros(1, 1, 64), torch.arange(736)[None])
    for layer, own in ((8, first), (16, second)):
        position = torch.cat([torch.tensor([0]), 1 + own, torch.arange(730, 736)])
        for got, table in zip(seen[layer], rotary, strict=True):
            torch.testing.assert_close(got[0], table[0, position])


@torch.no_grad()
@pytest.mark.parametrize("rope", [False, True])
def test_the_score_without_rope_does_not_see_where_a_picture_stands(rope):
    """Before layer 1, whose hidden states know no positions yet."""
    model, prompt = make_vlm(), make_prompt()
    config, kept = FeatherConfig(ratio=0.8, layers=(1,), stride=0, rope=rope), []
    position = torch.arange(prompt["input_ids"].shape[1]).repeat(2, 1)
    for shift in (0, 1, 7, 50):
        moved = position.clone()
        moved[:, 1 : 1 + N] += shift
        moved[:, 1 + N :] += 50
        with shiva_ext.enable(model, config) as handle:
            model(**prompt, position_ids=moved)
        kept.append(torch.stack(handle.kept[0]))
    same = [torch.equal(kept[0], other) for other in kept[1:]]
    assert not any(same) if rope else all(same)


def test_what_cannot_be_pruned_is_refused():
    model, prompt = make_vlm(), make_prompt()
    with pytest.raises(ValueError, match=r"layers is \(8, 16\), but the model has 6 layers"):
        shiva_ext.enable(model, FeatherConfig())
    with pytest.raises(TypeError, match=r"Linear is no vision-language model"):
        shiva_ext.enable(torch.nn.Linear(2, 2), CONFIG)
    with pytest.raises(ValueError, match="FeatherConfig has all of its settings in it"):
        shiva_ext.enable(model, CONFIG, ratio=0.5)
    with shiva_ext.enable(model, FeatherConfig(ratio=0.5, layers=(2,), grid=(8, 8))):
        with pytest.raises(ValueError, match="81 visual tokens, which are no whole number of pictures of 64"):
            model(**prompt)
    with shiva_ext.enable(model, CONFIG):
        right = dict(prompt, attention_mask=prompt["attention_mask"].clone())
        right["attention_mask"][0, -2:] = 0
        with pytest.raises(ValueError, match="padded on the left"):
            model(**right)
        uneven = {k: v.clone() for k, v in prompt.items()}
        uneven["input_ids"][0, 5] = 7
        with pytest.raises(ValueError, match=r"as many visual tokens each, got \[80, 81\]"):
            model(**uneven)
        assert model(**prompt).logits.isfinite().all()  # nothing is left of the failed calls


def test_models_with_sliding_windows_are_refused():
    model = make_vlm("mistral")
    model.config.text_config.sliding_window = 16
    with pytest.raises(TypeError, match="sliding window"):
        shiva_ext.enable(model, CONFIG)


def test_gradients_flow_through_the_kept_tokens():
    model, prompt = make_vlm(), make_prompt()
    with shiva_ext.enable(model, CONFIG):
        model(**prompt, labels=prompt["input_ids"]).loss.backward()
    grads = [p.grad for p in model.model.language_model.layers.parameters()]
    assert len(grads) and all(g is not None and g.isfinite().all() for g in grads)
    assert LAYERS == len(model.model.language_model.layers)
