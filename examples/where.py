"""What is in a picture, and where, by an exported file: python where.py MODEL.onnx PICTURE OUT.png.

The file is made by `whatwhere export MODEL --uint8 --box --out MODEL.onnx`.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
meta = json.loads(session.get_modelmeta().custom_metadata_map["whatwhere"])
picture = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
logits, maps, box = session.run(None, {"images": np.asarray(picture)[None]})
best = logits[0].argmax()
if meta["activation"] == "sigmoid":  # any number of classes in a picture
    odds = 1 / (1 + np.exp(-logits[0, best]))
else:
    odds = 1 / np.exp(logits[0] - logits[0, best]).sum()
print(meta["labels"][best], f"{odds:.1%}", *box[0].astype(int))
heat = Image.fromarray((maps[0, best].clip(0) / max(maps[0, best].max(), 1e-9) * 200).astype(np.uint8))
picture.paste("red", mask=heat.resize(picture.size, Image.Resampling.BILINEAR))
ImageDraw.Draw(picture).rectangle(box[0].tolist(), outline="white", width=3)
picture.save(sys.argv[3])
