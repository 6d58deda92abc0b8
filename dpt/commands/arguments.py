"""What the commands take: one function each, which adds its arguments to a parser and whose docstring is the command's description.

Nothing here needs PyTorch, so that help and mistakes are told at once. A default that depends on more than the command line is None,
and its help says it in words, which tests hold to the code.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..data.kinds import KINDS, SPLITS
from ..evaluation.protocols import PROTOCOLS, named
from ..rules import nearest
from ..system.endings import USAGE, printable
from ..training.recipes import RECIPES, Recipe
from ..zoo import CONFIGS, LAYOUTS, config_of

CARRIED = tuple(name for name, config in CONFIGS.items() if config.carried)
DTYPES = ("float32", "float16", "bfloat16")  # names in `torch`
FURTHER = {  # files of `dpt predict` on request, as in `inference.maps`
    "pfm": "depth as .pfm",
    "exr": "depth and normals as .exr, which needs OpenEXR,",
    "tiff": "depth as .tiff of 32-bit floats",
}
SCENES = {"val": 300, "test": 500, "train": 9000}  # rendered for each split


class Parser(argparse.ArgumentParser):
    """Mistakes end the program with one sentence, which names the nearest option where there is none of a name.

    Options are not abbreviated: what is short for one today is short for two once another is added.

    Attributes:
        rules: of arguments that are right by themselves: whether they contradict each other, and what to say then.
    """

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.rules: list[tuple[Callable[[argparse.Namespace], bool], str]] = []

    def parse_args(  # type: ignore[override]  # argparse's own is told of anything in place of a namespace
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        for word in args:  # before argparse, which would first miss what the mistyped option was to give
            option = word.partition("=")[0]
            if word == "--":
                break
            if option.startswith("--") and " " not in option and option not in self._option_string_actions:
                self.error(f"no option is named {option!r}{nearest(option, self._option_string_actions)}")
        found = super().parse_args(args, namespace)
        for broken, message in self.rules:
            if broken(found):
                self.error(message)
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def _number(kind: type, words: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """The `type` of an argument: a number, and the rule that it is held to."""

    def convert(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan  # which no rule lets pass
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {words}")
        return value

    return convert


_COUNT = _number(int, "a whole number from 1", lambda value: value >= 1)
_COUNT_OR_NONE = _number(int, "a whole number from 0", lambda value: value >= 0)
_POSITIVE = _number(float, "a number above 0", lambda value: 0 < value < math.inf)


def _known(check: Callable[[str], object]) -> Callable[[str], str]:
    """The `type` of an argument: a name that `check` knows; it raises ValueError for others."""

    def convert(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return convert


_NAME, _RECIPE, _PROTOCOL = _known(config_of), _known(Recipe.of), _known(named)


def _weights(parser: Parser) -> None:
    what = "checkpoint file or folder, or a model on transformers' hub such as Intel/dpt-large; without a name it says what model it is"
    parser.add_argument("--weights", metavar="FILE", help=f"{what} (default: the model's own, carried or downloaded)")


def _licence(parser: Parser) -> None:
    what = "you have read the licence of the weights to be downloaded, which dpt info names, and keep to it; asked for where it does not "
    parser.add_argument("--accept-license", action="store_true", help=what + "allow every use")


def _device(parser: Parser) -> None:
    what = "auto, cpu, cuda, cuda:N or mps; auto is cuda or mps where there is one, else cpu (default: %(default)s)"
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=what)


def _fast(parser: Parser) -> None:
    what = "run on the fused kernels; where there is no GPU for them, on the same algebra in PyTorch"
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, help=f"{what} (default: on CUDA where Triton is installed)")
    what = "say on stderr which modules of a model run fused, which do not, and why"
    parser.add_argument("-v", "--verbose", action="store_true", help=what)


def _graph(parser: Parser) -> None:
    what = "replay a CUDA graph for each size of input that comes again: less work for the host, more memory (default: on CUDA)"
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help=what)


def _batch_size(parser: Parser) -> None:
    help = "pictures of one size in the network at a time; too few are filled up, which costs as much (default: %(default)s)"
    parser.add_argument("--batch-size", type=_COUNT, default=1, metavar="N", help=help)


def _focal(parser: Parser) -> None:
    what = "focal length of all pictures, in their own pixels, for models that need it (default: what each picture's EXIF data say)"
    parser.add_argument("--focal", type=_POSITIVE, metavar="PIXELS", help=what)


def _views(parser: Parser) -> None:
    """Test-time augmentation and windows."""
    parser.add_argument("--tta", action="store_true", help="average over six scales and flips: slower, more accurate")
    what = "average over these scales (default: 1; with --tta the six)"
    parser.add_argument("--scales", nargs="+", type=_POSITIVE, metavar="SCALE", help=what)
    what = "average with the mirrored picture (default: only with --tta)"
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help=what)
    parser.add_argument("--slide", action="store_true", help="overlapping windows; --window and --stride imply it")
    _tiles(parser)
    what = "side of the windows (default: the shorter side of the model's input)"
    parser.add_argument("--window", type=_COUNT, metavar="PIXELS", help=what)
    parser.add_argument("--stride", type=_COUNT, metavar="PIXELS", help="distance between windows (default: two thirds of a window)")


def _tiles(parser: Parser) -> None:
    what = "refine depth by overlapping tiles of the picture at its own size: finer edges, slower; labels beside it stay the whole's"
    parser.add_argument("--tiles", action="store_true", help=what)


def _reading(parser: Parser) -> None:
    """How data is to be read; `running.reading` takes them to `FolderDataset`."""
    stated = "default: what dataset.json says, or"
    what = f"a metre, in integer depth, such as 256 for KITTI ({stated} 1000)"
    parser.add_argument("--depth-scale", type=_POSITIVE, metavar="UNITS", help=what)
    what = f"label 0 is 'other' and ignored, k is class k - 1, as in ADE20K ({stated} not)"
    parser.add_argument("--reduce-zero-label", action=argparse.BooleanOptionalAction, help=what)


def _max_depth(parser: Parser) -> None:
    what = "what is farther counts as unknown (default: the bound of a model of bounded metres, or 80)"
    parser.add_argument("--max-depth", type=_POSITIVE, metavar="METRES", help=what)


def _range(text: str) -> tuple[float, float]:
    try:
        near, far = (float(part) for part in text.split(","))
    except ValueError:
        near = far = math.nan
    if not (math.isfinite(near) and math.isfinite(far) and near != far):
        raise argparse.ArgumentTypeError(f"{text!r}: it must be two numbers, NEAR,FAR, that are not the same")
    return min(near, far), max(near, far)


def predict(parser: Parser) -> None:
    """Depth, label and normal maps of pictures, at each picture's own size.

    For a picture a.jpg the folder of --out gets, by each model's task,
      a_MODEL.png          16-bit depth: inverse or relative depth spread over 0..65535, or millimetres (for more
                           than 65 m 256ths of a metre, as KITTI has it); or 8-bit class indices; or
                           normals as colours, x red, y green, z blue, -1..1 spread over 0..255
      a_MODEL.npy          depth or normals as float32, as the model gives them: metres, inverse or relative depth, unit vectors
      a_MODEL.pfm, .tiff   the same of depth, on request: Portable Float Map, TIFF of 32-bit floats
      a_MODEL.exr          the same, on request: depth is the channel Z, normals are N.X, N.Y and N.Z; the attribute "depth" says
                           what it is. It needs OpenEXR: pip install '.[exr]'
      a_MODEL_color.jpg    the picture with the coloured depth or normals beside it
      a_MODEL_overlay.jpg  the picture tinted by class, with a legend of the classes present
    Of a model of several tasks each has its name behind MODEL: a_MODEL_depth.png, a_MODEL_normals.png and so on.
    For a clip a.mp4 it gets a_MODEL.mp4, the clip beside its coloured maps, with its sound (.mkv where an .mp4 cannot hold that); relative
    depth is brought to that of the frames before by scale and shift, and the range of colours is one for the whole clip. It needs PyAV:
    pip install '.[video]'. A clip that was stopped goes on behind its last hundred frames when the same command is given again.
    Pictures of the same name get longer names instead of overwriting each other. A picture whose files are there, made from
    the same content by the same model with the same options, is skipped; with other options it is done again; files that were
    made from another picture, or by something else, are only replaced with --overwrite. Names too long for a file are cut, and
    a hash put behind them. Exit code: 0 done, 1 some pictures failed (each named on stderr, the others finished) or the disk or
    memory gave out (the same command goes on), 2 nothing could be done, 130 interrupted, 143 terminated, 129 hung up.
    `torchrun --nproc-per-node N -m dpt predict ...` shares the pictures out to N processes, each with a GPU of its own where
    there are any; they end together, and a run in which one died is gone on with like any other.
    """
    many = "--weights is of one model: give --model at most once with it"
    parser.rules = [
        (lambda args: args.weights is not None and len(args.model or ()) > 1, many),
        (lambda args: args.camera is None and not args.inputs, "it needs INPUT, pictures or clips, or --camera N"),
        (lambda args: args.camera is None and args.out is None, "it needs -o DIR, a folder for the results"),
        (lambda args: args.camera is not None and (args.inputs or args.out), "--camera shows what it sees: no INPUT, and no -o"),
    ]
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="picture, clip, folder of pictures, or pattern such as 'photos/*.jpg'")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder for the results; made if missing (default: none)")
    what = "in place of INPUT and -o: show what this camera sees, beside its maps, in a window, until that is closed; 0 is the first "
    what += "(default: none)"
    parser.add_argument("--camera", type=_COUNT_OR_NONE, metavar="N", help=what)
    what = f"a model that dpt info lists; can be repeated (default: {' and '.join(CARRIED)})"
    parser.add_argument("--model", action="append", type=_NAME, metavar="NAME", help=what)
    _weights(parser)
    _licence(parser)
    _device(parser)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model (default: %(default)s)")
    _fast(parser)
    _graph(parser)
    _views(parser)
    _focal(parser)
    what = (
        "a sensor's depth of the one picture, for models that need it: .npy, in metres, or a PNG of 16 bits, in millimetres (default: none)"
    )
    parser.add_argument("--prompt", type=Path, metavar="FILE", help=what)
    _calibrate(parser)
    what = "depth that the colours begin and end with, and the PNG where it is not in metres, the same for all: metres, or as the model "
    what += "gives it, --range=NEAR,FAR where one is below 0 (default: each picture's own; of a clip by its first second)"
    parser.add_argument("--range", type=_range, metavar="NEAR,FAR", help=what)
    for name, what in FURTHER.items():
        parser.add_argument(f"--{name}", dest="further", action="append_const", const=name, default=[], help=f"write {what} too")
    what = "of a clip: the frame beside its map, or the map alone (default: %(default)s)"
    parser.add_argument("--view", choices=("beside", "map"), default="beside", help=what)
    what = "of a clip: also its maps, one PNG a frame, as of pictures but of one range, or all in one .npz (default: neither)"
    parser.add_argument("--frames", choices=("png", "npz"), help=what)
    parser.add_argument("--overwrite", action="store_true", help="do again what is done, and replace files of other origin")
    _batch_size(parser)
    parser.add_argument("--recursive", action="store_true", help="folders with their subfolders")
    what = "refuse pictures of more; a pixel takes some 20 bytes while it is decoded, a deeper one 50 (default: 178956970, Pillow's limit)"
    parser.add_argument("--max-pixels", type=_COUNT, metavar="N", help=what)


_INTRINSICS = "four numbers, fx,fy,cx,cy, in pixels of the picture"


def _intrinsics(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 4 or not (all(map(math.isfinite, found)) and found[0] > 0 and found[1] > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: it must be {_INTRINSICS}, the first two above 0")
    return found


def points(parser: Parser) -> None:
    """A picture as coloured points, or as a mesh: each pixel put back to where a pinhole camera saw it.

    DST is a .ply, points as seen by the camera (x right, y down, z away), binary; or a .glb, a mesh as glTF has it (y up, z towards the
    viewer), which needs trimesh: pip install '.[points]'. Of a model of metres the unit is a metre, and with --calibrate; of others the
    median distance is 1, and how deep the scene is, is a guess. Between a near object and what is behind it a map has pixels of depths
    that nothing has: where depth spans more than --threshold of itself within 3x3 pixels there is no point, and a hole in the mesh. The
    camera is that of --intrinsics or --fov, else what the picture's EXIF data say, else one of 55 degrees.
    """
    one = "the camera is told once: by --fov or --intrinsics"
    kinds = "DST must end in .ply or .glb"
    parser.rules = [
        (lambda args: args.fov is not None and args.intrinsics is not None, one),
        (lambda args: args.target.suffix.lower() not in (".ply", ".glb"), kinds),
    ]
    _picture(parser, "the file to write, .ply or .glb; it is replaced")
    what = "angle, in degrees, under which the picture's width is seen (default: by the picture's EXIF data, or 55)"
    parser.add_argument("--fov", type=_number(float, "above 0 and below 180", lambda value: 0 < value < 180), metavar="DEGREES", help=what)
    what = f"the camera: {_INTRINSICS} (default: square pixels, its axis through the middle)"
    parser.add_argument("--intrinsics", type=_intrinsics, metavar="FX,FY,CX,CY", help=what)
    what = "share of itself that depth may span within 3x3 pixels (default: %(default)s)"
    parser.add_argument("--threshold", type=_POSITIVE, default=0.05, metavar="SHARE", help=what)
    what = "also write the normals of the points as colours, x red, y green, z blue, -1..1 spread over 0..255: a .png (default: not)"
    parser.add_argument("--normals", type=Path, metavar="PNG", help=what)
    _single(parser)


def stereo(parser: Parser) -> None:
    """Both eyes' views of a picture, by its depth.

    DST is a .png: the left eye's picture and the right eye's beside it, or both in one for red and cyan glasses. What nobody saw, beside
    the edges of what is near, gets the colours of what is farther there.
    """
    parser.rules = [
        (lambda args: args.target.suffix.lower() != ".png", "DST must end in .png"),
        (lambda args: args.anaglyph and args.crossed, "--crossed is of two pictures, and --anaglyph of one"),
    ]
    _picture(parser, "the file to write, .png; it is replaced")
    parser.add_argument("--anaglyph", action="store_true", help="one picture for glasses, the left eye's red and the right one's cyan")
    parser.add_argument("--crossed", action="store_true", help="the right eye's picture first, for looking with crossed eyes")
    what = "how far the nearest and the farthest are apart between the eyes, of the picture's width (default: %(default)s)"
    between = _number(float, "above 0 and below 0.5", lambda value: 0 < value < 0.5)
    parser.add_argument("--disparity", type=between, default=0.03, metavar="SHARE", help=what)
    _single(parser)


def _picture(parser: Parser, out: str) -> None:
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="the picture's file")
    _target(parser, out)


def _target(parser: Parser, what: str) -> None:
    parser.add_argument("-o", "--out", dest="target", required=True, type=Path, metavar="DST", help=what)


def _single(parser: Parser) -> None:
    """How one picture's depth is predicted: `single.depth_of`."""
    _calibrate(parser)
    parser.add_argument("--model", type=_NAME, metavar="NAME", help=f"a model that dpt info lists (default: {CARRIED[0]})")
    _weights(parser)
    _licence(parser)
    _device(parser)
    _fast(parser)
    _focal(parser)
    _tiles(parser)


