"""What mmsegmentation's training pipeline makes of pictures, with the random numbers that it drew.

`python tests/dpt/data/oracles/mmsegmentation.py tests/dpt/data/oracles/mmsegmentation.npz`, in the environment of
`tests/dpt/nets/oracles/README.md` (mmsegmentation 1.2.2, mmcv-lite 2.1.0, OpenCV 5.0.0, NumPy 2.4.6).

The pipeline is that of the published configuration, with its scale of (2048, 512) and its crop of 512 divided by ten, and what follows it
in the data preprocessor: colours to RGB, normalised, padded. For each sample NAME of the file

    NAME.shape, NAME.seed   the picture is RandomState(seed).randint(0, 256, (*shape, 3)), RGB, and its labels, from 0, are the next
                            randint(0, 5, (h, w)), repeated to blocks of 36 pixels
    NAME.drawn              the random numbers, in the order in which they were drawn; of the resize the ratio; of the mirror 0 if mirrored
    NAME.picture            (3, 51, 51) float32, at every fourth row and column of what the network sees
    NAME.levels             uint8 (h', w', 3), RGB, before it is normalised
    NAME.labels             uint8 (51, 51), of what the network learns
"""

import copy
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SCALE, CROP, BLOCK, STRIDE = (205, 51), (51, 51), 36, 4
SAMPLES = {
    f"{name}{seed}": (shape, seed) for name, shape in (("wide", (60, 80)), ("tall", (83, 62)), ("flat", (40, 180))) for seed in range(3)
}
CONFIGURATION = ".mim/configs/dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py"


def stubbed() -> None:
    """mmcv-lite has no compiled operators, whose names mmsegmentation imports; no transform uses one."""

    class Names(types.ModuleType):
        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    sys.modules["mmcv.ops"] = Names("mmcv.ops")


def logged(drawn: list[float]) -> None:
    """NumPy's global random functions write down what they give."""

    def logging(function, value):
        def drawing(*arguments, **options):
            result = function(*arguments, **options)
            drawn.append(float(value(result)))
            return result

        return drawing

    np.random.randint = logging(np.random.randint, float)
    np.random.uniform = logging(np.random.uniform, float)
    np.random.random_sample = logging(np.random.random_sample, lambda value: value * 1.5 + 0.5)  # of the resize alone
    np.random.choice = logging(np.random.choice, lambda value: 0.0 if value == "horizontal" else 1.0)


def main(target: str) -> None:
    stubbed()
    import mmseg
    from mmcv.transforms import Compose
    from mmengine.config import Config
    from mmseg.models.data_preprocessor import SegDataPreProcessor
    from mmseg.utils import register_all_modules

    register_all_modules()
    config = Config.fromfile(Path(mmseg.__file__).parent / CONFIGURATION)
    steps = [dict(step) for step in config.train_pipeline[1:-1]]  # without reading the picture and packing it
    for step in steps:
        step.update({"RandomResize": {"scale": SCALE}, "RandomCrop": {"crop_size": CROP}}.get(step["type"], {}))
    steps[0]["imdecode_backend"] = "pillow"
    pipeline, packing = Compose(steps), Compose([config.train_pipeline[-1]])
    options = {key: value for key, value in config.model.data_preprocessor.items() if key != "type"}
    preprocessor = SegDataPreProcessor(**{**options, "size": CROP})
    drawn: list[float] = []
    arrays: dict[str, np.ndarray] = {}
    inputs = {}
    for name, (shape, seed) in SAMPLES.items():
        state = np.random.RandomState(seed)
        picture, blocks = state.randint(0, 256, (*shape, 3)), state.randint(0, 5, [-(-side // BLOCK) for side in shape])
        labels = blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[: shape[0], : shape[1]]
        inputs[name] = picture.astype(np.uint8), labels.astype(np.uint8)
    logged(drawn)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (picture, labels)) in enumerate(inputs.items()):
            path = Path(folder) / "labels.png"
            Image.fromarray(labels).save(path)
            np.random.seed(number)
            drawn.clear()
            bgr = picture[..., ::-1].copy()
            results = {"img": bgr, "img_shape": bgr.shape[:2], "ori_shape": bgr.shape[:2], "img_path": name}
            results |= {"seg_map_path": str(path), "label_map": None, "reduce_zero_label": True, "seg_fields": []}
            results = pipeline(results)
            packed = packing(copy.deepcopy(results))
            batch = preprocessor({"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}, training=True)
            seen, found = batch["inputs"][0].numpy(), batch["data_samples"][0].gt_sem_seg.data[0].numpy()
            shape, seed = SAMPLES[name]
            arrays |= {f"{name}.shape": np.array(shape), f"{name}.seed": np.array(seed), f"{name}.drawn": np.array(drawn)}
            arrays |= {f"{name}.levels": results["img"][..., ::-1].astype(np.uint8), f"{name}.labels": found.astype(np.uint8)}
            arrays[f"{name}.picture"] = seen[:, ::STRIDE, ::STRIDE]
            print(name, len(drawn), results["img"].shape, results["scale"], results["flip"], np.unique(found))
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
