"""The stem of DPT-Hybrid: against transformers' BiT, and what is kept of its weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small import HYBRID_FIELDS, randomise, small

from dpt.checkpoints import convert
from dpt.nets.encoders.resnetv2 import STANDARDISE, ResNetV2, StandardisedConv2d
from dpt.zoo import CONFIGS, transformers_hybrid


@pytest.fixture
def conv() -> StandardisedConv2d:
    return randomise(StandardisedConv2d(4, 6, 3, 1, "deviation"))


@pytest.fixture
def makes(monkeypatch) -> list[StandardisedConv2d]:
    """The convolutions whose weight was standardised, as it happens."""
    found, original = [], StandardisedConv2d._made
    monkeypatch.setattr(StandardisedConv2d, "_made", lambda self: (found.append(self), original(self))[1])
    return found


def test_the_maps_that_are_hooked():
    """Blind spot: stages of other strides or widths, or a hook one stage off, which a resize in the decoder hides."""
    model = small("dpt-hybrid-midas")
    stem, x = model.encoder.patch_embed, torch.randn(2, 3, 48, 80)
    maps = stem.maps(x)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 12, 20), (2, 64, 6, 10), (2, 128, 3, 5)]
    assert [len(stage.blocks) for stage in stem.stages] == [1, 2, 1]
    hooked = model.encoder(x)
    assert torch.equal(hooked[0], maps[0]) and torch.equal(hooked[1], maps[1]) and hooked[2].shape == (2, 16, 32)
    torch.testing.assert_close(stem(x), stem.embed(maps[2]))


@pytest.mark.parametrize("eps_on", STANDARDISE)
@pytest.mark.parametrize("deviation", [1.0, 1e-3, 1e-5])
def test_each_epsilon_where_it_belongs(eps_on, deviation):
    """Blind spot: one form of the standardisation for the other, 1 % apart at a deviation of 1e-3, which of whole models would pass for
    rounding. transformers' is a batch norm of the filters; timm's, until 0.4.9, is written out."""
    weight = deviation * torch.randn(6, 4, 3, 3) + 0.1
    if eps_on == "variance":
        wanted = F.batch_norm(weight.reshape(1, 6, -1), None, None, training=True, eps=1e-8).reshape_as(weight)
    else:
        exact = weight.double()
        centred = exact - exact.mean((1, 2, 3), keepdim=True)
        wanted = (centred / (centred.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-5)).float()
    ours = STANDARDISE[eps_on](weight)
    assert (ours - wanted).abs().max() <= 2e-3 * min(1e-3 / deviation, 1) * wanted.abs().max()
    other = STANDARDISE[next(name for name in STANDARDISE if name != eps_on)](weight)
    assert deviation > 0.1 or (ours - other).abs().max() > 4e-3 * wanted.abs().max()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 0.01 * theirs.abs().max()
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("side", [64, 96, 112])
@pytest.mark.parametrize(("task", "name"), [("depth", "dpt-hybrid-midas"), ("segmentation", "dpt-hybrid-ade20k")])
def test_equal_to_transformers(task, name, side):
    """Blind spot: any part of the arithmetic, the padding and the hooks among it. transformers' DPT with a BiT, at sizes of even and odd
    patches; it takes squares of its own size only. Weights of the stem are as small as trained ones, so that their epsilon shows."""
    transformers = pytest.importorskip("transformers")
    classes = {"depth": transformers.DPTForDepthEstimation, "segmentation": transformers.DPTForSemanticSegmentation}
    fields = {**HYBRID_FIELDS, "image_size": side, "num_labels": 5, "use_batch_norm_in_fusion_residual": task == "segmentation"}
    theirs = randomise(classes[task](transformers.DPTConfig(**fields)))
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if "backbone" in key and value.dim() == 4:
                value.mul_(0.02)
    layout = transformers_hybrid.LAYOUT
    ours = small(name, pos_grid=(side // 16, side // 16), **layout.differs["encoder"])
    ours.load_state_dict(convert(theirs.state_dict(), layout, ours.state_dict()))
    fused = []
    theirs.head.register_forward_pre_hook(lambda module, inputs: fused.append(inputs[0][-1]))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        result = theirs(x)
        expected = result.predicted_depth if task == "depth" else result.logits
        close(ours.features(x), fused[0])
        if side % 32 == 0:  # of odd patches theirs is larger than the picture
            close(ours(x), expected)


def test_the_standardised_weight_is_kept(conv, makes):
    """Blind spot: standardised at every forward; kept in other bits than it is made in; or kept when the weight has changed."""
    x = torch.randn(1, 4, 5, 5)
    wanted = conv(x)
    with torch.inference_mode():
        assert torch.equal(conv(x), wanted) and torch.equal(conv(x), wanted) and len(makes) == 2
    with torch.no_grad():
        conv.weight.add_(torch.randn_like(conv.weight))
        changed = conv(x)
        assert len(makes) == 3 and not torch.equal(changed, wanted)
        for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
            assert not other.kept._kept and torch.equal(other(x), changed)
    assert set(conv.state_dict()) == {"weight"} and not list(conv.buffers())


def test_gradients_go_through_the_standardisation(conv, makes):
    """Blind spot: a kept weight in a training step, or a gradient as if the weights were used as they are. That of a filter's mean is 0."""
    with torch.no_grad():
        conv(torch.randn(1, 4, 5, 5))
    conv(torch.randn(1, 4, 5, 5)).square().sum().backward()
    assert conv.weight.grad.abs().max() > 1e-2 and not conv.kept._kept and len(makes) == 2
    assert conv.weight.grad.sum((1, 2, 3)).abs().max() < 1e-4 * conv.weight.grad.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_traces_standardise_the_parameter(conv):
    """Blind spot: a weight kept from before, as a constant of the program."""
    x = torch.randn(1, 4, 5, 5)
    before = conv(x)
    programs = [
        torch.export.export(conv, (x,)).module(),
        torch.compile(conv, backend="eager", fullgraph=True),
        torch.jit.trace(conv, x, check_trace=False),
    ]
    for program in programs:
        torch.testing.assert_close(program(x), before)
        weight = next(value for name, value in program.named_parameters() if name.endswith("weight"))
        kept = weight.clone()
        weight.add_(torch.randn_like(weight))
        assert (program(x) - before).abs().max() > 1e-2
        weight.copy_(kept)