def _calibrate(parser: Parser) -> None:
    what = (
        "known distances, which bring depth that is known up to scale and shift to metres: a .csv of rows x,y,metres, two or more, or a "
        "sparse depth map of the picture's size, 0 where nothing is known, a .npy in metres or a 16-bit PNG in millimetres (default: none)"
    )
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help=what)


_PORT = _number(int, "a whole number from 0 to 65535", lambda value: 0 <= value <= 65535)


def serve(parser: Parser) -> None:
    """A page on which pictures are dropped and their depth is seen, and an HTTP endpoint for programs, until Ctrl-C.

    The page is at http://127.0.0.1:8000/ unless --host or --port say otherwise. POST /predict takes a form with the picture in the field
    `picture`, and in the address `model`, `task` and `as`, which is json, npy, png16, ply, labels, colours or picture:
      curl -F picture=@a.jpg 'http://127.0.0.1:8000/predict?as=png16' -o a.png
    What waits is predicted together. Nothing that was sent is kept, and nobody is asked who they are. It needs FastAPI and uvicorn:
    pip install '.[serve]'. Exit code: 2 it could not begin, 1 it ended by itself, 130 interrupted, 143 terminated, 129 hung up.
    """
    many = "--weights is of one model: give --model at most once with it"
    parser.rules = [(lambda args: args.weights is not None and len(args.model or ()) > 1, many)]
    what = f"a model that dpt info lists; can be repeated (default: {' and '.join(CARRIED)})"
    parser.add_argument("--model", action="append", type=_NAME, metavar="NAME", help=what)
    _weights(parser)
    _licence(parser)
    what = "address to listen at; at another than this machine's own anybody who reaches it can use it (default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=what)
    what = "port to listen at; 0 is any that is free, and is told (default: %(default)s)"
    parser.add_argument("--port", type=_PORT, default=8000, metavar="PORT", help=what)
    what = "refuse files of more bytes (default: %(default)s)"
    parser.add_argument("--max-bytes", type=_COUNT, default=32 << 20, metavar="N", help=what)
    what = "refuse pictures of more pixels, before they are decoded (default: %(default)s)"
    parser.add_argument("--max-pixels", type=_COUNT, default=32_000_000, metavar="N", help=what)
    what = "how many pictures may be in work or wait; who comes then is told to try again (default: %(default)s)"
    parser.add_argument("--queue", type=_COUNT, default=64, metavar="N", help=what)
    what = "pictures of one size in the network at a time; too few are filled up, which costs as much (default: 4 on CUDA, else 2)"
    parser.add_argument("--batch-size", type=_COUNT, metavar="N", help=what)
    _device(parser)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model (default: %(default)s)")
    _fast(parser)


