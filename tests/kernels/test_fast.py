"""The whole model on the kernels, against the plain one in float64 and in the same dtype."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from both_passes import in_both
from small import depth_anything, depth_anything_3, randomise, small, wide

import dpt
from dpt.fast.modules import FastBlock, FastDepthHead, FastPromptBranch
from dpt.inference.prediction import decided_labels
from dpt.inference.resizing import labels_from_logits
from dpt.kernels import launch
from dpt.kernels.tools.parity import assert_parity
from dpt.nets.encoders.residual import run
from dpt.nets.prompt import PromptBranch
from dpt.nets.sky import SKY
from dpt.training.memory import counted
from dpt.zoo import CONFIGS

INPUT = (1, 3, 32, 48)
DEPTH, SCENES = "dpt-tiny-depth", "dpt-tiny-scenes"
# The interpreter takes half a minute a forward: there each model goes one way forward and the other backward.
CASES = [(DEPTH, "pointers"), (SCENES, "descriptors")]
TRAINING_CASES = [(SCENES, "pointers"), (DEPTH, "descriptors")]
if not launch.INTERPRETED:
    CASES = [(name, precision) for name in (DEPTH, SCENES) for precision in ("ieee", "tf32")]
    TRAINING_CASES = [(name, "ieee") for name in (DEPTH, SCENES)]


def models(name: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(fast, plain), the same random weights, none of them at its initial value; of two blocks, for each is like the next."""
    generator = torch.Generator().manual_seed(0)
    plain = dpt.build(CONFIGS[name].with_("encoder", depth=2, hooks=(0, 1)))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    plain = plain.to(device, dtype)
    return dpt.accelerate(copy.deepcopy(plain), strict=True), plain


def in_dtype(model: torch.nn.Module, dtype: torch.dtype | None) -> torch.nn.Module:
    """A copy of the model, in ``dtype`` if one is given."""
    return copy.deepcopy(model).to(dtype)


@pytest.mark.parametrize(("name", "path"), CASES, indirect=["path"])
def test_forward(name, dtype, device, path):
    """Blind spot: parameters handed to the wrong kernel, which no test of one op sees."""
    x = torch.randn(INPUT).to(device, dtype)
    fast, plain = models(name, dtype, device)
    with torch.inference_mode():
        assert_parity(fast(x), *in_both(lambda dtype: in_dtype(plain, dtype)(x.to(dtype or x.dtype))))


def one_task(name: str) -> torch.nn.Module:
    """A small model with the first of its tasks."""
    model = wide(name)
    first = dpt.model.DPT(dataclasses.replace(model.config, further=()))
    first.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("further.")})
    return first.eval()


STYLES = {
    "mmsegmentation": (lambda: wide("dpt-base-ade20k"), (48, 32)),
    "isl-org": (lambda: wide("dpt-large-midas"), (32, 48)),  # with a unit that never runs
    "isl-org segmentation": (lambda: wide("dpt-large-ade20k"), (32, 32)),
    "Depth Anything": (depth_anything, (3 * 14, 5 * 14)),
    "DINOv2": (lambda: wide("dpt-dinov2-giant-kitti"), (3 * 14, 2 * 14)),
    "BEiT": (lambda: wide("midas-3.1-beit-base-384"), (48, 32)),  # a bias by relative position
    "DINOv3": (lambda: wide("dinov3-7b-depth"), (32, 16)),  # rotated, gated, registers, a norm of tokens, bins
    "TIPSv2": (lambda: one_task("tipsv2-base"), (2 * 14, 3 * 14)),  # a readout that the kernel has not, a linear head
    "Swin V2": (lambda: small("midas-3.1-swin2-tiny-256"), (64, 64)),  # maps of stages, and plain blocks
}


@pytest.mark.parametrize("style", STYLES)
def test_forward_of_each_style(style, dtype, device, path):
    """Blind spot: an option of the layouts we load, on the kernels: batch norm, sizes matched to the next level, LayerScale, a sigmoid,
    SwiGLU, units without bias, a map of the head's own size."""
    make, size = STYLES[style]
    plain = make().to(device, dtype)
    x = torch.randn(1, 3, *size).to(device, dtype)
    with torch.inference_mode():
        fast = dpt.accelerate(copy.deepcopy(plain), strict=True)(x)
        assert_parity(fast, *in_both(lambda dtype: in_dtype(plain, dtype)(x.to(dtype or x.dtype))))


def test_the_prompt_branch(dtype, device, path):
    """Blind spot: a ReLU too many, or one too few, behind the convolutions that are kernels; the prompt's one channel."""
    branch = randomise(PromptBranch(16)).to(device, dtype)
    fast = copy.deepcopy(branch)
    fast.__class__ = FastPromptBranch
    prompt, size = torch.rand(2, 5, 7, device=device), (10, 12)
    with torch.inference_mode():
        assert_parity(fast(prompt, size), *in_both(lambda dtype: in_dtype(branch, dtype)(prompt.to(dtype or prompt.dtype), size)))


