"""A hundred files that are not what their names say, or say of themselves what cannot be."""

import contextlib
import io
import os
import socket
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)


def encode(image, kind="PNG", **how):
    image.save(stream := io.BytesIO(), kind, **how)
    return stream.getvalue()


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(width, height, depth=8, colour=2, data=b"\0" * 99):
    """A PNG whose head claims any size."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def images():
    """Return name to bytes of images."""
    rgb = Image.fromarray(PIXELS)
    whole, jpeg, gif = encode(rgb), encode(rgb, "JPEG"), encode(rgb, "GIF")
    found = {
        f"mode_{mode}.png": encode(rgb.convert(mode)) for mode in ("1", "L", "LA", "P", "RGBA")
    }
    found |= {
        f"mode_{mode}.tiff": encode(rgb.convert(mode), "TIFF") for mode in ("F", "I", "CMYK", "LAB")
    }
    found |= {"mode_I16.png": encode(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257))}
    found |= {
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "animated.gif": encode(rgb, "GIF", save_all=True, append_images=[rgb] * 3),
    }
    found |= {f"cut_{n}.png": whole[:n] for n in (0, 1, 8, 20, 40, len(whole) - 20)}
    found |= {f"cut_{n}.jpg": jpeg[:n] for n in (2, 100, len(jpeg) // 2)}
    found |= {
        f"flip_{n}.png": whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :]
        for n in range(16, 90, 9)
    }
    sizes = [
        (0, 0),
        (0, 5),
        (1, 2**31 - 1),
        (2**31 - 1, 1),
        (2**32 - 1, 2**32 - 1),
        (60_000, 60_000),
        (13_000, 13_000),
        (2**16, 1),
    ]
    found |= {f"claims_{w}x{h}.png": png(w, h) for w, h in sizes}
    found |= {"flat_1x60000.png": encode(Image.new("RGB", (1, 60_000)))}
    found |= {
        "bomb_text.png": whole[:33]
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**26))
        + whole[33:]
    }
    found |= {
        "gif.png": gif,
        "text.png": b"no image",
        "svg.png": b"<svg/>",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    found |= {
        "pgm_zero.pgm": b"P5 0 0 255\n",
        "pgm_lies.pgm": b"P5 99999 99999 255\n\0",
        "pgm_negative.pgm": b"P5 -1 -1 255\n",
        "bmp_lies.bmp": encode(rgb, "BMP")[:18] + b"\xff\xff\xff\x7f" * 2 + b"\0" * 60,
    }
    return found


def header(text, version=(1, 0)):
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) + 1)
    return b"\x93NUMPY" + bytes(version) + size + text.encode("latin1") + b"\n"


def npy(shape, descr="'<f4'", order="False", data=b"", version=(1, 0)):
    return (
        header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}", version)
        + data
    )


def save(array, **how):
    np.save(stream := io.BytesIO(), array, **how)
    return stream.getvalue()


def arrays():
    """Return name to bytes of .npy files."""
    x = RNG.random((3, 3, 8, 8))
    found = {
        f"{kind}.npy": save(x.astype(kind))
        for kind in ("f2", "f4", "f8", ">f4", "g", "c8", "?", "i8", "S4", "U4")
    }
    found |= {
        "object.npy": save(np.array([{}], dtype=object), allow_pickle=True),
        "structured.npy": save(np.zeros(3, [("a", "f4"), ("b", "i4")])),
    }
    found |= {
        "scalar.npy": save(np.float32(1)),
        "rows_0.npy": save(x[:0]),
        "fortran.npy": save(np.asfortranarray(x)),
        "strided.npy": save(x[::-1, :, ::-1]),
    }
    found |= {
        "nan.npy": save(np.full((3, 3, 8, 8), np.nan)),
        "inf.npy": save(np.full((3, 3, 8, 8), 1e300)),
        "large.npy": save(np.full((3, 3, 8, 8), 3e38, np.float32)),
    }
    found |= {
        "pixels_0.npy": save(np.zeros((3, 0, 5, 3), np.uint8)),
        "pixels_1.npy": save(np.zeros((3, 1, 1, 3), np.uint8)),
        "pixels_2.npy": save(np.zeros((3, 4, 4, 2), np.uint8)),
    }
    shapes = [
        "(2**40,)",
        "(1099511627776, 3, 8, 8)",
        "(-1, 3, 8, 8)",
        "(9223372036854775808, 3, 8, 8)",
        "(True, 3, 8, 8)",
        "(1.5, 3, 8, 8)",
        "3",
        "()",
        "[3, 3, 8, 8]",
        "(0, 3, 8, 8)",
    ]
    found |= {f"shape_{i}.npy": npy(shape, data=b"\0" * 768) for i, shape in enumerate(shapes)}
    found |= {
        f"descr_{i}.npy": npy("(1, 3, 8, 8)", descr, data=b"\0" * 768)
        for i, descr in enumerate(
            [
                "'|O'",
                "'V0'",
                "'S0'",
                "'nonsense'",
                "None",
                "[('a', '<f4')]",
                "'<f4', 'x': 1",
                "'<M8[ns]'",
            ]
        )
    }
    found |= {
        "huge_row.npy": npy("(1, 1000000, 1000000)", "'|u1'"),
        "code.npy": npy("__import__('os').system('true')"),
        "deep.npy": header("(" * 5000),
    }
    found |= {
        "version_3.npy": npy("(1, 3, 8, 8)", version=(3, 0), data=b"\0" * 768),
        "version_9.npy": npy("(1, 3, 8, 8)", version=(9, 9)),
        "cut.npy": save(x)[:-5],
        "empty.npy": b"",
        "magic.npy": b"\x93NUMPY",
    }
    found |= {
        "fortran_lies.npy": npy("(1099511627776, 3, 8, 8)", order="True"),
        "long_header.npy": header(" " * 60_000),
    }
    return found


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def archives():
    """Return name to bytes of .npz files."""
    x = save(RNG.random((3, 3, 8, 8)).astype(np.float32))
    zeros = npy("(300000, 3, 8, 8)", data=b"\0" * (2**26))
    good = zipped([("x.npy", x)])
    found = {
        "good.npz": good,
        "none.npz": zipped([]),
        "empty.npz": b"",
        "text.npz": b"text",
        "other.npz": zipped([("a.txt", b"a"), ("b.bin", b"b")]),
    }
    found |= {
        "twice.npz": zipped([("x.npy", x), ("y.npy", x), ("x.npy", x)]),
        "absolute.npz": zipped([("/tmp/x.npy", x)]),
        "up.npz": zipped([("../../x.npy", x)]),
    }
    found |= {
        "bomb.npz": zipped([("x.npy", zeros)]),
        "fortran_bomb.npz": zipped(
            [("x.npy", npy("(2000000, 192)", order="True", data=b"\0" * 2**20))]
        ),
    }
    found |= {
        f"{name}.npz": zipped([("x.npy", x)], kind)
        for name, kind in (("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA))
    }
    encrypted = bytearray(good)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(mark) + place] |= 1
    claims = bytearray(good)
    place = claims.index(b"PK\x01\x02") + 24
    claims[place : place + 4] = b"\xf0\xff\xff\xff"
    found |= {
        "encrypted.npz": bytes(encrypted),
        "claims.npz": bytes(claims),
        "inner_cut.npz": zipped([("x.npy", x[:-9])]),
        "inner_huge.npz": zipped([("x.npy", npy("(1099511627776, 3, 8, 8)"))]),
    }
    found |= {f"cut_{n}.npz": good[:n] for n in (10, 100, len(good) - 30)}
    found |= {
        f"flip_{n}.npz": good[:n] + bytes([good[n] ^ 255]) + good[n + 1 :]
        for n in range(0, 200, 40)
    }
    return found


def others(folder):
    """Make what is no file, and names that command a terminal; return the paths."""
    made = [
        folder / name
        for name in ("pipe.png", "pipe.npy", "loop.png", "gone.png", "dir.npy", "socket.png")
    ]
    os.mkfifo(made[0])
    os.mkfifo(made[1])
    made[2].symlink_to(made[2])
    made[3].symlink_to(folder / "nothing")
    made[4].mkdir()
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(folder):  # names are short
        end.bind("socket.png")
    for name in (
        "\x1b[2J.png",
        "a\nb.png",
        "a\rb.png",
        "\u202egnp.exe.png",
        "\udcff.png",
        "=1+1.png",
        "-1.png",
        "é 漢字.png",
    ):
        made.append(folder / name)
        made[-1].write_bytes(encode(Image.fromarray(PIXELS)))
    return made
