"""More than sixty kinds of files that are no plain photograph, and what is to become of each."""

import os
import socket
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import scene

SIZE = (30, 42)


def image(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(scene(3, size)[0]).convert(mode)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def oriented(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(image(), "JPEG", exif=exif.tobytes())


def animated(kind: str) -> bytes:
    return saved(image(), kind, save_all=True, append_images=[image().rotate(180)])


def files() -> dict[str, tuple[bytes, bool]]:
    """By name, the bytes, and whether a picture can be had of them."""
    jpeg, draw = saved(image(), "JPEG"), np.random.default_rng(0)
    whole = {kind: saved(image(), kind) for kind in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")}
    found: dict[str, tuple[bytes, bool]] = {}
    for length in (1, 2, 3, 4, 11, 20, 100, 300, len(jpeg) // 2, len(jpeg) - 200, len(jpeg) - 30):
        found[f"jpeg cut at {length}.jpg"] = jpeg[:length], False
    for kind, share in (("PNG", 0.01), ("PNG", 0.5), ("GIF", 0.3), ("WEBP", 0.5), ("TIFF", 0.5), ("BMP", 0.5)):
        found[f"{kind} cut at {share}.{kind.lower()}"] = whole[kind][: int(share * len(whole[kind]))], False
    found["ppm cut.ppm"] = whole["PPM"][:-500], False
    found["jp2 cut.jp2"] = whole["JPEG2000"][:200], False
    found["no end marker.jpg"] = jpeg[:-2], False
    found["empty.jpg"] = b"", False
    found["text.jpg"] = b"not a picture\n" * 20, False
    found["page.jpg"] = b"<!doctype html><title>404</title>", False
    found["drawing.jpg"] = b'<svg xmlns="http://www.w3.org/2000/svg"/>', False
    found["document.jpg"] = b"%PDF-1.4\n%", False
    found["archive.jpg"] = b"PK\x03\x04" + bytes(60), False
    found["program.jpg"] = b"\x7fELF" + bytes(60), False
    found["postscript.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", False
    found["zeros.jpg"] = bytes(5000), False
    found["noise.jpg"] = draw.bytes(5000), False
    found["noise behind a header.jpg"] = jpeg[:20] + draw.bytes(3000), False
    found["a png in fact.jpg"] = whole["PNG"], True
    found["a jpeg in fact.png"] = jpeg, True
    found["in capitals.JPG"] = jpeg, True
    found["rubbish behind it.jpg"] = jpeg + draw.bytes(3000), True
    found["broken checksum.png"] = whole["PNG"][:29] + b"\0\0\0\0" + whole["PNG"][33:], False
    found["bomb.png"] = png(60000, 60000, data=bytes(1000)), False
    found["bomb.gif"] = b"GIF89a" + struct.pack("<HH", 65535, 65535) + whole["GIF"][10:], False
    found["a wide bomb.png"] = png(2**31 - 1, 1, data=bytes(10)), False
    found["no width.png"] = png(0, 10), False
    found["no height.png"] = png(10, 0), False
    found["no pixels.png"] = png(40, 30), False
    found["text bomb.png"] = (
        png(4, 4, data=bytes(52), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        False,
    )
    found["no lines.jpg"] = (
        jpeg.replace(b"\xff\xc0\x00\x11\x08" + struct.pack(">H", SIZE[0]), b"\xff\xc0\x00\x11\x08\0\0"),
        False,
    )
    found["one pixel.png"] = saved(image(size=(1, 1)), "PNG"), True
    found["a line.png"] = saved(image(size=(1, 20000)), "PNG"), True
    found["a column.png"] = saved(image(size=(20000, 1)), "PNG"), True
    found["16 bits.png"] = saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54), "PNG"), True
    found["16 bits.tif"] = saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54), "TIFF"), True
    found["nan.tif"] = saved(Image.fromarray(np.full((30, 40), np.nan, np.float32)), "TIFF"), True
    found["32 bits.tif"] = saved(Image.fromarray(np.full((30, 40), 70000, np.int32)), "TIFF"), True
    found["cmyk.jpg"] = saved(image("CMYK"), "JPEG"), True
    found["grey.jpg"] = saved(image("L"), "JPEG"), True
    found["one bit.png"] = saved(image("1"), "PNG"), True
    found["palette.png"] = saved(image("P"), "PNG", transparency=3), True
    found["transparent.png"] = saved(image("RGBA"), "PNG"), True
    found["grey and transparent.png"] = saved(image("LA"), "PNG"), True
    found["interlaced.gif"] = saved(image(), "GIF", interlace=1), True
    found["progressive.jpg"] = saved(image(), "JPEG", progressive=True), True
    found["two pictures.jpg"] = animated("MPO"), True
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        found[f"animated.{kind.lower()}"] = animated(kind), True
    for value in (0, 3, 6, 8, 9):
        found[f"turned {value}.jpg"] = oriented(value), True
    found["broken exif.jpg"] = saved(image(), "JPEG", exif=b"Exif\0\0MM\0*" + draw.bytes(80)), True
    found["exif of nothing.jpg"] = saved(image(), "JPEG", exif=b"Exif\0\0"), True
    found["broken profile.jpg"] = saved(image(), "JPEG", icc_profile=draw.bytes(200)), True
    found["a loop of tables.tif"] = b"II*\0\x08\0\0\0\0\0\x08\0\0\0", False
    found["new\nline.jpg"] = jpeg, True
    found["<b>markup<br> & [red]'\".jpg"] = jpeg, True
    found[os.fsdecode(b"\xff\xfe bytes.jpg")] = jpeg, True
    found[os.fsdecode(b"\xff\xfe text.jpg")] = b"text", False
    found["ü 日本 🦊.jpg"] = jpeg, True
    found["n" * 251 + ".jpg"] = jpeg, True
    found[" spaces .jpg"] = jpeg, True
    found["narrow\u202fspace.jpg"] = jpeg, True
    found["bell\a.jpg"] = jpeg, True
    found["-option.jpg"] = jpeg, True
    return found


def odd_ones(root: Path) -> dict[str, bool]:
    """What is no file, or leads nowhere; by name, whether a picture can be had of it."""
    jpeg = saved(image(), "JPEG")
    (root / "a directory.jpg").mkdir()
    (root / "a directory.jpg" / "inside.jpg").write_bytes(jpeg)
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "there.jpg").symlink_to("back.jpg")
    (root / "back.jpg").symlink_to("there.jpg")
    (root / "nowhere.jpg").symlink_to("gone.jpg")
    (root / "elsewhere.jpg").symlink_to("a directory.jpg/inside.jpg")
    (root / "to a directory.jpg").symlink_to("a directory.jpg")
    (root / "without end.jpg").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(root)  # its address may not be long
        bound.bind("socket.jpg")
        os.chdir(here)
    with (root / "sparse.jpg").open("wb") as file:
        file.truncate(2**26)
    (root / "unreadable.jpg").write_bytes(jpeg)
    (root / "unreadable.jpg").chmod(0)
    is_root = os.geteuid() == 0
    return {
        "a directory.jpg/inside.jpg": True,
        "loop.jpg": False,
        "there.jpg": False,
        "back.jpg": False,
        "nowhere.jpg": False,
        "elsewhere.jpg": True,
        "to a directory.jpg": False,
        "without end.jpg": False,
        "pipe.jpg": False,
        "socket.jpg": False,
        "sparse.jpg": False,
        "unreadable.jpg": is_root,
    }


def written(root: Path) -> dict[str, bool]:
    """All of them in a folder; by name, whether a picture can be had of it."""
    root.mkdir(parents=True)
    wanted: dict[str, bool] = {}
    for name, (data, is_good) in files().items():
        (root / name).write_bytes(data)
        wanted[name] = is_good
    return wanted | odd_ones(root)