def demo(parser: Parser) -> None:
    """Depth and labels of the pictures that come with the package: scenes of the test seeds, which no training has seen."""
    what = "folder for the results; made if missing (default: %(default)s)"
    parser.add_argument("-o", "--out", type=Path, default=Path("out/demo"), metavar="DIR", help=what)
    _device(parser)


def info(parser: Parser) -> None:
    """The named models: parameters, input, what they predict, source and licence of their weights; or one checkpoint, told apart and
    described."""
    what = (
        "a model's name or a pattern of names such as '*anything*'; a checkpoint file or folder, its address, or a model on transformers' "
    )
    parser.add_argument("what", nargs="?", metavar="WHAT", help=what + "hub (default: all named models are listed)")
    parser.add_argument("--model", type=_NAME, metavar="NAME", help="the model that a checkpoint is of (default: what it says)")


def convert(parser: Parser) -> None:
    """A checkpoint in another family's layout: the same tensors under other names, bit for bit.

    The layouts are dpt, ours; hf, transformers', a folder with config.json and preprocessor_config.json beside the weights; and those of
    the families' own code. DST is a file .safetensors, or .pth, .pt, .bin or .ckpt for one that torch.load reads, or for hf a folder. What
    the network never reads is kept for the way back. What the other code computes otherwise is said on stderr; a model that it cannot hold
    is refused, and nothing is written.
    """
    parser.rules = [
        (lambda args: (args.to is None) == (not args.vit2mmseg), "it needs --to LAYOUT, or --vit2mmseg"),
        (lambda args: args.vit2mmseg and args.model is not None, "--vit2mmseg is of an encoder: it takes no --model"),
    ]
    what = "checkpoint file or folder, its address, or a model on transformers' hub such as Intel/dpt-large"
    parser.add_argument("source", nargs="+", metavar="SRC", help=what + "; or several that hold one model, a backbone and a head")
    parser.add_argument("target", type=Path, metavar="DST", help="what to write")
    parser.add_argument(
        "--to", choices=sorted({layout.format for layout in LAYOUTS}), help="the layout of DST (default: mmseg with --vit2mmseg)"
    )
    what = "SRC is a ViT of timm, JAX' by timm, or a DeiT; DST becomes the encoder of mmsegmentation, as its script vit2mmseg.py makes it"
    parser.add_argument("--vit2mmseg", action="store_true", help=what)
    parser.add_argument("--model", type=_NAME, metavar="NAME", help="the model that SRC is of (default: what SRC says)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split(","))
    except ValueError:
        height = width = 0
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be two whole numbers from 1, HEIGHT,WIDTH")
    return height, width


def export(parser: Parser) -> None:
    """A model for other runtimes: an ONNX file, a program of torch.export, or a package of AOTInductor.

    DST is a .onnx; or a .pt2, which is a program of torch.export, for other machines too, or with --aot compiled for this one, by a C++
    compiler. Batch, height and width are open, the sides multiples of the model's patch from three on; a network of one size (Swin) keeps
    its own. What is written is float32, and the model's plain form: no kernel of --fast is in it. It is run first, beside PyTorch, at three
    sizes and in two batches, and not written where a map differs by more than 0.001 of its range (exit code 1). Of more than 1.9 GB of
    weights an ONNX file has them in DST.data beside it. ONNX needs packages: pip install '.[export]'.

    With --with-processing the graph takes pictures uint8 (B, H, W, 3) of any size and gives maps of their size, as dpt predict makes them:
    depth, labels, normals. The network sees one size then, that of --size, whatever the aspect of a picture: where that is the size that
    dpt predict would show it the maps are the same.
    """
    parser.set_defaults(fast=False, verbose=False)
    parser.rules = [
        (lambda args: args.model is None and args.weights is None, "it needs NAME, a model, or --weights FILE"),
        (lambda args: args.target.suffix not in (".onnx", ".pt2"), "DST must end in .onnx or .pt2"),
        (lambda args: args.aot and args.target.suffix != ".pt2", "--aot makes a .pt2"),
        (lambda args: args.opset is not None and args.target.suffix != ".onnx", "--opset is of a .onnx"),
        (lambda args: args.trtexec and args.target.suffix != ".onnx", "--trtexec is of a .onnx"),
        (lambda args: args.trtexec and args.with_processing, "--trtexec is of a graph without --with-processing, which needs float32"),
    ]
    parser.add_argument("model", nargs="?", type=_NAME, metavar="NAME", help="a model that dpt info lists (default: what --weights says)")
    _target(parser, "the file to write, .onnx or .pt2; it is replaced")
    _weights(parser)
    _licence(parser)
    parser.add_argument("--aot", action="store_true", help="of a .pt2: a package of AOTInductor, compiled for this machine's processor")
    what = "of a .onnx: the version of ONNX's operators, from 18 to 23 (default: 18, which torch's exporter writes without converting it)"
    parser.add_argument(
        "--opset", type=_number(int, "a whole number from 18 to 23", lambda value: 18 <= value <= 23), metavar="N", help=what
    )
    what = "the one size of the network's input (default: any; with --with-processing the size that the model's rule aims at)"
    parser.add_argument("--size", dest="sides", type=_size, metavar="HEIGHT,WIDTH", help=what)
    what = "the resize and normalisation of pictures, and the way back to their size, are in the graph"
    parser.add_argument("--with-processing", action="store_true", help=what)
    what = "run what is written beside PyTorch before it is kept (default: yes)"
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help=what)
    what = "of a .onnx: print the line of TensorRT's trtexec that keeps layer norms and last layers in float32; it has not been run"
    parser.add_argument("--trtexec", action="store_true", help=what)