def test_half_precision_standardises_in_float32():
    """Blind spot: deviations of trained weights, whose squares are nothing in half precision, and an epsilon that is rounded away."""
    conv = StandardisedConv2d(4, 6, 3, 1, "variance")
    with torch.no_grad():
        conv.weight.copy_(1e-4 * torch.randn(conv.weight.shape))
    half = copy.deepcopy(conv).half()
    exact = STANDARDISE["variance"](half.weight.float())
    assert half.standardised().dtype == torch.float16
    torch.testing.assert_close(half.standardised().float(), exact, rtol=1e-3, atol=1e-3)


def test_the_published_stem():
    """Blind spot: sizes that a small model does not show: a first convolution of 64, stages of 3, 4 and 9 blocks. Counted by hand."""
    with torch.device("meta"):
        stem = ResNetV2(CONFIGS["dpt-hybrid-midas"].encoder)
    blocks = 0
    for width, count, before in ((256, 3, 64), (512, 4, 256), (1024, 9, 512)):
        middle = width // 4
        blocks += count * (9 * middle**2 + middle * width + 2 * (middle + middle + width))  # the second and third, and three norms
        blocks += middle * before + (count - 1) * middle * width  # the first convolutions
        blocks += before * width + 2 * width  # the stage's way to its width
    assert sum(p.numel() for p in stem.parameters()) == 3 * 49 * 64 + 2 * 64 + blocks + 1024 * 768 + 768
