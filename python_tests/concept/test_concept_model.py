"""The language model around a chunk."""

from dataclasses import replace

import pytest
import torch

from shiva_ext.concept.model import ConceptConfig, ConceptModel

SMALL = ConceptConfig(vocabulary=40, width=32, heads=1, middle=2)


def make_model(**changes) -> ConceptModel:
    torch.manual_seed(0)
    return ConceptModel(replace(SMALL, **changes)).eval()


@pytest.mark.parametrize("ratio", [None, 1.5, 2.0])
@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
def test_no_logit_depends_on_a_later_token(ratio, reduction):
    model, tokens = make_model(ratio=ratio, reduction=reduction), torch.randint(40, (2, 20))
    before = model(tokens)[0]
    for n in range(20):
        changed = tokens.clone()
        changed[:, n] = (changed[:, n] + 7) % 40
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :n], before[:, :n], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(after[:, n], before[:, n])


def test_joint_decoding_begins_as_if_it_were_not_there():
    joint, plain = make_model(joint=True), make_model(joint=False)
    plain.load_state_dict({k: v for k, v in joint.state_dict().items() if ".concept." not in k})
    tokens = torch.randint(40, (2, 20))
    torch.testing.assert_close(joint(tokens)[0], plain(tokens)[0])
    assert any(".concept." in name for name in joint.state_dict())
    assert not any(".concept." in name for name in make_model(ratio=None).state_dict())


@pytest.mark.parametrize("changes", [{}, {"ratio": None}, {"fixed": True}, {"joint": False}, {"reduction": "sum"}])
def test_it_learns_a_pattern(changes):
    model = make_model(**changes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pattern = (torch.arange(8 * 21).view(8, 21) * 3) % 40
    first = None
    for step in range(40):
        loss, entropy = model.loss(pattern, torch.Generator().manual_seed(step))
        first = first or entropy.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert entropy.item() < 0.5 * first


@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
def test_packed_samples_do_not_see_each_other(reduction):
    padded, packed = make_model(reduction=reduction), make_model(reduction=reduction, packed=True)
    tokens, grads = torch.randint(40, (4, 30)), []
    assert len(set(padded(tokens)[1].counts().tolist())) > 1
    for model in (padded, packed):
        logits, _ = model(tokens)
        loss = (logits * torch.linspace(-1, 1, 40)).square().sum()
        grads.append([logits, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_packing_and_back():
    model, tokens = make_model(), torch.randint(40, (3, 25))
    concepts, chunks = model.chunk(model.embed(tokens))
    packed, ends = chunks.pack(concepts)
    counts = chunks.counts().tolist()
    assert ends.tolist() == [0, counts[0], sum(counts[:2]), sum(counts)] and ends.dtype == torch.int32
    pieces = [concepts[b, :count] for b, count in enumerate(counts)]
    assert torch.equal(packed[0], torch.cat(pieces))
    back = chunks.unpack(packed)
    assert back.shape == concepts.shape
    for b, count in enumerate(counts):
        assert torch.equal(back[b, :count], pieces[b]) and not back[b, count:].any()


@pytest.mark.parametrize("changes", [{"width": 30, "heads": 4}, {"width": 18, "heads": 6}, {"width": 4}, {"heads": 0}])
def test_sizes_that_do_not_go_together_are_refused(changes):
    with pytest.raises(ValueError, match="an even number of channels"):
        make_model(**changes)