def data(parser: Parser) -> None:
    """How each kind of data set lies on the disk; with --check, whether one lies so, and whether its files can be used.

    A check reads every picture and every target, and tells of each split how many there are and were published, their sizes, the share of
    each class or the range of depth, and of what cannot be used the first ten. Exit code: 0 all is well, 1 something is wrong, 2 nothing
    could be read.
    """
    parser.add_argument("--check", type=Path, metavar="DIR", help="a data set's folder (default: the layouts are printed)")
    what = "how it lies (default: what its folders look like; without --check all kinds)"
    parser.add_argument("--kind", choices=KINDS, help=what)
    parser.add_argument("--split", action="append", choices=SPLITS, help="can be repeated (default: all)")
    _reading(parser)


def render(parser: Parser) -> None:
    """Render the scenes that the carried models are trained, validated and tested on: DIR/train, DIR/val and DIR/test."""
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="an unfinished data set there is completed")
    parser.add_argument("--split", action="append", choices=SCENES, help="can be repeated (default: all three)")
    counts = ", ".join(f"{split} {count}" for split, count in SCENES.items())
    parser.add_argument("--count", type=_COUNT_OR_NONE, metavar="N", help=f"pictures a split (default: {counts})")
    what = "side of the square pictures (default: %(default)s)"
    parser.add_argument("--size", type=_COUNT, default=256, metavar="PIXELS", help=what)
    parser.add_argument("--workers", type=_COUNT, default=2, metavar="N", help="processes (default: %(default)s)")


