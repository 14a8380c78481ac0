"""Classify photographs with a file that `repair export --preprocess nhwc` wrote. No PyTorch here.

python examples/deploy.py model.onnx photo.jpg ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
notes = session.get_modelmeta().custom_metadata_map
classes, settings = (json.loads(notes[f"layermend.{key}"]) for key in ("classes", "preprocessing"))
(height, width), crop = settings["input_size"], settings["crop"]
for path in sys.argv[2:]:
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = max(round(height / crop) / photo.height, round(width / crop) / photo.width)
    size = int(photo.width * scale + 1e-6), int(photo.height * scale + 1e-6)
    photo = photo.resize(size, Image.Resampling[settings["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(photo.crop((left, top, left + width, top + height)))
    scores = session.run(["probabilities"], {"images": pixels[None]})[0][0]
    print(f"{path}\t{classes[scores.argmax()]}\t{scores.max():.4f}")