def test_the_sky_branch(device, exact_path):
    """Blind spot: the sky's convolutions on the kernels, and an exponential behind one. The head alone: a whole model's sky is of pixels
    here and there near the threshold, which rounding takes to either side."""
    head = depth_anything_3().head.to(device)
    x = torch.randn(1, 16, 12, 10, device=device)
    fast = copy.deepcopy(head)
    fast.__class__ = FastDepthHead
    size, seen = (42, 28), []
    head.sky.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        found = fast(x, size)
        assert_parity(found, *in_both(lambda dtype: in_dtype(head, dtype)(x.to(dtype or x.dtype), size)))
    assert (seen[0] - SKY).abs().min() > 1e-4 and 0.1 < (seen[0] < SKY).double().mean() < 0.9


def trained(name: str, device: torch.device) -> list[dict[str, torch.nn.Parameter]]:
    """The parameters, with their gradients, after a step of the fast model, of the plain one in float64, and of it in float32."""
    x = torch.randn(INPUT, device=device)
    fast, plain = models(name, torch.float32, device)

    def train(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        out = model(x.to(next(model.parameters()).dtype))
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        optimizer.step()
        return dict(model.named_parameters())

    return [train(fast), *in_both(lambda dtype: train(in_dtype(plain, dtype)))]


@pytest.mark.parametrize(("name", "path"), TRAINING_CASES, indirect=["path"])
def test_one_training_step(name, device, exact_path):
    """Blind spot: a gradient that does not arrive, or arrives elsewhere. Every parameter's, and every parameter after the step, each in
    units of its largest value, by the rule for all of them together: of a few values, sums that cancel, PyTorch's own error is chance."""
    ways = trained(name, device)
    for kind, of in (("gradients", lambda parameter: parameter.grad), ("parameters", lambda parameter: parameter)):
        largest = {key: of(parameter).abs().max() for key, parameter in ways[1].items()}
        assert_parity(*(torch.cat([(of(p) / largest[key]).flatten() for key, p in way.items()]) for way in ways), name=kind)


@pytest.mark.parametrize("name", (DEPTH, SCENES))
def test_one_training_step_in_tf32(name, tf32, device):
    """In TF32 a ReLU falls to the other side here and there, in the reference too, and where a level has few pixels a gradient changes by a
    third: the rule would be chance. Each is nearer to the true one than none would be."""
    fast, true, _ = trained(name, device)
    assert not [key for key in true if not (fast[key].grad - true[key].grad).norm() < true[key].grad.norm()]


def trained_blocks(blocks: torch.nn.ModuleList, x: torch.Tensor, checkpointing: bool) -> dict[str, torch.Tensor]:
    """The gradients of blocks of which the second drops branches, and that of their input, by the same decisions each time."""
    torch.manual_seed(4)
    x = x.detach().to(next(blocks.parameters()).dtype, copy=True).requires_grad_()
    blocks.train().zero_grad()
    blocks[1].drop_path, tokens = 0.5, x
    for block in blocks:
        block.checkpointing = checkpointing
        tokens = run(block, tokens)
    tokens.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(tokens))
    return {"x": x.grad, **{name: parameter.grad.clone() for name, parameter in blocks.named_parameters()}}


@pytest.mark.parametrize(
    ("name", "path"), [("dpt-large-midas", TRAINING_CASES[0][1]), ("dinov3-7b-depth", TRAINING_CASES[1][1])], indirect=["path"]
)
def test_blocks_that_drop_branches_and_are_computed_again(name, device, exact_path):
    """Blind spot: a kernel's backward that reads what a checkpoint did not bring back, or that adds a residual which was dropped: an MLP's,
    and SwiGLU's."""
    plain = wide(name).encoder.blocks[:2].to(device)
    fast = copy.deepcopy(plain)
    for block in fast:
        block.__class__ = FastBlock
    x = torch.randn(4, 6, 64, device=device)
    ways = [
        trained_blocks(fast, x, False),
        *in_both(lambda dtype: trained_blocks(in_dtype(plain, dtype), x, False)),
    ]
    largest = {key: gradient.abs().max() for key, gradient in ways[1].items()}
    assert all(largest.values())
    assert_parity(*(torch.cat([(gradient / largest[key]).flatten() for key, gradient in way.items()]) for way in ways))
    again = trained_blocks(fast, x, True)
    assert all(torch.equal(again[key], gradient) for key, gradient in ways[0].items())