def train(parser: Parser) -> None:
    """Train a model on pictures with depth or labels, by a recipe.

    A recipe's values are its own but for what --set says; --dry-run prints them all, as --set takes them. Under torchrun several processes
    train together. A run that was killed goes on from its last checkpoint when the same command is given again, and ends as one that was
    not. DIR of --out gets checkpoint.pt, model.safetensors and best.safetensors, which dpt.load reads, run.json, log.jsonl, curve.png,
    pictures/ and tensorboard/.
    """
    what = f"{', '.join(RECIPES)}; or a model that dpt info lists, whose weights are then fine-tuned on folders of pairs"
    parser.add_argument("recipe", metavar="RECIPE", type=_RECIPE, help=what)
    what = "folder of the data, laid out as the recipe's kind of data is (dpt data lists them)"
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help=what)
    what = "folder of the run; an unfinished run of the same recipe goes on (default: runs/RECIPE)"
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help=what)
    what = "change values of the recipe: batch_size=8, crop=512,512, amp=none, augmentation.flip=0 (default: none is changed)"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=what)
    what = "train nothing, print the recipe, the data and the memory that a step takes, plain and fast, counted without a GPU"
    parser.add_argument("--dry-run", action="store_true", help=what)
    _reading(parser)
    _licence(parser)
    _device(parser)
    _fast(parser)
    what = "how several processes train: ddp, each with all parameters, or fsdp, which shares them out (default: %(default)s)"
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help=what)
    what = "processes that read pictures, beside each that trains; with 0 the training itself reads"
    spared = "one a processor but one, at most 8, shared by those that train"
    parser.add_argument("--workers", type=_COUNT_OR_NONE, metavar="N", help=f"{what} (default: {spared})")


