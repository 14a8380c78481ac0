"""Classify photographs with a file that `repair export --preprocess photo` wrote. No PyTorch here.

python examples/deploy.py model.onnx photo.jpg ...
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
classes = session.get_modelmeta().custom_metadata_map["layermend.class_names"].split("\n")
for path in sys.argv[2:]:
    photo = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    scores = session.run(["probabilities"], {"images": photo[None]})[0][0]
    print(f"{path}\t{classes[scores.argmax()]}\t{scores.max():.4f}")