@pytest.mark.skipif(not launch.INTERPRETED, reason="PyTorch's own ops, which are counted too, keep other things on a GPU")
def test_kernels_keep_what_is_counted():
    """Blind spot: a count of what the fake forms of the ops return, and not of what a launch keeps."""
    model = dpt.accelerate(wide("dpt-large-midas").train(), strict=True)
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        depth = model(torch.randn(1, 3, 16, 32).to(memory_format=torch.channels_last))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    assert depth.requires_grad and counted(model, 1, (16, 32)).saved_fast == sum(storage.nbytes() for storage in kept.values())


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels launched, as they come."""
    names, original = [], launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, *args, **kwargs: (names.append(kernel.__name__), original(kernel, *args, **kwargs))
    )
    return names


def test_a_block_is_seven_launches(device, launches):
    """Blind spot: work that has slipped out of the fused kernels."""
    model = dpt.accelerate(dpt.build("dpt-tiny-depth", device=device))
    with torch.inference_mode():
        model.encoder.blocks[0](torch.randn(1, 7, 192, device=device))
    attention = ["layernorm_kernel", "linear_kernel", "attention_forward", "linear_kernel"]
    assert launches == [*attention, "layernorm_kernel", "linear_kernel", "linear_kernel"]


def test_a_block_with_a_bias_or_a_rotation(device, launches):
    """Blind spot: an attention that is PyTorch's, or a rotation, in a block that counts as fused. In float32 the rotation is a launch."""
    beit, rotated = (dpt.accelerate(wide(name)).encoder.blocks[0].to(device) for name in ("midas-3.1-beit-base-384", "chmv2"))
    with torch.inference_mode():
        beit(torch.randn(1, 7, 64, device=device), (2, 3))
        mlp = ["layernorm_kernel", "linear_kernel", "linear_kernel"]
        assert launches == ["layernorm_kernel", "linear_kernel", "attention_forward", "linear_kernel", *mlp]
        launches.clear()
        rotated(torch.randn(1, 7, 64, device=device), torch.randn(2, 7, 16, device=device))
    assert launches == ["layernorm_kernel", "linear_kernel", "rotate_kernel", "attention_forward", "linear_kernel", *mlp]


def test_a_rotated_block_is_seven_launches(device, launches):
    """Blind spot: in half precision, with heads of 64 channels, a rotation of its own."""
    block = dpt.accelerate(small("chmv2", embed_dim=128, num_heads=2)).encoder.blocks[0].to(device, torch.float16)
    with torch.inference_mode():
        block(torch.randn(1, 7, 128, device=device, dtype=torch.float16), torch.randn(2, 7, 32, device=device))
    mlp = ["layernorm_kernel", "linear_kernel", "linear_kernel"]
    assert launches == ["layernorm_kernel", "linear_kernel", "attention_forward", "linear_kernel", *mlp]


def test_launches_of_the_decoder(tf32, device, launches):
    """Blind spot: an upsampled map written between two levels, or a head that falls back. In TF32: exact float32 is cuDNN's."""
    model = dpt.accelerate(dpt.build("dpt-tiny-depth", device=device))
    shapes = ((1, 48, 8, 8), (1, 96, 4, 4), (1, 5, 192), (1, 5, 192))
    with torch.inference_mode():
        hooked = [torch.randn(shape, device=device) for shape in shapes]
        fused = model.fusion([reassemble(x, (2, 2)) for reassemble, x in zip(model.reassemble, hooked, strict=True)])
        model.head(fused, (32, 32))
    names = Counter(launches)
    assert names["_project_kernel"] == 2  # the readouts of the two levels that are not maps of the stem
    assert names["conv3x3_kernel"] == 2 * 7 + 1  # seven units and the head's first convolution
    assert names["_upsample_kernel"] == 1 and names["_depth_head_kernel"] == 1


def test_labels_are_decided_in_one_launch(device, launches):
    """Blind spot: predictions that write the classes' maps at the picture's size. The labels are the plain head's, ties aside."""
    model = dpt.accelerate(dpt.build("dpt-tiny-scenes", device=device))
    logits = torch.randn(9, 8, 12, device=device)
    labels, probability = decided_labels(model.head, logits, (40, 50), model.config.input, True)
    assert launches == ["_upsample_argmax_kernel"]
    plain_labels, plain_probability = labels_from_logits(logits, (40, 50), model.config.input, True)
    assert labels.dtype == torch.uint8 and (labels != plain_labels).sum() <= 1
    torch.testing.assert_close(probability, plain_probability)
    assert decided_labels(model.head, logits, (40, 50), model.config.input)[1] is None


def test_the_report_says_kernels(device):
    """Blind spot: a report that says PyTorch where kernels run."""
    report = dpt.fast_report(dpt.accelerate(dpt.build("dpt-tiny-depth", device=device)))
    assert {row.how for row in report} == {"kernels"} and len(report) == 6 + 2 + 7 + 1 + 1