def evaluate(parser: Parser) -> None:
    """The metrics of a model on a data set, beside what its authors published, or those of trivial predictors.

    The model sees what `dpt predict` shows it, and its maps are scored at the size of the ground truth. A protocol says what
    pictures, which part of them, and how relative depth is brought to the truth's scale: figures of two protocols are not
    comparable. Under torchrun the processes share the pictures, and the figures are those of one.
    """
    parser.epilog = "\n".join(["protocols:", *(f"  {name:24}{rows[0].said}" for name, rows in PROTOCOLS.items())])
    parser.rules = [
        (lambda args: args.model is None and args.weights is None, "it needs NAME, a model, or --weights FILE"),
        (
            lambda args: args.train_data is not None and args.protocol != "folder",
            "--train-data is for --protocol folder, which has predictors",
        ),
    ]
    parser.add_argument("model", nargs="?", type=_NAME, metavar="NAME", help="a model that dpt info lists (default: what --weights says)")
    _weights(parser)
    _licence(parser)
    what = "the data set's folder; of protocols of folders, and of folder itself, images/ beside depth/ or labels/"
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help=what)
    parser.add_argument("--protocol", default="folder", type=_PROTOCOL, metavar="NAME", help="one of those below (default: %(default)s)")
    what = "how DIR is laid out (default: as the protocol's data set; folder: images/ beside depth/ or labels/)"
    parser.add_argument("--kind", choices=sorted({row.data for rows in PROTOCOLS.values() for row in rows}), help=what)
    what = "training folder, for the trivial predictors (default: they learn from --data)"
    parser.add_argument("--train-data", type=Path, metavar="DIR", help=what)
    _batch_size(parser)
    _views(parser)
    _focal(parser)
    _reading(parser)
    _max_depth(parser)
    _device(parser)
    _fast(parser)
    _graph(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file (default: only print them)")
